"""How rows become a batch of tensors, where the pipeline does not say otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raymill.task import Column, Rows


def as_batch(rows: Rows) -> dict[str, Any]:
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
