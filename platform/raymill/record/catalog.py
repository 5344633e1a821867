"""The runs of a project: which there are, and what their files say of each. Asks no process and no server."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raymill.errors import CheckpointError, InputError, Problem, did_you_mean
from raymill.files import read_record
from raymill.record import inputs, kept_code
from raymill.record.events import (
    AttemptStarted,
    CheckpointSaved,
    EvaluationDone,
    Event,
    RunFinished,
    RunStopped,
    read_events,
    scan_events,
)
from raymill.record.folder import RunFolder, is_run_id, run_folder, runs_folder
from raymill.record.processes import ProcessId

MAX_SHOWN_LETTERS = 200


def find_run(run_id: str) -> RunFolder:
    """The folder of a run that exists.

    Raises:
        InputError: when there is none; names the nearest.
    """
    known = [folder.run_id for folder in _all_folders()]
    if run_id not in known:
        found = repr(run_id[:MAX_SHOWN_LETTERS])
        raise InputError([Problem("run", found, "the id of a run of this project", did_you_mean(run_id, known))])
    return run_folder(run_id)


def list_runs() -> list[dict[str, Any]]:
    """All runs of this project, newest first; see `show_run` for the keys, of which `evaluations` is left out."""
    runs = [_facts(folder) for folder in _all_folders()]
    for facts in runs:
        del facts["evaluations"]
    return sorted(runs, key=lambda facts: (facts["started_s"] or 0.0, facts["run_id"]), reverse=True)


def show_run(run_id: str) -> dict[str, Any]:
    """What is known of one run.

    Returns:
        run_id, name (of the job), status ("starting", "running", "finished", "interrupted", "failed", "unreadable" for one of
        another version of raymill, or "damaged" where a file of it is torn or gone), message (why it stopped, or None), started_s
        (Unix seconds, or None), duration_s (of all attempts together), attempts, num_workers (of the last one, or None), step,
        num_total_steps, metrics (name -> latest value), checkpoint_metric (the one that decides which checkpoint is best, or
        None), evaluations (see `evaluations`), last and best (the ones of them that are, or None), mlflow_run_id and version
        ("name/1"), both None until they exist; code (the folder with the code it was trained with, or None); given (what other
        runs have made for it: field of the job -> which model); damaged_lines, where lines of its events had to be passed over.

    Raises:
        InputError: when there is no such run.
    """
    return _facts(find_run(run_id))


def history(run_id: str) -> list[dict[str, Any]]:
    """The metrics of a run by step, in order: step, epoch, time_s, and each metric that was measured there.

    A step that was trained again after a failure is there once. Training and evaluation at one step share an entry.

    Raises:
        InputError: when there is no such run.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for event in read_events(find_run(run_id).events)[0]:
        metrics = getattr(event, "metrics", None)
        step, epoch = getattr(event, "step", None), getattr(event, "epoch", None)
        if metrics is not None and step is not None:
            by_step.setdefault(step, {"step": step, "epoch": epoch, "time_s": event.time_s}).update(metrics)
    return [by_step[step] for step in sorted(by_step)]


def evaluations(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The evaluations of a run in order: epoch, step, metrics, and best, which is whether the best checkpoint is of that step.

    Of steps that are trained again after a failure, the later evaluation counts.
    """
    by_step: dict[int, dict[str, Any]] = {}
    best_step = None
    for event in events:
        if isinstance(event, AttemptStarted):
            by_step = {step: entry for step, entry in by_step.items() if step <= event.step}
        elif isinstance(event, EvaluationDone):
            entry = by_step.setdefault(event.step, {"epoch": event.epoch, "step": event.step, "metrics": {}})
            entry["metrics"] = entry["metrics"] | event.metrics
        elif isinstance(event, CheckpointSaved) and event.best:
            best_step = event.step
    return [{**entry, "best": step == best_step} for step, entry in sorted(by_step.items())]


def data_digest(folder: RunFolder) -> str:
    """What the run's input was: the digest in its data manifest, SHA-256 in hex."""
    return str(read_record(folder.data_manifest)["digest"])


def _all_folders() -> list[RunFolder]:
    """The runs that have begun, and what is left of them where files are gone; not what lies beside them."""
    try:
        folders = [RunFolder(path) for path in runs_folder().glob("*/") if is_run_id(path.name)]
        return [folder for folder in folders if any(path.exists() for path in (folder.spec, folder.events, folder.checkpoints))]
    except OSError as error:
        fix = "Name another folder with RAYMILL_HOME, or correct what is there."
        raise InputError([Problem("runs", f"{error}"[:MAX_SHOWN_LETTERS], "a folder that can be read", fix)]) from error


def _facts(folder: RunFolder) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "run_id": folder.run_id,
        "name": None,
        "status": "starting",
        "message": None,
        "started_s": None,
        "duration_s": 0.0,
        "attempts": 0,
        "num_workers": None,
        "step": 0,
        "num_total_steps": None,
        "metrics": {},
        "checkpoint_metric": None,
        "evaluations": [],
        "last": None,
        "best": None,
        "mlflow_run_id": None,
        "version": None,
        "code": None,
        "given": {},
    }
    try:
        spec = _record(folder.spec)
        facts["name"], facts["checkpoint_metric"] = spec["name"], spec.get("checkpoint", {}).get("metric")
        facts["mlflow_run_id"] = _record_if_there(folder.delivery).get("mlflow_run_id")
        if made := _record_if_there(folder.model_version):
            facts["version"] = f"{made['name']}/{made['version']}"
        if (code := kept_code.read(folder.path)) and code.kept:
            facts["code"] = str(folder.path / code.kept)
        facts["given"] = inputs.described(folder.path)
        read = scan_events(folder.events)
    except InputError as error:
        return facts | {"status": "unreadable", "message": str(error.problems[0])}
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return facts | {"status": "damaged", "message": f"a file of the run cannot be read: {type(error).__name__}: {error}"}
    events = read.events
    if read.num_damaged_lines:
        facts["damaged_lines"] = read.num_damaged_lines
    facts["started_s"] = events[0].time_s if events else None
    facts["duration_s"] = _duration_s(events)
    facts["evaluations"] = evaluations(events)
    facts["last"] = next(reversed(facts["evaluations"]), None)
    facts["best"] = next((entry for entry in facts["evaluations"] if entry["best"]), None)
    for event in events:
        _take_in(facts, event)
    return facts


def _take_in(facts: dict[str, Any], event: Event) -> None:
    facts["step"] = getattr(event, "step", facts["step"])
    facts["metrics"] |= getattr(event, "metrics", {})
    if isinstance(event, AttemptStarted):
        alive = event.pid is None or ProcessId(event.pid, event.process_started_s).lives()
        facts |= {"status": "running" if alive else "interrupted", "message": None}
        facts |= {"attempts": event.attempt, "num_workers": event.num_workers, "num_total_steps": event.num_total_steps}
    elif isinstance(event, RunStopped):
        facts |= {"status": event.reason, "message": event.message}
    elif isinstance(event, RunFinished):
        facts["status"] = "finished"


def finished(folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a run that has reached its end; None: it has not, or was killed before it said so."""
    summary = read_record(folder.summary) if folder.summary.exists() else {}
    if summary.get("status") != "finished":
        return None
    events, _ = read_events(folder.events)
    borders = [event for event in events if isinstance(event, AttemptStarted | RunStopped | RunFinished)]
    return summary if borders and isinstance(borders[-1], RunFinished) else None


def _duration_s(events: Iterable[Event]) -> float:
    """Seconds in which there was an attempt, from its start to its last event."""
    total_s, start_s, last_s = 0.0, None, 0.0
    for event in events:
        if isinstance(event, AttemptStarted):
            total_s += max(0.0, last_s - start_s) if start_s is not None else 0.0
            start_s = event.time_s
        last_s = event.time_s
    return total_s + max(0.0, last_s - start_s) if start_s is not None else 0.0


def _record_if_there(path: Path) -> dict[str, Any]:
    return _record(path) if path.exists() else {}


def _record(path: Path) -> dict[str, Any]:
    # Of another version is only what could be a record at all.
    if not path.read_text().lstrip().startswith("{"):
        raise ValueError(f"{path} holds no JSON object")
    return read_record(path)
