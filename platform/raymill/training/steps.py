"""What is left to do from a position on, in order: a pure function of the order of samples and one integer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from raymill.data.order import JobOrder, num_batches
from raymill.task import Now


@dataclass(frozen=True)
class TrainStep:
    """Train on a global batch.

    Attributes:
        epoch: in which epoch.
        batch: the batch's number in the epoch.
        position: rows trained on when it is done.
    """

    epoch: int
    batch: int
    position: int


@dataclass(frozen=True)
class TrainEnd:
    """All training rows of an epoch were trained on."""

    epoch: int
    position: int


@dataclass(frozen=True)
class EvalStep:
    """Measure a batch of the rows of a split; other fields as those of `TrainStep`."""

    split: str
    epoch: int
    batch: int
    position: int


@dataclass(frozen=True)
class EvalEnd:
    """All rows of an evaluation were measured."""

    split: str
    epoch: int
    position: int


@dataclass(frozen=True)
class SaveStep:
    """Save: at an epoch's end, and before and behind the evaluations that are due at a position.

    Attributes:
        evaluated: whether there is none, or all are done.
    """

    epoch: int
    position: int
    evaluated: bool


Step = TrainStep | TrainEnd | EvalStep | EvalEnd | SaveStep


def remaining_steps(order: JobOrder, position: int, *, evaluated: bool = True) -> Iterator[Step]:
    """What is still to do: training steps, the end of each epoch, and the evaluations that are due behind a step.

    Args:
        evaluated: whether the evaluations that are due at the position are done too. Before them there is a checkpoint, and
            behind them another.
    """
    rows, first_step = order.train.num_rows, order.step(position)
    if not evaluated:
        yield from _evaluations(order, max(position - 1, 0) // rows, position)
    for number in range(first_step + 1, order.total_steps + 1):
        epoch, batch = divmod(number - 1, order.steps_per_epoch)
        position = order.position(number)
        yield TrainStep(epoch, batch, position)
        if position % rows == 0:
            yield TrainEnd(epoch, position)
        if order.due(number):
            yield SaveStep(epoch, position, evaluated=False)
            yield from _evaluations(order, epoch, position)
        elif position % rows == 0 or number == order.total_steps:
            yield SaveStep(epoch, position, evaluated=True)


def _evaluations(order: JobOrder, epoch: int, position: int) -> Iterator[Step]:
    for evaluation in order.due(order.step(position)):
        for batch in range(num_batches(evaluation.num_rows, order.batch_rows)):
            yield EvalStep(evaluation.split.split, epoch, batch, position)
        yield EvalEnd(evaluation.split.split, epoch, position)
    yield SaveStep(epoch, position, evaluated=True)


def moment(order: JobOrder, step: Step) -> Now:
    """The moment of a step, as the job's own code is told of it."""
    return Now(order.step(step.position), step.epoch, order.steps_per_epoch, order.total_steps, step.position)


def may_stop_after(step: Step, order: JobOrder) -> bool:
    """Whether position and `evaluated` stand for all that was done: not while a save is due there."""
    match step:
        case TrainStep():
            number = order.step(step.position)
            return step.position % order.train.num_rows != 0 and number != order.total_steps and not order.due(number)
        case _:
            return isinstance(step, SaveStep)
