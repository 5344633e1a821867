"""MLflow's page over the project's store: a server of this machine alone, there until Ctrl-C, gone after it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import psutil

from raymill.errors import InputError, Problem, TrackingError
from raymill.paths import home
from raymill.tracking.mlflow_client import SETTINGS, connect, mlflow_settings, tracking_uri

ENVIRONMENT = {**SETTINGS, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""No processes for jobs that nobody sends, no telemetry, no pickles."""


def serve_ui(port: int) -> None:
    """Run MLflow's server over the project's store, for this machine alone, until Ctrl-C (SIGINT), SIGTERM or SIGHUP.

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
    server = psutil.Popen(_command(uri, port), env={**os.environ, **ENVIRONMENT}, stdin=subprocess.DEVNULL)
    try:
        code = server.wait()
    except KeyboardInterrupt:
        return
    finally:
        _end(server)
    raise TrackingError(f"the MLflow server ended with exit code {code}; its last lines say why")


def _command(uri: str, port: int) -> list[str]:
    options = {
        "--backend-store-uri": uri,
        "--artifacts-destination": (home() / "artifacts").as_uri(),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        # What a page elsewhere sends here, by a name that resolves to this machine, is refused.
        "--allowed-hosts": f"127.0.0.1:{port},localhost:{port}",
    }
    return [sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)]


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
