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
from torch.optim import Optimizer

from raymill.parallel import Wrapped, place_in_group, share_buffers
from raymill.task import Batch

Seed = Callable[[int], None]
"""Seeds all generators for a shard."""


@dataclass(frozen=True)
class Piece:
    """One shard of a global batch that this rank owns.

    Attributes:
        shard: its number.
        count: its rows; not 0.
        batch: the rows, on the device.
    """

    shard: int
    count: int
    batch: Batch


def averaged_gradients(wrapped: Wrapped, pieces: Sequence[Piece], rows: int, seed: Seed) -> float:
    """Leave the gradient of the mean loss over `rows` rows on the parameters; returns this rank's sum of losses."""
    _, world_size = place_in_group()
    if not pieces:
        torch.autograd.backward(wrapped.loss(None))
        return 0.0
    loss_sum = 0.0
    for number, piece in enumerate(pieces):
        seed(piece.shard)
        with wrapped.accumulating(last=number == len(pieces) - 1):
            loss = wrapped.loss(piece.batch)
            # DDP averages over ranks; this makes it the mean over the rows of the global batch.
            torch.autograd.backward(loss * (piece.count * world_size / rows))
        loss_sum += float(loss.detach()) * piece.count
    return loss_sum


def ordered_gradients(wrapped: Wrapped, pieces: Sequence[Piece], rows: int, seed: Seed) -> float:
    """As `averaged_gradients`, but the same to the bit for any number of ranks.

    Every shard starts from the same buffers (running statistics); afterwards they are the mean over the shards, weighted by
    rows, added up in the same order as the gradients.
    """
    buffers = [buffer for buffer in wrapped.model.buffers() if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in buffers]
    counters = [(buffer, buffer.clone()) for buffer in wrapped.model.buffers() if not buffer.is_floating_point()]
    own: list[torch.Tensor] = []
    loss_sum = 0.0
    for piece in pieces:
        _restore(zip(buffers, before, strict=True))
        _restore(counters)
        seed(piece.shard)
        loss = wrapped.loss(piece.batch)
        share = piece.count / rows
        grads = torch.autograd.grad(loss * share, wrapped.parameters, allow_unused=True)
        known = [torch.zeros_like(p) if g is None else g for p, g in zip(wrapped.parameters, grads, strict=True)]
        own.append(torch.cat([*(g.reshape(-1) for g in known), *(b.reshape(-1) * share for b in buffers), loss.new_zeros(1)]))
        loss_sum += float(loss.detach()) * piece.count
    size = sum(p.numel() for p in wrapped.parameters) + sum(b.numel() for b in buffers) + 1
    summed = add_in_order(own, size, wrapped.device)
    place = 0
    for parameter in wrapped.parameters:
        parameter.grad = summed[place : place + parameter.numel()].view_as(parameter).clone()
        place += parameter.numel()
    with torch.no_grad():
        for buffer in buffers:
            buffer.copy_(summed[place : place + buffer.numel()].view_as(buffer))
            place += buffer.numel()
    # Counters went up by one on every rank that had a shard; not every rank has one.
    for buffer, _ in counters:
        if dist.is_initialized():
            dist.all_reduce(buffer, dist.ReduceOp.MAX)
    return loss_sum


def _restore(pairs: Any) -> None:
    with torch.no_grad():
        for buffer, before in pairs:
            buffer.copy_(before)


def add_in_order(own: Sequence[torch.Tensor], size: int, device: torch.device) -> torch.Tensor:
    """The sum of all ranks' vectors [size], added one after the other in the order of ranks and places.

    The running sum travels from rank to rank and then back to all: W - 1 messages in a chain. The order of the additions,
    and so each rounding, does not depend on where the vectors were.
    """
    rank, world_size = place_in_group()
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


def apply(wrapped: Wrapped, optimizer: Optimizer, norm: torch.Tensor, clip_norm: float | None) -> None:
    """Clip the gradient to a norm, if one is given, and let the optimizer step."""
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(wrapped.parameters, clip_norm, norm)
    optimizer.step()


@dataclass(frozen=True)
class Saved:
    """Buffers as they were before a step, to undo what a refused forward pass did to them."""

    buffers: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, model: nn.Module) -> Saved:
        """Copy them."""
        share_buffers(model)
        return cls([(buffer, buffer.clone()) for buffer in model.buffers()])

    def restore(self) -> None:
        """Put them back."""
        _restore(self.buffers)


@dataclass(frozen=True)
class Exchanged:
    """What all ranks know of a step.

    Attributes:
        event: the complete step event.
        rows: that were trained on.
        forward_s: seconds that each rank took for its forward passes.
        wants_stop: whether to stop.
    """

    event: dict[str, Any]
    rows: int
    forward_s: list[float]
    wants_stop: bool


class Exchange:
    """What ranks tell each other of a step, sent while the next one runs: rows, losses, times, and rank 0's wish to stop."""

    def __init__(self, event: dict[str, Any], rows: int, forward_s: float, *, wants_stop: bool) -> None:
        """Send this rank's part of a step event.

        Args:
            event: the event; of its metrics, those named "...loss" are this rank's parts of a sum.
            rows: rows this rank trained on.
            forward_s: seconds it took for its forward passes.
            wants_stop: whether this rank wants the run to stop.
        """
        self._event = event
        self._losses = [name for name in event["metrics"] if name.endswith("loss")]
        rank, world_size = place_in_group()
        places = [forward_s if place == rank else 0.0 for place in range(world_size)]
        values = [float(rows), float(wants_stop), *(event["metrics"][name] for name in self._losses), *places]
        self._sum = torch.tensor(values, dtype=torch.float64)
        self._work = dist.all_reduce(self._sum, async_op=True) if dist.is_initialized() else None

    def finish(self) -> Exchanged:
        """What all ranks together have to say."""
        if self._work is not None:
            self._work.wait()
        rows, stop, *others = self._sum.tolist()
        losses, forward_s = others[: len(self._losses)], others[len(self._losses) :]
        self._event["metrics"] |= dict(zip(self._losses, losses, strict=True))
        return Exchanged(self._event, int(rows), forward_s, stop > 0)
