"""Rows become a batch of tensors on the worker's device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raymill.data.reader import transformed
from raymill.data.rows import ROW_ID, num_rows
from raymill.data.seeds import COLLATE, TRANSFORM, seed_everything
from raymill.own_code import contracts
from raymill.task import PREDICT, Batch, Column, Pipeline, Rows, Schema


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


def asked_schema(pipeline: Pipeline) -> Schema:
    """The columns of rows that a model is asked about."""
    return {name: field for name, field in pipeline.schema.items() if name not in (pipeline.targets or ())}


def prediction_rows(pipeline: Pipeline, rows: Rows, seed: int = 0) -> Rows:
    """Rows that a model is asked about, as collate sees them: without the answer, transformed. Seeds every generator."""
    asked = {name: column for name, column in rows.items() if name not in (pipeline.targets or ())}
    seed_everything(seed, TRANSFORM)
    changed = transformed(pipeline.transform, asked, PREDICT, np.random.Generator(np.random.Philox(key=seed)))
    return {**changed, ROW_ID: np.arange(num_rows(changed))}


def prediction_batch(pipeline: Pipeline, rows: Rows) -> Batch:
    """The same as a batch."""
    changed = prediction_rows(pipeline, rows)
    seed_everything(0, COLLATE)
    return contracts.collated(pipeline.collate or default_collate, changed)


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
