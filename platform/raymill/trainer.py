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
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
import ray.exceptions
import ray.train
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raymill import cluster, drain, faults, load, manifest, plan, stream
from raymill.desk import Desk, FarDesk, NearDesk, Taken, start_clerk
from raymill.errors import RaymillError, RunError, WorkerError
from raymill.home import RunFolder
from raymill.order import TRAIN, VALIDATION
from raymill.plan import Plan
from raymill.retry import Cause
from raymill.spec import JobSpec
from raymill.tracking import append_event

if TYPE_CHECKING:
    from ray.data import DataIterator

    from raymill.loop import Job, Seat

T = TypeVar("T")

GROUP_TIMEOUT_S = 600.0
RESIZE_TIMEOUT_S = 30.0
"""Workers that have not saved by then begin again at their last checkpoint."""

ELASTIC_START_TIMEOUT_S = "15"
"""A place that Ray Train counted on may have gone; it then looks again what there is."""

LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, WorkerHealthCheckFailedError)
"""What Ray raises where a process is gone."""


class EmbeddedTrainer(DataParallelTrainer):
    """Ray Train without the two helper processes that a Ray of our own has no use for.

    One removes placement groups after a controller's death, which end with an embedded Ray anyway; the other splits
    data sets given to the trainer, and none is given. Each costs a process that imports Ray Data before the first step.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


class ResizeCallback(ControllerCallback, WorkerGroupCallback):
    """Lets the workers save before Ray Train ends them to begin again with another number. It runs in Ray's controller."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._resizing = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ask the workers to save and end."""
        if isinstance(current_state, ResizingState):
            self._resizing = True
            self._folder.handover.touch()
            num_workers = current_state.scaling_decision.num_workers  # type: ignore[attr-defined]
            append_event(self._folder, {"kind": "resize", "num_workers": num_workers})

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Wait until they have."""
        deadline_s = time.monotonic() + RESIZE_TIMEOUT_S
        while self._resizing and self._folder.handover.exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        self._resizing = False


def fit(folder: RunFolder, planned: Plan, spec: JobSpec) -> dict[str, Any]:
    """Train on Ray Train workers until the end, an interruption, or a failure.

    Returns:
        The outcome of rank 0, see `loop.train`.

    Raises:
        RaymillError: the root cause, translated from Ray's errors.
    """
    each = _resources(planned, spec)
    trainer = _trainer(folder, planned, spec, each)
    # A machine that a Ray of our own runs on is not drained.
    watched = drain.watched(folder, planned.least_workers, each) if cluster.address() else nullcontext(drain.Leaving())
    try:
        with watched as leaving:
            result = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise root_cause(error) from error
    outcome = getattr(result, "return_value", None)
    if not isinstance(outcome, dict):
        raise RunError(f"the workers ended without an outcome; see {folder.ray_log}")
    if outcome["status"] == "interrupted" and leaving.goes_on and not folder.stop.exists():
        message = f"nodes {', '.join(leaving.nodes)} are to leave the cluster; all is saved, and others have room"
        raise WorkerError(message, cause=Cause.DRAIN)
    return outcome


def _resources(planned: Plan, spec: JobSpec) -> dict[str, float]:
    gpus = {"GPU": spec.scale.gpus_per_worker} if spec.scale.gpus_per_worker else {}
    return {"CPU": planned.worker_cpus, **gpus}


def _trainer(folder: RunFolder, planned: Plan, spec: JobSpec, each: dict[str, float]) -> DataParallelTrainer:
    on_cluster = cluster.address() is not None
    # On a cluster, processes of a run do not inherit it from the driver.
    variables = {cluster.SESSION_VARIABLE: os.environ[cluster.SESSION_VARIABLE]} if on_cluster else {}
    if spec.scale.elastic:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", ELASTIC_START_TIMEOUT_S)
    trainer = (DataParallelTrainer if on_cluster else EmbeddedTrainer)(
        work,
        train_loop_config={
            "folder": str(folder.path),
            "spec": spec,
            "plan": planned,
            "manifest": manifest.from_record(json.loads(folder.manifest.read_text())),
            "driver_pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "clerk": start_clerk(folder, variables) if on_cluster else None,
        },
        scaling_config=ScalingConfig(
            num_workers=(planned.least_workers, planned.num_workers) if spec.scale.elastic else planned.num_workers,
            use_gpu=bool(spec.scale.gpus_per_worker),
            resources_per_worker=each,
            elastic_resize_monitor_interval_s=spec.scale.resize_check_s,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # the trainer's stub names the class of Ray Train V1
            name="ray-train",
            storage_path=str(folder.path),
            # A start that fails three times will fail for ever; Ray's default is to try for ever.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3, max_preemption_failures=0),
            callbacks=[ResizeCallback(folder)] if spec.scale.elastic else [],  # type: ignore[list-item]  # it takes these too
            worker_runtime_env={"env_vars": variables} if variables else None,
        ),
    )
    # Ray reserves places under this name; those of a driver that was killed are then this one's, not lost for minutes.
    object.__setattr__(trainer.train_run_context, "run_id", folder.run_id)
    return trainer


def root_cause(error: Exception) -> RaymillError:
    """The error that explains a failed training: our own kind from whichever rank raised it, else the first that is not
    a consequence of another rank's death."""
    failures: dict[int, BaseException] = dict(getattr(error, "worker_failures", {}))
    for rank in sorted(failures):
        for cause in _causes(failures[rank]):
            # What a task raised comes wrapped in a class that Ray makes of the error's and its own; the error is inside.
            if isinstance(cause, RaymillError) and not isinstance(cause, ray.exceptions.RayError):
                return cause
    for rank in sorted(failures):
        for cause in _causes(failures[rank]):
            if what := _ran_out_of(cause):
                text = "".join(traceback.format_exception(failures[rank]))
                words = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
                return WorkerError(f"rank {rank} ran out of {what} It said: {words}", rank, text, Cause.MEMORY)
    lost = [rank for rank in sorted(failures) if any(isinstance(cause, LOST) for cause in _causes(failures[rank]))]
    if lost:
        ranks = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
        text = "".join(traceback.format_exception(failures[lost[0]]))
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


def _ran_out_of(error: BaseException) -> str | None:
    """What was refused to a rank or taken by it too much, and what to do; None: nothing. Torch has no name for it on CPUs."""
    if isinstance(error, (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError)):
        folder = os.environ[cluster.SESSION_VARIABLE] if cluster.address() is None else "Ray on that machine"
        return (
            f"space: Ray's object store is full, and so is the disk of {folder}, where the rest would go. Free some there, "
            "name another disk with TMPDIR, or lower loop.window_rows."
        )
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    refused = ("can't allocate memory", "Memory on the node", "OutOfMemoryError")
    if known or (isinstance(error, (RuntimeError, *LOST)) and any(words in str(error) for words in refused)):
        return "memory. Lower loop.global_batch_rows or loop.window_rows, raise loop.accumulate, or give the machine more."
    return None


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
    desk = _desk(config, rank)
    desk.announce()
    # By reference: what Ray Train broadcasts is meant to be small.
    listener = socket.create_server((_host(), 0)) if rank == 0 else None
    opened = [ray.put(_open(config, desk, world_size, listener.getsockname()))] if listener else None
    start: dict[str, Any] = ray.get(broadcast_from_rank_zero(opened)[0])
    # Packets are on their way while torch is still being imported.
    packets = ahead(stream.receive(start["iterators"][rank], rank), depth=2)
    try:
        return _train(config, desk, rank, world_size, start, packets, listener)
    finally:
        desk.close()


def _desk(config: dict[str, Any], rank: int) -> Desk:
    if ray.get_runtime_context().get_node_id() == config["node"]:
        return NearDesk(RunFolder(Path(config["folder"])), rank)
    return FarDesk(config["clerk"], rank)


def _open(config: dict[str, Any], desk: Desk, world_size: int, meeting: tuple[str, int]) -> dict[str, Any]:
    """On rank 0: take over the run, find where it is, and open the stream there."""
    taken = desk.take_over()
    faults.point("run_taken")
    spec, planned, data = config["spec"], config["plan"], config["manifest"]
    reader = stream.Reader(
        f"{Path(config['folder']).name}.{taken.attempt}",
        plan.job_order(spec, planned, data),
        _cuts(planned, world_size),
        {split: part.fragments for split, part in data.splits.items()},
        load.import_pipeline(spec),
        spec.bad_rows.lenient,
    )
    iterators: list[DataIterator] = stream.split_with_ray(
        reader, taken.position, world_size, data_cpus=planned.data_cpus, task_cpus=planned.read_task_cpus
    )
    return {"taken": taken, "iterators": iterators, "meeting": meeting}


def _train(
    config: dict[str, Any],
    desk: Desk,
    rank: int,
    world_size: int,
    start: dict[str, Any],
    packets: Iterator[stream.Packet],
    listener: socket.socket | None,
) -> dict[str, Any]:
    import torch

    from raymill import loop, parallel

    spec, planned = config["spec"], config["plan"]
    taken: Taken = start["taken"]
    pipeline = load.import_pipeline(spec)
    device = torch.device("cuda", 0) if spec.scale.gpus_per_worker else torch.device("cpu")
    job: Job = loop.Job(
        spec=spec,
        plan=planned,
        order=plan.job_order(spec, planned, config["manifest"]),
        cuts=_cuts(planned, world_size),
        task=load.import_task(spec, pipeline.schema),
        passed_over=frozenset(taken.passed_over),
        **({"collate": pipeline.collate} if pipeline.collate else {}),
    )
    seat: Seat = loop.Seat(rank=rank, world_size=world_size, device=device, desk=desk, attempt=taken.attempt)
    snapshot = desk.load(taken.checkpoint) if taken.checkpoint else None
    parallel.join_group(start["meeting"], listener, rank, world_size, device, GROUP_TIMEOUT_S)
    report = desk.report if rank == 0 else lambda event: None
    report(
        {
            "kind": "start",
            "attempt": taken.attempt,
            "num_workers": world_size,
            "step": snapshot.record["step"] if snapshot else 0,
            "num_total_steps": planned.total_steps,
            "resumed": snapshot is not None,
            "notes": taken.notes,
            "pid": config["driver_pid"],
        }
    )
    together = False
    try:
        outcome = loop.train(job, seat, snapshot, packets, report, desk.wants_stop)
        together = True
        if rank == 0:
            desk.rest()
        return outcome
    finally:
        parallel.leave_group(together=together)


def _host() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def _cuts(planned: Plan, world_size: int) -> dict[str, Any]:
    return {split: plan.cut(planned, split, world_size) for split in (TRAIN, VALIDATION)}


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
