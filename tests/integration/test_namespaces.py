"""Nodes that share neither a network nor a folder: each in a network namespace and a view of the disk of its own, on a bridge.

A machine's link is a pair of TAP devices (Linux, Documentation/networking/tuntap.rst) and a thread that carries frames between
them, so links are cut and packets are lost without a firewall or a kernel module. Needs root.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from integration.test_cluster import HIDE, RAY, STEP_TIMEOUT_S, Nodes, can_hide, embedded_run, finish, nodes, until

__all__ = ["nodes"]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

BRIDGE, PREFIX = "rmbridge", "10.231.7."
SETTINGS = ["loop.strict=true", "loop.epochs=12", "checkpoint.every_steps=10", "register=null"]
ONE = ["scale.workers=1"]
ELASTIC = ["scale.workers=null", "scale.min_workers=1", "scale.max_workers=2"]


def job(*settings: str) -> list[str]:
    return ["smoke", *(f"--set={setting}" for setting in (*SETTINGS, *settings))]


def ip(*arguments: str, check: bool = True) -> int:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True).returncode


def tap(name: str) -> int:
    """A file that is the other end of a new network device: what is read was sent by the device, what is written comes to it."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    set_interface, tap_of_plain_frames = 0x400454CA, 0x0002 | 0x1000
    fcntl.ioctl(end, set_interface, struct.pack("16sH22x", name.encode(), tap_of_plain_frames))
    return end


@dataclass
class Network:
    """A bridge with a namespace for each machine, numbered from 1, and links that lose what they are told to lose."""

    num_machines: int
    names: list[str] = field(default_factory=list)
    other_end: dict[int, int] = field(default_factory=dict)
    lost_percent: int = 0
    num_lost: int = 0
    stop: tuple[int, int] = field(default_factory=os.pipe)
    carrier: threading.Thread | None = None

    def up(self) -> None:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for number in range(1, self.num_machines + 1):
            name = f"rm{number}"
            ip("netns", "add", name)
            self.names.append(name)
            inner, outer = tap(f"{name}in"), tap(f"{name}out")
            self.other_end |= {inner: outer, outer: inner}
            ip("link", "set", f"{name}in", "netns", name, "name", "eth0")
            ip("link", "set", f"{name}out", "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{PREFIX}{number}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        self.carrier = threading.Thread(target=self.carry, daemon=True)
        self.carrier.start()

    def carry(self) -> None:
        """Bring each frame to the other end of its link, but for those that are to be lost, until told to stop."""
        chance = random.Random(0)
        while True:
            for end in select.select([self.stop[0], *self.other_end], [], [])[0]:
                if end == self.stop[0]:
                    return
                try:
                    frame = os.read(end, 2**16)
                    if chance.random() * 100 < self.lost_percent:
                        self.num_lost += 1
                    else:
                        os.write(self.other_end[end], frame)
                except OSError:
                    # The device is down or its queue is full: so a real link loses its frames.
                    self.num_lost += 1

    def down(self) -> None:
        os.write(self.stop[1], b"!")
        if self.carrier is not None:
            self.carrier.join()
        for end in (*self.other_end, *self.stop):
            os.close(end)
        for name in self.names:
            ip("netns", "del", name, check=False)
        ip("link", "del", BRIDGE, check=False)

    def cut(self, number: int) -> None:
        ip("link", "set", f"rm{number}out", "down")

    def mend(self, number: int) -> None:
        ip("link", "set", f"rm{number}out", "up")


@pytest.fixture
def network(nodes: Nodes) -> Iterator[Network]:
    """Three machines: the first has the head and the command, no folder is shared, and the cluster runs."""
    if os.geteuid() != 0 or not can_hide(nodes.folder / "home"):
        pytest.skip("needs root")
    found = Network(3)
    try:
        try:
            found.up()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        begin(nodes)
        yield found
    finally:
        for command in nodes.commands:
            if command.poll() is None:
                command.kill()
                command.communicate()
        for node in reversed(nodes.running):
            if node.poll() is None:
                nodes.remove(node)
        found.down()


def inside(number: int, *command: str) -> list[str]:
    return ["ip", "netns", "exec", f"rm{number}", *command]


def begin(nodes: Nodes) -> None:
    """Start the head with no CPU, and a node of one CPU on each other machine."""
    nodes.variables["RAY_ADDRESS"] = f"{PREFIX}1:6379"
    common = ["start", "--block", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]
    common.append(f"--object-store-memory={100 * 2**20}")
    for number in (1, 2, 3):
        own = [f"--node-ip-address={PREFIX}{number}"]
        if number == 1:
            own += ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={nodes.folder / 'ray'}"]
        else:
            own += [f"--address={PREFIX}1:6379", "--num-cpus=1"]
        hidden = [*HIDE, str(nodes.folder / "home")] if number > 1 else []
        with open(nodes.folder / f"node-{number}.log", "wb") as log:
            command = inside(number, *hidden, sys.executable, "-m", RAY, *common, *own)
            nodes.running.append(
                subprocess.Popen(command, env=nodes.variables, stdout=log, stderr=log, cwd=nodes.folder, start_new_session=True)
            )
        until(lambda number=number: num_nodes(nodes) >= number, 120, f"{number} nodes")  # type: ignore[misc]


def num_nodes(nodes: Nodes) -> int:
    code = "import ray; ray.init(log_to_driver=False); print('alive', sum(node['Alive'] for node in ray.nodes()))"
    done = subprocess.run(inside(1, sys.executable, "-c", code), env=nodes.variables, capture_output=True, text=True, check=False)
    return next((int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("alive")), 0)


def start(nodes: Nodes) -> subprocess.Popen[str]:
    command = inside(1, sys.executable, "-m", "raymill", "train", *job(*ELASTIC), "--json")
    process = subprocess.Popen(
        command, env=nodes.variables, cwd=nodes.project, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    nodes.commands.append(process)
    return process


def steps(nodes: Nodes) -> list[int]:
    return [event["step"] for event in nodes.events() if event["kind"] == "step"]


def cut_for(seconds: float | None) -> Callable[[Network], None]:
    def happens(network: Network) -> None:
        network.cut(2)
        if seconds is not None:
            # No event says that a link was down long enough.
            time.sleep(seconds)
            network.mend(2)

    return happens


def lossy(network: Network) -> None:
    network.lost_percent = 5


@pytest.mark.parametrize(
    "happens",
    [cut_for(5), cut_for(60), cut_for(None), lossy],
    ids=["cut for 5 s", "cut for 60 s", "cut for good", "5 % of packets lost"],
)
def test_machines_without_a_shared_folder_end_with_the_weights_of_one_whatever_their_link_does(
    network: Network, nodes: Nodes, happens: Callable[[Network], None]
) -> None:
    nodes.variables |= {"RAYMILL_FAULT": "step_done:slow:seconds=0.05", "RAYMILL_FAULT_FOLDER": str(nodes.folder)}
    command = start(nodes)
    until(lambda: len(steps(nodes)) >= 25 or command.poll() is not None, STEP_TIMEOUT_S, "steps")
    num_lost = network.num_lost
    happens(network)
    summary: dict[str, Any] = finish(command)
    alone = embedded_run(nodes.folder / "embedded", *job(*ONE), "--in-process")
    assert network.num_lost > num_lost
    assert summary["weights_sha256"] == alone["weights_sha256"]
    assert sorted(set(steps(nodes))) == list(range(1, 121))
