"""From a run's events to MLflow, as they come (a process of its own, see `orchestration.tracker`) or all at the end.

One MLflow run per raymill run, however often either is restarted. The server may be slow, locked or gone for hours:
nothing is lost, doubled or reordered.

How nothing is doubled: a point of a curve is known by (metric, step), and the points of a metric come in the order of
their steps. `delivery.json` holds the offset in the events and the highest step of each metric. Whenever the fate of a
batch is unknown (after a failed call, and in a new process), MLflow itself is asked for the highest step it has of each
metric, and only later ones are sent. Steps that a resumed run repeats are dropped likewise: they are bit-identical.
Everything else that is sent (tags, missing parameters, files, status) has the same effect when it is sent twice.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill import faults
from raymill.errors import RaymillError
from raymill.files import read_record, waiting_lock, write_record
from raymill.record import inputs
from raymill.record.catalog import data_digest, show_run
from raymill.record.events import (
    AttemptStarted,
    CheckpointSaved,
    EvaluationDone,
    Event,
    RunFinished,
    RunStopped,
    StepDone,
    read_events,
)
from raymill.record.folder import RunFolder
from raymill.record.processes import ProcessId
from raymill.redaction import redact, redact_text
from raymill.tracking import description, plots
from raymill.tracking.description import DESCRIPTION_TAG, RUN_ID_TAG, RunFacts
from raymill.tracking.mlflow_client import (
    connect,
    experiment_id,
    mlflow_settings,
    plain_key,
    store_failures,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger("raymill.tracking")

Register = Callable[[RunFolder], dict[str, Any]]
"""Registers the model of a finished run; returns its name, version and alias. `tracking` does not know how."""

BORDERS = (AttemptStarted, RunStopped, RunFinished)

SHOWN_PICTURES = ("curves.png",)
"""The pictures that the run's description shows; the others are among its artifacts."""

POLL_S = 0.5
SAMPLE_S = 10.0
MAX_PAUSE_S = 30.0
EVENTS_PER_TURN = 500
METRICS_PER_CALL = 1000
ENTRIES_PER_CALL = 100
MAX_PARAM_LENGTH = 500
MAX_TAG_LENGTH = 5000
MAX_DIGEST_LENGTH = 36

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
    """How far the delivery is: the content of `delivery.json`.

    Attributes:
        mlflow_run_id: the MLflow run, "" until it is there.
        status: the MLflow run's status as last set.
        offset: bytes of the events that are delivered.
        started_s: Unix time of the first event.
        driver_pid: the process that drives the run, where it said so.
        driver_started_s: when that process was started, Unix seconds.
        steps: metric -> highest step delivered.
    """

    mlflow_run_id: str = ""
    status: str = ""
    offset: int = 0
    started_s: float = 0.0
    driver_pid: int | None = None
    driver_started_s: float | None = None
    steps: dict[str, int] = field(default_factory=dict)


class Delivery:
    """Delivers one run. A call that raises can be repeated.

    Args:
        folder: the run.
        register: registers the model of a finished run; returns what is recorded of it.
        connect: opens the store; called once, when the first event is there.
    """

    def __init__(self, folder: RunFolder, register: Register, connect: Callable[[], MlflowClient] = connect) -> None:
        self.folder = folder
        self._register = register
        self.done = _load(folder.delivery)
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
            if isinstance(event, AttemptStarted):
                self.done.driver_pid, self.done.driver_started_s = event.pid, event.process_started_s
        points = list(samples or [])
        for event in events:
            if not self.done.mlflow_run_id:
                self._open(event)
            if isinstance(event, StepDone | EvaluationDone):
                points += _points(event.metrics, event.step, event.time_s)
                if isinstance(event, StepDone):
                    points += _points(_speeds(event), event.step, event.time_s)
                else:
                    self._log_pictures_of(event)
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
            self._describe(self._log_pictures())

    def ends(self) -> bool:
        """Whether the end of the run is among the events that are still to deliver."""
        events, _ = read_events(self.folder.events, self.done.offset)
        ends = [isinstance(event, RunStopped | RunFinished) for event in events if isinstance(event, BORDERS)]
        return bool(ends) and ends[-1]

    def _open(self, event: Event) -> None:
        job, machine = read_record(self.folder.spec)["name"], _record(self.folder.environment)
        experiment = experiment_id(self.client, job)
        run_id, parent = self.folder.run_id, machine.get("parent_run_id")
        # A process killed right after creating the run left no other trace of it than its tag.
        made = self._find(experiment, run_id)
        if made is None:
            beneath = self._find(experiment, parent) if parent else None
            tags = redact(description.opening_tags(run_id, job, machine, beneath, inputs.described(self.folder.path)))
            name = description.run_name(run_id, job)
            made = self.client.create_run(experiment, int(event.time_s * 1000), tags, run_name=name).info.run_id
        faults.point("mlflow_run_made")
        self.done.mlflow_run_id, self.done.started_s = made, event.time_s
        place = {"store": redact_text(tracking_uri()), "experiment_id": experiment, "experiment": job}
        write_record(self.folder.mlflow_run, place)
        self._save()

    def _find(self, experiment: str, run_id: str) -> str | None:
        """The MLflow run of a raymill run, where it is there."""
        runs: Sequence[Run] = self.client.search_runs([experiment], f"tags.`{RUN_ID_TAG}` = '{run_id}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _handle(self, event: Event) -> None:
        tags: dict[str, str] = {}
        match event:
            case AttemptStarted():
                self._log_inputs()
                tags[f"raymill.attempt.{event.attempt}"] = description.attempt_fact(event.num_workers, event.step, event.time_s)
                self._set_status("RUNNING", None)
                self._describe()
            case CheckpointSaved():
                tags["raymill.checkpoint.last"] = event.path
                if event.best:
                    tags["raymill.checkpoint.best"] = event.path
            case RunStopped():
                self._set_status("KILLED" if event.reason == "interrupted" else "FAILED", event.time_s)
                self._describe(self._log_pictures())
            case RunFinished():
                self._finish(event)
        for key, value in redact(tags).items():
            self.client.set_tag(self.done.mlflow_run_id, key, value[:MAX_TAG_LENGTH])

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

    def _log_inputs(self) -> None:
        """Parameters, data set and files that are known when a run starts."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        run_id, documents = self.done.mlflow_run_id, self._log_documents()
        spec, plan = read_record(self.folder.spec), documents.get("plan", {})
        numbers = {key: value for key, value in plan.items() if key != "reasons"}
        self.client.log_text(run_id, description.plan_page(spec["name"], plan), "plan.html")
        params = {plain_key(key): value for key, value in _flat({**documents["spec"], "plan": numbers})}
        there = self.client.get_run(run_id).data.params
        new = [Param(key, value[:MAX_PARAM_LENGTH]) for key, value in params.items() if key not in there]
        if self.folder.data_manifest.exists():
            digest = data_digest(self.folder)
            self.client.set_tag(run_id, "raymill.data_digest", digest)
            source = json.dumps({"pipeline": spec["pipeline"]})
            data = Dataset(name=spec["name"], digest=digest[:MAX_DIGEST_LENGTH], source_type="raymill", source=source)
            purpose = InputTag("mlflow.data.context", "training")
            self.client.log_inputs(run_id, [DatasetInput(data, [purpose])])
        for first in range(0, len(new), ENTRIES_PER_CALL):
            self.client.log_batch(run_id, params=new[first : first + ENTRIES_PER_CALL])

    def _log_documents(self) -> dict[str, Any]:
        """Log the run's JSON files that are there, without secrets. Returns name -> what was logged."""
        folder = self.folder
        files = (folder.spec, folder.plan, folder.data_manifest, folder.environment, folder.summary)
        documents = {path.stem: redact(read_record(path)) for path in files if path.exists()}
        for name, document in documents.items():
            self.client.log_dict(self.done.mlflow_run_id, document, f"{name}.json")
        return documents

    def _finish(self, event: RunFinished) -> None:
        steps = [step for key, step in self.done.steps.items() if not key.startswith(("system/", "final/"))]
        final = {f"final/{key}": value for key, value in event.metrics.items()}
        self._send(_points(final, max(steps, default=0), event.time_s))
        self._log_documents()
        if self.folder.quarantine.exists():
            self.client.log_artifact(self.done.mlflow_run_id, str(self.folder.quarantine))
        # Before registering: a model that cannot be registered does not make its run unfinished.
        self._set_status("FINISHED", event.time_s)
        refused = None
        try:
            if read_record(self.folder.spec).get("register"):
                write_record(self.folder.model_version, self._register(self.folder))
        except RaymillError as error:
            refused = str(error)
            raise
        finally:
            # Last, since no picture is worth a model; and also where the model could not be registered.
            self._describe(self._log_pictures(), refused)

    def _log_pictures_of(self, event: EvaluationDone) -> None:
        for place in event.pictures.values():
            self.client.log_artifact(self.done.mlflow_run_id, str(self.folder.path / place), "pictures")

    def _log_pictures(self) -> list[str]:
        """Draw what there is to draw; returns the paths of the pictures among the run's artifacts."""
        with tempfile.TemporaryDirectory() as drawn:
            plots.draw(read_events(self.folder.events)[0], Path(drawn))
            names = sorted(path.name for path in Path(drawn).iterdir())
            self.client.log_artifacts(self.done.mlflow_run_id, drawn, "pictures")
        return [f"pictures/{name}" for name in names]

    def _describe(self, pictures: Sequence[str] = (), refused: str | None = None) -> None:
        """Write the run's description as the run is now, unless somebody has edited it."""
        folder, run_id = self.folder, self.done.mlflow_run_id
        if not description.is_ours(self.client.get_run(run_id).data.tags.get(DESCRIPTION_TAG)):
            return
        facts = RunFacts(
            known={**show_run(folder.run_id), "mlflow_run_id": run_id},
            folder=str(folder.path),
            machine=_record(folder.environment),
            summary=_record(folder.summary),
            model=_record(folder.model_version),
            not_registered=refused,
            pictures=[path for path in pictures if Path(path).name in SHOWN_PICTURES],
        )
        try:
            text = description.describe_run(facts)
        except (KeyError, TypeError, ValueError) as error:  # a record that is not as expected; no description is worth a run
            log.warning("the run's description was not written: %s: %s", type(error).__name__, error)
            return
        self.client.set_tag(run_id, DESCRIPTION_TAG, description.signed(redact_text(text)))

    def _set_status(self, status: str, ended_s: float | None) -> None:
        if ended_s is None:
            self.client.update_run(self.done.mlflow_run_id, status=status)
        else:
            self.client.set_terminated(self.done.mlflow_run_id, status, int(ended_s * 1000))
        self.done.status = status
        self._save()

    def _save(self) -> None:
        write_record(self.folder.delivery, asdict(self.done))


# ---------------------------------------------------------------- following a run


class RedactingFormatter(logging.Formatter):
    """Lines of a log, tracebacks included, without secrets: MLflow's errors name the address of its store, password and all."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return redact_text(super().format(record))


def follow(folder: RunFolder, register: Register, give_up_s: float) -> int:
    """Deliver a run's events as they come, until it is over and all are delivered.

    Tries again for ever while the run goes on, and for `give_up_s` seconds once it is over.

    Returns:
        0: all is delivered. 1: it is not, `tracking_failure.json` says why; the same command goes on where this one stopped.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # A resumed run may start its process while the one before still delivers; it waits here.
    with waiting_lock(folder.delivery_lock), mlflow_settings():
        failure = _follow(Delivery(folder, register), give_up_s)
    return 1 if _note_failure(folder, failure) else 0


def deliver_all(folder: RunFolder, register: Register) -> bool:
    """Deliver all events of a run that is over, with one try; returns whether all is delivered."""
    failure: Exception | None = None
    with waiting_lock(folder.delivery_lock), mlflow_settings():
        try:
            delivery = Delivery(folder, register)
            while delivery.deliver():
                pass
        except RaymillError as error:
            failure = error
        except store_failures() as error:
            failure = error
    return not _note_failure(folder, failure)


def _note_failure(folder: RunFolder, failure: Exception | None) -> bool:
    """Write down why not all was delivered; returns whether there is anything to write."""
    folder.tracking_failure.unlink(missing_ok=True)
    if failure is not None:
        message = redact_text(str(failure))
        log.error("%s", message)
        write_record(folder.tracking_failure, {"message": message, "refused": isinstance(failure, RaymillError)})
    return failure is not None


def _follow(delivery: Delivery, give_up_s: float) -> Exception | None:
    """Deliver until the run is over; returns why not all was delivered."""
    parent = os.getppid()
    samples: list[Point] = []
    pause_s, sampled_s, over_s = POLL_S, 0.0, None
    while True:
        # Looked at before the events are read, so that none is missed that a dying driver wrote.
        gone = _driver_is_gone(delivery.done, parent)
        try:
            num_events = delivery.deliver(samples)
            if gone and not num_events:
                delivery.abandon()
        except RaymillError as error:
            return error
        except store_failures() as error:
            if over_s is None and (gone or delivery.ends()):
                over_s = time.monotonic()
            refused = getattr(error, "error_code", None) in REFUSALS
            if over_s is not None and (refused or time.monotonic() - over_s > give_up_s):
                return error
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
            log.warning("not delivered, next try in %g s: %s", pause_s, error)
        else:
            samples, pause_s, over_s = [], POLL_S, None
            if not num_events and (gone or delivery.done.status not in ("", "RUNNING")):
                return None
            if num_events:
                continue
        if delivery.done.status == "RUNNING" and time.monotonic() - sampled_s > SAMPLE_S:
            sampled_s = time.monotonic()
            samples += sample_machine(delivery.folder, delivery.done.started_s)
        time.sleep(pause_s)


def _driver_is_gone(done: Delivered, parent: int) -> bool:
    if done.driver_pid is None or done.driver_pid == parent:
        return os.getppid() != parent
    return not ProcessId(done.driver_pid, done.driver_started_s).lives()


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


def _points(metrics: Mapping[str, float], step: int, time_s: float) -> list[Point]:
    return [Point(plain_key(key), float(value), step, time_s) for key, value in metrics.items()]


def _speeds(event: StepDone) -> dict[str, float]:
    # Beside the machine's load, on the page's own tab for it, so that the losses stand next to each other.
    speeds = {"system/rows_per_s": event.rows_per_s, "system/data_wait_share": event.data_wait_share}
    return {key: value for key, value in speeds.items() if value is not None}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and text of every value in nested dicts."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _record(path: Path) -> dict[str, Any]:
    return read_record(path) if path.exists() else {}


def _load(path: Path) -> Delivered:
    return Delivered(**read_record(path)) if path.exists() else Delivered()
