"""Seconds from handing a run to a cluster that is up to the end of its first step: `raymill submit` where no workers stand ready
and, a pause later, where some do, beside `ray job submit` of the guide's script and `raymill train` on a Ray of its own.

    python tests/benchmarks/submit.py [--rounds 3] [--pause 60]

The job is jobs/mnist on two workers; the cluster is that of cluster/local.yaml. The contestants take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
DATA = PROJECT / ".raymill" / "data" / "mnist"
LIMIT_S = 240.0
JOB = ["mnist", "--set", f"data.root={DATA}", "--set", "register=null"]


class Place:
    """A state folder with a cluster that is up."""

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.variables = {**os.environ, "RAYMILL_HOME": str(folder)}

    def raymill(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "raymill", *arguments, "--json"]
        done = subprocess.run(command, cwd=PROJECT, env=self.variables, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)

    def first_step_s(self, run: str) -> float:
        """When a run's first step was done, Unix seconds."""
        path, deadline_s = self.home / "runs" / run / "events.jsonl", time.monotonic() + LIMIT_S
        while time.monotonic() < deadline_s:
            for line in path.read_text().splitlines() if path.exists() else []:
                if '"first_step"' in line and line.endswith("}"):
                    return float(json.loads(line)["time_s"])
            time.sleep(0.05)
        raise SystemExit(f"run {run} made no step within {LIMIT_S:g} s")

    def submitted(self) -> float:
        """Seconds of a run that is submitted."""
        began_s = time.time()
        run = self.raymill("submit", *JOB)["run_id"]
        took_s = self.first_step_s(run) - began_s
        self.raymill("stop", run)
        while next(one for one in self.raymill("ps")["submitted"] if one["run_id"] == run)["exit_code"] is None:
            time.sleep(0.5)
        self.last = run
        return took_s

    def dismiss(self) -> None:
        """End the workers that stand ready after the last run: they would be in the guide's way."""
        self._ray("job", "stop", f"{self.last}-ready")

    def _ray(self, *arguments: str) -> str:
        record = json.loads((self.home / "clusters" / "local" / "cluster.json").read_text())
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.home / "clusters" / "local" / "token")}
        command = [str(Path(sys.executable).with_name("ray")), *arguments[:2], f"--address={record['dashboard']}", *arguments[2:]]
        return subprocess.run(command, env=self.variables | token, check=True, capture_output=True, text=True).stdout

    def by_the_guide(self) -> float:
        """Seconds of the guide's script, as a job of Ray's."""
        script = [sys.executable, str(Path(__file__).with_name("guide_way.py")), "--data", str(DATA), "--epochs", "1"]
        own = {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'platform'}", "T0": str(time.time())}
        printed = self._ray("job", "submit", f"--runtime-env-json={json.dumps({'env_vars': own})}", "--", *script)
        [line] = [line for line in printed.splitlines() if "seconds_to_first_step" in line]
        return float(json.loads(line[line.index("{") :])["seconds_to_first_step"])

    def alone(self) -> float:
        """Seconds of `raymill train` on a Ray of its own."""
        began_s, before = time.time(), {path.name for path in self.home.glob("runs/*")}
        command = [sys.executable, "-m", "raymill", "train", *JOB, "--json"]
        process = subprocess.Popen(command, cwd=PROJECT, env=self.variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not (new := {path.name for path in self.home.glob("runs/*")} - before):
                time.sleep(0.05)
            return self.first_step_s(new.pop()) - began_s
        finally:
            process.terminate()
            process.wait()


@contextmanager
def cluster() -> Iterator[Place]:
    """A cluster of this machine, for as long as it is measured."""
    with tempfile.TemporaryDirectory(prefix="rb-") as folder:
        place = Place(Path(folder))
        place.raymill("cluster", "up", "local")
        try:
            yield place
        finally:
            place.raymill("cluster", "down", "local")


def main() -> None:
    """Measure all in turn, print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=60.0, help="seconds from a run's end to the next submit")
    options = parser.parse_args()
    names = "raymill submit", "raymill submit, the next", "ray job submit", "raymill train"
    found: dict[str, list[float]] = {name: [] for name in names}
    with cluster() as place:
        for _ in range(options.rounds):
            found["ray job submit"].append(place.by_the_guide())
            found["raymill train"].append(place.alone())
            found["raymill submit"].append(place.submitted())
            time.sleep(options.pause)
            found["raymill submit, the next"].append(place.submitted())
            place.dismiss()
    for name, seconds in found.items():
        print(f"{name:24} {statistics.median(seconds):6.1f} s   {[round(one, 1) for one in seconds]}")


if __name__ == "__main__":
    main()
