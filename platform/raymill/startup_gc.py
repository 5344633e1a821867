"""Importing this makes the process start faster: it lets the garbage collector run hardly ever, until `finish`.

Starting a run is mostly importing, in a dozen processes, and a third of the user CPU time of importing torch and Ray goes into
looking for garbage among modules that stay. Ray's workers import this first (see `ray_internals.RAY_SETTINGS`), and so does the
driver. Only cycles wait for the collector; everything else is freed at once as ever.
"""

from __future__ import annotations

import gc

from raymill import ending_gc  # noqa: F401  # such a process is to end fast too

gc.set_threshold(1_000_000, 20, 50)


def finish() -> None:
    """Say that the process has started: what is there stays out of collections, which are as frequent as usual from now on."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 10)
