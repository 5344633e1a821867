"""The process that drives one attempt at a run: Ray, Ray Train, and the end of the run's story in its folder.

    python -m raymill.driver RUN_FOLDER

It is a process of its own so that its death, whatever the cause, is only one more reason to start another; `supervisor`
does that. All that it has to say stands in the run's folder: events, summary, and `outcome.json` for why it ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raymill import bad_rows, cluster, errors, faults, quick
from raymill.checkpoint import read_pointer, read_record, write_file
from raymill.errors import RaymillError, RunError
from raymill.home import RunFolder
from raymill.plan import Plan
from raymill.spec import JobSpec
from raymill.tracking import append_event, read_events

FINISHED, FAILED, INTERRUPTED = 0, 1, 3


def main(arguments: list[str]) -> int:
    """Drive one attempt; returns 0 finished, 3 interrupted, 1 anything else, with the reason in `outcome.json`."""
    folder = RunFolder(Path(arguments[0]))
    _stop_on_sigterm(folder)
    try:
        with lease(folder.lease):
            faults.point("driver_start")
            return _drive(folder)
    except RaymillError as error:
        write_file(folder.outcome, json.dumps(errors.as_record(error)))
        return FAILED
    except Exception as error:
        # A fault of our own: its traceback goes to the log, its text to the user.
        write_file(folder.outcome, json.dumps(errors.as_record(RunError(f"{type(error).__name__}: {error}"))))
        raise


def _stop_on_sigterm(folder: RunFolder) -> None:
    """Answer SIGTERM by asking the workers to save and stop."""
    signal.signal(signal.SIGTERM, lambda number, frame: folder.stop.touch())


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold a lock file of a run's folder, so that no two processes ever do at once what it stands for.

    Raises:
        RunError: when another process holds it.
    """
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(held, 32, 0).decode()
        os.close(held)
        raise RunError(
            f"run {path.parent.name} is being trained by process {owner}; wait for it, or stop it with SIGTERM"
        ) from error
    try:
        os.ftruncate(held, 0)
        os.pwrite(held, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(held)


def _drive(folder: RunFolder) -> int:
    spec = JobSpec.model_validate(json.loads(folder.spec.read_text()))
    planned = Plan(**json.loads(folder.plan.read_text()))
    with cluster.ray_for(planned):
        # Imported here: `ray_for` sets what Ray reads when it is imported.
        from raymill import trainer

        quick.settle()
        # Ray has put its own handler there, which ends the process at once.
        _stop_on_sigterm(folder)
        faults.point("ray_started")
        outcome = trainer.fit(folder, planned, spec)
    faults.point("before_summary")
    summary = summarise(folder, planned, spec, outcome)
    write_file(folder.summary, json.dumps(summary, indent=1))
    faults.point("after_summary")
    if outcome["status"] == "interrupted":
        append_event(folder, {"kind": "stop", "reason": "interrupted", "message": ""})
        return INTERRUPTED
    append_event(folder, {"kind": "end", "best_checkpoint": summary["best_checkpoint"], "metrics": summary["metrics"]})
    return FINISHED


def summarise(folder: RunFolder, planned: Plan, spec: JobSpec, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a run so far, as JSON-ready values."""
    total = planned.train_rows * spec.loop.epochs
    pointer = read_pointer(folder.checkpoints)
    chosen = (pointer.best or pointer.latest) if pointer else None
    best = read_record(folder.checkpoints / chosen) if chosen else {}
    remaining = total - outcome["position"]
    events, _ = read_events(folder.events)
    starts = [event for event in events if event["kind"] == "start"]
    bad = bad_rows.as_summary(folder, spec.bad_rows.policy)
    first_steps_s = [event["time_s"] for event in events if event["kind"] == "first_step"]
    commanded_s = json.loads(folder.command.read_text())["started_s"]
    first_step_s = next((time_s - commanded_s for time_s in first_steps_s if time_s > commanded_s), None)
    return {
        "run_id": folder.run_id,
        "status": outcome["status"],
        "attempts": len(starts),
        "steps": outcome["step"],
        "metrics": best.get("metrics") or outcome["metrics"],
        "last_metrics": outcome["metrics"],
        "best_checkpoint": f"checkpoints/{chosen}" if chosen else None,
        "best_step": best.get("step"),
        "weights_sha256": outcome["weights_sha256"],
        "best_weights_sha256": best.get("weights_sha256"),
        "rows": {
            "used": outcome["rows_used"],
            "skipped": outcome["rows_skipped"],
            "remaining": remaining,
            "total": total,
        },
        "degraded": bad["distinct"] > 0,
        "bad_rows": bad,
        "slow_ranks": [
            {name: event[name] for name in ("rank", "factor", "step")} for event in events if event["kind"] == "slow_rank"
        ],
        "rows_per_s": round(outcome["rows_per_s"], 1),
        "data_wait_share": round(outcome["data_wait_share"], 4),
        "seconds_to_first_step": round(first_step_s, 2) if first_step_s is not None else None,
        "num_workers": starts[-1]["num_workers"],
        "ended_s": time.time(),
        "folder": str(folder.path),
        "ray_log": str(folder.ray_log),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
