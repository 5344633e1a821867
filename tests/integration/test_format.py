"""Runs, checkpoints and versions that an earlier raymill wrote are read, gone on with, or refused with what to do."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import raymill
from integration.commands import PROJECT, Home
from pipelines.synthetic import make_blobs
from raymill.checkpoint.directory import WEIGHTS, verify
from raymill.checkpoint.weights_digest import file_weights_sha256
from raymill.config.plan import Plan
from raymill.config.spec import JobSpec
from raymill.files import FORMAT_VERSION, READABLE_VERSIONS, read_record
from raymill.models import registry
from raymill.trained.model import VERSION_FILES

DATA = Path(__file__).parents[1] / "data"
FORMATS = [f"format-{version}" for version in READABLE_VERSIONS]


@pytest.fixture(params=FORMATS)
def then(request: pytest.FixtureRequest) -> Path:
    """What a version of then wrote."""
    return DATA / str(request.param)


@pytest.fixture
def home(tmp_path: Path, then: Path) -> Home:
    """A home whose runs were made earlier."""
    shutil.copytree(then / "runs", tmp_path / "home" / "runs")
    return Home(tmp_path / "home")


def order(folder: Path) -> dict[int, list[int]]:
    """Position behind each step -> its rows."""
    return {line["position"]: line["rows"] for line in map(json.loads, (folder / "order-0.jsonl").read_text().splitlines())}


def test_a_run_that_was_killed_then_goes_on_now(home: Home, then: Path) -> None:
    run, finished = home.path / "runs" / "smoke-killed", then / "runs" / "smoke-finished"
    # The code of the job may have changed since.
    summary = home.json("train", "--json", "--resume", run.name, "--in-process", "--accept-code-changes")
    assert (summary["status"], summary["attempts"], summary["steps"]) == ("finished", 2, 20)
    assert summary["rows"] == {"used": 1200, "skipped": 0, "remaining": 0, "total": 1200}
    assert order(run) == order(finished)

    (last,), (expected,) = run.glob("checkpoints/step-00000020.*"), finished.glob("checkpoints/step-00000020.*")
    # The machine that made them may have computed with other kernels than this one; on that machine they were equal bit for bit.
    torch.testing.assert_close(load_file(last / WEIGHTS), load_file(expected / WEIGHTS))


def test_runs_of_then_are_listed_shown_and_evaluated(home: Home, then: Path) -> None:
    listed = {run["run_id"]: run["status"] for run in home.json("runs", "list", "--json")["runs"]}
    assert listed == {"smoke-finished": "finished", "smoke-killed": "interrupted"}
    assert home.json("runs", "show", "smoke-finished", "--json")["step"] == 20
    measured = home.json("evaluate", "smoke-finished", "--json")["metrics"]
    assert measured == pytest.approx(read_record(then / "runs" / "smoke-finished" / "summary.json")["metrics"])


def test_the_files_of_a_version_of_then_are_read(then: Path) -> None:
    files = then / "model_version"
    verify(files, VERSION_FILES)
    spec = JobSpec.model_validate(read_record(files / "spec.json"))
    assert (spec.name, spec.register_ and spec.register_.model) == ("smoke", "blobs")
    assert Plan.from_record(read_record(files / "plan.json")).total_steps == 20
    assert {name: value.shape for name, value in load_file(files / WEIGHTS).items()}


def test_a_version_of_then_is_loaded_and_asked(then: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = then / "model_version"
    known = registry.ModelVersion("blobs", 1, None, "smoke-finished", {}, str(file_weights_sha256(files / WEIGHTS)))
    monkeypatch.setattr(registry, "resolve", lambda reference: known)
    monkeypatch.setattr(registry, "model_files", lambda version: files)
    monkeypatch.chdir(PROJECT)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was trained with other code than today's")
        model = raymill.model("blobs/1")
    rows = make_blobs(50, 3, 8, 0, seed=0, stream=1)
    scores = np.asarray(model.predict({"features": rows["features"]})["output"])
    assert (scores.argmax(axis=1) == rows["label"]).mean() > 0.9


@pytest.mark.parametrize("record", ["spec.json", "data_manifest.json", "events.jsonl"])
def test_a_run_of_a_newer_raymill_is_refused_and_says_so(home: Home, record: str) -> None:
    file = home.path / "runs" / "smoke-killed" / record
    newer, count = re.subn(r'"format_version": ?\d+', f'"format_version": {FORMAT_VERSION + 1}', file.read_text())
    assert count
    file.write_text(newer)
    code, _, stderr = home.run("train", "--resume", "smoke-killed", "--in-process", "--accept-code-changes")
    assert code == 2, stderr
    assert "written by a newer raymill: use that version" in " ".join(stderr.split())
    assert record in stderr
    assert "Traceback" not in stderr
