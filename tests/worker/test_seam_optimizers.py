"""Rates that fall by a metric, by epochs, or each for itself: after a stop and a crash, the weights of the undisturbed run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest

from probes import gan, mixed, plateau
from raymill.config.spec import JobSpec
from worker_harness import Attempt, Experiment, NewRun, stopped_and_killed, strict_at_other_numbers

PROBES: Mapping[str, Experiment] = {
    "by a metric": Experiment(mixed.Mixed, mixed.pipeline, plateau.BY_METRIC),
    "by epochs": Experiment(mixed.Mixed, mixed.pipeline, plateau.BY_EPOCH),
    "each its own": Experiment(gan.Points, gan.pipeline, plateau.EACH_ITS_OWN).with_values(loop={"global_batch_rows": 36}),
}


def rates(attempt: Attempt, name: str = "learning_rate") -> list[float]:
    """That of each step."""
    return [metrics[f"train/{name}"] for metrics in attempt.metrics("step")]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("probe", PROBES)
def test_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, probe: str, world_size: int) -> None:
    stopped_and_killed(new_run, PROBES[probe], world_size)


@pytest.mark.parametrize("probe", PROBES)
def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, probe: str) -> None:
    strict_at_other_numbers(new_run, PROBES[probe])


def test_a_rate_falls_when_the_metric_stands_still_and_rises_before(new_run: NewRun) -> None:
    attempt = new_run(PROBES["by a metric"]).go(2)
    found = rates(attempt)
    assert found[0] < found[1] < found[2] < found[3]
    factors = {round(after / before, 6) for before, after in pairwise(found[4:])}
    assert factors == {0.5, 1.0}
    fallen = [step for step, (before, after) in enumerate(pairwise(found), 1) if after < before]
    assert all(step % 2 == 0 or step == 5 for step in fallen), "behind evaluations, of every second step and of the epoch's end"


def test_a_rate_by_epochs_stays_within_an_epoch(new_run: NewRun) -> None:
    found = rates(new_run(PROBES["by epochs"]).go(2))
    epochs = [found[start : start + mixed.STEPS_PER_EPOCH] for start in range(0, len(found), mixed.STEPS_PER_EPOCH)]
    assert [sorted(set(epoch)) for epoch in epochs] == [[0.025], [0.05], [pytest.approx(0.005)]]


def test_each_objective_has_its_own(new_run: NewRun) -> None:
    attempt = new_run(PROBES["each its own"]).go(1)
    first = rates(attempt, "discriminator_learning_rate")
    assert first[1] == pytest.approx(0.9 * first[0])
    second = rates(attempt, "generator_learning_rate")
    assert second[0] == second[1] > second[-1]


def test_the_fields_of_all_schedules_are_known() -> None:
    spec = JobSpec.model_validate({"name": "job", "task": "-", "pipeline": "-", **plateau.EACH_ITS_OWN})
    assert [field for field, _ in spec.schedules()] == ["optimizer.discriminator.schedule", "optimizer.generator.0.schedule"]
