"""What an evaluation keeps of each row: brought together on rank 0, in the order of the split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raymill.data.rows import ROW_ID, join, pack, take, unpack
from raymill.own_code.contracts import as_array
from raymill.parallel.process_group import all_gather_integers, all_gather_lines, rank_and_world_size
from raymill.task import Column, Kept, Rows


def as_column(kept: Kept) -> Column:
    """The values of one batch on the CPU, as rows travel."""
    if isinstance(kept.value, torch.Tensor):
        return as_array(kept.value)
    return [as_array(value) if isinstance(value, torch.Tensor) else value for value in kept.value]


def gathered(parts: Sequence[Rows]) -> dict[str, Any]:
    """What all ranks have kept, in the order of row ids: name -> a tensor [num_rows, ...], or a list.

    Every rank takes part, also one that has kept nothing; on ranks other than 0 nothing comes of it.
    """
    of_ranks = _sent_to_rank_zero(parts)
    if not of_ranks:
        return {}
    rows = join(of_ranks)
    rows = take(rows, np.argsort(np.asarray(rows.pop(ROW_ID)), kind="stable"))
    return {name: _as_tensors(column) for name, column in rows.items()}


def _sent_to_rank_zero(parts: Sequence[Rows]) -> list[Rows]:
    """On rank 0, the rows of each rank that has any, in the order of ranks."""
    rank, world_size = rank_and_world_size()
    own = [dict(join(parts))] if parts else []
    if world_size == 1:
        return own
    header, buffers = pack(own[0]) if own and rank else ("", [])
    headers = all_gather_lines(header)
    sizes = all_gather_integers(np.array([len(buffers), *map(len, buffers)], np.int64))
    if rank:
        for buffer in filter(len, buffers):
            dist.send(torch.frombuffer(bytearray(buffer), dtype=torch.uint8), dst=0)
        return []
    place = 0
    for source in range(world_size):
        count = sizes[place]
        received = [_received(size, source) for size in sizes[place + 1 : place + 1 + count]]
        place += 1 + count
        if received:
            own.append(unpack(headers[source], received))
    return own


def _received(size: int, source: int) -> np.ndarray:
    """Bytes of another rank; of none, nothing is sent."""
    data = torch.empty(size, dtype=torch.uint8)
    if size:
        dist.recv(data, src=source)
    return data.numpy()


def _as_tensors(column: Column) -> Any:
    if isinstance(column, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(column))
    return [torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value for value in column]
