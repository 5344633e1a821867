"""What there is to run on: the cluster that RAY_ADDRESS names, or else this machine, with a Ray of our own.

The embedded Ray listens on this machine alone, asks for a token that only this process and its children know, keeps its
session in a private temporary folder, and is gone, folder and all, when the command ends. Of a cluster only the processes
of the run end; it must ask for a token too, unless the user says RAY_AUTH_MODE=disabled.

    python -m raymill.cluster       prints the facts of the cluster, in a process that may wait for it and fail
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from raymill.errors import InputError, Problem, RunError, WorkerError
from raymill.home import home, project_root
from raymill.plan import ClusterFacts, Plan
from raymill.retry import Cause

SESSION_PREFIX = "raymill-"
SESSION_VARIABLE = "RAYMILL_SESSION"
KILL_TIMEOUT_S = 10.0

RAY_SETTINGS = {
    "RAY_preload_python_modules": "raymill.quick",
    # The controller looks at its workers this often; reports and the end of a run wait for it (default 2).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Set before Ray is imported, where the user did not set them."""

EMBEDDED_SETTINGS = {
    # Ray then takes the loopback address for its own, and every process of it listens there alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""The same, for a Ray of our own."""

LEFT_AT_HOME = ["/.raymill"]
"""Folders of the project that do not travel to a cluster, beside .git, .venv and what .gitignore names."""

CONNECT_TIMEOUT_S = 120.0

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


def address() -> str | None:
    """The cluster to run on, from RAY_ADDRESS; None: a Ray of our own."""
    named = os.environ.get("RAY_ADDRESS", "")
    return None if named in ("", "local") else named


def find_facts() -> ClusterFacts:
    """What the cluster that RAY_ADDRESS names has now, or else this machine.

    Raises:
        InputError: when the cluster cannot be reached, or lets in whoever asks.
    """
    if address() is None:
        return local_facts()
    if problem := _token_problem(os.environ):
        raise InputError([problem])
    asked = [sys.executable, "-m", "raymill.cluster"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=CONNECT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError([_unreachable(f"no answer within {CONNECT_TIMEOUT_S:g} s")]) from error
    found = done.stdout.strip().splitlines()[-1:] or ["{}"]
    record = json.loads(found[0]) if done.returncode == 0 else {}
    if "num_cpus" in record:
        return ClusterFacts(**record)
    if record.get("open"):
        fix = "Start it with RAY_AUTH_MODE=token, or set RAY_AUTH_MODE=disabled to say that its network is closed."
        found_there = "a cluster that runs code for whoever can reach it"
        raise InputError([Problem("environment variable RAY_ADDRESS", found_there, "a cluster that asks for a token", fix)])
    raise InputError([_unreachable((done.stderr.strip().splitlines() or ["no answer"])[-1])])


def _token_problem(variables: Mapping[str, str]) -> Problem | None:
    """What is wrong with how the user wants to identify himself to a cluster."""
    mode = variables.get("RAY_AUTH_MODE", "token").lower()
    named = variables.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if mode == "disabled" or named or (Path.home() / ".ray" / "auth_token").is_file():
        return None
    fix = "Set RAY_AUTH_TOKEN_PATH to the file with the cluster's token, or RAY_AUTH_MODE=disabled if it has none."
    return Problem("environment variable RAY_AUTH_TOKEN", "not set", "the token of the cluster that RAY_ADDRESS names", fix)


def _unreachable(why: str) -> Problem:
    fix = "Run on a machine of the cluster, with its token in RAY_AUTH_TOKEN; or unset RAY_ADDRESS to use this machine alone."
    return Problem("environment variable RAY_ADDRESS", f"{address()!r}: {why}", "host:port of a running Ray cluster", fix)


def local_facts() -> ClusterFacts:
    """What this machine has, as an embedded Ray would offer it."""
    num_gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").is_dir() else 0
    return ClusterFacts(
        num_cpus=float(len(os.sched_getaffinity(0))),
        num_gpus=float(num_gpus),
        memory_bytes=psutil.virtual_memory().total,
    )


def remove_stale_sessions() -> None:
    """Remove what is left of drivers that were killed together with their supervisor."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SESSION_PREFIX}*"):
        pid = folder.name.removeprefix(SESSION_PREFIX)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            end_session(int(pid), timeout_s=0)


def end_session(pid: int, timeout_s: float) -> None:
    """Wait until nothing is left of the Ray of a driver that ended, and end what stays; then remove its folder.

    Args:
        pid: the driver's process id.
        timeout_s: seconds to wait before killing what is left.
    """
    folder = session_folder(pid)
    left = [process for process in psutil.process_iter() if _belongs(process, pid, folder)]
    _, left = psutil.wait_procs(left, timeout=timeout_s)
    for process in left:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.kill()
    psutil.wait_procs(left, timeout=KILL_TIMEOUT_S)
    shutil.rmtree(folder, ignore_errors=True)


def _belongs(process: psutil.Process, pid: int, folder: Path) -> bool:
    # A driver leads a session of its own. Ray's agents show neither their environment nor the folder, and outlive it.
    try:
        return os.getsid(process.pid) == pid or process.environ().get(SESSION_VARIABLE) == str(folder)
    except (OSError, psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def session_folder(pid: int) -> Path:
    """Where the Ray of this process keeps its session. Short, because the sockets in it have a length limit."""
    return Path(tempfile.gettempdir()) / f"{SESSION_PREFIX}{pid}"


@contextmanager
def ray_for(plan: Plan) -> Iterator[None]:
    """The Ray that RAY_ADDRESS names, or one of this process's own, for as long as the context lasts."""
    named = address()
    for name, value in (RAY_SETTINGS if named else RAY_SETTINGS | EMBEDDED_SETTINGS).items():
        os.environ.setdefault(name, value)
    remove_stale_sessions()
    session = session_folder(os.getpid())
    session.mkdir(mode=0o700)
    # Every process of this run on this machine inherits it, and so can be found when the driver is gone.
    os.environ[SESSION_VARIABLE] = str(session)
    if not named:
        # Before Ray is imported anywhere: it reads them once.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # The driver needs these modules next; importing them while the cluster starts saves their time.
    imports = threading.Thread(target=_import_ahead, name="imports")
    imports.start()
    try:
        if named:
            _connect(named)
        else:
            _start(plan, local_facts(), session)
        imports.join()
        yield
    finally:
        _stop()
        shutil.rmtree(session, ignore_errors=True)


def _import_ahead() -> None:
    import raymill.trainer  # noqa: F401


def _start(plan: Plan, facts: ClusterFacts, session: Path) -> None:
    import ray
    import ray.exceptions

    settings: dict[str, Any] = {
        "num_cpus": facts.num_cpus,
        "num_gpus": facts.num_gpus,
        "object_store_memory": plan.object_store_bytes,
    }
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=True,
            logging_level=logging.WARNING,
            # Not the folder itself: Ray lets everybody into the one that it is given.
            _temp_dir=str(session / "ray"),
            _node_ip_address="127.0.0.1",
            **settings,
        )
    except (ray.exceptions.RayError, RuntimeError, ConnectionError, TimeoutError) as error:
        raise WorkerError(f"Ray did not start on this machine: {error}", cause=Cause.LOST_PROCESS) from error


def _connect(named: str) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    package = Path(__file__).parent
    # The project and raymill itself travel, so that every machine runs the code that is here. Data do not.
    travels = {
        "working_dir": str(project_root()),
        "excludes": LEFT_AT_HOME,
        "py_modules": [str(package)],
        "env_vars": {name: os.environ[name] for name in RAY_SETTINGS} | _own_variables(),
    }
    try:
        ray.init(address=named, log_to_driver=True, logging_level=logging.WARNING, runtime_env=travels)
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise RunError(f"the Ray cluster at {named} could not be reached: {error}") from error


def _own_variables() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name.startswith("RAYMILL_") and name != SESSION_VARIABLE}
    # Without RAY_ADDRESS, Ray's own actors guess which of the clusters of a machine they belong to.
    return own | {"RAYMILL_HOME": str(home()), "RAY_ADDRESS": os.environ["RAY_ADDRESS"]}


def _stop() -> None:
    import ray

    ray.shutdown()


# ---------------------------------------------------------------- asking a cluster


def main() -> int:
    """Print the facts of the cluster that RAY_ADDRESS names as JSON, or that it is open to everybody."""
    named = address() or "auto"
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "disabled":
        if _lets_anybody_in(named):
            print(json.dumps({"open": True}))
            return 0
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    ray.init(address=named, log_to_driver=False, logging_level=logging.ERROR)
    found = ray.cluster_resources()  # type: ignore[no-untyped-call]
    ray.shutdown()
    memory_bytes = psutil.virtual_memory().total
    facts = ClusterFacts(num_cpus=found.get("CPU", 0.0), num_gpus=found.get("GPU", 0.0), memory_bytes=memory_bytes)
    print(json.dumps(asdict(facts)))
    return 0


def _lets_anybody_in(named: str) -> bool:
    """Whether the cluster answers somebody without a token."""
    question = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None)"
    nobody = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    asked = [sys.executable, "-c", question, named]
    done = subprocess.run(asked, env=nobody | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, check=False)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
