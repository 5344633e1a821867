"""Runs that are submitted to a cluster: they go on when whoever submitted them leaves, and end with the same weights."""

from __future__ import annotations

import json
import signal
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from integration.commands import Home, wait_until
from raymill.record.catalog import find_run
from raymill.record.events import StepDone, read_events

pytestmark = pytest.mark.timeout(600)

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A state folder with the cluster of cluster/local.yaml, two nodes of a CPU each."""
    home = Home(tmp_path_factory.mktemp("home"))
    told = home.json("cluster", "up", "local", "--json")
    assert [node["runs"] for node in told["nodes"]] == [True, True]
    try:
        yield home
    finally:
        home.run("cluster", "down", "local")
    assert home.left_over() == []
    assert not (home.path / "clusters" / "local" / "token").exists()


def answer(url: str, token: str | None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_it_asks_for_its_token_and_nobody_else_can_read_or_reach_it(home: Home) -> None:
    told = home.json("cluster", "status", "local", "--json")
    token = Path(told["token_file"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    jobs = f"{told['dashboard']}/api/jobs/"
    assert [answer(jobs, one) for one in (None, "0" * 64, token.read_text())] == [401, 403, 200]
    listening = {
        (process.name(), connection.laddr.ip)
        for process in home.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 3
    assert {one for one in listening if one[1] not in LOOPBACK} == set()
    assert token.read_text() not in "".join(" ".join(process.cmdline()) for process in home.processes())


def test_a_token_that_others_may_read_is_refused_and_so_is_what_is_no_job(home: Home) -> None:
    token = home.path / "clusters" / "local" / "token"
    token.chmod(0o644)
    try:
        code, _, said = home.run("ps")
    finally:
        token.chmod(0o600)
    assert (code, "a file that others may read" in said) == (2, True)
    code, _, said = home.run("submit", "smoke", "--set", "loop.epocs=1")
    assert (code, "loop.epocs" in said) == (2, True)
    code, _, said = home.run("submit", "smoke", "--cluster", "locl")
    assert (code, "Did you mean 'local'?" in said) == (2, True)
    assert home.run("cluster", "up", "local")[0] == 2, "it runs already"
    assert home.json("ps", "--json") == {"submitted": []}


def step_of(home: Home, run: str) -> int:
    path = home.path / "runs" / run / "events.jsonl"
    return max((event.step for event in read_events(path)[0] if isinstance(event, StepDone)), default=0) if path.exists() else 0


def followed(home: Home, run: str) -> tuple[int, str]:
    """Attach until it ends: the exit code, and what the run printed."""
    code, out, _ = home.run("logs", run, "--follow")
    return code, out


def weights_of(home: Home, run: str) -> str:
    summary: dict[str, Any] = json.loads((home.path / "runs" / run / "summary.json").read_text())
    return str(summary["weights_sha256"])


SLOW = ("--set", "loop.epochs=40", "--set", "checkpoint.every_steps=10")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of the same run with a Ray of its own."""
    home = Home(tmp_path_factory.mktemp("alone"))
    return str(home.json("train", "smoke", *SLOW, "--json")["weights_sha256"])


def test_it_goes_on_without_its_terminal_through_a_dead_worker_and_is_stopped_and_resumed(home: Home, expected: str) -> None:
    submitting = home.start("submit", "smoke", *SLOW, "--follow", "--json")
    wait_until(lambda: home.step() >= 3, submitting)
    [run] = [path.name for path in (home.path / "runs").iterdir()]
    # The terminal is closed, whatever was going on in it.
    submitting.send_signal(signal.SIGKILL)
    submitting.communicate()
    workers = [process for process in home.processes() if "TrainWorker" in process.name() or "RayTrainWorker" in process.name()]
    assert workers
    workers[0].kill()
    attached = home.start("logs", run, "--follow")
    reached = home.step() + 20
    try:
        wait_until(lambda: home.step() >= reached, attached)
    except BaseException:
        print(home.run("logs", run)[1])
        raise
    told = home.json("stop", run, "--json")
    assert told["run_id"] == run
    attached.communicate(timeout=240)
    assert attached.returncode == 3, "saved, and can be resumed"
    [listed] = home.json("ps", "--json")["submitted"]
    assert (listed["status"], listed["run_id"], listed["exit_code"]) == ("INTERRUPTED", run, 3)
    again = home.json("submit", "--resume", run, "--json")
    assert again == {"run_id": run, "cluster": "local", "submission_id": f"{run}.2"}
    code, out = followed(home, run)
    assert code == 0, out
    assert weights_of(home, run) == expected
    assert find_run_status(home, run) == "finished"
    assert [one["status"] for one in home.json("ps", "--json")["submitted"]] == ["SUCCEEDED", "INTERRUPTED"]


def find_run_status(home: Home, run: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYMILL_HOME", str(home.path))
        assert find_run(run).path.name == run
    return str(home.json("runs", "show", run, "--json")["status"])
