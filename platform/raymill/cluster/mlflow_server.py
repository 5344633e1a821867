"""The MLflow server of a cluster of this machine, over the project's store and with passwords: started, looked at, ended.

Its processes are known by the settings file that their environment names, so those whose parent was killed are found too.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from raymill.cluster.process import end_of, free_ports
from raymill.cluster.spec import ClusterFolder, all_cluster_folders
from raymill.errors import RunError
from raymill.files import make_private_folder, private, read_record, replace_file, write_record
from raymill.ray_internals import LOOPBACK
from raymill.record.processes import wait_or_kill
from raymill.redaction import redact_text
from raymill.tracking.mlflow_client import tracking_uri
from raymill.tracking.server import (
    AUTH_CONFIG_VARIABLE,
    USER,
    auth_config,
    make_store,
    new_password,
    start_server,
    store_to_serve,
)

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
POLL_S = 0.2


def start(folder: ClusterFolder) -> None:
    """Begin to start the server, which takes seconds; of one that ran before, at its address and with its users.

    Raises:
        InputError: there can be none, as `store_to_serve` says.
        TrackingError: there is no store yet, and none can be made.
    """
    uri = store_to_serve()
    make_store(uri)
    make_private_folder(folder.mlflow)
    if _record(folder).exists():
        port = read_record(_record(folder))["port"]
    else:
        (port,) = free_ports(1)
        replace_file(_password(folder), new_password())
    write_record(_record(folder), {"port": port, "store": redact_text(uri)})
    with open(folder.mlflow_log, "wb", opener=private) as log:
        start_server(uri, port, folder.mlflow, _password(folder).read_text(), log)


def wait_for(folder: ClusterFolder) -> None:
    """Return once the server that was started listens.

    Raises:
        RunError: it ended, or did not listen in time, and then it was ended; with what it printed.
    """
    port = read_record(_record(folder))["port"]
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not _listens(folder, port):
        if not runs(folder):
            raise RunError(f"the MLflow server ended at once; it printed:\n{end_of(folder.mlflow_log)}")
        if time.monotonic() > deadline_s:
            _end(folder)
            late = f"the MLflow server did not listen after {START_TIMEOUT_S:g} s"
            raise RunError(f"{late}; it printed:\n{end_of(folder.mlflow_log)}")
        time.sleep(POLL_S)


def runs(folder: ClusterFolder) -> bool:
    """Whether any of its processes do."""
    return bool(_processes(folder))


def status(folder: ClusterFolder) -> dict[str, Any] | None:
    """Address, user, file with the password, and whether it runs; None: the cluster has no such server."""
    if not _record(folder).exists():
        return None
    address = f"http://{LOOPBACK}:{read_record(_record(folder))['port']}"
    return {"address": address, "user": USER, "password_file": str(_password(folder)), "runs": runs(folder)}


def running() -> list[dict[str, Any]]:
    """The `status`, and the cluster's name, of each server that runs over the store that this project uses."""
    store = redact_text(tracking_uri())
    found = [(folder, status(folder)) for folder in all_cluster_folders()]
    return [
        {"cluster": folder.name, **told}
        for folder, told in found
        if told and told["runs"] and read_record(_record(folder))["store"] == store
    ]


def end(folder: ClusterFolder) -> bool:
    """End the server, whatever of it is left; its users and passwords are gone with it. Says whether anything ran."""
    ended = _end(folder)
    shutil.rmtree(folder.mlflow, ignore_errors=True)
    return ended


def _end(folder: ClusterFolder) -> bool:
    ended = False
    # Twice: one that was about to start another one may have done so since the first look.
    for _ in range(2):
        found = _processes(folder)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        wait_or_kill(found, END_TIMEOUT_S)
        ended = ended or bool(found)
    return ended


def _processes(folder: ClusterFolder) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _belongs(process, folder)]


def _belongs(process: psutil.Process, folder: ClusterFolder) -> bool:
    with suppress(psutil.Error):
        return process.environ().get(AUTH_CONFIG_VARIABLE) == str(auth_config(folder.mlflow))
    return False


def _listens(folder: ClusterFolder, port: int) -> bool:
    """Whether one of its own processes does; whoever answers there may be somebody else, if it could not have the port."""
    for process in _processes(folder):
        with suppress(psutil.Error):
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN and one.laddr.port == port:
                    return True
    return False


def _record(folder: ClusterFolder) -> Path:
    return folder.mlflow / "server.json"


def _password(folder: ClusterFolder) -> Path:
    return folder.mlflow / "password"
