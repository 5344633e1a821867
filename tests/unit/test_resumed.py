"""What of a job may change when its run goes on: what touches neither the order nor the weights."""

from __future__ import annotations

from typing import Any

import pytest

from raymill.config import load, resumed
from raymill.config.spec import JobSpec
from raymill.errors import InputError

SPEC = JobSpec.model_validate(
    {
        "name": "tiny",
        "task": "jobs.tiny:Net",
        "pipeline": "pipelines.tiny:rows",
        "optimizer": {"kind": "SGD", "lr": 0.1},
        "checkpoint": {"metric": "validation/f1"},
    }
)
RECORD = load.resolved(SPEC)


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("checkpoint.metric=validation/accuracy", "checkpoint", "metric", "validation/accuracy"),
        ("checkpoint.mode=min", "checkpoint", "mode", "min"),
        ("checkpoint.keep=5", "checkpoint", "keep", 5),
        ("retry.lost_processes=9", "retry", "lost_processes", 9),
        ("loop.stall_timeout_s=600", "loop", "stall_timeout_s", 600),
        ("loop.on_nan=skip", "loop", "on_nan", "skip"),
        ("register={model: tiny}", "register_", "model", "tiny"),
    ],
)
def test_a_field_that_decides_neither_order_nor_weights_may_change(override: str, section: str, field: str, value: Any) -> None:
    changed = resumed.changed(RECORD, [override])
    assert getattr(getattr(changed, section), field) == value
    assert changed.optimizer == SPEC.optimizer
    assert load.resolved(SPEC) == RECORD, "the record is as it was"


def test_without_overrides_it_is_the_same_job() -> None:
    assert resumed.changed(RECORD, []) == SPEC


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("loop.seed=1", "it decides the order of the rows, or the weights"),
        ("loop.global_batch_rows=32", "it decides the order of the rows, or the weights"),
        ("loop.epochs=9", "the schedule was made for this number of steps"),
        ("loop.threads=2", "it decides how sums are rounded"),
        ("optimizer.lr=1", "it decides the weights"),
        ("data.root=elsewhere", "it decides the rows"),
        ("bad_rows.policy=skip", "it decides which rows are trained on"),
        ("task=jobs.other:Net", "it is what makes the model"),
    ],
)
def test_any_other_is_refused_by_name_with_the_reason(override: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        resumed.changed(RECORD, [override])
    (problem,) = caught.value.problems
    assert problem.where == f"--set {override.partition('=')[0]}"
    assert why in problem.found
    assert "checkpoint.metric" in problem.expected


def test_each_field_of_a_job_either_may_change_or_says_why_not() -> None:
    sections = {info.alias or name: name for name, info in JobSpec.model_fields.items()}
    for section in sections:
        allowed = any(name == section or name.startswith(f"{section}.") for name in resumed.MAY_CHANGE)
        refused = any(name == section or name.startswith(f"{section}.") for name in resumed.WHY_NOT)
        assert allowed or refused, section


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(InputError) as caught:
        resumed.changed(RECORD, ["loop.seed=1", "checkpoint.keep=none", "retry.storage=-1", "checkpoint.metrik=x"])
    assert sorted(problem.where for problem in caught.value.problems) == [
        "--set checkpoint.keep",
        "--set checkpoint.metrik",
        "--set loop.seed",
        "--set retry.storage",
    ]
