"""docs/troubleshooting.md speaks of messages that there are: each is provoked here."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray.exceptions
from ray.train import WorkerGroupError

from mistakes import MISTAKES, Mistake
from probes.mixed import VALUES, Mixed, pipeline_with_nan
from raymill import api, files
from raymill.checkpoint import snapshot
from raymill.checkpoint.commit import commit
from raymill.checkpoint.snapshot import Snapshot
from raymill.config import load, resumed
from raymill.config.plan import ClusterFacts, make_plan
from raymill.config.spec import JobSpec
from raymill.data import manifest
from raymill.data.bad_rows import check_values, read_good_rows
from raymill.data.manifest import Manifest, SplitManifest
from raymill.data.sources import ArraySource, ParquetSource, write_parquet
from raymill.errors import InputError, WorkerError
from raymill.models import registry
from raymill.models.find import find_model
from raymill.orchestration.on_ray.root_cause import root_cause
from raymill.orchestration.prepare import prepare_resume
from raymill.own_code.traces import for_a_journey
from raymill.record.events import AttemptStarted, RunFinished, append_event
from raymill.record.folder import run_folder
from raymill.record.stacks import RankSeen, explain
from raymill.task import Field, Fragment, Pipeline, Rows
from raymill.tracking import mlflow_client
from worker_harness import Experiment, Start, run_rank

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
FACTS = ClusterFacts(num_cpus=4, num_gpus=0, memory_bytes=2**33)
SCHEMA = {"label": Field("int64", classes=3)}

Provoke = Callable[[], object]


@pytest.fixture
def provoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Provoke]:
    """What to do for each group of messages."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return {
        "The job file": lambda: wrong_jobs(root),
        "Before the first step": lambda: mistakes(root, monkeypatch),
        "A run": lambda: failures(tmp_path),
        "Data": lambda: wrong_data(tmp_path),
        "Going on with a run": lambda: wrong_resumes(tmp_path),
        "Tracking and registry": lambda: wrong_stores(tmp_path, monkeypatch),
    }


def test_each_message_of_the_page_is_one_that_there_is(provoked: dict[str, Provoke]) -> None:
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE.read_text(), re.MULTILINE))
    assert sections.keys() == provoked.keys()
    for title, text in sections.items():
        said = [str(message) for message in provoked[title]()]  # type: ignore[attr-defined]
        quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
        assert len(quoted) >= 4
        for pattern in quoted:
            wanted = ".*".join(map(re.escape, pattern.split("...")))
            assert any(re.search(wanted, message, re.DOTALL) for message in said), (pattern, said)


def caught(call: Callable[[], object]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


# ---------------------------------------------------------------- what provokes them


def wrong_jobs(root: Path) -> Iterator[Exception]:
    Mistake("none").write(root)
    yield caught(lambda: load.find_job("tinny"))
    for override in ("loop.epoch=1", "optimizer.kind=SDG", "data.password=secret"):
        yield caught(lambda: load.load_job("tiny", [override]))  # noqa: B023
    yield caught(lambda: api.load("tiny", loop__global_batch_rows=15).check())


def mistakes(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Exception]:
    for mistake in MISTAKES:
        for name in ("tiny", "tiny.code", "tiny.beside"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        mistake.write(root)
        yield caught(lambda: api.load("tiny").check(run=True))


def failures(folder: Path) -> Iterator[object]:
    def own() -> None:
        raise LookupError("no luck")

    yield for_a_journey(caught(own), "rank 1", 1)
    yield for_a_journey(caught(own), "reading the data")
    spoiled = Experiment(Mixed, pipeline_with_nan, VALUES | {"loop": {**VALUES["loop"], "on_nan": "stop"}, "checkpoint": {}})
    folder.mkdir(exist_ok=True)
    yield caught(lambda: run_rank(0, 1, 0, spoiled, Start(folder, 1, None, None, warm_up=True)))
    for failure in (ray.exceptions.ActorDiedError(), MemoryError()):
        yield root_cause(WorkerGroupError("training failed", {1: failure}))
    yield explain([RankSeen(0, 10, "running", "sleep (task.py:3)")], 61, 7)
    with files.run_lock(folder / "driver.lock"):
        yield caught(lambda: hold(folder / "driver.lock"))


def hold(path: Path) -> None:
    with files.run_lock(path):
        pass


def labels(*values: int) -> Rows:
    return {"label": np.array(values, np.int64)}


def wrong_data(folder: Path) -> Iterator[Exception]:
    write_parquet(folder / "whole", labels(0, 1, 2), SCHEMA, num_shards=1, row_group_rows=4)
    (shard,) = (folder / "whole").glob("*.parquet")
    other = Pipeline(sources={"train": ParquetSource(str(folder / "whole"), {"lable": SCHEMA["label"]})}, schema={})
    yield caught(lambda: manifest.take_manifest(other))
    shard.write_bytes(shard.read_bytes()[:-20])
    yield caught(lambda: ParquetSource(str(folder / "whole"), SCHEMA).fragments())
    source = ArraySource("made", partial(labels, 0, 7), 2)
    refusing = Pipeline(sources={"train": source}, schema=SCHEMA, check=partial(check_values, schema=SCHEMA))
    (fragment,) = source.fragments()
    yield caught(lambda: read_good_rows(refusing, "train", fragment, lenient=False))
    longer = Fragment(fragment.path, fragment.part, 3, 0, fragment.identity)
    yield caught(lambda: read_good_rows(refusing, "train", longer, lenient=False))


def wrong_resumes(folder: Path) -> Iterator[Exception]:
    finished = run_folder("tiny-1")
    finished.path.mkdir(parents=True)
    start = {"num_workers": 1, "step": 0, "num_total_steps": 1, "resumed": False, "notes": (), "pid": 1, "process_started_s": 0.0}
    append_event(finished, AttemptStarted(attempt=1, **start))  # type: ignore[arg-type]
    append_event(finished, RunFinished(best_checkpoint=None, metrics={}))
    files.write_record(finished.spec, {"name": "tiny"})
    yield caught(lambda: prepare_resume("tiny-1", None, FACTS))
    spec = JobSpec.model_validate({"name": "a", "task": "a:B", "pipeline": "a:b", "optimizer": {"kind": "SGD"}})
    yield caught(lambda: resumed.changed(load.resolved(spec), ["loop.seed=1"]))
    before, after = (Manifest({"train": SplitManifest((Fragment("f", 0, rows, 1, str(rows)),))}) for rows in (1, 2))
    yield InputError(manifest.differences(before, after))
    (folder / "record.json").write_text('{"format_version": 9}')
    yield caught(lambda: files.read_record(folder / "record.json"))


@contextmanager
def unreachable() -> Iterator[None]:
    raise OSError("connection refused")
    yield


def wrong_stores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Exception]:
    import torch

    yield caught(lambda: registry.resolve("tiny@candidate"))
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        patched.setattr(registry, "mlflow_settings", unreachable)
        yield caught(registry.list_models)
    spec = JobSpec.model_validate({"name": "a", "task": "a:B", "pipeline": "a:b", "optimizer": {"kind": "SGD"}})
    run = run_folder("tiny-2")
    run.checkpoints.mkdir(parents=True)
    files.write_record(run.spec, load.resolved(spec))
    taken = Manifest({"train": SplitManifest((Fragment("f", 0, 100, 1, ""),))})
    files.write_record(run.plan, make_plan(spec, taken, FACTS).as_record())
    saved = Snapshot({"weight": torch.ones(2)}, {}, {"step": 1, "position": 1})
    name = commit(run.checkpoints, 1, 1, snapshot.content(saved, best=True), best=True)
    trained = find_model("tiny-2")
    trained.weights.write_bytes((run.checkpoints / name / "weights.safetensors").read_bytes()[:-8] + b"\0" * 8)
    yield caught(trained.load_weights)
    with monkeypatch.context() as patched:
        patched.setenv("RAYMILL_HOME", str(folder / "50%"))
        yield InputError(mlflow_client.store_problems())


def test_what_the_page_says_of_going_on_is_so() -> None:
    assert "loop.on_nan" in resumed.MAY_CHANGE
    assert isinstance(for_a_journey(caught(lambda: {}["x"]), "rank 0"), WorkerError)
