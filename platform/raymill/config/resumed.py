"""What of a job may be changed when its run goes on.

A field may change if a run that had the new value from its start would have come to the same checkpoint: by the same rows in the
same order to the same weights. So a resume stays what a resume is, and a mistake in such a field costs no second training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from raymill.config.load import apply_overrides, validated
from raymill.config.spec import JobSpec
from raymill.errors import InputError, Problem

MAY_CHANGE = (
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.metric",
    "checkpoint.mode",
    "retry",
    "register",
    "search",
    "card",
    "loop.stall_timeout_s",
    "loop.on_nan",
    "loop.max_hours",
    "bad_rows.budget",
    "scale.workers",
    "scale.min_workers",
    "scale.max_workers",
    "scale.resize_check_s",
)

WHY_NOT = {
    "name": "it names the MLflow experiment that the run is in",
    "task": "it is what makes the model",
    "pipeline": "it is what makes the rows",
    "model": "it decides the weights",
    "data": "it decides the rows",
    "optimizer": "it decides the weights",
    "schedule": "it decides the weights",
    "inputs": "they decide the weights, and their files are kept with the run",
    "init_from": "the run has begun",
    "loop.epochs": "the schedule was made for this number of steps",
    "loop.steps": "the schedule was made for this number of steps",
    "evaluate": "it decides when there are checkpoints, and what early stopping sees",
    "loop.record_order": "the order of the steps before was not recorded, or would be for nothing",
    "loop.threads": "it decides how sums are rounded, and so the weights",
    "loop": "it decides the order of the rows, or the weights",
    "scale": "it decides how sums are rounded, and so the weights",
    "bad_rows.policy": "it decides which rows are trained on",
}
"""Field -> why it may not change; the longest that fits counts."""


def changed(recorded: Mapping[str, Any], overrides: Sequence[str]) -> JobSpec:
    """The job of a run with other values.

    Args:
        recorded: the run's resolved job.
        overrides: "field.path=value" each; later ones win.

    Raises:
        InputError: with each that cannot be applied, may not change, or is no value for its field.
    """
    values = copy.deepcopy(dict(recorded))
    fields, problems = apply_overrides(values, overrides)
    spec, wrong = validated(values)
    refused = sorted(fields - {one.where for one in wrong})
    problems += [_refusal(field) for field in refused if not _within(field, MAY_CHANGE)]
    problems += [Problem(f"--set {one.where}", one.found, one.expected, one.fix) for one in wrong]
    if problems or spec is None:
        raise InputError(problems)
    return spec


def _refusal(field: str) -> Problem:
    reasons = [name for name in WHY_NOT if _within(field, (name,))]
    why = WHY_NOT[max(reasons, key=len)] if reasons else "it decides what is trained"
    found = f"a change of {field} in a run that goes on; {why}"
    return Problem(f"--set {field}", found, f"one of {', '.join(MAY_CHANGE)}", "Leave it out, or start a new run with it.")


def _within(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)
