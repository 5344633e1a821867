"""What of a model and of batches is looked at in a trial: sizes, names, shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raymill.data.order import BatchSharding, num_batches, shard_bounds
from raymill.errors import Problem

MOST_NAMES = 3


def batch_sizes(sharding: BatchSharding) -> Sequence[int]:
    """Rows of the shards of a split's batches, each number once, most first: of the first batch and of the last."""
    last = num_batches(sharding.num_rows, sharding.batch_rows) - 1
    sizes: set[int] = set()
    for batch in (0, last):
        sizes |= {int(size) for size in np.diff(shard_bounds(sharding.batch_size(batch), sharding.num_shards)) if size}
    return sorted(sizes, reverse=True)


def tensors(model: nn.Module) -> list[tuple[str, nn.Parameter | None, torch.Size]]:
    """What a checkpoint and the optimizers hold of a model: which parameters by name, and which buffers of which shape."""
    parameters = [(name, parameter, parameter.shape) for name, parameter in model.named_parameters()]
    return [*parameters, *((name, None, buffer.shape) for name, buffer in model.named_buffers())]


def all_finite(batch: Any) -> bool:
    """Whether no number in a batch is NaN or infinite."""
    if isinstance(batch, torch.Tensor):
        return not batch.is_floating_point() or bool(torch.isfinite(batch).all())
    if isinstance(batch, dict):
        return all(map(all_finite, batch.values()))
    return not isinstance(batch, list | tuple) or all(map(all_finite, batch))


def misfit(model: nn.Module, weights: Path, field: str) -> Problem | None:
    """How the weights that a run is to begin with differ from those of its model, by name and shape.

    Args:
        weights: their safetensors file; only its header is read.
        field: of the job, which the problem is said of.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError):
        # Damaged: the run itself passes it over and takes the one before.
        return None
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differ = [f"{name} {saved.get(name, 'missing')}" for name in {**built, **saved} if saved.get(name) != built.get(name)]
    if not differ:
        return None
    names = [one.split(" ")[0] for one in differ[:MOST_NAMES]]
    expected = "what build() makes: " + ", ".join(f"{name} {built.get(name, 'missing')}" for name in names)
    more = f" and {len(differ) - MOST_NAMES} more" if len(differ) > MOST_NAMES else ""
    fix = "Let build() make that model; or name it under `inputs:` and take from it in build() what fits."
    return Problem(field, f"weights {', '.join(differ[:MOST_NAMES])}{more}", expected, fix)
