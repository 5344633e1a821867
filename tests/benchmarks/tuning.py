"""Trials a minute: `raymill tune` beside Ray Tune with a TorchTrainer as its guide shows it, plain functions, and plain Optuna.

    python tests/benchmarks/tuning.py [--trials 60] [--seconds 0.2 | --mnist] [--only NAME ...] [--out FILE]

Each trial computes for so many seconds and reports one number, in every contestant; with --mnist (`raymill data get mnist`
first) it is one epoch of jobs/mnist and an evaluation, on one thread. What is measured is from the command to its end, with all
that starts; a whole run of raymill (its folder, events, a checkpoint, an evaluation) is in each of its trials.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

SPIN = """
import time

def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
"""

TASK = """
import torch
from torch import nn
from raymill.task import Task

{spin}

class Spin(Task):
    def __init__(self, seconds: float = 0.2, x: float = 0.0) -> None:
        self.seconds, self.x = seconds, x

    def build(self):
        return nn.Linear(2, 1)

    def loss(self, model, batch):
        spin(self.seconds)
        return model(batch["x"]).square().mean()

    def evaluate(self, model, batch):
        return {{"score": torch.full((len(batch["x"]),), 1 - (self.x - 0.3) ** 2)}}
"""

PIPELINE = """
import numpy as np
from raymill.data.sources import ArraySource
from raymill.task import Field, Pipeline

def rows():
    return {"x": np.zeros((8, 2), np.float32)}

def few() -> Pipeline:
    source = ArraySource("few", rows, 8)
    return Pipeline(sources={"train": source, "validation": source}, schema={"x": Field("float32", (2,))})
"""

JOB = """
name: spin
task: jobs.spin.task:Spin
pipeline: pipelines.few:few
model: {{seconds: {seconds}}}
optimizer: {{kind: SGD, lr: 0.1}}
loop: {{epochs: 1, global_batch_rows: 8}}
search:
  metric: validation/score
  mode: max
  trials: {trials}
  space: {{model.x: {{kind: uniform, low: 0.0, high: 1.0}}}}
"""

EPOCH = """
import sys
sys.path.insert(0, {project!r})

def epoch_of_mnist(x):
    import numpy as np, pyarrow.parquet as pq, torch
    from torch.nn import functional
    from jobs.mnist.model import Cnn
    global SPLITS
    if "SPLITS" not in globals():
        # Once in a process, as whoever writes this by hand does.
        SPLITS = {{}}
        for split in ("train", "validation"):
            table = pq.read_table({data!r} + "/" + split)
            pixels = np.stack([np.frombuffer(one, np.uint8) for one in table["image"].to_pylist()])
            images = torch.from_numpy(pixels.reshape(-1, 1, 28, 28).astype(np.float32) / 255)
            SPLITS[split] = images, torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Cnn(32, 10)
    images, labels = SPLITS["train"]
    steps = -(-len(images) // 120)
    optimizer = torch.optim.AdamW(model.parameters(), lr=10 ** (x - 3), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 10 ** (x - 3), total_steps=steps)
    order = torch.randperm(len(images))
    for step in range(steps):
        rows = order[step * 120:(step + 1) * 120]
        shifted = torch.roll(images[rows], tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
        optimizer.zero_grad()
        functional.cross_entropy(model(shifted), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    images, labels = SPLITS["validation"]
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())
"""

SPUN = """
{spin}

def trial_of(x):
    spin({seconds})
    return 1 - (x - 0.3) ** 2
"""

HEAD = """
import os, sys, tempfile, logging
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AIR_NEW_OUTPUT="0")
"""

CONTESTANTS = {
    "optuna, one process": """
import optuna
optuna.logging.set_verbosity(optuna.logging.WARNING)
def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    return trial_of(x)
optuna.create_study(direction="maximize").optimize(objective, n_trials={trials})
""",
    "tune, function": """
from ray import tune
def train(config):
    tune.report({{"score": trial_of(config["x"])}})
tune.Tuner(train, param_space={{"x": tune.uniform(0, 1)}},
           tune_config=tune.TuneConfig(metric="score", mode="max", num_samples={trials}),
           run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(), verbose=0)).fit()
""",
    "tune, reuse_actors": """
from ray import tune
class Train(tune.Trainable):
    def setup(self, config): self.x = config["x"]
    def step(self):
        return {{"score": trial_of(self.x), "done": True}}
    def reset_config(self, config):
        self.x = config["x"]
        return True
    def save_checkpoint(self, folder): pass
    def load_checkpoint(self, folder): pass
tune.Tuner(Train, param_space={{"x": tune.uniform(0, 1)}},
           tune_config=tune.TuneConfig(metric="score", mode="max", num_samples={trials}, reuse_actors=True),
           run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(), verbose=0)).fit()
""",
    "tune, TorchTrainer": """
import ray
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
def loop(config):
    ray.train.report({{"score": trial_of(config["x"])}})
def driver(config):
    TorchTrainer(loop, train_loop_config=config, scaling_config=ray.train.ScalingConfig(num_workers=1),
                 run_config=ray.train.RunConfig(name=tune.get_context().get_trial_id(), storage_path=tempfile.mkdtemp(),
                                                callbacks=[TuneReportCallback()])).fit()
tune.Tuner(driver, param_space={{"x": tune.uniform(0, 1)}},
           tune_config=tune.TuneConfig(metric="score", mode="max", num_samples={trials}, max_concurrent_trials=1),
           run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(), verbose=0)).fit()
""",
}

SLOW = "tune, TorchTrainer"
SLOW_TRIALS = 3


PROJECT = Path(__file__).parents[2]

MNIST_SEARCH = {
    "metric": "validation/accuracy",
    "mode": "max",
    "workers": 1,
    "space": {"schedule.max_lr": {"kind": "loguniform", "low": 1e-3, "high": 1e-2}},
}


def raymill(folder: Path, trials: int, seconds: float) -> list[str]:
    """A project with the job; the command that searches."""
    for name in ("jobs/spin", "pipelines"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    (folder / "jobs" / "__init__.py").touch()
    (folder / "pyproject.toml").write_text("[tool.raymill]\n")
    (folder / "jobs/spin/task.py").write_text(TASK.format(spin=SPIN))
    (folder / "pipelines/few.py").write_text(PIPELINE)
    (folder / "jobs/spin/job.yaml").write_text(JOB.format(trials=trials, seconds=seconds))
    return [sys.executable, "-m", "raymill", "tune", "spin", "--json"]


def raymill_on_mnist(trials: int) -> list[str]:
    """The command that searches with the real job, an epoch a trial."""
    values = {
        "search": json.dumps({**MNIST_SEARCH, "trials": trials, "sampler": {"kind": "tpe"}}),
        "loop.epochs": "1",
        "data.root": str(PROJECT / ".raymill" / "data" / "mnist"),
        "register": "null",
    }
    sets = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "raymill", "tune", "mnist", "--new", "--json", *sets]


def measure(name: str, trials: int, seconds: float | None) -> dict[str, float]:
    """Seconds of one contestant, and its trials a minute.

    Args:
        seconds: that a trial computes; None: an epoch of mnist.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        variables = {**os.environ, "RAYMILL_HOME": str(folder / "home")}
        if name == "raymill tune":
            command = raymill_on_mnist(trials) if seconds is None else raymill(folder, trials, seconds)
        else:
            trials = min(trials, SLOW_TRIALS) if name == SLOW else trials
            if seconds is None:
                work = (
                    EPOCH.format(project=str(PROJECT), data=str(PROJECT / ".raymill/data/mnist")) + "trial_of = epoch_of_mnist\n"
                )
            else:
                work = SPUN.format(spin=SPIN, seconds=seconds)
            (folder / "contestant.py").write_text(HEAD + work + textwrap.dedent(CONTESTANTS[name]).format(trials=trials))
            command = [sys.executable, str(folder / "contestant.py")]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=PROJECT if seconds is None else folder, capture_output=True, text=True, env=variables)
        took_s = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-3000:]}")
        return {"trials": trials, "seconds": round(took_s, 1), "per_minute": round(60 * trials / took_s, 1)}


def main() -> None:
    """Measure all in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--mnist", action="store_true", help="an epoch of jobs/mnist in place of seconds")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.only or ["raymill tune", *CONTESTANTS]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name].append(measure(name, options.trials, None if options.mnist else options.seconds))
            print(f"{name:24} {found[name][-1]}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
