"""Everything a resume needs: weights, buffers, optimizers, schedules, position. And nothing else.

There is no random state in it: each step seeds all generators from (seed, position, shard, objective), so randomness is a
function of where the run is, as the order of samples is.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from raymill.errors import CheckpointError, InputError, Problem
from raymill.order import key
from raymill.parallel import Wrapped
from raymill.spec import JobSpec, OptimizerSpec, ScheduleSpec

FIRST_WEIGHTS, STEP, EVALUATION = 4, 5, 6
"""Keep the random numbers of the first weights, of steps and of evaluations apart."""

Tensors = dict[str, torch.Tensor]


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from these numbers."""
    seed = key(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)


@dataclass
class TrainState:
    """The run at one moment.

    Attributes:
        model: the model itself, not a wrapper.
        wrapped: per objective, in the task's order, what is trained.
        optimizers: objective -> its optimizer.
        schedules: objective -> its learning-rate schedule, where there is one.
        position: rows trained on since the start of the job.
        rows_used: the same, counted from what ranks really received, less what was skipped.
        rows_skipped: rows not trained on: bad ones, and those of batches that spoiled the numbers.
        best: the best value of the checkpoint metric so far.
        metrics: the last evaluation.
    """

    model: nn.Module
    wrapped: Sequence[Wrapped]
    optimizers: Mapping[str, Optimizer]
    schedules: Mapping[str, lr_scheduler.LRScheduler]
    position: int = 0
    rows_used: int = 0
    rows_skipped: int = 0
    best: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def make_optimizer(spec: OptimizerSpec, wrapped: Wrapped) -> Optimizer:
    """The objective's optimizer, over its parameters."""
    return getattr(torch.optim, spec.kind)(wrapped.parameters, **spec.arguments)  # type: ignore[no-any-return]


def optimizer_spec(spec: JobSpec, objective: str, objectives: Sequence[str]) -> OptimizerSpec:
    """The optimizer of an objective.

    Raises:
        InputError: when the job names optimizers that are not the task's objectives.
    """
    if isinstance(spec.optimizer, OptimizerSpec):
        return spec.optimizer
    if set(spec.optimizer) != set(objectives):
        raise InputError(
            [
                Problem(
                    "optimizer",
                    f"optimizers for {sorted(spec.optimizer)}",
                    f"one for each objective of the task: {sorted(objectives)}",
                    "Name them so in the job file, or give one optimizer with `kind` for all.",
                )
            ]
        )
    return spec.optimizer[objective]


def make_schedule(spec: JobSpec, optimizer: Optimizer, total_steps: int) -> lr_scheduler.LRScheduler | None:
    """The learning-rate schedule of the job for one optimizer: warm-ups and parts in sequence, one step per step."""
    if spec.schedule is None:
        return None
    specs = [spec.schedule] if isinstance(spec.schedule, ScheduleSpec) else spec.schedule
    parts: list[lr_scheduler.LRScheduler] = []
    milestones: list[int] = []
    start = 0
    for part in specs:
        if part.warmup_steps:
            first = 1 / (part.warmup_steps + 1)
            parts.append(lr_scheduler.LinearLR(optimizer, start_factor=first, total_iters=part.warmup_steps))
            milestones.append(start := start + part.warmup_steps)
        steps = part.steps or max(1, total_steps - start)
        parts.append(_schedule_part(part, optimizer, steps))
        milestones.append(start := start + steps)
    if len(parts) == 1:
        return parts[0]
    with warnings.catch_warnings():
        # SequentialLR steps its parts by number, which torch itself warns about.
        warnings.simplefilter("ignore")
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=milestones[:-1])


def _schedule_part(spec: ScheduleSpec, optimizer: Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    arguments = spec.arguments
    if spec.kind.startswith("CosineAnnealingLR"):
        arguments.setdefault("T_max", steps)
    if spec.kind == "OneCycleLR" and "epochs" not in arguments:
        arguments.setdefault("total_steps", steps)
    return getattr(lr_scheduler, spec.kind)(optimizer, **arguments)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- to and from plain values


@dataclass(frozen=True)
class Snapshot:
    """A state as tensors and JSON-ready values, on the CPU, apart from the training that goes on.

    Attributes:
        weights: parameter and buffer names of the model -> tensors.
        optimizer: "objective/parameter/value" -> tensors.
        record: everything else.
    """

    weights: Tensors
    optimizer: Tensors
    record: dict[str, Any]


def capture(state: TrainState, step: int) -> Snapshot:
    """Copy the state to the CPU."""
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for wrapped in state.wrapped:
        name = wrapped.objective.name
        saved = state.optimizers[name].state_dict()
        groups[name] = saved["param_groups"]
        for place, values in saved["state"].items():
            for value_name, value in values.items():
                path = f"{name}/{wrapped.names[place]}/{value_name}"
                if isinstance(value, torch.Tensor):
                    tensors[path] = _copy(value)
                else:
                    numbers[path] = value
    weights = {name: _copy(tensor) for name, tensor in state.model.state_dict().items()}
    record = {
        "position": state.position,
        "step": step,
        "rows_used": state.rows_used,
        "rows_skipped": state.rows_skipped,
        "best": state.best,
        "metrics": dict(state.metrics),
        "optimizer_groups": _plain(groups),
        "optimizer_numbers": _plain(numbers),
        "schedules": {name: _plain(schedule.state_dict()) for name, schedule in state.schedules.items()},
    }
    return Snapshot(weights, tensors, record)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def restore(state: TrainState, snapshot: Snapshot) -> None:
    """Put a snapshot back into a freshly built state.

    Raises:
        CheckpointError: when the model is not the one that was saved.
    """
    try:
        state.model.load_state_dict(snapshot.weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint does not fit the model: {error}. Restore the code and the `model:` values of the run."
        ) from error
    record = snapshot.record
    for wrapped in state.wrapped:
        name = wrapped.objective.name
        by_place: dict[int, dict[str, Any]] = {}
        for place, parameter in enumerate(wrapped.names):
            prefix = f"{name}/{parameter}/"
            found = {path.removeprefix(prefix): value for path, value in snapshot.optimizer.items() if path.startswith(prefix)}
            plain = record["optimizer_numbers"]
            found |= {path.removeprefix(prefix): _original(plain[path]) for path in plain if path.startswith(prefix)}
            if found:
                by_place[place] = found
        state.optimizers[name].load_state_dict({"state": by_place, "param_groups": _original(record["optimizer_groups"][name])})
    for name, schedule in state.schedules.items():
        schedule.load_state_dict(_original(record["schedules"][name]))
    state.position, state.rows_used, state.rows_skipped = record["position"], record["rows_used"], record["rows_skipped"]
    state.best, state.metrics = record["best"], dict(record["metrics"])


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights and buffers, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Values of a state_dict as JSON can hold them, marking what JSON would change."""
    if isinstance(value, torch.Tensor):
        return {"__tensor__": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"__tuple__": [_plain(item) for item in value]}
    if isinstance(value, Counter):
        return {"__counter__": _plain(dict(value))}
    if isinstance(value, dict):
        if all(isinstance(name, str) for name in value):
            return {name: _plain(item) for name, item in value.items()}
        return {"__pairs__": [[_plain(name), _plain(item)] for name, item in value.items()]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"a {type(value).__name__} in an optimizer's or schedule's state cannot be saved without pickle")


def _original(value: Any) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            return torch.tensor(value["__tensor__"], dtype=getattr(torch, value["dtype"]))
        if "__tuple__" in value:
            return tuple(_original(item) for item in value["__tuple__"])
        if "__counter__" in value:
            return Counter(_original(value["__counter__"]))
        if "__pairs__" in value:
            return {_original(name): _original(item) for name, item in value["__pairs__"]}
        return {name: _original(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_original(item) for item in value]
    return value
