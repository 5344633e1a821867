"""A search from the command's point of view: prepared and checked, driven by a process that is started again when it dies, shown.

Whatever the processes have to say to each other stands in the study's folder. Killed at any moment, the same command goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raymill import errors
from raymill.config import load, plan
from raymill.config.search import SearchSpec
from raymill.config.spec import JobSpec
from raymill.errors import InputError, Problem, RunError, SearchStopped, WorkerError
from raymill.files import make_private_folder, private, read_record, run_lock, write_record
from raymill.orchestration.executors import Executor, choose
from raymill.orchestration.on_ray import session_folder
from raymill.orchestration.prepare import Prepared, prepare
from raymill.orchestration.run import new_id, try_code
from raymill.paths import project_root
from raymill.record.environment import environment
from raymill.record.processes import take_turns_behind
from raymill.tune import space
from raymill.tune.folder import FINISHED, INTERRUPTED, UNWRITABLE, StudyFolder, find_study, studies_folder, unfinished_study

BESIDE = "search.yaml"
"""A job's search may stand in this file beside it."""

POLL_S = 0.2
MOST_DRIVERS = 3
"""That may die one after the other without a trial between them."""

SESSION_TIMEOUT_S = 10.0
STDERR = 2

NICENESS = 15
"""Of the delivery to MLflow."""

Tell = Callable[[dict[str, Any]], None]
"""Is given each trial that is over."""


@dataclass(frozen=True)
class Asked:
    """What a command asks for.

    Attributes:
        job: what `load.find_job` takes; with `resume`, ignored.
        overrides: "field.path=value" each; with `resume`, of search.trials alone: how many there are to be in all.
        resume: a study by its name; None: the newest of this job and search that is not over, or a new one.
        new: a new study in any case.
        add_trials: beside those that the search or an earlier command says.
        parallel: no more trials at once than these, whatever the search says.
        study: what a new one is called; None: after its job.
    """

    job: str
    overrides: Sequence[str] = ()
    resume: str | None = None
    new: bool = False
    add_trials: int = 0
    parallel: int | None = None
    study: str | None = None


def tune(asked: Asked, tell: Tell, say: Callable[[str], None]) -> dict[str, Any]:
    """Search to the end.

    Args:
        tell: shows a trial.
        say: shows a line.

    Returns:
        The summary: study, trials (by state), best (number, value, values, run), job_as_it_stands, what was registered.

    Raises:
        InputError: with everything that is wrong with the job, its search and each corner of the space; nothing was started.
        SearchStopped: on request; the same command goes on.
        RunError: the search could not go on.
    """
    with ExitStack() as stack:
        driver = _Driver()
        stack.callback(driver.end)
        folder, prepared = _study(asked, say)
        stack.enter_context(run_lock(folder.command_lock))
        say(f"study {folder.name}")
        say(f"its files: {folder.path}")
        folder.stop_request.unlink(missing_ok=True)
        stack.enter_context(_stop_on_signal(folder))
        delivery = stack.enter_context(_delivery(folder))
        offset = _follow_other(folder, tell)
        folder.failure.unlink(missing_ok=True)
        try:
            _drive(folder, driver, asked.parallel, offset, tell, partial(try_code, prepared) if prepared else None)
        except InputError:
            # The job's own code is wrong: there is no search.
            for left in (folder.path, *(run.path for run in folder.runs)):
                shutil.rmtree(left, ignore_errors=True)
            raise
        if folder.stop_request.exists():
            raise SearchStopped(folder.name)
        summary = read_record(folder.summary) | delivery.finish()
        write_record(folder.summary, summary)
    return summary


def _study(asked: Asked, say: Callable[[str], None]) -> tuple[StudyFolder, Prepared | None]:
    """The study to go on with; or a new one, with the job whose code is still to be tried."""
    executor = choose(this_process=False)
    if asked.resume is not None:
        folder = find_study(asked.resume)
        record = read_record(folder.record)
        trials = trials_in_all(asked.overrides, record["trials"]) or record["trials"]
    else:
        overrides, loaded = with_search(asked.job, asked.overrides)
        search = _searched(loaded)
        named: dict[str, Any] = {"job": str(loaded.path.resolve()), "search": search.model_dump(mode="json")}
        folder_there = None if asked.new or asked.study else unfinished_study(named["job"], named["search"])
        if folder_there is None:
            return _new_study(asked, overrides, loaded, search, executor, named, say)
        folder, record = folder_there, read_record(folder_there.record)
        trials = record["trials"]
        say("going on with what was begun (--new begins anew)")
    if (trials := trials + asked.add_trials) != record["trials"]:
        write_record(folder.record, {**record, "trials": trials})
        folder.summary.unlink(missing_ok=True)
    return folder, None


def trials_in_all(overrides: Sequence[str], begun: int = 1) -> int | None:
    """How many trials a study that goes on is to have; None: as many as before.

    Args:
        overrides: "search.trials=N", or none.
        begun: that it is to have already.

    Raises:
        InputError: anything else is overridden, or N is no number, or smaller.
    """
    trials, problems = None, []
    for one in overrides:
        field, _, value = one.partition("=")
        if field != "search.trials":
            fix = "Leave it out, or begin another search with --new."
            problems.append(Problem(f"--set {field}", f"{value!r} for a search that was begun", "search.trials alone", fix))
        elif not value.isdecimal() or int(value) < begun:
            fix = "Give the number of trials in all; `raymill tune stop` ends a search earlier."
            problems.append(Problem(f"--set {field}", repr(value), f"a whole number of {begun} or more", fix))
        else:
            trials = int(value)
    if problems:
        raise InputError(problems)
    return trials


def _new_study(
    asked: Asked,
    overrides: list[str],
    loaded: load.LoadedJob,
    search: SearchSpec,
    executor: Executor,
    named: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[StudyFolder, Prepared]:
    prepared = checked(loaded, overrides, search, executor)
    first, outside = space.as_it_stands(prepared.spec, search)
    is_grid = search.sampler.kind == "grid"
    begin_with = space.grid(search) if is_grid else [first, *search.points]
    if outside and not is_grid:
        say(f"the job's own values of {', '.join(outside)} lie outside of the space: the first trial is not the job as it stands")
    folder = StudyFolder(studies_folder() / (asked.study or new_id(prepared.spec.name)))
    make_private_folder(folder.path)
    write_record(folder.plan, prepared.plan.as_record())
    record = {
        **named,
        "spec": load.resolved(prepared.spec),
        "overrides": [one for one in asked.overrides if not one.startswith("search")],
        "project": str(project_root()),
        "cwd": str(Path.cwd()),
        "metric": search.metric or prepared.spec.checkpoint.metric,
        "mode": search.mode or prepared.spec.checkpoint.mode,
        "first": begin_with,
        "first_is_the_job": not outside and not is_grid,
        "trials": (len(begin_with) if is_grid else search.trials) + asked.add_trials,
        "begun_s": time.time(),
        "environment": environment(),
    }
    write_record(folder.record, record)
    return folder, prepared


def load_search(job: str, overrides: Sequence[str]) -> load.LoadedJob:
    """A job with its search, checked as `load.load_job` checks one, at each corner of the space; its data are not looked at.

    Raises:
        InputError: with everything that is wrong, or it has no search.
    """
    given, _ = with_search(job, overrides)
    loaded = load.load_job(job, given)
    bare = [*overrides, "search=null"]
    if problems := space.find_problems(str(loaded.path), bare, _searched(loaded), lambda spec: []):
        raise InputError(problems)
    return loaded


def _searched(loaded: load.LoadedJob) -> SearchSpec:
    if loaded.spec.search is None:
        fix = f"Add `search:` to the job, or write it into {BESIDE} beside it."
        raise InputError([Problem("search", "nothing", "a space to search", fix)])
    return loaded.spec.search


def with_search(job: str, overrides: Sequence[str]) -> tuple[list[str], load.LoadedJob]:
    """A job with its search, which may stand beside it.

    Raises:
        InputError: it stands in both places.
    """
    beside = load.find_job(job).with_name(BESIDE)
    if not beside.is_file():
        return list(overrides), load.examine_job(job, overrides)
    given = [f"search={json.dumps(load.read_values(beside))}", *overrides]
    own = load.examine_job(job, [one for one in overrides if not one.startswith("search")])
    if "search" in own.lines:
        fix = "Delete one of the two."
        raise InputError([Problem(own.where("search"), f"a search, and another one in {beside}", "one of them", fix)])
    return given, load.examine_job(job, given)


def checked(loaded: load.LoadedJob, overrides: Sequence[str], search: SearchSpec, executor: Executor) -> Prepared:
    """The job as it stands, once it and each corner of its space are found right.

    Raises:
        InputError: with everything that is wrong.
    """
    problems: list[Problem] = []
    facts = executor.find_facts()
    prepared: Prepared | None = None
    try:
        prepared = prepare(loaded, facts)
    except InputError as error:
        problems += error.problems
    if (search.metric or loaded.spec.checkpoint.metric) is None:
        fix = "Set search.metric or checkpoint.metric, such as validation/accuracy."
        problems.append(Problem("search.metric", "nothing", "what is searched for", fix))
    bare = [*overrides, "search=null"]

    def judge(spec: JobSpec) -> list[Problem]:
        return plan.find_problems(spec, prepared.manifest if prepared else None, facts, str)

    problems += space.find_problems(str(loaded.path), bare, search, judge)
    if problems or prepared is None:
        raise InputError(problems)
    return prepared


def with_trials(overrides: Sequence[str], trials: int | None) -> list[str]:
    """The overrides of a command line, with its number of trials."""
    return [*overrides, *([f"search.trials={trials}"] if trials is not None else [])]


# ---------------------------------------------------------------- the driver


def _follow_other(folder: StudyFolder, tell: Tell) -> int:
    """Follow a driver that outlived the command that started it; returns how far the trials were shown."""
    offset = folder.trials.stat().st_size if folder.trials.exists() else 0
    while True:
        try:
            with FileLock(folder.driver_lock, blocking=False, mode=0o600):
                return offset
        except Timeout:
            time.sleep(POLL_S)
            offset, _ = _show_new(folder, offset, tell)


class _Driver:
    """The process that drives a search, begun while the job is still checked: it imports what that takes. It must be ended."""

    def __init__(self) -> None:
        """Start it; it does not know the search yet."""
        self._held = ExitStack()
        self._session = self._held.enter_context(session_folder.new_session())
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "raymill.tune.driver"],
            cwd=project_root(),
            env={**os.environ, session_folder.VARIABLE: str(self._session)},
            stdin=subprocess.PIPE,
            # Its log is the search's.
            stdout=STDERR,
            start_new_session=True,
        )

    def begin(self, folder: StudyFolder, parallel: int | None) -> None:
        """Say which search it is, and how many trials may run at once."""
        if self.process.stdin is not None:
            # One that has died is seen to be dead.
            with suppress(BrokenPipeError), self.process.stdin as told:
                told.write(json.dumps({"study": str(folder.path), "parallel": parallel}).encode())

    def end(self) -> None:
        """Kill it if it goes on, and whatever is left of its Ray."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        session_folder.end_session(self._session, SESSION_TIMEOUT_S)
        self._held.close()


def _drive(
    folder: StudyFolder, driver: _Driver, parallel: int | None, offset: int, tell: Tell, look: Callable[[], None] | None
) -> None:
    """Have the search driven to its end, by one process after the other where they die.

    Args:
        driver: the first of them, which waits.
        look: tries the job's own code while the first of them starts.

    Raises:
        InputError: by `look`.
        RunError: the search cannot go on.
    """
    deaths = 0
    while True:
        process = driver.process
        try:
            driver.begin(folder, parallel)
            if look is not None:
                look()
                look = None
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                offset, count = _show_new(folder, offset, tell)
                deaths = 0 if count else deaths
        finally:
            driver.end()
        offset, _ = _show_new(folder, offset, tell)
        if process.returncode in (FINISHED, INTERRUPTED):
            return
        if process.returncode == UNWRITABLE:
            raise RunError(f"nothing can be written into {folder.path}: its disk is full, or gone. The same command goes on.")
        if folder.failure.exists():
            error = errors.from_record(read_record(folder.failure))
            if not isinstance(error, WorkerError):
                raise error
            # Ray did not start, or a part of it died.
            folder.failure.unlink()
        deaths += 1
        if deaths > MOST_DRIVERS:
            raise RunError(f"the search's driver died {deaths} times without a trial between; see {folder.log}")
        driver = _Driver()


def _show_new(folder: StudyFolder, offset: int, tell: Tell) -> tuple[int, int]:
    if not folder.trials.exists():
        return offset, 0
    with folder.trials.open("rb") as file:
        file.seek(offset)
        data = file.read()
    # A line may be half written.
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for line in lines:
        tell(json.loads(line))
    return offset + len(whole), len(lines)


@contextmanager
def _stop_on_signal(folder: StudyFolder) -> Iterator[None]:
    """Within this, SIGINT and SIGTERM end the search, its running trials saved; a second SIGINT at once."""

    def ask(number: int, frame: Any) -> None:
        if folder.stop_request.exists() and number == signal.SIGINT:
            raise SearchStopped(folder.name)
        folder.stop_request.touch()

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the delivery to MLflow


class _Delivery:
    """The process that delivers finished trials to MLflow, as they come."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self._folder.log, "ab", opener=private) as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "raymill.tune.delivery", str(self._folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # From here, so that its imports too give way to what the first trials wait for.
        take_turns_behind(process.pid, NICENESS)
        return process

    def finish(self) -> dict[str, Any]:
        """Wait until all is delivered, the best model registered; returns what the summary says of it."""
        code = self._process.wait()
        if code < 0:
            self._process = self._start()
            code = self._process.wait()
        done = read_record(self._folder.delivered) if self._folder.delivered.exists() else {}
        found = {"delivered_to_mlflow": code == 0, **{name: done[name] for name in ("model", "note") if done.get(name)}}
        if code != 0 and "note" not in found:
            found["note"] = f"MLflow did not take everything; see {self._folder.log}. The same command delivers the rest."
        return found

    def end(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


@contextmanager
def _delivery(folder: StudyFolder) -> Iterator[_Delivery]:
    delivery = _Delivery(folder)
    try:
        yield delivery
    finally:
        delivery.end()
