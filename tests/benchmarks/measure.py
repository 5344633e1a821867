"""What the benchmarks share: the clock inside a training script, and the contest that runs the scripts in turn.

Every contestant is a command of its own whose last output on stdout is a JSON object with at least

    seconds_to_first_step   from the start of the process to the end of the first optimizer step
    rows_per_s              rows of all workers over time, from the end of step 5 to the end of the last step

so the second figure holds the gaps between epochs and leaves out the start. Contestants run A B C A B C, never A A B B:
a slow minute of the machine then falls on all of them, and each ratio is taken inside one round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

STEPS_FOLDER = "STEPS_FOLDER"
"""Variable with a folder where each process of a training script writes down when its steps ended."""

WARM_UP_STEPS = 5
LIMIT_S = 600.0
"""A contestant that hangs ends the contest."""

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]


# ---------------------------------------------------------------- inside a training script


def process_start_s() -> float:
    """When the command was started, as a timestamp: the variable T0, else the start of this process."""
    import psutil

    return float(os.environ.get("T0", psutil.Process().create_time()))


class Clock:
    """Notes when each optimizer step ended.

    Args:
        start_s: timestamp of the start of the command.
    """

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.ends_s: list[float] = []
        self.rows: list[int] = []
        self.epochs: list[int] = []

    def step(self, epoch: int, rows: int) -> None:
        """Note that a step of this many rows, all workers together, has ended."""
        self.ends_s.append(time.time())
        if live := os.environ.get(STEPS_FOLDER):
            # One file a process, whose name is its number.
            with open(Path(live) / str(os.getpid()), "a") as file:
                file.write(f"{self.ends_s[-1]}\n")
        self.rows.append(rows)
        self.epochs.append(epoch)

    def result(self) -> dict[str, Any]:
        """The contestant's JSON object."""
        first = WARM_UP_STEPS - 1
        if len(self.ends_s) <= WARM_UP_STEPS:
            raise SystemExit(f"the run has {len(self.ends_s)} steps; it takes more than {WARM_UP_STEPS} to measure")
        per_epoch = []
        start = first
        for epoch in sorted(set(self.epochs)):
            end = max(step for step, of in enumerate(self.epochs) if of == epoch)
            if end > start:
                per_epoch.append(self._rows_per_s(start, end))
                start = end
        return {
            "seconds_to_first_step": round(self.ends_s[0] - self.start_s, 2),
            "rows_per_s": self._rows_per_s(first, len(self.ends_s) - 1),
            "rows_per_s_by_epoch": per_epoch,
            "seconds_to_last_step": round(self.ends_s[-1] - self.start_s, 2),
            "rows": sum(self.rows),
            "steps": len(self.rows),
        }

    def _rows_per_s(self, after: int, last: int) -> float:
        return round(sum(self.rows[after + 1 : last + 1]) / (self.ends_s[last] - self.ends_s[after]), 1)


def training_arguments(description: str) -> argparse.ArgumentParser:
    """The arguments that every training script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds train/*.parquet")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--global-batch-rows", type=int, default=120, help="rows of a step, all workers together")
    parser.add_argument("--width", type=int, default=32, help="width of the model")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--checkpoint-every-steps", type=int, default=0, help="0: none, and no restarts")
    parser.add_argument("--checkpoints", type=Path, help="folder for checkpoints that outlive a process")
    return parser


# ---------------------------------------------------------------- the contest


def contest_arguments(description: str) -> argparse.ArgumentParser:
    """The arguments of a contest: those of training, and how often to repeat it."""
    parser = training_arguments(description)
    parser.add_argument("--copies", type=int, default=15, help="times that each training file repeats its rows")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the medians are shown")
    parser.add_argument("--only", nargs="+", help="these contestants, raymill among them")
    parser.add_argument("--out", type=Path, help="file for every figure of every run, as JSON")
    return parser


@contextmanager
def enlarged(data: Path, copies: int) -> Iterator[Path]:
    """A folder with the same files, in which each training file repeats its rows this often.

    A set of a few thousand rows would measure little but the gaps between epochs.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory(prefix="raymill-benchmark-data-") as folder:
        for file in sorted(data.rglob("*.parquet")):
            target = Path(folder) / file.relative_to(data)
            target.parent.mkdir(exist_ok=True)
            table = pq.read_table(file)
            repeated = pa.concat_tables([table] * (copies if file.parent.name == "train" else 1))
            pq.write_table(repeated, target, row_group_size=pq.read_metadata(file).row_group(0).num_rows)
        yield Path(folder)


def contestants(options: argparse.Namespace, data: Path) -> dict[str, list[str]]:
    """Name -> command, all for the same model, optimizer, batch and files in `data`."""
    python = [sys.executable]
    torchrun = [*python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.workers}"]
    common = [
        f"--data={data}",
        f"--epochs={options.epochs}",
        f"--global-batch-rows={options.global_batch_rows}",
        f"--width={options.width}",
        f"--workers={options.workers}",
    ]
    settings = {
        "register": "null",
        "schedule": "null",
        "optimizer.lr": 1e-3,
        "data.root": data,
        "data.shift_pixels": 0,
        "model.width": options.width,
        "loop.epochs": options.epochs,
        "loop.global_batch_rows": options.global_batch_rows,
        "loop.threads": 1,
    }
    raymill = [*python, "-m", "raymill", "train", "jobs/mnist/job.yaml", "--json"]
    for path, value in settings.items():
        raymill += ["--set", f"{path}={value}"]
    by_torchrun = [*torchrun, str(HERE / "torchrun_way.py"), *common]
    all_of_them = {
        "raymill": [*raymill, f"--workers={options.workers}"],
        "in process": [*raymill, "--in-process"],
        "guide": [*python, str(HERE / "guide_way.py"), *common],
        "in memory": [*by_torchrun, "--in-memory"],
        "loader 0": [*by_torchrun, "--loader-workers=0"],
        "loader 1": [*by_torchrun, "--loader-workers=1"],
        "loader 2": [*by_torchrun, "--loader-workers=2"],
        "loader batched": [*by_torchrun, "--loader-workers=1", "--fetch=batch"],
    }
    return {name: command for name, command in all_of_them.items() if name in (options.only or all_of_them)}


Surroundings = Callable[[], AbstractContextManager[Mapping[str, str]]]
"""What must be there while a contestant runs, and the environment variables that lead to it."""


def run_rounds(
    commands: Mapping[str, Sequence[str]], repeats: int, surroundings: Mapping[str, Surroundings] | None = None
) -> list[dict[str, dict[str, Any]]]:
    """Run every command once a round, in turn, each in a state folder that lasts for the contest.

    Args:
        surroundings: for contestants that need some; made before each run of theirs and gone behind it.

    Returns:
        per round: contestant -> its JSON object.
    """
    rounds: list[dict[str, dict[str, Any]]] = []
    with environment() as variables:
        for number in range(1, repeats + 1):
            results = {}
            for name, command in commands.items():
                with (surroundings or {}).get(name, lambda: nullcontext({}))() as needed:
                    results[name] = run_once(name, command, {**variables, **needed})
                figures = {key: results[name][key] for key in ("seconds_to_first_step", "rows_per_s")}
                print(f"round {number}/{repeats}  {name:16}{figures}", file=sys.stderr, flush=True)
            rounds.append(results)
    return rounds


@contextmanager
def environment() -> Iterator[dict[str, str]]:
    """The environment of all commands of a contest, with folders that are gone behind it."""
    # Short, because Ray makes sockets in it. Where Ray keeps its own by default, a dead cluster's address may wait for
    # whoever comes next.
    with tempfile.TemporaryDirectory(prefix="rb-") as home:
        quiet = {"RAYMILL_HOME": home, "RAY_TMPDIR": home, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        # The scripts of others train the model of jobs/mnist too.
        yield {**os.environ, **quiet, "PYTHONPATH": str(PROJECT)}


def run_once(name: str, command: Sequence[str], variables: Mapping[str, str]) -> dict[str, Any]:
    """Run a command; returns its JSON object."""
    started = {**variables, "T0": str(time.time())}
    with subprocess.Popen(
        command, cwd=PROJECT, env=started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(
                f"{name} did not end within {LIMIT_S:g} s: {' '.join(command)}\n{process.communicate()[1][-4000:]}"
            ) from error
    if process.returncode != 0:
        raise SystemExit(f"{name} ended with {process.returncode}: {' '.join(command)}\n{err[-4000:]}")
    # The object is the last thing on stdout, on one line or several; only its own brace starts a line.
    result: dict[str, Any] = json.loads(out[f"\n{out}".rindex("\n{") :])
    return result


def report(rounds: Sequence[Mapping[str, Mapping[str, Any]]], figure: str, against: str, out: Path | None) -> None:
    """Print a table of medians and of ratios to one contestant, and write all figures to `out`.

    Args:
        rounds: what `run_rounds` returned.
        figure: the key that is compared.
        against: the contestant whose figure is the numerator of every ratio.
        out: file for the JSON, or None.
    """
    rows = []
    for name in rounds[0]:
        values = [results[name][figure] for results in rounds]
        ratios = [results[against][figure] / results[name][figure] for results in rounds]
        rows.append(
            {
                "contestant": name,
                "median": round(statistics.median(values), 2),
                "lowest": min(values),
                "highest": max(values),
                "ratio": round(statistics.median(ratios), 3),
            }
        )
    print(f"{figure}, {len(rounds)} rounds\n")
    print(f"{'contestant':16}{'median':>10}{'lowest':>10}{'highest':>10}{against + ' / it':>16}")
    for row in rows:
        print(f"{row['contestant']:16}{row['median']:>10}{row['lowest']:>10}{row['highest']:>10}{row['ratio']:>16}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"figure": figure, "table": rows, "rounds": rounds}, indent=2) + "\n")
