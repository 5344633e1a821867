"""The training state of one worker: built from the seed, taken to plain values, put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from raymill.checkpoint.snapshot import Snapshot, Tensors, as_plain, from_plain
from raymill.errors import CheckpointError
from raymill.own_code import contracts
from raymill.parallel.ddp import DistributedObjective
from raymill.training.assembly import Job, WorkerContext
from raymill.training.optimizers import make_optimizer, make_schedule, optimizer_spec
from raymill.training.seeds import FIRST_WEIGHTS, seed_everything


@dataclass
class TrainState:
    """The run at one moment.

    Attributes:
        model: the model itself, not a wrapper.
        objectives: per objective, in the task's order, what is trained.
        optimizers: objective -> its optimizer.
        schedules: objective -> its learning-rate schedule, where there is one.
        position: rows trained on since the start of the job.
        rows_used: the same, counted from what ranks really received, less what was skipped.
        rows_skipped: rows not trained on: bad ones, and those of batches that spoiled the numbers.
        best: the best value of the checkpoint metric so far.
        best_by: that metric, and whether more or less of it is better.
        metrics: the last evaluation.
    """

    model: nn.Module
    objectives: Sequence[DistributedObjective]
    optimizers: Mapping[str, Optimizer]
    schedules: Mapping[str, lr_scheduler.LRScheduler]
    position: int = 0
    rows_used: int = 0
    rows_skipped: int = 0
    best: float | None = None
    best_by: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


def build_state(job: Job, context: WorkerContext) -> TrainState:
    """The state before the first step: the same weights on every rank, from the seed alone."""
    torch.set_num_threads(job.plan.threads)
    seed_everything(job.spec.loop.seed, FIRST_WEIGHTS)
    model = contracts.build(job.task).to(context.device)
    objectives = contracts.objectives(job.task, model)
    names = [objective.name for objective in objectives]
    loop = job.spec.loop
    distributed = [
        DistributedObjective(model, objective, loop.precision, context.device, strict=loop.strict) for objective in objectives
    ]
    optimizers = {one.name: make_optimizer(optimizer_spec(job.spec, one.objective.name, names), one) for one in distributed}
    schedules = {}
    for name, optimizer in optimizers.items():
        schedule = make_schedule(job.spec, optimizer, job.plan.total_steps)
        if schedule is not None:
            schedules[name] = schedule
    best_by = f"{job.spec.checkpoint.mode} {job.spec.checkpoint.metric}"
    return TrainState(model, distributed, optimizers, schedules, best_by=best_by)


def broken_weights(model: nn.Module) -> list[str]:
    """The names of the parameters that hold NaN or infinite numbers. One device synchronisation, unless there are any."""
    named = list(model.named_parameters())
    if not named:
        return []
    finite = torch.stack([torch.isfinite(parameter).all() for _, parameter in named])
    if bool(finite.all()):
        return []
    return [name for (name, _), good in zip(named, finite.tolist(), strict=True) if not good]


def capture(state: TrainState, step: int) -> Snapshot:
    """Copy the state to the CPU."""
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for objective in state.objectives:
        name = objective.name
        saved = state.optimizers[name].state_dict()
        groups[name] = saved["param_groups"]
        for index, values in saved["state"].items():
            for value_name, value in values.items():
                path = f"{name}/{objective.names[index]}/{value_name}"
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
        "best_by": state.best_by,
        "metrics": dict(state.metrics),
        "optimizer_groups": as_plain(groups),
        "optimizer_numbers": as_plain(numbers),
        "schedules": {name: as_plain(schedule.state_dict()) for name, schedule in state.schedules.items()},
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
    for objective in state.objectives:
        name = objective.name
        by_index: dict[int, dict[str, Any]] = {}
        for index, parameter in enumerate(objective.names):
            prefix = f"{name}/{parameter}/"
            found = {path.removeprefix(prefix): value for path, value in snapshot.optimizer.items() if path.startswith(prefix)}
            plain = record["optimizer_numbers"]
            found |= {path.removeprefix(prefix): from_plain(plain[path]) for path in plain if path.startswith(prefix)}
            if found:
                by_index[index] = found
        state.optimizers[name].load_state_dict({"state": by_index, "param_groups": from_plain(record["optimizer_groups"][name])})
    for name, schedule in state.schedules.items():
        schedule.load_state_dict(from_plain(record["schedules"][name]))
    state.position, state.rows_used, state.rows_skipped = record["position"], record["rows_used"], record["rows_skipped"]
    # Another metric may have been chosen for what is left; a record of an older raymill does not name its own.
    same = record.get("best_by", state.best_by) == state.best_by
    state.best, state.metrics = record["best"] if same else None, dict(record["metrics"])
