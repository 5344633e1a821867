"""Which splits of a job are measured when, and whether the metrics that decide something are measured there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from raymill.config.spec import EvaluationSpec, JobSpec
from raymill.data.order import num_batches
from raymill.errors import Problem, did_you_mean
from raymill.task import TRAIN

Where = Callable[[str], str]
"""Dotted field of the spec -> where the user wrote it."""


def every_steps(evaluation: EvaluationSpec, steps_per_epoch: int) -> int:
    """Optimizer steps between two evaluations; 0: there is only the one at the end."""
    return evaluation.every_steps or (evaluation.every_epochs or 0) * steps_per_epoch


def count(evaluation: EvaluationSpec, steps_per_epoch: int, total_steps: int) -> int:
    """How often a job makes an evaluation."""
    every = every_steps(evaluation, steps_per_epoch)
    return num_batches(total_steps, every) if every else 1


def described(evaluations: Collection[EvaluationSpec], split_rows: Mapping[str, int]) -> str:
    """The evaluations of a plan in words."""

    def one(evaluation: EvaluationSpec) -> str:
        rows = min(evaluation.rows or split_rows[evaluation.split], split_rows[evaluation.split])
        when = "at the end"
        if evaluation.every_steps:
            when = f"every {evaluation.every_steps} steps"
        elif evaluation.every_epochs:
            when = "each epoch" if evaluation.every_epochs == 1 else f"every {evaluation.every_epochs} epochs"
        return f"{evaluation.split}: {rows} rows {when}"

    return "; ".join(map(one, evaluations)) or "no split is evaluated"


def find_problems(spec: JobSpec, split_rows: Mapping[str, int], where: Where) -> list[Problem]:
    """Splits that there are not or that have too few rows, and metrics that would be asked for where nobody measures them.

    Args:
        split_rows: split -> its rows.
    """
    problems = []
    workers = spec.scale.max_num_workers
    evaluations = spec.evaluations(split_rows)
    for number, evaluation in enumerate(evaluations):
        split = evaluation.split
        if split not in split_rows:
            fix = did_you_mean(split, split_rows)
            problems.append(Problem(where(f"evaluate.{number}.split"), repr(split), "a split of the pipeline", fix))
        elif evaluation.rows is not None and evaluation.rows < workers:
            found = f"{evaluation.rows} rows for {workers} workers"
            fix = f"Raise it to {workers} at least."
            problems.append(Problem(where(f"evaluate.{number}.rows"), found, "at least one row per worker", fix))
    # A split that is not there is said once.
    asked = {TRAIN, *(evaluation.split for evaluation in evaluations if evaluation.split in split_rows)}
    for split in [split for split in split_rows if split in asked and split_rows[split] < workers]:
        found = f"{workers} workers for {split_rows[split]} {split} rows"
        fix = f"Use at most {split_rows[split]} workers."
        problems.append(Problem(where("scale.workers"), found, "at least one row per worker", fix))
    for field, metric, regularly in deciding_metrics(spec):
        problems += _metric_problems(field, metric, evaluations, split_rows, where, regularly=regularly)
    return problems


def deciding_metrics(spec: JobSpec) -> list[tuple[str, str, bool]]:
    """Each metric that decides something: its field, its name, and whether one at the end would come too late."""
    asked = [("checkpoint.metric", spec.checkpoint.metric, False)]
    if spec.loop.early_stopping:
        asked.append(("loop.early_stopping.metric", spec.loop.early_stopping.metric, True))
    asked += [(f"{field}.metric", schedule.metric, True) for field, schedule in spec.schedules()]
    if spec.search:
        asked.append(("search.metric", spec.search.metric, spec.search.scheduler.kind != "none"))
        asked += [(f"search.also.{metric}", metric, False) for metric in spec.search.also]
        asked += [(f"search.limits.{metric}", metric, False) for metric in spec.search.limits]
    return [(field, metric, regularly) for field, metric, regularly in asked if metric is not None]


def _metric_problems(
    field: str,
    metric: str,
    evaluations: Collection[EvaluationSpec],
    split_rows: Mapping[str, int],
    where: Where,
    *,
    regularly: bool,
) -> list[Problem]:
    measured = [evaluation for evaluation in evaluations if metric.startswith(f"{evaluation.split}/")]
    if not measured:
        splits = [evaluation.split for evaluation in evaluations if evaluation.split in split_rows]
        if not splits:
            found = f"{metric!r}, but the pipeline has no validation split, or evaluate is empty"
            fix = f"Give the pipeline a validation source, or set {field} to null."
            return [Problem(where(field), found, "a metric that is measured", fix)]
        expected = f"a metric of a split that is measured: {', '.join(splits)}"
        return [Problem(where(field), repr(metric), expected, f"Write {splits[0]}/ and a name that evaluate() gives.")]
    if regularly and not (measured[0].every_epochs or measured[0].every_steps):
        found = f"{metric!r}, which is measured at the end of the training only"
        fix = f"Give the evaluation of {measured[0].split} every_epochs or every_steps."
        return [Problem(where(field), found, "a metric that is measured again and again", fix)]
    return []
