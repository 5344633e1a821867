"""What only a GPU shows; where there is none, each test says so. `make gpu` runs them.

Runs of jobs/mnist in a process of their own, killed and taken up again.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from integration.commands import PROJECT, Home, wait_until
from jobs.mnist.model import Cnn
from raymill.paths import data_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here: these show what only a GPU does")

ON_GPU = (
    "--in-process",
    "--json",
    "--set",
    "scale.gpus_per_worker=1",
    "--set",
    "register=null",
    "--set",
    "checkpoint.every_steps=5",
)
PRECISIONS = ("fp32", "bf16", "fp16")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    (tmp_path / "home" / "data").mkdir(parents=True)
    os.symlink(PROJECT / ".raymill" / "data" / "mnist", tmp_path / "home" / "data" / "mnist")
    return Home(tmp_path / "home")


def options(**fields: object) -> list[str]:
    return [part for name, value in fields.items() for part in ("--set", f"loop.{name}={json.dumps(value)}")]


def order_of(home: Home, run_id: str) -> list[Any]:
    lines = (home.path / "runs" / run_id / "order-0.jsonl").read_text().splitlines()
    return [(entry["position"], entry["rows"]) for entry in map(json.loads, lines)]


def test_rows_come_in_the_same_order_as_on_a_cpu(home: Home) -> None:
    record = options(record_order=True, epochs=1)
    on_gpu = home.json("train", "mnist", *ON_GPU, *record)
    on_cpu = home.json("train", "mnist", "--in-process", "--json", "--set", "register=null", *record)
    assert order_of(home, on_gpu["run_id"]) == order_of(home, on_cpu["run_id"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_killed_and_taken_up_again_it_ends_with_the_same_weights(home: Home, precision: str) -> None:
    whole = home.json("train", "mnist", *ON_GPU, *options(precision=precision))
    again = home.json("train", "mnist", *ON_GPU, *options(precision=precision))
    assert again["weights_sha256"] == whole["weights_sha256"], "two runs that nothing disturbs"
    before = set((home.path / "runs").iterdir())
    process = home.start("train", "mnist", *ON_GPU, *options(precision=precision))
    wait_until(lambda: bool(new := set((home.path / "runs").iterdir()) - before) and _saved(new.pop()), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (run,) = set((home.path / "runs").iterdir()) - before
    resumed = home.json("train", "--resume", run.name, "--in-process", "--json")
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def _saved(run: Path) -> bool:
    return len(list((run / "checkpoints").glob("step-*"))) >= 2


def test_rows_per_second_beside_plain_pytorch(home: Home) -> None:
    raymill = [home.json("train", "mnist", *ON_GPU, *options(epochs=5))["rows_per_s"] for _ in range(3)]
    plain = [_plain_rows_per_s() for _ in range(3)]
    medians = f"raymill {sorted(raymill)[1]:,.0f} rows/s, plain PyTorch {sorted(plain)[1]:,.0f} rows/s"
    print(f"\n{torch.cuda.get_device_name()}: {medians}")
    assert min(raymill) > 0


def _plain_rows_per_s(num_steps: int = 350, batch_rows: int = 64) -> float:
    """The same model and batch size, with all rows on the GPU."""
    assert data_folder("mnist")
    model = Cnn(16, 10).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.rand(4500, 1, 28, 28, device="cuda"), torch.randint(0, 10, (4500,), device="cuda")
    for step in range(num_steps + 20):
        if step == 20:
            torch.cuda.synchronize()
            began_s = time.perf_counter()
        rows = torch.randint(0, 4500, (batch_rows,), device="cuda")
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    torch.cuda.synchronize()
    return num_steps * batch_rows / (time.perf_counter() - began_s)
