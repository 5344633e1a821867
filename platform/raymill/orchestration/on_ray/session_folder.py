"""The folder of one attempt's Ray session: made private, known by its random name, and ended with all that belongs to it.

    TMPDIR/raymill-XXXXXXXX/
        session.json        who made it: user, boot, PID namespace
        supervisor.lock     held by the command while it lives
        driver.lock         held by the driver while it lives
        ray/                what Ray keeps

Anyone may make a folder with such a name in a shared temporary folder, and numbers of processes are given out again. So a folder
is only believed if it is this user's, private, and of this boot and PID namespace; it is stale once nobody holds its locks; and
a process belongs to it only if it has the folder's random name in its environment, or one of the folder's files open.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from raymill.record.processes import wait_or_kill

PREFIX = "raymill-"
VARIABLE = "RAYMILL_SESSION"
"""Environment variable that every process of a session inherits: the folder."""

SUPERVISOR_LOCK, DRIVER_LOCK = "supervisor.lock", "driver.lock"
KILL_TIMEOUT_S = 10.0


@contextmanager
def new_session() -> Iterator[Path]:
    """Make a session folder and hold it as its supervisor. The folder stays: `end_session` removes it."""
    # Short, because the sockets in it have a length limit.
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    with hold(folder / SUPERVISOR_LOCK):
        (folder / "session.json").write_text(json.dumps(_origin()))
        yield folder


@contextmanager
def held_by_driver(folder: Path) -> Iterator[None]:
    """Hold a session as its driver. If the supervisor is gone at the end, nobody else would remove what is left."""
    try:
        with hold(folder / DRIVER_LOCK):
            yield
    finally:
        with suppress(Timeout, OSError), FileLock(folder / SUPERVISOR_LOCK, blocking=False):
            end_session(folder, timeout_s=KILL_TIMEOUT_S)


@contextmanager
def hold(lock: Path) -> Iterator[None]:
    """Hold one of a session's locks, as a sign of life."""
    with FileLock(lock, mode=0o600):
        yield


def _origin() -> dict[str, Any]:
    """What tells this user's processes of this boot and PID namespace from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return {
        "user": os.getuid(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid_namespace": os.readlink(namespace) if namespace.is_symlink() else "",
    }


def remove_stale_sessions() -> None:
    """End what is left of drivers that were killed together with their supervisor. What others made is left alone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError), ExitStack() as locks:
            if not _is_own(folder):
                continue
            try:
                for name in (SUPERVISOR_LOCK, DRIVER_LOCK):
                    locks.enter_context(FileLock(folder / name, blocking=False))
            except Timeout:
                continue
            end_session(folder, timeout_s=0)


def _is_own(folder: Path) -> bool:
    """Whether this user made a folder for a session, here and since the machine started."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
        return False
    try:
        return bool(json.loads((folder / "session.json").read_text()) == _origin())
    except (OSError, ValueError, RecursionError):
        return False


def end_session(folder: Path, timeout_s: float) -> None:
    """Wait until nothing is left of a session whose driver ended, and end what stays; then remove its folder.

    Args:
        folder: of the session.
        timeout_s: seconds to wait before killing what is left.
    """
    left = [process for process in psutil.process_iter() if process.pid != os.getpid() and _belongs(process, folder)]
    wait_or_kill(left, timeout_s, KILL_TIMEOUT_S)
    shutil.rmtree(folder, ignore_errors=True)


def _belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        if process.uids().real != os.getuid():
            return False
        # Ray's agents overwrite their environment and their command line, but not the log files that they have open.
        if process.environ().get(VARIABLE) == str(folder):
            return True
        return any(Path(file.path).is_relative_to(folder) for file in process.open_files())
    except (OSError, psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
