"""Each call of a task's own code, and whether what it gives is what it must give. A run and its preflight call the same."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from raymill.errors import InputError
from raymill.own_code import seams
from raymill.own_code.seams import calling, wrong
from raymill.own_code.traces import describe
from raymill.task import Batch, Column, Features, Kept, Loss, Now, Objective, OwnOptimizer, Picture, Rows, Task, Total


def build(task: Task) -> nn.Module:
    """The task's model.

    Raises:
        InputError: what `build` returned is none, or holds state that a checkpoint cannot.
    """
    with calling(seams.BUILD):
        model = task.build()
    if not isinstance(model, nn.Module):
        raise wrong(seams.BUILD, task.build, describe(model), "Let build() return the model.")
    if odd := [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]:
        fix = "Return a tensor from get_extra_state(), or keep it in a buffer (register_buffer): a checkpoint holds tensors."
        raise wrong(seams.BUILD, task.build, f"a model whose state {odd[0]!r} is no tensor", fix)
    return model


def to_device(task: Task, model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device, and with it what modules the task keeps beside it, such as a teacher."""
    for beside in vars(task).values():
        if isinstance(beside, nn.Module):
            beside.to(device)
    return model.to(device)


def objectives(task: Task, model: nn.Module) -> list[Objective]:
    """The task's objectives for its model.

    Raises:
        InputError: there are none, two have one name, or one names what the model lacks or has no weight to train.
    """
    with calling(seams.OBJECTIVES):
        given = task.objectives()
    found = list(given) if isinstance(given, Sequence) else []
    if not found or not all(isinstance(one, Objective) for one in found):
        raise wrong(seams.OBJECTIVES, task.objectives, describe(given))
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise wrong(seams.OBJECTIVES, task.objectives, f"objectives named {names}", "Give each objective a name of its own.")
    for one in found:
        if one.weight and one.features:
            both = f"objective {one.name!r} with weight and features"
            raise wrong(seams.OBJECTIVES, task.objectives, both, "Weigh the rows in the loss, which has the features of all.")
        _look_for_weights(task, model, one)
    return found


def _look_for_weights(task: Task, model: nn.Module, objective: Objective) -> None:
    modules = dict(model.named_children())
    if missing := [name for name in objective.trains if name not in modules]:
        found = f"objective {objective.name!r} that trains {missing}"
        fix = f"Name submodules of {type(model).__name__}: {', '.join(modules) or 'it has none'}."
        raise wrong(seams.OBJECTIVES, task.objectives, found, fix)
    trained = [modules[name] for name in objective.trains] or [model]
    parameters = [parameter for module in trained for parameter in module.parameters()]
    if not any(parameter.requires_grad for parameter in parameters):
        counted = f"{len(parameters)} parameters, none of which requires a gradient" if parameters else "no parameters"
        found = f"{counted} for objective {objective.name!r} to train"
        raise wrong(seams.BUILD, task.build, found, "Let build() leave something to train, and Objective(trains=...) name it.")


MAIN = "loss"
"""The name of what is minimised, in a mapping that a loss returns."""

ENGINES_OWN = re.compile(r"gradient_norm|learning_rate(_\d+)?")
"""What the engine itself logs of an objective."""


def metric_name(objective: str, quantity: str) -> str:
    """How a quantity of a step is logged: plain for the objective called "loss", "name_quantity" for others."""
    return quantity if objective == "loss" else f"{objective}_{quantity}"


@dataclass(frozen=True)
class Measured:
    """What a loss gave.

    Attributes:
        loss: a scalar, with its graph.
        parts: name -> a scalar to be logged, without one.
    """

    loss: torch.Tensor
    parts: Mapping[str, torch.Tensor]

    def values(self, parts: Sequence[str]) -> torch.Tensor:
        """The loss and its parts in this order, [1 + num_parts], float64."""
        return torch.stack([self.loss.detach().double(), *(self.parts[name] for name in parts)])


@dataclass(frozen=True)
class CheckedLoss:
    """An objective's loss, held against what a loss must be.

    Attributes:
        own: the job's own function.
        takes_now: whether it has a third parameter, for where the run is.
    """

    own: Loss
    takes_now: bool

    def __call__(self, model: nn.Module, batch: Batch, now: Now | None) -> Measured:
        """The loss of a batch, or of the features of a global batch.

        Raises:
            InputError: it is no scalar tensor, no weight has a gradient of it, or a part of it is no number or has no name.
        """
        with calling(seams.LOSS, batch):
            given = self.own(model, batch, now) if self.takes_now else self.own(model, batch)  # type: ignore[call-arg, arg-type]
        named = given if isinstance(given, Mapping) else {MAIN: given}
        if MAIN not in named:
            raise wrong(seams.LOSS, self.own, describe(given), f"Name what is minimised {MAIN!r}.", batch)
        found = named[MAIN]
        if not isinstance(found, torch.Tensor):
            raise wrong(seams.LOSS, self.own, describe(found), "Let the loss return the tensor that it computes.", batch)
        if found.ndim:
            found_shape = f"a tensor of shape {tuple(found.shape)}"
            raise wrong(seams.LOSS, self.own, found_shape, "Return its mean: loss.mean().", batch)
        if torch.is_grad_enabled() and not found.requires_grad:
            fix = "Compute it from the model's output, without detach(), item() or no_grad(), and do not freeze all weights."
            raise wrong(seams.LOSS, self.own, "a tensor that no weight has a gradient of", fix, batch)
        return Measured(found, {name: self._part(name, value, found.device) for name, value in named.items() if name != MAIN})

    def _part(self, name: str, value: Any, device: torch.device) -> torch.Tensor:
        if not isinstance(name, str) or not name or ENGINES_OWN.fullmatch(name):
            fix = "Give it a name that the engine does not log itself."
            raise wrong(seams.LOSS, self.own, f"a part named {name!r}", fix)
        number = torch.as_tensor(value) if isinstance(value, torch.Tensor | np.number | int | float) else None
        if number is None or number.ndim or number.is_complex():
            raise wrong(seams.LOSS, self.own, f"the part {name!r}: {describe(value)}", "Let each part be one number: its mean.")
        return number.detach().to(device, torch.float64)


def checked_loss(objective: Objective) -> CheckedLoss:
    """An objective's loss, held against what it must be whenever it is called."""
    return CheckedLoss(objective.loss, _takes_now(objective.loss))


def _takes_now(function: Callable[..., Any]) -> bool:
    return len(inspect.signature(function).parameters) > 2


def other_parts(objective: Objective, found: Iterable[str], expected: Iterable[str]) -> InputError:
    """A loss named other parts than it did before."""
    said = f"parts {sorted(found)} where it gave {sorted(expected)} before, on this rank or another"
    return wrong(seams.LOSS, objective.loss, said, "Name the same parts for every batch.")


def weight(objective: Objective, batch: Batch) -> float:
    """How much a batch counts in an objective that weighs its batches.

    Raises:
        InputError: it is no number, not finite or negative.
    """
    assert objective.weight is not None
    with calling(seams.WEIGHT, batch):
        given = objective.weight(batch)
    single = isinstance(given, torch.Tensor | np.ndarray) and given.ndim == 0
    if not (single or isinstance(given, np.number | int | float)):
        raise wrong(seams.WEIGHT, objective.weight, describe(given), given=batch)
    if not 0 <= float(given) < math.inf:
        raise wrong(seams.WEIGHT, objective.weight, str(float(given)), given=batch)
    return float(given)


def features(objective: Objective, model: nn.Module, batch: Batch, now: Now | None) -> Features:
    """What an objective's loss over the global batch needs of a batch.

    Raises:
        InputError: it is no tensor with a dimension, nor several by name, or no weight has a gradient of any.
    """
    own = objective.features
    assert own is not None
    with calling(seams.FEATURES, batch):
        given = own(model, batch, now) if _takes_now(own) else own(model, batch)
    tensors = list(given.values()) if isinstance(given, Mapping) else [given]
    if not tensors or not all(isinstance(one, torch.Tensor) and one.ndim for one in tensors):
        raise wrong(seams.FEATURES, own, describe(given), "Return tensors, each with a row for each that it is of.", batch)
    if torch.is_grad_enabled() and not any(one.requires_grad for one in tensors):
        fix = "Compute one of them by the model, without detach() or no_grad(), and do not freeze all weights."
        raise wrong(seams.FEATURES, own, "tensors that no weight has a gradient of", fix, batch)
    return given


def joined_features(objective: Objective, parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Features of several batches, one after the other; there is at least one.

    Raises:
        InputError: they differ in their names, their type or in the shape of a row's.
    """
    first, *others = [{name: (tensor.dtype, tensor.shape[1:]) for name, tensor in part.items()} for part in parts]
    if other := next((kinds for kinds in others if kinds != first), None):
        found = f"{_kinds(other)} for a row of one batch, {_kinds(first)} of another"
        raise wrong(seams.FEATURES, objective.features, found, "Give each batch features of one kind, whatever its rows are.")
    return {name: torch.cat([part[name] for part in parts]) for name in first}


def _kinds(kinds: Mapping[str, tuple[torch.dtype, torch.Size]]) -> str:
    return ", ".join(f"{name!r} {str(dtype).removeprefix('torch.')} {[*shape]}" for name, (dtype, shape) in kinds.items())


HOOKS = {"after_step": seams.AFTER_STEP, "after_epoch": seams.AFTER_EPOCH}
"""What a task may do to its model between steps."""


def overrides(task: Task, name: str) -> bool:
    """Whether the task has a method of its own by this name, where `Task` has one already."""
    return getattr(type(task), name) is not getattr(Task, name)


def optimizers(task: Task, model: nn.Module, objectives: Sequence[str], total_steps: int) -> dict[str, list[OwnOptimizer]] | None:
    """The optimizers that the task makes itself, by objective; None: it makes none, so that they are the job's.

    Raises:
        InputError: something of it is none, or they are of other objectives.
    """
    if not overrides(task, "optimizers"):
        return None
    with calling(seams.OPTIMIZERS):
        given = task.optimizers(model, total_steps)
    if not isinstance(given, Mapping) or set(given) != set(objectives):
        found = f"optimizers for {sorted(given)}" if isinstance(given, Mapping) else describe(given)
        raise wrong(seams.OPTIMIZERS, task.optimizers, found, f"Give some for each of {sorted(objectives)}.")
    for name, own in given.items():
        if not isinstance(own, Sequence) or not own or not all(isinstance(one, OwnOptimizer) for one in own):
            raise wrong(seams.OPTIMIZERS, task.optimizers, f"{name!r}: {describe(own)}")
    return {name: list(own) for name, own in given.items()}


def hook(task: Task, name: str, model: nn.Module, now: Now) -> None:
    """Let the task change the values of its model's weights and buffers, by one of the HOOKS."""
    with torch.no_grad(), calling(HOOKS[name]):
        getattr(task, name)(model, now)


def collated(collate: Callable[[Rows], Batch], rows: Rows) -> Batch:
    """The batch that `collate` makes of rows.

    Raises:
        InputError: it made none.
    """
    with calling(seams.COLLATE, rows):
        batch = collate(rows)
    if batch is None:
        raise wrong(seams.COLLATE, collate, "None", "Let collate return the batch.", rows)
    return batch


def evaluate(task: Task, model: nn.Module, batch: Batch, num_rows: int) -> Mapping[str, torch.Tensor | Total | Kept]:
    """What the task measures of a batch of `num_rows` rows.

    Raises:
        InputError: something of it is neither one number per row, nor a Total, nor kept of each row.
    """
    with calling(seams.EVALUATE, batch):
        measured = task.evaluate(model, batch)
    if not isinstance(measured, Mapping) or not all(isinstance(name, str) for name in measured):
        raise wrong(seams.EVALUATE, task.evaluate, describe(measured), "Return a dict of names and values.", batch)
    for name, value in measured.items():
        if isinstance(value, Kept):
            if len(value.value) != num_rows:
                found = f"{name!r}: Kept of {len(value.value)} values for {num_rows} rows"
                raise wrong(seams.EVALUATE, task.evaluate, found, "Keep one value for each row, in their order.", batch)
            continue
        tensor = value.value if isinstance(value, Total) else value
        fits = isinstance(tensor, torch.Tensor) and (isinstance(value, Total) or tensor.shape == (num_rows,))
        if not fits or tensor.is_complex():
            fix = "Give one value per row, not their mean, such as reduction='none'; or Total(tensor) for a sum over rows."
            found = f"{name!r}: {describe(tensor)} for {num_rows} rows"
            raise wrong(seams.EVALUATE, task.evaluate, found, fix, batch)
    return measured


def conclude(task: Task, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> dict[str, float | Picture]:
    """What the task makes of what was kept and summed: numbers and pictures.

    Raises:
        InputError: something of it is neither.
    """
    with calling(seams.CONCLUDE, kept):
        found = task.conclude(kept, totals)
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise wrong(seams.CONCLUDE, task.conclude, describe(found), "Return a dict of names and values.", kept)
    concluded: dict[str, float | Picture] = {}
    for name, value in found.items():
        try:
            concluded[name] = value if isinstance(value, Picture) else float(value)
        except (TypeError, ValueError) as error:
            raise wrong(seams.CONCLUDE, task.conclude, f"{name!r}: {describe(value)}", "", kept) from error
    return concluded


def pictures(task: Task, model: nn.Module, now: Now) -> dict[str, Picture]:
    """The task's pictures of its model.

    Raises:
        InputError: something of it is none.
    """
    with calling(seams.PICTURES):
        found = task.pictures(model, now)
    if not isinstance(found, Mapping) or not all(isinstance(one, Picture) for one in found.values()):
        raise wrong(seams.PICTURES, task.pictures, describe(found), "Return a dict of names and raymill.task.Picture.")
    return dict(found)


def inputs(task: Task, batch: Batch) -> tuple[torch.Tensor, ...]:
    """The arguments of the model's forward pass.

    Raises:
        InputError: there are none, or something else than tensors.
    """
    if not overrides(task, "inputs"):
        fix = "Define inputs(batch) in the task, or let the job say `register.export: try`."
        raise wrong(seams.INPUTS, type(task), "a task that exports its model and has no inputs(batch)", fix)
    with calling(seams.INPUTS, batch):
        given: Any = task.inputs(batch)
    if not isinstance(given, tuple) or not given or not all(isinstance(value, torch.Tensor) for value in given):
        fix = "Return a tuple, such as (batch['image'],)."
        raise wrong(seams.INPUTS, task.inputs, describe(given), fix, batch)
    return given


def predict(task: Task, model: nn.Module, batch: Batch, num_rows: int) -> Rows:
    """What the task says of a batch of `num_rows` rows, as columns: `predict`, or else `forward` on `inputs`.

    Returns:
        name -> an array [num_rows, ...], or a list with an array of any shape, a `str` or `bytes` per row.

    Raises:
        InputError: the task defines neither, or something of it has no value for each row.
    """
    own = overrides(task, "predict")
    if not own and not overrides(task, "inputs"):
        fix = "Define predict(model, batch) or inputs(batch) in the task, or leave out `register:`."
        raise wrong(
            seams.PREDICT, type(task), "a task that is to be asked and has neither predict(model, batch) nor inputs(batch)", fix
        )
    given = batch if own else inputs(task, batch)
    with torch.no_grad(), calling(seams.PREDICT if own else seams.FORWARD, given):
        said: Any = task.predict(model, batch) if own else _named(model(*given))
    function, fix = (task.predict, "") if own else (type(model), "Define predict(model, batch) in the task.")
    if not isinstance(said, Mapping) or not said or not all(isinstance(name, str) for name in said):
        raise wrong(seams.PREDICT, function, describe(said), fix or "Return a dict of names and values.", batch)
    rows: Rows = {}
    for name, value in said.items():
        column = _column(value)
        if column is None or len(column) != num_rows:
            found = f"{name!r}: {describe(value)} for {num_rows} rows"
            raise wrong(seams.PREDICT, function, found, fix or "Give one value for each row, in their order.", batch)
        rows[name] = column
    return rows


def _named(output: Any) -> Any:
    """What a forward pass returns, by name."""
    if isinstance(output, Mapping):
        return output
    if isinstance(output, list | tuple):
        return {f"output_{number}": value for number, value in enumerate(output)}
    return {"output": output}


def _column(value: Any) -> Column | None:
    """The values of all rows as they travel; None where they cannot be."""
    if not isinstance(value, list | tuple):
        array = _array(value)
        return array if array is not None and array.ndim else None
    if all(isinstance(one, str) for one in value) or all(isinstance(one, bytes) for one in value):
        return list(value)
    arrays = [array for one in value if (array := _array(one)) is not None]
    if len(arrays) < len(value):
        return None
    if not any(array.ndim for array in arrays):
        return np.array(arrays)
    return arrays if len({(array.dtype, array.ndim) for array in arrays}) == 1 else None


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values on the CPU, without its graph. Of a type that numpy lacks (bfloat16) they become float32."""
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy())


def _array(value: Any) -> np.ndarray | None:
    """Numbers as an array; None where there are others, or none."""
    if isinstance(value, torch.Tensor):
        value = as_array(value)
    array = np.asarray(value) if isinstance(value, np.ndarray | np.generic | int | float) else None
    return array if array is not None and array.dtype.kind in "biuf" else None
