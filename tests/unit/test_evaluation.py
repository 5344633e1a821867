"""A trained model, measured again: the numbers of its run, each row once, and only from what is whole."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymill.checkpoint import snapshot
from raymill.checkpoint.commit import commit
from raymill.checkpoint.snapshot import Snapshot
from raymill.config import load
from raymill.config.plan import ClusterFacts, make_plan
from raymill.config.spec import JobSpec
from raymill.data.feed import Feed
from raymill.data.manifest import take_manifest
from raymill.data.order import Item
from raymill.errors import CheckpointError, InputError
from raymill.evaluation.sums import Evaluation, as_numbers
from raymill.files import FORMAT_VERSION, write_record
from raymill.models.evaluate import evaluate
from raymill.record.folder import RunFolder, run_folder
from raymill.record.store import LocalRunStore
from raymill.training.assembly import WorkerContext, assemble
from raymill.training.evaluation_pass import evaluate_batch

CODE = """
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Pipeline, Task, Total

ROWS = {"train": 60, "validation": 47}


def make(split):
    generator = np.random.default_rng(len(split))
    x = generator.normal(size=(ROWS[split], 5)).astype(np.float32)
    return {"x": x, "label": (x.sum(axis=1) > 0).astype(np.int64)}


def noisy(rows, split, generator):
    return {**rows, "x": rows["x"] + generator.normal(0, 0.1, rows["x"].shape).astype(np.float32)}


def points(validate: bool = True) -> Pipeline:
    splits = ROWS if validate else ["train"]
    schema = {"x": Field("float32", (5,)), "label": Field("int64", classes=2)}
    return Pipeline(
        sources={split: ArraySource(split, partial(make, split), 4) for split in splits}, schema=schema, transform=noisy
    )


class Net(Task):
    def __init__(self, width: int = 6):
        self.width = width

    def build(self):
        return nn.Sequential(nn.Linear(5, self.width), nn.BatchNorm1d(self.width), nn.Linear(self.width, 2))

    def evaluate(self, model, batch):
        scores = model(batch["x"])
        return {
            "loss": functional.cross_entropy(scores, batch["label"], reduction="none"),
            "accuracy": (scores.argmax(dim=1) == batch["label"]).float(),
            "luck": torch.rand(len(scores)),
            "times_seen": Total(torch.bincount(batch["__row__"], minlength=ROWS["validation"])),
        }
"""

JOB = {
    "name": "measured",
    "task": "measured.code:Net",
    "pipeline": "measured.code:points",
    "optimizer": {"kind": "SGD", "lr": 0.1},
    "loop": {"global_batch_rows": 10, "seed": 3, "threads": 1},
    "scale": {"workers": 2},
}
FACTS = ClusterFacts(num_cpus=2, num_gpus=0, memory_bytes=2**33)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "project"
    (root / "jobs").mkdir(parents=True)
    (root / "measured").mkdir()
    (root / "measured/code.py").write_text(CODE)
    (root / "pyproject.toml").write_text('[tool.raymill]\npackages = ["measured"]\n')
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("measured", "measured.code"):
        monkeypatch.delitem(sys.modules, name, raising=False)


class Run:
    """The folder of a run on two workers that has not saved anything yet."""

    def __init__(self, **changes: Any) -> None:
        self.folder: RunFolder = run_folder("measured-1")
        self.folder.checkpoints.mkdir(parents=True)
        self.spec = JobSpec.model_validate(JOB | changes)
        self.pipeline = load.import_pipeline(self.spec)
        self.manifest = take_manifest(self.pipeline)
        self.plan = make_plan(self.spec, self.manifest, FACTS)
        self.job = assemble(self.spec, self.plan, self.manifest, self.pipeline, world_size=2)
        write_record(self.folder.spec, load.resolved(self.spec))
        write_record(self.folder.plan, self.plan.as_record())

    def save(self, step: int, seed: int, *, best: bool) -> torch.nn.Module:
        """Save a model with weights drawn by the seed; as the best, or only as the newest, checkpoint."""
        torch.set_num_threads(self.plan.threads)
        torch.manual_seed(seed)
        model = self.job.task.build()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.1)
        taken = snapshot.content(Snapshot(model.state_dict(), {}, {"step": step, "position": 10 * step}), best=best)
        commit(self.folder.checkpoints, 1, 10, taken, best=best)
        return model

    def recorded(self, model: torch.nn.Module, epoch: int) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
        """What the run's two workers find after an epoch."""
        reader = self.job.reader("run")
        evaluations = []
        for rank in range(2):
            windows = [Item("validation", epoch, window, 0) for window in range(self.plan.validation_windows)]
            feed = Feed(packet for item in windows for packet in reader.read(item) if packet.rank == rank)
            store = LocalRunStore(self.folder, rank)
            context = WorkerContext(rank=rank, world_size=2, device=torch.device("cpu"), store=store)
            evaluations.append(Evaluation())
            for number in range(5):
                evaluate_batch(self.job, context, model, feed, "validation", epoch, number, evaluations[-1])
        return evaluations[0].reduce(lambda mine: [mine, flat(evaluations[1])])


def flat(evaluation: Evaluation) -> torch.Tensor:
    """What a rank sends to the others."""
    sent: list[torch.Tensor] = []
    evaluation.reduce(lambda mine: [sent.append(mine) or mine])  # type: ignore[func-returns-value]
    return sent[0]


def test_the_best_checkpoint_gives_the_numbers_that_the_workers_of_its_run_found() -> None:
    run = Run()
    best = run.save(6, seed=1, best=True)
    run.save(12, seed=2, best=False)
    values, totals, rows = run.recorded(best, epoch=3)
    found = evaluate("measured-1")
    assert (found["model"], found["run_id"], found["rows"]) == ("measured-1", "measured-1", rows)
    assert found["metrics"]["validation/accuracy"] == values["accuracy"]
    # Ranks are added in another order than batches: the last digits of the float64 sums may differ.
    assert found["metrics"] == pytest.approx({f"validation/{name}": value for name, value in values.items()}, rel=1e-12)
    assert found["totals"] == {f"validation/{name}": as_numbers(total) for name, total in totals.items()}
    assert evaluate("measured-1") == found


def test_every_row_is_measured_once() -> None:
    run = Run()
    run.save(6, seed=1, best=True)
    found = evaluate("measured-1")
    assert found["rows"] == 47
    assert found["totals"]["validation/times_seen"] == [1] * 47


def test_without_a_best_checkpoint_the_newest_is_measured() -> None:
    run = Run()
    run.save(6, seed=1, best=False)
    newest = run.save(12, seed=2, best=False)
    assert evaluate("measured-1")["metrics"]["validation/loss"] == pytest.approx(run.recorded(newest, 0)[0]["loss"])


def test_rows_are_measured_once_also_in_windows_of_another_size() -> None:
    run = Run()
    run.save(6, seed=1, best=True)
    write_record(run.folder.plan, replace(run.plan, window_rows=1000).as_record())
    assert evaluate("measured-1")["totals"]["validation/times_seen"] == [1] * 47


def test_a_damaged_checkpoint_is_refused() -> None:
    run = Run()
    run.save(6, seed=1, best=True)
    weights = next(run.folder.checkpoints.glob("step-*/weights.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        evaluate("measured-1")


def test_weights_of_another_model_than_the_task_builds_now_are_refused() -> None:
    run = Run()
    run.save(6, seed=1, best=True)
    write_record(run.folder.spec, load.resolved(JobSpec.model_validate(JOB | {"model": {"width": 7}})))
    with pytest.raises(CheckpointError, match="does not fit"):
        evaluate("measured-1")


def test_the_records_of_another_version_of_raymill_are_refused() -> None:
    run = Run()
    run.save(6, seed=1, best=True)
    write_record(run.folder.plan, {**run.plan.as_record(), "num_moons": 2})
    with pytest.raises(CheckpointError, match="num_moons"):
        evaluate("measured-1")
    run.folder.plan.write_text(json.dumps({"format_version": FORMAT_VERSION + 1, **run.plan.as_record()}))
    with pytest.raises(InputError, match=r"plan\.json: found format_version 3; .* newer raymill"):
        evaluate("measured-1")


def test_a_run_that_saved_nothing_yet_is_refused_with_the_way_on() -> None:
    Run()
    with pytest.raises(InputError, match="--resume measured-1"):
        evaluate("measured-1")


def test_a_job_without_validation_rows_cannot_be_measured() -> None:
    run = Run(data={"validate": False})
    run.save(6, seed=1, best=True)
    with pytest.raises(InputError, match="validation"):
        evaluate("measured-1")
