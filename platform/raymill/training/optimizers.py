"""Optimizers and learning-rate schedules, from what the job file says."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch.optim import Optimizer, lr_scheduler

from raymill.config.spec import JobSpec, OptimizerSpec, ScheduleSpec
from raymill.errors import InputError, Problem
from raymill.parallel.ddp import DistributedObjective


def make_optimizer(spec: OptimizerSpec, distributed: DistributedObjective) -> Optimizer:
    """The objective's optimizer, over its parameters."""
    return getattr(torch.optim, spec.kind)(distributed.parameters, **spec.arguments)  # type: ignore[no-any-return]


def optimizer_spec(spec: JobSpec, objective: str, objectives: Sequence[str]) -> OptimizerSpec:
    """The optimizer of an objective.

    Raises:
        InputError: when the job names optimizers that are not the task's objectives.
    """
    if isinstance(spec.optimizer, OptimizerSpec):
        return spec.optimizer
    if set(spec.optimizer) != set(objectives):
        raise InputError(
            [
                Problem(
                    "optimizer",
                    f"optimizers for {sorted(spec.optimizer)}",
                    f"one for each objective of the task: {sorted(objectives)}",
                    "Name them so in the job file, or give one optimizer with `kind` for all.",
                )
            ]
        )
    return spec.optimizer[objective]


def make_schedule(spec: JobSpec, optimizer: Optimizer, total_steps: int) -> lr_scheduler.LRScheduler | None:
    """The learning-rate schedule of the job for one optimizer: warm-ups and parts in sequence, one step per step."""
    if spec.schedule is None:
        return None
    specs = [spec.schedule] if isinstance(spec.schedule, ScheduleSpec) else spec.schedule
    parts: list[lr_scheduler.LRScheduler] = []
    milestones: list[int] = []
    start = 0
    for part in specs:
        if part.warmup_steps:
            first = 1 / (part.warmup_steps + 1)
            parts.append(lr_scheduler.LinearLR(optimizer, start_factor=first, total_iters=part.warmup_steps))
            milestones.append(start := start + part.warmup_steps)
        steps = part.steps or max(1, total_steps - start)
        parts.append(_schedule_part(part, optimizer, steps))
        most = getattr(parts[-1], "total_steps", None)
        if most is not None and most < steps:
            fix = "Leave out total_steps, epochs and steps_per_epoch, which are derived; or set `steps` in a list of schedules."
            raise InputError([Problem("schedule", f"{part.kind} for {most} steps", f"the {steps} steps that it lasts", fix)])
        milestones.append(start := start + steps)
    if len(parts) == 1:
        return parts[0]
    with warnings.catch_warnings():
        # SequentialLR steps its parts by number, which torch itself warns about.
        warnings.simplefilter("ignore")
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=milestones[:-1])


def _schedule_part(spec: ScheduleSpec, optimizer: Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    arguments = spec.arguments
    if spec.kind.startswith("CosineAnnealingLR"):
        arguments.setdefault("T_max", steps)
    if spec.kind == "OneCycleLR" and "epochs" not in arguments:
        arguments.setdefault("total_steps", steps)
    return getattr(lr_scheduler, spec.kind)(optimizer, **arguments)  # type: ignore[no-any-return]
