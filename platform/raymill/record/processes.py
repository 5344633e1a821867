"""Processes as a run's records name them: a number alone is given to another process one day, so its start goes with it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SAME_START_S = 2.0
"""Two looks at one process may say starts that differ by less: the system counts from its boot, whose time is corrected."""


@dataclass(frozen=True)
class ProcessId:
    """A process of this machine, also after its end.

    Attributes:
        pid: its number.
        started_s: when it was started, Unix seconds; None: not known, so whoever has the number is taken for it.
    """

    pid: int
    started_s: float | None = None

    @classmethod
    def of_this(cls) -> ProcessId:
        """The process that asks."""
        return cls(os.getpid(), psutil.Process().create_time())

    def lives(self) -> bool:
        """Whether it runs on this machine."""
        try:
            started_s = psutil.Process(self.pid).create_time()
        except (psutil.NoSuchProcess, ValueError, OverflowError):
            return False
        except psutil.AccessDenied:
            return True
        return self.started_s is None or abs(started_s - self.started_s) < SAME_START_S


def take_turns_behind(pid: int, niceness: int) -> None:
    """Have a process that leads a session of its own take its turns behind all others, from 1 (a little) to 19 (far).

    It becomes so much nicer than it was: it may come from one that is nice already, as Ray's workers are, and only root may lower
    that. A process's niceness counts inside its session alone, where the system shares its CPUs between sessions first (sched(7),
    "The autogroup feature"). So the session is made nice as well; where it cannot be, nothing is lost but time.
    """
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid) + niceness)
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


def wait_or_kill(processes: Iterable[psutil.Process], timeout_s: float, kill_timeout_s: float = 10.0) -> None:
    """Wait until processes have ended; kill what has not after so many seconds, and wait until that has."""
    _, left = psutil.wait_procs(processes, timeout=timeout_s)
    for process in left:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.kill()
    psutil.wait_procs(left, timeout=kill_timeout_s)
