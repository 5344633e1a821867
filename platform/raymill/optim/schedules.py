"""Learning-rate schedules, from what the job file says: warm-ups and parts in sequence, one step for each of the job."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer, lr_scheduler

from raymill.config import load
from raymill.config.spec import JobSpec, ScheduleSpec
from raymill.errors import InputError, Problem


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
    own_code = ":" in spec.kind
    made_class = load.import_class(spec.kind, "schedule.kind", "schedule") if own_code else getattr(lr_scheduler, spec.kind)
    return made_class(optimizer, **arguments)  # type: ignore[no-any-return]
