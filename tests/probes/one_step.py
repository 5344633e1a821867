"""The gradient of one step, computed as a run does, cut into shards, on ranks; and by one process over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raymill.data.order import BatchSharding, shard_bounds
from raymill.parallel.ddp import DistributedObjective
from raymill.parallel.gradients import compute_gradients, strategy_of
from raymill.parallel.microbatch import Microbatch
from raymill.parallel.process_group import leave_group
from raymill.task import Now, Schema, Task
from worker_harness import join

NOW = Now(1, 0, 1, 1, 1)


@dataclass(frozen=True)
class OneStep:
    """A step of a task's first objective over all rows of a batch.

    Attributes:
        make_task: schema -> the task, with which a batch is as good cut as whole.
        batch: its columns, of one length.
        num_shards: pieces it is cut into.
        strict: the way of `loop.strict`.
    """

    make_task: Callable[[Schema], Task]
    batch: dict[str, torch.Tensor]
    num_shards: int = 1
    strict: bool = False


@dataclass(frozen=True)
class Learned:
    """What a step gave.

    Attributes:
        metrics: the loss and its parts.
        grads: by the names of parameters, as arrays.
        buffers: likewise, behind the step.
    """

    metrics: dict[str, float]
    grads: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]


def on_rank(rank: int, world_size: int, port: int, step: OneStep) -> Learned:
    """One rank's part."""
    join(rank, world_size, port)
    task, model = _made(step)
    objective = DistributedObjective(model, task.objectives()[0], "fp32", torch.device("cpu"), strategy_of(strict=step.strict))
    rows = len(next(iter(step.batch.values())))
    sharding = BatchSharding(rows, rows, step.num_shards, world_size)
    bounds = shard_bounds(rows, step.num_shards)
    microbatches = []
    for shard, count in sharding.shards(0, rank):
        start = int(bounds[shard])
        cut = {name: column[start : start + count].clone() for name, column in step.batch.items()}
        microbatches += [Microbatch(shard, count, cut, weight=count)] if count else []
    with objective.in_step(NOW):
        loss = compute_gradients(objective, microbatches, rows, step.num_shards, torch.manual_seed)
    sums = loss.sums.clone()
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    leave_group(together=True)
    metrics = dict(zip(loss.names, (sums / loss.weight).tolist(), strict=True)) if loss.weight else {}
    return _learned(metrics, model)


def at_once(step: OneStep) -> Learned:
    """The same by plain autograd over the whole batch."""
    task, model = _made(step)
    objective, batch = task.objectives()[0], {name: column.clone() for name, column in step.batch.items()}
    own: Any = objective.loss
    given = own(model, objective.features(model, batch) if objective.features else batch)
    torch.autograd.backward(given["loss"])
    return _learned({name: float(torch.as_tensor(value).detach()) for name, value in given.items()}, model)


def _made(step: OneStep) -> tuple[Task, torch.nn.Module]:
    torch.manual_seed(0)
    task = step.make_task({})
    return task, task.build().eval()


def _learned(metrics: dict[str, float], model: torch.nn.Module) -> Learned:
    grads = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Learned(metrics, grads, {name: buffer.numpy() for name, buffer in model.named_buffers()})
