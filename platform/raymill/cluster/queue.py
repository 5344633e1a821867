"""Who acts on the line: an actor of Ray's on the cluster's head, started again by Ray when it dies.

Once a second it reads the list of Ray's jobs, decides (`line.decide`) and acts. It remembers nothing, so it may be killed at
any moment.
"""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from raymill.cluster import line
from raymill.paths import ENGINE, home

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

NAME = "raymill-queue"
POLL_S = 1.0
NOTHING = "true"
"""The command of a job that only says something."""

log = logging.getLogger("raymill.cluster")


class Queue:
    """Acts on the line for as long as its process lives."""

    def __init__(self) -> None:
        """Begin to act, in a thread."""
        threading.Thread(target=self._act_for_ever, name="acts on the line", daemon=True).start()

    def lives(self) -> bool:
        """True, once it has begun."""
        return True

    def _act_for_ever(self) -> None:
        from ray.job_submission import JobSubmissionClient

        client: Any = None
        while True:
            try:
                client = client or JobSubmissionClient()
                act(client)
            except Exception:  # the dashboard may be gone for a while, and nobody else would go on
                client = None
                log.warning("%s", traceback.format_exc())
            time.sleep(POLL_S)


def act(client: JobSubmissionClient) -> None:
    """Look at the line once, and do what is to be done."""
    import ray

    requests = line.read(map(as_job, client.list_jobs()))
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for one in line.decide(requests, there.get("CPU", 0.0), there.get("GPU", 0.0)):
        if isinstance(one, line.Start):
            asked = one.request.asked
            workers = str(one.workers) if asked.least < asked.most else "-"
            own = [f"RAYMILL_HOME={home()}", f"PYTHONPATH={home() / 'submitted' / one.request.job.id / 'engine'}"]
            begin = ["env", *own, sys.executable, "-m", "raymill.cluster.attempt", one.request.job.id, asked.run, workers]
            submit(client, one.id, join([*begin, *asked.command]), one.as_metadata())
        else:
            if one.makes_room and not one.attempt.makes_room:
                # Said first: whoever sees it ended has to know why.
                note(client, line.MAKE_ROOM, one.attempt.job.id)
            client.stop_job(one.attempt.job.id)
    for request in requests:
        if request.exit_code is not None:
            shutil.rmtree(home() / "submitted" / request.job.id, ignore_errors=True)


def note(client: JobSubmissionClient, what: str, of: str) -> None:
    """Say once for all that something is asked of a request or an attempt."""
    submit(client, f"{of}-{what.replace(' ', '-')}", NOTHING, {"raymill": what, "of": of})


def submit(client: JobSubmissionClient, name: str, command: str, metadata: dict[str, str], **more: Any) -> None:
    """Submit a job of this name, unless there is one."""
    try:
        client.submit_job(entrypoint=command, submission_id=name, metadata=metadata, **more)
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise


def as_job(one: Any) -> line.Job:
    """A job, as Ray's client tells of it."""
    status = str(getattr(one.status, "value", one.status))
    return line.Job(
        one.submission_id or "", one.metadata or {}, status, one.driver_exit_code, one.start_time or 0, one.end_time or None
    )


def ensure(engine: Path) -> None:
    """See to it that the cluster has its actor. Called on the head, by a process that Ray has started.

    Args:
        engine: the folder that raymill is imported from, of a run that may be over before the actor is.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = home() / "queue"
    with FileLock(home() / "queue.lock", mode=0o600):
        ray.init(address="auto", namespace=NAME, logging_level=logging.ERROR, log_to_driver=False)
        try:
            if any(one["name"] == NAME for one in ray.util.list_named_actors(all_namespaces=True)):
                return
            shutil.rmtree(own, ignore_errors=True)
            shutil.copytree(engine / ENGINE.name, own / ENGINE.name)
            address = ray.get_runtime_context().gcs_address
            variables = {"PYTHONPATH": str(own), "RAYMILL_HOME": str(home()), "RAY_ADDRESS": address}
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            actor: Any = ray.remote(Queue)
            actor = actor.options(
                name=NAME,
                lifetime="detached",
                max_restarts=-1,
                num_cpus=0,
                scheduling_strategy=here,
                runtime_env={"env_vars": variables},
            )
            ray.get(actor.remote().lives.remote())
        finally:
            ray.shutdown()
