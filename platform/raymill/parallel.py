"""How a model is spread over workers: process group, DistributedDataParallel, precision. Works at world size 1.

Each objective gets a module of its own around the same model, whose forward pass is the objective's loss, and that module
is what DDP wraps: so a job with two networks and two optimizers is wrapped exactly as a job with one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raymill import faults
from raymill.errors import InputError, Problem
from raymill.task import Batch, Objective

LOOPBACK = "127.0.0.1"
ALIGNMENT_BYTES = 64
"""What torch's CPU allocator aligns to."""


def join_group(
    meeting: tuple[str, int],
    listener: socket.socket | None,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout_s: float,
) -> None:
    """Join the process group of all ranks; with one rank there is none.

    Args:
        meeting: host and port of rank 0's listener.
        listener: rank 0's own, bound to the one address to be reached at; None on the others.
        rank: this process's rank.
        world_size: ranks.
        device: decides between gloo (CPU) and nccl (GPU, with gloo for CPU tensors).
        timeout_s: seconds until a collective that somebody does not join fails.
    """
    if world_size == 1:
        return
    host, port = meeting
    if host == LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=timeout_s)
    # Given no socket, the store would listen on every interface.
    descriptor = listener.detach() if listener else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=descriptor,
    )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def leave_group(*, together: bool) -> None:
    """Leave the process group, if this process is in one.

    Args:
        together: wait for the other ranks first; gloo may abort where one leaves while another still sends.
    """
    if dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()


def place_in_group() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A CPU tensor of each rank, in the order of the ranks."""
    if not dist.is_initialized():
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def gather_numbers(numbers: npt.NDArray[np.int64]) -> list[int]:
    """The whole numbers of all ranks, in the order of the ranks."""
    sizes = [int(size) for size in gather(torch.tensor([len(numbers)]))]
    padded = torch.zeros(max(sizes), dtype=torch.int64)
    padded[: len(numbers)] = torch.from_numpy(numbers.copy())
    return [number for part, size in zip(gather(padded), sizes, strict=True) for number in part[:size].tolist()]


def gather_texts(text: str) -> list[str]:
    """A line of text of each rank, in the order of the ranks."""
    numbers = np.frombuffer(f"{text}\n".encode(), np.uint8).astype(np.int64)
    return bytes(gather_numbers(numbers)).decode().splitlines()


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, such as running statistics, as DDP does before each forward pass."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


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


class Wrapped:
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

    def settle(self, batch: Batch | None) -> None:
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


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The forward pass's precision: "fp32" or "bf16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients together, a scalar; the same on all ranks once gradients are exchanged."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(grads) if grads else torch.zeros(())


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it on the device; dicts, lists and tuples are walked.

    Tensors come out aligned as torch allocates them: a matrix product rounds differently where its input starts elsewhere,
    and where a batch starts in its window must not change the weights.
    """
    if isinstance(batch, torch.Tensor):
        moved = batch.to(device, non_blocking=True)
        return moved if moved.data_ptr() % ALIGNMENT_BYTES == 0 else moved.clone()
    if isinstance(batch, dict):
        return {name: move(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(move(value, device) for value in batch)
    return batch
