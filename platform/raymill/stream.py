"""From the order of samples to batches on the worker. The only file that uses Ray Data.

    Stream (which windows)  ->  read_window (a Ray Data task: read, shuffle, transform, cut into one packet per rank)
        ->  streaming_split (packet r of each window to rank r)  ->  Feed (on the worker: exactly its rows of each batch)

Each window is read and transformed once, in one task, whatever the number of ranks. What a rank gets of a window is one
packet: one indivisible Ray row of flat buffers, in a block of its own, so that Ray can neither split nor merge nor
reorder rows; it can only deal packets, and each packet names the rank and the window it is for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raymill import faults
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
        rows: its rows, in order, with ROW_ID.
    """

    item: Item
    rank: int
    rows: Rows


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads windows. Travels to the reading tasks.

    Attributes:
        run: tells readers of different runs and attempts apart, for the cache of each reading process.
        order: the order of the job.
        cuts: split -> how its batches are dealt out.
        fragments: split -> its fragments, as in the manifest.
        pipeline: where rows come from.
    """

    run: str
    order: JobOrder
    cuts: Mapping[str, Cut]
    fragments: Mapping[str, Sequence[Fragment]]
    pipeline: Pipeline

    def read(self, item: Item) -> list[Packet]:
        """Read one window and cut it into a packet for each rank.

        Raises:
            DataError: when a fragment cannot be read, or the transform changes the number of rows.
        """
        faults.point("before_read")
        split_order, cut = self.order.split(item.split), self.cuts[item.split]
        opened = window(split_order, item.epoch, item.window)
        ids, places = window_rows(split_order, item.epoch, opened.fragments)
        rows: Rows = {}
        if len(ids):
            parts = [self._read_fragment(item.split, int(fragment)) for fragment in opened.fragments]
            rows = self._transformed(take(join(parts), places), item)
        faults.point("after_transform")
        rows[ROW_ID] = ids
        sequence = np.arange(opened.start, opened.stop, dtype=np.int64)
        ranks = np.where(sequence < item.skip, -1, cut.ranks(sequence))
        return [Packet(item, rank, take(rows, np.flatnonzero(ranks == rank))) for rank in range(cut.world_size)]

    def _read_fragment(self, split: str, number: int) -> Rows:
        fragment = self.fragments[split][number]
        rows = self.pipeline.sources[split].read(fragment)
        if num_rows(rows) != fragment.num_rows:
            raise DataError(
                f"{fragment.path} part {fragment.part}: {num_rows(rows)} rows were read, {fragment.num_rows} were there when "
                "the run started. Restore the file, or start a new run on the changed data."
            )
        return rows

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
        task_cpus: CPUs that one reading task asks for.

    Returns:
        One iterator per rank, for `receive` in that rank's process.
    """
    import ray.data
    from ray.data import DataContext, ExecutionOptions, ExecutionResources

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(cpu=data_cpus, object_store_memory=float("inf"))
    )
    # Every packet becomes a block of its own: a block is closed as soon as it holds a byte.
    context.target_max_block_size = 1
    stream = Stream(reader.order, position)
    items = ray.data.range(len(stream), override_num_blocks=len(stream))
    packets = items.map_batches(
        _read_block,  # type: ignore[arg-type]  # Ray's stub forgets keyword arguments
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"reader": reader, "stream": stream},
        num_cpus=task_cpus,
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
            row = {name: block[name][place] for name in ("rank", "index", "split", "epoch", "window", "skip", "header")}
            values = {name: scalar.as_py() for name, scalar in row.items()}
            if (values["rank"], values["index"]) != (rank, expected):
                raise DataError(
                    f"rank {rank} expected packet {expected} and was dealt packet {values['index']} of rank {values['rank']}. "
                    "Ray Data changed how it deals blocks; the run cannot keep its order. Use the pinned version of Ray."
                )
            expected += 1
            item = Item(values["split"], values["epoch"], values["window"], values["skip"])
            yield Packet(item, rank, unpack(values["header"], _buffers(block, place)))


def _buffers(block: pa.Table, place: int) -> list[Any]:
    """The flat buffers of one row, as views of the block's memory."""
    return [value.as_buffer() for value in block["buffers"][place].values]


# ---------------------------------------------------------------- worker


class Feed:
    """Hands a rank exactly its rows of each shard of each batch, whatever windows they came in."""

    def __init__(self, packets: Iterator[Packet], clock: Callable[[], float] = time.perf_counter) -> None:
        """Take packets from this iterator when rows are asked for."""
        self._packets = packets
        self._clock = clock
        self._waiting: dict[str, deque[Rows]] = {}
        self.wait_s = 0.0
        """Seconds spent waiting for packets so far."""

    def take(self, split: str, epoch: int, count: int) -> Rows:
        """The next `count` rows of a split in an epoch; needs count > 0.

        Raises:
            DataError: when the stream ends too early.
        """
        queue = self._waiting.setdefault(f"{split}/{epoch}", deque())
        while sum(num_rows(rows) for rows in queue) < count:
            self._receive(split, epoch)
        parts: list[Rows] = []
        while count:
            rows = queue.popleft()
            held = num_rows(rows)
            if held > count:
                queue.appendleft(take(rows, slice(count, held)))
                rows = take(rows, slice(0, count))
            parts.append(rows)
            count -= num_rows(rows)
        return join(parts)

    def _receive(self, split: str, epoch: int) -> None:
        start = self._clock()
        packet = next(self._packets, None)
        self.wait_s += self._clock() - start
        if packet is None:
            raise DataError(f"the stream ended before the {split} rows of epoch {epoch} did; the data changed during the run")
        if num_rows(packet.rows):
            self._waiting.setdefault(f"{packet.item.split}/{packet.item.epoch}", deque()).append(packet.rows)

    def finish(self, split: str, epoch: int) -> None:
        """Say that a pass is over, and drop its queue.

        Raises:
            DataError: when rows of it are left.
        """
        queue = self._waiting.pop(f"{split}/{epoch}", deque())
        if queue:
            left = sum(num_rows(rows) for rows in queue)
            raise DataError(f"{left} {split} rows of epoch {epoch} were never asked for: a fault in the order of samples")
