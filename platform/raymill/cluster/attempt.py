"""What a cluster runs for an attempt at a submitted run: `raymill`, on the code that its request has put in place.

    python -m raymill.cluster.attempt REQUEST RUN WORKERS train jobs/mnist/job.yaml ...

It goes on with what the attempt before has saved, with the number of workers that the line has room for.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from raymill.cluster.request import engine_of, project_of
from raymill.errors import RunError
from raymill.files import read_record, run_lock
from raymill.record.folder import RunFolder, run_folder

BEFORE_ENDS_S = 120.0
"""What an earlier attempt has left running has this long to save its state and end."""

POLL_S = 0.2


def main(arguments: Sequence[str]) -> int:
    """Returns what the command ends with; 128 and a signal's number where one killed it."""
    request, run, workers, *command = arguments
    folder = run_folder(run)
    _wait_for_the_one_before(folder)
    if "--resume" not in command and _is_finished(folder):
        # The attempt before was asked to end when there was nothing left to do but to deliver it.
        return subprocess.run([sys.executable, "-m", "raymill.orchestration.tracker", str(folder.path)], check=False).returncode
    # Asked to stop, it waits for the command, which is asked as well, to save its state.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    kept = {name: value for name, value in os.environ.items() if name != "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    done = subprocess.run(
        [sys.executable, "-m", "raymill", *as_attempt(command, folder, workers)],
        cwd=project_of(request),
        env=kept | {"PYTHONPATH": str(engine_of(request))},
        check=False,
    )
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def as_attempt(command: Sequence[str], folder: RunFolder, workers: str) -> list[str]:
    """The command that was submitted, as it goes on with what there is of its run."""
    given = list(command) + ([f"--set=scale.max_workers={workers}"] if workers != "-" else [])
    if "--resume" in given or not folder.command.exists():
        # Whatever is there was killed before it was a run.
        if "--resume" not in given:
            shutil.rmtree(folder.path, ignore_errors=True)
        return given
    return ["train", "--resume", folder.run_id, *([given[-1]] if workers != "-" else []), "--json"]


def _is_finished(folder: RunFolder) -> bool:
    return folder.summary.exists() and read_record(folder.summary).get("status") == "finished"


def _wait_for_the_one_before(folder: RunFolder) -> None:
    """Have a driver end that has outlived its command, its state saved. One that does not is named by the command that comes."""
    deadline_s = time.monotonic() + BEFORE_ENDS_S
    while folder.driver_lock.exists() and time.monotonic() < deadline_s:
        try:
            with run_lock(folder.driver_lock):
                return
        except RunError:
            folder.stop_request.touch()
            time.sleep(POLL_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
