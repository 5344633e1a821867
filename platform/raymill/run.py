"""The story of one job: check, plan, start Ray, train, track, register, sum up."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from raymill import load, manifest, plan
from raymill.checkpoint import read_pointer, write_file
from raymill.cluster import embedded_ray, local_facts
from raymill.errors import InputError, Interrupted, Problem, RaymillError, did_you_mean
from raymill.home import RunFolder, run_folder, runs_folder
from raymill.manifest import Manifest
from raymill.plan import Plan
from raymill.spec import JobSpec
from raymill.task import Pipeline
from raymill.tracking import append_event, environment, read_events

Event = dict[str, Any]
Show = Callable[[Event], None]
Watch = Callable[[RunFolder], Show]

STOP_FILE = "stop"


@dataclass(frozen=True)
class Prepared:
    """A job that was found right, with everything that is derived from it.

    Attributes:
        spec: the resolved job.
        pipeline: its data.
        manifest: what the data hold now.
        plan: every derived number.
    """

    spec: JobSpec
    pipeline: Pipeline
    manifest: Manifest
    plan: Plan


def prepare(job: load.LoadedJob) -> Prepared:
    """Check a job against its data and this machine. Starts nothing.

    Args:
        job: from `load.examine_job`: what is right of it is checked further, also when some of it is wrong.

    Raises:
        InputError: with everything that is wrong, the job's own problems included.
    """
    problems, facts = list(job.problems), local_facts()
    pipeline = taken = None
    if job.is_sound("pipeline", "data"):
        try:
            pipeline = load.import_pipeline(job.spec)
            taken = manifest.take_manifest(pipeline)
        except InputError as error:
            problems += error.problems
    if job.is_sound("loop.global_batch_rows", "loop.accumulate", "scale", "checkpoint.metric"):
        problems += plan.find_problems(job.spec, taken, facts, job.where)
    if problems or pipeline is None or taken is None:
        raise InputError(problems)
    return Prepared(job.spec, pipeline, taken, plan.make_plan(job.spec, taken, facts, job.where))


# ---------------------------------------------------------------- train


def train(prepared: Prepared, watch: Watch) -> dict[str, Any]:
    """Start a new run and train it to the end.

    Args:
        prepared: what to do.
        watch: is given the run's folder before anything starts; what it returns is given every event as it happens.

    Returns:
        The summary, which is also written to the run's folder.

    Raises:
        Interrupted: stopped on request, to be resumed.
        RunError: the run could not go on.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder = run_folder(f"{prepared.spec.name}-{stamp}-{secrets.token_hex(3)}")
    folder.path.mkdir(parents=True, mode=0o700)
    _write(folder.spec, load.resolved(prepared.spec))
    _write(folder.manifest, manifest.as_record(prepared.manifest))
    _write(folder.environment, environment())
    return _attempt(folder, prepared, watch)


def resume(run_id: str, num_workers: int | None, watch: Watch) -> dict[str, Any]:
    """Go on with an interrupted or failed run from its last checkpoint.

    Args:
        run_id: which run.
        num_workers: another number of workers, or None for the same.
        watch: see `train`.

    Raises:
        InputError: when there is no such run, it is finished, or its data changed.
    """
    folder = find_run(run_id)
    recorded = json.loads(folder.spec.read_text())
    if num_workers is not None:
        recorded["scale"]["workers"] = num_workers
    spec = JobSpec.model_validate(recorded)
    if folder.summary.exists() and json.loads(folder.summary.read_text()).get("status") == "finished":
        raise InputError([Problem(f"--resume {run_id}", "a run that is finished", "an interrupted or failed run", "Start a new run.")])
    pipeline = load.import_pipeline(spec)
    taken = manifest.take_manifest(pipeline)
    changed = manifest.differences(manifest.from_record(json.loads(folder.manifest.read_text())), taken)
    if changed:
        raise InputError(changed)
    planned = plan.make_plan(spec, taken, local_facts(), lambda field: f"run {run_id} {field}")
    _write(folder.spec, load.resolved(spec))
    return _attempt(folder, Prepared(spec, pipeline, taken, planned), watch)


def find_run(run_id: str) -> RunFolder:
    """The folder of a run that exists.

    Raises:
        InputError: with the nearest run's id.
    """
    folder = run_folder(run_id)
    known = [path.name for path in runs_folder().iterdir()] if runs_folder().is_dir() else []
    if run_id not in known or not folder.spec.exists():
        raise InputError([Problem("RUN", repr(run_id), "the id of a run of this project", did_you_mean(run_id, known))])
    return folder


def _attempt(folder: RunFolder, prepared: Prepared, watch: Watch) -> dict[str, Any]:
    _write(folder.plan, prepared.plan.as_record())
    (folder.path / STOP_FILE).unlink(missing_ok=True)
    started_s = psutil.Process().create_time()
    offset = folder.events.stat().st_size if folder.events.exists() else 0
    show = watch(folder)
    tracker = _Tracker(folder)
    try:
        with _stop_on_signal(folder):
            with embedded_ray(prepared.plan, local_facts()):
                outcome, first_step_s = _fit_and_watch(folder, prepared, offset, show, tracker.start)
            summary = _summary(folder, prepared, outcome, first_step_s and first_step_s - started_s)
            _write(folder.summary, summary)
            if outcome["status"] == "interrupted":
                append_event(folder, {"kind": "stop", "reason": "interrupted", "message": "", "time_s": time.time()})
                raise Interrupted(folder.run_id, outcome["step"])
            append_event(
                folder,
                {
                    "kind": "end",
                    "time_s": time.time(),
                    "best_checkpoint": summary["best_checkpoint"],
                    "metrics": summary["metrics"],
                },
            )
            summary |= tracker.finish(show)
            _write(folder.summary, summary)
            return summary
    except RaymillError as error:
        if not isinstance(error, Interrupted):
            append_event(folder, {"kind": "stop", "reason": "failed", "message": str(error), "time_s": time.time()})
        tracker.finish(show)
        raise


def _fit_and_watch(
    folder: RunFolder, prepared: Prepared, offset: int, show: Show, track: Callable[[], None]
) -> tuple[dict[str, Any], float | None]:
    """Run the trainer in a thread, and pass on events until it is done; returns its outcome and when step one was done."""
    from raymill import trainer

    result: dict[str, Any] = {}

    def fit() -> None:
        try:
            result["outcome"] = trainer.fit(folder, prepared.plan, prepared.spec)
        except Exception as error:  # handed to the main thread, which raises it
            result["error"] = error

    # Not in the main thread: Ray would take over SIGINT there.
    thread = threading.Thread(target=fit, name="fit")
    thread.start()
    first_step_s: float | None = None
    running = True
    while running:
        thread.join(timeout=0.1)
        running = thread.is_alive()
        events, offset = read_events(folder.events, offset)
        for event in events:
            if event["kind"] == "first_step" and first_step_s is None:
                first_step_s = event["time_s"]
                track()
            show(event)
    if "error" in result:
        raise result["error"]
    return result["outcome"], first_step_s


@contextmanager
def _stop_on_signal(folder: RunFolder) -> Iterator[None]:
    """Within this, SIGINT and SIGTERM ask the workers to save and stop; a second SIGINT stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if (folder.path / STOP_FILE).exists() and number == signal.SIGINT:
            raise KeyboardInterrupt
        (folder.path / STOP_FILE).touch()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Tracker:
    """The process that delivers the run's events to MLflow. Started once training goes, so that it delays nothing."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, at low priority and apart from this terminal's Ctrl-C."""
        if self._process is None:
            with open(self._folder.tracking_log, "ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "raymill.tracking", str(self._folder.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_be_nice,
                )

    def finish(self, show: Show) -> dict[str, Any]:
        """Wait until everything is delivered; returns what the summary says about it."""
        self.start()
        show({"kind": "delivering"})
        assert self._process is not None
        code = self._process.wait()
        found: dict[str, Any] = {"delivered_to_mlflow": code == 0}
        if self._folder.version.exists():
            found["model"] = json.loads(self._folder.version.read_text())
        if code:
            found["note"] = f"MLflow did not take everything (see {self._folder.tracking_log}); the queue is kept"
        return found


def _be_nice() -> None:
    os.nice(5)


def _summary(
    folder: RunFolder, prepared: Prepared, outcome: Mapping[str, Any], first_step_s: float | None
) -> dict[str, Any]:
    total = prepared.plan.train_rows * prepared.spec.loop.epochs
    pointer = read_pointer(folder.checkpoints)
    chosen = (pointer.best or pointer.latest) if pointer else None
    best = json.loads((folder.checkpoints / chosen / "state.json").read_text()) if chosen else {}
    remaining = 0 if outcome["status"] == "finished" else total - outcome["position"]
    return {
        "run_id": folder.run_id,
        "status": outcome["status"],
        "steps": outcome["step"],
        "metrics": best.get("metrics") or outcome["metrics"],
        "last_metrics": outcome["metrics"],
        "best_checkpoint": f"checkpoints/{chosen}" if chosen else None,
        "best_step": best.get("step"),
        "weights_sha256": outcome["weights_sha256"],
        "best_weights_sha256": best.get("weights_sha256"),
        "rows": {"used": outcome["rows_used"], "skipped": total - outcome["rows_used"] - remaining, "total": total - remaining},
        "rows_per_s": round(outcome["rows_per_s"], 1),
        "data_wait_share": round(outcome["data_wait_share"], 4),
        "seconds_to_first_step": round(first_step_s, 2) if first_step_s is not None else None,
        "num_workers": prepared.plan.num_workers,
        "folder": str(folder.path),
        "ray_log": str(folder.ray_log),
    }


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(values, indent=1))
