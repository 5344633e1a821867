"""MLflow's page over the project's store: a server of this machine alone, there until Ctrl-C, gone after it.

It is MLflow's own server with passwords (`server`). It takes its app from here, so that its page can be told that it is about
training models: by itself MLflow 3 opens for chats with language models, whatever an experiment says of itself.
"""

from __future__ import annotations

import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from raymill.errors import InputError, Problem, TrackingError
from raymill.files import read_record
from raymill.record.folder import RunFolder, runs_folder
from raymill.record.processes import wait_or_kill
from raymill.redaction import redact_text
from raymill.tracking.mlflow_client import tracking_uri
from raymill.tracking.server import HOST, USER, make_store, new_password, start_server, store_to_serve

if TYPE_CHECKING:
    from flask import Response

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


def serve_ui(port: int, show: Callable[[str, dict[str, str]], None]) -> None:
    """Run MLflow's server over the project's store, for this machine alone, until Ctrl-C (SIGINT), SIGTERM or SIGHUP.

    Other users of this machine can reach its loopback address too, so the page asks for a password, made for this one time.

    Args:
        show: is given the page's address, with the user and the password in it, and those of the latest jobs' experiments.

    Raises:
        InputError: when the port is taken, or `store_to_serve` says so.
        TrackingError: when the store cannot be made, or the server ends by itself.
    """
    uri = store_to_serve()
    with socket.socket() as probe:
        # As servers do: a port that only waits for the last packets of a server before is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            fix = "End what uses it, or give another one with --port."
            raise InputError([Problem(f"--port {port}", str(error), "a free port", fix)]) from error
    make_store(uri)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="raymill-ui-") as private:
        password = new_password()
        address = f"http://{USER}:{password}@{HOST}:{port}"
        show(address, experiments(address))
        server = start_server(uri, port, Path(private), password)
        try:
            code = server.wait()
        except KeyboardInterrupt:
            return
        finally:
            _end(server)
    raise TrackingError(f"the MLflow server ended with exit code {code}; its last lines say why")


def experiments(address: str) -> dict[str, str]:
    """Job -> the page of its experiment on a server over the project's store, for the jobs that ran last, the latest first."""
    store = redact_text(tracking_uri())
    records = [path for path in (RunFolder(run).mlflow_run for run in runs_folder().glob("*/")) if path.is_file()]
    found: dict[str, str] = {}
    for record in map(read_record, sorted(records, key=lambda path: path.stat().st_mtime, reverse=True)):
        if record["store"] == store and len(found) < MAX_LINKS:
            found.setdefault(record["experiment"], f"{address}/#/experiments/{record['experiment_id']}")
    return found


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
