"""The run's folder, for a worker on a machine that does not see it.

What is asked of a `RemoteRunStore` is done by an actor on the driver's machine (`RunStoreActor`) with the functions of `store`,
and bytes travel through Ray's object store. So a run needs no disk that its machines share.
"""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.checkpoint import directory
from raymill.checkpoint.async_writer import CheckpointWriter
from raymill.data.bad_rows import BadRow
from raymill.errors import RaymillError
from raymill.record import stacks, store
from raymill.record.bad_row_ledger import BadRowLedger
from raymill.record.events import CheckpointSaved, Event, EventWriter
from raymill.record.folder import RunFolder
from raymill.record.store import LocalRunStore, Report, ResumePoint

if TYPE_CHECKING:
    from raymill.checkpoint.snapshot import Snapshot

POLL_INTERVAL_S = 0.25
"""Seconds between two questions of a remote worker whether it is to stop."""

MAX_EVENTS_IN_FLIGHT = 64

COMMITS = "commits"
"""The group of the actor's methods that change checkpoints, done one at a time, while it goes on taking events."""

WAITS = "waits"
"""The group of those that wait for a run."""


class RunStoreActor:
    """Does on the real folder what remote workers ask. An actor on the driver's machine, see `start_store_actor`."""

    def __init__(self, path: str | None) -> None:
        """Of the run in this folder; None: `give` says which."""
        self._ledger: BadRowLedger | None = None
        self._read: tuple[str, Any] | None = None
        self._given: list[Any] = []
        self._is_given = threading.Event()
        if path is not None:
            self._open(path)

    def _open(self, path: str) -> None:
        self._folder = RunFolder(Path(path))
        self._writer = EventWriter(self._folder.events)

    def give(self, path: str | None, told: list[Any]) -> None:
        """Say which run it is, and what its workers are told: a reference to it. None, and nothing: there will be none."""
        if path is not None:
            self._open(path)
        self._given = told
        self._is_given.set()

    def given(self) -> list[Any]:
        """What `give` was given, once it was."""
        self._is_given.wait()
        return self._given

    def announce(self, rank: int, pid: int, host: str) -> None:
        """Write down where a rank runs."""
        (self._folder.path / f"rank-{rank}.json").write_text(json.dumps({"pid": pid, "host": host}))

    def begin_attempt(self) -> ResumePoint:
        """See `store.begin_attempt`."""
        return store.begin_attempt(self._folder)

    def read(self, name: str) -> list[Any]:
        """Where the files of a checkpoint are in Ray's object store: one copy for all who ask."""
        import ray

        if self._read is None or self._read[0] != name:
            self._read = name, ray.put(directory.read(self._folder.checkpoints / name))
        return [self._read[1]]

    def report(self, event: Event) -> None:
        """Add an event."""
        self._writer.write(event)

    def commit(self, attempt: int, keep: int, packed: directory.Packed, best: bool) -> CheckpointSaved:
        """See `store.commit_checkpoint`."""
        return store.commit_checkpoint(self._folder, attempt, keep, packed.content(), best=best)

    def note_bad_rows(self, policy: str, budget: int, rows: Sequence[BadRow]) -> None:
        """Take note of bad rows."""
        if self._ledger is None:
            self._ledger = BadRowLedger(self._folder, policy, budget, self._writer.write)
        self._ledger.add(rows)

    def record_order(self, rank: int, record: Mapping[str, Any]) -> None:
        """Write down the rows of a step."""
        store.append_order(self._folder, rank, record)

    def keep_picture(self, name: str, data: bytes) -> str:
        """See `store.keep_picture`."""
        return store.keep_picture(self._folder, name, data)

    def requests(self, rank: int) -> tuple[bool, bool]:
        """Whether workers are to stop, and whether the stacks of this rank are wanted."""
        return store.wants_stop(self._folder), stacks.wants_stacks(self._folder, rank)

    def give_stacks(self, rank: int, text: str) -> None:
        """Write the stacks of a rank."""
        stacks.give_stacks(self._folder, rank, text)

    def confirm_saved(self) -> None:
        """See `store.confirm_saved`."""
        store.confirm_saved(self._folder)

    def flush(self) -> None:
        """Write what waits."""
        self._writer.flush()


def start_store_actor(folder: RunFolder | None, variables: Mapping[str, str], num_waiting: int = 0) -> Any:
    """Start the actor of a run on this machine. It ends with this process.

    Args:
        folder: of the run; None: it will be told.
        variables: of its environment.
        num_waiting: how many workers may wait for the run at once.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    options: dict[str, Any] = {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
        "concurrency_groups": {COMMITS: 1} | ({WAITS: num_waiting} if num_waiting else {}),
        "runtime_env": {"env_vars": dict(variables)},
    }
    return ray.remote(**options)(RunStoreActor).remote(str(folder.path) if folder else None)


class RemoteRunStore:
    """The same methods as those of `LocalRunStore`, done by the actor."""

    def __init__(self, actor: Any, rank: int) -> None:
        """For this rank."""
        self._actor, self._rank = actor, rank
        self._in_flight: deque[Any] = deque()
        self._lock = threading.Lock()
        self._wants_stop = False
        self._closed = threading.Event()

    def announce(self) -> None:
        """As `LocalRunStore`; also begins to ask the actor what is wanted."""
        import ray

        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._ask("announce", self._rank, os.getpid(), address)
        threading.Thread(target=self._listen, name="run-store", daemon=True).start()

    def _ask(self, method: str, *arguments: Any, group: str | None = None) -> Any:
        import ray
        import ray.exceptions

        call = getattr(self._actor, method)
        call = call.options(concurrency_group=group) if group else call
        try:
            return ray.get(call.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaymillError):
                raise error.cause from None
            raise

    def _listen(self) -> None:
        import ray.exceptions

        while not self._closed.wait(POLL_INTERVAL_S):
            try:
                self._wants_stop, stacks_wanted = self._ask("requests", self._rank)
                if stacks_wanted:
                    self._ask("give_stacks", self._rank, _own_stacks())
            except (ray.exceptions.RayTaskError, RaymillError, OSError) as error:
                # A method of the actor failed once, such as on a full disk; this rank must still hear "stop" later.
                print(f"rank {self._rank}: the run's folder could not be asked, trying again: {error}", flush=True)
            except ray.exceptions.RayError:
                # The actor went with the driver; the training's own next question says so.
                return

    def begin_attempt(self) -> ResumePoint:
        """As `LocalRunStore`."""
        point: ResumePoint = self._ask("begin_attempt", group=COMMITS)
        return point

    def load(self, name: str) -> Snapshot:
        """As `LocalRunStore`."""
        import ray

        from raymill.checkpoint import snapshot

        return snapshot.unpack(ray.get(self._ask("read", name)[0]))

    def report(self, event: Event) -> None:
        """As `LocalRunStore`; events travel while training goes on, in order."""
        import ray

        with self._lock:
            self._in_flight.append(self._actor.report.remote(event))
            if len(self._in_flight) > MAX_EVENTS_IN_FLIGHT:
                ray.get(self._in_flight.popleft())

    def wants_stop(self) -> bool:
        """As `LocalRunStore`, as of at most some hundred milliseconds ago."""
        return self._wants_stop

    def confirm_saved(self) -> None:
        """As `LocalRunStore`."""
        self._ask("confirm_saved")

    def checkpoint_writer(self, attempt: int, keep: int, report: Report) -> CheckpointWriter:
        """As `LocalRunStore`."""
        from raymill.checkpoint import snapshot

        def write(taken: Snapshot, best: bool) -> None:
            report(self._ask("commit", attempt, keep, snapshot.pack(taken, best=best), best, group=COMMITS))

        return CheckpointWriter(write)

    def bad_row_ledger(self, policy: str, budget: int, report: Report) -> Callable[[Sequence[BadRow]], None]:
        """As `LocalRunStore`; the actor reports by itself."""
        return partial(self._ask, "note_bad_rows", policy, budget)

    def keep_picture(self, name: str, data: bytes) -> str:
        """As `LocalRunStore`."""
        place: str = self._ask("keep_picture", name, data)
        return place

    def record_order(self, record: Mapping[str, Any]) -> None:
        """As `LocalRunStore`."""
        self._ask("record_order", self._rank, record)

    def close(self) -> None:
        """As `LocalRunStore`."""
        import ray

        self._closed.set()
        with self._lock:
            ray.get(list(self._in_flight))
            self._in_flight.clear()
        self._ask("flush")


RunStore = LocalRunStore | RemoteRunStore


def _own_stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
