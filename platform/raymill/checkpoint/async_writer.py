"""Checkpoints are written by a thread while training goes on, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raymill.checkpoint.snapshot import Snapshot


class CheckpointWriter:
    """Writes the checkpoints of one attempt in the background."""

    def __init__(self, write: Callable[[Snapshot, bool], None]) -> None:
        """`write` makes a snapshot safe; its second argument says whether it is the best."""
        self._write = write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, snapshot: Snapshot, *, best: bool) -> None:
        """Write a snapshot while training goes on. Waits for the save before, and raises what that one raised."""
        self.wait()
        self._writing = self._thread.submit(self._write, snapshot, best)

    def wait(self) -> None:
        """Return when the last save is safe on disk.

        Raises:
            CheckpointError: when it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
