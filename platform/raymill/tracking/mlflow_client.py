"""Where MLflow is, and how it is opened: pickles forbidden, the store made whole or not at all, the caller's settings left alone.

Importing this file imports no MLflow.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

from raymill.errors import InputError, Problem
from raymill.files import make_private_folder, waiting_lock
from raymill.paths import home
from raymill.tracking.description import DESCRIPTION_TAG, TRAINING_KIND, describe_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient


MAX_KEY_LENGTH = 250

SETTINGS = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Where tqdm is installed, its bars leave a thread behind in whoever called.
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Environment variables under which raymill uses MLflow."""

SQLITE = "sqlite:///"

ADDRESS_MARKS = ("?", "%")
"""What begins the query of an address, and an escape. All else of a path, such as a space or `#`, stands for itself."""

PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""The same, where the user did not set them: MLflow's own retries would hide an outage for minutes."""


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the state folder.

    Raises:
        InputError: the state folder's path cannot be part of an address.
    """
    if problems := store_problems():
        raise InputError(problems)
    return _named_uri() or f"{SQLITE}{home() / 'mlflow.db'}"


def store_problems() -> list[Problem]:
    """Why the project's store could not be where it belongs, to be said before a run has begun."""
    if _named_uri():
        return []
    try:
        path = str(home())
    except InputError as error:
        return list(error.problems)
    if not set(ADDRESS_MARKS) & set(path):
        return []
    # Escaped they would still be wrong: SQLAlchemy takes escapes for the characters, and MLflow makes a folder of that name.
    expected = f"a path without {' or '.join(ADDRESS_MARKS)}, which have a meaning in the address of MLflow's store"
    fix = "Name another folder with RAYMILL_HOME, or a store with MLFLOW_TRACKING_URI."
    return [Problem("the state folder", path, expected, fix)]


def nothing_is_stored() -> bool:
    """Whether the store is a file that is not there yet. Who only reads need not make it."""
    path = _sqlite_path(tracking_uri())
    # Of a path that no file can have, os.path says so too; Path raises.
    return path is not None and not os.path.exists(path)


def _named_uri() -> str | None:
    return os.environ.get("MLFLOW_TRACKING_URI")


def _sqlite_path(uri: str) -> Path | None:
    """The file that an address of SQLite names; None where it is none, or one that only SQLAlchemy can read."""
    path = uri.removeprefix(SQLITE)
    plain = uri.startswith(SQLITE) and path not in ("", ":memory:") and not set(ADDRESS_MARKS) & set(path)
    return Path(path) if plain else None


@contextmanager
def mlflow_settings() -> Iterator[None]:
    """Within this, MLflow reads no pickles and uses the project's store; afterwards everything is as the caller had it."""
    changed = {*SETTINGS, *PATIENCE, "MLFLOW_TRACKING_URI"}
    before = {name: os.environ.get(name) for name in changed}
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    uri = tracking_uri()
    os.environ |= SETTINGS | {name: value for name, value in PATIENCE.items() if name not in os.environ}
    try:
        import mlflow

        # A URI that stands in the environment alone is not MLflow's own setting, and must not become one.
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        uri_before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None  # type: ignore[no-untyped-call]
        mlflow.set_tracking_uri(uri)
        os.environ["MLFLOW_TRACKING_URI"] = uri
        try:
            yield
        finally:
            mlflow.set_tracking_uri(uri_before)  # type: ignore[arg-type]  # None takes it back
    finally:
        # A part of MLflow sets up logging for the whole process when it is imported.
        root.setLevel(level)
        root.handlers[:] = handlers
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def connect() -> MlflowClient:
    """Open the store, making it where it is not there yet. To be called within `mlflow_settings`.

    Takes seconds: MLflow is slow to import. Raises what MLflow raises when the store cannot be reached.
    """
    import mlflow

    uri = tracking_uri()
    if path := _sqlite_path(uri):
        _make_store(path)
    client = mlflow.MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def plain_key(key: str) -> str:
    """The name of a metric, parameter or tag in the characters that MLflow accepts, and no more of them."""
    return re.sub(r"[^\w .:/-]", "_", key)[:MAX_KEY_LENGTH]


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

    make_private_folder(path.parent)
    with waiting_lock(path.with_name(f"{path.name}.lock")):
        if path.exists():
            return
        stage = path.with_name(f"{path.name}.stage")
        # SQLite keeps files of its own beside, with longer names.
        for left in path.parent.glob(f"{escape(stage.name)}*"):
            left.unlink()
        store = SqlAlchemyStore(f"{SQLITE}{stage}", (home() / "artifacts").as_uri())  # type: ignore[no-untyped-call]
        # Closed, so that all of it is in the one file.
        store.engine.dispose()
        # SQLite gives its journals the same mode.
        stage.chmod(0o600)
        stage.rename(path)


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment of this name, made where it is not there yet; its page opens for the training of models."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        for key, value in TRAINING_KIND.items():
            if key not in found.tags:  # one that was made by an earlier raymill or by hand
                client.set_experiment_tag(found.experiment_id, key, value)
        return str(found.experiment_id)
    served = tracking_uri().startswith(("http:", "https:"))
    tags = {**TRAINING_KIND, DESCRIPTION_TAG: describe_experiment(name)}
    try:
        return client.create_experiment(name, None if served else (home() / "artifacts" / name).as_uri(), tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return experiment_id(client, name)
