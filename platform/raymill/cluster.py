"""What there is to run on, and a Ray of our own for one machine.

The embedded Ray listens on this machine alone, asks for a token that only this process and its children know, keeps its
session in a private temporary folder, and is gone, folder and all, when the command ends.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from raymill.errors import Problem
from raymill.plan import ClusterFacts, Plan

SESSION_PREFIX = "raymill-"
SESSION_VARIABLE = "RAYMILL_SESSION"

RAY_SETTINGS = {
    # The controller looks at its workers this often; reports and the end of a run wait for it (default 2).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray then takes the loopback address for its own, and every process of it listens there alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Set before Ray is imported, where the user did not set them."""


REOPENING_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_ARROW_EXTENSION_SERIALIZATION_CLOUDPICKLE",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
    "RAY_DATA_EXECUTION_CALLBACKS",
    "RAY_TRAIN_CALLBACKS",
)
"""Variables that make Ray run code found in data files, or import code by name."""


def unsafe_variables(variables: Mapping[str, str]) -> list[Problem]:
    """The environment variables that would let data or names run code; raymill does not run with them."""
    return [
        Problem(f"environment variable {name}", "set", "not set: it lets data or names run code", f"Run `unset {name}`.")
        for name in REOPENING_VARIABLES
        if name in variables
    ]


def local_facts() -> ClusterFacts:
    """What this machine has, as an embedded Ray would offer it."""
    num_gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
    return ClusterFacts(
        num_cpus=float(len(os.sched_getaffinity(0))),
        num_gpus=float(num_gpus),
        memory_bytes=psutil.virtual_memory().total,
    )


def remove_stale_sessions() -> None:
    """Remove the session folders of processes that were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SESSION_PREFIX}*"):
        pid = folder.name.removeprefix(SESSION_PREFIX)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def end_session(pid: int, timeout_s: float) -> None:
    """Wait until nothing is left of the Ray of a driver that ended, and end what stays; then remove its folder.

    Args:
        pid: the driver's process id.
        timeout_s: seconds to wait before killing what is left.
    """
    folder = session_folder(pid)
    if not folder.exists():
        return
    left = [process for process in psutil.process_iter() if _belongs(process, folder)]
    _, left = psutil.wait_procs(left, timeout=timeout_s)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left)
    shutil.rmtree(folder, ignore_errors=True)


def _belongs(process: psutil.Process, folder: Path) -> bool:
    try:
        return str(folder) in " ".join(process.cmdline()) or process.environ().get(SESSION_VARIABLE) == str(folder)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def session_folder(pid: int) -> Path:
    """Where the Ray of this process keeps its session. Short, because the sockets in it have a length limit."""
    return Path(tempfile.gettempdir()) / f"{SESSION_PREFIX}{pid}"


@contextmanager
def embedded_ray(plan: Plan, facts: ClusterFacts) -> Iterator[None]:
    """A Ray of this process's own, for as long as the context lasts."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    remove_stale_sessions()
    session = session_folder(os.getpid())
    session.mkdir(mode=0o700)
    # Every process of this Ray inherits it, and so can be found when the driver is gone.
    os.environ[SESSION_VARIABLE] = str(session)
    # The driver needs these modules next; importing them while the cluster starts saves their time.
    imports = threading.Thread(target=_import_ahead, name="imports")
    imports.start()
    try:
        _start(plan, facts, session)
        imports.join()
        yield
    finally:
        _stop()
        shutil.rmtree(session, ignore_errors=True)


def _import_ahead() -> None:
    import raymill.trainer  # noqa: F401


def _start(plan: Plan, facts: ClusterFacts, session: Path) -> None:
    import ray

    settings: dict[str, Any] = {
        "num_cpus": facts.num_cpus,
        "num_gpus": facts.num_gpus,
        "object_store_memory": plan.object_store_bytes,
    }
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=True,
        logging_level=logging.WARNING,
        _temp_dir=str(session),
        _node_ip_address="127.0.0.1",
        **settings,
    )


def _stop() -> None:
    import ray

    ray.shutdown()
