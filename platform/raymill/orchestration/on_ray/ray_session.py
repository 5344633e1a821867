"""The Ray that an attempt runs on: the cluster that RAY_ADDRESS names, or one of this process's own, and its end.

The embedded Ray listens on this machine alone, asks for a token that only this process and its children know, keeps its
session in a private temporary folder, and is gone, folder and all, when the command ends. Of a cluster only the processes
of the run end; it must ask for a token too, unless the user says RAY_AUTH_MODE=disabled.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raymill import ray_internals
from raymill.config.plan import ClusterFacts, Plan
from raymill.errors import RunError, WorkerError
from raymill.orchestration.cluster_facts import address, local_facts
from raymill.orchestration.on_ray.session_folder import VARIABLE, held_by_driver, remove_stale_sessions
from raymill.orchestration.retry import Cause
from raymill.paths import ENGINE, home, project_root

NOT_SENT_TO_CLUSTER = ["/.raymill"]
"""Folders of the project that do not travel to a cluster, beside .git, .venv and what .gitignore names."""


@contextmanager
def ray_for(plan: Plan | None, meanwhile: Callable[[], object]) -> Iterator[None]:
    """The Ray that RAY_ADDRESS names, or one of this process's own, for as long as the context lasts.

    This changes the environment of the process, which must be a driver: its supervisor has made the session's folder.

    Args:
        plan: of the run; None: it is not known yet, which is for a cluster only.
        meanwhile: is called in a thread while Ray starts; imports what is needed next.
    """
    named = address()
    settings = dict(ray_internals.RAY_SETTINGS)
    settings |= {} if named else ray_internals.EMBEDDED_SETTINGS | ray_internals.NODE_SETTINGS
    settings |= ray_internals.ELASTIC_SETTINGS if plan and plan.min_workers < plan.num_workers else {}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    remove_stale_sessions()
    session = Path(os.environ[VARIABLE])
    with held_by_driver(session):
        yield from _ray_in(session, named, plan, meanwhile)


def _ray_in(session: Path, named: str | None, plan: Plan | None, meanwhile: Callable[[], object]) -> Iterator[None]:
    if not named:
        # Before Ray is imported anywhere: it reads them once.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Before the thread: two threads that import parts of a package at once may each wait for the other.
    import ray  # noqa: F401

    imports = threading.Thread(target=meanwhile, name="imports")
    imports.start()
    try:
        if named:
            _connect(named)
        elif plan is None:
            raise RunError("a Ray of our own is started for a run that is known")
        else:
            _start(plan, local_facts(), session)
        imports.join()
        yield
    finally:
        _stop()


def _start(plan: Plan, facts: ClusterFacts, session: Path) -> None:
    import ray
    import ray.exceptions

    settings: dict[str, Any] = {
        # Not the session's folder itself: Ray lets everybody into the one that it is given.
        **ray_internals.private_session(str(session / "ray")),
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
            **settings,
        )
    except ValueError as error:
        # What is asked for is not there, such as GPUs that CUDA_VISIBLE_DEVICES hides; it would not be there next time either.
        raise RunError(f"Ray does not start on this machine as it is: {error}") from error
    except (ray.exceptions.RayError, RuntimeError, ConnectionError, TimeoutError) as error:
        raise WorkerError(f"Ray did not start on this machine: {error}", cause=Cause.LOST_PROCESS) from error
    except Exception as error:
        # Where a process of its own dies while it starts, Ray raises just this.
        if type(error) is not Exception:
            raise
        raise WorkerError(f"Ray did not start on this machine: {error}", cause=Cause.LOST_PROCESS) from error


def _connect(named: str) -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    # The project and raymill itself travel, so that every machine runs the code that is here. Data do not.
    travels = {
        "working_dir": str(project_root()),
        "excludes": NOT_SENT_TO_CLUSTER,
        "py_modules": [str(ENGINE)],
        "env_vars": {name: os.environ[name] for name in ray_internals.RAY_SETTINGS} | _own_variables(),
    }
    try:
        ray.init(address=named, log_to_driver=True, logging_level=logging.WARNING, runtime_env=travels)
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise RunError(f"the Ray cluster at {named} could not be reached: {error}") from error


def _own_variables() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name.startswith("RAYMILL_") and name != VARIABLE}
    # Without RAY_ADDRESS, Ray's own actors guess which of the clusters of a machine they belong to.
    return own | {"RAYMILL_HOME": str(home()), "RAY_ADDRESS": os.environ["RAY_ADDRESS"]}


def _stop() -> None:
    import ray

    ray.shutdown()
