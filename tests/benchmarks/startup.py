"""Seconds from the command to the end of the first optimizer step, from a cold shell: raymill in its own process, on a Ray of its
own, and on a cluster that is already up; beside the guide's way and torchrun.

Run it from the project's root:

    python tests/benchmarks/startup.py --data .raymill/data/mnist --out startup.json
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from measure import LIMIT_S, contest_arguments, contestants, enlarged, report, run_rounds

RAY = Path(sys.executable).with_name("ray")


def main() -> None:
    """Run the contest and print its table."""
    parser = contest_arguments(__doc__ or "")
    parser.set_defaults(epochs=1, copies=5)
    options = parser.parse_args()
    with enlarged(options.data, options.copies) as data:
        commands = contestants(options, data)
        starts = {
            "in process": commands["in process"],
            "raymill": commands["raymill"],
            "on a cluster": commands["raymill"],
            "guide": commands["guide"],
            "torchrun": commands["in memory"],
        }
        rounds = run_rounds(starts, options.repeats, {"on a cluster": ray_cluster})
    report(rounds, "seconds_to_first_step", "guide", options.out)


@contextmanager
def ray_cluster() -> Iterator[Mapping[str, str]]:
    """A cluster of this machine, up and idle; yields the variables that lead to it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Short, because Ray makes sockets in it.
    with tempfile.TemporaryDirectory(prefix="rb-ray-") as folder:
        variables = {
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": folder,
        }
        command = [str(RAY), "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1"]
        command += ["--include-dashboard=false", f"--num-cpus={os.cpu_count()}", f"--temp-dir={folder}/ray"]
        node = subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(node, variables)
            yield variables
        finally:
            # The command that waits for the node's processes ends them all.
            node.terminate()
            node.wait(timeout=LIMIT_S)


def _wait_for(node: subprocess.Popen[bytes], variables: Mapping[str, str]) -> None:
    """Return when the cluster answers."""
    deadline_s = time.monotonic() + LIMIT_S
    asked = [str(RAY), "status", "--address", variables["RAY_ADDRESS"]]
    while subprocess.run(asked, env={**os.environ, **variables}, capture_output=True, check=False).returncode:
        if node.poll() is not None or time.monotonic() > deadline_s:
            raise SystemExit(f"the cluster did not come up: ray start ended with {node.returncode}")


if __name__ == "__main__":
    main()
