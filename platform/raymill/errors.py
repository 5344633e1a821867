"""Every error that raymill raises on purpose. Each says where, what was found, what was expected, and what to do.

    RaymillError                 the root; `exit_code` is what the command line returns
    |-- InputError       (2)     what the user gave is wrong; carries every Problem found, not only the first
    |-- RunError         (1)     a run that started could not go on
    |   |-- WorkerError          a worker failed; names the rank and the cause
    |   |-- DataError            a row, file or row group could not be read or is not what the manifest says
    |   |-- CheckpointError      no checkpoint could be written or read
    |   |-- NumberError          a loss or gradient is NaN or infinite; names step and rows
    |   |-- StallError           no step was made for too long; names who waits for whom
    |   `-- TrackingError        MLflow could not be reached or refused
    `-- Interrupted      (3)     stopped by the user or the machine; can be resumed

All of them hold plain values only, which `values` names, so they survive pickling between processes unchanged, notes included;
whatever somebody on the way adds to their `args`, as Ray Data does, is left behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave.

    Attributes:
        where: file with line, field path, shard or row: "job.yaml:7 loop.epochs".
        found: what stands there.
        expected: what should stand there.
        fix: the next thing to do.
    """

    where: str
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: found {self.found}; expected {self.expected}. {self.fix}"

    def as_dict(self) -> dict[str, str]:
        """The problem as JSON-ready values."""
        return asdict(self)


class RaymillError(Exception):
    """Root of the tree."""

    exit_code = 1

    @property
    def values(self) -> tuple[Any, ...]:
        """What another one of its kind is made of that is equal to it."""
        return self.args

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.values, self.__dict__


class InputError(RaymillError):
    """The user's job, data or command is wrong. Nothing was started.

    Args:
        problems: all that was found, in the order of the file.
    """

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    @property
    def values(self) -> tuple[Any, ...]:
        """Its problems."""
        return (self.problems,)

    def __str__(self) -> str:
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class RunError(RaymillError):
    """A run that had started could not go on.

    Args:
        message: what happened, where, and what to do.
    """

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)

    @property
    def values(self) -> tuple[Any, ...]:
        """Its message."""
        return (self.message,)

    def __str__(self) -> str:
        return self.message


class WorkerError(RunError):
    """A process of the run failed.

    Args:
        message: what happened and what to do.
        rank: the rank that failed first, or None when unknown.
        traceback: the remote traceback as text.
        cause: one of the values of `retry.Cause`.
    """

    def __init__(self, message: str, rank: int | None = None, traceback: str = "", cause: str = "code") -> None:
        super().__init__(message)
        self.rank = rank
        self.traceback = traceback
        self.cause = cause

    @property
    def values(self) -> tuple[Any, ...]:
        """Message, rank, traceback, cause."""
        return (self.message, self.rank, self.traceback, self.cause)


class DataError(RunError):
    """A row, file or row group could not be read, or is not what the manifest says."""


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


class NumberError(RunError):
    """A loss or gradient is NaN or infinite."""


class StallError(RunError):
    """No step was made for too long."""


class TrackingError(RunError):
    """MLflow could not be reached or refused."""


class Interrupted(RaymillError):
    """The run stopped on request, with its state saved.

    Args:
        run_id: the run to continue.
        step: the last step in the saved checkpoint.
    """

    exit_code = 3

    def __init__(self, run_id: str, step: int) -> None:
        self.run_id = run_id
        self.step = step
        super().__init__(run_id, step)

    @property
    def values(self) -> tuple[Any, ...]:
        """Run and step."""
        return (self.run_id, self.step)

    def __str__(self) -> str:
        return f"run {self.run_id} was interrupted; its state is saved at step {self.step}. Continue with --resume {self.run_id}"


class SearchStopped(RaymillError):
    """A search stopped on request, what ran of it saved.

    Args:
        study: the study to go on with.
    """

    exit_code = 3

    def __init__(self, study: str) -> None:
        self.study = study
        super().__init__(study)

    @property
    def values(self) -> tuple[Any, ...]:
        """The study."""
        return (self.study,)

    def __str__(self) -> str:
        return f"study {self.study} was stopped; what ran of it is saved. The same command goes on, or --resume {self.study}"


def as_record(error: RaymillError) -> dict[str, Any]:
    """An error as JSON-ready values, with its notes; `from_record` makes an equal one."""
    notes = list(getattr(error, "__notes__", ()))
    if isinstance(error, InputError):
        return {"kind": "InputError", "problems": [problem.as_dict() for problem in error.problems], "notes": notes}
    return {"kind": type(error).__name__, "args": list(error.values), "notes": notes}


def from_record(record: Mapping[str, Any]) -> RaymillError:
    """The error of a record.

    Raises:
        KeyError: when the record is not one of an error of this file.
    """
    made: RaymillError
    if record["kind"] == "InputError":
        made = InputError([Problem(**problem) for problem in record["problems"]])
    else:
        kinds = (RunError, WorkerError, DataError, CheckpointError, NumberError, StallError, TrackingError, Interrupted)
        made = {kind.__name__: kind for kind in kinds}[record["kind"]](*record["args"])
    for note in record.get("notes", ()):
        made.add_note(note)
    return made


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The sentence that leads from a wrong name to the right one."""
    names = sorted(valid)
    if (near := nearest(name, names)) is not None:
        return f"Did you mean {near!r}?"
    return f"Valid names: {', '.join(names) or '(none)'}."


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is meant by a wrong one; capitals count for nothing. None: no name is like it."""
    # Of names that differ only in capitals, the first is meant as well as any.
    by_letters = {known.lower(): known for known in sorted(valid, reverse=True)}
    near = get_close_matches(name.lower(), by_letters, n=1, cutoff=0.5)
    return by_letters[near[0]] if near else None
