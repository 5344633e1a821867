"""One trial, in a Ray Tune actor that outlives it: each of its runs is an ordinary run of raymill, in this process.

A trial is known by its number, and so are its runs: one that was killed goes on from its own last commit, in whichever process.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from raymill.checkpoint.directory import read_state
from raymill.config import load
from raymill.errors import InputError, Interrupted, RunError
from raymill.orchestration import executors, run
from raymill.orchestration.attempts import Show
from raymill.orchestration.executors import Executor
from raymill.orchestration.on_ray import mirror, run_files
from raymill.orchestration.prepare import prepare
from raymill.own_code.traces import tell
from raymill.paths import in_this_copy, project_root
from raymill.record.catalog import finished
from raymill.record.events import AttemptStarted, EvaluationDone, Event, RunStopped, read_events
from raymill.record.folder import RunFolder, run_folder
from raymill.tune.folder import StudyFolder, studies_folder

Evaluations = dict[int, dict[str, float]]
"""Step -> metrics."""

Report = Callable[[int, float], None]
"""Is given number (from 1 on) and value of each evaluation; raises SystemExit where the trial is to end."""


@dataclass(frozen=True)
class TrialSpec:
    """What an actor is told of a trial; plain values only.

    Attributes:
        study, number: which trial.
        project, job: the project's folder, and the job file in it, where the search is driven.
        runs: run id -> its overrides.
        parent: the run that it goes on from; None: it begins anew.
        metric: what is searched for.
        measured: further metrics that each run has to measure.
        cwd: where the command was given, in the project or not.
        in_process: its runs have one worker, and need no other process.
        stop_after: evaluations behind which a run is stopped, saved, for others to go on from; None: it runs to its end.
    """

    study: str
    number: int
    project: str
    job: str
    runs: dict[str, list[str]]
    metric: str
    measured: list[str]
    cwd: str
    in_process: bool
    stop_after: int | None = None
    parent: str | None = None


def run_trial(trial: TrialSpec, report: Report, home: Any = None) -> dict[str, Any]:
    """Run a trial to its end.

    Args:
        trial: which.
        report: is told its evaluations.
        home: the actor that has its runs where this process may be on a machine that does not see them.

    Returns:
        metrics (means over the runs), deviation (of the metric), step, seconds and runs; or failed, with what the job's own code
        said; or no_room, with what the system said.
    """
    if home is not None and not StudyFolder(studies_folder() / trial.study).record.exists():
        return _run_away(trial, report, home)
    os.chdir(trial.cwd)
    return _run_here(trial, report, lambda run_id: nullcontext())


def _run_away(trial: TrialSpec, report: Report, home: Any) -> dict[str, Any]:
    """The same where neither the project's own folder is nor its runs: on what travelled here."""
    there, here = mirror.OtherMachine(home), project_root()
    job, cwd = (in_this_copy(path, trial.project) for path in (trial.job, trial.cwd))
    os.chdir(cwd if Path(cwd).is_dir() else here)
    with mirror.away():
        if trial.parent is not None:
            there.fetch(run_folder(trial.parent).path)
        return _run_here(replace(trial, job=job), report, partial(_mirrored, home=there))


@contextmanager
def _mirrored(run_id: str, home: mirror.Home) -> Iterator[None]:
    folder = run_folder(run_id)
    home.fetch(folder.path)
    sent = {folder.path: run_files.stamps(folder.path)}
    with mirror.mirrored(lambda: [folder.path], home, sent=sent, say=partial(print, flush=True), must_arrive=True):
        yield


def _run_here(trial: TrialSpec, report: Report, in_place: Callable[[str], AbstractContextManager[None]]) -> dict[str, Any]:
    begun_s = time.perf_counter()
    measured: list[dict[str, float]] = []
    step = 0
    try:
        for run_id, overrides in trial.runs.items():
            with in_place(run_id):
                summary = _run(trial, run_id, overrides, report)
            for name in (trial.metric, *trial.measured):
                if name not in summary["metrics"]:
                    raise RunError(f"the run did not measure {name!r}, but {sorted(summary['metrics'])}. Correct the search.")
                if math.isnan(summary["metrics"][name]):
                    raise RunError(f"{name} is not a number at the end of run {run_id}; look at what evaluate() gives.")
            measured.append(summary["metrics"])
            step = summary["steps"]
    except Interrupted:
        return {"interrupted": True}
    except Exception as error:  # the job's own code may raise anything, and no other trial is to end by it
        if found := _no_room(error):
            return {"no_room": found}
        problems = [str(problem) for problem in error.problems] if isinstance(error, InputError) else []
        return {"failed": "\n".join([tell(error), *problems]), "runs": list(trial.runs)}
    return {
        "metrics": {name: statistics.fmean(one[name] for one in measured) for name in set[str].intersection(*map(set, measured))},
        "deviation": statistics.stdev(one[trial.metric] for one in measured) if len(measured) > 1 else None,
        "runs": list(trial.runs),
        "step": step,
        "seconds": time.perf_counter() - begun_s,
    }


def _no_room(error: BaseException | None) -> str | None:
    """What the system said, where an error came from a full disk; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _run(trial: TrialSpec, run_id: str, overrides: list[str], report: Report) -> dict[str, Any]:
    """Train one run, or go on with it; returns its summary."""
    folder = run_folder(run_id)
    if (summary := finished(folder)) is not None:
        return summary
    if trial.in_process:
        return train(trial, folder, overrides, report)
    return _in_a_process_of_its_own(trial, folder, overrides, report)


def train(trial: TrialSpec, folder: RunFolder, overrides: list[str], report: Report) -> dict[str, Any]:
    """Train a run in this process, or have it supervised; what is reported may end it, its state saved."""
    executor = executors.TRIAL if trial.in_process else executors.SUPERVISED

    # Of a run that goes on, the evaluations before count too.
    before = read_events(folder.events)[0] if folder.events.exists() else []
    evaluations = {event.step: event.metrics for event in before if _counts(event, trial.metric)}

    def heard(evaluation: int, value: float) -> None:
        report(evaluation, value)
        if evaluation == trial.stop_after:
            folder.stop_request.touch()

    def place() -> int | None:
        return _last_saved(folder, sorted(evaluations)[trial.stop_after - 1 :]) if trial.stop_after else None

    def watch(folder: RunFolder) -> Show:
        def show(event: Event) -> None:
            _hear(event, trial.metric, evaluations, folder, heard)

        # Whoever was to hear of the last of them may have died before it was noted; the same twice is once.
        for event in before:
            _hear(event, trial.metric, evaluations, folder, report)
        if place() is not None:
            folder.stop_request.touch()
        return show

    ends = [event for event in before if isinstance(event, AttemptStarted | RunStopped)]
    is_stopped = bool(ends) and isinstance(ends[-1], RunStopped) and ends[-1].reason == "interrupted"
    try:
        if not is_stopped or place() is None:
            return _train(trial, folder, overrides, executor, watch)
    except Interrupted:
        if place() is None:
            raise
    # Where it was to be, whichever step it stopped behind.
    step = place()
    assert step is not None
    return {"metrics": evaluations[step], "steps": step}


def _last_saved(folder: RunFolder, steps: list[int]) -> int | None:
    """The last of these steps whose state is saved as it was behind their evaluations.

    One that was killed between an evaluation and the save behind it has to evaluate again: whoever went on from the save before
    it would evaluate what this run has already, and count it as its own.
    """
    for step in reversed(steps):
        if any(read_state(path).get("evaluated", True) for path in folder.checkpoints.glob(f"step-{step:08d}.*")):
            return step
    return None


def _train(trial: TrialSpec, folder: RunFolder, overrides: list[str], executor: Executor, watch: run.Watch) -> dict[str, Any]:
    """Train a run, or go on with it."""
    if folder.command.exists():
        return run.resume(folder.run_id, None, [], executor, watch, time.time(), preflight=False)
    # Whatever is there was killed before it was a run.
    shutil.rmtree(folder.path, ignore_errors=True)
    prepared = prepare(load.load_job(trial.job, overrides), executor.find_facts())
    return run.train(prepared, executor, watch, time.time(), preflight=False, run_id=folder.run_id, parent=trial.study)


def _counts(event: Event, metric: str) -> TypeGuard[EvaluationDone]:
    return isinstance(event, EvaluationDone) and metric in event.metrics


def _hear(event: Event, metric: str, evaluations: Evaluations, folder: RunFolder, report: Report) -> None:
    """Report an evaluation, as the n-th of the run, and note it among those so far."""
    if _counts(event, metric):
        evaluations[event.step] = event.metrics
        try:
            report(sum(step <= event.step for step in evaluations), event.metrics[metric])
        except SystemExit:
            # It ends behind the step that comes, with its state saved: it may be gone on with.
            folder.stop_request.touch()


# ---------------------------------------------------------------- a trial of several workers


def _in_a_process_of_its_own(trial: TrialSpec, folder: RunFolder, overrides: list[str], report: Report) -> dict[str, Any]:
    """Have a run with workers of its own trained by another process, which knows nothing of the Ray that this one belongs to."""
    mine = ("RAY_", "RAYMILL_SESSION")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    told = json.dumps({"trial": asdict(trial), "run_id": folder.run_id, "overrides": overrides})
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "raymill.tune.trial"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        assert process.stdin is not None
        process.stdin.write(told)
        process.stdin.close()
        offset, evaluations = 0, Evaluations()
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            if folder.events.exists():
                events, offset = read_events(folder.events, offset)
                for event in events:
                    _hear(event, trial.metric, evaluations, folder, report)
        assert process.stdout is not None
        answer = json.loads(process.stdout.read() or "{}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if answer.get("interrupted"):
        raise Interrupted(folder.run_id, 0)
    if "summary" not in answer:
        raise RunError(answer.get("failed", f"the process of run {folder.run_id} ended with {process.returncode}"))
    found: dict[str, Any] = answer["summary"]
    return found


def main() -> None:
    """Train the run that stdin names; the answer goes to stdout."""
    told = json.loads(sys.stdin.read())
    trial = TrialSpec(**told["trial"])
    out = sys.stdout
    sys.stdout = sys.stderr
    answer: dict[str, Any]
    try:
        answer = {"summary": train(trial, run_folder(told["run_id"]), told["overrides"], lambda step, value: None)}
    except Interrupted:
        answer = {"interrupted": True}
    except Exception as error:
        problems = [str(problem) for problem in error.problems] if isinstance(error, InputError) else []
        answer = {"failed": "\n".join([tell(error), *problems])}
    print(json.dumps(answer), file=out)


if __name__ == "__main__":
    main()
