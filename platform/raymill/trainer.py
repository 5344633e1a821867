"""Plan and stream -> Ray Train. Ray Train places, starts, watches and restarts the workers; `loop` is what they run.

Rank 0 of each worker group finds the newest whole checkpoint, opens the stream at its position and tells the other ranks.
So every start of a group, be it the first, after a failure or after a resize, goes on from the last commit by itself, and
no rank can be at another position than its data. The workers join their process group themselves, so that neither the
driver nor Ray's controller has to import torch.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
import ray.exceptions
import ray.train
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raymill import faults, load, manifest, plan, stall, stream
from raymill.checkpoint import clean, find_latest
from raymill.errors import RaymillError, RunError, WorkerError
from raymill.home import RunFolder
from raymill.order import TRAIN, VALIDATION
from raymill.plan import Plan
from raymill.retry import Cause
from raymill.spec import JobSpec
from raymill.tracking import EventWriter, read_events

if TYPE_CHECKING:
    from ray.data import DataIterator

    from raymill.loop import Job, Seat

T = TypeVar("T")


class EmbeddedTrainer(DataParallelTrainer):
    """Ray Train without the two helper processes that a Ray of our own has no use for.

    One removes placement groups after a controller's death, which end with an embedded Ray anyway; the other splits
    data sets given to the trainer, and none is given. Each costs a process that imports Ray Data before the first step.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


GROUP_TIMEOUT_S = 600.0
LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, WorkerHealthCheckFailedError)
"""What Ray raises where a process is gone."""


def fit(folder: RunFolder, planned: Plan, spec: JobSpec) -> dict[str, Any]:
    """Train on Ray Train workers until the end, an interruption, or a failure.

    Returns:
        The outcome of rank 0, see `loop.train`.

    Raises:
        RaymillError: the root cause, translated from Ray's errors.
    """
    resources = {"CPU": planned.worker_cpus}
    if spec.scale.gpus_per_worker:
        resources["GPU"] = spec.scale.gpus_per_worker
    trainer = EmbeddedTrainer(
        work,
        train_loop_config={"folder": str(folder.path), "driver_pid": os.getpid()},
        scaling_config=ScalingConfig(
            num_workers=(planned.least_workers, planned.num_workers) if spec.scale.elastic else planned.num_workers,
            use_gpu=bool(spec.scale.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # the trainer's stub names the class of Ray Train V1
            name="ray-train",
            storage_path=str(folder.path),
            # A start that fails three times will fail for ever; Ray's default is to try for ever.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
        ),
    )
    try:
        result = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise root_cause(error) from error
    outcome = getattr(result, "return_value", None)
    if not isinstance(outcome, dict):
        raise RunError(f"the workers ended without an outcome; see {folder.ray_log}")
    return outcome


def root_cause(error: Exception) -> RaymillError:
    """The error that explains a failed training: our own kind from whichever rank raised it, else the first that is not
    a consequence of another rank's death."""
    failures: dict[int, BaseException] = dict(getattr(error, "worker_failures", {}))
    for rank in sorted(failures):
        for cause in _causes(failures[rank]):
            if isinstance(cause, RaymillError):
                return cause
    lost = [rank for rank in sorted(failures) if any(isinstance(cause, LOST) for cause in _causes(failures[rank]))]
    if lost:
        ranks = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
        text = "".join(traceback.format_exception(failures[lost[0]]))
        if "OutOfMemory" in text:
            message = f"{ranks} ran out of memory. Lower loop.global_batch_rows or loop.window_rows, or raise loop.accumulate."
            return WorkerError(message, lost[0], text, Cause.MEMORY)
        return WorkerError(f"{ranks} died, or lost a process that it needs", lost[0], text, Cause.LOST_PROCESS)
    for rank in sorted(failures, key=lambda rank: (_is_consequence(failures[rank]), rank)):
        text = "".join(traceback.format_exception(failures[rank]))
        said = str(failures[rank]).strip().splitlines()[-1:] or [""]
        why = Cause.LOST_PROCESS if _is_consequence(failures[rank]) else Cause.CODE
        return WorkerError(f"rank {rank} failed: {type(failures[rank]).__name__}: {said[0]}", rank, text, why)
    return WorkerError(f"training failed: {error}", None, "".join(traceback.format_exception(error)), Cause.LOST_PROCESS)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = getattr(seen, "cause", None)
        seen = inner if isinstance(inner, BaseException) else (seen.__cause__ or seen.__context__)


def _is_consequence(error: BaseException) -> bool:
    """Whether this is what a rank says when another one is gone."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("Connection", "gloo", "NCCL"))


# ---------------------------------------------------------------- on each worker


def work(config: dict[str, Any]) -> dict[str, Any]:
    """The train function of Ray Train: one attempt on one rank."""
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    faults.here(rank=rank)
    faults.point("worker_start")
    folder = RunFolder(Path(config["folder"]))
    stall.announce(folder, rank)
    # By reference: what Ray Train broadcasts is meant to be small.
    listener = socket.create_server((_host(), 0)) if rank == 0 else None
    opened = [ray.put(_open(folder, world_size, listener.getsockname()))] if listener else None
    start: dict[str, Any] = ray.get(broadcast_from_rank_zero(opened)[0]) | {"driver_pid": config["driver_pid"]}
    # Packets are on their way while torch is still being imported.
    packets = ahead(stream.receive(start["iterators"][rank], rank), depth=2)
    return _train(folder, rank, world_size, start, packets, listener)


def _open(folder: RunFolder, world_size: int, meeting: tuple[str, int]) -> dict[str, Any]:
    """On rank 0: take over the run, find where it is, and open the stream there."""
    attempt = _next_attempt(folder)
    faults.point("run_taken")
    clean(folder.checkpoints)
    notes: list[str] = []
    name = find_latest(folder.checkpoints, notes.append)
    record = json.loads((folder.checkpoints / name / "state.json").read_text()) if name else None
    position = record["position"] if record else 0
    spec, planned, pipeline, taken = _read(folder)
    reader = stream.Reader(
        f"{folder.run_id}.{attempt}",
        plan.job_order(spec, planned, taken),
        _cuts(planned, world_size),
        {split: part.fragments for split, part in taken.splits.items()},
        pipeline,
    )
    iterators: list[DataIterator] = stream.split_with_ray(
        reader, position, world_size, data_cpus=planned.data_cpus, task_cpus=planned.read_task_cpus
    )
    return {
        "attempt": attempt,
        "checkpoint": name,
        "iterators": iterators,
        "meeting": meeting,
        "notes": notes,
        "passed_over": [refused["position"] for refused in refusals(folder)],
    }


def _train(
    folder: RunFolder,
    rank: int,
    world_size: int,
    start: dict[str, Any],
    packets: Iterator[stream.Packet],
    listener: socket.socket | None,
) -> dict[str, Any]:
    import torch

    from raymill import checkpoint, loop, parallel

    spec, planned, pipeline, taken = _read(folder)
    device = torch.device("cuda", 0) if spec.scale.gpus_per_worker else torch.device("cpu")
    job: Job = loop.Job(
        spec=spec,
        plan=planned,
        order=plan.job_order(spec, planned, taken),
        cuts=_cuts(planned, world_size),
        task=load.import_task(spec, pipeline.schema),
        passed_over=frozenset(start["passed_over"]),
        **({"collate": pipeline.collate} if pipeline.collate else {}),
    )
    seat: Seat = loop.Seat(rank=rank, world_size=world_size, device=device, folder=folder.path, attempt=start["attempt"])
    snapshot = checkpoint.load(folder.checkpoints / start["checkpoint"]) if start["checkpoint"] else None
    parallel.join_group(start["meeting"], listener, rank, world_size, device, GROUP_TIMEOUT_S)
    writer = EventWriter(folder.events) if rank == 0 else None
    if writer:
        writer.write(
            {
                "kind": "start",
                "attempt": start["attempt"],
                "num_workers": world_size,
                "step": snapshot.record["step"] if snapshot else 0,
                "num_total_steps": planned.total_steps,
                "resumed": snapshot is not None,
                "notes": start["notes"],
                "pid": start["driver_pid"],
            }
        )
    report = writer.write if writer else lambda event: None
    together = False
    try:
        outcome = loop.train(job, seat, snapshot, packets, report, folder.stop.exists)
        together = True
        return outcome
    finally:
        if writer:
            writer.close()
        parallel.leave_group(together=together)


def refusals(folder: RunFolder) -> list[dict[str, Any]]:
    """The batches that were refused under the policy of going back and leaving them out."""
    events, _ = read_events(folder.events)
    return [event for event in events if event["kind"] == "refused" and event["policy"] == "rollback"]


def _host() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def _read(folder: RunFolder) -> tuple[JobSpec, Plan, Any, manifest.Manifest]:
    spec = JobSpec.model_validate(json.loads(folder.spec.read_text()))
    planned = Plan(**json.loads(folder.plan.read_text()))
    return spec, planned, load.import_pipeline(spec), manifest.from_record(json.loads(folder.manifest.read_text()))


def _cuts(planned: Plan, world_size: int) -> dict[str, Any]:
    return {split: plan.cut(planned, split, world_size) for split in (TRAIN, VALIDATION)}


def _next_attempt(folder: RunFolder) -> int:
    from raymill.checkpoint import write_file

    path = folder.path / "attempt"
    attempt = int(path.read_text()) + 1 if path.exists() else 1
    write_file(path, str(attempt))
    return attempt


def ahead(values: Iterator[T], depth: int) -> Iterator[T]:
    """The same values, fetched up to `depth` ahead by a thread that starts at once."""
    fetched: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)

    def fetch() -> None:
        try:
            for value in values:
                fetched.put(("value", value))
            fetched.put(("end", None))
        except BaseException as error:  # it is raised again below, in the thread that asks for the value
            fetched.put(("error", error))

    threading.Thread(target=fetch, name="packets", daemon=True).start()

    def hand_out() -> Iterator[T]:
        while True:
            kind, value = fetched.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    return hand_out()
