"""Each call of a task's own code, and whether what it gives is what it must give. A run and its preflight call the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from raymill.own_code import seams
from raymill.own_code.seams import calling, wrong
from raymill.own_code.traces import describe
from raymill.task import Batch, Kept, Loss, Now, Objective, Picture, Rows, Task, Total


def build(task: Task) -> nn.Module:
    """The task's model.

    Raises:
        InputError: what `build` returned is none.
    """
    with calling(seams.BUILD):
        model = task.build()
    if not isinstance(model, nn.Module):
        raise wrong(seams.BUILD, task.build, describe(model), "Let build() return the model.")
    return model


def objectives(task: Task, model: nn.Module) -> list[Objective]:
    """The task's objectives for its model; the loss of each is held against what a loss must be whenever it is called.

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
        _look_for_weights(task, model, one)
    return [replace(one, loss=checked_loss(one.loss)) for one in found]


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


@dataclass(frozen=True)
class CheckedLoss:
    """An objective's loss, held against what a loss must be.

    Attributes:
        own: the job's own function.
        takes_now: whether it has a third parameter, for where the run is.
    """

    own: Loss
    takes_now: bool

    def __call__(self, model: nn.Module, batch: Batch, now: Now | None) -> torch.Tensor:
        """The loss of a batch.

        Raises:
            InputError: it is no scalar tensor, or no weight has a gradient of it.
        """
        with calling(seams.LOSS, batch):
            found = self.own(model, batch, now) if self.takes_now else self.own(model, batch)  # type: ignore[call-arg, arg-type]
        if not isinstance(found, torch.Tensor):
            raise wrong(seams.LOSS, self.own, describe(found), "Let the loss return the tensor that it computes.", batch)
        if found.ndim:
            found_shape = f"a tensor of shape {tuple(found.shape)}"
            raise wrong(seams.LOSS, self.own, found_shape, "Return its mean: loss.mean().", batch)
        if torch.is_grad_enabled() and not found.requires_grad:
            fix = "Compute it from the model's output, without detach(), item() or no_grad(), and do not freeze all weights."
            raise wrong(seams.LOSS, self.own, "a tensor that no weight has a gradient of", fix, batch)
        return found


def checked_loss(loss: Loss) -> CheckedLoss:
    """A loss, held against what it must be; once."""
    return loss if isinstance(loss, CheckedLoss) else CheckedLoss(loss, len(inspect.signature(loss).parameters) > 2)


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
    if type(task).inputs is Task.inputs:
        raise wrong(seams.INPUTS, type(task), "a task that registers its model and has no inputs(batch)")
    with calling(seams.INPUTS, batch):
        given: Any = task.inputs(batch)
    if not isinstance(given, tuple) or not given or not all(isinstance(value, torch.Tensor) for value in given):
        fix = "Return a tuple, such as (batch['image'],)."
        raise wrong(seams.INPUTS, task.inputs, describe(given), fix, batch)
    return given
