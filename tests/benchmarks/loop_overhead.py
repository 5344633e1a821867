"""What the seams cost a job that uses none of them: the loop of this commit beside that of an older one.

Run it from the project's root; the older commit's files are taken from git and removed again:

    python tests/benchmarks/loop_overhead.py --before 8de688a --rounds 7

A small model, plain and strict, so that what the loop does by itself weighs as much as it ever can: one thread, one process, no
Ray. The two commits take turns within a round, and what is compared is a round's ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parents[2]
STEPS = 1500

CHILD = """
import json, sys, tempfile
from functools import partial
from pathlib import Path
from probes import mixed
from worker_harness import Experiment, Start, run_rank

probe, steps = sys.argv[1], int(sys.argv[2])
pipeline = partial(mixed.pipeline, mixed.GLOBAL_BATCH_ROWS * steps, 0, 500)
experiment = Experiment(mixed.Mixed, pipeline, {**mixed.VALUES, "checkpoint": {"every_steps": 10**6}}).with_values(
    loop={"epochs": 1, "window_rows": 2000, "record_order": False, "gradient_accumulation_steps": 1}
)
if probe == "strict":
    experiment = experiment.with_values(loop={"strict": True, "shards": 4})
with tempfile.TemporaryDirectory() as folder:
    outcome, _ = run_rank(0, 1, 0, experiment, Start(Path(folder), 1, None, None, True))
print(json.dumps({"rows_per_s": outcome.rows_per_s, "weights": outcome.weights_sha256[:12]}))
"""


def main() -> None:
    """Print rows per second of both, and their ratio, per probe."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", default="8de688a", help="the older commit")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as older:
        subprocess.run(["git", "-C", str(PROJECT), "archive", "-o", f"{older}/tree.tar", options.before], check=True)
        subprocess.run(["tar", "-xf", f"{older}/tree.tar", "-C", older], check=True)
        for probe in ("plain", "strict"):
            compare(probe, Path(older), options.rounds)


def compare(probe: str, older: Path, rounds: int) -> None:
    """Let both trees take turns with a probe, the order turned round in every second round."""
    trees = {"before": older, "now": PROJECT}
    found: dict[str, list[float]] = {name: [] for name in trees}
    weights = {name: run(tree, probe, 50)["weights"] for name, tree in trees.items()}
    for number in range(rounds):
        for name in list(trees)[:: 1 if number % 2 else -1]:
            found[name].append(float(run(trees[name], probe, STEPS)["rows_per_s"]))
    ratios = [now / before for now, before in zip(found["now"], found["before"], strict=True)]
    speeds = "  ".join(f"{name} {statistics.median(values):.0f} rows/s" for name, values in found.items())
    same = "the same weights" if len(set(weights.values())) == 1 else f"other weights: {weights}"
    print(f"{probe}: {speeds}  now/before {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})  {same}")


def run(tree: Path, probe: str, steps: int) -> dict[str, str | float]:
    """One training in a process of its own, with this tree's engine and probes."""
    paths = [str(tree / "platform"), str(tree / "tests"), str(tree)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", CHILD, probe, str(steps)]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, str | float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
