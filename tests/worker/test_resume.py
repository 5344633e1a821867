"""A run that was stopped, once or often, at any step, goes on to the same weights over the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from probes import mixed
from raymill.checkpoint import directory
from raymill.checkpoint.snapshot import content, load, weights_sha256
from raymill.config.spec import PLATEAU, JobSpec
from raymill.optim.optimizers import make_optimizers
from raymill.parallel.ddp import DistributedObjective
from raymill.parallel.gradients import strategy_of
from raymill.task import Objective
from raymill.training.state import TrainState, capture, restore
from worker_harness import Crash, Experiment, NewRun

MIXED = Experiment(mixed.Mixed, mixed.pipeline, mixed.VALUES)
JOB_ROWS = 3 * mixed.TRAIN_ROWS


def positions(num_epochs: int) -> list[int]:
    """The position behind each step."""
    in_epoch = [min(k * mixed.GLOBAL_BATCH_ROWS, mixed.TRAIN_ROWS) for k in range(1, mixed.STEPS_PER_EPOCH + 1)]
    return [epoch * mixed.TRAIN_ROWS + place for epoch in range(num_epochs) for place in in_epoch]


# Steps after which a stop is asked for -> steps at which it happens: it is heard one step late, but never behind an epoch's
# end. The tail batch, which has fewer rows than there are ranks, is step 5 of each epoch.
STOPS = {
    "mid-epoch": ([2], [3]),
    "before the tail batch": ([3], [4]),
    "in the tail batch": ([4], [5]),
    "at the epoch's end": ([5], [5]),
    "again and again": ([1, 3, 4, 7, 12], [2, 4, 5, 8, 13]),
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(new_run: NewRun, world_size: int) -> None:
    whole = new_run(MIXED)
    expected = whole.go(world_size)
    assert expected.first.status == "finished"
    assert list(whole.batches) == positions(3)
    assert new_run(MIXED).go(world_size).sha256 == expected.sha256

    for name, (asked, happened) in STOPS.items():
        run = new_run(MIXED)
        for step, at in zip(asked, happened, strict=True):
            stopped = run.go(world_size, stop_after=step)
            assert (stopped.first.status, stopped.first.step) == ("interrupted", at), name
        found = run.go(world_size)
        assert found.sha256 == expected.sha256, name
        assert run.batches == whole.batches, name
        assert found.first.metrics == expected.first.metrics, name
        assert found.first.rows_used == expected.first.rows_used == JOB_ROWS, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_lost_in_a_crash_are_done_again_with_the_same_rows(new_run: NewRun, world_size: int) -> None:
    often = MIXED.with_values(checkpoint={"every_steps": 3})
    whole, crashed = new_run(often), new_run(often)
    expected = whole.go(world_size)
    with pytest.raises(Crash):
        crashed.go(world_size, crash_after=8)
    found = crashed.go(world_size)
    steps = [event["step"] for event in found.events if event["kind"] == "step"]
    # The save behind step 6 goes on while training does: whoever is killed then has it, or that of the epoch's end, step 5.
    assert steps in (list(range(7, 16)), list(range(6, 16)))
    assert found.sha256 == expected.sha256
    assert crashed.batches == whole.batches
    assert found.first.rows_used == JOB_ROWS


def test_another_number_of_ranks_goes_on_with_the_same_rows_in_each_step(new_run: NewRun) -> None:
    steady, changing = new_run(MIXED), new_run(MIXED)
    steady.go(2)
    changing.go(2, stop_after=3)
    changing.go(1, stop_after=8)
    assert changing.go(3).first.rows_used == JOB_ROWS
    assert changing.batches == steady.batches


def test_without_settled_buckets_three_ranks_would_not_resume_to_the_same_weights(new_run: NewRun) -> None:
    whole, resumed = new_run(MIXED), new_run(MIXED)
    expected = whole.go(3, warm_up=False).sha256
    resumed.go(3, stop_after=2, warm_up=False)
    assert resumed.go(3, warm_up=False).sha256 != expected


# ---------------------------------------------------------------- optimizers and schedules

OPTIMIZERS = [
    {"kind": "SGD", "lr": 0.1},
    {"kind": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"kind": "Adam", "lr": 0.01, "amsgrad": True},
    {"kind": "AdamW", "lr": 0.01, "weight_decay": 0.1},
    {"kind": "Adagrad", "lr": 0.1},
    {"kind": "RMSprop", "lr": 0.01, "momentum": 0.9, "centered": True},
    {"kind": "NAdam", "lr": 0.01},
]
GROUPS = [
    {"kind": "AdamW", "lr": 0.01, "weight_decay": 0.0, "parameters": ["*.bias", "1.*"]},
    {"kind": "SGD", "lr": 0.1, "momentum": 0.9, "parameters": ["2.*"], "from_step": 5},
    {"kind": "RMSprop", "lr": 0.01, "schedule": {"kind": "ExponentialLR", "gamma": 0.5}},
]
SCHEDULES = [
    {"kind": "CosineAnnealingLR"},
    {"kind": "CosineAnnealingLR", "warmup_steps": 3},
    {"kind": "OneCycleLR", "max_lr": 0.2},
    {"kind": "OneCycleLR", "max_lr": 0.2, "warmup_steps": 3},
    {"kind": "MultiStepLR", "milestones": [2, 7]},
    [{"kind": "ConstantLR", "steps": 7}, {"kind": "MultiStepLR", "milestones": [1, 3]}],
    [{"kind": "StepLR", "step_size": 2, "steps": 4, "warmup_steps": 2}, {"kind": "CosineAnnealingWarmRestarts", "T_0": 3}],
    {"kind": "StepLR", "step_size": 1, "per": "epoch"},
    [{"kind": "ConstantLR", "steps": 1, "per": "epoch"}, {"kind": "CosineAnnealingLR", "per": "epoch"}],
    {"kind": "ReduceLROnPlateau", "metric": "validation/loss", "patience": 1, "cooldown": 1, "warmup_steps": 5},
]
NUM_STEPS, STEPS_PER_EPOCH = 12, 4


def fresh(values: dict[str, object]) -> tuple[TrainState, JobSpec]:
    spec = JobSpec.model_validate({"name": "state", "task": "-", "pipeline": "-", **values})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    objective = Objective("loss", lambda network, batch: network(batch).square().mean())
    distributed = DistributedObjective(model, objective, "fp32", torch.device("cpu"), strategy_of(strict=False))
    return TrainState(
        model, [distributed], {"loss": make_optimizers(spec, distributed, ["loss"], NUM_STEPS, NUM_STEPS // STEPS_PER_EPOCH)}
    ), spec


def advance(state: TrainState, first: int, last: int) -> list[float]:
    rates = []
    groups = state.optimizers["loss"]
    for step in range(first, last):
        state.model.zero_grad()
        batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        torch.autograd.backward(state.objectives[0].loss(batch).loss)
        for group in groups:
            group.step(step)
            rates.append(group.learning_rate)
            group.schedule.advance(epoch_ended=step % STEPS_PER_EPOCH == STEPS_PER_EPOCH - 1)
            group.schedule.take_in({"validation/loss": abs(step - 4)})
    return rates


@pytest.mark.parametrize("stop", [0, 3, 6])
@pytest.mark.parametrize(
    "values",
    [
        *({"optimizer": optimizer, "schedule": SCHEDULES[1]} for optimizer in OPTIMIZERS),
        *({"optimizer": OPTIMIZERS[1], "schedule": schedule} for schedule in SCHEDULES),
        {"optimizer": GROUPS, "schedule": SCHEDULES[1]},
    ],
    ids=str,
)
def test_steps_before_and_after_a_restore_are_the_steps_without_one(tmp_path: Path, values: dict[str, object], stop: int) -> None:
    whole, _ = fresh(values)
    rates = advance(whole, 0, NUM_STEPS)
    num_groups = len(whole.optimizers["loss"])

    first, _ = fresh(values)
    assert advance(first, 0, stop) == rates[: stop * num_groups]
    directory.save(tmp_path, "step-00000001.1", content(capture(first, stop), best=False))
    second, _ = fresh(values)
    restore(second, load(tmp_path / "step-00000001.1"), stop, stop // STEPS_PER_EPOCH)
    assert advance(second, stop, NUM_STEPS) == rates[stop * num_groups :]
    assert weights_sha256(second.model.state_dict()) == weights_sha256(whole.model.state_dict())


@pytest.mark.parametrize("schedule", [one for one in SCHEDULES if PLATEAU not in str(one)], ids=str)
def test_without_rates_in_the_checkpoint_they_are_the_jobs_at_its_step(tmp_path: Path, schedule: object) -> None:
    values = {"optimizer": OPTIMIZERS[1], "schedule": schedule}
    whole, _ = fresh(values)
    rates = advance(whole, 0, NUM_STEPS)
    first, _ = fresh(values)
    advance(first, 0, 6)
    taken = capture(first, 6)
    second, _ = fresh(values)
    restore(second, replace(taken, record={**taken.record, "optimizer_groups": {}, "schedules": {}}), 6, 6 // STEPS_PER_EPOCH)
    assert advance(second, 6, NUM_STEPS) == rates[6:]
    assert weights_sha256(second.model.state_dict()) == weights_sha256(whole.model.state_dict())
