"""Which failures a run survives: a budget for each cause, whole again after progress."""

from __future__ import annotations

from typing import Any

import pytest

from raymill.config.spec import JobSpec
from raymill.errors import CheckpointError, DataError, InputError, NumberError, RaymillError, RunError, StallError, WorkerError
from raymill.orchestration.retry import Cause, Failure, budgets, cause_of, go_on, pause_s

BUDGETS = {Cause.LOST_PROCESS: 2, Cause.STORAGE: 1}


def lost(step: int) -> Failure:
    return Failure(Cause.LOST_PROCESS, step)


def test_a_budget_is_spent_by_failures_without_progress() -> None:
    assert [go_on([lost(7)] * count, BUDGETS) for count in (1, 2, 3)] == [True, True, False]


def test_progress_makes_a_budget_whole() -> None:
    assert go_on([lost(7), lost(7), lost(8), lost(8)], BUDGETS)
    assert not go_on([lost(7), lost(7), lost(8), lost(8), lost(8)], BUDGETS)


def test_a_failure_of_one_cause_spends_nothing_of_another() -> None:
    storage = Failure(Cause.STORAGE, 7)
    assert go_on([lost(7), lost(7), storage], BUDGETS)
    assert not go_on([storage, lost(7), storage], BUDGETS)


@pytest.mark.parametrize("cause", [Cause.CODE, Cause.DATA, Cause.MEMORY])
def test_what_would_only_fail_again_is_not_tried_again(cause: Cause) -> None:
    assert not go_on([Failure(cause, 3)], {known: 9 for known in Cause if known not in (Cause.CODE, Cause.DATA, Cause.MEMORY)})


def test_attempts_without_progress_are_made_further_and_further_apart() -> None:
    """Ray takes a killed node for one that is there for 13 s: within the three attempts of a job's own budget."""
    pauses_s = [pause_s([lost(7)] * count) for count in range(1, 7)]
    assert pauses_s == [0, 5, 10, 20, 40, 40]
    assert pause_s([lost(7), lost(7), lost(8)]) == 0
    assert pause_s([lost(7), lost(7), Failure(Cause.STORAGE, 7)]) == 0


def spec(**sections: Any) -> JobSpec:
    return JobSpec.model_validate({"name": "job", "task": "-", "pipeline": "-", "optimizer": {"kind": "SGD"}, **sections})


def test_each_cause_that_a_restart_may_cure_has_the_budget_of_the_job() -> None:
    given = {"lost_processes": 5, "stalls": 4, "rollbacks": 7, "storage": 6}
    found = budgets(spec(retry=given, loop={"on_nan": "rollback"}))
    assert found == {Cause.LOST_PROCESS: 5, Cause.DRAIN: 5, Cause.STALL: 4, Cause.NUMBERS: 7, Cause.STORAGE: 6}


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_job_that_does_not_go_back_after_nan_is_not_started_again_after_it(on_nan: str) -> None:
    found = budgets(spec(loop={"on_nan": on_nan}))
    assert found[Cause.NUMBERS] == 0
    assert not go_on([Failure(Cause.NUMBERS, 3)], found)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (None, Cause.LOST_PROCESS),
        (StallError("x"), Cause.STALL),
        (CheckpointError("x"), Cause.STORAGE),
        (NumberError("x"), Cause.NUMBERS),
        (DataError("x"), Cause.DATA),
        (InputError([]), Cause.CODE),
        (RunError("x"), Cause.CODE),
        (WorkerError("x", 1, "", Cause.MEMORY), Cause.MEMORY),
    ],
)
def test_each_error_has_its_cause(error: RaymillError | None, cause: Cause) -> None:
    assert cause_of(error) is cause
