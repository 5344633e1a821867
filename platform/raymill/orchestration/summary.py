"""The end of a run's story: what it came to, in its folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from raymill import faults
from raymill.checkpoint.directory import read_pointer, read_state
from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.files import read_record, write_record
from raymill.record import kept_code
from raymill.record.bad_row_ledger import summarise_bad_rows
from raymill.record.catalog import evaluations
from raymill.record.events import (
    AttemptStarted,
    CheckpointSaved,
    EvaluationDone,
    Event,
    FirstStepDone,
    RunFinished,
    RunStopped,
    StepDone,
    StragglerFound,
    append_event,
    read_events,
)
from raymill.record.folder import RunFolder
from raymill.training.outcome import Outcome


def conclude(folder: RunFolder, planned: Plan, spec: JobSpec, outcome: Outcome) -> None:
    """Write the summary of an attempt that ended well, and the event that ends the run or says that it was stopped."""
    faults.point("before_summary")
    summary = summarise(folder, planned, spec, outcome)
    write_record(folder.summary, summary)
    faults.point("after_summary")
    if outcome.status == "interrupted":
        append_event(folder, RunStopped(reason="interrupted", message=""))
    else:
        append_event(folder, RunFinished(best_checkpoint=summary["best_checkpoint"], metrics=summary["metrics"]))


def summarise(folder: RunFolder, planned: Plan, spec: JobSpec, outcome: Outcome) -> dict[str, Any]:
    """The result of a run so far, as JSON-ready values."""
    total = outcome.position if outcome.ended else planned.total_rows
    pointer = read_pointer(folder.checkpoints)
    chosen = (pointer.best or pointer.latest) if pointer else None
    best = read_state(folder.checkpoints / chosen) if chosen else {}
    remaining = total - outcome.position
    events, _ = read_events(folder.events)
    starts = [event for event in events if isinstance(event, AttemptStarted)]
    bad = summarise_bad_rows(folder, spec.bad_rows.policy)
    first_steps_s = [event.time_s for event in events if isinstance(event, FirstStepDone)]
    recoveries = find_recoveries(events)
    commanded_s = read_record(folder.command)["started_s"]
    first_step_s = next((time_s - commanded_s for time_s in first_steps_s if time_s > commanded_s), None)
    return {
        "run_id": folder.run_id,
        "status": outcome.status,
        "attempts": len(starts),
        "recoveries": recoveries,
        "steps": outcome.step,
        "ended": outcome.ended,
        "metrics": best.get("metrics") or outcome.metrics,
        "last_metrics": outcome.metrics,
        "evaluations": evaluations(events),
        "best_checkpoint": f"checkpoints/{chosen}" if chosen else None,
        "best_step": best.get("step"),
        "weights_sha256": outcome.weights_sha256,
        "best_weights_sha256": best.get("weights_sha256"),
        "rows": {
            "used": outcome.rows_used,
            "skipped": outcome.rows_skipped,
            "remaining": remaining,
            "total": total,
        },
        "code_changed": kept_code.accepted_changes(folder.path),
        "degraded": bad["distinct"] > 0,
        "bad_rows": bad,
        "stragglers": [
            {"rank": event.rank, "factor": event.factor, "step": event.step}
            for event in events
            if isinstance(event, StragglerFound)
        ],
        "rows_per_s": round(outcome.rows_per_s, 1),
        "data_wait_share": round(outcome.data_wait_share, 4),
        "evaluation_wait_share": round(outcome.evaluation_wait_share, 4),
        "seconds_to_first_step": round(first_step_s, 2) if first_step_s is not None else None,
        "num_workers": starts[-1].num_workers,
        "ended_s": time.time(),
        "folder": str(folder.path),
        # In this process there is none.
        **({"ray_log": str(folder.ray_log)} if folder.ray_log.exists() else {}),
    }


def find_recoveries(events: Sequence[Event]) -> list[dict[str, Any]]:
    """How often a run went on by itself after a failure, and how long each took.

    Returns:
        per recovery: the step that it went on from, and the seconds from the last sign of work to the next step done.
    """
    found = []
    last_work_s: float | None = None
    step = 0
    for event in events:
        match event:
            case AttemptStarted():
                step = event.step
            case FirstStepDone():
                if last_work_s is not None:
                    found.append({"step": step, "seconds": round(event.time_s - last_work_s, 2)})
                last_work_s = event.time_s
            case StepDone() | EvaluationDone() | CheckpointSaved():
                last_work_s = event.time_s
            case RunStopped():
                # What comes next was asked for by a person.
                last_work_s = None
    return found
