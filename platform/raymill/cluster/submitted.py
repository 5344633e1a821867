"""Runs that were submitted to a cluster: jobs of Ray's own Jobs API, which go on when the terminal is closed.

The cluster runs `raymill train` for them: the command that supervises a run is a process of the cluster's head.
"""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import shlex
import stat
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.cluster import local
from raymill.cluster.spec import ClusterFolder, ClusterSpec
from raymill.config.load import load_job
from raymill.errors import InputError, Problem, RunError
from raymill.files import read_record
from raymill.orchestration.run import new_id
from raymill.paths import ENGINE, home, project_root

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

NOT_SENT = ["/.raymill", "/.venv", "/.git", "/tests", "/docs"]
"""Of the project; beside what .gitignore names."""

INTERRUPTED = 3
"""What `raymill train` ends with where a run was stopped and can be resumed."""

ASK_TIMEOUT_S = 10.0


def submit(name: str, spec: ClusterSpec, job: str, overrides: Sequence[str] = (), resume: str | None = None) -> dict[str, Any]:
    """Hand a run to a cluster. The job file is checked first; its data is when the run begins, where the data is.

    Args:
        name: of the cluster.
        spec: what its file says.
        job: what `find_job` takes; with `resume`, ignored.
        overrides: as of `load_job`.
        resume: the id of a run to go on with.

    Returns:
        run_id, cluster, submission_id: the run's id, or that and a number where it was resumed.

    Raises:
        InputError: the job, or the cluster's file, is wrong, or the cluster does not run.
        RunError: the cluster refused it.
    """
    arguments = ["--resume", resume] if resume else []
    run_id, submission = resume or "", resume or ""
    if not resume:
        loaded = load_job(job, overrides)
        path = loaded.path.resolve()
        if not path.is_relative_to(project_root()):
            raise InputError(
                [Problem(job, str(path), f"a job file in {project_root()}", "Only the project travels: copy it there.")]
            )
        run_id = submission = new_id(loaded.spec.name)
        arguments = [str(path.relative_to(project_root())), "--run-id", run_id]
    client = _client(name, spec)
    if resume:
        taken = {one.submission_id for one in client.list_jobs()}
        submission = next(f"{resume}.{number}" for number in range(2, 10_000) if f"{resume}.{number}" not in taken)
    sets = [part for one in overrides for part in ("--set", one)]
    own_python = sys.executable if spec.kind == "local" else "python"
    begin = ["env", f"RAYMILL_HOME={home()}", own_python, "-m", "raymill.cluster.entry", submission]
    # Each part is quoted: nothing in a name is a command of the shell.
    train = [*begin, "train", *arguments, *sets, "--json"]
    travels = {"working_dir": str(project_root()), "excludes": NOT_SENT, "py_modules": [str(ENGINE)]}
    told = {"run": run_id, "user": getpass.getuser(), "job": arguments[0] if not resume else f"--resume {resume}"}
    try:
        client.submit_job(entrypoint=shlex.join(train), submission_id=submission, runtime_env=travels, metadata=told)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the cluster {name} did not take the run: {str(error).splitlines()[-1]}") from error
    return {"run_id": run_id, "cluster": name, "submission_id": submission}


def list_submitted(name: str, spec: ClusterSpec) -> list[dict[str, Any]]:
    """What was submitted to a cluster since it was started, newest first: submission_id, run_id, status, job, user, message."""
    found = [_told(one) for one in _client(name, spec).list_jobs() if one.submission_id]
    return sorted(found, key=lambda one: -(one["started_ms"] or 0))


def logs(name: str, spec: ClusterSpec, run: str, write: Callable[[str], object], *, follow: bool) -> dict[str, Any]:
    """Write what a run has printed; with `follow`, until it ends. What came of it, as in `list_submitted`.

    Raises:
        InputError: no such run was submitted.
    """
    client = _client(name, spec)
    submission = _newest(client, run)

    async def tail() -> None:
        async for part in client.tail_job_logs(submission):
            write(part)

    if follow:
        asyncio.run(tail())
    else:
        write(client.get_job_logs(submission))
    return _told(client.get_job_info(submission))


def stop(name: str, spec: ClusterSpec, run: str) -> dict[str, Any]:
    """Ask a run to save its state and stop; see `list_submitted`. It may take a step to do so."""
    client = _client(name, spec)
    submission = _newest(client, run)
    client.stop_job(submission)
    return _told(client.get_job_info(submission))


def _newest(client: JobSubmissionClient, run: str) -> str:
    found = [one for one in client.list_jobs() if one.submission_id and (one.metadata or {}).get("run") == run]
    if not found:
        fix = "`raymill ps --cluster NAME` lists those of this cluster."
        raise InputError([Problem("run", repr(run[:80]), "a run that was submitted to this cluster", fix)])
    return str(max(found, key=lambda one: one.start_time or 0).submission_id)


def _told(one: Any) -> dict[str, Any]:
    metadata, status = one.metadata or {}, str(getattr(one.status, "value", one.status))
    exit_code = one.driver_exit_code
    if status == "STOPPED" or (status == "FAILED" and exit_code == INTERRUPTED):
        # Asked to stop it has saved its state, or else it goes on from the checkpoint before.
        status, exit_code = "INTERRUPTED", INTERRUPTED
    return {
        "submission_id": one.submission_id,
        "run_id": metadata.get("run"),
        "status": status,
        "job": metadata.get("job"),
        "user": metadata.get("user"),
        "exit_code": exit_code,
        "started_ms": one.start_time,
        "ended_ms": one.end_time,
    }


# ---------------------------------------------------------------- the way to it


def _client(name: str, spec: ClusterSpec) -> JobSubmissionClient:
    """Ray's client of the cluster.

    Raises:
        InputError: the cluster does not run, its token is not there, may be read by others, or is the wrong one.
    """
    dashboard, token_file = _way(name, spec)
    fix = "Name the file that `raymill cluster up` has made, or the one you were given; then `chmod 600` it."
    if not token_file.is_file():
        raise InputError([Problem(str(token_file), "no such file", "the cluster's token", fix)])
    if stat.S_IMODE(token_file.stat().st_mode) & 0o077:
        raise InputError([Problem(str(token_file), "a file that others may read", "one of mode 0600", fix)])
    _ask(name, dashboard, token_file.read_text().strip())
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.pop("RAY_ADDRESS", None)
    from ray.job_submission import JobSubmissionClient

    # It says of each file that it does not send that it does not.
    logging.getLogger("ray").setLevel(logging.ERROR)
    return JobSubmissionClient(dashboard)


def _way(name: str, spec: ClusterSpec) -> tuple[str, Path]:
    """Where the cluster's Jobs API answers, and the file with its token."""
    if spec.kind == "address":
        missing = [field for field in ("dashboard", "token_file") if getattr(spec, field) is None]
        if missing:
            raise InputError([Problem(f"cluster/{name}.yaml {field}", "nothing", "a value", "Add it.") for field in missing])
        return str(spec.dashboard), Path(str(spec.token_file)).expanduser()
    folder = ClusterFolder(name)
    if not any(node["runs"] for node in local.status(name)["nodes"]):
        raise InputError(
            [Problem(name, "a cluster that does not run", "one that does", f"`raymill cluster up {name}` starts it.")]
        )
    return str(read_record(folder.record)["dashboard"]), folder.token


def _ask(name: str, dashboard: str, token: str) -> None:
    """Ask for the list of jobs: with the token that must be answered, and without it refused."""
    answers = {}
    for who, headers in (("with", {"Authorization": f"Bearer {token}"}), ("without", {})):
        request = urllib.request.Request(f"{dashboard}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S) as answer:
                answers[who] = answer.status
        except urllib.error.HTTPError as error:
            answers[who] = error.code
        except OSError as error:
            fix = "Look at `raymill cluster status`, or correct its address."
            raise InputError([Problem(dashboard, str(error), f"the Jobs API of the cluster {name}", fix)]) from error
    if answers["with"] in (401, 403):
        fix = "Use the token that the cluster was started with."
        raise InputError([Problem(f"the token of {name}", f"HTTP {answers['with']}", "one that the cluster takes", fix)])
    if answers["without"] == 200:
        fix = "Start it with RAY_AUTH_MODE=token: as it is, whoever reaches it can run code there."
        raise InputError([Problem(dashboard, "a cluster that asks for no token", "one that does", fix)])
