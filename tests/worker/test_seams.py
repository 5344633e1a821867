"""What a job's own code may do through the seams, each with the promise unbroken: after a stop and a crash the weights of the
undisturbed run, to the bit, at one, two and three workers; and under `strict` the same weights at any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from probes import masked
from worker_harness import Attempt, Crash, Experiment, TrainingRun

NewRun = Callable[[Experiment], TrainingRun]

PROBES: Mapping[str, Experiment] = {
    "masks drawn in collate": Experiment(masked.FillIn, masked.pipeline, masked.VALUES),
}


def interrupted(run: TrainingRun, *world_sizes: int) -> Attempt:
    """Stop after a step, crash some steps after the last save, and train to the end; at these numbers of workers."""
    run.go(world_sizes[0], stop_after=1)
    with pytest.raises(Crash):
        run.go(world_sizes[1], crash_after=7)
    return run.go(world_sizes[2])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("probe", PROBES)
def test_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, probe: str, world_size: int) -> None:
    whole, run = new_run(PROBES[probe]), new_run(PROBES[probe].with_values(checkpoint={"every_steps": 3}))
    expected = whole.go(world_size)
    found = interrupted(run, world_size, world_size, world_size)
    assert found.sha256 == expected.sha256
    assert found.first.metrics == expected.first.metrics
    assert run.batches == whole.batches


@pytest.mark.parametrize("probe", PROBES)
def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, probe: str) -> None:
    strict = PROBES[probe].with_values(loop={"strict": True, "gradient_accumulation_steps": 1, "shards": 6})
    expected = new_run(strict).go(2)
    found = interrupted(new_run(strict.with_values(checkpoint={"every_steps": 3})), 1, 3, 2)
    assert found.sha256 == expected.sha256
