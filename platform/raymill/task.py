"""The seams: what a job's own code says, and nothing more.

A `Task` says what is learned: the model, the objectives, how a batch is evaluated. A `Pipeline` says what is learned
from: per split a `Source` of rows, what the rows must look like, how a window of rows is transformed, how rows become a
batch. Neither has a loop, a device or a rank. This file imports no torch, so that a job can be checked in well under
a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import torch

TRAIN, VALIDATION = "train", "validation"
"""The splits that are used unless a job says otherwise."""

PREDICT = "predict"
"""What a transform is told for rows that a trained model is asked about: nothing is drawn at random, and `targets` are absent."""

# ---------------------------------------------------------------- rows

Column = np.ndarray | list[Any]
"""One value per row: an array [num_rows, ...], or a list of arrays of different shapes, of `bytes`, or of `str`."""

Rows = dict[str, Column]
"""ClassSpec columns, all of the same length."""

Batch = Any
"""What `collate` returns: by default a dict with a tensor (or a list) per column."""


@dataclass(frozen=True)
class Field:
    """What one column of a source must hold.

    Attributes:
        dtype: a numpy type name ("uint8", "int64", "float32"), or "bytes" or "text".
        shape: the shape of one row's value; None for an extent that differs between rows.
        classes: the values are whole numbers in 0..classes-1 (a label).
        fill: what stands for a null, in a column of single values; None: a null is no value, see the source.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()
    classes: int | None = None
    fill: int | float | str | bytes | None = None


Schema = Mapping[str, Field]


# ---------------------------------------------------------------- sources


@dataclass(frozen=True)
class Fragment:
    """The smallest piece of a source that is read at once, such as a row group of a Parquet file.

    Attributes:
        path: the file, or a name for what has none.
        part: the number of the piece in its file.
        num_rows: rows in the piece.
        num_bytes: bytes that reading it moves.
        identity: changes when the content does (size and a digest of the file's own index).
    """

    path: str
    part: int
    num_rows: int
    num_bytes: int
    identity: str


@runtime_checkable
class Source(Protocol):
    """Where the rows of one split come from."""

    def fragments(self) -> Sequence[Fragment]:
        """List the pieces, in a fixed order, reading only what an index holds.

        Raises:
            InputError: with every file that is missing, damaged or of another schema.
        """
        ...

    def read(self, fragment: Fragment) -> Rows:
        """Read one piece, its rows in a fixed order.

        Raises:
            DataError: when it cannot be read; names the file and the piece.
        """
        ...


# ---------------------------------------------------------------- pipeline

Transform = Callable[[Rows, str, np.random.Generator], Rows]
"""(rows of one window, split, generator) -> as many rows. The generator is seeded by seed, epoch and window alone, and for
validation rows by seed and window, so that every evaluation sees the same."""


Check = Callable[[Rows], Mapping[int, str]]
"""The rows of one fragment -> index among them -> why that row is bad; empty where all are good."""


def unchanged(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    """The transform that changes nothing."""
    return rows


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The data of a job.

    Attributes:
        sources: a source per split; "train" must be there, "validation" is evaluated after each epoch unless the job says more.
        schema: what the rows of every source must hold, before the transform.
        transform: runs in Ray Data, on whole windows.
        collate: rows -> batch, on the worker; None makes a tensor of each array column.
        check: names the bad rows of a fragment, before the transform; what becomes of them is the job's `bad_rows`.
        fit: given the training rows, fragment by fragment and before the transform, it makes what is fitted to them, as bytes by
            name. That is done once for a run and kept with it and its model: the function that makes the pipeline is called again
            with it, if it has a parameter `fitted`, and so is the task. Without it, or before, `fitted` is empty.
        length: rows before the transform -> a number for each, such as its words: training rows of like length come together in a
            batch, as far as a window has them; which batch is where stays at random.
        get: fetches the data set when it is not there yet; returns the folder. None: the user brings the data.
        targets: the columns that are the answer, such as labels: in the split "predict", transform and collate do not see them.
            None: not said; then only a column with `classes` may be left out of a question, and is zeros.
    """

    sources: Mapping[str, Source]
    schema: Schema
    transform: Transform = unchanged
    collate: Callable[[Rows], Batch] | None = None
    check: Check | None = None
    fit: Callable[[Iterator[Rows]], Mapping[str, bytes]] | None = None
    length: Callable[[Rows], Sequence[int] | np.ndarray] | None = None
    get: Callable[[], Path] | None = None
    targets: Sequence[str] | None = None


# ---------------------------------------------------------------- task


@dataclass(frozen=True)
class Total:
    """A quantity of an evaluation that is summed over batches and ranks, such as a confusion matrix.

    Attributes:
        value: a tensor of any shape, the same in every batch.
    """

    value: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """Something of each row that is needed once all are measured, such as predictions: see `Task.conclude`.

    Attributes:
        value: a tensor [num_rows, ...], or a list with a tensor, a `str` or `bytes` per row.
    """

    value: torch.Tensor | Sequence[torch.Tensor] | Sequence[str] | Sequence[bytes]


@dataclass(frozen=True)
class Picture:
    """A picture of an evaluation, kept with the run.

    Attributes:
        value: a figure of matplotlib; or an array [height, width] or [height, width, 3], or a tensor [3, height, width], of uint8
            or of numbers from 0 to 1.
    """

    value: Any


@dataclass(frozen=True)
class Now:
    """Where a run is. It follows from the position alone, so a run that was resumed sees the same.

    Attributes:
        step: the number of this optimizer step, from 1; in `after_epoch`, of the last one done.
        epoch: in which epoch, from 0.
        steps_per_epoch: optimizer steps of an epoch.
        total_steps: of the job.
        position: rows trained on since the job began, once this step is done.
    """

    step: int
    epoch: int
    steps_per_epoch: int
    total_steps: int
    position: int


Losses: TypeAlias = "torch.Tensor | Mapping[str, torch.Tensor | float]"
"""A scalar tensor, or a mapping with it as "loss"; what else is in there, under whatever name, is logged as a metric."""

Loss = Callable[["torch.nn.Module", Batch], Losses] | Callable[["torch.nn.Module", Batch, Now], Losses]

Features: TypeAlias = "torch.Tensor | Mapping[str, torch.Tensor]"
"""A tensor [num_features, ...], or several by name; as many as there are rows, or more, such as two views of each."""


@dataclass(frozen=True)
class Objective:
    """One thing that is minimised, by an optimizer of its own.

    A loss is over the rows of a batch, and a step's loss is the mean over all rows of its global batch, unless one of these says
    otherwise. With `weight`, it is the mean over what that counts, such as tokens; a batch that weighs 0 is not trained on, and
    where all of a step weigh 0, its gradient is zero and no loss is logged. With `features`, it is over the whole global batch,
    as a contrastive one is: it is given the features of all rows, gathered from all ranks in the order of the rows, in place of
    a batch. Every rank computes it and passes its gradient back through its own features, which are computed a second time for
    that (GradCache: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).

    Attributes:
        name: also the name of its optimizer in the job file, where there are several.
        loss: (model, batch) -> the mean over the batch's rows, a scalar tensor, or a mapping with it as "loss" and with
            parts of it that are logged; with a third parameter it is given `Now`.
        trains: names of the model's submodules whose parameters it changes; empty for all of them.
        every: it is minimised in every n-th step only.
        from_step: the first step that it may be minimised in.
        weight: batch -> how much it counts, a number that is not negative; the loss is then the mean over that.
        features: (model, batch) -> what the loss needs of each row, a tensor [n, ...] or several by name, labels among them;
            with a third parameter it is given `Now`.
    """

    name: str
    loss: Loss
    trains: tuple[str, ...] = field(default=())
    every: int = 1
    from_step: int = 0
    weight: Callable[[Batch], float] | None = None
    features: Callable[..., Features] | None = None

    def is_due(self, step: int) -> bool:
        """Whether it is minimised in this step, counted from 1."""
        return step >= self.from_step and step % self.every == 0


@dataclass(frozen=True)
class OwnOptimizer:
    """An optimizer that a task makes itself, see `Task.optimizers`.

    Attributes:
        optimizer: over parameters of the model.
        schedule: of its rate, if it has one.
        per: when that is advanced: at each optimizer step, or at each epoch's end.
        metric: what a ReduceLROnPlateau goes by, such as validation/loss; it is advanced with each evaluation of that.
        max_grad_norm: largest norm of its parameters' gradient; None: no clipping.
    """

    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    per: Literal["step", "epoch"] = "step"
    metric: str | None = None
    max_grad_norm: float | None = None


class Task(Protocol):
    """What is learned. Subclass it, give `__init__` typed parameters (the job file's `model:`), and fill in.

    A parameter named `schema` is filled with the pipeline's schema, so that a head can take its size from the data; one named
    `fitted` with what the pipeline has fitted; one named `inputs` with the trained models that the job names, by name: see
    `load_model` and `load_weights` of `raymill.trained.model.Trained`.

    State that changes while a run goes on lives in buffers of the model, which are saved; an attribute of the Task is not.
    """

    def build(self) -> torch.nn.Module:
        """Make the model with its first weights. Several networks are submodules of one module."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor | Mapping[str, torch.Tensor | float]:
        """The mean loss over the batch's rows, a scalar; see `Objective.loss`. Not needed where `objectives` is given.

        An override may take a third parameter, which is given `Now`.
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name} must define loss(model, batch), or objectives()")

    def objectives(self) -> Sequence[Objective]:
        """What is minimised, in this order in each step. One objective named "loss" unless overridden."""
        return [Objective("loss", self.loss)]

    def optimizers(self, model: torch.nn.Module, total_steps: int) -> Mapping[str, Sequence[OwnOptimizer]]:
        """The optimizers of each objective by its name, for a job whose file names none.

        Made of torch's classes or others, they are saved and restored by their parameters' names, as those of a job file.
        """
        raise NotImplementedError(f"{type(self).__name__} must define optimizers(model, total_steps), or the job an optimizer")

    def after_step(self, model: torch.nn.Module, now: Now) -> None:
        """Change the model behind the optimizers of a step that was taken: clip weights, apply masks, count in a buffer.

        Called on all ranks, with equal weights and buffers, without gradients, seeded by the position.
        """

    def after_epoch(self, model: torch.nn.Module, now: Now) -> None:
        """As `after_step`, behind the last step of an epoch and before its evaluation."""

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor | Total | Kept]:
        """Measure one batch without gradients.

        Returns:
            name -> a tensor [num_rows] with one value per row, which is averaged over all rows; a Total; or something Kept.
        """
        ...

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float | Picture]:
        """What an evaluation comes to that is no mean over rows: once, on one rank, when all rows are measured.

        Args:
            kept: name -> what `evaluate` kept of all rows, in the order of the split: a tensor [num_rows, ...], or a list.
            totals: name -> sum over all rows, on the CPU.

        Returns:
            name -> a number, which is a metric like any other, or a Picture.
        """
        return {}

    def pictures(self, model: torch.nn.Module, now: Now) -> Mapping[str, Picture]:
        """Pictures of the model behind an evaluation: samples of a generator, filters.

        Called on one rank, without gradients, seeded alike each time, so that pictures of the same noise can be compared.
        """
        return {}

    def predict(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, Any]:
        """What the trained model says of a batch, without gradients. The answer on a row must not depend on the rows beside it.

        Returns:
            name -> one value per row: a tensor or array [num_rows, ...]; or a list with a tensor or array of any shape, a number,
            a `str` or `bytes` per row. Unless overridden, what `forward` returns for `inputs`, as "output" where it has no name.
        """
        name = type(self).__name__
        raise NotImplementedError(f"{name} must define predict(model, batch) or inputs(batch) to be asked")

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """The arguments of `model.forward` for this batch: what the exported graph of a registered model takes."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} must define inputs(batch) for its model to be exported")
