"""A plan on Ray Train: it places, starts and watches the workers, which run `worker.work`, and says why they failed."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ray.exceptions
import ray.train

from raymill import ray_internals
from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.data import manifest
from raymill.errors import RunError, WorkerError
from raymill.files import read_record
from raymill.orchestration import cluster_facts
from raymill.orchestration.on_ray import drain, session_folder
from raymill.orchestration.on_ray.root_cause import root_cause
from raymill.orchestration.on_ray.worker import WorkerConfig, work
from raymill.orchestration.retry import Cause
from raymill.record import fitted, inputs
from raymill.record.events import ResizeStarted, append_event
from raymill.record.folder import RunFolder
from raymill.record.processes import ProcessId
from raymill.record.remote_store import start_store_actor
from raymill.training.outcome import Outcome

if TYPE_CHECKING:
    # Ray's public names are typed as those of Ray Train V1.
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
else:
    from ray.train import FailureConfig, RunConfig, ScalingConfig

RESIZE_TIMEOUT_S = 30.0
"""Workers that have not saved by then begin again at their last checkpoint."""


def fit(folder: RunFolder, planned: Plan, spec: JobSpec) -> Outcome:
    """Train on Ray Train workers until the end, an interruption, or a failure; returns the outcome of rank 0.

    Raises:
        RaymillError: the root cause, translated from Ray's errors.
    """
    each = _resources(planned, spec)
    trainer = _trainer(folder, planned, spec, each)
    # A machine that a Ray of our own runs on is not drained.
    watched = drain.watched(folder, planned.min_workers, each) if cluster_facts.address() else nullcontext(drain.DrainNotice())
    try:
        with watched as notice:
            result = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise root_cause(error) from error
    outcome = getattr(result, "return_value", None)
    if not isinstance(outcome, Outcome):
        raise RunError(f"the workers ended without an outcome; see {folder.ray_log}")
    if outcome.status == "interrupted" and notice.goes_on and not folder.stop_request.exists():
        message = f"nodes {', '.join(notice.nodes)} are to leave the cluster; all is saved, and others have room"
        raise WorkerError(message, cause=Cause.DRAIN)
    return outcome


def _resources(planned: Plan, spec: JobSpec) -> dict[str, float]:
    gpus = {"GPU": float(spec.scale.gpus_per_worker)} if spec.scale.gpus_per_worker else {}
    return {"CPU": planned.worker_cpus, **gpus}


def _trainer(folder: RunFolder, planned: Plan, spec: JobSpec, each: dict[str, float]) -> DataParallelTrainer:
    on_cluster = cluster_facts.address() is not None
    # On a cluster, processes of a run do not inherit it from the driver.
    variables = {session_folder.VARIABLE: os.environ[session_folder.VARIABLE]} if on_cluster else {}
    worker = WorkerConfig(
        folder=str(folder.path),
        spec=spec,
        plan=planned,
        manifest=manifest.from_record(read_record(folder.data_manifest)),
        code=read_record(folder.code)["files"],
        fitted=fitted.read(folder.path),
        inputs=ray.put(inputs.pack(folder.path)) if on_cluster and spec.inputs else None,
        driver=ProcessId.of_this(),
        driver_node=ray.get_runtime_context().get_node_id(),
        store_actor=start_store_actor(folder, variables) if on_cluster else None,
        session=None if on_cluster else Path(os.environ[session_folder.VARIABLE]),
    )
    callbacks = []
    if spec.scale.elastic:
        callbacks = [ray_internals.resize_callback(partial(_ask_to_save, folder), partial(_wait_until_saved, folder))]
    trainer = ray_internals.trainer_class(embedded=not on_cluster)(
        work,
        train_loop_config={"worker": worker},
        scaling_config=ScalingConfig(
            num_workers=(planned.min_workers, planned.num_workers) if spec.scale.elastic else planned.num_workers,
            use_gpu=bool(spec.scale.gpus_per_worker),
            resources_per_worker=each,
            elastic_resize_monitor_interval_s=spec.scale.resize_check_s,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # the trainer's stub names the class of Ray Train V1
            name="ray-train",
            storage_path=str(folder.path),
            # A start that fails three times will fail for ever; Ray's default is to try for ever.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3, max_preemption_failures=0),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": variables} if variables else None,
        ),
    )
    ray_internals.name_run(trainer, folder.run_id)
    return trainer


# ---------------------------------------------------------------- a resize, in Ray's controller


def _ask_to_save(folder: RunFolder, num_workers: int) -> None:
    folder.handover_request.touch()
    append_event(folder, ResizeStarted(num_workers=num_workers))


def _wait_until_saved(folder: RunFolder) -> None:
    deadline_s = time.monotonic() + RESIZE_TIMEOUT_S
    while folder.handover_request.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
