"""A plan on Ray Train: it places, starts and watches the workers, which run `worker.work`, and says why they failed."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.exceptions
import ray.train

from raymill import ray_internals
from raymill.data import manifest
from raymill.errors import RunError, WorkerError
from raymill.files import private, read_record, write_record
from raymill.orchestration import cluster_facts
from raymill.orchestration.on_ray import drain, session_folder
from raymill.orchestration.on_ray.group import Group, planned_run
from raymill.orchestration.on_ray.root_cause import root_cause
from raymill.orchestration.on_ray.turn import Turn
from raymill.orchestration.on_ray.worker import Unassigned, WorkerConfig, work
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

NO_RESIZE_S = 60.0
"""Ray's default, of no meaning for a group that is not elastic."""

RESIZE_TIMEOUT_S = 30.0
"""Workers that have not saved by then begin again at their last checkpoint."""


def fit(turn: Turn, group: Group | None) -> tuple[RunFolder, Outcome]:
    """Train on Ray Train workers until the end, an interruption, or a failure; returns the run, and the outcome of rank 0.

    Args:
        turn: the driver's.
        group: the workers of a run that is not known yet: they are started, and wait for it. None: it is known.

    Raises:
        RaymillError: the root cause, translated from Ray's errors.
    """
    on_cluster = cluster_facts.address() is not None
    group = group or Group.of(*planned_run(turn.known_folder))
    trainer = _trainer(turn, group, on_cluster=on_cluster)
    # A machine that a Ray of our own runs on is not drained.
    watched = drain.watched(turn, group) if on_cluster else nullcontext(drain.DrainNotice())
    try:
        with watched as notice:
            result = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise root_cause(error) from error
    folder, outcome = turn.known_folder, getattr(result, "return_value", None)
    if not isinstance(outcome, Outcome):
        raise RunError(f"the workers ended without an outcome; see {folder.ray_log}")
    if outcome.status == "interrupted" and notice.goes_on and not folder.stop_request.exists():
        message = f"nodes {', '.join(notice.nodes)} are to leave the cluster; all is saved, and others have room"
        raise WorkerError(message, cause=Cause.DRAIN)
    return folder, outcome


def _trainer(turn: Turn, group: Group, *, on_cluster: bool) -> DataParallelTrainer:
    session = Path(os.environ[session_folder.VARIABLE])
    # On a cluster, processes of a run do not inherit it from the driver.
    variables = {session_folder.VARIABLE: str(session)} if on_cluster else {}
    folder = turn.folder
    store = start_store_actor(folder, variables, num_waiting=0 if folder else group.num_workers) if on_cluster else None
    told = Unassigned(store) if folder is None else _worker(folder, store, session)
    if folder is None:
        threading.Thread(target=_give_run, args=(turn, store, session), name="gives the run", daemon=True).start()
    callbacks = []
    if folder is not None and group.resize_check_s is not None:
        callbacks = [ray_internals.resize_callback(partial(_ask_to_save, folder), partial(_wait_until_saved, folder))]
    trainer = ray_internals.trainer_class(embedded=not on_cluster)(
        work,
        train_loop_config={"worker": told},
        scaling_config=ScalingConfig(
            num_workers=group.num_workers if group.resize_check_s is None else (group.min_workers, group.num_workers),
            use_gpu=bool(group.gpus),
            resources_per_worker=group.each,
            elastic_resize_monitor_interval_s=group.resize_check_s or NO_RESIZE_S,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # the trainer's stub names the class of Ray Train V1
            name="ray-train",
            storage_path=str(folder.path if folder else session),
            # A start that fails three times will fail for ever; Ray's default is to try for ever.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3, max_preemption_failures=0),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": variables} if variables else None,
        ),
    )
    ray_internals.name_run(trainer, _name_at_ray(folder) if folder else session.name)
    return trainer


def _worker(folder: RunFolder, store: Any, session: Path) -> WorkerConfig:
    """What the workers of a run are told."""
    planned, spec = planned_run(folder)
    return WorkerConfig(
        folder=str(folder.path),
        spec=spec,
        plan=planned,
        manifest=manifest.from_record(read_record(folder.data_manifest)),
        code=read_record(folder.code)["files"],
        fitted=fitted.read(folder.path),
        inputs=ray.put(inputs.pack(folder.path)) if store and spec.inputs else None,
        driver=ProcessId.of_this(),
        driver_node=ray.get_runtime_context().get_node_id(),
        store_actor=store,
        session=None if store else session,
    )


def _name_at_ray(folder: RunFolder) -> str:
    """The name under which Ray has reserved places for a run, or will."""
    return str(read_record(folder.places)["name"]) if folder.places.exists() else folder.run_id


# ---------------------------------------------------------------- a run for workers that wait for one


def _give_run(turn: Turn, store: Any, session: Path) -> None:
    """Once the driver's turn has come, or will not, say so to its workers."""
    turn.is_decided.wait()
    if not turn.has_come:
        ray.get(store.give.remote(None, []))
        return
    folder = turn.known_folder
    try:
        _print_to(folder.ray_log)
        write_record(folder.places, {"name": session.name})
        ray.get(store.give.remote(str(folder.path), [ray.put(_worker(folder, store, session))]))
    except Exception as error:  # in a thread, nobody else would hear of it, and the workers would wait for ever
        turn.refused = RunError(f"the run could not be given to workers that were ready: {type(error).__name__}: {error}")
        ray.get(store.give.remote(None, []))
        raise


def _print_to(path: Path) -> None:
    """Let all that this process prints from now on go to a file."""
    with open(path, "ab", opener=private) as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())


# ---------------------------------------------------------------- a resize, in Ray's controller


def _ask_to_save(folder: RunFolder, num_workers: int) -> None:
    folder.handover_request.touch()
    append_event(folder, ResizeStarted(num_workers=num_workers))


def _wait_until_saved(folder: RunFolder) -> None:
    deadline_s = time.monotonic() + RESIZE_TIMEOUT_S
    while folder.handover_request.exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
