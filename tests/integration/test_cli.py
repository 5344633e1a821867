"""The commands as a user types them, on a real Ray: the same weights each time, whatever comes between."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import shared_memory
from faults.cases import own_digits
from integration.commands import PROJECT, TIMEOUT_S, Home, wait_until

pytestmark = pytest.mark.integration

EPOCHS, TRAIN_ROWS, BATCH_ROWS = 20, 600, 60
JOB = ("smoke", "--json", "--set", "loop.record_order=true", "--set", f"loop.epochs={EPOCHS}")


@dataclass(frozen=True)
class Trained:
    """A run that ended."""

    home: Home
    summary: dict[str, Any]

    @property
    def run_id(self) -> str:
        return str(self.summary["run_id"])

    def batches(self, num_workers: int) -> dict[int, list[int]]:
        """Position behind each step -> its rows, in the order of the ranks."""
        batches: dict[int, list[int]] = {}
        for rank in range(num_workers):
            seen = set()
            for line in (self.home.path / "runs" / self.run_id / f"order-{rank}.jsonl").read_text().splitlines():
                step = json.loads(line)
                assert step["position"] not in seen
                seen.add(step["position"])
                batches.setdefault(step["position"], []).extend(step["rows"])
        return batches


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def pair(home: Home) -> Trained:
    """The job on two workers."""
    return Trained(home, home.json("train", *JOB))


@pytest.fixture(scope="module")
def single(home: Home) -> Trained:
    """The job on one worker, in a process of its own, registered."""
    return Trained(home, home.json("train", *JOB, "--in-process", "--set", "register={model: blobs}"))


# ---------------------------------------------------------------- train


def test_a_run_says_what_became_of_it(pair: Trained) -> None:
    found = pair.summary
    total = EPOCHS * TRAIN_ROWS
    assert found["status"] == "finished"
    assert found["rows"] | {"used": total, "skipped": 0, "total": total} == found["rows"]
    assert found["steps"] == total // BATCH_ROWS
    assert found["metrics"]["validation/accuracy"] == 1.0
    assert re.fullmatch("[0-9a-f]{64}", found["weights_sha256"])
    assert found["rows_per_s"] > 0
    assert 0 < found["seconds_to_first_step"] < TIMEOUT_S
    assert found["delivered_to_mlflow"] is True


def test_the_same_rows_meet_in_each_step_at_any_number_of_workers(pair: Trained, single: Trained) -> None:
    one, two = single.batches(1), pair.batches(2)
    assert one == two
    assert list(one) == list(range(BATCH_ROWS, EPOCHS * TRAIN_ROWS + 1, BATCH_ROWS))
    for epoch in range(EPOCHS):
        steps = range(epoch * TRAIN_ROWS + BATCH_ROWS, (epoch + 1) * TRAIN_ROWS + 1, BATCH_ROWS)
        assert sorted(row for position in steps for row in one[position]) == list(range(TRAIN_ROWS))


def test_ctrl_c_saves_the_run_and_a_resume_ends_as_if_nothing_had_been(
    pair: Trained, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = Home(tmp_path_factory.mktemp("interrupted"))
    shared_before = set(os.listdir("/dev/shm"))
    process = home.start("train", *JOB)
    wait_until(lambda: home.step() > 0, process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 3, stderr
    folder = home.folder()
    said = json.loads(stdout)
    assert said["error"] == "Interrupted"
    assert f"--resume {folder.run_id}" in said["message"]
    assert f"--resume {folder.run_id}" in stderr
    stopped = home.json("runs", "show", folder.run_id, "--json")
    assert stopped["status"] == "interrupted"
    assert 0 < stopped["step"] < EPOCHS * TRAIN_ROWS // BATCH_ROWS

    resumed = Trained(home, home.json("train", "--resume", folder.run_id, "--json"))
    assert resumed.run_id == folder.run_id
    assert resumed.summary["weights_sha256"] == pair.summary["weights_sha256"]
    assert resumed.summary["rows"] == pair.summary["rows"]
    assert resumed.batches(2) == pair.batches(2)
    code, _, stderr = home.run("train", "--resume", folder.run_id)
    assert (code, "finished" in stderr) == (2, True)

    assert home.left_over() == []
    assert shared_memory.abandoned() - shared_before == set()


# ---------------------------------------------------------------- what is known afterwards


def test_runs_are_listed_and_shown(pair: Trained, single: Trained) -> None:
    listed = [run["run_id"] for run in pair.home.json("runs", "list", "--json")["runs"]]
    assert listed.index(single.run_id) < listed.index(pair.run_id)
    shown = pair.home.json("runs", "show", pair.run_id, "--json")
    assert (shown["status"], shown["step"], shown["attempts"]) == ("finished", pair.summary["steps"], 1)
    assert shown["metrics"]["validation/accuracy"] == pair.summary["last_metrics"]["validation/accuracy"]


@pytest.mark.parametrize("workers", ["pair", "single"])
def test_an_evaluation_finds_what_the_run_recorded(workers: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(workers)
    found = trained.home.json("evaluate", trained.run_id, "--json")
    assert found["run_id"] == trained.run_id
    assert found["rows"] == 120
    assert found["metrics"]["validation/accuracy"] == trained.summary["metrics"]["validation/accuracy"]
    # Ranks add up their own rows first: the last digit of the float64 sum may differ.
    assert found["metrics"] == pytest.approx(trained.summary["metrics"], rel=1e-12)


def test_a_registered_model_is_evaluated_by_its_alias(single: Trained) -> None:
    assert single.summary["model"] == {"name": "blobs", "version": 1, "alias": "candidate"}
    found = single.home.json("evaluate", "blobs@candidate", "--json")
    assert (found["model"], found["run_id"]) == ("blobs/1", single.run_id)
    assert found["metrics"] == pytest.approx(single.summary["metrics"], rel=1e-12)


def test_a_model_that_is_not_there_is_answered_with_the_nearest(single: Trained) -> None:
    code, stdout, stderr = single.home.run("evaluate", "blob@candidate", "--json")
    assert code == 2
    assert "blobs@candidate" in json.loads(stdout)["problems"][0]["fix"]
    assert "blobs@candidate" in stderr


# ---------------------------------------------------------------- the end


@pytest.mark.long
def test_a_command_that_ends_right_after_it_read_ends_with_its_own_code(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    for file in own_digits(home.path).glob("*.parquet"):
        file.unlink()
    job = ("check", "mnist", "--set", f"data.root={home.path}/own")
    # More at once than there are cores: a thread of Arrow that has read a file then often lives into the end of the process.
    with ThreadPoolExecutor(3 * (os.cpu_count() or 1)) as pool:
        codes = [code for code, _, _ in pool.map(lambda _: home.run(*job), range(100))]
    assert codes == [2] * 100


# ---------------------------------------------------------------- ui


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status_of(port: int, path: str, host: str = "127.0.0.1", user: str = "") -> int | None:
    """The HTTP status; None while nobody answers.

    Args:
        user: "name:password" of who asks; "" for nobody in particular.
    """
    headers = {"Host": f"{host}:{port}"}
    if user:
        headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def test_the_page_is_there_for_this_machine_alone_until_ctrl_c(tmp_path: Path) -> None:
    home, port = Home(tmp_path / "home"), free_port()
    process = home.start("ui", "--port", str(port))
    assert process.stderr is not None
    try:
        (user,) = next(found for line in process.stderr if (found := re.findall(rf"http://(\S+)@127\.0\.0\.1:{port}\b", line)))
        wait_until(lambda: status_of(port, "/health") == 200, process)
        assert status_of(port, "/", user=user) == 200
        assert status_of(port, "/") == 401
        assert status_of(port, "/", host="elsewhere.example", user=user) == 403
        listening = {
            connection.laddr
            for member in home.processes()
            for connection in member.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {tuple(address) for address in listening} == {("127.0.0.1", port)}

        code, _, stderr = home.run("ui", "--port", str(port))
        assert (code, "give another one with --port" in stderr) == (2, True)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert home.left_over() == []
    assert not (PROJECT / "mlartifacts").exists()
