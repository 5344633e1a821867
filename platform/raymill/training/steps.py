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


Step = TrainStep | EvalStep | EvalEnd | EpochEnd


def remaining_steps(order: JobOrder, position: int) -> Iterator[Step]:
    """What is still to do: each epoch's batches, its evaluation, that one's end, the epoch's end.

    A position at an epoch's end means that the epoch's evaluation was done too: a checkpoint there is made after it.
    """
    num_rows, batch_rows = order.train.num_rows, order.batch_rows
    first_epoch, offset = divmod(position, num_rows)
    for epoch in range(first_epoch, order.epochs):
        first_batch = offset // batch_rows if epoch == first_epoch else 0
        for batch in range(first_batch, order.steps_per_epoch):
            yield TrainStep(epoch, batch, epoch * num_rows + min((batch + 1) * batch_rows, num_rows))
        end = (epoch + 1) * num_rows
        if order.validation is not None:
            for batch in range(num_batches(order.validation.num_rows, batch_rows)):
                yield EvalStep(epoch, batch, end)
            yield EvalEnd(epoch, end)
        yield EpochEnd(epoch, end)


def may_stop_after(step: Step, order: JobOrder) -> bool:
    """Whether the position stands for all that was done: after a training step, or at an epoch's end after its evaluation."""
    epoch_ended = step.position % order.train.num_rows == 0
    return isinstance(step, EpochEnd) or (isinstance(step, TrainStep) and not epoch_ended)
