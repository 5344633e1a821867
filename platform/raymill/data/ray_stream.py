"""The windows through Ray Data. The only file that uses it.

    Stream (which windows)  ->  Reader.read, in a Ray Data task  ->  streaming_split (packet r of each window to rank r)
        ->  receive, on the worker  ->  Feed

What a rank gets of a window is one packet: one indivisible Ray row of flat buffers, in a block of its own, so that Ray can
neither split nor merge nor reorder rows; it can only deal packets, and each packet names the rank and the window it is for.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from raymill.data.bad_rows import BadRow
from raymill.data.order import Item, Stream
from raymill.data.reader import Packet, Reader
from raymill.data.rows import num_rows, unpack
from raymill.errors import DataError
from raymill.own_code.traces import for_a_journey

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import DataIterator, Dataset, Datasource


FEW_WINDOWS = 8

# ---------------------------------------------------------------- Ray Data

_readers: dict[str, Reader] = {}


def _read_block(block: pa.Table, reader: Reader, stream: Stream) -> Iterator[pa.Table]:
    import pyarrow as pa

    # One reader per process: its cache of epoch orders is what makes a window cheap to find.
    cached = _readers.get(reader.run)
    if cached is None:
        # Ray starts reading processes whenever it needs some, so code that was edited during the run may get in here.
        reader.check_code()
        _readers.clear()
        cached = _readers[reader.run] = reader
    for index in block["id"].to_pylist():
        for packet, (header, buffers) in _packed(cached, stream[index]):
            item = packet.item
            yield pa.table(
                {
                    "rank": pa.array([packet.rank], pa.int32()),
                    "index": pa.array([index], pa.int64()),
                    "chunk": pa.array([packet.chunk], pa.int64()),
                    "last": pa.array([packet.last]),
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


def _packed(reader: Reader, item: Item) -> Iterator[tuple[Packet, tuple[str, list[bytes | memoryview]]]]:
    try:
        for packet in reader.read(item):
            yield packet, reader.pack(packet)
    except Exception as error:
        told = for_a_journey(error, "reading the data")
        if told is error:
            raise
        raise told from error


def _window_numbers(count: int) -> Datasource:
    """The numbers 0..count-1 as a source, one to a task.

    `ray.data.range` would do, but its tasks reserve a whole CPU, and reading and mapping are one operator only where they ask for
    the same.
    """
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class WindowNumbers(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return 8 * count

        def get_read_tasks(self, parallelism: int, *others: Any, **named: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=1, size_bytes=8, input_files=None, exec_stats=None)
            return [ReadTask(partial(_number_block, number), metadata) for number in range(count)]

    return WindowNumbers()  # type: ignore[no-untyped-call]


def _number_block(number: int) -> list[pa.Table]:
    import pyarrow as pa

    return [pa.table({"id": pa.array([number], pa.int64())})]


def split_with_ray(
    reader: Reader, position: int, world_size: int, *, data_cpus: float, task_cpus: float, evaluated: bool = True
) -> list[DataIterator]:
    """Start the stream at a position and split it over the ranks.

    Args:
        reader: reads the windows; its shardings are for `world_size` ranks.
        position: rows trained on already.
        world_size: ranks.
        data_cpus: CPUs that reading may use in all.
        task_cpus: CPUs that one reading task asks for; 0: none are reserved, and `data_cpus` is the number of tasks at once.
        evaluated: see `Stream`.

    Returns:
        One iterator per rank, for `receive` in that rank's process.
    """
    stream = Stream(reader.order, position, evaluated=evaluated)
    packets = _packets(len(stream), data_cpus, task_cpus, _read_block, {"reader": reader, "stream": stream})
    return packets.streaming_split(world_size, equal=False)


def _packets(
    num_windows: int, data_cpus: float, task_cpus: float, read: Callable[..., Any], given: Mapping[str, Any] | None = None
) -> Dataset:
    """What `read` makes of the number of each window, in order; for the other arguments see `split_with_ray`."""
    import ray.data
    from ray.data import DataContext, ExecutionOptions, ExecutionResources, TaskPoolStrategy

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(cpu=data_cpus, object_store_memory=float("inf"))
    )
    # Every packet becomes a block of its own: a block is closed as soon as it holds a byte.
    context.target_max_block_size = 1
    # Tasks that reserve no CPU are held back by their number.
    most_tasks = None if task_cpus else TaskPoolStrategy(size=max(1, int(data_cpus)))
    items: Dataset = ray.data.read_datasource(
        _window_numbers(num_windows),
        num_cpus=task_cpus,
        compute=most_tasks,
        override_num_blocks=num_windows,
    )
    return items.map_batches(
        read,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs=dict(given or {}),
        num_cpus=task_cpus,
        compute=most_tasks,
    )


def warm_up() -> None:
    """Have Ray Data start, for the job of this process, what it starts once for all streams: reading processes and its own.

    A stream of nothing goes the way of a real one.
    """
    packets = _packets(FEW_WINDOWS, 1.0, 0.0, _import_reader)
    for _ in packets.streaming_split(1, equal=False)[0].iter_batches(batch_size=None, batch_format="pyarrow"):  # type: ignore[arg-type]
        pass


def _import_reader(block: pa.Table) -> pa.Table:
    import raymill.data.reader  # noqa: F401

    return block


def receive(iterator: DataIterator, rank: int) -> Iterator[Packet]:
    """The packets of one rank in order, from Ray.

    Raises:
        DataError: when a packet is missing or is for somebody else, which would break the order, or was changed on its way.
    """
    # Ray takes None for "whole blocks", and its annotation forgets it.
    blocks: Iterable[pa.Table] = iterator.iter_batches(
        batch_size=None,  # type: ignore[arg-type]
        batch_format="pyarrow",
        prefetch_batches=2,
    )
    window, chunk = 0, 0
    for block in blocks:
        for index in range(block.num_rows):
            row = {name: block[name][index] for name in block.column_names if name not in ("present", "buffers")}
            values = {name: scalar.as_py() for name, scalar in row.items()}
            if (values["rank"], values["index"], values["chunk"]) != (rank, window, chunk):
                dealt = f"packet {values['index']}.{values['chunk']} of rank {values['rank']}"
                raise DataError(
                    f"rank {rank} expected packet {window}.{chunk} and was dealt {dealt}. Ray Data changed how it deals blocks; "
                    "the run cannot keep its order. Use the pinned version of Ray."
                )
            window, chunk = (window + 1, 0) if values["last"] else (window, chunk + 1)
            try:
                yield _packet(values, block["present"][index].as_buffer(), _buffers(block, index))
            except (ValueError, TypeError) as error:
                raise DataError(f"packet {values['index']} of rank {rank} came damaged: {error}. Resume the run.") from error


def _packet(values: dict[str, Any], present: Any, buffers: list[Any]) -> Packet:
    """What `_read_block` has packed, from one row of a block.

    Raises:
        ValueError, TypeError: its parts do not fit together.
    """
    item = Item(values["split"], values["epoch"], values["window"], values["skip"])
    rows = unpack(values["header"], buffers)
    marks = np.frombuffer(present, np.uint8)
    if marks.max(initial=0) > 1 or num_rows(rows) != marks.sum():
        raise ValueError(f"it holds {num_rows(rows)} rows, and marks {int(marks.sum())} of {len(marks)} as good")
    bad = [BadRow(**row) for row in json.loads(values["bad"])]
    return Packet(item, values["rank"], rows, marks.view(bool), bad, values["chunk"], values["last"])


def _buffers(block: pa.Table, index: int) -> list[Any]:
    """The flat buffers of one row, as views of the block's memory."""
    return [value.as_buffer() for value in block["buffers"][index].values]


T = TypeVar("T")


def prefetched(values: Iterator[T], depth: int) -> Iterator[T]:
    """The same values, fetched up to `depth` ahead by a thread that starts at once."""
    fetched: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)

    def fetch() -> None:
        try:
            for value in values:
                fetched.put(("value", value))
            fetched.put(("end", None))
        except BaseException as error:  # it is raised again below, in the thread that asks for the value
            fetched.put(("error", error))

    threading.Thread(target=fetch, name="packets", daemon=True).start()

    def hand_out() -> Iterator[T]:
        while True:
            kind, value = fetched.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    return hand_out()
