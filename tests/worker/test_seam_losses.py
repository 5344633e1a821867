"""What a loss is over: rows, what a batch weighs, or the features of the global batch; its parts; and models that are
changed behind a step. Each with the promise unbroken, as in `test_seams`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from probes import compressed, contrastive, mixed, packed, variational
from probes.one_step import Learned, OneStep, at_once, on_rank
from raymill.errors import InputError
from worker_harness import (
    Experiment,
    NewRun,
    RankPool,
    Start,
    run_rank,
    stopped_and_killed,
    strict_at_other_numbers,
)

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
    stopped_and_killed(new_run, PROBES[probe], world_size)


@pytest.mark.parametrize("probe", PROBES)
def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, probe: str) -> None:
    strict_at_other_numbers(new_run, PROBES[probe])


# ---------------------------------------------------------------- held against one process over the whole batch


def sentences() -> OneStep:
    """Windows of unlike numbers of words; the first two shards of ten have none."""
    rows = packed.make_rows(40, 3)
    words = {name: torch.from_numpy(np.asarray(column)[:17].copy()) for name, column in rows.items()}
    words["words"][:4] = 0
    words["sentence"][:4] = 0
    return OneStep(packed.NextWord, words)


def views() -> OneStep:
    rows = mixed.make_rows(17, 1)
    torch.manual_seed(5)
    return OneStep(contrastive.plain, contrastive.two_views(rows))


STEPS: Mapping[str, Callable[[], OneStep]] = {"weight": sentences, "features": views}


def assert_same(found: Learned, expected: Learned) -> None:
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert found.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        np.testing.assert_allclose(found.grads[name], grad, rtol=1e-4, atol=1e-6, err_msg=name)
    for name, buffer in expected.buffers.items():
        np.testing.assert_allclose(found.buffers[name], buffer, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("what", STEPS)
def test_a_step_is_that_of_one_process_over_the_whole_batch(pool: RankPool, what: str, strict: bool) -> None:
    step = STEPS[what]()
    expected = at_once(step)
    bits = set()
    for world_size, num_shards in [(1, 1), (1, 8), (2, 8), (3, 8), (4, 8), (3, 2)]:
        cut = OneStep(step.make_task, step.batch, num_shards, strict)
        ranks = pool.call(world_size, on_rank, cut)
        for found in ranks:
            assert_same(found, expected)
            assert all((found.grads[name] == grad).all() for name, grad in ranks[0].grads.items()), "ranks differ"
        if num_shards == 8:
            bits.add(b"".join(grad.tobytes() for grad in ranks[0].grads.values()))
    assert not strict or len(bits) == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_where_all_of_a_step_weighs_nothing_its_gradient_is_zero(pool: RankPool, world_size: int, strict: bool) -> None:
    step = sentences()
    empty = OneStep(step.make_task, {name: torch.zeros_like(column) for name, column in step.batch.items()}, 8, strict)
    for found in pool.call(world_size, on_rank, empty):
        assert found.metrics == {}
        assert found.grads
        assert all((grad == 0).all() for grad in found.grads.values())


# ---------------------------------------------------------------- parts


def test_parts_are_logged_as_the_loss_is_at_any_number_of_workers(new_run: NewRun) -> None:
    strict = {"strict": True, "gradient_accumulation_steps": 1, "shards": 6}
    probe = PROBES["a divergence that comes in slowly"].with_values(loop=strict)
    alone, three = (new_run(probe).go(world_size).metrics("step") for world_size in (1, 3))
    for one, other in zip(alone, three, strict=True):
        assert other == pytest.approx(one, rel=1e-9)
        whole = one["train/reconstruction"] + one["train/share"] * one["train/divergence"]
        assert one["train/loss"] == pytest.approx(whole, rel=1e-5)


class Fickle(mixed.Mixed):
    """Names a part in full batches only."""

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        loss = super().loss(model, batch)
        return {"loss": loss, "twice": 2 * loss} if len(batch["label"]) > 1 else {"loss": loss}


def test_a_loss_that_names_other_parts_in_another_step_is_refused(tmp_path: Path) -> None:
    experiment = Experiment(Fickle, mixed.pipeline, mixed.VALUES)
    with pytest.raises(InputError, match=r"parts \[\] where it gave \['twice'\] before") as caught:
        run_rank(0, 1, 0, experiment, Start(tmp_path, 1, None, None, warm_up=True))
    assert "test_seam_losses.py" in caught.value.problems[0].where
