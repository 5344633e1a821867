"""The share of time that waiting for data cost, held against the test's own clocks: real sleeps, in every place and rank.

These tests depend on time by their nature. Their sleeps are long beside all else that a step does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from probes import sleepy
from worker_harness import Experiment, RankPool, Start, run_rank

SLEEP_S = 0.05
POINTS = 0.05
"""How far the reported share may be from the true one."""

Measure = Callable[..., "Measured"]


@dataclass
class Measured:
    """One run.

    Attributes:
        reported: the summary's share of time that waiting for data took.
        true: the same by the probe's clocks.
        speed: rows per second by the probe's clocks.
        outcome, steps: of rank 0: the outcome, the step events.
    """

    reported: float
    true: float
    speed: float
    outcome: Any
    steps: list[dict[str, Any]]


@pytest.fixture
def measure(pool: RankPool, tmp_path: Path) -> Measure:
    """Trains with these sleeps and measures."""
    count = 0

    def run(world_size: int, sleeps: sleepy.Sleeps, *, prefetch: int = 0, strict: bool = False, **options: Any) -> Measured:
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        experiment = Experiment(
            partial(make_task, sleeps), partial(sleepy.pipeline, sleeps, **options), sleepy.VALUES
        ).with_values(loop={"strict": strict})
        start = Start(folder, 1, None, None, warm_up=True)
        results = pool.call(world_size, run_sleepy_rank, experiment, start, prefetch)
        logs = [log for _, log in results]
        outcome, events = results[0][0]
        steps = [event for event in events if event["kind"] == "step"]
        # From the last rank's first forward pass to the last rank's last one lie all steps but one, whole; all read one clock.
        forwards = [by_step(log.forwards_s) for log in logs]
        wall_s = max(begun[-1][0] for begun in forwards) - max(begun[0][0] for begun in forwards)
        works = [list(zip(log.waited_s, map(sum, by_step(log.collated_s)), strict=True)) for log in logs]
        held_up_s = sum(held_up([work[step] for work in works]) for step in range(1, sleepy.STEPS))
        rows = (sleepy.STEPS - 1) * sleepy.BATCH_ROWS
        return Measured(outcome.data_wait_share, held_up_s / wall_s, rows / wall_s, outcome, steps)

    return run


def by_step(values: list[float]) -> list[list[float]]:
    """What was noted in each step: as often in each, after what was noted before the first."""
    each = len(values) // sleepy.STEPS
    noted = values[len(values) - each * sleepy.STEPS :]
    return [noted[start : start + each] for start in range(0, len(noted), each)]


def held_up(ranks: list[tuple[float, float]]) -> float:
    """Of a step with these seconds of (reading and transform, collate) by rank, those that would be less if rows were there."""
    return max(waited_s + collated_s for waited_s, collated_s in ranks) - max(collated_s for _, collated_s in ranks)


def make_task(sleeps: sleepy.Sleeps, schema: Mapping[str, Any]) -> sleepy.Sleepy:
    return sleepy.Sleepy(schema, sleeps)


def run_sleepy_rank(rank: int, world_size: int, port: int, experiment: Experiment, start: Start, prefetch: int) -> Any:
    from raymill.data import reader
    from raymill.data.ray_stream import prefetched

    sleepy.log = sleepy.Log()
    read_locally = reader.read_locally
    if prefetch:
        reader.read_locally = lambda *given, **named: timed(prefetched(read_locally(*given, **named), depth=prefetch))
    try:
        outcome = run_rank(rank, world_size, port, experiment, start)
    finally:
        reader.read_locally = read_locally
    if prefetch:
        # What is read ahead costs what it comes late.
        sleepy.log.waited_s = sleepy.log.fetched_s
    return outcome, sleepy.log


def timed(packets: Iterator[Any]) -> Iterator[Any]:
    while True:
        began_s = time.perf_counter()
        packet = next(packets, None)
        if packet is None:
            return
        sleepy.log.fetched_s.append(time.perf_counter() - began_s)
        yield packet


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("place", "waits"), [("read", True), ("transform", True), ("collate", False), ("loss", False)])
def test_a_slow_rank_counts_as_waiting_for_data_where_it_reads_and_only_there(
    measure: Measure, world_size: int, place: str, waits: bool
) -> None:
    for rank in range(world_size):
        found = measure(world_size, {(place, rank): SLEEP_S})
        assert found.reported == pytest.approx(found.true, abs=POINTS), f"sleeps in {place} of rank {rank}"
        assert (found.reported > 0.5) is waits
        # The step events end with what the summary says, and speeds are of the same seconds.
        assert found.steps[-1]["data_wait_share"] == pytest.approx(found.reported, abs=0.02)
        assert found.outcome.rows_per_s == pytest.approx(found.speed, rel=0.3)
        assert found.steps[-1]["rows_per_s"] == pytest.approx(found.speed, rel=0.3)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_are_slow_in_turn_hold_up_all_of_the_time(measure: Measure, world_size: int) -> None:
    found = measure(world_size, {("transform", rank): SLEEP_S for rank in range(world_size)}, in_turn=True)
    assert found.reported == pytest.approx(found.true, abs=POINTS)
    assert found.reported > 0.7  # each rank by itself waited for a half or a third of it


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("strict", [False, True])
def test_half_the_time_is_half_the_time_wherever_the_other_half_goes(measure: Measure, world_size: int, strict: bool) -> None:
    last = world_size - 1
    # Strict collates and computes row by row.
    work_s = SLEEP_S * world_size / sleepy.BATCH_ROWS if strict else SLEEP_S
    for other in ("collate", "loss"):
        sleeps = {("read", rank): SLEEP_S for rank in range(world_size)} | {(other, last): work_s}
        found = measure(world_size, sleeps, strict=strict)
        assert found.reported == pytest.approx(found.true, abs=POINTS)
        assert 0.15 < found.reported < 0.7


def test_a_wait_that_another_ranks_work_hides_costs_nothing(measure: Measure) -> None:
    found = measure(2, {("read", 0): SLEEP_S, ("collate", 1): 1.5 * SLEEP_S})
    assert found.reported == pytest.approx(found.true, abs=POINTS)
    assert found.reported < 0.1


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_read_ahead_is_waited_for_only_as_far_as_it_comes_late(measure: Measure, world_size: int) -> None:
    def sleeps(read_s: float, loss_s: float) -> sleepy.Sleeps:
        return {(place, rank): s for place, s in (("read", read_s), ("loss", loss_s)) for rank in range(world_size)}

    assert measure(world_size, sleeps(SLEEP_S, 2 * SLEEP_S), prefetch=2).reported < 2 * POINTS
    late = measure(world_size, sleeps(4 * SLEEP_S, 2 * SLEEP_S), prefetch=2)
    assert late.reported == pytest.approx(late.true, abs=POINTS)
    # Half the time, less the windows that were there when the first step was done, and what the machine was busy with else.
    assert 0.1 < late.reported < 0.6


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_that_waits_is_told_apart_from_training(measure: Measure, world_size: int) -> None:
    found = measure(world_size, {("read_validation", world_size - 1): SLEEP_S, ("loss", 0): SLEEP_S}, validation_rows=10 * 12)
    assert found.reported == pytest.approx(found.true, abs=POINTS)
    assert found.reported < 0.3
    assert found.outcome.evaluation_wait_share > 0.5
    assert found.outcome.rows_per_s == pytest.approx(found.speed, rel=0.3)
