"""From a run's events to MLflow: what the process of `raymill.tracking` does.

One MLflow run per raymill run, however often either is restarted. The server may be slow, locked or gone for hours:
nothing is lost, doubled or reordered.

How nothing is doubled: a point of a curve is known by (metric, step), and the points of a metric come in the order of
their steps. `delivered.json` holds the offset in the events and the highest step of each metric. Whenever the fate of a
batch is unknown (after a failed call, and in a new process), MLflow itself is asked for the highest step it has of each
metric, and only later ones are sent. Steps that a resumed run repeats are dropped likewise: they are bit-identical.
Everything else that is sent (tags, missing parameters, files, status) has the same effect when it is sent twice.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill import faults, pictures
from raymill.errors import RaymillError
from raymill.home import RunFolder
from raymill.redaction import redact
from raymill.tracking import (
    Event,
    connect,
    data_digest,
    experiment_id,
    process_lives,
    read_events,
    store_failures,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("raymill.tracking")

RUN_ID_TAG = "raymill.run_id"
POLL_S = 0.5
SAMPLE_S = 10.0
LONGEST_PAUSE_S = 30.0
EVENTS_PER_TURN = 500
METRICS_PER_CALL = 1000
ENTRIES_PER_CALL = 100
LONGEST_KEY = 250
LONGEST_PARAM = 500
LONGEST_TAG = 5000

REFUSALS = {"INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED"}
"""Error codes of MLflow that trying again does not change."""


@dataclass(frozen=True)
class Point:
    """One value of a curve."""

    key: str
    value: float
    step: int
    time_s: float


@dataclass
class Delivered:
    """How far the delivery is: the content of `delivered.json`.

    Attributes:
        mlflow_run_id: the MLflow run, "" until it is there.
        status: the MLflow run's status as last set.
        offset: bytes of the events that are delivered.
        started_s: Unix time of the first event.
        driver_pid: the process that drives the run, where it said so.
        steps: metric -> highest step delivered.
    """

    mlflow_run_id: str = ""
    status: str = ""
    offset: int = 0
    started_s: float = 0.0
    driver_pid: int | None = None
    steps: dict[str, int] = field(default_factory=dict)


class Delivery:
    """Delivers one run. A call that raises can be repeated.

    Args:
        folder: the run.
        connect: opens the store; called once, when the first event is there.
    """

    def __init__(self, folder: RunFolder, connect: Callable[[], MlflowClient] = connect) -> None:
        self.folder = folder
        self.done = _load(folder.delivered)
        self._connect = connect
        self._client: MlflowClient | None = None
        self._asked: set[str] = set()  # metrics whose highest step is as MLflow has it
        self._unsure = False

    @property
    def client(self) -> MlflowClient:
        """The store, opened at first use."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    def deliver(self, samples: list[Point] | None = None) -> int:
        """Deliver what is new. Returns the number of events read; 0: all are delivered."""
        events, offset = read_events(self.folder.events, self.done.offset, EVENTS_PER_TURN)
        if self._unsure:
            self._asked.clear()
        self._unsure = True
        for event in events:
            if event["kind"] == "start":
                self.done.driver_pid = event.get("pid")
        points = list(samples or [])
        for event in events:
            if not self.done.mlflow_run_id:
                self._open(event)
            if event["kind"] in ("step", "evaluation"):
                points += _points(event)
            else:
                self._send(points)
                points = []
                self._handle(event)
        self._send(points)
        if offset > self.done.offset:
            self.done.offset = offset
            self._save()
        self._unsure = False
        return len(events)

    def abandon(self) -> None:
        """Mark a run as interrupted whose driver died without a word."""
        if self.done.status == "RUNNING":
            self._set_status("KILLED", time.time())

    def ends(self) -> bool:
        """Whether the end of the run is among the events that are still to deliver."""
        events, _ = read_events(self.folder.events, self.done.offset)
        ends = [event["kind"] != "start" for event in events if event["kind"] in ("start", "stop", "end")]
        return bool(ends) and ends[-1]

    def _open(self, event: Event) -> None:
        spec = json.loads(self.folder.spec.read_text())
        experiment = experiment_id(self.client, spec["name"])
        # A process killed right after creating the run left no other trace of it than its tag.
        runs: Sequence[Run] = self.client.search_runs(
            [experiment], f"tags.`{RUN_ID_TAG}` = '{self.folder.run_id}'", max_results=1
        )
        if not runs:
            tags, started_ms = {RUN_ID_TAG: self.folder.run_id}, int(event["time_s"] * 1000)
            runs = [self.client.create_run(experiment, started_ms, tags, run_name=self.folder.run_id)]
        faults.point("mlflow_run_made")
        self.done.mlflow_run_id, self.done.started_s = runs[0].info.run_id, event["time_s"]
        self._save()

    def _handle(self, event: Event) -> None:
        tags: dict[str, str] = {}
        if event["kind"] == "start":
            self._describe()
            tags[f"raymill.attempt.{event['attempt']}"] = _compact(event)
            self._set_status("RUNNING", None)
        elif event["kind"] == "checkpoint":
            tags["raymill.checkpoint.last"] = event["path"]
            if event.get("best"):
                tags["raymill.checkpoint.best"] = event["path"]
        elif event["kind"] == "stop":
            tags["raymill.stop"] = _compact(event)
            self._set_status("KILLED" if event["reason"] == "interrupted" else "FAILED", event["time_s"])
        elif event["kind"] == "end":
            self._finish(event)
        for key, value in redact(tags).items():
            self.client.set_tag(self.done.mlflow_run_id, key, value[:LONGEST_TAG])

    def _send(self, points: list[Point]) -> None:
        """Log the points that MLflow does not have yet, in order."""
        from mlflow.entities import Metric

        for key in {point.key for point in points} - self._asked:
            history = self.client.get_metric_history(self.done.mlflow_run_id, key)
            self.done.steps[key] = max([self.done.steps.get(key, -1), *(metric.step for metric in history)])
            self._asked.add(key)
        highest = dict(self.done.steps)
        new = []
        for point in points:
            if point.step > highest[point.key]:
                highest[point.key] = point.step
                new.append(point)
        for first in range(0, len(new), METRICS_PER_CALL):
            call = new[first : first + METRICS_PER_CALL]
            metrics = [Metric(point.key, point.value, int(point.time_s * 1000), point.step) for point in call]
            faults.point("before_mlflow_call")
            self.client.log_batch(self.done.mlflow_run_id, metrics=metrics)
            faults.point("after_mlflow_call")
            self.done.steps |= {point.key: point.step for point in call}

    def _describe(self) -> None:
        """Parameters, tags, data set and files that are known when a run starts."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        run_id, documents = self.done.mlflow_run_id, self._log_documents()
        spec, plan, machine = documents["spec"], documents.get("plan", {}), documents.get("environment", {})
        numbers = {key: value for key, value in plan.items() if key != "reasons"}
        params = {key[:LONGEST_KEY]: value for key, value in _flat({**spec, "plan": numbers})}
        there = self.client.get_run(run_id).data.params
        new = [Param(key, value[:LONGEST_PARAM]) for key, value in params.items() if key not in there]
        tags = {f"raymill.{key}": value for key, value in _flat(machine)}
        if machine.get("git_commit"):
            tags["mlflow.source.git.commit"] = machine["git_commit"]
        if self.folder.manifest.exists():
            digest = data_digest(self.folder)
            tags["raymill.data_digest"] = digest
            source = json.dumps({"pipeline": spec["pipeline"]})
            data = Dataset(name=spec["name"], digest=digest[:36], source_type="raymill", source=source)
            purpose = InputTag("mlflow.data.context", "training")
            self.client.log_inputs(run_id, [DatasetInput(data, [purpose])])
        for first in range(0, len(new), ENTRIES_PER_CALL):
            self.client.log_batch(run_id, params=new[first : first + ENTRIES_PER_CALL])
        self.client.log_batch(run_id, tags=[RunTag(key, value[:LONGEST_TAG]) for key, value in tags.items()])

    def _log_documents(self) -> dict[str, Any]:
        """Log the run's JSON files that are there, without secrets. Returns name -> content."""
        folder = self.folder
        files = (folder.spec, folder.plan, folder.manifest, folder.environment, folder.summary)
        documents = {path.stem: redact(json.loads(path.read_text())) for path in files if path.exists()}
        for name, document in documents.items():
            self.client.log_dict(self.done.mlflow_run_id, document, f"{name}.json")
        return documents

    def _finish(self, event: Event) -> None:
        steps = [step for key, step in self.done.steps.items() if not key.startswith(("system/", "final/"))]
        final = {f"final/{key}": value for key, value in event.get("metrics", {}).items()}
        self._send(_points({**event, "step": max(steps, default=0), "metrics": final}))
        spec = self._log_documents()["spec"]
        with tempfile.TemporaryDirectory() as drawn:
            pictures.draw(read_events(self.folder.events)[0], Path(drawn))
            self.client.log_artifacts(self.done.mlflow_run_id, drawn, "pictures")
        if self.folder.quarantine.exists():
            self.client.log_artifact(self.done.mlflow_run_id, str(self.folder.quarantine))
        # Before registering: a model that cannot be registered does not make its run unfinished.
        self._set_status("FINISHED", event["time_s"])
        if spec.get("register"):
            from raymill.registry import register

            made = register(self.folder)
            _write_whole(self.folder.version, {"name": made.name, "version": made.version, "alias": made.alias})

    def _set_status(self, status: str, ended_s: float | None) -> None:
        if ended_s is None:
            self.client.update_run(self.done.mlflow_run_id, status=status)
        else:
            self.client.set_terminated(self.done.mlflow_run_id, status, int(ended_s * 1000))
        self.done.status = status
        self._save()

    def _save(self) -> None:
        _write_whole(self.folder.delivered, asdict(self.done))


# ---------------------------------------------------------------- following a run


def follow(folder: RunFolder, give_up_s: float) -> int:
    """Deliver a run's events as they come, until it is over and all are delivered.

    Tries again for ever while the run goes on, and for `give_up_s` seconds once it is over.

    Returns:
        0: all is delivered. 1: it is not; the same command goes on where this one stopped.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parent = os.getppid()
    samples: list[Point] = []
    pause_s, sampled_s, over_s = POLL_S, 0.0, None
    with _only_one(folder):
        delivery = Delivery(folder)
        while True:
            # Looked at before the events are read, so that none is missed that a dying driver wrote.
            gone = _driver_is_gone(delivery.done.driver_pid, parent)
            try:
                num_events = delivery.deliver(samples)
                if gone and not num_events:
                    delivery.abandon()
            except RaymillError as error:
                log.error("%s", error)
                return 1
            except store_failures() as error:
                if over_s is None and (gone or delivery.ends()):
                    over_s = time.monotonic()
                refused = getattr(error, "error_code", None) in REFUSALS
                if over_s is not None and (refused or time.monotonic() - over_s > give_up_s):
                    log.error("gave up; run this command again to deliver the rest: %s", error)
                    return 1
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                log.warning("not delivered, next try in %g s: %s", pause_s, error)
            else:
                samples, pause_s, over_s = [], POLL_S, None
                if not num_events and (gone or delivery.done.status not in ("", "RUNNING")):
                    return 0
                if num_events:
                    continue
            if delivery.done.status == "RUNNING" and time.monotonic() - sampled_s > SAMPLE_S:
                sampled_s = time.monotonic()
                samples += sample_machine(folder, delivery.done.started_s)
            time.sleep(pause_s)


def _driver_is_gone(driver_pid: int | None, parent: int) -> bool:
    if driver_pid is None or driver_pid == parent:
        return os.getppid() != parent
    return not process_lives(driver_pid)


@contextmanager
def _only_one(folder: RunFolder) -> Iterator[None]:
    # A resumed run may start its process while the one before still delivers; it waits here.
    held = os.open(folder.path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def sample_machine(folder: RunFolder, started_s: float) -> list[Point]:
    """Load of this machine now. The step of these curves is the number of seconds since the run started."""
    import psutil

    now_s = time.time()
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder.path))
    values = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_used_bytes": memory.used,
        "system/memory_percent": memory.percent,
        "system/disk_free_bytes": disk.free,
    }
    step = max(0, int(now_s - started_s))
    return [Point(key, float(value), step, now_s) for key, value in values.items()]


# ---------------------------------------------------------------- pieces


def _points(event: Event) -> list[Point]:
    values = dict(event.get("metrics", {}))
    values |= {f"train/{key}": event[key] for key in ("rows_per_s", "data_wait_share") if key in event}
    return [
        Point(_plain(key)[:LONGEST_KEY], float(value), event["step"], event["time_s"])
        for key, value in values.items()
        if isinstance(value, int | float)
    ]


def _plain(key: str) -> str:
    """The key in the characters that MLflow accepts."""
    return re.sub(r"[^\w .:/-]", "_", key)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of every value in nested dicts."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _plain(f"{prefix}{key}"), value if isinstance(value, str) else json.dumps(value)


def _compact(event: Event) -> str:
    return json.dumps({key: value for key, value in event.items() if key not in ("kind", "pid")})


def _load(path: Path) -> Delivered:
    return Delivered(**json.loads(path.read_text())) if path.exists() else Delivered()


def _write_whole(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a file by this JSON so that a reader, also after a crash, sees the old or the new one whole."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
