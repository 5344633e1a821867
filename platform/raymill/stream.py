"""From the order of samples to batches on the worker. The only file that uses Ray Data.

    Stream (which windows)  ->  read_window (a Ray Data task: read, shuffle, transform, cut into one packet per rank)
        ->  streaming_split (packet r of each window to rank r)  ->  Feed (on the worker: exactly its rows of each batch)

Each window is read and transformed once, in one task, whatever the number of ranks. What a rank gets of a window is one
packet: one indivisible Ray row of flat buffers, in a block of its own, so that Ray can neither split nor merge nor
reorder rows; it can only deal packets, and each packet names the rank and the window it is for.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raymill import faults
from raymill.bad_rows import BadRow, sift
from raymill.errors import DataError
from raymill.order import TRAIN, Cut, Item, JobOrder, Stream, key, window, window_rows
from raymill.rows import ROW_ID, join, num_rows, pack, take, unpack
from raymill.task import Fragment, Pipeline, Rows

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import DataIterator

TRANSFORM_STREAM = 3
"""Keeps the random numbers of transforms apart from those of the order."""


@dataclass(frozen=True)
class Packet:
    """What one rank gets of one window.

    Attributes:
        item: the window.
        rank: for whom.
        rows: its good rows, in order, with ROW_ID; without any, perhaps no other column.
        present: for each of its places in the order, whether the row there is good, bool [num_places].
        bad: all bad rows of the window, in order; for rank 0 only.
    """

    item: Item
    rank: int
    rows: Rows
    present: np.ndarray
    bad: Sequence[BadRow] = ()


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads windows. Travels to the reading tasks.

    Attributes:
        run: tells readers of different runs and attempts apart, for the cache of each reading process.
        order: the order of the job.
        cuts: split -> how its batches are dealt out.
        fragments: split -> its fragments, as in the manifest.
        pipeline: where rows come from.
        lenient: leave bad rows out, rather than raise.
    """

    run: str
    order: JobOrder
    cuts: Mapping[str, Cut]
    fragments: Mapping[str, Sequence[Fragment]]
    pipeline: Pipeline
    lenient: bool = False

    def read(self, item: Item) -> list[Packet]:
        """Read one window and cut it into a packet for each rank.

        Raises:
            DataError: when a row is bad (unless lenient), or the transform changes the number of rows.
        """
        faults.point("before_read")
        split_order, cut = self.order.split(item.split), self.cuts[item.split]
        opened = window(split_order, item.epoch, item.window)
        ids, places = window_rows(split_order, item.epoch, opened.fragments)
        parts, good, reasons = self._sifted(item.split, opened.fragments, len(ids))
        present = good[places]
        kept = np.flatnonzero(present)
        rows: Rows = {}
        if parts:
            # The good rows lie end to end: a row moves up by the bad ones before it.
            rows = self._transformed(take(join(parts), (np.cumsum(good) - 1)[places[kept]]), item)
        faults.point("after_transform")
        rows[ROW_ID] = ids[kept]
        sequence = np.arange(opened.start, opened.stop, dtype=np.int64)
        ranks = np.where(sequence < item.skip, -1, cut.ranks(sequence))
        bad = [BadRow(item.split, int(ids[at]), *reasons[int(places[at])]) for at in np.flatnonzero(~present)]
        return [
            Packet(item, rank, take(rows, np.flatnonzero(ranks[kept] == rank)), present[ranks == rank], () if rank else bad)
            for rank in range(cut.world_size)
        ]

    def _sifted(
        self, split: str, fragments: Sequence[int] | np.ndarray, count: int
    ) -> tuple[list[Rows], np.ndarray, dict[int, tuple[str, int, int, str]]]:
        """Read fragments with `count` rows in all.

        Returns:
            (good rows of each fragment that has any, whether each row of the fragments laid end to end is good, place
            there of each bad row -> its file, part, place in the part and reason).
        """
        parts: list[Rows] = []
        good = np.ones(count, bool)
        found: dict[int, tuple[str, int, int, str]] = {}
        start = 0
        for number in fragments:
            fragment = self.fragments[split][int(number)]
            rows, reasons = sift(self.pipeline, split, fragment, lenient=self.lenient)
            if num_rows(rows):
                parts.append(rows)
            for place, reason in reasons.items():
                good[start + place] = False
                found[start + place] = (fragment.path, fragment.part, place, reason)
            start += fragment.num_rows
        return parts, good, found

    def _transformed(self, rows: Rows, item: Item) -> Rows:
        # The seed depends on the window alone, never on who reads it, so a resume draws the same numbers; and every
        # evaluation draws the same, so that they differ by the weights alone.
        epoch = item.epoch if item.split == TRAIN else 0
        seed = key(self.order.train.seed, epoch, item.window, TRANSFORM_STREAM)
        count = num_rows(rows)
        changed = self.pipeline.transform(rows, item.split, np.random.Generator(np.random.Philox(key=seed)))
        if num_rows(changed) != count:
            raise DataError(
                f"the pipeline's transform made {num_rows(changed)} rows of {count} ({item.split}, window {item.window}). "
                "A transform may change rows, not their number; make other rows in the Source."
            )
        return dict(changed)


def read_locally(reader: Reader, position: int, rank: int) -> Iterator[Packet]:
    """The packets of one rank without Ray, for tests and for a single process. Reads every window itself."""
    stream = Stream(reader.order, position)
    for index in range(len(stream)):
        yield reader.read(stream[index])[rank]


# ---------------------------------------------------------------- Ray Data

_readers: dict[str, Reader] = {}


def _read_block(block: pa.Table, reader: Reader, stream: Stream) -> Iterator[pa.Table]:
    import pyarrow as pa

    # One reader per process: its cache of epoch orders is what makes a window cheap to find.
    cached = _readers.get(reader.run)
    if cached is None:
        _readers.clear()
        cached = _readers[reader.run] = reader
    for index in block["id"].to_pylist():
        for packet in cached.read(stream[index]):
            header, buffers = pack(packet.rows)
            item = packet.item
            yield pa.table(
                {
                    "rank": pa.array([packet.rank], pa.int32()),
                    "index": pa.array([index], pa.int64()),
                    "split": [item.split],
                    "epoch": pa.array([item.epoch], pa.int64()),
                    "window": pa.array([item.window], pa.int64()),
                    "skip": pa.array([item.skip], pa.int64()),
                    "present": pa.array([packet.present.tobytes()], pa.large_binary()),
                    "bad": [json.dumps([asdict(row) for row in packet.bad])],
                    "header": [header],
                    "buffers": pa.array([buffers], pa.list_(pa.large_binary())),
                }
            )


def split_with_ray(reader: Reader, position: int, world_size: int, *, data_cpus: float, task_cpus: float) -> list[DataIterator]:
    """Start the stream at a position and split it over the ranks.

    Args:
        reader: reads the windows; its cuts are for `world_size` ranks.
        position: rows trained on already.
        world_size: ranks.
        data_cpus: CPUs that reading may use in all.
        task_cpus: CPUs that one reading task asks for; 0: none are reserved, and `data_cpus` is the number of tasks at once.

    Returns:
        One iterator per rank, for `receive` in that rank's process.
    """
    import ray.data
    from ray.data import DataContext, Dataset, ExecutionOptions, ExecutionResources, TaskPoolStrategy
    from ray.data._internal.datasource.range_datasource import RangeDatasource

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(cpu=data_cpus, object_store_memory=float("inf"))
    )
    # Every packet becomes a block of its own: a block is closed as soon as it holds a byte.
    context.target_max_block_size = 1
    stream = Stream(reader.order, position)
    # Tasks that reserve no CPU are held back by their number.
    most_tasks = None if task_cpus else TaskPoolStrategy(size=max(1, int(data_cpus)))
    # Not `ray.data.range`, whose tasks reserve a whole CPU: the two operators are one only where they ask for the same.
    items: Dataset = ray.data.read_datasource(
        RangeDatasource(len(stream), column_name="id"),
        num_cpus=task_cpus,
        compute=most_tasks,
        override_num_blocks=len(stream),
    )
    packets = items.map_batches(
        _read_block,  # type: ignore[arg-type]  # Ray's stub forgets keyword arguments
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"reader": reader, "stream": stream},
        num_cpus=task_cpus,
        compute=most_tasks,
    )
    return packets.streaming_split(world_size, equal=False)


def receive(iterator: DataIterator, rank: int) -> Iterator[Packet]:
    """The packets of one rank in order, from Ray.

    Raises:
        DataError: when a packet is missing or is for somebody else, which would break the order.
    """
    # Ray takes None for "whole blocks", and its annotation forgets it.
    blocks: Iterable[pa.Table] = iterator.iter_batches(
        batch_size=None,  # type: ignore[arg-type]
        batch_format="pyarrow",
        prefetch_batches=2,
    )
    expected = 0
    for block in blocks:
        for place in range(block.num_rows):
            row = {name: block[name][place] for name in block.column_names if name not in ("present", "buffers")}
            values = {name: scalar.as_py() for name, scalar in row.items()}
            if (values["rank"], values["index"]) != (rank, expected):
                raise DataError(
                    f"rank {rank} expected packet {expected} and was dealt packet {values['index']} of rank {values['rank']}. "
                    "Ray Data changed how it deals blocks; the run cannot keep its order. Use the pinned version of Ray."
                )
            expected += 1
            item = Item(values["split"], values["epoch"], values["window"], values["skip"])
            rows = unpack(values["header"], _buffers(block, place))
            present = np.frombuffer(block["present"][place].as_buffer(), bool)
            yield Packet(item, rank, rows, present, [BadRow(**row) for row in json.loads(values["bad"])])


def _buffers(block: pa.Table, place: int) -> list[Any]:
    """The flat buffers of one row, as views of the block's memory."""
    return [value.as_buffer() for value in block["buffers"][place].values]


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
        self._note = note
        self._clock = clock
        self._waiting: dict[tuple[str, int], deque[tuple[Rows, np.ndarray]]] = {}
        self._last_windows: dict[tuple[str, int], int] = {}
        self.wait_s = 0.0
        """Seconds spent waiting for packets so far."""

    def take(self, split: str, epoch: int, count: int) -> Rows:
        """The good rows in the next `count` places of a split in an epoch; without any, perhaps only the column ROW_ID.

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
        return join(parts) if parts else {ROW_ID: np.zeros(0, np.int64)}

    def peek(self, split: str, count: int) -> Rows:
        """Up to `count` of the next good rows of a split, in whichever epoch. They stay where they are; none: no columns."""
        while True:
            for (waiting, _), queue in self._waiting.items():
                for rows, _ in queue if waiting == split else ():
                    if num_rows(rows):
                        return take(rows, slice(0, count))
            if not self._receive_next():
                return {}

    def _receive(self, split: str, epoch: int) -> None:
        if not self._receive_next():
            raise DataError(f"the stream ended before the {split} rows of epoch {epoch} did; the data changed during the run")

    def _receive_next(self) -> bool:
        """Take in a packet; False when there are no more."""
        start = self._clock()
        packet = next(self._packets, None)
        self.wait_s += self._clock() - start
        if packet is None:
            return False
        if packet.bad:
            self._note(packet.bad)
        at = (packet.item.split, packet.item.epoch)
        self._last_windows[at] = packet.item.window
        if len(packet.present):
            self._waiting.setdefault(at, deque()).append((packet.rows, packet.present))
        return True

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
