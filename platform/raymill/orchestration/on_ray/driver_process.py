"""A driver from its supervisor's point of view: its process, its session, and whether one more should stand by."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import psutil

from raymill.files import private
from raymill.orchestration.on_ray import session_folder
from raymill.orchestration.on_ray.group import GROUP, Group
from raymill.orchestration.on_ray.turn import STAND_BY, give_turn
from raymill.paths import project_root
from raymill.record.folder import RunFolder

PAYS_S = 300.0
"""A driver that stands by costs half a minute of CPU to start: too much for a run that is over before long."""

MEMORY_FACTOR = 2.0
"""How much of what a session takes must be free before another one is started, so that it crowds nobody out."""


class DriverProcess:
    """One driver, from its start to the end of its session. It must be ended, whatever becomes of it."""

    def __init__(self, folder: RunFolder | None, *, standing_by: bool = False, group: Group | None = None) -> None:
        """Start it; its turn has come unless it stands by.

        Args:
            folder: of the run that it will drive; None: that is said when its turn comes, and it stands by with a group.
            standing_by: whether another one drives the run.
            group: the workers to have ready for a run that nobody knows yet.
        """
        self.group = group
        self._held = ExitStack()
        self._session = self._held.enter_context(session_folder.new_session())
        # -P: no code from the current folder. Ray lets its workers import from there, so it is the project's root.
        command = [sys.executable, "-P", "-m", "raymill.orchestration.on_ray.driver"]
        command += [str(folder.path)] if folder else []
        command += [GROUP, group.as_text()] if group else []
        heard, turn = os.pipe()
        self._turn: int | None = turn
        stands_by = standing_by or group is not None
        with ExitStack() as opened:
            opened.callback(os.close, heard)
            # Before there is a run, it prints where this process does.
            log = opened.enter_context(open(folder.ray_log, "ab", opener=private)) if folder else None
            self._process = subprocess.Popen(
                [*command, STAND_BY, str(heard)] if stands_by else command,
                cwd=project_root(),
                env={**os.environ, session_folder.VARIABLE: str(self._session)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[heard] if stands_by else [],
                # Ctrl-C is for the supervisor, which asks the workers to stop; the driver must live until they have.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Of the process; below zero: the signal that ended it. None: it runs."""
        return self._process.poll()

    def give_turn(self, folder: RunFolder) -> None:
        """Let a driver that stood by begin."""
        if self._turn is not None:
            # If it has just died, whoever watches it will see that.
            with suppress(BrokenPipeError):
                give_turn(self._turn, folder)
            self._turn = None

    def memory_bytes(self) -> int:
        """What its processes take that they share with no other."""
        taken = 0
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(self.pid)
            for one in [process, *process.children(recursive=True)]:
                taken += one.memory_full_info().uss
        return taken

    def leave(self, timeout_s: float) -> None:
        """End one whose turn will not come: by itself, where it can, since Ray keeps the places of one that is killed for three
        minutes more.

        Args:
            timeout_s: seconds that it has for that.
        """
        if self._turn is not None:
            os.close(self._turn)
            self._turn = None
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self.end(0.0)

    def end(self, timeout_s: float) -> None:
        """End the process, if it has not ended, and all that belongs to its session.

        Args:
            timeout_s: seconds that the session's other processes have to end by themselves.
        """
        if self.exit_code is None:
            self._process.kill()
        self._process.wait()
        if self._turn is not None:
            os.close(self._turn)
            self._turn = None
        session_folder.end_session(self._session, timeout_s)
        self._held.close()


@dataclass(frozen=True)
class Outlook:
    """What is known when it is decided whether a driver should stand by.

    Attributes:
        wanted: what the job says: `retry.standby`.
        may_go_on: whether any failure would be followed by another attempt.
        left_s: seconds that the run will still take.
        taken_bytes: what the session that trains takes.
        free_bytes: memory that is free.
    """

    wanted: bool | None
    may_go_on: bool
    left_s: float
    taken_bytes: int
    free_bytes: int


def decide_standby(outlook: Outlook) -> tuple[bool, str]:
    """Whether to start a driver that stands by, and why or why not."""
    if outlook.wanted is False:
        return False, "retry.standby: false"
    if not outlook.may_go_on:
        return False, "no budget of `retry` lets the run go on by itself"
    if outlook.wanted is None and outlook.left_s < PAYS_S:
        return False, f"the run will be over in {outlook.left_s:.0f} s; below {PAYS_S:.0f} s it does not pay"
    if outlook.free_bytes < MEMORY_FACTOR * outlook.taken_bytes:
        free, needed = (number / 2**30 for number in (outlook.free_bytes, MEMORY_FACTOR * outlook.taken_bytes))
        return False, f"{free:.1f} GiB of memory are free; below {needed:.1f} GiB it might crowd others out"
    return True, f"the run has {outlook.left_s:.0f} s to go" if outlook.wanted is None else "retry.standby: true"
