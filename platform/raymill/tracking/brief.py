"""A trial of a search in MLflow, in as few calls as it takes: what was tried, what was measured, how it ended.

Whole runs are delivered event by event (`mlflow_sync`); a search may have a thousand short ones. One that turns out the best is
delivered whole afterwards, to the same MLflow run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from raymill.files import read_record, write_record
from raymill.record.events import EvaluationDone, RunFinished, RunStopped, read_events
from raymill.record.folder import RunFolder
from raymill.redaction import redact, redact_text
from raymill.tracking import description
from raymill.tracking.description import RUN_ID_TAG
from raymill.tracking.mlflow_client import plain_key, tracking_uri
from raymill.tracking.mlflow_sync import MAX_PARAM_LENGTH, MAX_TAG_LENGTH, METRICS_PER_CALL, Delivered

if TYPE_CHECKING:
    from mlflow import MlflowClient


def deliver_briefly(
    client: MlflowClient,
    folder: RunFolder,
    experiment: str,
    parent: str,
    name: str,
    values: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    may_be_there: bool,
) -> str:
    """Deliver a run that is over.

    Args:
        experiment: the id of MLflow's experiment.
        parent: the MLflow run that it is shown beneath.
        name: what it is called there.
        values: what was tried, as parameters.
        tags: beside those of every run.
        may_be_there: an earlier process may have made its MLflow run, and been killed.

    Returns:
        The MLflow run.
    """
    from mlflow.entities import Metric, Param

    if folder.delivery.exists():
        return str(read_record(folder.delivery)["mlflow_run_id"])
    events, _ = read_events(folder.events)
    job, machine = read_record(folder.spec)["name"], read_record(folder.environment)
    there = client.search_runs([experiment], f"tags.`{RUN_ID_TAG}` = '{folder.run_id}'", max_results=1) if may_be_there else []
    begun_ms, ended_ms = int(events[0].time_s * 1000), int(events[-1].time_s * 1000)
    if there:
        run_id = str(there[0].info.run_id)
    else:
        known = redact({**description.opening_tags(folder.run_id, job, machine, parent), **tags})
        cut = {key: value[:MAX_TAG_LENGTH] for key, value in known.items()}
        run_id = str(client.create_run(experiment, begun_ms, cut, run_name=name).info.run_id)
    measured = {
        (plain_key(metric), event.step): Metric(plain_key(metric), value, int(event.time_s * 1000), event.step)
        for event in events
        if isinstance(event, EvaluationDone)
        for metric, value in event.metrics.items()
    }
    metrics = list(measured.values())
    params = [Param(plain_key(field), str(value)[:MAX_PARAM_LENGTH]) for field, value in redact(dict(values)).items()]
    # What is sent twice, behind a kill in between, has the same effect.
    for first in range(0, max(1, len(metrics)), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_CALL], params=params if first == 0 else [])
    end = next((event for event in reversed(events) if isinstance(event, RunFinished | RunStopped)), None)
    status = "KILLED" if end is None or (isinstance(end, RunStopped) and end.reason != "failed") else "FAILED"
    client.set_terminated(run_id, "FINISHED" if isinstance(end, RunFinished) else status, ended_ms)
    write_record(folder.delivery, asdict(Delivered(mlflow_run_id=run_id, started_s=events[0].time_s)))
    place = {"store": redact_text(tracking_uri()), "experiment_id": experiment, "experiment": job}
    write_record(folder.mlflow_run, place)
    return run_id


def log_history(client: MlflowClient, run_id: str, name: str, points: Sequence[tuple[int, float, float]]) -> None:
    """Log points of one metric, each as (step, value, time in seconds). The same twice is once."""
    from mlflow.entities import Metric

    metrics = [Metric(name, value, int(time_s * 1000), step) for step, value, time_s in points]
    for first in range(0, len(metrics), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_CALL])
