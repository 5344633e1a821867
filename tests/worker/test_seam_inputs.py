"""A teacher beside the model, and weights that a run begins with: bit-equal after a stop and a crash."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from probes import distilled
from raymill.checkpoint.directory import WEIGHTS, read_state
from raymill.config.spec import InitFromSpec
from raymill.orchestration.given import Start, lay_down
from raymill.record.folder import RunFolder
from raymill.task import Schema, Task
from raymill.trained.model import Trained
from worker_harness import Experiment, NewRun, TrainingRun, stopped_and_killed, strict_at_other_numbers


def teaches(schema: Schema) -> Task:
    return distilled.Teaches()


def learns(schema: Schema, teacher: TeacherAt) -> Task:
    return distilled.Learns({"teacher": teacher})


@dataclass(frozen=True)
class TeacherAt:
    """As `Trained`, for a task that no project holds."""

    checkpoint: Path

    def load_model(self) -> nn.Module:
        model = distilled.Teaches().build()
        model.load_state_dict(load_file(self.checkpoint / WEIGHTS))
        return model.eval().requires_grad_(False)


TEACHING = Experiment(teaches, distilled.pipeline, distilled.VALUES)


def newest(run: TrainingRun) -> Path:
    folder = run.folder / "checkpoints"
    return folder / str(json.loads((folder / "latest.json").read_text())["latest"])


def trained(run: TrainingRun) -> Trained:
    spec = run.experiment.spec(1)
    sha256 = read_state(newest(run))["weights_sha256"]
    return Trained(run.folder.name, run.folder.name, newest(run) / WEIGHTS, sha256, spec, None, run.folder)  # type: ignore[arg-type]


def begin(run: TrainingRun, source: TrainingRun, **given: str) -> None:
    step = 0 if given.get("take", "weights") == "weights" else read_state(newest(source))["step"]
    lay_down(RunFolder(run.folder), Start(trained(source), InitFromSpec(model="-", **given), step))  # type: ignore[arg-type]


@pytest.fixture
def teacher(new_run: NewRun) -> TrainingRun:
    run = new_run(TEACHING)
    run.go(1)
    return run


@pytest.fixture
def learning(teacher: TrainingRun) -> Experiment:
    return Experiment(partial(learns, teacher=TeacherAt(newest(teacher))), distilled.pipeline, distilled.VALUES)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_learns_from_a_teacher_ends_with_the_same_weights(new_run: NewRun, learning: Experiment, world_size: int) -> None:
    pair = stopped_and_killed(new_run, learning, world_size)
    assert pair.expected.metrics("evaluation")[-1]["validation/accuracy"] > 0.8, "nobody told it a label"
    assert sorted(load_file(newest(pair.whole) / WEIGHTS)) == ["bias", "weight"], "the teacher is in no checkpoint"
    assert not [event for event in pair.expected.events if event["kind"] == "task_changed"]


def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, learning: Experiment) -> None:
    strict_at_other_numbers(new_run, learning)


# ---------------------------------------------------------------- what a run begins with


def test_it_begins_with_the_weights_of_another_run(new_run: NewRun, teacher: TrainingRun) -> None:
    still = new_run(TEACHING.with_values(optimizer={"lr": 0.0, "momentum": 0.0}, loop={"steps": 1, "epochs": 1, "seed": 9}))
    begin(still, teacher)
    still.go(1)
    expected, found = (load_file(newest(run) / WEIGHTS) for run in (teacher, still))
    parameters = [name for name in expected if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(found[name], expected[name]) for name in parameters)


@pytest.mark.parametrize("average", [None, {"kind": "ema", "decay": 0.9}], ids=["plain", "ema"])
@pytest.mark.parametrize("take", ["weights", "all"])
def test_begun_so_and_killed_it_ends_with_the_same_weights(
    new_run: NewRun, teacher: TrainingRun, take: str, average: object
) -> None:
    longer = TEACHING.with_values(loop={"epochs": 5, "average": average})
    whole, run = new_run(longer), new_run(longer.with_values(checkpoint={"every_steps": 3}))
    for one in (whole, run):
        begin(one, teacher, take=take)
    expected = whole.go(2)
    run.go(2, stop_after=55)
    assert run.go(2).sha256 == expected.sha256
    assert run.batches == whole.batches
    assert min(whole.batches) == (12 if take == "weights" else 612), "behind the first step, or behind three epochs of 200 rows"


def test_to_go_on_with_all_is_to_have_trained_on(new_run: NewRun, teacher: TrainingRun) -> None:
    longer = TEACHING.with_values(loop={"epochs": 5})
    whole, on = new_run(longer), new_run(longer)
    begin(on, teacher, take="all", hyperparameters="checkpoint")
    assert on.go(1).sha256 == whole.go(1).sha256


@pytest.mark.parametrize("given", ["job", "checkpoint"])
def test_whose_rate_counts_is_the_jobs_choice(new_run: NewRun, teacher: TrainingRun, given: str) -> None:
    slower = TEACHING.with_values(loop={"epochs": 4}, optimizer={"lr": 0.01})
    run = new_run(slower)
    begin(run, teacher, take="all", hyperparameters=given)
    rates = {metrics["train/learning_rate"] for metrics in run.go(1).metrics("step")}
    assert rates == {0.01 if given == "job" else 0.2}


def test_weights_that_were_averaged_are_gone_on_with_as_they_were_trained(new_run: NewRun) -> None:
    averaged = TEACHING.with_values(loop={"average": {"kind": "swa"}})
    plain, source, on = (
        new_run(TEACHING.with_values(loop={"epochs": 4})),
        new_run(averaged),
        new_run(TEACHING.with_values(loop={"epochs": 4})),
    )
    source.go(1)
    begin(on, source, take="all", hyperparameters="checkpoint")
    assert on.go(1).sha256 == plain.go(1).sha256
