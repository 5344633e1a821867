"""A loss over the features of a whole global batch, as a contrastive one is, which no rank holds by itself.

By the GradCache method (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021): the
features of all microbatches are computed without gradients and gathered; every rank computes the loss over all of them, and its
gradient with respect to them. With that the loss is linear in the features of a microbatch: they are computed once more, from the
same buffers and random numbers, and what they pass back is a mean over microbatches, as of any other loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from raymill.own_code.contracts import Measured, joined_features
from raymill.parallel.buffers import SavedBuffers
from raymill.parallel.ddp import DistributedObjective, Slopes
from raymill.parallel.microbatch import Microbatch, Seed
from raymill.parallel.process_group import all_gather_named, rank_and_world_size


@dataclass(frozen=True)
class GlobalLoss:
    """A loss over a global batch; what is left to do is the backward pass of each microbatch, and then `finish`.

    Attributes:
        measured: the loss, the same on all ranks.
        microbatches: this rank's, with the slopes of their features.
        own: parameters that the loss itself uses, such as a temperature, and its gradient with respect to each.
        changed: buffers that the loss itself changed, as it left them.
    """

    measured: Measured
    microbatches: Sequence[Microbatch]
    own: Sequence[tuple[nn.Parameter, torch.Tensor]]
    changed: SavedBuffers

    def finish(self) -> None:
        """Add what the loss itself did, once."""
        for parameter, grad in self.own:
            assert parameter.grad is not None
            parameter.grad += grad
        self.changed.restore()


def over_the_global_batch(
    distributed: DistributedObjective, microbatches: Sequence[Microbatch], rows: int, num_shards: int, seed: Seed
) -> GlobalLoss:
    """Compute an objective's loss over the features of all rows. Every rank takes part, with rows or without.

    Buffers are then as before, so that the second forward pass of a microbatch is the first again, and what it does to them, such
    as running statistics, is done once.

    Args:
        microbatches: this rank's shards, weighing their rows.
        rows: of the global batch.
        num_shards: of the global batch; also the number under which the loss itself is seeded.
        seed: seeds all generators for a shard.
    """
    buffers = SavedBuffers.of_rank_zero(distributed.model)
    features = []
    for microbatch in microbatches:
        if distributed.strategy.shards_apart:
            buffers.restore()
        seed(microbatch.shard)
        features.append(distributed.features(microbatch.batch))
    buffers.restore()
    objective, (rank, _) = distributed.objective, rank_and_world_size()
    ranks = all_gather_named(joined_features(objective, features) if features else {}, distributed.device)
    whole = joined_features(objective, [part for part in ranks if part])
    learned = [name for name, tensor in whole.items() if tensor.is_floating_point() or tensor.is_complex()]
    leaves = [whole[name].requires_grad_() for name in learned]
    seed(num_shards)
    versions = [buffer._version for buffer, _ in buffers.pairs]
    measured = distributed.loss_of_features(whole)
    touched = [buffer for (buffer, _), before in zip(buffers.pairs, versions, strict=True) if buffer._version != before]
    changed = SavedBuffers([(buffer, buffer.clone()) for buffer in touched])
    buffers.restore()
    grads = torch.autograd.grad(measured.loss, [*leaves, *distributed.parameters], allow_unused=True)
    slopes = {
        name: torch.zeros_like(leaf) if grad is None else grad for name, leaf, grad in zip(learned, leaves, grads, strict=False)
    }
    starts = {name: sum(len(part[name]) for part in ranks[:rank] if part) for name in slopes}
    return GlobalLoss(
        replace(measured, loss=measured.loss.detach()),
        _with_slopes(microbatches, features, slopes, starts, rows),
        _of_rank_zero(distributed.parameters, grads[len(leaves) :]),
        changed,
    )


def _with_slopes(
    microbatches: Sequence[Microbatch], features: Sequence[Slopes], slopes: Slopes, starts: dict[str, int], rows: int
) -> list[Microbatch]:
    """Microbatches with what is theirs of the slopes of all features; this rank's begin at `starts`."""
    found = []
    for microbatch, own in zip(microbatches, features, strict=True):
        ends = {name: start + len(own[name]) for name, start in starts.items()}
        # Its share of the rows is what a microbatch is weighed with.
        parts = {name: slope[starts[name] : ends[name]].double() * (rows / microbatch.weight) for name, slope in slopes.items()}
        found.append(replace(microbatch, slopes=parts))
        starts = ends
    return found


def _of_rank_zero(
    parameters: Sequence[nn.Parameter], grads: Sequence[torch.Tensor | None]
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Parameters that have a gradient, with rank 0's: the others' may be rounded otherwise, on another kind of processor."""
    known = [(parameter, grad) for parameter, grad in zip(parameters, grads, strict=True) if grad is not None]
    if dist.is_initialized():
        for _, grad in known:
            dist.broadcast(grad, 0)
    return known
