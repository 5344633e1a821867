"""One window: read, shuffled, transformed, cut into one packet per rank. Knows no Ray.

A window is read and transformed once, whatever the number of ranks; chunk by chunk, where the transform makes so much of its rows
that all of them would not fit into memory. `ray_stream` reads windows in Ray Data's tasks, `read_locally` in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from raymill import faults
from raymill.data import seeds
from raymill.data.arrow import rows_bytes
from raymill.data.bad_rows import BadRow, read_good_rows
from raymill.data.order import BatchSharding, Item, JobOrder, Stream, by_length, key, window, window_rows
from raymill.data.rows import ROW_ID, join, num_rows, pack, take, unpack
from raymill.data.seeds import imported_torch, seed_everything, unchanged_generators
from raymill.own_code.seams import LENGTH, TRANSFORM, calling, wrong
from raymill.own_code.traces import describe, noting, row_ids
from raymill.task import TRAIN, Fragment, Pipeline, Rows, Transform


@dataclass(frozen=True)
class Packet:
    """What one rank gets of one window, or of a chunk of it.

    Attributes:
        item: the window.
        rank: for whom.
        rows: its good rows, in order, with ROW_ID; without any, perhaps no other column.
        present: for each of its rows in the order, whether the row there is good, bool [num_offsets].
        bad: all bad rows of the window, in order; for rank 0 only, with its first chunk.
        chunk: of the window, from 0 on, counted from the first that is read.
        last: whether it is the window's last chunk.
    """

    item: Item
    rank: int
    rows: Rows
    present: np.ndarray
    bad: Sequence[BadRow] = ()
    chunk: int = 0
    last: bool = True


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads windows. Travels to the reading tasks.

    Attributes:
        run: tells readers of different runs and attempts apart, for the cache of each reading process.
        order: the order of the job.
        shardings: split -> how its batches are dealt out.
        fragments: split -> its fragments, as in the manifest.
        pipeline: where rows come from.
        lenient: leave bad rows out, rather than raise.
        check_code: is called once in each process that reads, when the pipeline's code is imported; raises if it is another.
        chunk_rows: rows that are transformed together, at most; 0: whole windows.
    """

    run: str
    order: JobOrder
    shardings: Mapping[str, BatchSharding]
    fragments: Mapping[str, Sequence[Fragment]]
    pipeline: Pipeline
    lenient: bool = False
    check_code: Callable[[], None] = lambda: None
    chunk_rows: int = 0

    def read(self, item: Item) -> Iterator[Packet]:
        """Read one window and cut it into packets: chunk after chunk, and of each chunk one for each rank.

        Raises:
            DataError: when a row is bad (unless lenient).
            InputError: when the transform changes the number of rows.
        """
        faults.point("before_read")
        seeded_torch = imported_torch()
        for done, packet in enumerate(self._read(item)):
            if imported_torch() is not seeded_torch:
                # The job's code imported torch while it read: what it drew there could not be seeded before.
                yield from islice(self._read(item), done, None)
                return
            yield packet

    def _read(self, item: Item) -> Iterator[Packet]:
        split_order, cut = self.order.split(item.split), self.shardings[item.split]
        opened = window(split_order, item.epoch, item.window)
        ids, offsets = window_rows(split_order, item.epoch, opened.fragments)
        parts, good, reasons = self._read_good_rows(item, opened.fragments, len(ids))
        present = good[offsets]
        # The good rows lie end to end: a row moves up by the bad ones before it.
        good_rows, places = join(parts) if parts else {}, (np.cumsum(good) - 1)[offsets]
        if self.pipeline.length is not None and item.split == TRAIN and parts:
            at = np.flatnonzero(present)
            lengths = lengths_of(self.pipeline.length, take(good_rows, places[at]))
            like = by_length(
                lengths, opened.start, self.order.batch_rows, key(split_order.seed, item.epoch, item.window, seeds.LENGTH)
            )
            ids[at], offsets[at], places[at] = ids[at][like], offsets[at][like], places[at][like]
        bad = [BadRow(item.split, int(ids[at]), *reasons[int(offsets[at])]) for at in np.flatnonzero(~present)]
        sequence = np.arange(opened.start, opened.stop, dtype=np.int64)
        ranks = np.where(sequence < item.skip, -1, cut.ranks(sequence))
        starts = range(0, max(1, len(ids)), self.chunk_rows or max(1, len(ids)))
        # Chunks whose rows were all trained on before are left out.
        first = next(
            (chunk for chunk, start in enumerate(starts) if opened.start + start + starts.step > item.skip), len(starts) - 1
        )
        for chunk in range(first, len(starts)):
            part = slice(starts[chunk], starts[chunk] + starts.step)
            kept = np.flatnonzero(present[part]) + part.start
            rows = self._transformed(take(good_rows, places[kept]), item, ids[kept], chunk) if len(kept) else {}
            faults.point("after_transform")
            rows[ROW_ID] = ids[kept]
            for rank in range(cut.world_size):
                mine = ranks[kept] == rank
                # One rank alone gets the rows as they are, without another copy of all.
                own = rows if mine.all() else take(rows, np.flatnonzero(mine))
                marks = present[part][ranks[part] == rank]
                noted = () if rank or chunk > first else bad
                yield Packet(item, rank, own, marks, noted, chunk - first, chunk == len(starts) - 1)

    def pack(self, packet: Packet) -> tuple[str, list[bytes | memoryview]]:
        """A packet's rows as they travel.

        Raises:
            InputError: the transform made a column that cannot.
        """
        item = packet.item
        with noting(lambda: f"split {item.split!r}, epoch {item.epoch}, window {item.window}"):
            try:
                return pack(packet.rows)
            except TypeError as error:
                raise wrong(TRANSFORM, self.pipeline.transform, str(error)) from error

    def _read_good_rows(
        self, item: Item, fragments: Sequence[int] | np.ndarray, count: int
    ) -> tuple[list[Rows], np.ndarray, dict[int, tuple[str, int, int, str]]]:
        """Read fragments with `count` rows in all.

        Returns:
            (good rows of each fragment that has any, whether each row of the fragments laid end to end is good, offset
            there of each bad row -> its file, part, index in the part and reason).
        """
        parts: list[Rows] = []
        good = np.ones(count, bool)
        found: dict[int, tuple[str, int, int, str]] = {}
        start = 0
        for number in fragments:
            fragment = self.fragments[item.split][int(number)]
            seed_everything(self.order.train.seed, _draw_of(item), int(number), seeds.READ)
            with seeds.reading(self.order.train.seed, _draw_of(item)):
                rows, reasons = read_good_rows(self.pipeline, item.split, fragment, lenient=self.lenient)
            if num_rows(rows):
                parts.append(rows)
            for index, reason in reasons.items():
                good[start + index] = False
                found[start + index] = (fragment.path, fragment.part, index, reason)
            start += fragment.num_rows
        return parts, good, found

    def _transformed(self, rows: Rows, item: Item, ids: np.ndarray, chunk: int) -> Rows:
        # The seed depends on window and chunk alone, never on who reads it, so a resume draws the same numbers.
        numbers = (self.order.train.seed, _draw_of(item), item.window, seeds.TRANSFORM, *([chunk] if chunk else []))
        seed_everything(*numbers)
        generator = np.random.Generator(np.random.Philox(key=key(*numbers)))
        with noting(lambda: f"split {item.split!r}, epoch {item.epoch}, window {item.window}, rows {row_ids(ids)}"):
            return transformed(self.pipeline.transform, rows, item.split, generator)


def lengths_of(length: Callable[[Rows], Any], rows: Rows) -> np.ndarray:
    """What the pipeline says of the rows' lengths.

    Raises:
        InputError: it is no number for each.
    """
    with calling(LENGTH, rows):
        lengths = np.asarray(length(rows))
    if lengths.shape != (num_rows(rows),) or lengths.dtype.kind not in "iuf":
        raise wrong(LENGTH, length, describe(lengths), given=rows)
    return lengths


def transformed(transform: Transform, rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    """The rows as the pipeline's transform makes them.

    Raises:
        InputError: it made something else, or another number of them.
    """
    with calling(TRANSFORM, rows):
        changed = transform(rows, split, generator)
    if not isinstance(changed, Mapping):
        raise wrong(TRANSFORM, transform, describe(changed), "Let the transform return the rows.", rows)
    lengths = {len(column) for column in changed.values()}
    if lengths != {num_rows(rows)}:
        fix = "A transform may change rows, not their number; make other rows in the Source."
        found = f"columns of {sorted(lengths)} rows" if len(lengths) > 1 else f"{num_rows(changed)} rows"
        raise wrong(TRANSFORM, transform, f"{found}, made of {num_rows(rows)}", fix, rows)
    return dict(changed)


def _draw_of(item: Item) -> int:
    """In place of the epoch, for seeds: every evaluation draws the same, so that they differ by the weights alone."""
    return item.epoch if item.split == TRAIN else 0


def read_locally(reader: Reader, position: int, rank: int, *, evaluated: bool = True) -> Iterator[Packet]:
    """The packets of one rank without Ray, for one process and for tests; see `Stream`. Reads every window itself.

    Rows are packed and unpacked as if they travelled, so that they come as from Ray to the last stride: how torch rounds depends
    on how its input lies in memory.
    """
    stream = Stream(reader.order, position, evaluated=evaluated)
    for index in range(len(stream)):
        for packet in reader.read(stream[index]):
            if packet.rank == rank:
                header, buffers = reader.pack(packet)
                # Memory of their own: a transform may write into its arrays again for the next rows.
                yield replace(packet, rows=unpack(header, [bytes(buffer) for buffer in buffers]))


MEASURED_ROWS = 8
"""Whose size stands for that of all."""


def transformed_row_bytes(pipeline: Pipeline, fragments: Sequence[Fragment], seed: int, *, lenient: bool) -> int | None:
    """How large a row becomes by the transform: pictures come as files, and leave as numbers.

    Bytes of a row before or behind the transform, whichever is more: the mean of a few of the first training rows.

    Args:
        fragments: of the training rows.
        seed: of the job; the transform draws as in its first window.
        lenient: leave bad rows out, rather than give up.

    Returns:
        None where that cannot be told: what is wrong with the rows or the transform is for others to say.
    """
    # What the job's code prints is not the result of the command.
    with unchanged_generators(), redirect_stdout(sys.stderr):
        try:
            rows, _ = read_good_rows(pipeline, TRAIN, fragments[0], lenient=lenient)
            few = take(rows, slice(0, MEASURED_ROWS))
            before = rows_bytes(few)
            numbers = (seed, 0, 0, seeds.TRANSFORM)
            seed_everything(*numbers)
            behind = rows_bytes(
                transformed(pipeline.transform, few, TRAIN, np.random.Generator(np.random.Philox(key=key(*numbers))))
            )
            return max(before, behind) // num_rows(few)
        except Exception:
            return None
