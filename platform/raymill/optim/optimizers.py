"""Optimizers, from what the job file says.

An objective's parameters are dealt out to one optimizer or several, by patterns of their names; each has its schedule. Gradients
are computed once, then each optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from raymill.config import load
from raymill.config.spec import JobSpec, OptimizerSpec
from raymill.errors import InputError, Problem
from raymill.optim.schedules import Schedule, make_schedule
from raymill.parallel.ddp import DistributedObjective
from raymill.parallel.strategy import Norm
from raymill.task import OwnOptimizer


@dataclass(frozen=True)
class GroupOptimizer:
    """One optimizer, over some of an objective's parameters.

    Attributes:
        spec: what the job file says of it.
        names: its parameters' names in the model.
        parameters: the parameters, in the same order.
        optimizer: torch's own, or the job's.
        schedule: of its learning rate.
        norm: of gradients, as the strategy computes it.
    """

    spec: OptimizerSpec
    names: Sequence[str]
    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer
    schedule: Schedule
    norm: Norm

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def hold_back(self, step: int) -> None:
        """Before its first step, its parameters are as if they had no gradient."""
        if step < self.spec.from_step:
            self.optimizer.zero_grad(set_to_none=True)

    def step(self, step: int) -> None:
        """Clip the gradient to a norm, if one is given, and step."""
        if step < self.spec.from_step:
            return
        if self.spec.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.spec.max_grad_norm, self.norm(self.parameters))
        self.optimizer.step()


def make_optimizers(
    spec: JobSpec,
    distributed: DistributedObjective,
    objectives: Sequence[str],
    steps: int,
    epochs: int,
    own: Mapping[str, Sequence[OwnOptimizer]] | None = None,
) -> list[GroupOptimizer]:
    """The optimizers of an objective, over its parameters: the job's, or those that the task makes.

    Args:
        objectives: the names of all objectives of the task.
        steps: of the whole job.
        epochs: likewise.
        own: what the task makes; None: it makes none.

    Raises:
        InputError: when both or neither give them; with each pattern that names no parameter, and parameters that none names.
    """
    if spec.optimizer is None and own is None:
        fix = "Add optimizer to the job, or define optimizers(model, total_steps) in the task."
        raise InputError([Problem("optimizer", "nothing", "an optimizer", fix)])
    if spec.optimizer is not None and own is not None:
        fix = "Leave optimizer out of the job, or optimizers() out of the task."
        raise InputError([Problem("optimizer", "one in the job, and a task that makes its own", "either", fix)])
    if own is not None:
        return [_taken(distributed, one) for one in own[distributed.name]]
    return _dealt(spec, distributed, objectives, steps, epochs)


def _taken(distributed: DistributedObjective, own: OwnOptimizer) -> GroupOptimizer:
    """An optimizer that the task has made."""
    names = {id(parameter): name for name, parameter in zip(distributed.names, distributed.parameters, strict=True)}
    parameters = [parameter for group in own.optimizer.param_groups for parameter in group["params"]]
    kind = type(own.optimizer).__name__
    if any(id(parameter) not in names for parameter in parameters):
        found = f"{kind} over a parameter that objective {distributed.name!r} does not train"
        fix = "Give it parameters of the model that require a gradient, and that Objective(trains=...) covers."
        raise InputError([Problem("optimizers()", found, f"some of {shown(distributed.names)}", fix)])
    plateau = own.schedule if isinstance(own.schedule, lr_scheduler.ReduceLROnPlateau) else None
    sequence = None if plateau else own.schedule
    schedule = Schedule(sequence, own.per == "epoch", plateau, own.metric or "")
    spec = OptimizerSpec(kind=kind, max_grad_norm=own.max_grad_norm)
    return GroupOptimizer(
        spec, [names[id(parameter)] for parameter in parameters], parameters, own.optimizer, schedule, distributed.strategy.norm
    )


def _dealt(
    spec: JobSpec, distributed: DistributedObjective, objectives: Sequence[str], steps: int, epochs: int
) -> list[GroupOptimizer]:
    """The job's optimizers of an objective, each over the parameters that its patterns name."""
    specs = optimizer_specs(spec, distributed.name, objectives)
    where = "optimizer" if not isinstance(spec.optimizer, dict) else f"optimizer.{distributed.name}"
    # One that stands alone has no number.
    places = [f"{where}.{number}" for number in range(len(specs))] if len(specs) > 1 else [where]
    made = []
    left = dict(zip(distributed.names, distributed.parameters, strict=True))
    problems = []
    for place, one in zip(places, specs, strict=True):
        own = [name for name in left if one.parameters is None or any(fnmatchcase(name, p) for p in one.parameters)]
        if not own:
            found = "no parameters left" if one.parameters is None else f"patterns {one.parameters}, which no parameter left fits"
            fix = "Correct the patterns: the first that fits a name takes it, and * stands for any letters."
            problems.append(Problem(f"{place}.parameters", found, f"patterns for some of {shown(left)}", fix))
            continue
        made.append((place, one, {name: left.pop(name) for name in own}))
    if left:
        fix = "Leave out `parameters` in the last, which then takes all that are left; or freeze them in build()."
        problems.append(Problem(where, f"optimizers for none of {shown(left)}", "one for each parameter", fix))
    if problems:
        raise InputError(problems)
    norm = distributed.strategy.norm
    return [_group(spec, one, own, norm, place, steps, epochs) for place, one, own in made]


def shown(names: Sequence[str] | dict[str, nn.Parameter], most: int = 8) -> str:
    """The first of these names, for messages."""
    return f"{list(names)[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")


def _group(
    spec: JobSpec, one: OptimizerSpec, own: dict[str, nn.Parameter], norm: Norm, where: str, steps: int, epochs: int
) -> GroupOptimizer:
    own_code = ":" in one.kind
    made_class = load.import_class(one.kind, f"{where}.kind", "optimizer") if own_code else getattr(torch.optim, one.kind)
    try:
        optimizer = made_class(list(own.values()), **one.arguments)
    except (ValueError, TypeError) as error:
        fix = f"Correct {where}: its arguments, or which parameters it has."
        raise InputError(
            [Problem(where, f"{type(error).__name__}: {error} ({one.kind} over {shown(own)})", "what the optimizer takes", fix)]
        ) from error
    try:
        field = f"{where}.schedule" if one.schedule else "schedule"
        schedule = make_schedule(one.schedule or spec.schedule, field, optimizer, steps, epochs)
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        found, expected = f"{type(error).__name__}: {error}", f"what torch can train this model with for {steps} steps"
        raise InputError([Problem(field, found, expected, f"Correct {field} in the job.")]) from error
    return GroupOptimizer(one, list(own), list(own.values()), optimizer, schedule, norm)


def optimizer_specs(spec: JobSpec, objective: str, objectives: Sequence[str]) -> list[OptimizerSpec]:
    """The optimizers of an objective.

    Raises:
        InputError: when the job names optimizers that are not the task's objectives.
    """
    given = spec.optimizer
    assert given is not None
    if not isinstance(given, dict):
        return given if isinstance(given, list) else [given]
    if set(given) != set(objectives):
        raise InputError(
            [
                Problem(
                    "optimizer",
                    f"optimizers for {sorted(given)}",
                    f"one for each objective of the task: {sorted(objectives)}",
                    "Name them so in the job file, or give one optimizer with `kind` for all.",
                )
            ]
        )
    own = given[objective]
    return own if isinstance(own, list) else [own]
