"""What runs leave in shared memory, told apart from what other runs use at that time."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

FOLDER = Path("/dev/shm")

GRACE_S = 2.0
"""A file is there for a moment before its process has opened it."""


def abandoned() -> set[str]:
    """The files in shared memory that no living process holds."""
    until_s = time.monotonic() + GRACE_S
    while found := set(os.listdir(FOLDER)) - _held():
        if time.monotonic() > until_s:
            break
        time.sleep(0.1)
    return found


def _held() -> set[str]:
    """The files in shared memory that some process has open or in its memory."""
    paths: list[str] = []
    for pid in psutil.pids():
        process = Path("/proc") / str(pid)
        with suppress(OSError):  # it has ended, or is another user's
            paths += [line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()]
            for file in (process / "fd").iterdir():
                with suppress(FileNotFoundError):  # closed meanwhile
                    paths.append(os.readlink(file))
    return {Path(path).name for path in paths if path.startswith(f"{FOLDER}/")}
