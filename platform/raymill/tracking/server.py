"""MLflow's own server over the project's store, with passwords, for this machine alone: how it is started.

pyproject.toml names it among MLflow's apps, as `APP` (see `ui.create_app`).
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil

from raymill.errors import InputError, Problem, TrackingError
from raymill.files import private
from raymill.paths import home
from raymill.redaction import redact_text
from raymill.tracking.mlflow_client import SETTINGS, connect, mlflow_settings, store_failures, tracking_uri

USER = "raymill"
APP = "raymill"
HOST = "127.0.0.1"

AUTH_CONFIG_VARIABLE = "MLFLOW_AUTH_CONFIG_PATH"
"""Names the file with the first password: by it, the server's processes are told from all others."""

# The users' file is in the server's current folder, whose path may hold what has a meaning in an address.
AUTH_CONFIG = """\
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{users}
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""
USERS = "users.db"


def new_password() -> str:
    """A password that nobody guesses, of characters that stand for themselves in an address and in a file of settings."""
    return secrets.token_urlsafe(16)


def store_to_serve() -> str:
    """The address of the project's store.

    Raises:
        InputError: it is a server that has a page of its own, or what the server needs to ask for passwords is not installed.
    """
    uri = tracking_uri()
    problems = []
    if uri.startswith(("http:", "https:")):
        found = "the address of a server"
        problems.append(Problem("MLFLOW_TRACKING_URI", found, "a store without a page", "Open that address."))
    if importlib.util.find_spec("flask_wtf") is None:
        fix = 'Install it: pip install "raymill[server]".'
        problems.append(Problem("MLflow's server", "no Flask-WTF", "what it asks for passwords with", fix))
    if problems:
        raise InputError(problems)
    return uri


def make_store(uri: str) -> None:
    """Make the store where it is a file of the project that is not there yet: under its lock, as the server would not.

    Raises:
        TrackingError: it cannot be made.
    """
    if uri.startswith("sqlite:") and not (home() / "mlflow.db").exists():
        with mlflow_settings():
            try:
                connect()
            except store_failures() as error:
                raise TrackingError(f"MLflow's store cannot be opened: {redact_text(str(error))}") from error


def start_server(uri: str, port: int, folder: Path, password: str, log: IO[bytes] | None = None) -> psutil.Popen:
    """Start the server; it listens some seconds later, or has ended by then.

    Args:
        uri: what `store_to_serve` said, of a store that is there.
        port: on this machine's loopback address.
        folder: who may come in is kept there, for this user alone. Users that are there already stay as they are.
        password: of `USER`, where the folder knows no users yet. It is handed on by file.
        log: takes what the server prints, and then it goes on without this terminal; None: the terminal does.
    """
    return psutil.Popen(
        _command(uri, port),
        env=_environment(folder, password),
        # The server looks for code in its current folder: that is the private one.
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=log is not None,
    )


def _environment(folder: Path, password: str) -> dict[str, str]:
    """The server's environment: the user's, without what would open it, and with a private folder for who may come in."""
    config = auth_config(folder)
    with open(config, "w", opener=private) as file:
        file.write(AUTH_CONFIG.format(users=USERS, user=USER, password=password))
    (folder / USERS).touch(mode=0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_SERVER_", "MLFLOW_AUTH_"))}
    return {
        **kept,
        **SETTINGS,
        # No processes for jobs that nobody sends.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        AUTH_CONFIG_VARIABLE: str(config),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        # No code from the current folder, in the server's own children too.
        "PYTHONSAFEPATH": "1",
    }


def auth_config(folder: Path) -> Path:
    """The server's settings, with the first password, in the folder that it was started with."""
    return folder / "auth.ini"


def _command(uri: str, port: int) -> list[str]:
    options = {
        "--backend-store-uri": uri,
        "--artifacts-destination": (home() / "artifacts").as_uri(),
        "--host": HOST,
        "--port": str(port),
        "--workers": "1",
        # What a page elsewhere sends here, by a name that resolves to this machine, is refused.
        "--allowed-hosts": f"{HOST}:{port},localhost:{port}",
        "--cors-allowed-origins": f"http://{HOST}:{port},http://localhost:{port}",
        "--app-name": APP,
    }
    return [sys.executable, "-P", "-m", "mlflow", "server", *(word for option in options.items() for word in option)]
