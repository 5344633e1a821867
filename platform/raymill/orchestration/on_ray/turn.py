"""Whose turn it is to drive a run. A driver may stand by: all that an attempt needs is started and imported, and its workers
wait for their turn, so that it takes over within seconds when the driver before it is gone, whatever the cause was.

    supervisor   starts the driver with STAND_BY and a pipe, and later writes the run's folder to it; should the supervisor
                 itself die, the pipe ends, and there will be no turn
    driver       takes the run's lock when its turn comes, and opens the gate
    workers      wait at the gate, a file of the session that the driver keeps locked until then

Until its turn nothing of a driver touches the run's folder: not an event, not a number of an attempt, not a checkpoint. So it
need not know before which run it will drive.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TextIO

from raymill import faults
from raymill.errors import RunError
from raymill.files import private, run_lock
from raymill.record.folder import RunFolder

STAND_BY = "--stand-by"
GATE, OPEN = "gate", "open"


class Turn:
    """A driver's turn: it has come when the context is entered, unless it stands by. Holds the run's lock from then on."""

    def __init__(self, folder: RunFolder | None, session: Path, arguments: Sequence[str]) -> None:
        """For this run, in this session's folder, as the driver's command line says; None: it will be told which."""
        self.folder, self._session = folder, session
        self._pipe = int(arguments[arguments.index(STAND_BY) + 1]) if STAND_BY in arguments else None
        self._lock = ExitStack()
        self.is_given = False
        """Whether the supervisor has said that it is this driver's turn."""
        self.has_come = False
        """Whether the driver holds the run."""
        self.refused: RunError | None = None
        """Why the turn could not be taken: another process drives the run."""
        self.is_decided = threading.Event()
        """Set once the turn has come, or it is known that it will not."""

    @property
    def known_folder(self) -> RunFolder:
        """The run's folder.

        Raises:
            RunError: the run is not known yet.
        """
        if self.folder is None:
            raise RunError("a driver without a turn was asked for its run")
        return self.folder

    def __enter__(self) -> Turn:
        if self._pipe is None:
            self._take()
            return self
        # The thread closes, and so unlocks it.
        gate = open(self._session / GATE, "w", opener=private)
        fcntl.flock(gate, fcntl.LOCK_EX)
        threading.Thread(target=self._stand_by, args=(self._pipe, gate), name="turn", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()

    def _stand_by(self, pipe: int, gate: TextIO) -> None:
        with gate:
            if told := _read_all(pipe):
                self.folder = RunFolder(Path(told))
                try:
                    self._take()
                    gate.write(OPEN)
                except RunError as error:
                    self.refused = error
            self.is_decided.set()

    def _take(self) -> None:
        self.is_given = True
        self._lock.enter_context(run_lock(self.known_folder.driver_lock))
        self.has_come = True
        faults.point("driver_start")


def give_turn(pipe: int, folder: RunFolder) -> None:
    """Tell the driver at the other end of a pipe that it is its turn to drive a run. The pipe is closed.

    Raises:
        BrokenPipeError: there is no driver.
    """
    with os.fdopen(pipe, "wb") as told:
        told.write(bytes(folder.path))


def _read_all(pipe: int) -> str:
    """What is written to a pipe until its end; nothing where whoever was to write has died."""
    with os.fdopen(pipe, "rb") as told:
        return os.fsdecode(told.read())


# ---------------------------------------------------------------- on a worker


def has_come(session: Path) -> bool:
    """Whether the turn of this worker's driver has come already."""
    return _at_gate(session, fcntl.LOCK_SH | fcntl.LOCK_NB)


def wait_at_gate(session: Path) -> bool:
    """Wait until the driver opens the gate; returns False where its turn will never come."""
    return _at_gate(session, fcntl.LOCK_SH)


def _at_gate(session: Path, how: int) -> bool:
    gate = session / GATE
    if not gate.exists():
        # The driver did not stand by.
        return True
    with open(gate) as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            return False
        return file.read() == OPEN
