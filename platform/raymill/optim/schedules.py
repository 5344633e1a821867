"""Learning-rate schedules, from what the job file says: warm-ups and parts in sequence, by step or epoch, or by a metric."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from raymill.checkpoint.snapshot import as_plain, from_plain
from raymill.config import load
from raymill.config.spec import PLATEAU, ScheduleSpec
from raymill.errors import InputError, Problem


@dataclass(frozen=True)
class Schedule:
    """The schedule of one optimizer's rate.

    Attributes:
        sequence: advanced with the training; None: there is none.
        per_epoch: at each epoch's end, rather than at each step.
        plateau: advanced with evaluations; None: there is none.
        metric: what that one goes by.
    """

    sequence: lr_scheduler.LRScheduler | None
    per_epoch: bool = False
    plateau: lr_scheduler.ReduceLROnPlateau | None = None
    metric: str = ""

    def advance(self, *, epoch_ended: bool) -> None:
        """A step of the job is over. Torch would have the optimizer step first, which it may not do yet."""
        if self.sequence is not None and (epoch_ended or not self.per_epoch):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self.sequence.step()

    def advance_to(self, step: int, epoch: int) -> None:
        """From the start to where this many steps, and epochs, are done; evaluations count for nothing."""
        for _ in range(0 if self.sequence is None else epoch if self.per_epoch else step):
            self.advance(epoch_ended=True)

    def take_in(self, measured: Mapping[str, float]) -> None:
        """Evaluations have measured these metrics."""
        if self.plateau is not None and self.metric in measured:
            self.plateau.step(measured[self.metric])

    @property
    def _parts(self) -> Mapping[str, lr_scheduler.LRScheduler]:
        parts = {"": self.sequence, "@plateau": self.plateau}
        return {name: part for name, part in parts.items() if part is not None}

    def states(self, name: str) -> dict[str, Any]:
        """All that changes, as plain values, by this name and what is appended to it."""
        return {f"{name}{end}": as_plain(part.state_dict()) for end, part in self._parts.items()}

    def restore(self, name: str, states: Mapping[str, Any]) -> None:
        """Put back what `states` gave by this name."""
        for end, part in self._parts.items():
            part.load_state_dict(from_plain(states[f"{name}{end}"]))


def make_schedule(
    given: ScheduleSpec | Sequence[ScheduleSpec] | None, field: str, optimizer: Optimizer, steps: int, epochs: int
) -> Schedule:
    """The schedule of an optimizer.

    Args:
        given: one part, or several in sequence.
        field: where that stands in the job.
        steps: of the whole job.
        epochs: likewise.

    Raises:
        InputError: a part lasts shorter than it must.
    """
    if given is None:
        return Schedule(None)
    specs = [given] if isinstance(given, ScheduleSpec) else given
    per_epoch = any(one.per == "epoch" for one in specs)
    if any((one.per == "epoch") != per_epoch for one in specs):
        found, fix = "parts that count steps beside parts that count epochs", "Give each `per: epoch`, or none."
        raise InputError([Problem(field, found, "parts that count the same", fix)])
    total = epochs if per_epoch else steps
    if specs[0].kind != PLATEAU:
        return Schedule(_sequence(specs, field, optimizer, total), per_epoch)
    (spec,) = specs
    warmup = _warmup(spec, optimizer) if spec.warmup_steps else None
    return Schedule(warmup, False, lr_scheduler.ReduceLROnPlateau(optimizer, **spec.arguments), spec.metric or "")


def _sequence(specs: Sequence[ScheduleSpec], field: str, optimizer: Optimizer, total: int) -> lr_scheduler.LRScheduler:
    parts: list[lr_scheduler.LRScheduler] = []
    milestones: list[int] = []
    start = 0
    for spec in specs:
        if spec.warmup_steps:
            parts.append(_warmup(spec, optimizer))
            milestones.append(start := start + spec.warmup_steps)
        steps = spec.steps or max(1, total - start)
        parts.append(_part(spec, optimizer, steps))
        most = getattr(parts[-1], "total_steps", None)
        if most is not None and most < steps:
            fix = "Leave out total_steps, epochs and steps_per_epoch, which are derived; or set `steps` in a list of schedules."
            raise InputError([Problem(field, f"{spec.kind} for {most} steps", f"the {steps} steps that it lasts", fix)])
        milestones.append(start := start + steps)
    if len(parts) == 1:
        return parts[0]
    with warnings.catch_warnings():
        # SequentialLR steps its parts by number, which torch itself warns about.
        warnings.simplefilter("ignore")
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=milestones[:-1])


def _warmup(spec: ScheduleSpec, optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    first = 1 / (spec.warmup_steps + 1)
    return lr_scheduler.LinearLR(optimizer, start_factor=first, total_iters=spec.warmup_steps)


def _part(spec: ScheduleSpec, optimizer: Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    arguments = spec.arguments
    if spec.kind.startswith("CosineAnnealingLR"):
        arguments.setdefault("T_max", steps)
    if spec.kind == "OneCycleLR" and "epochs" not in arguments:
        arguments.setdefault("total_steps", steps)
    own_code = ":" in spec.kind
    made_class = load.import_class(spec.kind, "schedule.kind", "schedule") if own_code else getattr(lr_scheduler, spec.kind)
    return made_class(optimizer, **arguments)  # type: ignore[no-any-return]
