"""A cluster without a CPU, whose machines Ray's autoscaler makes: what is submitted makes it grow, and it shrinks afterwards."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from integration.commands import PROJECT, Home, smoke_project
from integration.test_cluster import START_TIMEOUT_S, STEP_TIMEOUT_S, until
from raymill.cluster.process import free_ports
from raymill.files import private

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

HEAD = "f" * 51 + "00000"
"""The head's id, as Ray's provider of machines that are processes knows it."""


def configuration(gcs_address: str) -> dict[str, object]:
    """Of Ray's autoscaler: up to two machines of a CPU each, which go after three seconds without work."""
    return {
        "cluster_name": "growing",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD,
            "gcs_address": gcs_address,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
    }


class Growing(Home):
    """A project of one job, and a cluster whose machines come and go."""

    def num_machines(self) -> int:
        """Nodes that run, the head's included."""
        found = 0
        for process in self.processes():
            with suppress(psutil.Error):
                found += process.name() == "raylet"
        return found


@dataclass
class Head:
    """A head that raymill did not start, known by the address of its dashboard and a token."""

    home: Home
    folder: Path
    name: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, gcs: int, *options: str, variables: Mapping[str, str]) -> None:
        """Start it, and write the cluster's file."""
        [dashboard] = free_ports(1)
        token = self.folder / "token"
        if not token.exists():
            with open(token, "w", opener=private) as file:
                file.write(secrets.token_hex(32))
        (self.home.project / "cluster").mkdir(exist_ok=True)
        places = {"dashboard": f"http://127.0.0.1:{dashboard}", "token_file": str(token)}
        file_of_it = self.home.project / "cluster" / f"{self.name}.yaml"
        file_of_it.write_text(yaml.safe_dump({"kind": "address", "keep_ready": False, **places}))
        common = [f"--port={gcs}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        common += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(self.home.scratch)}
        # What is submitted is run by the first Python there.
        own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT / "platform")}
        with open(self.folder / "head.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "raymill.cluster.node", "start", "--head", "--block", *common, *options],
                env={**self.home.environment, **own, **variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        until(lambda: self.home.run("ps", "--cluster", self.name)[0] == 0, START_TIMEOUT_S, "a head")

    def end(self) -> None:
        """End all of it, and say what it printed last."""
        print((self.folder / "head.log").read_text()[-2000:])
        self.home.kill_all()
        for process in self.started:
            process.wait()


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Growing]:
    home = Growing(tmp_path / "home", smoke_project(tmp_path / "project"))
    head, [gcs] = Head(home, tmp_path, "growing"), free_ports(1)
    (tmp_path / "autoscaler.yaml").write_text(json.dumps(configuration(f"127.0.0.1:{gcs}")))
    options = ["--num-cpus=0", f"--autoscaling-config={tmp_path / 'autoscaler.yaml'}", f"--temp-dir={home.scratch / 'ray'}"]
    variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    variables |= {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}
    try:
        head.start(gcs, *options, variables=variables)
        yield home
    finally:
        head.end()


def test_a_cluster_without_machines_gets_some_for_what_waits_in_line_and_loses_them_again(growing: Growing) -> None:
    strict = ("--set", "loop.strict=true", "--set", "register=null")
    expected = growing.json("train", "smoke", *strict, "--in-process", "--json")["weights_sha256"]
    assert growing.num_machines() == 1
    run = growing.json("submit", "smoke", *strict, "--workers", "2", "--cluster", "growing", "--json")["run_id"]
    until(lambda: growing.num_machines() == 3, STEP_TIMEOUT_S, "two machines")
    code, out, _ = growing.run("logs", run, "--follow", "--cluster", "growing")
    assert code == 0, out
    assert json.loads((growing.path / "runs" / run / "summary.json").read_text())["weights_sha256"] == expected
    until(lambda: growing.num_machines() == 1, STEP_TIMEOUT_S, "the end of the machines")
