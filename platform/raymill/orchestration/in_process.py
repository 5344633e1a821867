"""The executor in this process: one worker, no Ray, no other process but what the job's own code starts.

The order, the weights and the run's folder are those of one worker on Ray, so either can go on with the other's runs. What the
job's code raises comes out as it is, with its own traceback, and `breakpoint()` stops where it stands. Nothing of the process is
changed for the caller: not its environment, not torch's threads or random state.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from raymill import faults
from raymill.data.reader import read_locally
from raymill.errors import Interrupted, RaymillError
from raymill.files import read_record, run_lock
from raymill.orchestration.attempts import Show, committed_step, run_attempts, stop_on_signal
from raymill.orchestration.prepare import Prepared, assembled
from raymill.orchestration.summary import conclude
from raymill.orchestration.tracker import tracking_summary
from raymill.own_code.traces import tell
from raymill.preflight.process import Look, here, newest_weights
from raymill.record.events import DeliveryStarted, Event, RunStopped, StageReached, append_event
from raymill.record.folder import RunFolder
from raymill.record.processes import ProcessId
from raymill.record.store import LocalRunStore
from raymill.training.assembly import Job, WorkerContext, attempt_started


def preflight(folder: RunFolder, prepared: Prepared) -> AbstractContextManager[Look]:
    """Try the job's own code in this process, which has to import torch anyway, before anything else."""
    job = assembled(prepared, world_size=1)
    return nullcontext(here(job, prepared.where, newest_weights(folder)))


def execute(folder: RunFolder, prepared: Prepared, show: Show, look: Look, *, deliver: bool = True) -> dict[str, Any]:
    """Train to the end, then deliver to MLflow and register, unless somebody else delivers.

    Raises:
        Refusal: the job's own code was found wrong by `look`.
        Interrupted: stopped on request, with its state saved.
        RaymillError: the run cannot go on.
        Exception: whatever the job's code raises.
    """
    look(False)
    job = assembled(prepared, world_size=1)
    try:
        with run_lock(folder.driver_lock), stop_on_signal(folder):
            run_attempts(folder, prepared.spec, partial(_attempt, folder, job, show), show)
    except Interrupted:
        raise
    except Exception as error:
        append_event(folder, RunStopped(reason="failed", message=tell(error)))
        if deliver:
            _deliver(folder, show)
        raise
    return read_record(folder.summary) | (_deliver(folder, show) if deliver else {})


def _attempt(folder: RunFolder, job: Job, show: Show) -> RaymillError | None:
    """Train from the last commit; returns why it failed, or None when the run is finished."""
    store = LocalRunStore(folder)

    def report(event: Event) -> None:
        store.report(event)
        show(event)

    report(StageReached(stage="importing torch"))
    import torch

    from raymill.data.seeds import unchanged_caller
    from raymill.training import loop

    try:
        with unchanged_caller():
            point = store.begin_attempt()
            faults.point("run_taken")
            device = torch.device("cuda", 0) if job.spec.scale.gpus_per_worker else torch.device("cpu")
            context = WorkerContext(rank=0, world_size=1, device=device, store=store)
            report(attempt_started(job, point, 1, ProcessId.of_this()))
            job = job.going_on(point)
            reader = job.reader(f"{folder.run_id}.{point.attempt}")
            packets = read_locally(reader, point.position, rank=0, evaluated=point.evaluated)
            outcome = loop.train(job, context, point, packets, report, store.wants_stop)
    except RaymillError as error:
        return error
    finally:
        store.close()
    conclude(folder, job.plan, job.spec, outcome)
    if outcome.status == "interrupted":
        raise Interrupted(folder.run_id, committed_step(folder))
    return None


def _deliver(folder: RunFolder, show: Show) -> dict[str, Any]:
    """Deliver the run's events to MLflow, and register its model, in this process."""
    from raymill.data.seeds import unchanged_caller
    from raymill.models.registration import register
    from raymill.tracking.mlflow_sync import deliver_all

    show(DeliveryStarted())
    # A model that is registered is built again, which draws random numbers.
    with unchanged_caller():
        return tracking_summary(folder, delivered=deliver_all(folder, register))
