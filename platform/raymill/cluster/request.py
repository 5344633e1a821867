"""What a cluster does for a run that is submitted: puts its code in place, and sees to it that somebody acts on the line.

    python -m raymill.cluster.request REQUEST

Ray removes what was sent with a job once any process of the same code has ended, though others go on; a run has many processes,
one after the other, and waits before its first. So the project and raymill itself are copied into the state folder of the head.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from raymill.cluster import queue
from raymill.files import make_private_folder
from raymill.paths import ENGINE, home


def folder_of(request: str) -> Path:
    """Where the code of a request lies on the head, until the request is over."""
    return home() / "submitted" / request


def project_of(request: str) -> Path:
    """The project, as it was submitted."""
    return folder_of(request) / "project"


def engine_of(request: str) -> Path:
    """The folder that raymill is imported from, as it was submitted."""
    return folder_of(request) / "engine"


def main(arguments: list[str]) -> int:
    """Returns 0: it is in place."""
    (request,) = arguments
    make_private_folder(home())
    make_private_folder(folder_of(request).parent)
    shutil.rmtree(folder_of(request), ignore_errors=True)
    shutil.copytree(Path.cwd(), project_of(request))
    shutil.copytree(ENGINE, engine_of(request) / ENGINE.name)
    os.environ.pop("RAY_JOB_CONFIG_JSON_ENV_VAR", None)
    queue.ensure(engine_of(request))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
