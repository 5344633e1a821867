"""Real rank processes for tests: a pool that stays up, in which each case joins and leaves a process group of its own.

RankPool            processes 0..n-1, started once; `call` runs a function on the first `world_size` of them
TrainingRun         one run's folder; `go` is one attempt, from the newest checkpoint, at any number of ranks
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from raymill.checkpoint import directory
from raymill.config.spec import JobSpec
from raymill.task import Pipeline, Schema, Task
from raymill.training.outcome import Outcome

TIMEOUT_S = 120.0

PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "raymill.training.loop",
    "raymill.data.sources",
    "worker_harness",
]
"""What a rank would import by and by; DistributedDataParallel takes seconds for it."""

Batches = dict[int, list[int]]
"""Position behind a step -> its row ids, in the order of shards."""


# ---------------------------------------------------------------- the pool


class RankPool:
    """Processes that stay up between cases, so that torch is imported once in each."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def call(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(rank, world_size, port, *args)` on each rank; the results by rank, or the first rank's error.

        Raises:
            Crash: a rank died.
        """
        if not self._ranks:
            self._start()
        port = self._ask([(_listen, ())])[0] if world_size > 1 else 0
        return self._ask([(function, (rank, world_size, port, *args)) for rank in range(world_size)])

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []

    def _start(self) -> None:
        # Forked from a process that has torch, so that a rank that was killed costs its successor no import.
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(PRELOADED)
        for _ in range(self._size):
            ours, theirs = forks.Pipe()
            process = forks.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _ask(self, requests: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
        pipes = [pipe for _, pipe in self._ranks[: len(requests)]]
        for pipe, request in zip(pipes, requests, strict=True):
            pipe.send(request)
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT_S):
                self.close()  # new ones are started for the next case
                raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                self.close()
                raise Crash(f"rank {rank} is dead") from None
        for _, error, text in answers:
            if error is not None:
                error.add_note(text)
                raise error
        return [value for value, _, _ in answers]


_listeners: list[socket.socket] = []


def _listen() -> int:
    listener = socket.create_server(("127.0.0.1", 0))
    _listeners[:] = [listener]
    return int(listener.getsockname()[1])


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(*args), None, ""))
        except Exception as error:  # the test decides whether it was expected
            pipe.send((None, error, traceback.format_exc()))


def join(rank: int, world_size: int, port: int) -> None:
    """Join the process group of one case; `raymill.parallel.leave_group` leaves it."""
    import torch

    from raymill.parallel.process_group import join_group

    listener = _listeners.pop() if rank == 0 and world_size > 1 else None
    join_group(("127.0.0.1", port), listener, rank, world_size, torch.device("cpu"), TIMEOUT_S)


# ---------------------------------------------------------------- a run


@dataclass(frozen=True)
class Experiment:
    """What is trained.

    Attributes:
        make_task: schema -> Task; importable, as it is called in every rank.
        make_pipeline: makes the Pipeline, likewise.
        values: the job's values, as in a job file without names and import paths.
        chunk_rows: rows of a window that are transformed together; 0: all of them.
    """

    make_task: Callable[[Schema], Task]
    make_pipeline: Callable[[], Pipeline]
    values: Mapping[str, Any]
    chunk_rows: int = 0

    def with_values(self, **sections: Mapping[str, Any]) -> Experiment:
        """The same with some values changed, by section of the job file."""
        merged = {name: {**self.values.get(name, {}), **section} for name, section in sections.items()}
        return replace(self, values={**self.values, **merged})

    def spec(self, world_size: int) -> JobSpec:
        """The job at this number of workers."""
        loop = {"threads": 1, "record_order": True, **self.values.get("loop", {})}
        values = {**self.values, "loop": loop, "scale": {"workers": world_size}}
        return JobSpec.model_validate({"name": "probe", "task": "-", "pipeline": "-", **values})


class Crash(Exception):
    """A rank was killed."""


@dataclass(frozen=True)
class Start:
    """How one attempt is to go, see `TrainingRun.go`."""

    folder: Path
    attempt: int
    stop_after: int | None
    crash_after: int | None
    warm_up: bool
    skipped_positions: frozenset[int] = frozenset()


@dataclass
class Attempt:
    """What one attempt gave.

    Attributes:
        outcomes: what `loop.train` returned, by rank.
        events: what rank 0 reported.
    """

    outcomes: list[Outcome]
    events: list[dict[str, Any]]

    @property
    def sha256(self) -> str:
        """The weights' SHA-256, which all ranks must agree on."""
        found = {outcome.weights_sha256 for outcome in self.outcomes}
        assert len(found) == 1, "ranks ended with different weights"
        return str(found.pop())

    @property
    def first(self) -> Outcome:
        """The outcome of rank 0."""
        return self.outcomes[0]

    def metrics(self, kind: str) -> list[dict[str, float]]:
        """The metrics of all events of a kind, in order."""
        return [event["metrics"] for event in self.events if event["kind"] == kind]


@dataclass
class TrainingRun:
    """One run's folder, in which attempts follow each other."""

    pool: RankPool
    folder: Path
    experiment: Experiment
    attempts: int = 0
    batches: Batches = field(default_factory=dict)

    def go(
        self,
        world_size: int,
        stop_after: int | None = None,
        *,
        crash_after: int | None = None,
        warm_up: bool = True,
        skipped_positions: frozenset[int] = frozenset(),
    ) -> Attempt:
        """Train from the newest checkpoint.

        Args:
            world_size: ranks.
            stop_after: ask to stop once this many steps of the job are done; None: to the end.
            crash_after: rank 0 is killed at that moment, and `Crash` is raised.
            warm_up: False leaves out `DistributedObjective.warm_up`.
            skipped_positions: positions behind batches that are not trained on.
        """
        self.attempts += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        start = Start(self.folder, self.attempts, stop_after, crash_after, warm_up, skipped_positions)
        try:
            results = self.pool.call(world_size, run_rank, self.experiment, start)
        finally:
            self._collect_batches(world_size)
        return Attempt([outcome for outcome, _ in results], results[0][1])

    def _collect_batches(self, world_size: int) -> None:
        found: Batches = {}
        begun: dict[int, int] = {}
        for rank in range(world_size):
            path = self.folder / f"order-{rank}.jsonl"
            for line in path.read_text().splitlines() if path.exists() else ():
                entry = json.loads(line)
                found.setdefault(entry["position"], []).extend(entry["rows"])
                begun[rank] = entry["position"]
            path.unlink(missing_ok=True)
        for position, rows in found.items():
            if position > begun[0]:
                continue  # rank 0 died before it got there
            assert self.batches.setdefault(position, rows) == rows, "a step that was done again had other rows"


NewRun = Callable[[Experiment], TrainingRun]
"""Makes a run in a folder of its own."""


def interrupted(run: TrainingRun, *world_sizes: int) -> Attempt:
    """Stop after a step, crash some steps after the last save, and train to the end; at these numbers of workers."""
    run.go(world_sizes[0], stop_after=1)
    with pytest.raises(Crash):
        run.go(world_sizes[1], crash_after=7)
    return run.go(world_sizes[2])


@dataclass(frozen=True)
class Pair:
    """The same experiment undisturbed, and stopped and killed on its way.

    Attributes:
        whole, run: the two runs.
        expected, found: the attempt in which each of them ended.
    """

    whole: TrainingRun
    run: TrainingRun
    expected: Attempt
    found: Attempt


def stopped_and_killed(new_run: NewRun, experiment: Experiment, world_size: int, *, every_steps: int = 3) -> Pair:
    """Hold a run that is stopped and killed against one that nothing disturbs: the same rows in each step, the same weights to
    the bit, the same metrics.

    Args:
        every_steps: between two saves of the former.
    """
    whole, run = new_run(experiment), new_run(experiment.with_values(checkpoint={"every_steps": every_steps}))
    pair = Pair(whole, run, whole.go(world_size), interrupted(run, world_size, world_size, world_size))
    assert pair.found.sha256 == pair.expected.sha256
    assert pair.found.first.metrics == pair.expected.first.metrics
    assert run.batches == whole.batches
    return pair


def strict_at_other_numbers(new_run: NewRun, experiment: Experiment, *, every_steps: int = 3) -> Pair:
    """As `stopped_and_killed`, under `strict` and at another number of workers in each attempt: the same weights to the bit."""
    strict = experiment.with_values(loop={"strict": True, "gradient_accumulation_steps": 1, "shards": 6})
    whole, run = new_run(strict), new_run(strict.with_values(checkpoint={"every_steps": every_steps}))
    pair = Pair(whole, run, whole.go(2), interrupted(run, 1, 3, 2))
    assert pair.found.sha256 == pair.expected.sha256
    return pair


def run_rank(rank: int, world_size: int, port: int, experiment: Experiment, start: Start) -> tuple[Outcome, list[dict[str, Any]]]:
    """One rank of one attempt: what `orchestration.worker` does, without Ray."""
    import torch

    from raymill.config import plan
    from raymill.data.manifest import take_manifest
    from raymill.data.reader import read_locally
    from raymill.parallel import ddp, process_group
    from raymill.record.events import Event, as_record
    from raymill.record.folder import RunFolder
    from raymill.record.store import LocalRunStore, ResumePoint
    from raymill.training import loop
    from raymill.training.assembly import WorkerContext, assemble

    spec, pipeline = experiment.spec(world_size), experiment.make_pipeline()
    manifest = take_manifest(pipeline, lenient=spec.bad_rows.lenient)
    planned = plan.make_plan(spec, manifest, plan.ClusterFacts(num_cpus=8, num_gpus=0, memory_bytes=2**32))
    planned = replace(planned, chunk_rows=experiment.chunk_rows)
    job = assemble(spec, planned, manifest, pipeline, world_size, lambda: experiment.make_task(pipeline.schema))
    name = directory.find_latest(start.folder / "checkpoints", print)
    state = directory.read_state(start.folder / "checkpoints" / name) if name else {"position": 0, "evaluated": True}
    position = state["position"]
    ended = state.get("ended") is not None
    point = ResumePoint(start.attempt, name, position, start.skipped_positions, evaluated=state["evaluated"], ended=ended)
    job = job.going_on(point)
    store = LocalRunStore(RunFolder(start.folder), rank)
    context = WorkerContext(rank=rank, world_size=world_size, device=torch.device("cpu"), store=store)
    events: list[dict[str, Any]] = []
    steps_done = job.order.step(position)

    def should_stop() -> bool:
        nonlocal steps_done
        steps_done += 1
        if steps_done == start.crash_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return start.stop_after is not None and steps_done >= start.stop_after

    def report(event: Event) -> None:
        events.append(as_record(event))
        if rank == 0:
            store.report(event)

    warm_up = ddp.DistributedObjective.warm_up
    if not start.warm_up:
        ddp.DistributedObjective.warm_up = lambda self: None  # type: ignore[method-assign]
    join(rank, world_size, port)
    together = False
    try:
        packets = read_locally(job.reader(f"{start.folder.name}.{start.attempt}"), position, rank, evaluated=point.evaluated)
        outcome = loop.train(job, context, point, packets, report, should_stop)
        together = True
        return outcome, events
    finally:
        store.close()
        process_group.leave_group(together=together)
        ddp.DistributedObjective.warm_up = warm_up  # type: ignore[method-assign]
