"""The record of a run: what happened, in a file; what it ran with; where MLflow is.

    loop, driver --append_event--> events.jsonl --read_events--> raymill.delivery, a process of its own --> MLflow

Training never talks to MLflow and never waits for it. `events.jsonl` is a durable queue, one JSON object a line, each
with "kind" and "time_s"; `python -m raymill.tracking RUN_FOLDER` delivers it. Whoever wants to know about a run reads
the same file. Importing this module imports neither MLflow nor torch.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymill.errors import InputError, Problem, did_you_mean
from raymill.home import RunFolder, home, project_root, run_folder, runs_folder
from raymill.redaction import redact_arguments

if TYPE_CHECKING:
    from mlflow import MlflowClient

Event = Mapping[str, Any]

# ---------------------------------------------------------------- events


def append_event(folder: RunFolder, event: Event) -> None:
    """Append one event to the run's file and wait until it is on disk. "time_s" is filled in where missing."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with EventWriter(folder.events) as writer:
        writer.write(event)


class EventWriter:
    """Appends events of one process, from any thread. Step events wait up to `every_s` for company, others for nothing.

    Args:
        path: the run's events; made where it is not there yet.
        every_s: least seconds between two writes of step events.
    """

    def __init__(self, path: Path, every_s: float = 0.25) -> None:
        # O_APPEND, and whole lines in one write: lines of the driver and of rank 0 never mix.
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._every_s = every_s
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._flushed_s = 0.0

    def write(self, event: Event) -> None:
        """Add one event. Its values are JSON values, or arrays and tensors of numbers."""
        stamped = {"time_s": time.time(), **event}
        line = json.dumps(stamped, separators=(",", ":"), default=lambda value: value.tolist()) + "\n"
        with self._lock:
            self._lines.append(line)
            if event["kind"] != "step" or time.monotonic() - self._flushed_s >= self._every_s:
                self._flush()

    def flush(self) -> None:
        """Write what waits."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._lines:
            # A line that a killed process left torn is ended first, so that only it is lost.
            size = os.fstat(self._file).st_size
            torn = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"
            data = memoryview((("\n" if torn else "") + "".join(self._lines)).encode())
            while data:
                data = data[os.write(self._file, data) :]
            self._lines.clear()
        self._flushed_s = time.monotonic()

    def close(self) -> None:
        """Write what waits and wait until it is on disk."""
        self.flush()
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_events(path: Path, offset: int = 0, limit: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """Read the whole lines from `offset` (bytes) on, at most `limit` of them.

    Returns:
        (events, the offset behind the last line read). A last line without its end is left for later; a torn line that
        a later one follows is passed over: its writer died before anything depended on it. No file: no events.
    """
    if not path.exists():
        return [], offset
    events = []
    with path.open("rb") as file:
        file.seek(offset)
        for line in islice(file, limit):
            if not line.endswith(b"\n"):
                break
            offset += len(line)
            event = _parse(line)
            if event is not None:
                events.append(event)
    return events, offset


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None


# ---------------------------------------------------------------- what the runs' files say


def list_runs() -> list[dict[str, Any]]:
    """All runs of this project, newest first; see `show_run` for the keys. Asks no process and no server."""
    folders = [RunFolder(path) for path in runs_folder().glob("*/") if (path / "spec.json").is_file()]
    runs = [_facts(folder) for folder in folders]
    return sorted(runs, key=lambda facts: (facts["started_s"] or 0.0, facts["run_id"]), reverse=True)


def show_run(run_id: str) -> dict[str, Any]:
    """What is known of one run.

    Returns:
        run_id, name (of the job), status ("starting", "running", "finished", "interrupted", "failed"), message (why it
        stopped, or None), started_s (Unix seconds, or None), attempts, step, num_total_steps, metrics (name -> latest
        value), mlflow_run_id and version ("name/1"), both None until they exist.

    Raises:
        InputError: when there is no such run.
    """
    folder = run_folder(run_id)
    if not folder.spec.is_file():
        valid = [path.parent.name for path in runs_folder().glob("*/spec.json")]
        raise InputError([Problem("run", repr(run_id), "the id of a run of this project", did_you_mean(run_id, valid))])
    return _facts(folder)


def _facts(folder: RunFolder) -> dict[str, Any]:
    events, _ = read_events(folder.events)
    version_record = _read_json(folder.version) if folder.version.exists() else None
    delivered = _read_json(folder.delivered) if folder.delivered.exists() else {}
    facts: dict[str, Any] = {
        "run_id": folder.run_id,
        "name": _read_json(folder.spec)["name"],
        "status": "starting",
        "message": None,
        "started_s": events[0]["time_s"] if events else None,
        "attempts": 0,
        "step": 0,
        "num_total_steps": None,
        "metrics": {},
        "mlflow_run_id": delivered.get("mlflow_run_id"),
        "version": f"{version_record['name']}/{version_record['version']}" if version_record else None,
    }
    for event in events:
        facts["step"] = event.get("step", facts["step"])
        facts["metrics"] |= event.get("metrics", {})
        if event["kind"] == "start":
            alive = "pid" not in event or process_lives(event["pid"])
            facts |= {"status": "running" if alive else "interrupted", "message": None}
            facts |= {"attempts": event["attempt"], "num_total_steps": event["num_total_steps"]}
        elif event["kind"] == "stop":
            facts |= {"status": event["reason"], "message": event["message"]}
        elif event["kind"] == "end":
            facts["status"] = "finished"
    return facts


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def process_lives(pid: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------- what it ran with


def environment() -> dict[str, Any]:
    """What the run ran with, as JSON-ready values. Imports none of the libraries; holds no environment variables."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "versions": {name: _version(name) for name in ("torch", "ray", "mlflow", "numpy", "pyarrow")},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (changes := _git("status", "--porcelain")) is None else bool(changes),
        "command": redact_arguments(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(project_root()), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def data_digest(folder: RunFolder) -> str:
    """What the run's input was: the digest in its manifest, SHA-256 in hex."""
    return str(_read_json(folder.manifest)["digest"])


# ---------------------------------------------------------------- where MLflow is


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the state folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def connect() -> MlflowClient:
    """Open the store, making it where it is not there yet, and forbid MLflow to read pickles.

    Takes seconds: MLflow is slow to import. Raises what MLflow raises when the store cannot be reached.
    """
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow

    uri = tracking_uri()
    if uri.startswith("sqlite:///"):
        _make_store(Path(uri.removeprefix("sqlite:///")))
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def store_failures() -> tuple[type[Exception], ...]:
    """What an unreachable, slow or locked store raises."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def _make_store(path: Path) -> None:
    """Make a SQLite store where there is none, whole or not at all.

    MLflow makes its tables in many steps. A store that was locked, or whose maker was killed, between two of them could
    never be opened again; and several makers at once would get in each other's way.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        stage = path.with_name(f"{path.name}.stage")
        for left in path.parent.glob(f"{stage.name}*"):
            left.unlink()
        store = SqlAlchemyStore(f"sqlite:///{stage}", (home() / "artifacts").as_uri())  # type: ignore[no-untyped-call]
        # Closed, so that all of it is in the one file.
        store.engine.dispose()
        stage.rename(path)


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of this name, made where it is not there yet."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    served = tracking_uri().startswith(("http:", "https:"))
    try:
        return client.create_experiment(name, None if served else (home() / "artifacts" / name).as_uri())
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return experiment_id(client, name)


# ---------------------------------------------------------------- the process


def main(argv: Sequence[str] | None = None) -> int:
    """Deliver one run's events until the run ends. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m raymill.tracking", description="Deliver a run's events to MLflow.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--give-up-s", type=float, default=600.0, help="seconds to go on trying once the run is over")
    arguments = parser.parse_args(argv)
    # MLflow's own retries would hide an outage for minutes; `follow` retries instead.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    folder = RunFolder(arguments.run_folder.resolve())
    os.environ["RAYMILL_HOME"] = str(folder.path.parent.parent)
    from raymill.delivery import follow

    return follow(folder, arguments.give_up_s)


if __name__ == "__main__":
    sys.exit(main())
