"""Every private name of Ray that raymill uses, and nothing else: what it is for, and what would be without it.

Everything here may change with any release of Ray, so it stands in one place: `PRIVATE_NAMES` says why each is used, a contract
test (tests/integration/test_ray_internals.py) resolves and exercises each on the installed version, and a layout test allows
such names in no other file. Ray is imported inside functions: importing this file must cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


@dataclass(frozen=True)
class PrivateName:
    """One name that Ray does not promise to keep.

    Attributes:
        path: "module:attribute", a keyword of `ray.init` as "ray.init(keyword)", or an environment variable as "$NAME".
        why: what it is used for.
        without: what would be without it.
    """

    path: str
    why: str
    without: str


PRIVATE_NAMES = (
    PrivateName(
        "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer",
        "Ray Train without TorchTrainer: the workers make their process group themselves",
        "driver and controller import torch, 3 s of CPU before the first step (docs/performance.md)",
    ),
    PrivateName(
        "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._create_default_callbacks",
        "leaves out the two helper processes that an embedded Ray has no use for",
        "two more processes that import Ray Data, 3 s of CPU before the first step",
    ),
    PrivateName(
        "ray.train.v2._internal.callbacks.datasets:DatasetsCallback",
        "one of the two: it splits data sets given to the trainer, and none is given",
        "as above",
    ),
    PrivateName(
        "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
        "the other: it removes placement groups after a controller's death, which end with an embedded Ray anyway",
        "as above",
    ),
    PrivateName(
        "ray.train.v2._internal.exceptions:WorkerHealthCheckFailedError",
        "tells a lost process from an error in the job's code",
        "a killed worker would end the run instead of being tried again",
    ),
    PrivateName(
        "ray.train.v2._internal.execution.callback:ControllerCallback",
        "hears that an elastic run is about to be resized",
        "workers would be killed without saving, and repeat what they did since the last checkpoint",
    ),
    PrivateName(
        "ray.train.v2._internal.execution.callback:WorkerGroupCallback",
        "holds the resize until the workers have saved",
        "as above",
    ),
    PrivateName(
        "ray.train.v2._internal.execution.controller.state:ResizingState",
        "the state whose `scaling_decision.num_workers` says how many workers there will be",
        "as above",
    ),
    PrivateName(
        "ray.train.v2._internal.execution.context:TrainRunContext",
        "its `run_id` names the places that Ray reserves; set to raymill's, so that a killed driver's are taken over",
        "places of a killed driver stay reserved for minutes, and the next attempt waits for them",
    ),
    PrivateName(
        "ray._private.state:state",
        "which nodes are to leave (`get_draining_nodes`), and what each has (`total_resources_per_node`)",
        "a machine that is taken away is a lost process: work since the last checkpoint is done again",
    ),
    PrivateName(
        "ray._private.state:actors", "on which nodes a run's actors live, so which of those that leave concern it", "as above"
    ),
    PrivateName(
        "ray.init(_temp_dir)",
        "an embedded Ray keeps its session in a folder that only this user may open",
        "the session lies in a folder that Ray opens to everybody",
    ),
    PrivateName(
        "ray.init(_node_ip_address)",
        "an embedded Ray listens on the loopback address alone",
        "it listens on every interface",
    ),
    PrivateName(
        "ray._private.services:get_node_ip_address",
        "the nodes of a cluster on this machine listen on the loopback address alone",
        "they listen on every interface",
    ),
    PrivateName("ray.scripts.scripts:main", "the command `ray`, with that changed", "as above"),
    PrivateName(
        "ray._raylet:GcsClient",
        "asks a cluster, without a token, whether it lets anybody in",
        "a cluster that runs code for whoever reaches it would be used without a word",
    ),
    PrivateName(
        "$RAY_preload_python_modules", "tunes the garbage collector in Ray's workers", "0.9 s of CPU more in each process"
    ),
    PrivateName("$RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "how often the controller looks", "reports and the end wait 2 s"),
    PrivateName("$RAY_TRAIN_METRICS_ENABLED", "no Prometheus metrics, which nobody reads", "some CPU"),
    PrivateName("$RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "raymill watches nodes itself", "one more process"),
    PrivateName("$RAY_TRAIN_ENABLE_PRINT_PATCH", "prints go to the run's log once", "prints appear twice"),
    PrivateName("$RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "a place of an elastic job may have gone", "it waits 60 s"),
    PrivateName(
        "$RAY_CHDIR_TO_TRIAL_DIR", "workers stay in the project's folder", "relative paths of a job's code lead elsewhere"
    ),
    PrivateName("$RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "tasks without GPUs leave CUDA_VISIBLE_DEVICES alone", "a warning each"),
    PrivateName(
        "$RAY_idle_worker_killing_time_threshold_ms",
        "on a node whose CPUs training workers have, the processes that read stay from one task to the next",
        "each task there starts a process: 100 steps in 35 s, for 4 (docs/performance.md)",
    ),
    PrivateName(
        "$RAY_gcs_storage", "the head of a cluster of this machine keeps its tables on disk", "the line goes with its head"
    ),
    PrivateName("$RAY_gcs_storage_path", "where", "as above"),
    PrivateName(
        "$RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        "0: Ray takes the loopback address for its own, and every process listens there alone",
        "some processes listen on every interface",
    ),
)

LOOPBACK = "127.0.0.1"

RAY_SETTINGS = {
    "RAY_preload_python_modules": "raymill.startup_gc",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Set in the driver before Ray is imported, where the user did not set them."""

EMBEDDED_SETTINGS = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""The same, for a Ray of our own."""

NODE_SETTINGS = {"RAY_idle_worker_killing_time_threshold_ms": "600000"}
"""The same, for a node: whatever starts one."""

ELASTIC_SETTINGS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
"""The same, for an elastic job: a place that Ray Train counted on may have gone; it then looks again what there is."""

HEAD_SETTINGS = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": "{folder}"}
"""The same, for the head of a cluster that outlives it."""

ASK_WITHOUT_TOKEN = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None)"
"""A program that ends with 0 where the cluster at its argument answers somebody without a token."""


# ---------------------------------------------------------------- Ray Train


def trainer_class(*, embedded: bool) -> type[DataParallelTrainer]:
    """Ray Train's trainer of plain functions; for an embedded Ray, without two helper processes that it has no use for."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    if not embedded:
        return DataParallelTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class EmbeddedTrainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    return EmbeddedTrainer


def name_run(trainer: DataParallelTrainer, run_id: str) -> None:
    """Let Ray reserve places under this name: those of a driver that was killed are then this one's, not lost for minutes."""
    object.__setattr__(trainer.train_run_context, "run_id", run_id)


def resize_callback(resizing: Callable[[int], None], before_shutdown: Callable[[], None]) -> Any:
    """A callback for the trainer, run in Ray's controller.

    Args:
        resizing: is told the new number of workers before the old ones are ended.
        before_shutdown: is called then, and may wait.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.controller.state import ResizingState

    class ResizeCallback(ControllerCallback, WorkerGroupCallback):
        resizing_now = False

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if isinstance(current_state, ResizingState):
                self.resizing_now = True
                resizing(current_state.scaling_decision.num_workers)  # type: ignore[attr-defined]

        def before_worker_group_shutdown(self, worker_group: Any) -> None:
            if self.resizing_now:
                before_shutdown()
            self.resizing_now = False

    return ResizeCallback()


def lost_process_errors() -> tuple[type[BaseException], ...]:
    """What Ray raises where a process is gone, or where the node is on which it was to be."""
    from ray import exceptions
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost = (exceptions.RayActorError, exceptions.ActorUnschedulableError, exceptions.WorkerCrashedError)
    return (*lost, WorkerHealthCheckFailedError)


# ---------------------------------------------------------------- Ray Core


def private_session(folder: str) -> dict[str, str]:
    """Keywords of `ray.init` for a session in this folder that listens on the loopback address alone."""
    return {"_temp_dir": folder, "_node_ip_address": LOOPBACK}


def run_on_loopback() -> None:
    """Run the command `ray` with this process's arguments; all that it starts listens on the loopback address alone.

    Ray replaces that address by one that other machines reach, unless it is told that it is on Windows or macOS; then it refuses
    to add a node. So this process thinks the former, and its children the latter.
    """
    import ray._private.services as services
    import ray.scripts.scripts as scripts

    services.get_node_ip_address = lambda address=None: LOOPBACK
    os.environ |= EMBEDDED_SETTINGS | NODE_SETTINGS
    scripts.main()  # type: ignore[no-untyped-call]


def draining_nodes() -> dict[str, int]:
    """Nodes that are to leave -> when, Unix milliseconds; 0: not said."""
    found: dict[str, int] = _state().get_draining_nodes()
    return found


def node_resources() -> Mapping[str, Mapping[str, float]]:
    """Node -> what it has in all."""
    found: Mapping[str, Mapping[str, float]] = _state().total_resources_per_node()
    return found


def nodes_in_use() -> set[str]:
    """The nodes where actors of this process's job live."""
    import ray

    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors: dict[str, dict[str, dict[str, str]]] = ray._private.state.actors(job_id=job, actor_state_name="ALIVE")
    return {actor["Address"]["NodeID"] for actor in actors.values()}


def _state() -> Any:
    import ray

    return ray._private.state.state
