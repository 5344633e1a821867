"""Runs that were submitted to a cluster, as whoever submitted them sees them, from any machine that has the token.

A run stands in line (`line`) until there is room, and goes on when the terminal is closed: the command that supervises it is a
process of the cluster's head. All that is known here comes from Ray's Jobs API.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import logging
import os
import shlex
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.cluster import line, local
from raymill.cluster.on_head import queue
from raymill.cluster.spec import ClusterFolder, ClusterSpec
from raymill.config.load import load_job
from raymill.config.spec import JobSpec
from raymill.errors import InputError, Problem, RunError
from raymill.files import parse_json, read_record, without_version
from raymill.orchestration.on_ray.mirror import AtAddress
from raymill.orchestration.run import new_id
from raymill.paths import ENGINE, home, project_root
from raymill.record.folder import run_folder
from raymill.tune.command import load_search, trials_in_all
from raymill.tune.folder import StudyFolder, studies_folder

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

NOT_SENT = ["/.raymill", "/.venv", "/.git", "/tests", "/docs"]
"""Of the project; beside what .gitignore names."""

ELSEWHERE = 'env RAYMILL_HOME="${RAYMILL_HOME:-$HOME/.raymill}" python'
"""Begins a command on the head of a cluster elsewhere, which keeps its runs where it says."""

ASK_TIMEOUT_S = 10.0
POLL_S = 0.5


def submit(
    name: str,
    spec: ClusterSpec,
    job: str,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    priority: int = 0,
    *,
    search: bool = False,
) -> dict[str, Any]:
    """Hand a run or a search to a cluster. The job file is checked first; its data is when it begins, where the data is.

    Args:
        name: of the cluster.
        spec: what its file says.
        job: what `find_job` takes; with `resume`, ignored.
        overrides: as of `load_job`; of a study to go on with, as of `trials_in_all`.
        resume: the id of a run, or the name of a study, to go on with.
        priority: higher ones stand before lower ones, which make room for them.
        search: search over the job's fields rather than train it; with `resume`, ignored.

    Returns:
        run_id (of a search, the study's name), cluster, submission_id: the same, or that and a number where it was resumed.

    Raises:
        InputError: the job, or the cluster's file, is wrong, or the cluster does not run.
        RunError: the cluster refused it.
    """
    user = getpass.getuser()
    if resume:
        client = _client(name, spec)
        submission, asked = _again(_requests(client), resume, overrides, spec)
    else:
        submission, asked = _first(job, overrides, search=search)
        client = _client(name, spec)
    asked = replace(asked, user=user, priority=priority, quota_cpus=spec.quotas.get(user), keeps_ready=spec.keep_ready)
    asked = replace(asked, runs_at=spec.runs_at)
    # Each part is quoted: nothing in a name is a command of the shell.
    here = shlex.join(["env", f"RAYMILL_HOME={home()}", sys.executable])
    begin = here if spec.kind == "local" else ELSEWHERE
    entrypoint = f"{begin} -m raymill.cluster.on_head.request"
    travels = {"working_dir": str(project_root()), "excludes": NOT_SENT, "py_modules": [str(ENGINE)]}
    try:
        queue.submit(client, submission, entrypoint, asked.as_metadata(), runtime_env=travels)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the cluster {name} did not take the run: {str(error).splitlines()[-1]}") from error
    return {"run_id": asked.run, "cluster": name, "submission_id": submission}


def _first(job: str, overrides: Sequence[str], *, search: bool) -> tuple[str, line.Asked]:
    """What a new run or search is called, and what it asks for."""
    loaded = load_search(job, overrides) if search else load_job(job, overrides)
    path = loaded.path.resolve()
    if not path.is_relative_to(project_root()):
        fix = "Only the project travels: copy it there."
        raise InputError([Problem(job, str(path), f"a job file in {project_root()}", fix)])
    run, where = new_id(loaded.spec.name), str(path.relative_to(project_root()))
    begin = (line.TUNE, where, "--study-name", run) if search else ("train", where, "--run-id", run)
    return run, _asked(run, where, loaded.spec, (*begin, *(f"--set={one}" for one in overrides), "--json"))


def _asked(run: str, job: str, spec: JobSpec, command: tuple[str, ...]) -> line.Asked:
    scale, search = spec.scale, spec.search
    asked = line.Asked(
        run=run,
        job=job,
        user="",
        command=command,
        least=scale.min_num_workers,
        most=scale.max_num_workers,
        cpus=scale.cpus_per_worker or (0.0 if scale.gpus_per_worker else 1.0),
        gpus=scale.gpus_per_worker,
    )
    if not asked.is_search or search is None:
        return asked
    workers, most = search.workers or scale.max_num_workers, min(search.trials, search.parallel or search.trials)
    return replace(asked, least=1, most=most, cpus=workers * asked.cpus, gpus=workers * asked.gpus)


def _again(known: Sequence[line.Request], run: str, overrides: Sequence[str], cluster: ClusterSpec) -> tuple[str, line.Asked]:
    """What the request is called that goes on with a run that is over, and what it asks for."""
    changed = [f"--set={one}" for one in overrides]
    if not any(one.asked.run == run for one in known) and (found := _kept(run, cluster)):
        # The cluster that it was submitted to is gone, with all that it knew, or it was none.
        verb, spec = found
        if verb == line.TUNE:
            trials_in_all(overrides)
        return run, _asked(run, spec.name, spec, (verb, "--resume", run, *changed, "--json"))
    last = _newest(known, run)
    if last.exit_code is None:
        fix = f"`raymill logs {run} --follow` shows it; `raymill stop {run}` stops it."
        raise InputError([Problem("--resume", f"a run that is {last.state.lower()}", "one that is over", fix)])
    more_trials = trials_in_all(overrides) if last.asked.is_search else None
    if last.state == "SUCCEEDED" and more_trials is None:
        raise InputError([Problem("--resume", "a run that is finished", "an interrupted or failed run", "Submit a new one.")])
    command = (last.asked.command[0], "--resume", run, *changed, "--json")
    return f"{run}.{sum(one.asked.run == run for one in known) + 1}", replace(last.asked, command=command)


def _kept(name: str, cluster: ClusterSpec) -> tuple[str, JobSpec] | None:
    """The verb of a run or search that is kept here or where the cluster keeps its runs, and its job."""
    folder, study = run_folder(name), StudyFolder(studies_folder() / name)
    if cluster.kind == "local" and folder.spec.exists():
        return "train", JobSpec.model_validate(read_record(folder.spec))
    if cluster.kind == "local" and study.record.exists():
        return line.TUNE, _of_study(read_record(study.record))
    if cluster.runs_at is None:
        return None
    kept = AtAddress(cluster.runs_at)
    if content := kept.read(name, folder.spec.name):
        return "train", JobSpec.model_validate(without_version(parse_json(content), f"{cluster.runs_at}/{name}"))
    if content := kept.read(name, study.record.name):
        return line.TUNE, _of_study(without_version(parse_json(content), f"{cluster.runs_at}/{name}"))
    return None


def _of_study(record: dict[str, Any]) -> JobSpec:
    return JobSpec.model_validate({**record["spec"], "search": record["search"]})


def list_submitted(name: str, spec: ClusterSpec) -> list[dict[str, Any]]:
    """What was submitted to a cluster since it was started: those in line by their place, then all others, newest first.

    Each has submission_id, run_id, status (WAITING, RUNNING, SUCCEEDED, FAILED, INTERRUPTED), place (in line; else None),
    priority, workers (that it has, or asks for), attempts, job, user, exit_code, submitted_ms, ended_ms.
    """
    requests = _requests(_client(name, spec))
    told = _told(requests)
    return sorted(told, key=lambda one: (one["place"] is None, one["place"] or 0, -one["submitted_ms"]))


def logs(name: str, spec: ClusterSpec, run: str, write: Callable[[str], object], *, follow: bool) -> dict[str, Any]:
    """Write what a run has printed; with `follow`, until it is over. What came of it, as in `list_submitted`.

    Raises:
        InputError: no such run was submitted.
    """
    client = _client(name, spec)
    shown, said = 0, ""

    async def tail(attempt: str) -> None:
        async for part in client.tail_job_logs(attempt):
            write(part)

    while True:
        requests = _requests(client)
        request = _newest(requests, run)
        attempts = request.attempts[shown:]
        for attempt in attempts:
            if follow and attempt.job.lives:
                asyncio.run(tail(attempt.job.id))
            else:
                write(_printed(client, attempt.job))
        shown += len(attempts)
        if attempts and follow:
            continue
        [told] = [one for one in _told(requests) if one["submission_id"] == request.job.id]
        if request.state == "FAILED" and not request.attempts:
            write(client.get_job_logs(request.job.id))
        if not follow or request.exit_code is not None:
            return told
        if told["place"] and said != (said := f"waiting, place {told['place']} in line\n"):
            write(said)
        time.sleep(POLL_S)


def stop(name: str, spec: ClusterSpec, run: str) -> dict[str, Any]:
    """Ask a run to save its state and stop, or to leave the line; see `list_submitted`. It may take a step to do so."""
    client = _client(name, spec)
    request = _newest(_requests(client), run)
    if request.exit_code is None:
        queue.note(client, line.STOP, request.job.id)
    [told] = [one for one in _told(_requests(client)) if one["submission_id"] == request.job.id]
    return told


def check(name: str, spec: ClusterSpec) -> dict[str, Any]:
    """Look at every node of a cluster; see `health`.

    Returns:
        nodes, and differences: what will do harm, and what to do.

    Raises:
        RunError: the head could not look; with what it printed.
    """
    client = _client(name, spec)
    own_python = sys.executable if spec.kind == "local" else "python"
    submission = new_id("check")
    command = shlex.join([own_python, "-m", "raymill.cluster.health"])
    queue.submit(client, submission, command, {"raymill": "check"}, runtime_env={"py_modules": [str(ENGINE)]})
    while (job := queue.as_job(client.get_job_info(submission))).lives:
        time.sleep(POLL_S)
    printed = client.get_job_logs(submission)
    if job.status != "SUCCEEDED":
        raise RunError(f"the nodes of {name} could not be looked at; the head printed:\n{printed[-2000:]}")
    found: dict[str, Any] = json.loads(next(one for one in reversed(printed.splitlines()) if one.startswith("{")))
    return found


def _printed(client: JobSubmissionClient, job: line.Job) -> str:
    try:
        return str(client.get_job_logs(job.id))
    except RuntimeError as error:
        if "Cannot connect to host" not in str(error):
            raise
        return f"what {job.id} printed went with the head that it ran on\n"


def _requests(client: JobSubmissionClient) -> list[line.Request]:
    return line.read(map(queue.as_job, client.list_jobs()))


def _newest(requests: Sequence[line.Request], run: str) -> line.Request:
    found = [one for one in requests if one.asked.run == run]
    if not found:
        fix = "`raymill ps --cluster NAME` lists those of this cluster."
        raise InputError([Problem("run", repr(run[:80]), "a run that was submitted to this cluster", fix)])
    return max(found, key=lambda one: one.job.began_ms)


def _told(requests: Sequence[line.Request]) -> list[dict[str, Any]]:
    waiting = [one.job.id for one in requests if one.state == "WAITING"]
    return [
        {
            "submission_id": one.job.id,
            "run_id": one.asked.run,
            "status": one.state,
            "place": waiting.index(one.job.id) + 1 if one.job.id in waiting else None,
            "priority": one.asked.priority,
            "workers": one.attempts[-1].workers if one.state == "RUNNING" else one.asked.most,
            "attempts": len(one.attempts),
            "job": one.asked.job,
            "user": one.asked.user,
            "exit_code": one.exit_code,
            "submitted_ms": one.job.began_ms,
            "ended_ms": (one.attempts[-1].job if one.attempts else one.job).ended_ms if one.exit_code is not None else None,
        }
        for one in requests
    ]


# ---------------------------------------------------------------- the way to it


def _client(name: str, spec: ClusterSpec) -> JobSubmissionClient:
    """Ray's client of the cluster.

    Raises:
        InputError: the cluster does not run, its token is not there, may be read by others, or is the wrong one; or it asks for
            none, and nobody said that it may.
    """
    dashboard, token_file = _way(name, spec)
    _ask(name, dashboard, _token(token_file) if token_file else None, insecure=spec.insecure)
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        os.environ.pop(variable, None)
    os.environ["RAY_AUTH_MODE"] = "token" if token_file else "disabled"
    if token_file:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    from ray.job_submission import JobSubmissionClient

    # It says of each file that it does not send that it does not, and of each package that it sends it.
    for logger in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "ray"]:
        logging.getLogger(logger).setLevel(logging.ERROR)
    return JobSubmissionClient(dashboard)


def _token(file: Path) -> str:
    fix = "Name the file that `raymill cluster up` has made, or the one you were given; then `chmod 600` it."
    if not file.is_file():
        raise InputError([Problem(str(file), "no such file", "the cluster's token", fix)])
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise InputError([Problem(str(file), "a file that others may read", "one of mode 0600", fix)])
    return file.read_text().strip()


def _way(name: str, spec: ClusterSpec) -> tuple[str, Path | None]:
    """Where the cluster's Jobs API answers, and the file with its token; None: it is said to need none."""
    if spec.kind == "address":
        needed = ["dashboard"] if spec.insecure else ["dashboard", "token_file"]
        missing = [field for field in needed if getattr(spec, field) is None]
        if missing:
            fix = {"dashboard": "Add it.", "token_file": "Add it; or type --insecure, if the cluster asks for none."}
            raise InputError([Problem(f"cluster/{name}.yaml {field}", "nothing", "a value", fix[field]) for field in missing])
        return str(spec.dashboard), Path(spec.token_file).expanduser() if spec.token_file else None
    folder = ClusterFolder(name)
    if not any(node["runs"] for node in local.status(name)["nodes"]):
        raise InputError(
            [Problem(name, "a cluster that does not run", "one that does", f"`raymill cluster up {name}` starts it.")]
        )
    return str(read_record(folder.record)["dashboard"]), folder.token


def _ask(name: str, dashboard: str, token: str | None, *, insecure: bool) -> None:
    """Ask for the list of jobs: with the token that must be answered, and without it refused, unless somebody said otherwise."""
    answers = {}
    for who, headers in (("with", {"Authorization": f"Bearer {token}"} if token else {}), ("without", {})):
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
    if answers["without"] == 200 and not insecure:
        fix = "Start it with RAY_AUTH_MODE=token: whoever reaches it can run code there. --insecure uses it all the same."
        raise InputError([Problem(dashboard, "a cluster that asks for no token", "one that does", fix)])
