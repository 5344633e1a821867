"""What a loss is over: rows, what a batch weighs, or the features of the global batch; its parts; and models that are
changed behind a step. Each with the promise unbroken, as in `test_seams`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from probes import compressed, contrastive, mixed, packed, variational
from worker_harness import Experiment, TrainingRun, interrupted

NewRun = Callable[[Experiment], TrainingRun]

PROBES: Mapping[str, Experiment] = {
    "a divergence that comes in slowly": Experiment(variational.Autoencoder, mixed.pipeline, variational.VALUES),
    "packed sentences by their words": Experiment(packed.NextWord, packed.pipeline, packed.VALUES),
    "two views in the global batch": Experiment(contrastive.Views, contrastive.pipeline, contrastive.VALUES),
    "observers and rounding by phases": Experiment(compressed.Quantised, mixed.pipeline, compressed.VALUES),
    "masks that grow": Experiment(compressed.Pruned, mixed.pipeline, compressed.VALUES),
}


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
