"""The order of samples: each row once, the same rows in each step at any number of ranks, and a tail for every position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymill.data.feed import Feed
from raymill.data.order import (
    BatchSharding,
    EvaluationOrder,
    Ints,
    Item,
    JobOrder,
    SplitOrder,
    Stream,
    by_length,
    epoch_order,
    key,
    num_batches,
    shard_bounds,
    shuffled,
    splitmix64,
    window,
    window_at,
    window_rows,
)
from raymill.data.reader import Reader, read_locally
from raymill.data.rows import ROW_ID
from raymill.data.sources import ArraySource
from raymill.errors import DataError, InputError
from raymill.task import TRAIN, VALIDATION, Fragment, Pipeline, Rows
from raymill.training.steps import EvalEnd, EvalStep, SaveStep, Step, TrainEnd, TrainStep, may_stop_after, remaining_steps

# ---------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Counted:
    """A source whose rows are their own numbers, and nothing is stored."""

    sizes: tuple[int, ...]

    def fragments(self) -> list[Fragment]:
        return [Fragment("counted", part, size, size, "") for part, size in enumerate(self.sizes)]

    def read(self, fragment: Fragment) -> Rows:
        first = sum(self.sizes[: fragment.part])
        return {"value": np.arange(first, first + fragment.num_rows)}


@dataclass(frozen=True)
class Case:
    """A job in small.

    Attributes:
        train: rows of each training fragment.
        validation: likewise; empty for no evaluation.
        test: likewise, of an evaluation at the job's end.
        every_steps: steps between two evaluations of validation rows; 0: each epoch.
        measured: validation rows that are measured, if there are so many.
        missing_steps: steps by which the job is shorter than its epochs, if it has so many.
        chunk_rows: rows of a window that are transformed together; 0: all.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]
    windows: int
    batch_rows: int
    num_shards: int
    epochs: int
    seed: int
    test: tuple[int, ...] = ()
    every_steps: int = 0
    measured: int = 1000
    missing_steps: int = 0
    chunk_rows: int = 0

    @property
    def rows(self) -> dict[str, tuple[int, ...]]:
        """Split -> rows of each fragment."""
        return {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}

    @property
    def shardings(self) -> dict[str, BatchSharding]:
        """At one rank."""
        used = {TRAIN: sum(self.train), VALIDATION: min(sum(self.validation), self.measured), TEST: sum(self.test)}
        return {split: BatchSharding(count, self.batch_rows, self.num_shards, 1) for split, count in used.items()}

    @property
    def order(self) -> JobOrder:
        train = SplitOrder(TRAIN, np.array(self.train, np.int64), self.windows, self.seed, shuffle=True)
        per_epoch = num_batches(sum(self.train), self.batch_rows)
        evaluations = tuple(
            EvaluationOrder(
                SplitOrder(split, np.array(self.rows[split], np.int64), self.windows, self.seed, shuffle=False),
                self.shardings[split].num_rows,
                every_steps,
            )
            for split, every_steps in ((VALIDATION, self.every_steps or per_epoch), (TEST, 0))
            if self.rows[split]
        )
        return JobOrder(train, evaluations, max(1, self.epochs * per_epoch - self.missing_steps), self.batch_rows)

    @property
    def step_ends(self) -> list[int]:
        """Every position at which a checkpoint may be made, the beginning and the end among them."""
        return [0, *(step.position for step in remaining_steps(self.order, 0) if isinstance(step, TrainStep))]


sizes = st.lists(st.one_of(st.integers(1, 4), st.integers(0, 60)), min_size=1, max_size=8).filter(any).map(tuple)
cases = st.builds(
    Case,
    train=sizes,
    validation=st.one_of(st.just(()), sizes),
    windows=st.integers(1, 9),
    batch_rows=st.integers(1, 40),
    num_shards=st.integers(1, 6),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
)
any_cases = st.builds(
    replace,
    cases,
    test=st.one_of(st.just(()), sizes),
    every_steps=st.integers(0, 7),
    measured=st.integers(1, 60),
    missing_steps=st.integers(0, 9),
    chunk_rows=st.integers(0, 12),
)
"""Also with evaluations behind any step, of part of the rows, at the end, and epochs that are cut short."""

world_sizes = st.integers(1, 5)

Batch = tuple[str, int, int]
"""Split, epoch (of an evaluation, the step behind which it is made), number in it."""

TEST = "test"

Shards = dict[int, list[int]]


def deal(case: Case, position: int, world_size: int, *, evaluated: bool = True) -> dict[Batch, Shards]:
    """Read the rest of a job through Stream, Reader and Feed on all ranks: (split, epoch, batch) -> shard -> row ids."""
    order = case.order
    pipeline = Pipeline(sources={split: Counted(rows) for split, rows in case.rows.items()}, schema={})
    shardings = {split: replace(sharding, world_size=world_size) for split, sharding in case.shardings.items()}
    fragments = {split: source.fragments() for split, source in pipeline.sources.items()}
    reader = Reader("", order, shardings, fragments, pipeline, chunk_rows=case.chunk_rows)
    dealt: dict[Batch, Shards] = {}
    for rank in range(world_size):
        packets = read_locally(reader, position, rank, evaluated=evaluated)
        feed = Feed(packets)
        for step in remaining_steps(order, position, evaluated=evaluated):
            if isinstance(step, SaveStep):
                continue
            trained = isinstance(step, TrainStep | TrainEnd)
            split, at = (TRAIN, step.epoch) if trained else (step.split, order.step(step.position))
            if isinstance(step, EvalEnd | TrainEnd):
                feed.finish(split, at, order.train.num_windows if trained else order.evaluation(split).num_windows)
                continue
            shards = dealt.setdefault((split, at, step.batch), {})
            for shard, count in shardings[split].shards(step.batch, rank):
                if count:
                    rows = feed.take(split, at, count)
                    np.testing.assert_array_equal(rows["value"], rows[ROW_ID])
                    shards[shard] = np.asarray(rows[ROW_ID]).tolist()
        # What is left is of an epoch that is cut short.
        left = [packet for packet in packets if len(packet.rows[ROW_ID])]
        assert not left or (order.total_steps % order.steps_per_epoch and {packet.item.split for packet in left} == {TRAIN})
    return dealt


def batch_rows(shards: Shards) -> list[int]:
    return [row for shard in sorted(shards) for row in shards[shard]]


# ---------------------------------------------------------------- what the order promises


@given(case=cases, world_size=world_sizes)
def test_every_epoch_deals_every_row_once(case: Case, world_size: int) -> None:
    dealt = deal(case, 0, world_size)
    for epoch in range(case.epochs):
        behind = (epoch + 1) * case.order.steps_per_epoch
        for split, number, rows in ((TRAIN, epoch, case.train), (VALIDATION, behind, case.validation)):
            batches = [batch_rows(shards) for (name, at, _), shards in dealt.items() if (name, at) == (split, number)]
            assert sorted(row for batch in batches for row in batch) == list(range(sum(rows)))
            assert all(len(batch) == case.batch_rows for batch in batches[:-1])


@given(case=any_cases)
def test_an_evaluation_measures_its_first_rows_whenever_it_is_due_and_at_the_end(case: Case) -> None:
    dealt, order = deal(case, 0, 1), case.order
    for evaluation in order.evaluations:
        split, every = evaluation.split.split, evaluation.every_steps
        due = {step for step in range(1, order.total_steps + 1) if step == order.total_steps or (every and step % every == 0)}
        assert {at for (name, at, _) in dealt if name == split} == due
        for step in due:
            rows = [row for (name, at, _), shards in dealt.items() if (name, at) == (split, step) for row in batch_rows(shards)]
            assert rows == list(range(evaluation.num_rows))


@given(case=any_cases)
def test_the_stream_is_as_long_as_it_says_and_ends_with_what_a_shorter_job_needs(case: Case) -> None:
    stream = Stream(case.order, 0)
    items = [stream[index] for index in range(len(stream))]
    assert len(set(items)) == len(items)
    assert items[-1].split == (TEST if case.test else VALIDATION if case.validation else TRAIN)
    cut = case.order.ending_at(case.step_ends[-1])
    assert len(Stream(cut, cut.total_rows)) == 0
    assert len(Stream(cut, cut.total_rows, evaluated=False)) == sum(evaluation.num_windows for evaluation in cut.evaluations)


@given(case=any_cases, world_size=world_sizes)
def test_each_shard_of_each_batch_has_the_same_rows_at_any_number_of_ranks(case: Case, world_size: int) -> None:
    assert deal(case, 0, world_size) == deal(case, 0, 1)


@given(case=any_cases, num_shards=st.integers(1, 6))
def test_each_batch_has_the_same_rows_at_any_number_of_shards(case: Case, num_shards: int) -> None:
    other = replace(case, num_shards=num_shards)
    found, expected = deal(other, 0, 1), deal(case, 0, 1)
    assert {batch: batch_rows(shards) for batch, shards in found.items()} == {
        batch: batch_rows(shards) for batch, shards in expected.items()
    }


@given(case=any_cases, world_size=world_sizes, evaluated=st.booleans(), data=st.data())
def test_what_is_dealt_from_a_position_on_is_the_tail_of_the_whole(
    case: Case, world_size: int, evaluated: bool, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(case.step_ends) - 1), label="steps done")
    whole = list(deal(case, 0, 1).items())
    tail = list(deal(case, case.step_ends[place], world_size, evaluated=evaluated).items())
    assert tail == (whole[len(whole) - len(tail) :])
    due = {evaluation.split.split for evaluation in case.order.due(place)}
    assert {split for (split, at, _), _ in tail if split != TRAIN and at == place} == (set() if evaluated else due)
    assert sum(split == TRAIN for (split, _, _), _ in tail) == len(case.step_ends) - 1 - place


@given(case=cases)
def test_an_epochs_end_is_a_position_like_any_other(case: Case) -> None:
    whole = list(deal(case, 0, 1).items())
    for epoch in range(case.epochs + 1):
        tail = list(deal(case, epoch * sum(case.train), 2).items())
        assert tail == whole[len(whole) - len(tail) :]
        assert {at for (split, at, _), _ in tail if split == TRAIN} == set(range(epoch, case.epochs))


@given(case=any_cases, data=st.data())
def test_a_resume_reads_what_is_left_and_at_most_one_window_more(case: Case, data: st.DataObject) -> None:
    order = case.order
    position = data.draw(st.sampled_from(case.step_ends), label="position")
    stream = Stream(order, position)
    read = largest = 0
    for item in (stream[index] for index in range(len(stream))):
        if item.split == TRAIN:
            opened = window(order.train, item.epoch, item.window)
            read += opened.stop - opened.start
            largest = max(largest, opened.stop - opened.start)
    left = order.total_rows - position
    # Of an epoch that is cut short, the last window is read in whole.
    assert left <= read <= left + largest * (1 if order.total_steps % order.steps_per_epoch == 0 else 2)


@given(case=cases, epoch=st.integers(0, 3))
def test_windows_partition_the_sequence(case: Case, epoch: int) -> None:
    order = case.order.train
    windows = [window(order, epoch, index) for index in range(case.windows)]
    assert windows[0].start == 0
    assert windows[-1].stop == order.num_rows
    assert all(before.stop == after.start for before, after in pairwise(windows))
    for index, opened in enumerate(windows):
        ids, places = window_rows(order, epoch, opened.fragments)
        assert len(ids) == opened.stop - opened.start
        assert sorted(places) == list(range(len(ids)))
        assert all(window_at(order, epoch, place) == index for place in range(opened.start, opened.stop))


@given(case=cases)
def test_a_window_is_its_share_of_the_rows_give_or_take_a_fragment(case: Case) -> None:
    order = case.order.train
    share, largest = order.num_rows / case.windows, max(case.train)
    for index in range(case.windows):
        opened = window(order, 0, index)
        assert opened.stop - opened.start < share + largest + 1


@given(batch=st.integers(1, 200), num_shards=st.integers(1, 20), world_size=st.integers(1, 7))
def test_shards_are_of_nearly_equal_size_and_the_first_is_never_empty(batch: int, num_shards: int, world_size: int) -> None:
    counts = np.diff(shard_bounds(batch, num_shards))
    assert counts.sum() == batch
    assert counts.max() - counts.min() <= 1
    assert counts[0] > 0
    sharding = BatchSharding(batch, batch, num_shards, world_size)
    owned = [shard for rank in range(world_size) for shard in sharding.shards(0, rank)]
    assert owned == list(enumerate(counts.tolist()))


def test_other_epochs_and_seeds_are_other_orders() -> None:
    def sequence(seed: int, epoch: int) -> tuple[int, ...]:
        order = SplitOrder(TRAIN, np.full(20, 50, np.int64), 4, seed, shuffle=True)
        opened = [window(order, epoch, index).fragments for index in range(4)]
        return tuple(row for fragments in opened for row in window_rows(order, epoch, fragments)[0].tolist())

    found = {sequence(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(found) == 16
    assert all(sorted(rows) == list(range(1000)) for rows in found)


def test_neighbours_in_the_data_are_far_apart_in_the_order() -> None:
    order = SplitOrder(TRAIN, np.full(20, 50, np.int64), 2, 0, shuffle=True)
    ids, _ = window_rows(order, 0, window(order, 0, 0).fragments)
    assert np.mean(np.abs(np.diff(ids)) == 1) < 0.02


def test_an_evaluation_keeps_the_order_of_the_source() -> None:
    case = Case((5,), (4, 9, 2), 2, 4, 2, 2, 7)
    for (split, _, batch), shards in deal(case, 0, 2).items():
        if split == VALIDATION:
            assert batch_rows(shards) == list(range(batch * 4, min(batch * 4 + 4, 15)))


# ---------------------------------------------------------------- steps


def test_an_epoch_is_its_training_steps_then_its_evaluation_with_a_save_on_either_side() -> None:
    order = Case(train=(3, 2), validation=(5,), windows=1, batch_rows=3, num_shards=1, epochs=2, seed=0).order
    first: list[Step] = [
        TrainStep(0, 0, 3),
        TrainStep(0, 1, 5),
        TrainEnd(0, 5),
        SaveStep(0, 5, evaluated=False),
        EvalStep(VALIDATION, 0, 0, 5),
        EvalStep(VALIDATION, 0, 1, 5),
        EvalEnd(VALIDATION, 0, 5),
        SaveStep(0, 5, evaluated=True),
    ]
    then: list[Step] = [
        TrainStep(1, 0, 8),
        TrainStep(1, 1, 10),
        TrainEnd(1, 10),
        SaveStep(1, 10, evaluated=False),
        EvalStep(VALIDATION, 1, 0, 10),
        EvalStep(VALIDATION, 1, 1, 10),
        EvalEnd(VALIDATION, 1, 10),
        SaveStep(1, 10, evaluated=True),
    ]
    assert list(remaining_steps(order, 0)) == first + then
    assert list(remaining_steps(order, 3)) == first[1:] + then
    assert list(remaining_steps(order, 5, evaluated=False)) == first[4:] + then
    assert list(remaining_steps(order, 5)) == then
    assert list(remaining_steps(order, 10, evaluated=False)) == then[4:]
    assert list(remaining_steps(order, 10)) == []


def test_a_job_that_ends_within_an_epoch_evaluates_there_and_ends_no_epoch() -> None:
    case = Case(train=(9,), validation=(2,), windows=1, batch_rows=3, num_shards=1, epochs=1, seed=0, test=(1,), missing_steps=1)
    assert list(remaining_steps(case.order, 0)) == [
        TrainStep(0, 0, 3),
        TrainStep(0, 1, 6),
        SaveStep(0, 6, evaluated=False),
        EvalStep(VALIDATION, 0, 0, 6),
        EvalEnd(VALIDATION, 0, 6),
        EvalStep(TEST, 0, 0, 6),
        EvalEnd(TEST, 0, 6),
        SaveStep(0, 6, evaluated=True),
    ]


def test_without_validation_rows_an_epoch_ends_after_its_last_training_step() -> None:
    order = Case(train=(4,), validation=(), windows=1, batch_rows=4, num_shards=1, epochs=1, seed=0).order
    assert list(remaining_steps(order, 0)) == [TrainStep(0, 0, 4), TrainEnd(0, 4), SaveStep(0, 4, evaluated=True)]


@given(case=any_cases)
def test_a_run_that_stops_where_it_may_has_left_exactly_the_steps_that_follow(case: Case) -> None:
    steps = list(remaining_steps(case.order, 0))
    for number, step in enumerate(steps):
        if may_stop_after(step, case.order):
            evaluated = not isinstance(step, SaveStep) or step.evaluated
            assert list(remaining_steps(case.order, step.position, evaluated=evaluated)) == steps[number + 1 :]


@given(case=any_cases)
def test_a_run_may_stop_after_each_step_and_both_before_and_behind_evaluations(case: Case) -> None:
    order = case.order
    stops = [step for step in remaining_steps(order, 0) if may_stop_after(step, order)]
    before = [step.position for step in stops if isinstance(step, SaveStep) and not step.evaluated]
    behind = [step.position for step in stops if not isinstance(step, SaveStep) or step.evaluated]
    assert behind == case.step_ends[1:]
    assert before == [position for number, position in enumerate(case.step_ends) if number and order.due(number)]


@given(case=any_cases)
def test_a_stream_from_before_evaluations_is_that_from_behind_them_with_their_rows_first(case: Case) -> None:
    order = case.order
    for number, position in enumerate(case.step_ends):
        behind, before = Stream(order, position), Stream(order, position, evaluated=False)
        due = [(one.split.split, window) for one in order.due(number) for window in range(one.num_windows)]
        found = [before[index] for index in range(len(before))]
        assert [(item.split, item.window) for item in found[: len(due)]] == due
        assert found[len(due) :] == [behind[index] for index in range(len(behind))]


# ---------------------------------------------------------------- to the last bit


@given(
    lengths=st.lists(st.integers(0, 50), max_size=60),
    start=st.integers(0, 40),
    batch_rows=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_rows_of_like_length_come_together_in_a_batch(lengths: list[int], start: int, batch_rows: int, seed: int) -> None:
    order = by_length(np.array(lengths, np.int64), start, batch_rows, seed)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    # Of the batches that the window has for itself, no two overlap in their lengths, but for their ends.
    first = -start % batch_rows
    whole = [order[at : at + batch_rows] for at in range(first, len(lengths) - batch_rows + 1, batch_rows)]
    ranges = sorted((min(lengths[row] for row in batch), max(lengths[row] for row in batch)) for batch in whole)
    assert all(high <= low for (_, high), (low, _) in pairwise(ranges))


def test_splitmix64_is_the_published_function() -> None:
    # The first outputs of the reference generator seeded with 0: its state grows by the same constant that is added here.
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


# A run can be resumed only by code that gives these same numbers. To change them is to break every run there is.
GOLDEN_KEY = 9812528628958509896
GOLDEN_PERMUTATION = [1, 0, 3, 2, 5, 4]
GOLDEN_WINDOWS = [
    [[0, 1, 3, 4, 6, 5, 8, 2, 7], [9, 10, 11, 13, 12]],
    [[3, 10, 6, 9, 11, 12, 5, 13, 7, 4, 8], [1, 2, 0]],
]


def test_the_order_of_a_small_split_is_pinned() -> None:
    order = SplitOrder(TRAIN, np.array([3, 1, 4, 1, 5], np.int64), 2, 42, shuffle=True)
    found = [
        [window_rows(order, epoch, window(order, epoch, index).fragments)[0].tolist() for index in range(2)] for epoch in range(2)
    ]
    assert found == GOLDEN_WINDOWS
    assert shuffled(6, key(1, 2, 3)).tolist() == GOLDEN_PERMUTATION
    assert key(1, 2, 3) == GOLDEN_KEY


@given(numbers=st.lists(st.integers(-1, 2**64), min_size=1, max_size=4))
def test_a_key_is_the_hash_of_its_numbers_in_a_chain(numbers: list[int]) -> None:
    mixed = np.zeros(1, np.uint64)
    for number in numbers:
        mixed = splitmix64(mixed ^ splitmix64(np.array([number % 2**64], np.uint64)))
    assert key(*numbers) == int(mixed[0])


@given(numbers=st.lists(st.integers(0, 2**70), min_size=2, max_size=4, unique=True))
def test_a_key_tells_the_order_of_its_numbers(numbers: list[int]) -> None:
    assert key(*numbers) == key(*numbers)
    assert key(*numbers) != key(*reversed(numbers))


@given(ids=st.lists(st.integers(0, 2**62), unique=True, max_size=50), epoch_key=st.integers(0, 2**64 - 1))
def test_a_shuffle_is_a_permutation_that_depends_on_the_ids_alone(ids: list[int], epoch_key: int) -> None:
    array = np.array(ids, np.int64)
    places = shuffled(array, epoch_key)
    assert sorted(places.tolist()) == list(range(len(ids)))
    backwards = array[::-1]
    assert array[places].tolist() == backwards[shuffled(backwards, epoch_key)].tolist()


# ---------------------------------------------------------------- large


def test_a_thousand_million_rows_in_a_million_fragments() -> None:
    generator = np.random.default_rng(0)
    rows: Ints = generator.integers(500, 1501, 10**6)
    order = SplitOrder(TRAIN, rows, 60_000, 1, shuffle=True)
    job = JobOrder(order, (), 3 * num_batches(order.num_rows, 4096), 4096)
    position = order.num_rows + 4096 * 100_000
    stream = Stream(job, position)
    first = stream[0]
    opened = window(order, 1, first.window)
    assert (first.epoch, first.skip) == (1, position - order.num_rows)
    assert opened.start <= first.skip < opened.stop
    assert len(stream) == 3 * 60_000 - (60_000 + first.window)
    assert stream[len(stream) - 1] == Item(TRAIN, 2, 59_999, 0)
    whole = epoch_order(order, 1)
    assert np.array_equal(np.sort(whole.fragments), np.arange(10**6))
    assert whole.starts[-1] == order.num_rows
    ids, _ = window_rows(order, 1, opened.fragments)
    assert len(np.unique(ids)) == len(ids) == opened.stop - opened.start
    assert job.step(position) == num_batches(order.num_rows, 4096) + 100_000


# ---------------------------------------------------------------- transforms, and streams that break


def read_all(fragment_rows: int, transform_seed: int, world_size: int) -> dict[int, float]:
    """Row id -> the number that a random transform gave it."""
    source = ArraySource("zeros", partial(zeros, 60), fragment_rows)
    pipeline = Pipeline(sources={TRAIN: source}, schema={}, transform=add_noise)
    rows = np.array([fragment.num_rows for fragment in source.fragments()], np.int64)
    order = JobOrder(SplitOrder(TRAIN, rows, 4, transform_seed, shuffle=True), (), 5, 12)
    reader = Reader("", order, {TRAIN: BatchSharding(60, 12, world_size, world_size)}, {TRAIN: source.fragments()}, pipeline)
    found: dict[int, float] = {}
    for rank in range(world_size):
        for packet in read_locally(reader, 0, rank):
            ids, values = np.asarray(packet.rows[ROW_ID]), np.asarray(packet.rows["value"])
            found |= dict(zip(ids.tolist(), values.tolist(), strict=True))
    return found


def zeros(count: int) -> Rows:
    return {"value": np.zeros(count)}


def add_noise(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    return {"value": generator.normal(size=len(rows["value"]))}


def test_a_transforms_random_numbers_depend_on_seed_and_row_and_not_on_the_ranks() -> None:
    alone = read_all(7, 0, 1)
    assert len(set(alone.values())) == 60
    assert read_all(7, 0, 3) == alone
    assert read_all(7, 1, 1) != alone


def drop_one(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    return {"value": rows["value"][1:]}


def test_a_transform_that_changes_the_number_of_rows_is_refused() -> None:
    pipeline = Pipeline(sources={TRAIN: Counted((5, 5))}, schema={}, transform=drop_one)
    order = JobOrder(SplitOrder(TRAIN, np.array([5, 5], np.int64), 1, 0, shuffle=True), (), 2, 5)
    reader = Reader("", order, {TRAIN: BatchSharding(10, 5, 1, 1)}, {TRAIN: Counted((5, 5)).fragments()}, pipeline)
    with pytest.raises(InputError, match=r"drop_one.*: found 9 rows, made of 10"):
        list(reader.read(Item(TRAIN, 0, 0, 0)))


def test_a_fragment_with_other_rows_than_the_manifest_says_is_refused() -> None:
    order = JobOrder(SplitOrder(TRAIN, np.array([5], np.int64), 1, 0, shuffle=True), (), 1, 5)
    pipeline = Pipeline(sources={TRAIN: Counted((5,))}, schema={})
    manifest = [Fragment("counted", 0, 5, 5, "")]
    longer = Pipeline(sources={TRAIN: Longer((5,))}, schema={})
    shardings = {TRAIN: BatchSharding(5, 5, 1, 1)}
    assert len(next(Reader("", order, shardings, {TRAIN: manifest}, pipeline).read(Item(TRAIN, 0, 0, 0))).rows[ROW_ID]) == 5
    with pytest.raises(DataError, match="6 rows were read, 5 were there"):
        list(Reader("", order, shardings, {TRAIN: manifest}, longer).read(Item(TRAIN, 0, 0, 0)))


class Longer(Counted):
    """A source that grew after the manifest was taken."""

    def read(self, fragment: Fragment) -> Rows:
        return {"value": np.arange(fragment.num_rows + 1)}


def test_a_feed_says_when_the_stream_ends_early_or_late() -> None:
    order = JobOrder(SplitOrder(TRAIN, np.array([5], np.int64), 1, 0, shuffle=True), (), 1, 5)
    pipeline = Pipeline(sources={TRAIN: Counted((5,))}, schema={})
    reader = Reader("", order, {TRAIN: BatchSharding(5, 5, 1, 1)}, {TRAIN: Counted((5,)).fragments()}, pipeline)
    feed = Feed(read_locally(reader, 0, 0))
    feed.take(TRAIN, 0, 3)
    with pytest.raises(DataError, match="2 train rows of epoch 0 were never asked for"):
        feed.finish(TRAIN, 0, 1)
    with pytest.raises(DataError, match="the stream ended before"):
        feed.take(TRAIN, 0, 3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_transform_that_writes_into_its_own_array_again_changes_no_rows_that_were_read(world_size: int) -> None:
    written = np.empty(8, np.int64)

    def transform(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
        count = len(rows["x"])
        written[:count] = np.asarray(rows["x"]) * 10
        return {"x": rows["x"], "ten": written[:count]}

    source = ArraySource("rows", lambda: {"x": np.arange(12, dtype=np.int64)}, 3)
    order = JobOrder(SplitOrder(TRAIN, np.array([3] * 4, np.int64), 4, 0, shuffle=True), (), 1, 12)
    pipeline = Pipeline(sources={TRAIN: source}, schema={}, transform=transform)
    sharding = {TRAIN: BatchSharding(12, 12, world_size, world_size)}
    reader = Reader("run", order, sharding, {TRAIN: source.fragments()}, pipeline)
    for rank in range(world_size):
        packets = list(read_locally(reader, 0, rank))
        for packet in packets:
            np.testing.assert_array_equal(packet.rows["ten"], np.asarray(packet.rows["x"]) * 10)
