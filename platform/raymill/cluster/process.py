"""What the processes of a cluster of this machine need: ports of their own, and somebody who says what they printed last."""

from __future__ import annotations

import socket
from pathlib import Path

from raymill.ray_internals import LOOPBACK

LAST_LINES = 12


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback address that nobody listens on now."""
    opened = [socket.create_server((LOOPBACK, 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in opened]
    for one in opened:
        one.close()
    return ports


def end_of(path: Path) -> str:
    """The last lines of what a process has printed."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-LAST_LINES:])
