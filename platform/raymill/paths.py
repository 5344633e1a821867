"""Where a project keeps its state: `.raymill/` in the project, or the folder that RAYMILL_HOME names.

.raymill/
    data/NAME/              data sets made by `raymill data get`
    cache/                  archives they were taken from
    mlflow.db, artifacts/   the MLflow store
    runs/RUN/               one folder per run, see RunFolder
"""

from __future__ import annotations

import os
from pathlib import Path

from raymill.errors import InputError, Problem

ENGINE = Path(__file__).parent
"""Where the engine itself is."""


def find_project(start: Path | None = None) -> Path | None:
    """The project's folder: the nearest at or above `start`, else the current folder, that is one; None: outside of any."""
    here = (start or Path.cwd()).resolve()
    return next((folder for folder in (here, *here.parents) if _is_project(folder)), None)


def _is_project(folder: Path) -> bool:
    """Whether there are jobs beside a `pyproject.toml`, or it speaks of raymill."""
    settings = folder / "pyproject.toml"
    if not settings.is_file():
        return False
    return (folder / "jobs").is_dir() or (folder / "job.yaml").is_file() or b"tool.raymill" in settings.read_bytes()


def project_root() -> Path:
    """The project's folder; outside of any, the current one, where nothing is kept (`home` refuses that)."""
    return find_project() or Path.cwd().resolve()


def in_this_copy(path: str, project: str) -> str:
    """A path in another copy of the project, as it is in this one; what lies outside of that copy stays what it is.

    Args:
        project: the other copy's folder; "": it is not known.
    """
    return str(project_root() / Path(path).relative_to(project)) if Path(path).is_relative_to(project) else path


def no_project() -> Problem:
    """What is said outside of a project."""
    expected = "a folder with `pyproject.toml` and `jobs/`, at or above the current one"
    fix = "Go to your project's folder, make one with `raymill init DIR`, or name a state folder with RAYMILL_HOME."
    return Problem("project", f"none at {Path.cwd()}", expected, fix)


def home() -> Path:
    """The state folder. It may not exist yet.

    Raises:
        InputError: outside of a project, unless RAYMILL_HOME names one.
    """
    if named := os.environ.get("RAYMILL_HOME"):
        return Path(named).resolve()
    if (project := find_project()) is None:
        raise InputError([no_project()])
    return project / ".raymill"


def data_folder(name: str) -> Path:
    """Where the data set of this name is kept."""
    return home() / "data" / name
