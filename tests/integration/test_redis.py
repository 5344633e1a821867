"""A head that keeps its state in a Redis, as those of KubeRay do: it is lost, and the next one goes on with the line."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.commands import Home, smoke_project
from integration.test_cluster import STEP_TIMEOUT_S, until
from integration.test_growing import Head
from raymill.cluster.process import free_ports

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

LONG = ["smoke", "--set", "data.num_rows=6000", "--set", "loop.epochs=8", "--set", "checkpoint.every_steps=10"]
LONG += ["--set", "register=null", "--set", "loop.strict=true"]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head that is not yet started."""
    found = Head(Home(tmp_path / "home", smoke_project(tmp_path / "project")), tmp_path, "mine")
    yield found
    found.end()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Redis with a password; what tells a head of it, as KubeRay does."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("needs redis-server")
    [port], password = free_ports(1), secrets.token_hex(16)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--requirepass", password, "--dir", str(tmp_path), "--save", ""]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}", "REDIS_PASSWORD": password, "RAY_external_storage_namespace": "mine"}
    server.kill()
    server.wait()


def test_a_head_is_lost_and_the_next_one_goes_on_with_the_line(head: Head, redis: dict[str, str]) -> None:
    home = head.home
    expected = home.json("train", *LONG, "--in-process", "--json")["weights_sha256"]
    variables = {**redis, "RAYMILL_CLUSTER": "mine"}

    def start(number: int) -> None:
        [gcs] = free_ports(1)
        options = [f"--redis-password={redis['REDIS_PASSWORD']}", "--num-cpus=2", f"--temp-dir={home.scratch / f'ray-{number}'}"]
        head.start(gcs, *options, variables=variables)

    start(1)
    run = home.json("submit", *LONG, "--cluster", "mine", "--json")["run_id"]
    behind = home.json("submit", "smoke", "--set", "register=null", "--cluster", "mine", "--json")["run_id"]
    steps = home.path / "runs" / run / "events.jsonl"
    until(lambda: steps.exists() and steps.read_text().count('"kind":"step"') >= 100, STEP_TIMEOUT_S, "step 100")
    home.kill_all()
    start(2)
    code, out, said = home.run("logs", run, "--cluster", "mine", "--follow")
    assert code == 0, out + said
    assert json.loads((home.path / "runs" / run / "summary.json").read_text())["weights_sha256"] == expected
    code, out, said = home.run("logs", behind, "--cluster", "mine", "--follow")
    assert code == 0, out + said
    known = {one["run_id"]: one for one in home.json("ps", "--cluster", "mine", "--json")["submitted"]}
    assert [(known[one]["status"], known[one]["attempts"]) for one in (run, behind)] == [("SUCCEEDED", 2), ("SUCCEEDED", 1)]
