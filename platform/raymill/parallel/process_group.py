"""The process group of all ranks, and what they exchange. With one rank there is none, and every function works all the same."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist
from torch import nn

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


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
    if GLOO_INTERFACE not in os.environ and (interface := interface_towards(host, port)):
        # Left to itself, gloo takes the address of this machine's name, which on Debian is a loopback one.
        os.environ[GLOO_INTERFACE] = interface
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


def interface_towards(host: str, port: int) -> str | None:
    """The network interface of this machine by which another one is reached; None where its address is that of none."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        # Sends nothing: the kernel finds the way.
        probe.connect(address)
        own = probe.getsockname()[0]
    return next((name for name, known in psutil.net_if_addrs().items() if own in {one.address for one in known}), None)


def leave_group(*, together: bool) -> None:
    """Leave the process group, if this process is in one.

    Args:
        together: wait for the other ranks first; gloo may abort where one leaves while another still sends.
    """
    if dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def alone() -> Iterator[None]:
    """As if there were no other ranks, for what rank 0 alone does with a job's code.

    A metric of torchmetrics asks torch whether there are others, and would wait for them for ever.
    """
    asked = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = asked


def all_gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor of each rank, of one type and shape, in the order of the ranks."""
    if not dist.is_initialized():
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def all_gather_integers(numbers: npt.NDArray[np.int64]) -> list[int]:
    """The whole numbers of all ranks, in the order of the ranks."""
    sizes = [int(size) for size in all_gather(torch.tensor([len(numbers)]))]
    padded = torch.zeros(max(sizes), dtype=torch.int64)
    padded[: len(numbers)] = torch.from_numpy(numbers.copy())
    return [number for part, size in zip(all_gather(padded), sizes, strict=True) for number in part[:size].tolist()]


def all_gather_lines(text: str) -> list[str]:
    """A line of text of each rank, in the order of the ranks."""
    numbers = np.frombuffer(f"{text}\n".encode(), np.uint8).astype(np.int64)
    return bytes(all_gather_integers(numbers)).decode().splitlines()


def all_gather_named(named: Mapping[str, torch.Tensor], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The tensors of each rank by name, on the device, in the order of the ranks; they may differ in number, type and shape.

    What they are goes ahead, then their bytes in one message.
    """
    if not dist.is_initialized():
        return [dict(named)]
    headers = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in named.items()]
    told = [json.loads(line) for line in all_gather_lines(json.dumps(headers))]
    own = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in named.values()]
    sizes = [[math.prod(shape) * getattr(torch, dtype).itemsize for _, dtype, shape in headers] for headers in told]
    padded = torch.zeros(max(map(sum, sizes)), dtype=torch.uint8, device=device)
    if own:
        torch.cat(own, out=padded[: sum(map(len, own))])
    found = []
    for headers, lengths, part in zip(told, sizes, all_gather(padded), strict=True):
        # Copies begin where any type may.
        pieces = [piece.clone() for piece in torch.split(part[: sum(lengths)], lengths)] if lengths else []
        kinds = [(name, getattr(torch, dtype), shape) for name, dtype, shape in headers]
        found.append({name: piece.view(dtype).view(shape) for piece, (name, dtype, shape) in zip(pieces, kinds, strict=True)})
    return found


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of rank 0, such as running statistics, as DDP does before each forward pass."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
