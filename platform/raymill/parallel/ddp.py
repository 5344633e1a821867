"""DistributedDataParallel around a loss. Works at world size 1.

Each objective gets a module of its own around the same model, whose forward pass is the objective's loss, and that module
is what DDP wraps: so a job with two networks and two optimizers is no other case than a job with one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raymill import faults
from raymill.errors import InputError, Problem
from raymill.parallel.precision import autocast
from raymill.task import Batch, Objective


class LossModule(nn.Module):
    """A model whose forward pass is the loss of one objective."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        """Wrap the model; its parameters are shared, not copied."""
        super().__init__()
        self.model = model
        self.began_s = 0.0
        self._loss = objective.loss

    def forward(self, batch: Batch | None) -> torch.Tensor:
        """The mean loss over the batch's rows, a scalar.

        None stands for no rows, which a rank has where a batch has fewer rows than there are ranks: the loss is zero, and
        so are all gradients, so that the rank still takes its part in the exchange.
        """
        self.began_s = time.perf_counter()
        if batch is None:
            return torch.stack([(p * 0).sum() for p in self.model.parameters() if p.requires_grad]).sum()
        return self._loss(self.model, batch)


class DistributedObjective:
    """One objective, ready to be trained on all ranks."""

    def __init__(
        self, model: nn.Module, objective: Objective, precision: str, device: torch.device, *, strict: bool = False
    ) -> None:
        """Wrap the model for this objective; must be called on all ranks in the same order.

        Strict gradients are added up by `step.ordered_gradients`, not by DDP.

        Raises:
            InputError: when the objective names a submodule that the model lacks.
        """
        self.objective, self.model, self.device = objective, model, device
        self.names, self.parameters = trained_parameters(model, objective)
        self._precision = precision
        self._others = [p for p in model.parameters() if all(p is not own for own in self.parameters)]
        self._loss_module = LossModule(model, objective)
        self._forward_s = 0.0
        with self.only_own():
            spread = dist.is_initialized() and not strict
            self._module: nn.Module = DistributedDataParallel(self._loss_module) if spread else self._loss_module

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

    def loss(self, batch: Batch | None) -> torch.Tensor:
        """The loss of a batch, computed in the job's precision."""
        begun_s = time.perf_counter()
        with autocast(self._precision, self.device):
            faults.point("before_forward")
            called_s = time.perf_counter()
            loss = self._module(batch)
            faults.point("after_forward")
        # Between the call and the pass itself, DDP waits for rank 0's buffers.
        self._forward_s += called_s - begun_s + time.perf_counter() - self._loss_module.began_s
        return loss.float()  # type: ignore[no-any-return]

    def take_forward_s(self) -> float:
        """Seconds in forward passes since it was last asked, without waiting for other ranks."""
        taken_s, self._forward_s = self._forward_s, 0.0
        return taken_s

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around each backward pass of a step: gradients are exchanged in the last one only."""
        if last or not isinstance(self._module, DistributedDataParallel):
            return nullcontext()
        return self._module.no_sync()

    def warm_up(self, batch: Batch | None) -> None:
        """Make DDP fix its gradient buckets now, with two backward passes that leave no trace.

        DDP orders its buckets anew after the first backward pass, and with three or more ranks the order decides how
        sums are rounded. Without this, the first step after a resume would differ from the same step of a run that was
        never interrupted (reliability of DDP across restarts; see docs/architecture.md).
        """
        if not isinstance(self._module, DistributedDataParallel):
            return
        buffers = [buffer.clone() for buffer in self._module.buffers()]
        with self.only_own():
            for _ in range(2):
                torch.autograd.backward(self.loss(batch))
        with torch.no_grad():
            for buffer, before in zip(self._module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        for parameter in self.parameters:
            parameter.grad = None
        self._forward_s = 0.0


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
