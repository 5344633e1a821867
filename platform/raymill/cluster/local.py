"""A cluster of several Ray nodes on this machine, on loopback and with a token: started, looked at, ended."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from raymill.cluster import mlflow_server
from raymill.cluster.on_head import head
from raymill.cluster.process import end_of, free_ports
from raymill.cluster.spec import ClusterFolder, ClusterSpec
from raymill.errors import InputError, Problem, RunError
from raymill.files import private, read_record, write_record
from raymill.ray_internals import HEAD_SETTINGS, LOOPBACK
from raymill.record.processes import ProcessId, wait_or_kill
from raymill.tracking.server import store_to_serve

START_TIMEOUT_S = 180.0
END_TIMEOUT_S = 20.0
POLL_S, ASK_TIMEOUT_S = 0.2, 5.0

STOP_WAIT_S = 120
"""What a run has to save its state when it is asked to stop."""


def variables(folder: ClusterFolder, address: str) -> dict[str, str]:
    """The environment of whatever is to use a cluster of this machine: its address, and its token by file, never by value."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")}
    return kept | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder.token)}


def up(name: str, spec: ClusterSpec) -> dict[str, Any]:
    """Start the nodes, and MLflow beside them, and wait until they are there; of a cluster that was not ended, what does not run.

    Returns:
        address, dashboard, nodes with their processes; mlflow, as `mlflow_server.status` tells it.

    Raises:
        InputError: all of it runs already, or there can be no MLflow server.
        RunError: a node or the server did not start; nothing is left of the others, unless they ran before.
    """
    folder = ClusterFolder(name)
    if spec.mlflow:
        store_to_serve()  # or say why there is none, before anything is started
    run = [node["runs"] for node in status(name)["nodes"]]
    if run and all(run) and (mlflow_server.runs(folder) or not spec.mlflow):
        raise InputError([Problem(name, "a cluster that runs", "one that does not", f"`raymill cluster down {name}` ends it.")])
    if run:
        record = read_record(folder.record)
        if not Path(record["session"]).is_dir():
            # The machine has started anew, and its temporary files are gone.
            record["session"] = _new_session()
        _start_missing(folder, spec, record)
        return status(name)
    down(name)
    record = _new_record(folder)
    try:
        _start_missing(folder, spec, record)
    except BaseException:
        down(name)
        raise
    return status(name)


def _new_record(folder: ClusterFolder) -> dict[str, Any]:
    folder.make()
    shutil.rmtree(folder.gcs, ignore_errors=True)  # of a cluster whose end was cut short
    with open(folder.token, "w", opener=private) as token:
        token.write(secrets.token_hex(32))
    gcs, dashboard, client = free_ports(3)
    address, url = f"{LOOPBACK}:{gcs}", f"http://{LOOPBACK}:{dashboard}"
    record = {
        "kind": "local",
        "address": address,
        "dashboard": url,
        "client_port": client,
        "session": _new_session(),
        "nodes": [],
    }
    write_record(folder.record, record)
    return record


def _new_session() -> str:
    # Short, because the names of the sockets in it may have 107 letters.
    session = tempfile.mkdtemp(prefix="raymill-")
    (Path(session) / "tmp").mkdir()
    return session


def _start_missing(folder: ClusterFolder, spec: ClusterSpec, record: dict[str, Any]) -> None:
    """Start each node that does not run, the first one first, and meanwhile the MLflow server."""
    if spec.mlflow and not mlflow_server.runs(folder):
        mlflow_server.start(folder)
    for number, node in enumerate(spec.nodes):
        if number < len(record["nodes"]) and _runs(record["nodes"][number]):
            continue
        called = f"{folder.name}-{number}-{secrets.token_hex(3)}"
        given = [f"--node-name={called}", f"--num-cpus={node.num_cpus}", f"--object-store-memory={spec.object_store_mb * 2**20}"]
        if node.resources:
            given.append(f"--resources={json.dumps(node.resources)}")
        record["nodes"][number : number + 1] = [{**_start(folder, number, given, record), "num_cpus": node.num_cpus}]
        write_record(folder.record, record)
        _wait_for(called, folder, record, number)
    if spec.mlflow:
        mlflow_server.wait_for(folder)


def _start(folder: ClusterFolder, number: int, given: list[str], record: dict[str, Any]) -> dict[str, Any]:
    address, session = record["address"], Path(record["session"])
    place = [f"--address={address}"]
    if number == 0:
        ports = [address.rpartition(":")[2], record["dashboard"].rpartition(":")[2], record["client_port"]]
        place = ["--head", f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"]
        place.append(f"--temp-dir={session / 'ray'}")
        # Where it is named, Ray takes nodes that wait for their head for one that runs at its address.
        (session / "ray" / "ray_current_cluster").unlink(missing_ok=True)
    command = [sys.executable, "-m", "raymill.cluster.node", "start", "--block", "--disable-usage-stats", *place, *given]
    command += [f"--node-ip-address={LOOPBACK}", "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    own = variables(folder, address) | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    # What the head knows outlives it, the line of runs with it: started again at its address, it is the same cluster.
    own |= {name: value.format(folder=folder.gcs) for name, value in HEAD_SETTINGS.items()} if number == 0 else {}
    # Ray's own commands leave in RAY_TMPDIR which cluster was started last, for whoever comes next.
    with open(folder.log(number), "wb", opener=private) as log:
        process = subprocess.Popen(
            command,
            # What a killed process leaves in its temporary folder goes with the session.
            env=own | {"RAY_TMPDIR": str(session), "TMPDIR": str(session / "tmp")},
            cwd=session,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return {"pid": process.pid, "started_s": psutil.Process(process.pid).create_time()}


def _wait_for(called: str, folder: ClusterFolder, record: dict[str, Any], number: int) -> None:
    """Wait until the dashboard knows the node of this name, and so may jobs."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while called not in _alive(folder, record["dashboard"]):
        if not _runs(record["nodes"][number]):
            raise _not_started(folder, number, "ended at once")
        if time.monotonic() > deadline_s:
            raise _not_started(folder, number, f"was not there after {START_TIMEOUT_S:g} s")
        time.sleep(POLL_S)


def _not_started(folder: ClusterFolder, number: int, what: str) -> RunError:
    anew = f"`raymill cluster down {folder.name}`, then `up`, begins anew"
    return RunError(f"node {number} {what}; {anew}. It printed:\n{end_of(folder.log(number))}")


def _alive(folder: ClusterFolder, dashboard: str) -> set[str]:
    """Names of the nodes that the dashboard takes for alive; none while it does not answer."""
    request = urllib.request.Request(
        f"{dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {folder.token.read_text()}"}
    )
    with suppress(OSError, ValueError, KeyError), urllib.request.urlopen(request, timeout=ASK_TIMEOUT_S) as answer:
        known = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
        return {node["nodeName"] for node in known if node["state"] == "ALIVE"}
    return set()


def status(name: str) -> dict[str, Any]:
    """What is known of a cluster: address, dashboard, and of each node and the MLflow server whether it runs."""
    folder = ClusterFolder(name)
    record = read_record(folder.record) if folder.record.exists() else {"nodes": []}
    nodes = [{"pid": node["pid"], "num_cpus": node["num_cpus"], "runs": _runs(node)} for node in record["nodes"]]
    told: dict[str, Any] = {key: record[key] for key in ("address", "dashboard") if key in record}
    if mlflow := mlflow_server.status(folder):
        told["mlflow"] = mlflow
    return {"name": name, **told, "token_file": str(folder.token), "nodes": nodes}


def down(name: str) -> dict[str, Any]:
    """End the MLflow server and the nodes, the last one first, and whatever of theirs is left; token and password go too."""
    folder = ClusterFolder(name)
    mlflow_ended = mlflow_server.end(folder)
    if not folder.record.exists():
        return {"name": name, "ended": 0, "mlflow_ended": mlflow_ended}
    record = read_record(folder.record)
    ended = 0
    for node in reversed(record["nodes"]):
        if _runs(node):
            _end(node["pid"])
            ended += 1
    for left in (Path(record["session"]), head.folder(record["address"]), folder.gcs):
        shutil.rmtree(left, ignore_errors=True)
    for path in (folder.record, folder.token):
        path.unlink(missing_ok=True)
    return {"name": name, "ended": ended, "mlflow_ended": mlflow_ended}


def _end(pid: int) -> None:
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    wait_or_kill(family, END_TIMEOUT_S)


def _runs(node: dict[str, Any]) -> bool:
    with suppress(psutil.NoSuchProcess):
        return ProcessId(node["pid"], node["started_s"]).lives() and psutil.Process(node["pid"]).status() != psutil.STATUS_ZOMBIE
    return False
