"""What a cluster runs for an attempt at a submitted run: `raymill`, on the code that its request has put in place.

    python -m raymill.cluster.on_head.attempt CODE RUN WORKERS train jobs/mnist/job.yaml ...

It goes on with what the attempt before has saved, with the number of workers that the line has room for.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from raymill.cluster.line import TUNE
from raymill.cluster.on_head.head import RUNS_AT, project_of
from raymill.cluster.on_head.request import JOB_CONFIG
from raymill.errors import RunError
from raymill.files import run_lock, write_record
from raymill.orchestration import tracker
from raymill.orchestration.on_ray import mirror
from raymill.record.catalog import finished
from raymill.record.folder import RunFolder, run_folder
from raymill.tune.folder import NOTHING_DELIVERED, StudyFolder, studies_folder

BEFORE_ENDS_S = 120.0
"""What an earlier attempt has left running has this long to save its state and end."""

POLL_S = 0.2


def main(arguments: Sequence[str]) -> None:
    """Become the command; see `carry_out`."""
    code, run, workers, *command = arguments
    os.environ.pop(JOB_CONFIG, None)
    os.chdir(project_of(code))
    carry_out(run, command, workers, os.environ.pop(RUNS_AT, None))


def carry_out(run: str, command: Sequence[str], workers: str, runs_at: str | None, given_s: float | None = None) -> None:
    """Make an attempt at a run in this process, which ends with what the command ends with.

    Args:
        run: its id; of a search, the study's name.
        command: arguments of `raymill`, as they were submitted.
        workers: how many there is room for, or trials at once; "-": as the job says.
        runs_at: where its folder is kept beside this disk; None: nowhere.
        given_s: when this process was told so, Unix seconds; None: when it started.
    """
    folder = StudyFolder(studies_folder() / run) if command[0] == TUNE else run_folder(run)
    _wait_for_the_one_before(folder)
    if runs_at:
        with kept_at(folder, mirror.AtAddress(runs_at)):
            _become(command, folder, workers, given_s)
    else:
        _become(command, folder, workers, given_s)


@contextmanager
def kept_at(folder: RunFolder | StudyFolder, home: mirror.AtAddress) -> Iterator[None]:
    """Within this the folder of a run, or of a search and its runs, is kept at an address as well; first it is had from there, if
    more is known there than on this disk.
    """
    try:
        _fetch(folder, home)
    except OSError as error:
        sys.exit(f"the address where runs are kept could not be asked for {folder.path.name}: {error}")

    def folders() -> list[Path]:
        runs = folder.runs if isinstance(folder, StudyFolder) else []
        return [*(run.path for run in runs), folder.path]

    say = partial(print, file=sys.stderr, flush=True)
    with mirror.mirrored(folders, home, sent={}, say=say, must_arrive=False):
        yield


def _fetch(folder: RunFolder | StudyFolder, home: mirror.AtAddress) -> None:
    """Have a folder from where it is kept, if more is known there."""

    def on_this_disk(name: str) -> bytes | None:
        path = folder.path / name
        return path.read_bytes() if path.exists() else None

    if _known(folder, partial(home.read, folder.path.name)) <= _known(folder, on_this_disk):
        return
    if isinstance(folder, StudyFolder):
        # Before what tells of them.
        for name in home.names():
            if name.startswith(f"{folder.name}-"):
                _fetch(run_folder(name), home)
    shutil.rmtree(folder.path, ignore_errors=True)
    home.fetch(folder.path)
    # MLflow's store may be lost as well, or another one: it is asked what it has.
    if isinstance(folder, StudyFolder):
        write_record(folder.delivered, NOTHING_DELIVERED)
    else:
        folder.delivery.unlink(missing_ok=True)


def _known(folder: RunFolder | StudyFolder, read: Callable[[str], bytes | None]) -> int:
    """How much is known of a run, or of a search, where this reads its files."""
    if isinstance(folder, StudyFolder):
        return (read(folder.record.name) is not None) + (read(folder.trials.name) or b"").count(b"\n")
    return int(read(folder.attempt.name) or 0)


def _become(command: Sequence[str], folder: RunFolder | StudyFolder, workers: str, given_s: float | None) -> None:
    if isinstance(folder, RunFolder) and "--resume" not in command and finished(folder):
        # The attempt before was asked to end when there was nothing left to do but to deliver it.
        sys.exit(tracker.main([str(folder.path)]))
    sys.argv = ["raymill", *as_attempt(command, folder, workers), *([f"--given-s={given_s}"] if given_s else [])]
    # As `python -m raymill` does: the command line stands above this room.
    runpy.run_module("raymill", run_name="__main__")


def as_attempt(command: Sequence[str], folder: RunFolder | StudyFolder, workers: str) -> list[str]:
    """The command that was submitted, as it goes on with what there is of its run or its search."""
    if isinstance(folder, StudyFolder):
        has_begun, at_most = folder.record.exists(), f"--parallel={workers}"
    else:
        has_begun, at_most = folder.command.exists(), f"--set=scale.max_workers={workers}"
    limit = [at_most] if workers != "-" else []
    if has_begun and "--resume" not in command:
        return [command[0], "--resume", folder.path.name, *limit, "--json"]
    if "--resume" not in command:
        # Whatever is there was killed before it was a run.
        shutil.rmtree(folder.path, ignore_errors=True)
    return [*command, *limit]


def _wait_for_the_one_before(folder: RunFolder | StudyFolder) -> None:
    """Have those end, their state saved, that have outlived what Ray takes for their death: a command without its shell, a driver
    without its command. One that does not is named by the command that comes.
    """
    deadline_s = time.monotonic() + BEFORE_ENDS_S
    while folder.driver_lock.exists() and time.monotonic() < deadline_s:
        try:
            with run_lock(folder.command_lock), run_lock(folder.driver_lock):
                return
        except RunError:
            folder.stop_request.touch()
            time.sleep(POLL_S)


if __name__ == "__main__":
    main(sys.argv[1:])
