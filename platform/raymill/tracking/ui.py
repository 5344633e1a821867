"""MLflow's page over the project's store: a server of this machine alone, there until Ctrl-C, gone after it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from raymill.errors import InputError, Problem, TrackingError
from raymill.paths import home
from raymill.tracking.mlflow_client import SETTINGS, connect, mlflow_settings, tracking_uri

USER = "raymill"

AUTH_CONFIG = """\
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = {database}
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def serve_ui(port: int, show: Callable[[str], None]) -> None:
    """Run MLflow's server over the project's store, for this machine alone, until Ctrl-C (SIGINT), SIGTERM or SIGHUP.

    Other users of this machine can reach its loopback address too, so the page asks for a password, made for this one time.

    Args:
        show: is given the page's address, with the user and the password in it.

    Raises:
        InputError: when the port is taken, or the store is a server that has a page of its own.
        TrackingError: when the server ends by itself.
    """
    uri = tracking_uri()
    if uri.startswith(("http:", "https:")):
        found = "the address of a server"
        raise InputError([Problem("MLFLOW_TRACKING_URI", found, "a store without a page", "Open that address.")])
    with socket.socket() as probe:
        # As servers do: a port that only waits for the last packets of a server before is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            fix = "End what uses it, or give another one with --port."
            raise InputError([Problem(f"--port {port}", str(error), "a free port", fix)]) from error
    if uri.startswith("sqlite:") and not (home() / "mlflow.db").exists():
        with mlflow_settings():
            connect()  # which makes the store under its lock; the server would do so without
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="raymill-ui-") as private:
        password = secrets.token_urlsafe(16)
        variables = _environment(Path(private), password)
        show(f"http://{USER}:{password}@127.0.0.1:{port}")
        # The server looks for code in its current folder: that is the private one.
        server = psutil.Popen(_command(uri, port), env=variables, cwd=private, stdin=subprocess.DEVNULL)
        try:
            code = server.wait()
        except KeyboardInterrupt:
            return
        finally:
            _end(server)
    raise TrackingError(f"the MLflow server ended with exit code {code}; its last lines say why")


def _environment(private: Path, password: str) -> dict[str, str]:
    """The server's environment: the user's, without what would open it, and with a private folder for who may come in."""
    config = private / "auth.ini"
    config.touch(mode=0o600)
    config.write_text(AUTH_CONFIG.format(database=f"sqlite:///{private / 'users.db'}", user=USER, password=password))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_SERVER_", "MLFLOW_AUTH_"))}
    return {
        **kept,
        **SETTINGS,
        # No processes for jobs that nobody sends.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        # No code from the current folder, in the server's own children too.
        "PYTHONSAFEPATH": "1",
    }


def _command(uri: str, port: int) -> list[str]:
    options = {
        "--backend-store-uri": uri,
        "--artifacts-destination": (home() / "artifacts").as_uri(),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        # What a page elsewhere sends here, by a name that resolves to this machine, is refused.
        "--allowed-hosts": f"127.0.0.1:{port},localhost:{port}",
        "--cors-allowed-origins": f"http://127.0.0.1:{port},http://localhost:{port}",
        "--app-name": "basic-auth",
    }
    return [sys.executable, "-P", "-m", "mlflow", "server", *(word for option in options.items() for word in option)]


def _end(server: psutil.Popen) -> None:
    """End a process and what it has started: politely, after 10 seconds by force."""
    # The terminal sends Ctrl-C to all of them, and a second one must not come between.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(psutil.NoSuchProcess):
        family = [*server.children(recursive=True), server]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)
