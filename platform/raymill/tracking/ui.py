"""MLflow's page over the project's store: a server of this machine alone, there until Ctrl-C, gone after it.

It is MLflow's own server with passwords. pyproject.toml names it among MLflow's apps, as `APP`, so that its page can be told that
it is about training models: by itself MLflow 3 opens for chats with language models, whatever an experiment says of itself.
"""

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
from typing import TYPE_CHECKING, Any

import psutil

from raymill.errors import InputError, Problem, TrackingError
from raymill.files import read_record
from raymill.paths import home
from raymill.record.folder import RunFolder, runs_folder
from raymill.record.processes import wait_or_kill
from raymill.redaction import redact_text
from raymill.tracking.mlflow_client import SETTINGS, connect, mlflow_settings, tracking_uri

if TYPE_CHECKING:
    from flask import Response

USER = "raymill"
APP = "raymill"

FIRST_VISIT = """<script>
if (new URL(document.baseURI).password) location.replace(location.href)
const firstVisit = {"mlflow.workflowType_v1": "machine_learning", "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": true}
for (const [key, value] of Object.entries(firstVisit))
  if (localStorage.getItem(key) === null) localStorage.setItem(key, JSON.stringify(value))
</script>"""
"""Put at the top of MLflow's page. A browser refuses the requests of a page whose address holds a password, so once the browser
knows it, it is taken out of the address. Then what the page keeps in the browser, where nobody has chosen yet: that it is about
training, and that the assistant, which takes a quarter of it, opens when it is asked to."""

MAX_LINKS = 5

AUTH_CONFIG = """\
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = {database}
admin_username = {user}
admin_password = {password}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


def serve_ui(port: int, show: Callable[[str, dict[str, str]], None]) -> None:
    """Run MLflow's server over the project's store, for this machine alone, until Ctrl-C (SIGINT), SIGTERM or SIGHUP.

    Other users of this machine can reach its loopback address too, so the page asks for a password, made for this one time.

    Args:
        show: is given the page's address, with the user and the password in it, and those of the latest jobs' experiments.

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
        address = f"http://{USER}:{password}@127.0.0.1:{port}"
        show(address, {job: f"{address}/#/experiments/{number}" for job, number in _experiments(uri).items()})
        # The server looks for code in its current folder: that is the private one.
        server = psutil.Popen(_command(uri, port), env=variables, cwd=private, stdin=subprocess.DEVNULL)
        try:
            code = server.wait()
        except KeyboardInterrupt:
            return
        finally:
            _end(server)
    raise TrackingError(f"the MLflow server ended with exit code {code}; its last lines say why")


def _experiments(uri: str) -> dict[str, str]:
    """Job -> id of its experiment in this store, for the jobs that ran last, the latest first."""
    records = [path for path in (RunFolder(run).mlflow_run for run in runs_folder().glob("*/")) if path.is_file()]
    found: dict[str, str] = {}
    for record in map(read_record, sorted(records, key=lambda path: path.stat().st_mtime, reverse=True)):
        if record["store"] == redact_text(uri) and len(found) < MAX_LINKS:
            found.setdefault(record["experiment"], record["experiment_id"])
    return found


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
        "--app-name": APP,
    }
    return [sys.executable, "-P", "-m", "mlflow", "server", *(word for option in options.items() for word in option)]


# ---------------------------------------------------------------- within the server


def create_app() -> Any:
    """MLflow's server with passwords, whose page opens for the training of models. MLflow calls this."""
    from mlflow.server import app
    from mlflow.server.auth import create_app as create_app_with_passwords

    app.after_request(_on_first_visit)
    return create_app_with_passwords()


def _on_first_visit(response: Response) -> Response:
    """Tell the page what it is about."""
    from flask import request

    if request.path == "/" and response.status_code == 200 and response.mimetype == "text/html":
        response.direct_passthrough = False
        response.set_data(response.get_data(as_text=True).replace("<head>", f"<head>{FIRST_VISIT}", 1))
    return response


# ---------------------------------------------------------------- its end


def _end(server: psutil.Popen) -> None:
    """End a process and what it has started: politely, after 10 seconds by force."""
    # The terminal sends Ctrl-C to all of them, and a second one must not come between.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(psutil.NoSuchProcess):
        family = [*server.children(recursive=True), server]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        wait_or_kill(family, 10.0)
