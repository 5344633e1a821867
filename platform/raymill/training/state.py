"""The training state of one worker: built from the seed, taken to plain values, put back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from raymill.checkpoint.snapshot import Snapshot, Tensors, as_plain, from_plain
from raymill.data.order import num_batches
from raymill.data.seeds import FIRST_WEIGHTS, seed_everything
from raymill.errors import CheckpointError
from raymill.optim.average import WeightAverage
from raymill.optim.optimizers import GroupOptimizer, make_optimizers
from raymill.own_code import contracts
from raymill.parallel.ddp import DistributedObjective
from raymill.parallel.gradients import strategy_of
from raymill.parallel.precision import LossScale, use_deterministic_algorithms
from raymill.parallel.strategy import Strategy
from raymill.training.assembly import Job, WorkerContext
from raymill.training.early_stopping import Patience

TRAINED = "@trained"
"""Beside an average, the weights that are trained, among the tensors of a checkpoint's optimizers."""


@dataclass
class TrainState:
    """The run at one moment.

    Attributes:
        model: the model itself, not a wrapper.
        objectives: per objective, in the task's order, what is trained.
        optimizers: objective -> its optimizers, each over some of its parameters, with their learning-rate schedules.
        position: rows trained on since the start of the job.
        evaluated: whether the evaluations that are due at the position are done too.
        ended: why the training ends there, before the job's last step; None: it does not.
        worked_s: seconds of work, all attempts together, as of the last save; 0 where there is no limit to them.
        patience: how long the metric of early stopping has not improved.
        rows_used: the same, counted from what ranks really received, less what was skipped.
        rows_skipped: rows not trained on: bad ones, and those of batches that spoiled the numbers.
        best: the best value of the checkpoint metric so far.
        best_by: that metric, and whether more or less of it is better.
        metrics: the last evaluation of each split.
        loss_scales: objective -> what its loss is multiplied by.
        average: of the weights, where the job asks for one.
        modes: each module of the model, and whether `build` left it in training mode.
    """

    model: nn.Module
    objectives: Sequence[DistributedObjective]
    optimizers: Mapping[str, Sequence[GroupOptimizer]]
    position: int = 0
    evaluated: bool = True
    ended: str | None = None
    worked_s: float = 0.0
    patience: Patience = field(default_factory=Patience)
    rows_used: int = 0
    rows_skipped: int = 0
    best: float | None = None
    best_by: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    loss_scales: dict[str, LossScale] = field(default_factory=lambda: defaultdict(LossScale))
    average: WeightAverage | None = None
    modes: Sequence[tuple[nn.Module, bool]] = field(init=False)

    def __post_init__(self) -> None:
        """Note the modes."""
        self.modes = [(module, module.training) for module in self.model.modules()]

    @property
    def strategy(self) -> Strategy:
        """How the model is spread over the ranks; one for all objectives."""
        return self.objectives[0].strategy

    def restore_modes(self) -> None:
        """Put each module into the mode in which `build` left it: a trunk in eval mode keeps its statistics."""
        for module, training in self.modes:
            module.training = training


def build_state(job: Job, context: WorkerContext) -> TrainState:
    """The state before the first step: the same weights on every rank, from the seed alone."""
    torch.set_num_threads(job.plan.threads)
    if job.spec.loop.deterministic:
        use_deterministic_algorithms(context.device)
    seed_everything(job.spec.loop.seed, FIRST_WEIGHTS)
    model = contracts.to_device(job.task, contracts.build(job.task), context.device)
    objectives = contracts.objectives(job.task, model)
    names = [objective.name for objective in objectives]
    loop = job.spec.loop
    distributed = [
        DistributedObjective(model, objective, loop.precision, context.device, strategy_of(strict=loop.strict))
        for objective in objectives
    ]
    for one in distributed:
        one.warm_up()
    length = job.plan.total_steps, num_batches(job.plan.total_steps, job.plan.steps_per_epoch)
    own = contracts.optimizers(job.task, model, names, job.plan.total_steps)
    optimizers = {one.name: make_optimizers(job.spec, one, names, *length, own) for one in distributed}
    average = WeightAverage(loop.average, model) if loop.average else None
    best_by = f"{job.spec.checkpoint.mode} {job.spec.checkpoint.metric}"
    scales = {name: LossScale.of(loop.precision) for name in names}
    return TrainState(model, distributed, optimizers, best_by=best_by, loss_scales=scales, average=average)


def final_weights(state: TrainState) -> Mapping[str, torch.Tensor]:
    """The weights and buffers that a run gives: evaluated, hashed, saved as its weights, registered. All ranks take part."""
    held = {**state.model.state_dict(), **(state.average.averages() if state.average else {})}
    return {name: state.strategy.whole(tensor) for name, tensor in held.items()}


def broken_weights(model: nn.Module) -> list[str]:
    """The names of the parameters that hold NaN or infinite numbers. One device synchronisation, unless there are any."""
    named = list(model.named_parameters())
    if not named:
        return []
    finite = torch.stack([torch.isfinite(parameter).all() for _, parameter in named])
    if bool(finite.all()):
        return []
    return [name for (name, _), good in zip(named, finite.tolist(), strict=True) if not good]


def capture(state: TrainState, step: int, *, keep: bool = True) -> Snapshot:
    """The state as it is saved. All ranks take part, since each may hold a part of it.

    Args:
        keep: copy it to the CPU, so that training may go on; without, it is not to be used.
    """
    copied = _copy if keep else _as_it_is
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    param_groups: dict[str, Any] = {}
    schedules: dict[str, Any] = {}
    for name, place, group in _groups(state):
        saved = group.optimizer.state_dict()
        param_groups.setdefault(name, []).extend(saved["param_groups"])
        for index, values in saved["state"].items():
            for value_name, value in values.items():
                path = f"{name}/{group.names[index]}/{value_name}"
                if isinstance(value, torch.Tensor):
                    tensors[path] = copied(state.strategy.whole(value))
                else:
                    numbers[path] = value
        schedules |= group.schedule.states(place)
    if state.average:
        named = state.model.named_parameters()
        tensors |= {f"{TRAINED}/{name}": copied(state.strategy.whole(parameter)) for name, parameter in named}
    weights = {name: copied(tensor) for name, tensor in final_weights(state).items()}
    record = {
        "position": state.position,
        "evaluated": state.evaluated,
        "ended": state.ended,
        "worked_s": state.worked_s,
        "patience": asdict(state.patience),
        "step": step,
        "rows_used": state.rows_used,
        "rows_skipped": state.rows_skipped,
        "best": state.best,
        "best_by": state.best_by,
        "metrics": dict(state.metrics),
        "loss_scales": {name: asdict(scale) for name, scale in state.loss_scales.items()},
        "num_averaged": state.average.num_averaged if state.average else 0,
        "optimizer_groups": as_plain(param_groups),
        "optimizer_numbers": as_plain(numbers),
        "schedules": schedules,
    }
    return Snapshot(weights, tensors, record)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def restore(state: TrainState, snapshot: Snapshot, num_steps: int, num_epochs: int) -> None:
    """Put a snapshot back into a freshly built state.

    One that a run begins with may lack what the optimizers and the average have; there they are as they were built, and
    schedules are taken to the step at which it was made.

    Args:
        num_steps: of the job that are done by then.
        num_epochs: likewise, whole ones.

    Raises:
        CheckpointError: when the model is not the one that was saved.
    """
    part, held = state.strategy.part, state.model.state_dict()
    weights = {name: part(whole, held[name]) if name in held else whole for name, whole in snapshot.weights.items()}
    try:
        state.model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint does not fit the model: {error}. Restore the code and the `model:` values of the run."
        ) from error
    record = snapshot.record
    kept = {path.removeprefix(f"{TRAINED}/"): value for path, value in snapshot.optimizer.items() if path.startswith(TRAINED)}
    trained = {name: part(whole, held[name]) for name, whole in kept.items()}
    if state.average:
        saved = {name: weight.detach().clone() for name, weight in state.model.named_parameters()}
        state.average.restore(saved | trained, record["num_averaged"])
    elif trained:
        state.model.load_state_dict(trained, strict=False)
    saved_groups = {name: iter(from_plain(groups)) for name, groups in record["optimizer_groups"].items()}
    for name, place, group in _groups(state):
        by_index: dict[int, dict[str, Any]] = {}
        for index, (parameter, own_part) in enumerate(zip(group.names, group.parameters, strict=True)):
            prefix = f"{name}/{parameter}/"
            wholes = {path.removeprefix(prefix): value for path, value in snapshot.optimizer.items() if path.startswith(prefix)}
            found: dict[str, Any] = {value_name: part(whole, own_part) for value_name, whole in wholes.items()}
            plain = record["optimizer_numbers"]
            found |= {path.removeprefix(prefix): from_plain(plain[path]) for path in plain if path.startswith(prefix)}
            if found:
                by_index[index] = found
        own = group.optimizer.state_dict()["param_groups"]
        if name in saved_groups:
            own = [next(saved_groups[name]) for _ in own]
        group.optimizer.load_state_dict({"state": by_index, "param_groups": own})
        if record["schedules"]:
            group.schedule.restore(place, record["schedules"])
        else:
            group.schedule.advance_to(num_steps, num_epochs)
    state.loss_scales |= {name: LossScale(**scale) for name, scale in record.get("loss_scales", {}).items()}
    state.evaluated, state.ended = record.get("evaluated", True), record.get("ended")
    state.worked_s, state.patience = record.get("worked_s", 0.0), Patience(**record.get("patience", {}))
    state.position, state.rows_used, state.rows_skipped = record["position"], record["rows_used"], record["rows_skipped"]
    # Another metric may have been chosen for what is left; a record of an older raymill does not name its own.
    same = record.get("best_by", state.best_by) == state.best_by
    state.best, state.metrics = record["best"] if same else None, dict(record["metrics"])


def _groups(state: TrainState) -> Iterator[tuple[str, str, GroupOptimizer]]:
    """Each optimizer with its objective's name, and with a name of its own: the same, numbered from the second on."""
    for name, groups in state.optimizers.items():
        for number, group in enumerate(groups):
            yield name, f"{name}/{number}" if number else name, group
