"""What is left to do from a position on, in order: a pure function of the order of samples and one integer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from raymill.data.order import JobOrder, num_batches


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
    """All training rows of an epoch were trained on; its evaluation is still to come."""

    epoch: int
    position: int


@dataclass(frozen=True)
class EvalStep:
    """Measure a batch of validation rows; fields as those of `TrainStep`."""

    epoch: int
    batch: int
    position: int


@dataclass(frozen=True)
class EvalEnd:
    """All validation rows of an epoch's evaluation were measured."""

    epoch: int
    position: int


@dataclass(frozen=True)
class EpochEnd:
    """An epoch is over, its evaluation too."""

    epoch: int
    position: int


Step = TrainStep | TrainEnd | EvalStep | EvalEnd | EpochEnd


def remaining_steps(order: JobOrder, position: int, *, evaluated: bool = True) -> Iterator[Step]:
    """What is still to do: each epoch's batches, their end, its evaluation, that one's end, the epoch's end.

    Args:
        evaluated: at an epoch's end, whether its evaluation is done too. Before it there is a checkpoint, and behind it another.
    """
    num_rows, batch_rows = order.train.num_rows, order.batch_rows
    first_epoch, offset = divmod(position, num_rows)
    if not evaluated:
        yield from _evaluation(order, first_epoch - 1)
    for epoch in range(first_epoch, order.epochs):
        first_batch = offset // batch_rows if epoch == first_epoch else 0
        for batch in range(first_batch, order.steps_per_epoch):
            yield TrainStep(epoch, batch, epoch * num_rows + min((batch + 1) * batch_rows, num_rows))
        yield TrainEnd(epoch, (epoch + 1) * num_rows)
        yield from _evaluation(order, epoch)


def _evaluation(order: JobOrder, epoch: int) -> Iterator[Step]:
    end = (epoch + 1) * order.train.num_rows
    if order.validation is not None:
        for batch in range(num_batches(order.validation.num_rows, order.batch_rows)):
            yield EvalStep(epoch, batch, end)
        yield EvalEnd(epoch, end)
    yield EpochEnd(epoch, end)


def may_stop_after(step: Step, order: JobOrder) -> bool:
    """Whether position and `evaluated` stand for all that was done: after a training step, and before and after an evaluation."""
    match step:
        case TrainStep():
            return step.position % order.train.num_rows != 0
        case TrainEnd():
            return order.validation is not None
        case _:
            return isinstance(step, EpochEnd)
