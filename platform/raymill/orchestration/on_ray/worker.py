"""One attempt on one rank of a Ray Train worker group.

Rank 0 finds where the run is, opens the stream there and tells the other ranks. So every start of a group, be it the first,
after a failure or after a resize, goes on from the last commit by itself, and no rank can be at another position than its data.
The workers join their process group themselves, so that neither the driver nor Ray's controller has to import torch.
"""

from __future__ import annotations

import importlib
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train

from raymill import faults, startup_gc
from raymill.config import load
from raymill.config.job_code import code_when_imported
from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.data import ray_stream
from raymill.data.manifest import Manifest
from raymill.data.reader import Packet
from raymill.errors import RunError
from raymill.orchestration.on_ray import turn
from raymill.orchestration.on_ray.root_cause import ran_out_of
from raymill.own_code.traces import for_a_journey
from raymill.record import inputs as record_inputs
from raymill.record.events import Event, FirstStepDone, StageReached
from raymill.record.folder import RunFolder
from raymill.record.processes import ProcessId
from raymill.record.remote_store import WAITS, RemoteRunStore, RunStore
from raymill.record.store import LocalRunStore, ResumePoint
from raymill.trained.model import Trained, read_inputs
from raymill.training.assembly import Job, WorkerContext, assemble, attempt_started, refuse_other_code
from raymill.training.outcome import Outcome

if TYPE_CHECKING:
    from ray.data import DataIterator

GROUP_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What the driver tells every worker.

    Attributes:
        folder: the run's folder, as the driver sees it.
        spec: the resolved job.
        plan: every derived number.
        manifest: the input when the run began.
        code: name -> SHA-256 of each file of the run's code.
        fitted: what the pipeline has fitted.
        inputs: the models that the job is given, as `record.inputs.pack` has them, in Ray's object store; None: there are none,
            or no other nodes.
        driver: the process that drives the run.
        driver_node: the Ray node where the folder is.
        store_actor: does what workers on other nodes ask of the folder; None: there are no other nodes.
        session: the folder with the gate where workers wait for their driver's turn; None: it has come.
    """

    folder: str
    spec: JobSpec
    plan: Plan
    manifest: Manifest
    code: Mapping[str, str]
    fitted: Mapping[str, bytes]
    inputs: ray.ObjectRef[dict[str, bytes]] | None
    driver: ProcessId
    driver_node: str
    store_actor: Any
    session: Path | None

    @property
    def run_id(self) -> str:
        """The run's id."""
        return Path(self.folder).name


@dataclass(frozen=True)
class Unassigned:
    """What a worker is told whose driver does not know its run yet.

    Attributes:
        store_actor: has the worker's `WorkerConfig`, once there is a run.
    """

    store_actor: Any


@dataclass(frozen=True)
class GroupStart:
    """What rank 0 tells the other ranks of a group.

    Attributes:
        point: where the attempt begins.
        iterators: the stream from there on, by rank.
        address: host and port where rank 0 listens.
    """

    point: ResumePoint
    iterators: list[DataIterator]
    address: tuple[str, int]


def work(config: dict[str, WorkerConfig | Unassigned]) -> Outcome:
    """The train function of Ray Train. Its argument has one entry, "worker"."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    faults.here(rank=rank)
    given = config["worker"]
    worker = _wait_for_run(given, rank) if isinstance(given, Unassigned) else given
    if worker.session is not None and not turn.has_come(worker.session):
        _import_all(worker, rank)
        if not turn.wait_at_gate(worker.session):
            raise RunError("this worker's driver stood by, and its turn will not come")
    faults.point("worker_start")
    store = _open_store(worker, rank)
    store.announce()
    if rank == 0:
        store.report(StageReached(stage="opening the stream"))
    files = ExitStack()
    try:
        inputs = files.enter_context(_inputs(worker))
        specs = worker.spec, *(one.spec for one in inputs.values())
        check_code = partial(refuse_other_code, worker.run_id, worker.code, *specs)
        pipeline, parts = load.import_pipeline(worker.spec, worker.fitted), (worker.spec, worker.plan, worker.manifest)
        job = assemble(*parts, pipeline, world_size, check_code=check_code, fitted=worker.fitted, inputs=inputs)
        listener = socket.create_server((_own_address(), 0)) if rank == 0 else None
        start = _start_together(worker, job, store, world_size, listener)
        # Packets are on their way while torch is still being imported.
        packets = ray_stream.prefetched(ray_stream.receive(start.iterators[rank], rank), depth=2)
        return _train(worker, job, store, rank, world_size, start, packets, listener)
    except Exception as error:
        told = error if ran_out_of(error) else for_a_journey(error, f"rank {rank}", rank)
        if told is error:
            raise
        raise told from error
    finally:
        files.close()
        store.close()


@contextmanager
def _inputs(worker: WorkerConfig) -> Iterator[Mapping[str, Trained]]:
    """The models that the job is given: in the run's folder, or in one of this process where that is on another machine."""
    if worker.inputs is None or _sees_folder(worker):
        yield read_inputs(Path(worker.folder))
        return
    with tempfile.TemporaryDirectory(prefix="raymill-inputs-") as there:
        packed: dict[str, bytes] = ray.get(worker.inputs)
        record_inputs.unpack(packed, Path(there))
        yield read_inputs(Path(there))


def _wait_for_run(unassigned: Unassigned, rank: int) -> WorkerConfig:
    """Start and import what any run needs, then wait for one."""
    _import_engine()
    if rank == 0:
        ray_stream.warm_up()
    given = unassigned.store_actor.given.options(concurrency_group=WAITS).remote()
    reference: list[ray.ObjectRef[WorkerConfig]] = ray.get(given)
    if not reference:
        raise RunError("this worker waited for a run, and there will be none")
    worker: WorkerConfig = ray.get(reference[0])
    return worker


def _import_engine() -> None:
    # The last is what DistributedDataParallel imports when the first one is made.
    for name in ("raymill.training.loop", "ray.data", "torch._dynamo"):
        importlib.import_module(name)


def _sees_folder(worker: WorkerConfig) -> bool:
    return bool(ray.get_runtime_context().get_node_id() == worker.driver_node)


def _import_all(worker: WorkerConfig, rank: int) -> None:
    """Import what this worker will need, the job's own code too; on rank 0 let the processes that will read do so as well."""
    inputs = read_inputs(Path(worker.folder))
    specs = worker.spec, *(one.spec for one in inputs.values())
    if rank == 0:
        reading = ray.remote(num_cpus=worker.plan.read_task_cpus)(_import_reading)
        imported = [reading.remote(*specs) for _ in range(max(1, int(worker.plan.data_cpus)))]
    _import_engine()
    pipeline = load.import_pipeline(worker.spec, worker.fitted)
    load.import_task(worker.spec, pipeline.schema, worker.fitted, inputs)
    code_when_imported(*specs)
    if rank == 0:
        ray.get(imported)


def _import_reading(spec: JobSpec, *of_inputs: JobSpec) -> None:
    load.import_pipeline(spec)
    code_when_imported(spec, *of_inputs)
    importlib.import_module("ray.data")


def _open_store(worker: WorkerConfig, rank: int) -> RunStore:
    if _sees_folder(worker):
        return LocalRunStore(RunFolder(Path(worker.folder)), rank)
    return RemoteRunStore(worker.store_actor, rank)


def _start_together(
    worker: WorkerConfig, job: Job, store: RunStore, world_size: int, listener: socket.socket | None
) -> GroupStart:
    """Rank 0 (which has a listener) begins the attempt and opens the stream; all ranks get the same."""
    from ray.train.collective import broadcast_from_rank_zero

    opened = None
    if listener is not None:
        point = store.begin_attempt()
        faults.point("run_taken")
        iterators = ray_stream.split_with_ray(
            job.going_on(point).reader(f"{worker.run_id}.{point.attempt}"),
            point.position,
            world_size,
            data_cpus=worker.plan.data_cpus,
            task_cpus=worker.plan.read_task_cpus,
            evaluated=point.evaluated,
        )
        # By reference: what Ray Train broadcasts is meant to be small.
        opened = [ray.put(GroupStart(point, iterators, listener.getsockname()))]
    start: GroupStart = ray.get(broadcast_from_rank_zero(opened)[0])
    return start


def _train(
    worker: WorkerConfig,
    job: Job,
    store: RunStore,
    rank: int,
    world_size: int,
    start: GroupStart,
    packets: Iterator[Packet],
    listener: socket.socket | None,
) -> Outcome:
    if rank == 0:
        store.report(StageReached(stage="importing torch and the job's code"))
    import torch

    from raymill.parallel import process_group
    from raymill.training import loop

    device = torch.device("cuda", 0) if worker.spec.scale.gpus_per_worker else torch.device("cpu")
    context = WorkerContext(rank=rank, world_size=world_size, device=device, store=store)
    # Before the group is joined: what the job's own module raises is then raised by itself.
    _ = job.task
    # Somebody may have edited it since the attempt before.
    job.check_code()
    process_group.join_group(start.address, listener, rank, world_size, device, GROUP_TIMEOUT_S)

    def report(event: Event) -> None:
        if isinstance(event, FirstStepDone):
            startup_gc.finish()
        if rank == 0:
            store.report(event)

    job = job.going_on(start.point)
    report(attempt_started(job, start.point, world_size, worker.driver))
    together = False
    try:
        outcome = loop.train(job, context, start.point, packets, report, store.wants_stop)
        together = True
        if rank == 0:
            store.confirm_saved()
        return outcome
    finally:
        process_group.leave_group(together=together)


def _own_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
