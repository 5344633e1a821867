"""The order of samples: a pure function of (manifest, seed, epoch, position), never the state of an iterator.

The fragments of a split are put in an order drawn for the epoch and cut into windows of about `window_rows` rows; the
rows of a window are shuffled among themselves. Global batch k of an epoch is rows [kB, (k+1)B) of that sequence; the last
one of an epoch holds what is left. Of each global batch, shard s of S is cut out by arithmetic alone, and a rank owns a
run of shards. So the same rows meet in the same step for any number of workers, and a resume needs one integer: the
number of rows consumed since the start of training.

A shuffle here is a sort by hash: the key of an element is SplitMix64 of its number and the epoch's key (Steele, Lea,
Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014). It is defined here to the last bit, so no version of
any library can change an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from raymill.task import TRAIN

Ints = npt.NDArray[np.int64]


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix each 64-bit number to an independent-looking one, without collisions (a bijection)."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def key(*numbers: int) -> int:
    """One 64-bit key of several whole numbers; a different order of the numbers gives a different key."""
    mixed = 0
    for number in numbers:
        mixed = _splitmix64(mixed ^ _splitmix64(number % 2**64))
    return mixed


def _splitmix64(value: int) -> int:
    """As `splitmix64`, of one number: without an array it is ten times faster, and seeds are wanted several times in a step."""
    mixed = (value + 0x9E3779B97F4A7C15) % 2**64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
    return mixed ^ (mixed >> 31)


def shuffled(count_or_ids: int | Ints, epoch_key: int) -> Ints:
    """A permutation of 0..n-1 that puts the elements (their numbers, or these ids) in the order of their hashes."""
    ids = np.arange(count_or_ids, dtype=np.int64) if isinstance(count_or_ids, int) else count_or_ids
    hashes = splitmix64(ids.astype(np.uint64) ^ np.uint64(epoch_key))
    return np.argsort(hashes, kind="stable").astype(np.int64)


# ---------------------------------------------------------------- one split


@dataclass(frozen=True, eq=False)
class SplitOrder:
    """The rows of one split and how they are ordered.

    Attributes:
        split: its name, such as "train".
        fragment_rows: rows of each fragment, in the order of the manifest, int64 [num_fragments].
        num_windows: windows per epoch, the same in each epoch.
        seed: seed of the order.
        shuffle: False keeps the manifest's order in every epoch.
    """

    split: str
    fragment_rows: Ints
    num_windows: int
    seed: int
    shuffle: bool

    @property
    def num_rows(self) -> int:
        """Rows in the split."""
        return int(self.fragment_rows.sum())


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """One epoch of a split, down to windows. Memory is a few numbers per fragment, nothing per row.

    Attributes:
        fragments: fragment numbers in this epoch's order, int64 [num_fragments].
        starts: offset of each of them in the epoch's sequence, and the end, int64 [num_fragments + 1].
        window_starts: index into `fragments` of each window's first, and the end, int64 [num_windows + 1].
    """

    fragments: Ints
    starts: Ints
    window_starts: Ints


@dataclass(frozen=True, eq=False)
class Window:
    """Rows that are read and shuffled together.

    Attributes:
        fragments: the fragments to read, in this order.
        start: offset of its first row in the epoch's sequence.
        stop: offset after its last row; equal to `start` for an empty window.
    """

    fragments: Ints
    start: int
    stop: int


@lru_cache(maxsize=4)
def epoch_order(order: SplitOrder, epoch: int) -> EpochOrder:
    """Order the fragments for an epoch and cut them into windows."""
    count = len(order.fragment_rows)
    fragments = shuffled(count, key(order.seed, epoch, 1)) if order.shuffle else np.arange(count, dtype=np.int64)
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(order.fragment_rows[fragments], out=starts[1:])
    # A fragment belongs to the window in whose even share of the rows it starts; integers keep this exact.
    shares = (np.arange(order.num_windows + 1, dtype=np.int64) * order.num_rows + order.num_windows - 1) // order.num_windows
    window_starts = np.searchsorted(starts[:-1], shares, side="left").astype(np.int64)
    return EpochOrder(fragments, starts, window_starts)


def window(order: SplitOrder, epoch: int, index: int) -> Window:
    """Window `index` of an epoch. It may be empty where single fragments are larger than a window."""
    whole = epoch_order(order, epoch)
    first, last = int(whole.window_starts[index]), int(whole.window_starts[index + 1])
    return Window(whole.fragments[first:last], int(whole.starts[first]), int(whole.starts[last]))


def window_at(order: SplitOrder, epoch: int, offset: int) -> int:
    """The window that holds this offset in the epoch's sequence."""
    whole = epoch_order(order, epoch)
    fragment = int(np.searchsorted(whole.starts, offset, side="right")) - 1
    return int(np.searchsorted(whole.window_starts, fragment, side="right")) - 1


def window_rows(order: SplitOrder, epoch: int, fragments: Ints) -> tuple[Ints, Ints]:
    """The rows of a window in order.

    Returns:
        (row ids in the split, offsets of those rows in the fragments' rows laid end to end), both int64 [num_rows].
    """
    first_ids = np.zeros(len(order.fragment_rows) + 1, np.int64)
    np.cumsum(order.fragment_rows, out=first_ids[1:])
    ids = np.concatenate(
        [np.arange(first_ids[f], first_ids[f + 1], dtype=np.int64) for f in fragments] or [np.zeros(0, np.int64)]
    )
    offsets = shuffled(ids, key(order.seed, epoch, 2)) if order.shuffle else np.arange(len(ids), dtype=np.int64)
    return ids[offsets], offsets


def by_length(lengths: Ints, start: int, batch_rows: int, epoch_key: int) -> Ints:
    """An order of a window's rows in which those of a batch are of like length.

    The rows are put in the order of their lengths, those of one length as they were, and cut where batches end. The pieces are
    shuffled, but for the first and the last one, which batches share with other windows; and so are the rows of each piece, since
    who has the last shard of a batch shall not always have its longest rows.

    Args:
        lengths: of each row, int64 [num_rows].
        start: offset of the first row in the epoch's sequence.
        batch_rows: rows of a global batch.
        epoch_key: of this shuffle.

    Returns:
        the numbers of the rows in their new order, int64 [num_rows].
    """
    sorted_rows = np.argsort(lengths, kind="stable").astype(np.int64)
    first = min(len(lengths), -start % batch_rows)
    pieces = np.split(sorted_rows, range(first, len(lengths), batch_rows))
    whole = [piece for piece in pieces if len(piece) == batch_rows]
    whole = [whole[number] for number in shuffled(len(whole), epoch_key)]
    head = [pieces[0]] if first else []
    tail = [pieces[-1]] if len(pieces[-1]) not in (0, batch_rows) and len(pieces) > 1 else []
    return np.concatenate([piece[shuffled(len(piece), epoch_key)] for piece in [*head, *whole, *tail]] or [sorted_rows])


# ---------------------------------------------------------------- cutting batches


def num_batches(num_rows: int, batch_rows: int) -> int:
    """Global batches in an epoch; the last may be smaller."""
    return -(-num_rows // batch_rows)


def shard_bounds(batch_rows: int, num_shards: int) -> Ints:
    """Where each shard of a global batch starts, and the end, int64 [num_shards + 1].

    Shard sizes differ by at most one, and a batch with fewer rows than shards fills evenly spread ones, the first always.
    """
    return (np.arange(num_shards + 1, dtype=np.int64) * batch_rows + num_shards - 1) // num_shards


def shard_ranks(num_shards: int, world_size: int) -> Ints:
    """The rank that owns each shard: runs of equal length, or nearly, int64 [num_shards]."""
    return np.arange(num_shards, dtype=np.int64) * world_size // num_shards


@dataclass(frozen=True)
class BatchSharding:
    """How the batches of a split are dealt out.

    Attributes:
        num_rows: rows in an epoch of the split.
        batch_rows: rows of a global batch.
        num_shards: shards of each global batch.
        world_size: ranks.
    """

    num_rows: int
    batch_rows: int
    num_shards: int
    world_size: int

    def batch_size(self, batch: int) -> int:
        """True rows of a batch: less than `batch_rows` for an epoch's last one."""
        return min(self.batch_rows, self.num_rows - batch * self.batch_rows)

    def shards(self, batch: int, rank: int) -> list[tuple[int, int]]:
        """The shards of a batch that a rank owns, as (shard number, rows)."""
        bounds = shard_bounds(self.batch_size(batch), self.num_shards)
        owned = np.flatnonzero(shard_ranks(self.num_shards, self.world_size) == rank)
        return [(int(shard), int(bounds[shard + 1] - bounds[shard])) for shard in owned]

    def ranks(self, offsets: Ints) -> Ints:
        """The rank that gets the row at each of these offsets in the epoch's sequence; -1 behind the last row that is used."""
        batches = np.minimum(offsets, self.num_rows - 1) // self.batch_rows
        sizes = np.minimum(self.batch_rows, self.num_rows - batches * self.batch_rows)
        shards = (offsets - batches * self.batch_rows) * self.num_shards // sizes
        return np.where(offsets < self.num_rows, shards * self.world_size // self.num_shards, -1)


# ---------------------------------------------------------------- a whole job


@dataclass(frozen=True, eq=False)
class EvaluationOrder:
    """An evaluation that a job makes again and again.

    Attributes:
        split: its rows.
        num_rows: how many of them are measured, from the first on.
        every_steps: optimizer steps between two of them; 0: there is only the one at the job's end.
    """

    split: SplitOrder
    num_rows: int
    every_steps: int

    @property
    def num_windows(self) -> int:
        """Windows that hold the measured rows."""
        return window_at(self.split, 0, self.num_rows - 1) + 1

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether it is made behind this step, of so many."""
        return step > 0 and (step == total_steps or (self.every_steps > 0 and step % self.every_steps == 0))

    def num_due(self, step: int, total_steps: int) -> int:
        """How many of them are made up to this step, that one included."""
        regular = step // self.every_steps if self.every_steps else 0
        return regular + (step == total_steps and (not self.every_steps or step % self.every_steps > 0))


@dataclass(frozen=True, eq=False)
class JobOrder:
    """The order of everything a job reads: training rows, epoch after epoch, and between them those of evaluations.

    Attributes:
        train: the training rows.
        evaluations: in this order, where several are due behind the same step.
        total_steps: optimizer steps of the job.
        batch_rows: rows of a global batch.
    """

    train: SplitOrder
    evaluations: tuple[EvaluationOrder, ...]
    total_steps: int
    batch_rows: int

    @property
    def total_rows(self) -> int:
        """Rows trained on in the whole job; the position at its end."""
        return self.position(self.total_steps)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return num_batches(self.train.num_rows, self.batch_rows)

    @property
    def num_epochs(self) -> int:
        """Epochs, the last of which may be cut short."""
        return num_batches(self.total_steps, self.steps_per_epoch)

    def step(self, position: int) -> int:
        """Optimizer steps done at this position."""
        epoch, offset = divmod(position, self.train.num_rows)
        return epoch * self.steps_per_epoch + num_batches(offset, self.batch_rows)

    def position(self, step: int) -> int:
        """Rows trained on behind this step."""
        epoch, batches = divmod(step, self.steps_per_epoch)
        return epoch * self.train.num_rows + min(batches * self.batch_rows, self.train.num_rows)

    def due(self, step: int) -> list[EvaluationOrder]:
        """The evaluations that are made behind this step."""
        return [evaluation for evaluation in self.evaluations if evaluation.is_due(step, self.total_steps)]

    def ending_at(self, position: int) -> JobOrder:
        """The same order, cut short: behind this position come only the evaluations of a job's end."""
        return replace(self, total_steps=self.step(position))

    def evaluation(self, split: str) -> EvaluationOrder:
        """The evaluation of a split.

        Raises:
            KeyError: there is none.
        """
        return {evaluation.split.split: evaluation for evaluation in self.evaluations}[split]

    def split(self, name: str) -> SplitOrder:
        """The order of a split by name.

        Raises:
            KeyError: the job does not read it.
        """
        return self.train if name == TRAIN else self.evaluation(name).split


@dataclass(frozen=True)
class Item:
    """One window of the stream.

    Attributes:
        split: which rows.
        epoch: in which epoch; of an evaluation, behind which step.
        window: which window.
        skip: offsets in the epoch's sequence before this one were consumed already.
    """

    split: str
    epoch: int
    window: int
    skip: int


@dataclass(frozen=True, eq=False)
class _Part:
    """What is left to read of one epoch: windows of training rows, and evaluations between them.

    Attributes:
        steps: behind which an evaluation is due, int64 [num_points].
        starts: places in the part where the rows of these evaluations begin, int64 [num_points].
        windows: training windows before each of them, from the epoch's first on, int64 [num_points].
        first_window: the first training window that is read.
        size: windows in all.
    """

    steps: Ints
    starts: Ints
    windows: Ints
    first_window: int
    size: int


def _windows_until(order: JobOrder, epoch: int, step: int) -> int:
    """Training windows of an epoch, from its first on, that hold rows of its steps up to this one."""
    offset = order.position(step) - epoch * order.train.num_rows
    if offset in (0, order.train.num_rows):
        return order.train.num_windows if offset else 0
    return window_at(order.train, epoch, offset - 1) + 1


@lru_cache(maxsize=4)
def _part(order: JobOrder, epoch: int, first_window: int, step: int) -> _Part:
    """The rest of an epoch behind a step, from a window on. Rows are read once the window before is: an evaluation comes behind
    the window that holds the last row of its step."""
    first_step, last_step = epoch * order.steps_per_epoch, min((epoch + 1) * order.steps_per_epoch, order.total_steps)
    due = {last_step} if order.due(last_step) else set()
    for every in {evaluation.every_steps for evaluation in order.evaluations} - {0}:
        due |= set(range(max(step, first_step) // every * every + every, last_step + 1, every))
    steps = np.array(sorted(one for one in due if one > step), np.int64)
    windows = np.array([_windows_until(order, epoch, int(one)) for one in steps], np.int64)
    sizes = np.array([sum(one.num_windows for one in order.due(int(at))) for at in steps], np.int64)
    starts = windows - first_window + np.cumsum(sizes) - sizes
    size = max(0, _windows_until(order, epoch, last_step) - first_window) + int(sizes.sum())
    return _Part(steps, starts, windows, first_window, size)


class Stream:
    """All windows that are still to be read from a position on, as a sequence. Items are computed, not stored."""

    def __init__(self, order: JobOrder, position: int, *, evaluated: bool = True) -> None:
        """Start at `position` rows consumed; 0 <= position <= order.total_rows.

        Args:
            evaluated: whether the rows of the evaluations that are due there were consumed too.
        """
        self._order = order
        self._step = order.step(position)
        self._epoch, self._offset = divmod(position, order.train.num_rows)
        self._first_window = window_at(order.train, self._epoch, self._offset) if self._offset else 0
        self._due = [] if evaluated else order.due(self._step)

    def __len__(self) -> int:
        if self._step == self._order.total_steps:
            return self._num_due
        return self._num_due + self._part(0).size + self._until(self._order.num_epochs) - self._until(self._epoch + 1)

    def __getitem__(self, index: int) -> Item:
        if index < self._num_due:
            return self._evaluated(self._due, self._step, index)
        index -= self._num_due
        if index < self._part(0).size:
            return self._item(0, index)
        # Epochs have about the same number of windows; all of them are counted from the first whole one on.
        index += self._until(self._epoch + 1) - self._part(0).size
        low, high = self._epoch + 1, self._order.num_epochs - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._until(middle) <= index else (low, middle - 1)
        return self._item(low - self._epoch, index - self._until(low))

    @property
    def _num_due(self) -> int:
        return sum(evaluation.num_windows for evaluation in self._due)

    def _part(self, number: int) -> _Part:
        """The rest of the epoch that it starts in, or a whole one behind it."""
        if number == 0:
            return _part(self._order, self._epoch, self._first_window, self._step)
        epoch = self._epoch + number
        return _part(self._order, epoch, 0, epoch * self._order.steps_per_epoch)

    def _until(self, epoch: int) -> int:
        """Windows of all epochs before this one, in a job that nothing interrupts."""
        order, step = self._order, min(epoch * self._order.steps_per_epoch, self._order.total_steps)
        evaluations = sum(one.num_due(step, order.total_steps) * one.num_windows for one in order.evaluations)
        whole = step // order.steps_per_epoch
        return whole * order.train.num_windows + _windows_until(order, whole, step) + evaluations

    def _item(self, number: int, index: int) -> Item:
        part, epoch = self._part(number), self._epoch + number
        point = int(np.searchsorted(part.starts, index, side="right")) - 1
        if point < 0:
            return self._trained(epoch, part.first_window + index)
        step = int(part.steps[point])
        due, inside = self._order.due(step), index - int(part.starts[point])
        if inside < sum(evaluation.num_windows for evaluation in due):
            return self._evaluated(due, step, inside)
        return self._trained(epoch, int(part.windows[point]) + inside - sum(evaluation.num_windows for evaluation in due))

    def _trained(self, epoch: int, window: int) -> Item:
        return Item(TRAIN, epoch, window, self._offset if epoch == self._epoch else 0)

    @staticmethod
    def _evaluated(due: Sequence[EvaluationOrder], step: int, index: int) -> Item:
        for evaluation in due:
            if index < evaluation.num_windows:
                return Item(evaluation.split.split, step, index, 0)
            index -= evaluation.num_windows
        raise IndexError(index)
