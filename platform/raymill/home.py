"""Where a project keeps its state: `.raymill/` in the project, or the folder that RAYMILL_HOME names.

.raymill/
    data/NAME/              data sets made by `raymill data get`
    cache/                  archives they were taken from
    mlflow.db, artifacts/   the MLflow store
    runs/RUN/               one folder per run, see RunFolder
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` that holds `jobs/` and `pyproject.toml`; else `start` itself."""
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "jobs").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    return here


def home() -> Path:
    """The state folder. It may not exist yet."""
    named = os.environ.get("RAYMILL_HOME")
    return Path(named).resolve() if named else project_root() / ".raymill"


def data_folder(name: str) -> Path:
    """Where the data set of this name is kept."""
    return home() / "data" / name


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
    def manifest(self) -> Path:
        """The input's fragments with rows, bytes and identities, as JSON."""
        return self.path / "manifest.json"

    @property
    def environment(self) -> Path:
        """Versions, machine, git commit and dirty state, as JSON."""
        return self.path / "environment.json"

    @property
    def events(self) -> Path:
        """What happened, one JSON object a line, appended by rank 0 and the driver: the durable queue to MLflow."""
        return self.path / "events.jsonl"

    @property
    def delivered(self) -> Path:
        """How far the events were delivered to MLflow, and the MLflow run's id, as JSON."""
        return self.path / "delivered.json"

    @property
    def summary(self) -> Path:
        """The result of the run, as JSON."""
        return self.path / "summary.json"

    @property
    def command(self) -> Path:
        """When the command was given that the current attempts belong to, as JSON."""
        return self.path / "command.json"

    @property
    def outcome(self) -> Path:
        """Why the last driver ended without finishing, as JSON."""
        return self.path / "outcome.json"

    @property
    def lease(self) -> Path:
        """Locked by the process that drives the run; holds its pid."""
        return self.path / "lease"

    @property
    def owner(self) -> Path:
        """Locked by the command that keeps the run going; holds its pid."""
        return self.path / "owner"

    @property
    def stop(self) -> Path:
        """There while the workers are asked to save and stop."""
        return self.path / "stop"

    @property
    def handover(self) -> Path:
        """There while the workers are asked to save and end, because others go on: another number, or elsewhere."""
        return self.path / "handover"

    @property
    def attempt(self) -> Path:
        """The number of the attempt that trains, or trained last."""
        return self.path / "attempt"

    @property
    def version(self) -> Path:
        """The registered model version, as JSON."""
        return self.path / "version.json"

    @property
    def quarantine(self) -> Path:
        """The bad rows of the run, one JSON object a line, with bad_rows.policy: quarantine."""
        return self.path / "quarantine.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def ray_log(self) -> Path:
        """What Ray and the workers printed."""
        return self.path / "ray.log"

    @property
    def tracking_log(self) -> Path:
        """What the tracking process printed."""
        return self.path / "tracking.log"


def runs_folder() -> Path:
    """The folder of all runs."""
    return home() / "runs"


def run_folder(run_id: str) -> RunFolder:
    """The folder of one run, which may not exist yet."""
    return RunFolder(runs_folder() / run_id)
