"""fp16 with a scale for the loss, which is state: bit-equal after a stop and a crash, and an overflow costs a step and no run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probes import mixed
from raymill.errors import NumberError
from raymill.parallel.precision import FIRST_SCALE, GROWTH_STEPS, LossScale
from worker_harness import Experiment, NewRun, stopped_and_killed, strict_at_other_numbers

HALF = Experiment(mixed.Mixed, mixed.pipeline, mixed.VALUES).with_values(loop={"precision": "fp16"})


class Steep(mixed.Mixed):
    """Its gradients are so large that they become infinite with the first scales."""

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) * 30


def scales(attempt: Any) -> list[float]:
    return [metrics["train/loss_scale"] for metrics in attempt.metrics("step")]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, world_size: int) -> None:
    steep = Experiment(Steep, mixed.pipeline, HALF.values)
    pair = stopped_and_killed(new_run, steep, world_size)
    found = scales(pair.expected)
    assert found[0] == FIRST_SCALE
    assert min(found) < FIRST_SCALE, "there was an overflow"
    assert "train/loss" not in pair.expected.metrics("step")[0]
    assert any("train/gradient_norm" in metrics for metrics in pair.expected.metrics("step"))


def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun) -> None:
    strict_at_other_numbers(new_run, HALF)


def test_an_overflow_changes_no_weight_and_the_step_after_it_is_that_of_a_smaller_scale(new_run: NewRun) -> None:
    run = new_run(Experiment(Steep, mixed.pipeline, HALF.values))
    events = run.go(1, stop_after=6).metrics("step")
    lost = [metrics for metrics in events if "train/gradient_norm" not in metrics]
    assert lost
    assert not [event for event in run.go(1).events if event["kind"] == "step_refused"]


def test_what_is_not_a_number_at_any_scale_is_refused(new_run: NewRun) -> None:
    run = new_run(Experiment(NaN, mixed.pipeline, HALF.values).with_values(loop={"epochs": 20}))
    with pytest.raises(NumberError, match="Its step was not taken"):
        run.go(1)


class NaN(mixed.Mixed):
    """Its loss never is a number."""

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) * float("nan")


def test_the_scale_grows_after_many_good_steps_and_is_halved_by_a_bad_one() -> None:
    scale = LossScale.of("fp16")
    for _ in range(GROWTH_STEPS):
        scale = scale.behind(finite=True)
    assert scale == LossScale(FIRST_SCALE * 2)
    assert scale.behind(finite=True).behind(finite=False) == LossScale(FIRST_SCALE)
    assert LossScale.of("bf16") == LossScale.of("fp32") == LossScale(1.0)
