"""The run's folder, from a worker's point of view.

On the machine of the driver it is the folder itself (`NearDesk`). On another one the folder is not there: what is asked of
a `FarDesk` is done by an actor on the driver's machine (`Clerk`), with the same functions, and bytes travel through Ray's
object store. So a run needs no disk that its machines share.
"""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill import checkpoint, stall
from raymill.bad_rows import BadRow, Ledger
from raymill.checkpoint import Keeper
from raymill.errors import CheckpointError, RaymillError
from raymill.home import RunFolder
from raymill.tracking import EventWriter, read_events

if TYPE_CHECKING:
    from raymill.state import Snapshot

Event = dict[str, Any]
Report = Callable[[Event], None]

ASK_INTERVAL_S = 0.25
"""Seconds between two questions of a far worker whether it is to stop."""

MOST_EVENTS_ON_THE_WAY = 64

COMMITS = "commits"
"""The group of a clerk's methods that change checkpoints, done one at a time, while it goes on taking events."""


@dataclass(frozen=True)
class Taken:
    """What rank 0 of a new attempt finds.

    Attributes:
        attempt: the number of the attempt, from 1.
        checkpoint: the name of the newest checkpoint that is whole; None: there is none.
        position: rows trained on in it.
        passed_over: positions behind the batches that are not to be trained on again.
        notes: what a person should know.
    """

    attempt: int
    checkpoint: str | None
    position: int
    passed_over: list[int]
    notes: list[str]


def take_over(folder: RunFolder) -> Taken:
    """Begin an attempt: number it, clean up behind the one before, and find where the run is.

    Raises:
        CheckpointError: when there are checkpoints but none is whole.
    """
    attempt = _attempt(folder) + 1
    checkpoint.write_file(folder.attempt, str(attempt))
    checkpoint.clean(folder.checkpoints)
    folder.handover.unlink(missing_ok=True)
    notes: list[str] = []
    name = checkpoint.find_latest(folder.checkpoints, notes.append)
    position = checkpoint.read_record(folder.checkpoints / name)["position"] if name else 0
    events, _ = read_events(folder.events)
    refused = [event for event in events if event["kind"] == "refused" and event["policy"] == "rollback"]
    return Taken(attempt, name, position, [event["position"] for event in refused], notes)


def _attempt(folder: RunFolder) -> int:
    return int(folder.attempt.read_text()) if folder.attempt.exists() else 0


def commit(folder: RunFolder, attempt: int, keep: int, content: Snapshot | checkpoint.Packed, *, best: bool) -> checkpoint.Event:
    """`checkpoint.commit`, unless another attempt has begun.

    Raises:
        CheckpointError: when it has, or the checkpoint could not be written.
    """
    if (now := _attempt(folder)) > attempt:
        raise CheckpointError(f"attempt {now} of run {folder.run_id} has begun; attempt {attempt} writes no more checkpoints")
    return checkpoint.commit(folder.checkpoints, attempt, keep, content, best=best)


def _append_order(folder: RunFolder, rank: int, record: Mapping[str, Any]) -> None:
    with open(folder.path / f"order-{rank}.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def wants_stop(folder: RunFolder) -> bool:
    """Whether the workers are asked to save and end: for good, or because others go on."""
    return folder.stop.exists() or folder.handover.exists()


def rest(folder: RunFolder) -> None:
    """Say that all is saved, to who waits for it before others go on."""
    folder.handover.unlink(missing_ok=True)


class NearDesk:
    """The run's folder on a worker that sees it."""

    def __init__(self, folder: RunFolder, rank: int = 0) -> None:
        """For this rank."""
        self._folder, self._rank = folder, rank
        self._writer: EventWriter | None = None

    def announce(self) -> None:
        """Leave this process's id, and be ready to write its stacks."""
        stall.announce(self._folder, self._rank)

    def take_over(self) -> Taken:
        """See `desk.take_over`; for rank 0."""
        return take_over(self._folder)

    def load(self, name: str) -> Snapshot:
        """The checkpoint of this name.

        Raises:
            CheckpointError: when it is not whole.
        """
        return checkpoint.load(self._folder.checkpoints / name)

    def report(self, event: Event) -> None:
        """Add an event; for rank 0."""
        if self._writer is None:
            self._writer = EventWriter(self._folder.events)
        self._writer.write(event)

    def wants_stop(self) -> bool:
        """See `desk.wants_stop`."""
        return wants_stop(self._folder)

    def rest(self) -> None:
        """See `desk.rest`; for rank 0, at its end."""
        rest(self._folder)

    def keeper(self, attempt: int, keep: int, report: Report) -> Keeper:
        """Who writes this attempt's checkpoints."""
        return Keeper(lambda snapshot, best: commit(self._folder, attempt, keep, snapshot, best=best), report)

    def ledger(self, policy: str, budget: int, report: Report) -> Callable[[Sequence[BadRow]], None]:
        """Who takes note of bad rows."""
        return Ledger(self._folder, policy, budget, report).add

    def note_order(self, record: Mapping[str, Any]) -> None:
        """Write down the rows of a step, for tests."""
        _append_order(self._folder, self._rank, record)

    def close(self) -> None:
        """Wait until what was reported is on disk."""
        if self._writer is not None:
            self._writer.close()


# ---------------------------------------------------------------- on another machine


class Clerk:
    """Does on the real folder what far workers ask. An actor on the driver's machine, see `start_clerk`."""

    def __init__(self, path: str) -> None:
        """Of the run in this folder."""
        self._folder = RunFolder(Path(path))
        self._writer = EventWriter(self._folder.events)
        self._ledger: Ledger | None = None
        self._read: tuple[str, Any] | None = None

    def announce(self, rank: int, pid: int, host: str) -> None:
        """Write down where a rank runs."""
        (self._folder.path / f"rank-{rank}.json").write_text(json.dumps({"pid": pid, "host": host}))

    def take_over(self) -> Taken:
        """See `desk.take_over`."""
        return take_over(self._folder)

    def read(self, name: str) -> list[Any]:
        """Where the files of a checkpoint are in Ray's object store: one copy for all who ask."""
        import ray

        if self._read is None or self._read[0] != name:
            self._read = name, ray.put(checkpoint.read(self._folder.checkpoints / name))
        return [self._read[1]]

    def report(self, event: Event) -> None:
        """Add an event."""
        self._writer.write(event)

    def commit(self, attempt: int, keep: int, content: checkpoint.Packed, best: bool) -> checkpoint.Event:
        """See `desk.commit`."""
        return commit(self._folder, attempt, keep, content, best=best)

    def list_bad(self, policy: str, budget: int, rows: Sequence[BadRow]) -> None:
        """Take note of bad rows."""
        if self._ledger is None:
            self._ledger = Ledger(self._folder, policy, budget, self._writer.write)
        self._ledger.add(rows)

    def note_order(self, rank: int, record: Mapping[str, Any]) -> None:
        """Write down the rows of a step."""
        _append_order(self._folder, rank, record)

    def asks(self, rank: int) -> tuple[bool, bool]:
        """Whether workers are to stop, and whether the stacks of this rank are wanted."""
        return wants_stop(self._folder), stall.wants_stacks(self._folder, rank)

    def give_stacks(self, rank: int, text: str) -> None:
        """Write the stacks of a rank."""
        stall.give_stacks(self._folder, rank, text)

    def rest(self) -> None:
        """See `desk.rest`."""
        rest(self._folder)

    def flush(self) -> None:
        """Write what waits."""
        self._writer.flush()


def start_clerk(folder: RunFolder, variables: Mapping[str, str]) -> Any:
    """Start the clerk of a run on this machine, with these environment variables. It ends with this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    options: dict[str, Any] = {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
        "concurrency_groups": {COMMITS: 1},
        "runtime_env": {"env_vars": dict(variables)},
    }
    return ray.remote(**options)(Clerk).remote(str(folder.path))


class FarDesk:
    """The run's folder on a worker that does not see it: the same methods as those of `NearDesk`, done by the clerk."""

    def __init__(self, clerk: Any, rank: int) -> None:
        """For this rank."""
        self._clerk, self._rank = clerk, rank
        self._on_the_way: deque[Any] = deque()
        self._lock = threading.Lock()
        self._wants_stop = False
        self._closed = threading.Event()

    def announce(self) -> None:
        """As `NearDesk`; also begins to ask the clerk what is wanted."""
        import ray

        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._ask("announce", self._rank, os.getpid(), address)
        threading.Thread(target=self._listen, name="desk", daemon=True).start()

    def _ask(self, method: str, *arguments: Any, group: str | None = None) -> Any:
        import ray
        import ray.exceptions

        call = getattr(self._clerk, method)
        call = call.options(concurrency_group=group) if group else call
        try:
            return ray.get(call.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaymillError):
                raise error.cause from None
            raise

    def _listen(self) -> None:
        import ray.exceptions

        while not self._closed.wait(ASK_INTERVAL_S):
            try:
                self._wants_stop, stacks = self._ask("asks", self._rank)
                if stacks:
                    self._ask("give_stacks", self._rank, _stacks())
            except ray.exceptions.RayError:
                # The clerk went with the driver; the training's own next question says so.
                return

    def take_over(self) -> Taken:
        """As `NearDesk`."""
        taken: Taken = self._ask("take_over", group=COMMITS)
        return taken

    def load(self, name: str) -> Snapshot:
        """As `NearDesk`."""
        import ray

        return checkpoint.unpack(ray.get(self._ask("read", name)[0]))

    def report(self, event: Event) -> None:
        """As `NearDesk`; events travel while training goes on, in order."""
        import ray

        stamped = {"time_s": time.time(), **event}
        plain = json.loads(json.dumps(stamped, default=lambda value: value.tolist()))
        with self._lock:
            self._on_the_way.append(self._clerk.report.remote(plain))
            if len(self._on_the_way) > MOST_EVENTS_ON_THE_WAY:
                ray.get(self._on_the_way.popleft())

    def wants_stop(self) -> bool:
        """As `NearDesk`, as of at most some hundred milliseconds ago."""
        return self._wants_stop

    def rest(self) -> None:
        """As `NearDesk`."""
        self._ask("rest")

    def keeper(self, attempt: int, keep: int, report: Report) -> Keeper:
        """As `NearDesk`."""
        return Keeper(partial(self._commit, attempt, keep), report)

    def _commit(self, attempt: int, keep: int, snapshot: Snapshot, best: bool) -> checkpoint.Event:
        content = checkpoint.pack(snapshot, best=best)
        event: checkpoint.Event = self._ask("commit", attempt, keep, content, best, group=COMMITS)
        return event

    def ledger(self, policy: str, budget: int, report: Report) -> Callable[[Sequence[BadRow]], None]:
        """As `NearDesk`; the clerk reports by itself."""
        return partial(self._ask, "list_bad", policy, budget)

    def note_order(self, record: Mapping[str, Any]) -> None:
        """As `NearDesk`."""
        self._ask("note_order", self._rank, record)

    def close(self) -> None:
        """As `NearDesk`."""
        import ray

        self._closed.set()
        with self._lock:
            ray.get(list(self._on_the_way))
            self._on_the_way.clear()
        self._ask("flush")


Desk = NearDesk | FarDesk


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
