"""Where the engine calls the job's own code: what is expected there, and what to do when it is not what comes.

with calling(LOSS, objective.loss, batch):        an error that passes gets a note of what was expected
problem(LOSS, error)                              the same as a Problem, for who refuses a job
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raymill.errors import InputError, Problem, RaymillError
from raymill.own_code.traces import culprit, definition, describe, headline, own_frames, place_of


@dataclass(frozen=True)
class Seam:
    """One place where the job's own code is called.

    Attributes:
        call: what is called, as its author knows it.
        expected: what should come of it.
        fix: what to do when it does not.
    """

    call: str
    expected: str
    fix: str


IMPORT = Seam("the import of the module", "its names", "Correct it, or install what it imports.")
PIPELINE = Seam("the pipeline's function", "a Pipeline", "Correct it, or the job's `data:`.")
FRAGMENTS = Seam("fragments()", "the source's pieces, as raymill.task.Fragment", "Correct the source.")
READ = Seam("read(fragment)", "the rows of a fragment", "Correct the source, or the data that it reads.")
CHECK = Seam("check(rows)", "index -> reason, for the bad rows of a fragment", "Correct the pipeline's check.")
FIT = Seam("fit(rows)", "name -> bytes, for what is fitted on the training rows", "Correct the pipeline's fit.")
TRANSFORM = Seam(
    "transform(rows, split, generator)", "a dict of as many rows as it was given", "Correct the pipeline's transform."
)
LENGTH = Seam("length(rows)", "a number for each of the rows, before the transform", "Correct the pipeline's length.")
COLLATE = Seam("collate(rows)", "a batch of the rows", "Correct the pipeline's collate, or leave it out: a tensor per column.")
TASK = Seam("the task's __init__", "a Task made of the job's `model:`", "Correct it, or the job's `model:`.")
BUILD = Seam("build()", "a torch.nn.Module with its first weights", "Correct build().")
OBJECTIVES = Seam("objectives()", "a list of raymill.task.Objective", "Correct objectives().")
OPTIMIZERS = Seam("optimizers(model, total_steps)", "objective -> a list of raymill.task.OwnOptimizer", "Correct optimizers().")
LOSS = Seam(
    "loss(model, batch)",
    "the mean loss over the batch's rows, a scalar tensor that the weights have a gradient of, for whatever number of rows",
    "Correct the loss, or what makes the batch.",
)
WEIGHT = Seam(
    "Objective.weight(batch)", "how much the batch counts, a finite number that is not negative", "Correct what weighs the batch."
)
FEATURES = Seam(
    "Objective.features(model, batch)",
    "a tensor [n, ...] of the batch's rows that the weights have a gradient of, or several by name",
    "Correct the features, or what makes the batch.",
)
AFTER_STEP = Seam("after_step(model, now)", "nothing; it changes the values of weights and buffers", "Correct after_step().")
AFTER_EPOCH = Seam("after_epoch(model, now)", "nothing; it changes the values of weights and buffers", "Correct after_epoch().")
EVALUATE = Seam(
    "evaluate(model, batch)",
    "name -> a tensor with one value for each of the batch's rows, a Total, or something Kept, for whatever number of rows",
    "Correct evaluate().",
)
CONCLUDE = Seam("conclude(kept, totals)", "name -> a number or a raymill.task.Picture", "Correct conclude().")
PICTURES = Seam("pictures(model, now)", "name -> a raymill.task.Picture", "Correct pictures().")
PREDICT = Seam(
    "predict(model, batch)",
    "name -> a value for each of the batch's rows: a tensor, or a list of tensors, numbers, str or bytes",
    "Correct predict().",
)
INPUTS = Seam("inputs(batch)", "a tuple of tensors, the arguments of the model's forward()", "Correct inputs().")
FORWARD = Seam("the model's forward()", "an answer to what inputs(batch) gives", "Correct inputs() or the model.")

_SEAM = "raymill_seam"
"""The attribute of an error that says where it came from."""


def problem(seam: Seam, error: BaseException, function: Any = None, given: Any = None) -> Problem:
    """The job's own error as a Problem: at its own innermost line, or where the function is defined that was called.

    Args:
        seam: what was called, unless `calling` knows better.
        function: what was called.
        given: what it was given, to be described.
    """
    seam = error.__dict__.get(_SEAM, seam)
    origin = culprit(error)
    frames = own_frames(origin)
    where = place_of(frames[-1]) if frames else definition(function) if function is not None else seam.call
    return Problem(where, headline(origin), f"{seam.call} to give {seam.expected}{_of(given)}", seam.fix)


def wrong(seam: Seam, function: Any, found: str, fix: str = "", given: Any = None) -> InputError:
    """What the job's own code gave is not what is expected of it."""
    expected = f"{seam.call} to give {seam.expected}{_of(given)}"
    return InputError([Problem(definition(function), found, expected, fix or seam.fix)])


def _of(given: Any) -> str:
    return "" if given is None else f"; it was given {describe(given)}"


@contextmanager
def calling(seam: Seam, given: Any = None) -> Iterator[None]:
    """Within this, job's own code is called: what it raises gets a note of what was expected and what to do.

    Args:
        given: what it is given; described where an error passes.
    """
    try:
        yield
    except RaymillError:
        raise
    except Exception as error:
        error.__dict__.setdefault(_SEAM, seam)
        error.add_note(f"expected: {seam.call} to give {seam.expected}{_of(given)}. {seam.fix}")
        raise
