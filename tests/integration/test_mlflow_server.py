"""The MLflow server of a cluster of this machine: whom it lets in, where it listens, and that it comes back and goes whole."""

from __future__ import annotations

import base64
import os
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from integration.commands import Home
from raymill.cluster import mlflow_server
from raymill.cluster.spec import ClusterFolder
from raymill.files import write_record
from raymill.record.folder import RunFolder

pytestmark = pytest.mark.integration

CLUSTER = "kind: local\nmlflow: true\nnodes: [{num_cpus: 1}]\n"
MLFLOWS_DEFAULT = "password1234"


class Team(Home):
    """A state folder and a project with the cluster `team`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "home", folder / "project")
        (self.project / "jobs").mkdir(parents=True)
        (self.project / "cluster").mkdir()
        (self.project / "pyproject.toml").touch()
        (self.project / "cluster" / "team.yaml").write_text(CLUSTER)

    def server(self, *calls: str) -> subprocess.CompletedProcess[str]:
        """Call functions of `mlflow_server` for the cluster, without its Ray nodes, in a process that then ends."""
        lines = [f"mlflow_server.{call}(folder)" for call in calls]
        code = "from raymill.cluster import mlflow_server, spec\nfolder = spec.ClusterFolder('team')\n" + "\n".join(lines)
        command = [sys.executable, "-P", "-c", code]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=200, check=False)

    def told(self) -> dict[str, Any]:
        """What `raymill cluster status` says of it."""
        return dict(self.json("cluster", "status", "team", "--json")["mlflow"])

    def kept(self) -> list[str]:
        """What is there of the cluster beside logs."""
        return sorted(path.name for path in self.path.glob("clusters/team/*") if path.suffix != ".log")


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    """A project whose cluster does not run."""
    found = Team(tmp_path)
    try:
        yield found
    finally:
        found.run("cluster", "down", "team")
    assert found.left_over() == []


def ask(address: str, who: tuple[str, str] | None, **headers: str) -> int | None:
    """The status of the answer to a question about experiments; None while nobody answers."""
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/experiments/search?max_results=1", headers=headers)
    if who:
        request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(who).encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except urllib.error.URLError:
        return None


MAKE_USER = """
from mlflow.server import get_app_client
get_app_client("basic-auth", {address!r}).create_user("anna", "a password of hers")
"""
"""As docs/cluster.md has it."""


def test_it_lets_in_nobody_without_its_password_and_never_takes_mlflows_own(team: Team) -> None:
    started = team.server("start")
    assert started.returncode == 0, started.stderr
    told = team.told()
    secret = Path(told["password_file"])
    address, right = told["address"], (told["user"], secret.read_text())

    deadline_s, answers = time.monotonic() + 100, set()
    while ask(address, right) != 200:
        answers |= {ask(address, ("admin", MLFLOWS_DEFAULT)), ask(address, (told["user"], MLFLOWS_DEFAULT))}
        assert time.monotonic() < deadline_s
    answers |= {ask(address, who) for who in (None, ("admin", MLFLOWS_DEFAULT), (told["user"], MLFLOWS_DEFAULT), ("admin", ""))}
    assert answers <= {401, None}
    assert ask(address, None) == 401
    assert ask(address, right, Host="attacker.example") == 403
    assert ask(address, right, Host=f"localhost:{urlsplit(address).port}") == 200

    processes = [one for one in team.processes() if "mlflow" in " ".join(one.cmdline())]
    assert len(processes) == 2, "the command and its one worker: none for jobs"
    connections = [one for process in processes for one in process.net_connections("inet")]
    assert {one.laddr for one in connections if one.status == psutil.CONN_LISTEN} == {("127.0.0.1", urlsplit(address).port)}
    variables = processes[-1].environ()
    assert variables["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == variables["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert len(variables["MLFLOW_FLASK_SERVER_SECRET_KEY"]) == 64

    seen = [" ".join(process.cmdline()) for process in processes] + [*variables.values(), started.stdout, started.stderr]
    assert secret.read_text() not in "".join([*seen, (team.path / "clusters" / "team" / "mlflow.log").read_text()])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in secret.parent.iterdir()}
    assert modes == dict.fromkeys(("password", "auth.ini", "users.db", "server.json"), 0o600)


def test_the_page_is_told_instead_of_a_second_one_and_goes_with_the_cluster(team: Team) -> None:
    assert team.server("start", "wait_for").returncode == 0
    told = team.told()
    run = RunFolder(team.path / "runs" / "run-1")
    run.path.mkdir(parents=True)
    write_record(run.mlflow_run, {"store": f"sqlite:///{team.path}/mlflow.db", "experiment": "digits", "experiment_id": "7"})
    code, _, said = team.run("ui")
    assert code == 0, said
    assert f"{told['address']}  (of the cluster team; user {told['user']}, password in {told['password_file']})" in said
    assert f"digits: {told['address']}/#/experiments/7" in said
    assert Path(told["password_file"]).read_text() not in said

    # Another store is not what this server shows.
    variables = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    assert team.run("ui", variables=variables)[0] == 2

    assert team.run("cluster", "down", "team")[1] == "team: 0 nodes and the MLflow server ended\n"
    assert (team.kept(), team.left_over()) == ([], [])


def test_a_killed_one_comes_back_at_its_address_with_its_users(team: Team) -> None:
    assert team.server("start", "wait_for").returncode == 0
    told = team.told()
    right, anna = (told["user"], Path(told["password_file"]).read_text()), ("anna", "a password of hers")
    who = {"MLFLOW_TRACKING_USERNAME": right[0], "MLFLOW_TRACKING_PASSWORD": right[1]}
    command = [sys.executable, "-P", "-c", MAKE_USER.format(address=told["address"])]
    subprocess.run(command, env=team.environment | who, check=True, timeout=100)
    server, worker = team.processes()
    assert worker.ppid() == server.pid
    worker.kill()
    psutil.wait_procs([server, worker], timeout=30)
    assert team.told() == {**told, "runs": False}

    port = urlsplit(told["address"]).port
    with socket.create_server(("127.0.0.1", port)):
        failed = team.server("start", "wait_for")
    assert "RunError: the MLflow server ended at once" in failed.stderr
    assert "address already in use" in failed.stderr

    assert team.server("start", "wait_for").returncode == 0
    assert team.told() == told
    assert [ask(told["address"], one) for one in (right, anna, ("anna", "another one"))] == [200, 200, 401]

    # Without the command that started it, the worker still serves, is known, and is ended.
    server, worker = team.processes()
    server.kill()
    psutil.wait_procs([server], timeout=30)
    assert (team.told(), ask(told["address"], right)) == (told, 200)
    assert team.json("cluster", "down", "team", "--json") == {"name": "team", "ended": 0, "mlflow_ended": True}
    assert (team.kept(), team.left_over()) == ([], [])


def test_a_process_of_another_server_is_none_of_its_own(tmp_path: Path) -> None:
    mine, other = ClusterFolder("mine"), ClusterFolder("other")
    variables = os.environ | {"MLFLOW_AUTH_CONFIG_PATH": str(other.mlflow / "auth.ini")}
    with subprocess.Popen(["sleep", "100"], env=variables) as process:
        try:
            assert (mlflow_server.runs(mine), mlflow_server.runs(other)) == (False, True)
        finally:
            assert mlflow_server.end(other)
        assert process.wait(timeout=10) is not None


@pytest.mark.cluster
def test_it_starts_beside_the_nodes_and_again_when_it_died(team: Team) -> None:
    told = team.json("cluster", "up", "team", "--json")
    assert [node["runs"] for node in told["nodes"]] == [told["mlflow"]["runs"]] == [True]
    right = (told["mlflow"]["user"], Path(told["mlflow"]["password_file"]).read_text())
    assert ask(told["mlflow"]["address"], right) == 200
    assert team.run("cluster", "up", "team")[0] == 2, "all of it runs already"
    killed = [one for one in team.processes() if one.environ().get("MLFLOW_AUTH_CONFIG_PATH")]
    for process in killed:
        process.kill()
    psutil.wait_procs(killed, timeout=30)
    assert "does not run" in team.run("cluster", "status", "team")[1]
    assert team.json("cluster", "up", "team", "--json") == told
    assert ask(told["mlflow"]["address"], right) == 200
    assert team.run("cluster", "down", "team")[1] == "team: 1 nodes and the MLflow server ended\n"
    assert (team.kept(), team.left_over()) == ([], [])
