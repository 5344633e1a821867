"""The shards of a global batch that a rank owns, and how much each counts in the loss of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from raymill.own_code import contracts
from raymill.task import Batch, Objective

Seed = Callable[[int], None]
"""Seeds all generators for a shard."""


@dataclass(frozen=True)
class Microbatch:
    """One shard of a global batch that this rank owns.

    Attributes:
        shard: its number.
        count: its rows; not 0.
        batch: the rows, on the device.
        weight: how much it counts in the mean over the global batch: its rows, unless the objective weighs batches; not 0.
        slopes: where the loss is over the features of the global batch, its gradient with respect to those of this shard, times
            the weight of all and divided by this one: so that the step's gradient is a mean over microbatches as any other.
    """

    shard: int
    count: int
    batch: Batch
    weight: float
    slopes: Mapping[str, torch.Tensor] | None = None


def weighed(objective: Objective, microbatches: Sequence[Microbatch], num_shards: int) -> tuple[list[Microbatch], float]:
    """The microbatches of an objective that weighs batches, without those that weigh nothing, and what all ranks' weigh.

    Each shard's weight has a place of its own in what ranks exchange, and they are added in the order of shards: so the sum is
    the same to the bit at any number of ranks, also where weights are no whole numbers.
    """
    own = [replace(one, weight=contracts.weight(objective, one.batch)) for one in microbatches]
    weights = torch.zeros(num_shards, dtype=torch.float64)
    for one in own:
        weights[one.shard] = one.weight
    if dist.is_initialized():
        dist.all_reduce(weights)
    return [one for one in own if one.weight], sum(weights.tolist())
