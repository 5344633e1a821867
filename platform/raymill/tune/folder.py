"""The files of a study, by name.

.raymill/studies/STUDY/
    study.json          the job, with the search; what every process of the search goes by
    optuna.db           Optuna's own store: every trial, its values, what it came to
    trials.jsonl        trials that are over, one JSON object a line, for whoever follows
    summary.json        what came of it
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymill.errors import InputError, Problem, did_you_mean
from raymill.files import read_record
from raymill.orchestration.on_ray.run_files import STUDY, TRIALS
from raymill.paths import home
from raymill.record.folder import RunFolder, runs_folder

FINISHED, FAILED, INTERRUPTED, UNWRITABLE = 0, 1, 3, 4
"""What the driver's process ends with: it is over; it failed, see `failure`; it was stopped; the failure could not be written."""

NOTHING_DELIVERED: dict[str, Any] = {"offset": 0, "parent": None, "closed": False}
"""How far the delivery to MLflow is known to have come, which may have more."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class StudyFolder:
    """The files of one study.

    Attributes:
        path: `.raymill/studies/STUDY`.
    """

    path: Path

    @property
    def name(self) -> str:
        """The study's name, which is the folder's."""
        return self.path.name

    @property
    def record(self) -> Path:
        """The job, its overrides, where it was given, the search; as JSON."""
        return self.path / STUDY

    @property
    def plan(self) -> Path:
        """The plan of the job as it stands, as JSON."""
        return self.path / "plan.json"

    @property
    def store(self) -> Path:
        """Optuna's."""
        return self.path / "optuna.db"

    @property
    def trials(self) -> Path:
        """Trials that are over."""
        return self.path / TRIALS

    @property
    def runs(self) -> list[RunFolder]:
        """The folders of its trials' runs, in order."""
        return [RunFolder(path) for path in sorted(runs_folder().glob(f"{self.name}-[0-9]*"))]

    @property
    def summary(self) -> Path:
        """What came of it, as JSON."""
        return self.path / "summary.json"

    @property
    def failure(self) -> Path:
        """Why the driver ended, as JSON."""
        return self.path / "failure.json"

    @property
    def stop_request(self) -> Path:
        """Is there when the search is to end, its trials saved."""
        return self.path / "stop.request"

    @property
    def command_lock(self) -> Path:
        """Held by the command."""
        return self.path / "command.lock"

    @property
    def driver_lock(self) -> Path:
        """Held by the driver."""
        return self.path / "driver.lock"

    @property
    def delivery_lock(self) -> Path:
        """Held by what delivers to MLflow."""
        return self.path / "delivery.lock"

    @property
    def delivered(self) -> Path:
        """How far the delivery to MLflow came, as JSON."""
        return self.path / "delivered.json"

    @property
    def pictures(self) -> Path:
        """The pictures of the search."""
        return self.path / "pictures"

    @property
    def log(self) -> Path:
        """What Ray and the trials printed."""
        return self.path / "ray.log"


def studies_folder() -> Path:
    """Where the project keeps its studies."""
    return home() / "studies"


def all_studies() -> list[StudyFolder]:
    """The studies of the project, newest first."""
    found = [StudyFolder(record.parent) for record in studies_folder().glob("*/study.json")]
    return sorted(found, key=lambda one: one.record.stat().st_mtime, reverse=True)


def find_study(name: str) -> StudyFolder:
    """A study by its name.

    Raises:
        InputError: there is none; names the nearest.
    """
    folder = StudyFolder(studies_folder() / name) if _PLAIN_NAME.fullmatch(name) else None
    if folder is None or not folder.record.exists():
        known = [one.name for one in all_studies()]
        raise InputError([Problem("study", repr(name[:200]), "a study of this project", did_you_mean(name, known))])
    return folder


def unfinished_study(job: str, search: dict[str, Any]) -> StudyFolder | None:
    """The newest study of a job and of this search that is not over."""
    for one in all_studies():
        record = read_record(one.record)
        if record["job"] == job and record["search"] == search:
            # The driver concludes a study; the command that was shown it, and saw it delivered, notes that as well.
            concluded = read_record(one.summary) if one.summary.exists() else {}
            return None if concluded.get("delivered_to_mlflow") and not one.stop_request.exists() else one
    return None
