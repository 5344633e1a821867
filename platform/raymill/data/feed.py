"""On the worker: exactly a rank's rows of each shard of each batch, whatever windows they came in."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from raymill.data.bad_rows import BadRow
from raymill.data.reader import Packet
from raymill.data.rows import ROW_ID, join, num_rows, take
from raymill.errors import DataError
from raymill.task import Rows

# ---------------------------------------------------------------- worker


class Feed:
    """Hands a rank exactly its rows of each shard of each batch, whatever windows they came in."""

    def __init__(
        self,
        packets: Iterator[Packet],
        note: Callable[[Sequence[BadRow]], None] = lambda rows: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take packets from this iterator when rows are asked for, and pass on the bad rows of each to `note`."""
        self._packets = packets
        self.note = note
        self._clock = clock
        self._waiting: dict[tuple[str, int], deque[tuple[Rows, np.ndarray]]] = {}
        self._last_windows: dict[tuple[str, int], int] = {}
        self.wait_s = 0.0
        """Seconds spent waiting for packets so far."""
        self.handed_out: list[np.ndarray] = []
        """The ids of the rows that were handed out since the list was emptied."""

    def take(self, split: str, epoch: int, count: int) -> Rows:
        """The good rows in the next `count` rows of a split in an epoch; without any, perhaps only the column ROW_ID.

        Raises:
            DataError: when the stream ends too early.
        """
        queue = self._waiting.setdefault((split, epoch), deque())
        while sum(len(present) for _, present in queue) < count:
            self._receive(split, epoch)
        parts: list[Rows] = []
        while count:
            rows, present = queue.popleft()
            if len(present) > count:
                num_good = int(present[:count].sum())
                queue.appendleft((take(rows, slice(num_good, None)), present[count:]))
                rows, present = take(rows, slice(0, num_good)), present[:count]
            if num_rows(rows):
                parts.append(rows)
            count -= len(present)
        taken: Rows = join(parts) if parts else {ROW_ID: np.zeros(0, np.int64)}
        self.handed_out.append(np.asarray(taken[ROW_ID]))
        return taken

    def _receive(self, split: str, epoch: int) -> None:
        """Take in a packet, for rows of this split and epoch."""
        start = self._clock()
        packet = next(self._packets, None)
        self.wait_s += self._clock() - start
        if packet is None:
            raise DataError(f"the stream ended before the {split} rows of epoch {epoch} did; the data changed during the run")
        if packet.bad:
            self.note(packet.bad)
        at = (packet.item.split, packet.item.epoch)
        if packet.last:
            self._last_windows[at] = packet.item.window
        if len(packet.present):
            self._waiting.setdefault(at, deque()).append((packet.rows, packet.present))

    def finish(self, split: str, epoch: int, num_windows: int) -> None:
        """Say that a pass of so many windows is over, and drop its queue.

        Raises:
            DataError: when rows of it are left.
        """
        # The last windows may hold no rows for this rank, and yet bad ones to note.
        while self._last_windows.get((split, epoch), -1) < num_windows - 1:
            self._receive(split, epoch)
        del self._last_windows[split, epoch]
        queue = self._waiting.pop((split, epoch), deque())
        if queue:
            left = sum(len(present) for _, present in queue)
            raise DataError(f"{left} {split} rows of epoch {epoch} were never asked for: a fault in the order of samples")
