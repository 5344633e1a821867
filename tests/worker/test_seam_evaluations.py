"""Evaluations of any split behind any step, conclusions from all rows, and ends of the training before its last step: after a
stop and a crash, the weights, the metrics and the pictures of the undisturbed run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric

from probes import detector, mixed, segment, translate
from raymill.checkpoint import directory
from raymill.checkpoint.snapshot import load
from raymill.errors import InputError
from raymill.task import Kept, Schema
from worker_harness import Attempt, Experiment, NewRun, TrainingRun, interrupted, stopped_and_killed, strict_at_other_numbers

SEGMENT = Experiment(segment.Masks, segment.pipeline, segment.VALUES)
PROBES: Mapping[str, Experiment] = {
    "segmentation with mIoU, three splits": SEGMENT,
    "seq2seq with fading teacher forcing and BLEU": Experiment(translate.Backwards, translate.pipeline, translate.VALUES),
    "detector with AP": Experiment(
        detector.Detector, detector.pipeline, {**detector.VALUES, "checkpoint": {"metric": "validation/ap50"}}
    ).with_values(loop={"global_batch_rows": 18}),
}


def measured(*attempts: Attempt) -> dict[tuple[int, str], dict[str, float]]:
    """(step, split) -> metrics. An evaluation that was made again must have come to the same."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for event in (event for attempt in attempts for event in attempt.events if event["kind"] == "evaluation"):
        assert found.setdefault((event["step"], event["split"]), event["metrics"]) == event["metrics"]
    return found


def pictures(run: TrainingRun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run.folder / "pictures").glob("*")}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("probe", PROBES)
def test_stopped_and_killed_it_ends_with_the_same_weights_metrics_and_pictures(
    new_run: NewRun, probe: str, world_size: int
) -> None:
    pair = stopped_and_killed(new_run, PROBES[probe], world_size, every_steps=2)
    assert measured(pair.found).items() <= measured(pair.expected).items()
    assert pictures(pair.run) == pictures(pair.whole)


class Measured(segment.Masks):
    """Asks a metric of torchmetrics, which would gather from all ranks by itself."""

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        metric = MeanMetric()
        metric.update(totals["pixels"].double().diagonal())
        return {**super().conclude(kept, totals), "right": metric.compute()}


def test_a_metric_that_would_gather_by_itself_is_asked_on_one_rank(new_run: NewRun) -> None:
    attempt = new_run(Experiment(Measured, segment.pipeline, segment.VALUES)).go(2)
    event = next(event for event in attempt.events if event["kind"] == "evaluation" and event["split"] == "night")
    pixels = torch.tensor(event["totals"]["night/pixels"], dtype=torch.float64)
    assert event["metrics"]["night/right"] == pytest.approx(float(pixels.diagonal().mean()))


@pytest.mark.parametrize("probe", PROBES)
def test_strict_it_comes_to_the_same_at_any_number_of_workers(new_run: NewRun, probe: str) -> None:
    pair = strict_at_other_numbers(new_run, PROBES[probe], every_steps=2)
    assert pair.found.first.metrics == pytest.approx(pair.expected.first.metrics, rel=1e-12)


def test_each_split_is_measured_when_it_is_due_over_the_rows_that_were_asked_for(new_run: NewRun) -> None:
    attempt = new_run(SEGMENT).go(2)
    assert [(event["step"], event["split"], event["rows"]) for event in attempt.events if event["kind"] == "evaluation"] == [
        (3, "validation", 11),
        (6, "validation", 11),
        (7, "night", 9),
        (9, "validation", 11),
        (12, "validation", 11),
        (13, "validation", 11),
        (13, "night", 9),
        (13, "test", 17),
    ]
    assert (attempt.first.status, attempt.first.step, attempt.first.position) == ("finished", 13, 80 + 6 * 12)
    assert {"validation/iou", "night/iou", "test/iou", "test/loss"} <= attempt.first.metrics.keys()
    best = [event["step"] for event in attempt.events if event["kind"] == "checkpoint" and event["best"]]
    scores = {step: metrics["validation/iou"] for (step, split), metrics in measured(attempt).items() if split == "validation"}
    assert best == [step for step in scores if scores[step] > max((scores[one] for one in scores if one < step), default=-1)]


def test_a_crash_within_an_evaluation_goes_on_with_that_evaluation(new_run: NewRun) -> None:
    whole, run = new_run(SEGMENT), new_run(SEGMENT)
    expected = whole.go(2)
    stopped = run.go(2, stop_after=6)
    assert (stopped.first.status, stopped.first.step) == ("interrupted", 6)
    state = directory.read_state(run.folder / "checkpoints" / str(directory.find_latest(run.folder / "checkpoints", print)))
    assert (state["step"], state["evaluated"]) == (6, False), "stopped before what is due there"
    last = run.go(2)
    assert next(event["step"] for event in last.events if event["kind"] == "evaluation") == 6
    assert last.sha256 == expected.sha256
    assert measured(stopped, last) == measured(expected)


# ---------------------------------------------------------------- conclusions


def test_what_is_kept_comes_to_one_rank_in_the_order_of_the_split(new_run: NewRun) -> None:
    rows = mixed.make_rows(mixed.VALIDATION_ROWS, 2)
    expected = float((torch.arange(mixed.VALIDATION_ROWS) * torch.from_numpy(rows["label"])).sum())
    for world_size in (1, 2, 3):
        attempt = new_run(Experiment(Ordered, mixed.pipeline, mixed.VALUES).with_values(loop={"epochs": 1})).go(world_size)
        assert attempt.first.metrics["validation/rank_sum"] == expected


class Ordered(mixed.Mixed):
    """Concludes what depends on the order of the rows."""

    def evaluate(self, model: torch.nn.Module, batch: Any) -> dict[str, Any]:
        return {**super().evaluate(model, batch), "label": Kept(batch["label"])}

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        return {"rank_sum": (torch.arange(len(kept["label"])) * kept["label"]).sum()}


class Twice(Ordered):
    """Gives a mean and a conclusion one name."""

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        return {"loss": 1.0}


class NoPicture(Ordered):
    """Draws what is none."""

    def pictures(self, model: torch.nn.Module, now: Any) -> Mapping[str, Any]:
        return {"noise": torch.zeros(3, 4, 4)}


@pytest.mark.parametrize(("task", "found"), [(Twice, r"\['loss'\], which evaluate\(\) gives too"), (NoPicture, "pictures")])
def test_conclusions_that_are_none_are_refused(new_run: NewRun, task: Callable[[Schema], Any], found: str) -> None:
    with pytest.raises(InputError, match=found):
        new_run(Experiment(task, mixed.pipeline, mixed.VALUES).with_values(loop={"epochs": 1})).go(1)


# ---------------------------------------------------------------- ends


STOPPING = SEGMENT.with_values(
    loop={"steps": 60, "early_stopping": {"metric": "validation/loss", "mode": "min", "patience": 2, "min_delta": 0.15}}
)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_early_stopping_ends_where_it_would_have_without_a_stop_or_a_crash(new_run: NewRun, world_size: int) -> None:
    whole, run = new_run(STOPPING), new_run(STOPPING.with_values(checkpoint={"every_steps": 2}))
    expected = whole.go(world_size)
    assert expected.first.status == "finished"
    assert expected.first.ended is not None
    assert "validation/loss has not improved by more than 0.15 in 2 evaluations" in expected.first.ended
    last = expected.first.step
    assert 6 < last < 60
    losses = [metrics["validation/loss"] for (_, split), metrics in measured(expected).items() if split == "validation"]
    best, worse = losses[0], []
    for loss in losses[1:]:
        worse = [] if loss < best - 0.15 else [*worse, loss]
        best = best if worse else loss
        assert len(worse) < 2 or loss == losses[-1]
    assert len(worse) == 2
    assert (last, "test") in measured(expected), "what is measured at the end is measured at this end"
    found = interrupted(run, world_size, world_size, world_size)
    assert (found.first.step, found.sha256, found.first.metrics) == (last, expected.sha256, expected.first.metrics)


def test_a_run_that_ended_early_stays_ended_and_evaluates_what_is_left(new_run: NewRun) -> None:
    whole, run = new_run(STOPPING), new_run(STOPPING)
    expected = whole.go(2)
    stopped = run.go(2, stop_after=expected.first.step)
    assert stopped.first.status == "interrupted"
    last = run.go(2)
    assert (last.first.status, last.first.ended) == ("finished", expected.first.ended)
    assert [event["kind"] for event in last.events if event["kind"] == "step"] == []
    assert measured(stopped, last) == measured(expected)
    again = run.go(2)
    assert (again.first.status, again.sha256) == ("finished", expected.sha256)
    assert [event for event in again.events if event["kind"] in ("step", "evaluation")] == []


def test_hours_count_the_work_of_all_attempts(new_run: NewRun) -> None:
    run = new_run(SEGMENT.with_values(loop={"steps": 100_000, "max_hours": 3 / 3600}))
    folder = run.folder / "checkpoints"

    def worked_s() -> float:
        return float(load(folder / str(directory.find_latest(folder, print))).record["worked_s"])

    assert run.go(1, stop_after=1).first.status == "interrupted"
    before_s = worked_s()
    began_s = time.perf_counter()
    last = run.go(1)
    lasted_s = time.perf_counter() - began_s
    assert last.first.ended == "the 0.000833333 hours of loop.max_hours are over"
    assert 0 < before_s < 3 <= worked_s() < before_s + lasted_s
    assert {"validation/iou", "night/iou", "test/iou"} <= last.first.metrics.keys()
