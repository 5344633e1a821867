"""What a cluster runs for a submitted run: `raymill` with these arguments, on code that stays for as long as it does.

    python -m raymill.cluster.entry SUBMISSION train jobs/mnist/job.yaml ...

Ray removes what was sent with a job once any process of the same code has ended, though others go on; a run has many processes,
one after the other. So the project and raymill itself are copied first, into the state folder, and removed in the end.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from raymill.files import make_private_folder
from raymill.paths import ENGINE, home


def main(arguments: list[str]) -> int:
    """Returns what the command ends with."""
    submission, *command = arguments
    make_private_folder(home())
    folder = home() / "submitted" / submission
    make_private_folder(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(Path.cwd(), folder / "project")
    shutil.copytree(ENGINE, folder / "engine" / "raymill")
    # Asked to stop, it waits for the command, which is asked as well, to save its state.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    kept = {name: value for name, value in os.environ.items() if name != "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "raymill", *command],
            cwd=folder / "project",
            env=kept | {"PYTHONPATH": str(folder / "engine")},
            check=False,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
