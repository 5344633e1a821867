"""Rows become a batch of tensors on the worker's device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raymill.task import Batch, Column, Rows


def default_collate(rows: Rows) -> dict[str, Any]:
    """The default collate: a tensor of each array column, a list of tensors of a list of arrays, other lists as they are."""
    return {name: _as_tensors(column) for name, column in rows.items()}


def _as_tensors(column: Column) -> Any:
    def tensor(array: np.ndarray) -> torch.Tensor:
        # A copy in memory of torch's own: an unpacked array is a read-only view of shared memory, and how a kernel rounds
        # depends on the alignment of its input, which must not hang on where in a window a batch begins.
        return torch.tensor(array if array.flags.c_contiguous else array.copy())

    if isinstance(column, np.ndarray):
        return tensor(column)
    return [tensor(value) if isinstance(value, np.ndarray) else value for value in column]


ALIGNMENT_BYTES = 64
"""What torch's CPU allocator aligns to."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it on the device; dicts, lists and tuples (named ones too) are walked, and whatever else has
    a method `to`, such as a PackedSequence, moves itself.

    To a GPU they go from pinned memory, so that the copy overlaps with what the CPU does next.

    Tensors come out aligned as torch allocates them: a matrix product rounds differently where its input starts elsewhere,
    and where a batch starts in its window must not change the weights.
    """
    if isinstance(batch, torch.Tensor):
        moved = (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
        return moved if moved.data_ptr() % ALIGNMENT_BYTES == 0 else moved.clone()
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, list | tuple):
        values = [to_device(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
