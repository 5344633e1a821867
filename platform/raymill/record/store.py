"""The run's folder, as a worker uses it. Here: on a machine that sees the folder. `remote_store` has the same methods elsewhere.

In time order: an attempt begins and finds where the run is (`begin_attempt`), the checkpoint there is loaded, events are
reported and checkpoints committed, the worker asks whether it is to stop, and says when all is saved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymill import files
from raymill.checkpoint import commit, directory
from raymill.checkpoint.async_writer import CheckpointWriter
from raymill.data.bad_rows import BadRow
from raymill.errors import CheckpointError
from raymill.record import inputs, kept_code, stacks
from raymill.record.bad_row_ledger import BadRowLedger
from raymill.record.events import CheckpointSaved, Event, EventWriter, StepRefused, append_event, scan_events
from raymill.record.folder import RunFolder

if TYPE_CHECKING:
    from raymill.checkpoint.snapshot import Snapshot

Report = Callable[[Event], None]


@dataclass(frozen=True)
class ResumePoint:
    """Where a new attempt begins. Rank 0 reads it once; the model and the stream both start from it.

    Attributes:
        attempt: the number of the attempt, from 1.
        checkpoint: the name of the newest checkpoint that is whole; None: there is none.
        position: rows trained on in it.
        skipped_positions: positions after the batches that are not to be trained on again.
        notes: what a person should know.
        evaluated: whether the evaluations that are due there are done too; otherwise the attempt begins with them.
        ended: whether the training ends there, before the job's last step.
    """

    attempt: int
    checkpoint: str | None
    position: int
    skipped_positions: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    evaluated: bool = True
    ended: bool = False


def begin_attempt(folder: RunFolder) -> ResumePoint:
    """Number an attempt, remove what the one before left unfinished, and find where the run is.

    Raises:
        CheckpointError: when there are checkpoints but none is whole.
    """
    attempt = _attempt(folder) + 1
    files.replace_file(folder.attempt, str(attempt))
    commit.clean(folder.checkpoints)
    folder.handover_request.unlink(missing_ok=True)
    notes: list[str] = []
    name = directory.find_latest(folder.checkpoints, notes.append)
    state: dict[str, Any] = directory.read_state(folder.checkpoints / name, "position") if name else {"position": 0}
    read = scan_events(folder.events)
    if read.num_damaged_lines:
        notes.append(f"{read.num_damaged_lines} damaged lines of {folder.events.name} were passed over")
    notes += [*kept_code.notes(folder.path), *inputs.notes(folder.path)]
    events = read.events
    if name and (best := commit.settled_best(folder.checkpoints, name)):
        _tell_of_best(folder, best, events)
    refused = [event for event in events if isinstance(event, StepRefused) and event.policy == "rollback"]
    skipped_positions = frozenset(event.position for event in refused)
    evaluated, ended = state.get("evaluated", True), state.get("ended") is not None
    return ResumePoint(attempt, name, state["position"], skipped_positions, tuple(notes), evaluated, ended)


def _tell_of_best(folder: RunFolder, best: str, events: Sequence[Event]) -> None:
    """Tell which checkpoint is the best, where a kill behind its commit left that out."""
    path = f"checkpoints/{best}"
    if any(isinstance(event, CheckpointSaved) and event.best and event.path == path for event in events):
        return
    step = directory.read_state(folder.checkpoints / best)["step"]
    # When it was saved, as nearly as it is known.
    append_event(folder, CheckpointSaved(step=step, path=path, best=True, time_s=events[-1].time_s if events else time.time()))


def _attempt(folder: RunFolder) -> int:
    return int(folder.attempt.read_text()) if folder.attempt.exists() else 0


def commit_checkpoint(folder: RunFolder, attempt: int, keep: int, content: directory.Content, *, best: bool) -> CheckpointSaved:
    """Commit a checkpoint, unless another attempt has begun; returns the event that tells of it.

    Raises:
        CheckpointError: when one has, or the checkpoint could not be written.
    """
    if (now := _attempt(folder)) > attempt:
        raise CheckpointError(f"attempt {now} of run {folder.run_id} has begun; attempt {attempt} writes no more checkpoints")
    name = commit.commit(folder.checkpoints, attempt, keep, content, best=best)
    return CheckpointSaved(step=content.step, path=f"checkpoints/{name}", best=best)


def append_order(folder: RunFolder, rank: int, record: Mapping[str, Any]) -> None:
    """Write down which rows a rank had in a step."""
    with open(folder.path / f"order-{rank}.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def keep_picture(folder: RunFolder, name: str, data: bytes) -> str:
    """Write a picture, whole or not at all; returns its place in the run's folder."""
    files.make_private_folder(folder.pictures)
    files.replace_file(folder.pictures / name, data)
    return f"{folder.pictures.name}/{name}"


def wants_stop(folder: RunFolder) -> bool:
    """Whether the workers are asked to save and end: for good, or because others go on."""
    return folder.stop_request.exists() or folder.handover_request.exists()


def confirm_saved(folder: RunFolder) -> None:
    """Say that all is saved, to whoever waits for it before others go on."""
    folder.handover_request.unlink(missing_ok=True)


class LocalRunStore:
    """The run's folder, for a worker that sees it."""

    def __init__(self, folder: RunFolder, rank: int = 0) -> None:
        """For this rank."""
        self._folder, self._rank = folder, rank
        self._writer: EventWriter | None = None

    def announce(self) -> None:
        """Leave this process's id, and be ready to write its stacks."""
        stacks.announce(self._folder, self._rank)

    def begin_attempt(self) -> ResumePoint:
        """See `store.begin_attempt`; for rank 0."""
        return begin_attempt(self._folder)

    def load(self, name: str) -> Snapshot:
        """The checkpoint of this name.

        Raises:
            CheckpointError: when it is not whole.
        """
        from raymill.checkpoint import snapshot

        return snapshot.load(self._folder.checkpoints / name)

    def report(self, event: Event) -> None:
        """Add an event; for rank 0."""
        if self._writer is None:
            self._writer = EventWriter(self._folder.events)
        self._writer.write(event)

    def wants_stop(self) -> bool:
        """See `store.wants_stop`."""
        return wants_stop(self._folder)

    def confirm_saved(self) -> None:
        """See `store.confirm_saved`; for rank 0, at its end."""
        confirm_saved(self._folder)

    def checkpoint_writer(self, attempt: int, keep: int, report: Report) -> CheckpointWriter:
        """Writes this attempt's checkpoints, and reports each that is safe."""
        from raymill.checkpoint import snapshot

        def write(taken: Snapshot, best: bool) -> None:
            report(commit_checkpoint(self._folder, attempt, keep, snapshot.content(taken, best=best), best=best))

        return CheckpointWriter(write)

    def bad_row_ledger(self, policy: str, budget: int, report: Report) -> Callable[[Sequence[BadRow]], None]:
        """Takes note of bad rows."""
        return BadRowLedger(self._folder, policy, budget, report).add

    def keep_picture(self, name: str, data: bytes) -> str:
        """Write a picture of this name; returns its place in the run's folder."""
        return keep_picture(self._folder, name, data)

    def record_order(self, record: Mapping[str, Any]) -> None:
        """Write down the rows of a step, for tests."""
        append_order(self._folder, self._rank, record)

    def close(self) -> None:
        """Wait until what was reported is on disk."""
        if self._writer is not None:
            self._writer.close()
