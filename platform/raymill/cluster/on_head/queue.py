"""Who acts on the line: an actor of Ray's on the cluster's head, started again by Ray when it dies.

Again and again it reads the list of Ray's jobs, decides (`decisions.decide`) and acts. It remembers nothing, so it may be killed
at any moment.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from raymill.cluster import decisions, line
from raymill.cluster.on_head import head
from raymill.config.plan import ClusterFacts
from raymill.orchestration.cluster_facts import TOLD, facts_of
from raymill.paths import ENGINE, home

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

NAME = "raymill-queue"
POLL_S = 0.3
TOLD_LATER_S = 10.0
"""After a run was given to workers that stood ready, Ray is told of the attempt."""

OTHERS_WAIT_S = 30.0
"""Longer than a process takes to start."""

HEAD = "node:__internal_head__"
"""What Ray's head offers, and no other node."""

NOTHING = "true"
"""The command of a job that only says something."""

log = logging.getLogger("raymill.cluster")


class Queue:
    """Acts on the line for as long as its process lives."""

    def __init__(self) -> None:
        """Begin to act, in a thread."""
        import ray

        # What lies on the head is found by it, and Ray's Jobs API; another head may have another one.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        threading.Thread(target=self._act_for_ever, name="acts on the line", daemon=True).start()

    def lives(self) -> bool:
        """True, once it has begun."""
        return True

    def _act_for_ever(self) -> None:
        from ray.job_submission import JobSubmissionClient

        client: Any = None
        others, room = Others(), Room()
        # Held as long as this process lives: so it is seen that it does, without asking Ray.
        with head.acts_lock():
            while True:
                try:
                    if client is None:
                        client = JobSubmissionClient()
                        look_after_jobs(client)
                    act(client, others, room)
                except Exception:  # the dashboard may be gone for a while, and nobody else would go on
                    client = None
                    log.warning("%s", traceback.format_exc())
                time.sleep(POLL_S)


def look_after_jobs(client: JobSubmissionClient) -> None:
    """Have Ray see what became of its jobs. On a head that follows a lost one, it looks only once it has something to do with
    any: here with one that is over, of which nothing comes.
    """
    over = next((one.id for one in map(as_job, client.list_jobs()) if one.id and not one.lives), None)
    if over is not None:
        client.stop_job(over)


class Others:
    """Whoever uses the cluster beside the line, as far as they have no room."""

    def __init__(self) -> None:
        """Nobody has been seen."""
        self._since_s: dict[str, float] = {}

    def wait(self) -> bool:
        """Whether any have waited for a while: for a moment, everybody does who starts."""
        from ray.util import placement_group_table
        from ray.util.state import list_actors, list_tasks

        now_s = time.monotonic()
        found = {name for name, group in placement_group_table().items() if group["state"] == "PENDING"}
        found |= {one.actor_id for one in list_actors(filters=[("state", "=", "PENDING_CREATION")])}
        found |= {one.task_id for one in list_tasks(filters=[("state", "=", "PENDING_NODE_ASSIGNMENT")])}
        self._since_s = {name: self._since_s.get(name, now_s) for name in found}
        return any(now_s - since_s >= OTHERS_WAIT_S for since_s in self._since_s.values())


class Room:
    """What the line has asked Ray's autoscaler for. Where there is none, nothing comes of it."""

    def __init__(self) -> None:
        """Nobody knows what was asked for before."""
        self._asked: list[dict[str, float]] | None = None

    def ask(self, wanted: list[dict[str, float]]) -> None:
        """Ask for a cluster that has room for these, whoever has it now: what waits is not seen by Ray before it has room."""
        from ray.autoscaler.sdk import request_resources

        if wanted != self._asked:
            request_resources(bundles=wanted)
            self._asked = wanted


def act(client: JobSubmissionClient, others: Others, room: Room) -> None:
    """Look at the line once, and do what is to be done."""
    import ray

    jobs = _look(client)
    requests, ready = line.read(jobs), line.read_ready(jobs)
    facts = facts_of(ray.cluster_resources())  # type: ignore[no-untyped-call]
    now_ms, in_place = int(time.time() * 1000), head.in_place()
    room.ask(decisions.wanted_room(requests))
    others_wait = any(one.job.lives and not one.is_given for one in ready) and others.wait()
    for one in decisions.decide(requests, facts.num_cpus, facts.num_gpus, ready, now_ms, in_place, others_wait=others_wait):
        if isinstance(one, decisions.Start):
            _start(client, one, facts)
        elif isinstance(one, decisions.MakeReady):
            shape = one.shape
            command = _python(shape.code, "raymill.cluster.on_head.ready", one.id, shape.as_text(), facts=facts)
            submit(client, one.id, command, one.as_metadata())
        elif isinstance(one, decisions.Dismiss):
            head.tell_ready(one.ready.job.id, {})
        else:
            if one.makes_room and not one.attempt.makes_room:
                # Said first: whoever sees it ended has to know why.
                note(client, line.MAKE_ROOM, one.attempt.job.id)
            client.stop_job(one.attempt.job.id)
    if set(in_place) - line.needed_code(requests, ready):
        head.remove_all_but(partial(_needed_now, client))


def _look(client: JobSubmissionClient) -> list[line.Job]:
    """All jobs that Ray knows, and attempts that it does not know yet: those that workers were given which stood ready.

    The latter are told to Ray when such an attempt is under way: every job of Ray's begins with a process of its own, and that
    would take CPU away from the run at the moment when it starts.
    """
    jobs = [as_job(one) for one in client.list_jobs()]
    known, untold = {one.id for one in jobs}, []
    for one in jobs:
        told = head.told_ready(one.id) if one.metadata.get("raymill") == line.READY else None
        if not told or told["attempt"] in known:
            if told is not None and not one.lives:
                head.forget_ready(one.id)
            continue
        untold.append(line.Job(told["attempt"], told["metadata"], "PENDING", began_ms=told["given_ms"]))
        if not one.lives or time.time() * 1000 - told["given_ms"] > TOLD_LATER_S * 1000:
            submit(client, told["attempt"], NOTHING, told["metadata"])
    return jobs + untold


def _needed_now(client: JobSubmissionClient) -> set[str]:
    jobs = _look(client)
    return line.needed_code(line.read(jobs), line.read_ready(jobs))


def _start(client: JobSubmissionClient, start: decisions.Start, facts: ClusterFacts) -> None:
    asked = start.request.asked
    workers = str(start.workers) if asked.least < asked.most else "-"
    if start.by is None:
        code = start.request.job.code
        more = {head.RUNS_AT: asked.runs_at} if asked.runs_at else {}
        given = code, asked.run, workers, *asked.command
        command = _python(code, "raymill.cluster.on_head.attempt", *given, facts=facts, more=more)
        submit(client, start.id, command, start.as_metadata())
        return
    told: dict[str, Any] = {
        "run": asked.run,
        "command": list(asked.command),
        "runs_at": asked.runs_at,
        "facts": json.dumps(asdict(facts)),
    }
    of_attempt = {"attempt": start.id, "metadata": start.as_metadata(), "given_ms": int(time.time() * 1000)}
    head.tell_ready(start.by.job.id, told | of_attempt)


def _python(code: str, module: str, *arguments: str, facts: ClusterFacts, more: Mapping[str, str] | None = None) -> str:
    """The command that runs a module of the raymill that was sent, which may be another one than this.

    Args:
        more: variables of its environment.
    """
    own = {"RAYMILL_HOME": str(home()), "PYTHONPATH": str(head.engine_of(code)), TOLD: json.dumps(asdict(facts))}
    variables = [f"{name}={value}" for name, value in (own | dict(more or {})).items()]
    return join(["env", *variables, sys.executable, "-m", module, *arguments])


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
    times = one.start_time or 0, one.end_time or None
    code = head.code_of(one.runtime_env)
    return line.Job(one.submission_id or "", one.metadata or {}, status, one.driver_exit_code, *times, code)


def _is_there() -> bool:
    import ray

    return any(one["name"] == NAME for one in ray.util.list_named_actors(all_namespaces=True))


def ensure(engine: Path) -> None:
    """See to it that the cluster has its actor, of this raymill. Called on the head, by a process that Ray has started.

    Args:
        engine: the folder that raymill is imported from, of a run that may be over before the actor is.
    """
    import ray

    own = head.folder() / head.QUEUE
    with FileLock(head.folder() / "queue.lock", mode=0o600):
        ray.init(address="auto", namespace=NAME, logging_level=logging.ERROR, log_to_driver=False)
        try:
            if _is_there():
                if head.queue_imports(engine):
                    return
                # What is asked for here, another raymill may not know.
                ray.kill(ray.get_actor(NAME))
                while _is_there():
                    time.sleep(POLL_S)
            shutil.rmtree(own, ignore_errors=True)
            shutil.copytree(engine / ENGINE.name, own / ENGINE.name)
            variables = {"PYTHONPATH": str(own), "RAYMILL_HOME": str(home())}
            actor: Any = ray.remote(Queue)
            actor = actor.options(
                name=NAME,
                lifetime="detached",
                max_restarts=-1,
                num_cpus=0,
                # Any head: one that is lost is followed by another.
                resources={HEAD: 0.001},
                runtime_env={"env_vars": variables},
            )
            ray.get(actor.remote().lives.remote())
        finally:
            ray.shutdown()
