"""What happens in a run, as frozen types, and the file that they are appended to: `events.jsonl`, one JSON object a line.

Every line carries the version of its format. Lines are parsed here alone; whoever wants to know about a run reads the types.
Training never talks to MLflow: this file is the durable queue that `tracking` delivers from.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)

from raymill.data.bad_rows import BadRow
from raymill.errors import InputError, Problem
from raymill.files import make_private_folder, parse_json, private, with_version, without_version
from raymill.record.folder import RunFolder
from raymill.redaction import redact_text

WRITE_INTERVAL_S = 0.25

Metrics = dict[str, float]
"""Name -> value, as "train/loss"."""

Prose = Annotated[str, PlainSerializer(redact_text)]
"""What people are told, often in the words of an error: written down without secrets."""


def _writable(values: dict[str, Any]) -> dict[str, Any]:
    """The values, if a file can hold their texts; JSON can spell half a character, which none can."""
    json.dumps(values, ensure_ascii=False).encode()
    return values


def _now_s() -> float:
    # Looked up at each call, so that the fault "clock" sets back the times of events too.
    return time.time()


class Event(BaseModel):
    """Something that happened in a run.

    Attributes:
        time_s: when, Unix seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    time_s: float = Field(default_factory=_now_s)


class AttemptStarted(Event):
    """The workers of an attempt are about to train.

    Attributes:
        attempt: its number, from 1.
        num_workers: how many there are.
        step: optimizer steps done before.
        num_total_steps: of the whole job.
        resumed: whether it goes on from a checkpoint.
        notes: what a person should know, such as a checkpoint that was passed over.
        pid: the process that drives it.
        process_started_s: when that process was started, Unix seconds: its number may be another one's later.
    """

    kind: Literal["start"] = "start"
    attempt: int
    num_workers: int
    step: int
    num_total_steps: int
    resumed: bool
    notes: tuple[Prose, ...] = ()
    pid: int | None = None
    process_started_s: float | None = None


class StageReached(Event):
    """What an attempt does before its first step, which takes a while and is otherwise silent.

    Attributes:
        stage: in words, as "starting Ray".
    """

    kind: Literal["stage"] = "stage"
    stage: str


class StandbyDecided(Event):
    """It was decided whether a second driver stands by, ready to go on should this one die.

    Attributes:
        started: whether one does.
        reason: why.
    """

    kind: Literal["standby"] = "standby"
    started: bool
    reason: str


class FirstStepDone(Event):
    """The attempt's first optimizer step is done."""

    kind: Literal["first_step"] = "first_step"
    step: int


class StepDone(Event):
    """An optimizer step is done.

    Attributes:
        rows: rows trained on since the job began.
        metrics: of the whole global batch.
        rows_per_s: rows per second since the attempt's first step.
        data_wait_share: share of that time in which all ranks were held up by one that waited for rows.
    """

    kind: Literal["step"] = "step"
    step: int
    epoch: int
    rows: int
    metrics: Metrics
    rows_per_s: float | None = None
    data_wait_share: float | None = None


class EvaluationDone(Event):
    """The rows of a split were measured.

    Attributes:
        split: which.
        rows: rows measured.
        totals: name -> nested lists, such as a confusion matrix.
        pictures: name -> file in the run's folder.
    """

    kind: Literal["evaluation"] = "evaluation"
    split: str = "validation"
    step: int
    epoch: int
    rows: int
    metrics: Metrics
    totals: Annotated[dict[str, Any], AfterValidator(_writable)] = {}
    pictures: dict[str, str] = {}


class TrainingEnded(Event):
    """The training ends before the job's last step, on purpose.

    Attributes:
        step: the last one.
        reason: why.
    """

    kind: Literal["ended"] = "ended"
    step: int
    reason: str


class CheckpointSaved(Event):
    """A checkpoint is safe on disk.

    Attributes:
        path: from the run's folder.
        best: whether it is the best so far.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    best: bool


class StepRefused(Event):
    """A step was not taken because its gradient was not a number.

    Attributes:
        position: rows trained on after the step.
        rows: ids of the batch's rows.
        policy: what `loop.on_nan` says.
    """

    kind: Literal["refused"] = "refused"
    step: int
    epoch: int
    position: int
    rows: list[int]
    policy: Literal["stop", "skip", "rollback"]


class BadRowsFound(Event):
    """Rows were left out that had not been met before."""

    kind: Literal["bad_rows"] = "bad_rows"
    rows: list[BadRow]


class ResizeStarted(Event):
    """An elastic run is to go on with another number of workers."""

    kind: Literal["resize"] = "resize"
    num_workers: int


class DrainNoticed(Event):
    """Nodes that the run uses are to leave the cluster.

    Attributes:
        nodes: their ids.
        left_s: seconds until the first of them goes; None: not said.
        goes_on: whether the run has room on the others.
    """

    kind: Literal["drain"] = "drain"
    nodes: tuple[str, ...]
    left_s: float | None
    goes_on: bool


class StragglerFound(Event):
    """A rank computes slower than the others.

    Attributes:
        factor: how many times longer its forward passes take.
        lost_s: seconds that the others wait for it in each step.
    """

    kind: Literal["straggler"] = "straggler"
    step: int
    rank: int
    factor: float
    lost_s: float


class TaskChanged(Event):
    """Attributes of the job's Task changed in a step. They are not saved, so a resume begins with them as they were at the start.

    Attributes:
        attributes: their names.
    """

    kind: Literal["task_changed"] = "task_changed"
    step: int
    attributes: tuple[str, ...]


class EvaluationGoesOn(Event):
    """A batch of an evaluation is measured: a sign of life.

    Attributes:
        split: what is measured.
        batch: its number in the evaluation.
        num_batches: of the evaluation.
    """

    kind: Literal["evaluation_batch"] = "evaluation_batch"
    split: str = "validation"
    epoch: int
    batch: int
    num_batches: int


class RunStopped(Event):
    """The run ended before its last step."""

    kind: Literal["stop"] = "stop"
    reason: Literal["interrupted", "failed"]
    message: Prose


class RunFinished(Event):
    """All epochs are done.

    Attributes:
        best_checkpoint: from the run's folder; None: none was saved.
    """

    kind: Literal["end"] = "end"
    best_checkpoint: str | None
    metrics: Metrics


class AttemptFailed(Event):
    """An attempt failed and another one follows. Shown to people; the next attempt's start is what is recorded.

    Attributes:
        step: of the checkpoint that the next one goes on from; 0: there is none.
        last_step: the last one that this attempt reported; None: it came to none.
        pause_s: until the next one begins.
    """

    kind: Literal["restart"] = "restart"
    cause: str
    message: Prose
    step: int
    last_step: int | None = None
    pause_s: float = 0.0


class DeliveryStarted(Event):
    """Training is over; MLflow is getting the rest. Shown to people, not recorded."""

    kind: Literal["delivering"] = "delivering"


AnyEvent = (
    AttemptStarted
    | StageReached
    | StandbyDecided
    | FirstStepDone
    | StepDone
    | EvaluationDone
    | TrainingEnded
    | CheckpointSaved
    | StepRefused
    | BadRowsFound
    | ResizeStarted
    | DrainNoticed
    | StragglerFound
    | TaskChanged
    | EvaluationGoesOn
    | RunStopped
    | RunFinished
    | AttemptFailed
    | DeliveryStarted
)

_PARSER: TypeAdapter[Event] = TypeAdapter(Annotated[AnyEvent, Discriminator("kind")])


def parse_event(values: Any, where: str = "event") -> Event:
    """The event of a line's JSON object.

    Raises:
        InputError: it is of another version, or is none.
    """
    try:
        return _PARSER.validate_python(without_version(values, where))
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False))
        fix = "The file was changed or damaged: remove this line, or start a new run."
        raise InputError([Problem(where, found, "an event of raymill", fix)]) from error


def as_record(event: Event) -> dict[str, Any]:
    """The event as JSON-ready values; `parse_event` makes an equal one."""
    return with_version(event.model_dump(mode="json"))


# ---------------------------------------------------------------- the file


def append_event(folder: RunFolder, event: Event) -> None:
    """Append one event to the run's file and wait until it is on disk."""
    make_private_folder(folder.path)
    with EventWriter(folder.events) as writer:
        writer.write(event)


class EventWriter:
    """Appends events of one process, from any thread. Step events wait up to `every_s` for company, others for nothing; a sign of
    life is left out where something was written less than `every_s` ago.

    Args:
        path: the run's events; made where it is not there yet.
        every_s: least seconds between two writes of step events, and before a sign of life.
    """

    def __init__(self, path: Path, every_s: float = WRITE_INTERVAL_S) -> None:
        # O_APPEND, and whole lines in one write: lines of the driver and of rank 0 never mix.
        self._file = private(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self._every_s = every_s
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._flushed_s = 0.0

    def write(self, event: Event) -> None:
        """Add one event."""
        line = json.dumps(as_record(event), separators=(",", ":")) + "\n"
        with self._lock:
            recent = time.monotonic() - self._flushed_s < self._every_s
            if recent and isinstance(event, EvaluationGoesOn):
                return
            self._lines.append(line)
            if not recent or not isinstance(event, StepDone):
                self._flush()

    def flush(self) -> None:
        """Write what waits."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._lines:
            # A line that a killed process left torn is ended first, so that only it is lost.
            size = os.fstat(self._file).st_size
            torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
            data = memoryview((("\n" if torn else "") + "".join(self._lines)).encode())
            while data:
                data = data[os.write(self._file, data) :]
            self._lines.clear()
        self._flushed_s = time.monotonic()

    def close(self) -> None:
        """Write what waits and wait until it is on disk."""
        self.flush()
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class EventsRead:
    """What was read of a run's events.

    Attributes:
        events: in their order.
        offset: bytes up to the end of the last whole line.
        num_damaged_lines: lines that are no JSON, and a last one without its end: a killed writer, or a changed file.
    """

    events: list[Event]
    offset: int
    num_damaged_lines: int


def read_events(path: Path, offset: int = 0, limit: int | None = None) -> tuple[list[Event], int]:
    """Events and offset of `scan_events`, for those to whom a damaged line is nothing new."""
    read = scan_events(path, offset, limit)
    return read.events, read.offset


def scan_events(path: Path, offset: int = 0, limit: int | None = None) -> EventsRead:
    """Read the whole lines from `offset` (bytes) on, at most `limit` of them. No file: no events.

    A last line without its end is left for later; a torn line that a later one follows is passed over: its writer died
    before anything depended on it. Both are counted.

    Raises:
        InputError: a line is of another version of raymill, or was changed.
    """
    if not path.exists():
        return EventsRead([], offset, 0)
    events, num_damaged_lines = [], 0
    with path.open("rb") as file:
        file.seek(offset)
        for line in islice(file, limit):
            if not line.endswith(b"\n"):
                num_damaged_lines += 1
                break
            offset += len(line)
            try:
                values = parse_json(line)
            except ValueError:
                num_damaged_lines += 1
                continue
            events.append(parse_event(values, f"{path}, the line before byte {offset}"))
    return EventsRead(events, offset, num_damaged_lines)
