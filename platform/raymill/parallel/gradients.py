"""One optimizer step of one objective: gradients of the global batch, checked, clipped, applied.

The gradient is computed in one of two ways. Averaged by DistributedDataParallel, which is fast, and the same to the bit at
the same number of workers. Or in order (`loop.strict`): the batch is cut into a fixed number of shards, each shard's gradient
is computed by itself, and all are added up in the order of their numbers, whichever ranks they were computed on, so that the
sum is the same to the bit at any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raymill.parallel.ddp import DistributedObjective
from raymill.parallel.process_group import broadcast_buffers, rank_and_world_size
from raymill.task import Batch

Seed = Callable[[int], None]
"""Seeds all generators for a shard."""


@dataclass(frozen=True)
class Microbatch:
    """One shard of a global batch that this rank owns.

    Attributes:
        shard: its number.
        count: its rows; not 0.
        batch: the rows, on the device.
    """

    shard: int
    count: int
    batch: Batch


def averaged_gradients(
    distributed: DistributedObjective, microbatches: Sequence[Microbatch], rows: int, seed: Seed
) -> torch.Tensor:
    """Leave the gradient of the mean loss over `rows` rows on the parameters.

    A parameter that no loss of the step used gets zeros, as DDP makes it, at any number of ranks.

    Returns:
        this rank's sum of losses, a scalar in float64, on the device.
    """
    _, world_size = rank_and_world_size()
    loss_sum = torch.zeros((), dtype=torch.float64, device=distributed.device)
    if not microbatches:
        torch.autograd.backward(distributed.loss(None))
    for number, microbatch in enumerate(microbatches):
        seed(microbatch.shard)
        with distributed.accumulating(last=number == len(microbatches) - 1):
            loss = distributed.loss(microbatch.batch)
            # DDP averages over ranks; this makes it the mean over the rows of the global batch.
            torch.autograd.backward(loss * (microbatch.count * world_size / rows))
        loss_sum += loss.detach().double() * microbatch.count
    for parameter in distributed.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return loss_sum


def ordered_gradients(
    distributed: DistributedObjective, microbatches: Sequence[Microbatch], rows: int, seed: Seed
) -> torch.Tensor:
    """As `averaged_gradients`, but the same to the bit for any number of ranks.

    Every shard starts from the same buffers. Afterwards a buffer that no shard changed is as it was, to the bit. Of one that some
    shard changed, running statistics (floating point, complex) are the mean over the shards, weighted by rows, added up in the
    same order as the gradients; anything else, such as a counter, is as the last shard left it.
    """
    buffers = [(buffer, buffer.clone()) for buffer in distributed.model.buffers()]
    own: list[torch.Tensor] = []
    loss_sum = torch.zeros((), dtype=torch.float64, device=distributed.device)
    rank, world_size = rank_and_world_size()
    for microbatch in microbatches:
        _restore(buffers)
        seed(microbatch.shard)
        loss = distributed.loss(microbatch.batch)
        share = microbatch.count / rows
        grads = torch.autograd.grad(loss * share, distributed.parameters, allow_unused=True)
        known = [torch.zeros_like(p) if g is None else g for p, g in zip(distributed.parameters, grads, strict=True)]
        changed = torch.stack([(_bits(now) != _bits(before)).any() for now, before in buffers]) if buffers else loss.new_zeros(0)
        # How many shards changed each buffer, and how many shards each rank had, travel with the sums.
        counts = [changed.to(loss.dtype), loss.new_tensor([float(other == rank) for other in range(world_size)])]
        own.append(
            torch.cat([*(g.reshape(-1) for g in known), *(_reals(now) * share for now, _ in buffers if _is_mean(now)), *counts])
        )
        loss_sum += loss.detach().double() * microbatch.count
    size = sum(p.numel() for p in distributed.parameters) + sum(_reals(b).numel() for b, _ in buffers if _is_mean(b))
    summed = add_in_order(own, size + len(buffers) + world_size, distributed.device)
    start = 0
    for parameter in distributed.parameters:
        parameter.grad = summed[start : start + parameter.numel()].view_as(parameter).clone()
        start += parameter.numel()
    _settle_buffers(buffers, summed[start:size], summed[size:].tolist())
    return loss_sum


def _settle_buffers(buffers: Sequence[tuple[torch.Tensor, torch.Tensor]], means: torch.Tensor, counts: Sequence[float]) -> None:
    """Give each buffer its value after a step, from the means and the counts of `ordered_gradients`; all ranks know the same."""
    last_rank = max(rank for rank, num_shards in enumerate(counts[len(buffers) :]) if num_shards)
    start = 0
    with torch.no_grad():
        for (buffer, before), num_changes in zip(buffers, counts, strict=False):
            mean = means[start : start + _reals(buffer).numel()] if _is_mean(buffer) else None
            start += 0 if mean is None else mean.numel()
            if not num_changes:
                buffer.copy_(before)
            elif mean is not None and buffer.is_complex():
                buffer.copy_(torch.view_as_complex(mean.view(*buffer.shape, 2)))
            elif mean is not None:
                buffer.copy_(mean.view_as(buffer))
            elif dist.is_initialized():
                dist.broadcast(buffer, last_rank)


def _is_mean(buffer: torch.Tensor) -> bool:
    return buffer.is_floating_point() or buffer.is_complex()


def _reals(buffer: torch.Tensor) -> torch.Tensor:
    """A floating-point or complex buffer as real numbers in a row."""
    return (torch.view_as_real(buffer) if buffer.is_complex() else buffer).reshape(-1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN equals itself there, and zero is not minus zero."""
    return tensor.reshape(-1).view(torch.uint8)


def _restore(pairs: Any) -> None:
    with torch.no_grad():
        for buffer, before in pairs:
            buffer.copy_(before)


def add_in_order(own: Sequence[torch.Tensor], size: int, device: torch.device) -> torch.Tensor:
    """The sum of all ranks' vectors [size], added one after the other in the order of ranks, and of each rank's own.

    The running sum travels from rank to rank and then back to all: W - 1 messages in a chain. The order of the additions,
    and so each rounding, does not depend on where the vectors were.
    """
    rank, world_size = rank_and_world_size()
    running = torch.zeros(size, device=device)
    if rank > 0:
        dist.recv(running, src=rank - 1)
    for vector in own:
        running += vector
    if rank < world_size - 1:
        dist.send(running, dst=rank + 1)
    if world_size > 1:
        dist.broadcast(running, src=world_size - 1)
    return running


@dataclass(frozen=True)
class SavedBuffers:
    """Buffers as they were before a step, to undo what a refused forward pass did to them."""

    buffers: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> SavedBuffers:
        """Copy them."""
        broadcast_buffers(model)
        return cls([(buffer, buffer.clone()) for buffer in model.buffers()])

    def restore(self) -> None:
        """Put them back."""
        _restore(self.buffers)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together, a scalar; the same on all ranks once gradients are exchanged."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(grads) if grads else torch.zeros(())
