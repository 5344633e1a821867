"""What a run's events say of how often it went on by itself, and how long that took."""

from __future__ import annotations

from typing import Any

from raymill.orchestration.summary import find_recoveries
from raymill.record.events import (
    AttemptStarted,
    CheckpointSaved,
    Event,
    FirstStepDone,
    RunStopped,
    StageReached,
    StandbyDecided,
    StepDone,
)


def started(attempt: int, step: int, time_s: float) -> AttemptStarted:
    values: dict[str, Any] = {"num_workers": 2, "num_total_steps": 90, "resumed": step > 0}
    return AttemptStarted(attempt=attempt, step=step, time_s=time_s, **values)


def step(number: int, time_s: float) -> StepDone:
    return StepDone(step=number, epoch=0, rows=number, metrics={}, time_s=time_s)


FIRST_ATTEMPT: list[Event] = [
    StageReached(stage="starting Ray", time_s=1.0),
    started(1, 0, 9.0),
    FirstStepDone(step=1, time_s=10.0),
    step(1, 11.0),
    step(12, 20.0),
    CheckpointSaved(step=12, path="checkpoints/a", best=False, time_s=20.5),
]
TAKEN_OVER: list[Event] = [
    StandbyDecided(started=True, reason="", time_s=21.0),
    StageReached(stage="the driver that stood by takes over", time_s=23.0),
    started(2, 12, 24.0),
    FirstStepDone(step=13, time_s=25.75),
    step(13, 26.0),
]


def test_a_recovery_is_from_the_last_work_to_the_next_step() -> None:
    assert find_recoveries(FIRST_ATTEMPT) == []
    assert find_recoveries(FIRST_ATTEMPT + TAKEN_OVER) == [{"step": 12, "seconds": 5.25}]


def test_each_is_counted_also_where_an_attempt_dies_before_its_first_step() -> None:
    died = [started(2, 12, 24.0), StageReached(stage="starting Ray", time_s=30.0), started(3, 12, 38.0)]
    again = [FirstStepDone(step=13, time_s=40.5), started(4, 12, 44.0), FirstStepDone(step=13, time_s=45.0)]
    assert find_recoveries([*FIRST_ATTEMPT, *died, *again]) == [{"step": 12, "seconds": 20.0}, {"step": 12, "seconds": 4.5}]


def test_what_a_person_resumed_is_no_recovery() -> None:
    stopped = [RunStopped(reason="interrupted", message="", time_s=21.0), started(2, 12, 990.0), FirstStepDone(step=13)]
    assert find_recoveries([*FIRST_ATTEMPT, *stopped]) == []
