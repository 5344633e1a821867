"""The files of a run, by name. Paths only: what stands in each is the business of whoever writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from raymill.errors import InputError, Problem
from raymill.paths import home

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run. Whoever wants to know about a run reads them; nobody asks a process.

    Attributes:
        path: `.raymill/runs/RUN`.
    """

    path: Path

    @property
    def run_id(self) -> str:
        """The run's id, which is the folder's name."""
        return self.path.name

    @property
    def spec(self) -> Path:
        """The resolved job, as JSON."""
        return self.path / "spec.json"

    @property
    def plan(self) -> Path:
        """Every derived number, as JSON."""
        return self.path / "plan.json"

    @property
    def data_manifest(self) -> Path:
        """The input's fragments with rows, bytes and identities, as JSON."""
        return self.path / "data_manifest.json"

    @property
    def environment(self) -> Path:
        """Versions, machine, git commit and dirty state, as JSON."""
        return self.path / "environment.json"

    @property
    def code(self) -> Path:
        """What the job's own code was, as JSON; the files themselves are in the folder `code`. See `kept_code`."""
        return self.path / "code.json"

    @property
    def events(self) -> Path:
        """What happened, one JSON object a line, appended by rank 0 and the driver: the durable queue to MLflow."""
        return self.path / "events.jsonl"

    @property
    def delivery(self) -> Path:
        """How far the events were delivered to MLflow, and the MLflow run's id, as JSON."""
        return self.path / "delivery.json"

    @property
    def mlflow_run(self) -> Path:
        """Where the run is in MLflow, as JSON: the store, and the experiment's name and id."""
        return self.path / "mlflow_run.json"

    @property
    def summary(self) -> Path:
        """The result of the run, as JSON."""
        return self.path / "summary.json"

    @property
    def command(self) -> Path:
        """When the command was given that the current attempts belong to, and who executes it, as JSON."""
        return self.path / "command.json"

    @property
    def places(self) -> Path:
        """The name under which Ray reserves places for the run, as JSON; absent: its id."""
        return self.path / "places.json"

    @property
    def failure(self) -> Path:
        """Why the last driver ended without finishing, as JSON."""
        return self.path / "failure.json"

    @property
    def driver_lock(self) -> Path:
        """Locked by the process that drives the run; holds its pid."""
        return self.path / "driver.lock"

    @property
    def command_lock(self) -> Path:
        """Locked by the command that keeps the run going; holds its pid."""
        return self.path / "command.lock"

    @property
    def stop_request(self) -> Path:
        """There while the workers are asked to save and stop."""
        return self.path / "stop"

    @property
    def handover_request(self) -> Path:
        """There while the workers are asked to save and end, because others go on: another number, or elsewhere."""
        return self.path / "handover"

    @property
    def attempt(self) -> Path:
        """The number of the attempt that trains, or trained last."""
        return self.path / "attempt"

    @property
    def model_version(self) -> Path:
        """The registered model version, as JSON."""
        return self.path / "model_version.json"

    @property
    def quarantine(self) -> Path:
        """The bad rows of the run, one JSON object a line, with bad_rows.policy: quarantine."""
        return self.path / "quarantine.jsonl"

    @property
    def pictures(self) -> Path:
        """The folder of pictures that evaluations made."""
        return self.path / "pictures"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def ray_log(self) -> Path:
        """What Ray and the workers printed."""
        return self.path / "ray.log"

    @property
    def delivery_lock(self) -> Path:
        """Locked by the process that delivers to MLflow."""
        return self.path / "delivery.lock"

    @property
    def tracking_failure(self) -> Path:
        """Why MLflow did not take everything, as JSON."""
        return self.path / "tracking_failure.json"

    @property
    def tracking_log(self) -> Path:
        """What the tracking process printed."""
        return self.path / "tracking.log"


def runs_folder() -> Path:
    """The folder of all runs."""
    return home() / "runs"


def is_run_id(name: str) -> bool:
    """Whether this could be the id of a run: a plain name, and so no path that leads elsewhere."""
    return _PLAIN_NAME.fullmatch(name) is not None


def run_folder(run_id: str) -> RunFolder:
    """The folder of one run, which may not exist yet.

    Raises:
        InputError: the id is no plain name.
    """
    if not is_run_id(run_id):
        expected = "the id of a run: letters, digits, '.', '_' or '-', beginning with a letter or digit"
        raise InputError([Problem("run", f"{run_id[:60]!r}", expected, "`raymill runs list` names them.")])
    return RunFolder(runs_folder() / run_id)
