"""The loop in real ranks: the same batches, gradients and metrics whatever their number, and nothing bad is saved."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from probes import mixed
from raymill.checkpoint import directory
from raymill.checkpoint.snapshot import Snapshot, load
from raymill.errors import InputError, NumberError, RunError
from raymill.task import Total
from worker_harness import Attempt, Experiment, NewRun, TrainingRun

MIXED = Experiment(mixed.Mixed, mixed.pipeline, mixed.VALUES)
PLAIN = Experiment(mixed.plain, mixed.pipeline, {**mixed.VALUES, "optimizer": {"kind": "SGD", "lr": 0.5}}).with_values(
    loop={"epochs": 1}
)


def latest(run: TrainingRun) -> Snapshot:
    name = directory.find_latest(run.folder / "checkpoints", print)
    assert name is not None
    return load(run.folder / "checkpoints" / name)


def totals(attempt: Attempt) -> list[dict[str, Any]]:
    return [event["totals"] for event in attempt.events if event["kind"] == "evaluation"]


def test_losses_gradients_and_weights_are_those_of_one_process_over_the_whole_batch(new_run: NewRun) -> None:
    reference = new_run(PLAIN.with_values(loop={"gradient_accumulation_steps": 1}))
    expected = reference.go(1).metrics("step")
    assert len(expected) == mixed.STEPS_PER_EPOCH
    weights = latest(reference).weights
    for world_size, gradient_accumulation_steps in [(2, 1), (3, 1), (4, 1), (1, 3), (2, 2), (3, 4)]:
        # The last step has 2 rows: fewer than ranks, and than backward passes.
        run = new_run(PLAIN.with_values(loop={"gradient_accumulation_steps": gradient_accumulation_steps}))
        attempt = run.go(world_size)
        for step, values in zip(attempt.metrics("step"), expected, strict=True):
            assert step == pytest.approx(values, rel=1e-5)
        assert run.batches == reference.batches
        assert attempt.first.rows_used == mixed.TRAIN_ROWS
        torch.testing.assert_close(latest(run).weights, weights, rtol=1e-5, atol=1e-6)


def test_evaluation_counts_every_row_once_at_any_number_of_ranks(new_run: NewRun) -> None:
    frozen = PLAIN.with_values(optimizer={"lr": 0.0})
    alone, *others = [new_run(frozen).go(world_size) for world_size in (1, 2, 3, 4)]
    [confusion] = totals(alone)
    assert torch.tensor(confusion["validation/confusion"]).sum() == mixed.VALIDATION_ROWS
    for other in others:
        assert totals(other) == totals(alone)
        assert other.first.metrics["validation/accuracy"] == alone.first.metrics["validation/accuracy"]
        assert other.first.metrics == pytest.approx(alone.first.metrics, rel=1e-6)


def test_what_is_evaluated_is_the_model_that_is_saved_running_statistics_included(new_run: NewRun) -> None:
    run = new_run(MIXED.with_values(loop={"epochs": 1}))
    found = totals(run.go(3))[0]["validation/confusion"]
    task = mixed.Mixed(mixed.SCHEMA)
    model = task.build()
    model.load_state_dict(latest(run).weights)
    rows = mixed.make_rows(mixed.VALIDATION_ROWS, 2)
    batch = {name: torch.from_numpy(column) for name, column in rows.items()}
    confusion = task.evaluate(model.eval(), batch)["confusion"]
    assert isinstance(confusion, Total)
    assert confusion.value.tolist() == found


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gradient_that_is_not_a_number_stops_the_run_before_the_weights_change(new_run: NewRun, world_size: int) -> None:
    run = new_run(Experiment(mixed.Mixed, mixed.pipeline_with_nan, {**mixed.VALUES, "checkpoint": {"every_steps": 1}}))
    with pytest.raises(NumberError, match=r"step \d+ \(epoch 0, batch \d+\)") as caught:
        run.go(world_size)
    broken = next(number for number, rows in enumerate(run.batches.values(), 1) if 60 in rows)
    assert f"step {broken} " in str(caught.value)
    rows = list(run.batches.values())[broken - 1]
    said = re.search(
        r"Rows of the batch: (\d+), the first of them \[([\d, ]+)\]; the run's events have them all", str(caught.value)
    )
    assert said is not None
    assert int(said[1]) == len(rows) > 5
    shown = [int(row) for row in said[2].split(", ")]
    assert len(shown) == 5
    assert {*shown} <= {*rows}
    saved = latest(run)
    assert saved.record["step"] == broken - 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.weights.values())


def test_weights_that_are_not_numbers_are_never_saved(new_run: NewRun) -> None:
    run = new_run(
        Experiment(
            mixed.loud,
            mixed.pipeline,
            {"optimizer": {"kind": "SGD", "lr": 1e38}, "loop": {"global_batch_rows": 24}, "checkpoint": {"every_steps": 1}},
        )
    )
    with pytest.raises(NumberError, match="were not saved"):
        run.go(2)
    assert directory.names(run.folder / "checkpoints") == []


def test_checkpoints_come_every_so_many_steps_and_at_each_epochs_end(new_run: NewRun) -> None:
    attempt = new_run(MIXED.with_values(checkpoint={"every_steps": 3, "keep": 1})).go(2)
    saved = [event for event in attempt.events if event["kind"] == "checkpoint"]
    assert [event["step"] for event in saved] == [3, 5, 5, 6, 9, 10, 10, 12, 15, 15]
    assert {event["step"] for event in saved if event["best"]} <= {5, 10, 15}


def test_steps_are_reported_once_and_in_order(new_run: NewRun) -> None:
    attempt = new_run(MIXED).go(2)
    events = attempt.events
    steps = [event["step"] for event in events if event["kind"] == "step"]
    assert steps == list(range(1, 16))
    assert [event["step"] for event in events if event["kind"] == "evaluation"] == [5, 10, 15]
    assert all(event["rows"] == mixed.VALIDATION_ROWS for event in events if event["kind"] == "evaluation")
    rates = [values["train/learning_rate"] for values in attempt.metrics("step")]
    assert rates[:4] == sorted(rates[:4])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_checkpoint_metric_that_nobody_measures_is_named_with_those_there_are(new_run: NewRun) -> None:
    run = new_run(MIXED.with_values(checkpoint={"metric": "validation/acuracy"}))
    with pytest.raises(RunError, match=r"validation/accuracy"):
        run.go(1)


def test_a_job_without_validation_trains(new_run: NewRun) -> None:
    experiment = Experiment(mixed.Mixed, partial(mixed.pipeline, validation_rows=0), {**mixed.VALUES, "checkpoint": {}})
    attempt = new_run(experiment).go(3)
    assert attempt.sha256
    assert attempt.first.metrics == {}


def test_optimizers_that_are_not_the_objectives_are_refused(new_run: NewRun) -> None:
    sgd = {"kind": "SGD", "lr": 0.1}
    run = new_run(Experiment(mixed.Mixed, mixed.pipeline, {**mixed.VALUES, "optimizer": {"head": sgd, "body": sgd}}))
    with pytest.raises(InputError, match=r"one for each objective of the task: \['loss'\]"):
        run.go(1)


def test_the_record_of_the_order_is_written_by_every_rank(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(MIXED.with_values(loop={"epochs": 1}))
    run.go(3)
    rows = [row for batch in run.batches.values() for row in batch]
    assert sorted(rows) == list(range(mixed.TRAIN_ROWS))
    assert [len(batch) for batch in run.batches.values()] == [24, 24, 24, 24, 2]
