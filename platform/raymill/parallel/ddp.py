"""A loss as all ranks train it. Works at world size 1.

Each objective gets a module of its own around the same model, whose forward pass is the objective's loss, and that module
is what the strategy wraps: so a job with two networks and two optimizers is no other case than a job with one.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from raymill import faults
from raymill.errors import InputError, Problem
from raymill.own_code.contracts import Measured, checked_loss, features, other_parts
from raymill.parallel.precision import autocast
from raymill.parallel.process_group import all_gather_lines
from raymill.parallel.strategy import Strategy
from raymill.task import Batch, Now, Objective

Slopes = Mapping[str, torch.Tensor]
"""The gradient of a loss with respect to features, by their names."""


class _Tie(torch.autograd.Function):
    """A loss, tied to parameters: a backward pass reaches each of them, and adds nothing to the gradient of any.

    DDP waits in a backward pass until each parameter was reached. So a loss may leave some out, others on other ranks (a head
    without a target, a layer that is dropped at random), and a rank without rows leaves out all.
    """

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.num_parameters = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (*grads, *[None] * ctx.num_parameters)


class ForwardClock:
    """Seconds in forward passes, without waiting for other ranks. On a GPU by its own clock: a call there returns at once."""

    def __init__(self, device: torch.device) -> None:
        """Measure what is computed on this device."""
        self._device = device
        self._spent_s = 0.0
        self._began_s = 0.0
        self._passes: list[list[torch.cuda.Event]] = []

    def begin(self) -> None:
        """A pass begins."""
        self._began_s = time.perf_counter()
        if self._device.type == "cuda":
            self._passes.append([self._event()])

    def end(self) -> None:
        """The pass ends."""
        if self._device.type == "cuda":
            self._passes[-1].append(self._event())
        else:
            self._spent_s += time.perf_counter() - self._began_s

    def add(self, seconds: float) -> None:
        """Count what was spent before a pass."""
        self._spent_s += seconds

    def take(self) -> float:
        """The seconds since it was last asked. Once a step's gradients are known, there is nothing left to wait for."""
        spent_s, self._spent_s = self._spent_s, 0.0
        passes, self._passes = self._passes, []
        for began, ended in passes:
            ended.synchronize()
            spent_s += began.elapsed_time(ended) / 1000
        return spent_s

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class LossModule(nn.Module):
    """A model whose forward pass is the loss of one objective."""

    def __init__(self, model: nn.Module, objective: Objective, clock: ForwardClock) -> None:
        """Wrap the model; its parameters are shared, not copied."""
        super().__init__()
        self.model = model
        self._clock = clock
        self.now: Now | None = None
        self._objective, self._loss = objective, checked_loss(objective)

    def forward(self, batch: Batch | None, slopes: Slopes | None) -> Measured:
        """The mean loss over the batch's rows, and its parts.

        None stands for no rows, which a rank has where a batch has fewer rows than there are ranks: the loss is zero, and
        so are all gradients, so that the rank still takes its part in the exchange. Parameters are reached from the last to the
        first, as they are in most models.

        Args:
            batch: the rows.
            slopes: the gradient of a loss over the global batch with respect to this batch's features, which stands for the loss.
        """
        # Between the call of DDP and this one, it waits for rank 0's buffers.
        self._clock.begin()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if batch is None:
            loss = torch.zeros((), device=parameters[0].device)
            for parameter in parameters:
                loss = _tied(loss, parameter)
            return Measured(loss, {})
        if slopes is None:
            measured = self._loss(self.model, batch, self.now)
        else:
            found = self.features(batch)
            measured = Measured(torch.stack([(found[name].double() * slope).sum() for name, slope in slopes.items()]).sum(), {})
        return replace(measured, loss=_tied(measured.loss, *parameters))

    def features(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """The batch's features by name; a single tensor is named "": the objective's loss over all is given it as it is."""
        found = features(self._objective, self.model, batch, self.now)
        return found if isinstance(found, Mapping) else {"": found}

    def of_features(self, found: Mapping[str, torch.Tensor]) -> Measured:
        """The loss over the features of the global batch."""
        return self._loss(self.model, found.get("", found), self.now)


def _tied(loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    return _Tie.apply(loss, *parameters)  # type: ignore[no-any-return]


class DistributedObjective:
    """One objective, ready to be trained on all ranks."""

    def __init__(self, model: nn.Module, objective: Objective, precision: str, device: torch.device, strategy: Strategy) -> None:
        """Wrap the model for this objective; must be called on all ranks in the same order.

        Raises:
            InputError: when the objective names a submodule that the model lacks.
        """
        self.objective, self.model, self.device, self.strategy = objective, model, device, strategy
        self.names, self.parameters = trained_parameters(model, objective)
        self._precision = precision
        self._others = [p for p in model.parameters() if all(p is not own for own in self.parameters)]
        self.clock = ForwardClock(device)
        self._parts: list[str] | None = None
        self._loss_module = LossModule(model, objective, self.clock)
        with self.only_own():
            self._module = strategy.wrap(self._loss_module)

    @property
    def name(self) -> str:
        """The objective's name."""
        return self.objective.name

    @contextmanager
    def only_own(self) -> Iterator[None]:
        """Within this, only this objective's parameters require gradients."""
        wanted = [parameter.requires_grad for parameter in self._others]
        for parameter in self._others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, grad in zip(self._others, wanted, strict=True):
                parameter.requires_grad_(grad)

    @contextmanager
    def in_step(self, now: Now) -> Iterator[None]:
        """Within this, a loss is of this step, and only this objective's parameters require gradients."""
        self._loss_module.now = now
        with self.only_own():
            yield

    def loss(self, batch: Batch | None, slopes: Slopes | None = None) -> Measured:
        """The loss of a batch and its parts, computed in the job's precision; see `LossModule.forward`."""
        begun_s = time.perf_counter()
        with autocast(self._precision, self.device):
            faults.point("before_forward")
            self.clock.add(time.perf_counter() - begun_s)
            measured: Measured = self._module(batch, slopes)
            faults.point("after_forward")
        self.clock.end()
        return replace(measured, loss=measured.loss.float())

    def features(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """The features of a batch by name, without gradients, in the job's precision. The batch is not changed."""
        self.clock.begin()
        # The job's code may change its batch, and is to be given the same once more.
        with torch.no_grad(), autocast(self._precision, self.device):
            found = self._loss_module.features(copy.deepcopy(batch))
        self.clock.end()
        return found

    def loss_of_features(self, found: Mapping[str, torch.Tensor]) -> Measured:
        """The loss over the features of the global batch, computed in the job's precision."""
        with autocast(self._precision, self.device):
            measured = self._loss_module.of_features(found)
        return replace(measured, loss=measured.loss.float())

    def agree_on_parts(self, own: Sequence[Measured]) -> Sequence[str]:
        """The names of the loss's parts, the same on all ranks: one that has no rows in a step has measured none.

        They are exchanged once, where a first loss is computed.

        Raises:
            InputError: a loss named other parts than one before.
        """
        if self._parts is None:
            first = list(own[0].parts) if own else None
            told = [json.loads(line) for line in all_gather_lines(json.dumps(first))]
            self._parts = next((names for names in told if names is not None), None)
        names = self._parts or []
        if (other := next((one.parts for one in own if one.parts.keys() != set(names)), None)) is not None:
            raise other_parts(self.objective, other, names)
        return names

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around each backward pass of a step: gradients are exchanged in the last one only."""
        return nullcontext() if last else self.strategy.accumulating(self._module)

    def warm_up(self) -> None:
        """Make the strategy settle how it adds gradients up, with backward passes over no rows, which leave no trace.

        Over no rows, that depends on the model alone: not on rows, nor on what a loss leaves out at random. Otherwise the first
        step after a resume would differ from the same step of a run that was never interrupted.
        """
        if not self.strategy.warm_up:
            return
        with self.only_own():
            for _ in range(self.strategy.warm_up):
                torch.autograd.backward(self.loss(None).loss)
        for parameter in self.parameters:
            parameter.grad = None
        self.clock.take()


def trained_parameters(model: nn.Module, objective: Objective) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters that an objective changes, in the model's order.

    Raises:
        InputError: when the objective names a submodule that the model lacks.
    """
    modules = dict(model.named_children())
    missing = [name for name in objective.trains if name not in modules]
    if missing:
        raise InputError(
            [
                Problem(
                    f"objective {objective.name!r}",
                    f"trains {missing}",
                    f"names of submodules of {type(model).__name__}: {sorted(modules)}",
                    "Correct Objective(trains=...) in the task.",
                )
            ]
        )
    own = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (not objective.trains or name.split(".")[0] in objective.trains)
    ]
    return [name for name, _ in own], [parameter for _, parameter in own]
