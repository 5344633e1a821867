"""One optimizer step of one objective: gradients of the global batch, checked, clipped, applied.

The gradient is computed in one of two ways. Averaged by DistributedDataParallel, which is fast, and the same to the bit at
the same number of workers. Or in order (`loop.strict`): the batch is cut into a fixed number of shards, each shard's gradient
is computed by itself, and all are added up in the order of their numbers, whichever ranks they were computed on, so that the
sum is the same to the bit at any number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raymill.own_code.contracts import MAIN, Measured
from raymill.parallel.buffers import SavedBuffers
from raymill.parallel.ddp import DistributedObjective
from raymill.parallel.global_loss import over_the_global_batch
from raymill.parallel.microbatch import Microbatch, Seed, weighed
from raymill.parallel.process_group import rank_and_world_size
from raymill.parallel.strategy import Strategy


@dataclass(frozen=True)
class StepLoss:
    """The loss of a step and its parts: of all ranks' sums together, divided by the weight.

    Attributes:
        names: of the loss and its parts; the same on all ranks.
        sums: this rank's part of the weighted sums, [len(names)], float64, on the device.
        weight: of the global batch; 0 where there was nothing to learn.
    """

    names: Sequence[str]
    sums: torch.Tensor
    weight: float


def compute_gradients(
    distributed: DistributedObjective,
    microbatches: Sequence[Microbatch],
    rows: int,
    num_shards: int,
    seed: Seed,
    scale: float = 1.0,
) -> StepLoss:
    """Leave the gradient of the mean loss over a global batch on the parameters. Nothing is waited for but other ranks.

    Args:
        microbatches: this rank's shards, weighing their rows.
        rows: of the global batch.
        num_shards: of the global batch.
        seed: seeds all generators for a shard; number `num_shards` is for a loss over the global batch.
        scale: of the loss while gradients are computed; they are left without it.
    """
    objective, compute = distributed.objective, distributed.strategy.gradients
    total: float = rows
    if objective.weight is not None:
        microbatches, total = weighed(objective, microbatches, num_shards)
    if objective.features is None:
        measured = compute(distributed, microbatches, total, seed, scale)
        _unscale(distributed.parameters, scale)
        names = [MAIN, *distributed.agree_on_parts(measured)]
        sums = torch.zeros(len(names), dtype=torch.float64, device=distributed.device)
        for microbatch, one in zip(microbatches, measured, strict=True):
            sums += one.values(names[1:]) * microbatch.weight
        return StepLoss(names, sums, total)
    whole = over_the_global_batch(distributed, microbatches, rows, num_shards, seed)
    compute(distributed, whole.microbatches, rows, seed, scale)
    _unscale(distributed.parameters, scale)
    whole.finish()
    names = [MAIN, *whole.measured.parts]
    # All ranks computed the same; one says it.
    values = whole.measured.values(names[1:]) * (dist.get_rank() == 0 if dist.is_initialized() else 1)
    return StepLoss(names, values, 1)


def _unscale(parameters: Sequence[nn.Parameter], scale: float) -> None:
    if scale != 1:
        torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], 1 / scale)


def averaged_gradients(
    distributed: DistributedObjective, microbatches: Sequence[Microbatch], weight: float, seed: Seed, scale: float = 1.0
) -> list[Measured]:
    """Leave the gradient of the mean loss, times `scale`, on the parameters. The microbatches of all ranks weigh `weight`.

    A parameter that no loss of the step used gets zeros, as DDP makes it, at any number of ranks.

    Returns:
        what was measured of each microbatch.
    """
    _, world_size = rank_and_world_size()
    found: list[Measured] = []
    if not microbatches:
        torch.autograd.backward(distributed.loss(None).loss)
    for number, microbatch in enumerate(microbatches):
        seed(microbatch.shard)
        with distributed.accumulating(last=number == len(microbatches) - 1):
            measured = distributed.loss(microbatch.batch, microbatch.slopes)
            # DDP averages over ranks; this makes it the mean over the global batch.
            torch.autograd.backward(measured.loss * (microbatch.weight * world_size / weight * scale))
        found.append(replace(measured, loss=measured.loss.detach()))
    for parameter in distributed.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return found


def ordered_gradients(
    distributed: DistributedObjective, microbatches: Sequence[Microbatch], weight: float, seed: Seed, scale: float = 1.0
) -> list[Measured]:
    """As `averaged_gradients`, but the same to the bit for any number of ranks.

    Every shard starts from the same buffers. Afterwards a buffer that no shard changed is as it was, to the bit. Of one that some
    shard changed, running statistics (floating point, complex) are the mean over the shards, weighted as their losses are, added
    up in the same order as the gradients; anything else, such as a counter, is as the last shard left it.
    """
    saved = SavedBuffers.of(distributed.model)
    buffers = saved.pairs
    own: list[torch.Tensor] = []
    found: list[Measured] = []
    rank, world_size = rank_and_world_size()
    for microbatch in microbatches:
        saved.restore()
        seed(microbatch.shard)
        measured = distributed.loss(microbatch.batch, microbatch.slopes)
        loss, share = measured.loss, microbatch.weight / weight
        grads = torch.autograd.grad(loss * (share * scale), distributed.parameters, allow_unused=True)
        known = [torch.zeros_like(p) if g is None else g for p, g in zip(distributed.parameters, grads, strict=True)]
        changed = torch.stack([_differ(now, before) for now, before in buffers]) if buffers else loss.new_zeros(0)
        # How many shards changed each buffer, and how many shards each rank had, travel with the sums.
        counts = [changed.to(loss.dtype), loss.new_tensor([float(other == rank) for other in range(world_size)])]
        own.append(
            torch.cat([*(g.reshape(-1) for g in known), *(_reals(now) * share for now, _ in buffers if _is_mean(now)), *counts])
        )
        found.append(replace(measured, loss=loss.detach()))
    size = sum(p.numel() for p in distributed.parameters) + sum(_reals(b).numel() for b, _ in buffers if _is_mean(b))
    summed = add_in_order(own, size + len(buffers) + world_size, distributed.device)
    start = 0
    for parameter in distributed.parameters:
        parameter.grad = summed[start : start + parameter.numel()].view_as(parameter).clone()
        start += parameter.numel()
    _settle_buffers(buffers, summed[start:size], summed[size:].tolist())
    return found


def _settle_buffers(buffers: Sequence[tuple[torch.Tensor, torch.Tensor]], means: torch.Tensor, counts: Sequence[float]) -> None:
    """Give each buffer its value after a step, from the means and the counts of `ordered_gradients`; all ranks know the same."""
    # No rank had any where the whole batch weighs nothing.
    last_rank = max((rank for rank, num_shards in enumerate(counts[len(buffers) :]) if num_shards), default=0)
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


def _differ(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Whether a buffer was changed, a scalar; an observer gives its own another shape when it first sees a tensor."""
    if now.shape != before.shape:
        return torch.ones((), dtype=torch.bool, device=now.device)
    return (_bits(now) != _bits(before)).any()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN equals itself there, and zero is not minus zero."""
    return tensor.reshape(-1).view(torch.uint8)


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


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together, a scalar; the same on all ranks once gradients are exchanged."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(grads) if grads else torch.zeros(())


# ---------------------------------------------------------------- the strategies that there are


def _wrapped(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module) if dist.is_initialized() else module


def _without_exchange(module: nn.Module) -> AbstractContextManager[None]:
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def strategy_of(*, strict: bool) -> Strategy:
    """How a model is spread: every rank holds all of it, and gradients are averaged by DDP, or added in order.

    DDP orders its buckets anew after the first backward pass, and with three or more ranks their order decides how sums are
    rounded: two warm-up passes settle it.
    """
    return Strategy(
        wrap=(lambda module: module) if strict else _wrapped,
        accumulating=_without_exchange,
        gradients=ordered_gradients if strict else averaged_gradients,
        norm=gradient_norm,
        whole=lambda tensor: tensor,
        part=lambda whole, held: whole,
        shards_apart=strict,
        warm_up=0 if strict or not dist.is_initialized() else 2,
    )
