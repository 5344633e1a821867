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

ENGINE = Path(__file__).parent
"""Where the engine itself is."""


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
