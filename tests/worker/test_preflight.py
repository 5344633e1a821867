"""A user's mistakes, found by a few rows before a run: each with its line, what was found and expected, and what to do."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from mistakes import BUILD, LOSS, MISTAKES, Mistake
from probes import detector, gan, language, mixed
from raymill.cli.app import app
from raymill.config.plan import ClusterFacts, make_plan
from raymill.data.manifest import take_manifest
from raymill.errors import InputError
from raymill.preflight.trial import find_problems
from raymill.task import Schema
from raymill.training.assembly import Job, assemble
from worker_harness import Experiment, NewRun, Start, run_rank


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("tiny", "tiny.code", "tiny.beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return root


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def problems_of(result: Result) -> list[dict[str, str]]:
    found: dict[str, Any] = json.loads(result.stdout)
    return list(found["problems"])


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_found_with_its_line_what_was_expected_and_what_to_do(mistake: Mistake, project: Path) -> None:
    mistake.write(project)
    begun_s = time.perf_counter()
    result = run("check", "tiny", "--run", "--json")
    print(f"{time.perf_counter() - begun_s:.2f} s  {mistake.name}")
    assert result.exit_code == 2, result.stderr
    (problem, *others) = problems_of(result)
    assert others == [], "one mistake is told once"
    if mistake.field:
        assert re.fullmatch(rf"jobs/tiny/job.yaml:\d+ {mistake.field}", problem["where"])
    elif mistake.line:
        assert mistake.place(project) in problem["where"]
        assert mistake.line.rstrip(":") in problem["where"]
    assert re.search(mistake.found, problem["found"]), problem
    assert mistake.fix in problem["fix"] or re.search(mistake.fix, problem["fix"]), problem
    assert problem["expected"]
    assert "Traceback" not in result.stderr
    assert not (project / ".raymill").exists()


def test_all_mistakes_are_found_at_once(project: Path) -> None:
    wrong = [(LOSS, LOSS.replace('"label"', '"weight"')), (".float(), ", ".float().mean(), ")]
    Mistake("several", wrong, job=[("lr: 0.1,", "lr: -0.1,")]).write(project)
    found = [problem["found"] for problem in problems_of(run("check", "tiny", "--run", "--json"))]
    assert [text.partition(":")[0] for text in found] == ["ValueError", "KeyError", "'accuracy'"]


# ---------------------------------------------------------------- jobs that are right

FIXED_SIZE = Mistake(
    "a batch of one size, in a job whose batches have that size",
    [(LOSS, "        return scores.view(8, 3).mean()\n"), ('"train": 50', '"train": 48')],
)
WHOLE_WINDOWS = Mistake(
    "a transform that needs more rows than a fragment has",
    [
        (
            "    return rows\n\n\ndef collate",
            "    generator.choice(len(rows['x']), 14, replace=False)\n    return rows\n\n\ndef collate",
        ),
        ('"validation": 10', '"validation": 20'),
    ],
    # Nobody could ask its model about a row or two.
    job=[("register: {model: tiny}\n", "")],
)
SPOILED = Mistake(
    "rows that are not numbers, in a job that leaves them out",
    [('    return {"x": x,', '    x[:] = np.nan\n    return {"x": x,')],
    job=[("threads: 1}", "threads: 1, on_nan: skip}")],
)
SPARE = """\
        model = nn.Sequential(nn.Linear(2, 3))
        model.spare = nn.Linear(2, 2)
        model.forward = model[0].forward
        return model
"""
LEFT_OUT = Mistake("a parameter that the loss leaves out", [(BUILD, SPARE)])


@pytest.mark.parametrize("right", [Mistake("none"), FIXED_SIZE, WHOLE_WINDOWS, SPOILED, LEFT_OUT], ids=lambda right: right.name)
def test_a_job_that_would_run_is_not_refused(right: Mistake, project: Path) -> None:
    right.write(project)
    result = run("check", "tiny", "--run", "--json")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("make_task", "make_pipeline", "values"),
    [
        (gan.Points, gan.pipeline, gan.VALUES),
        (detector.Boxes, detector.pipeline, detector.VALUES),
        (language.NextWord, language.pipeline, language.VALUES),
        (mixed.Mixed, mixed.pipeline, mixed.VALUES),
        (mixed.Mixed, mixed.pipeline, {**mixed.VALUES, "loop": {**mixed.VALUES["loop"], "strict": True}}),
        (mixed.Mixed, mixed.pipeline_with_nan, {**mixed.VALUES, "checkpoint": {}}),
    ],
    ids=["gan", "detector", "language", "mixed", "strict", "nan in the rows"],
)
def test_whatever_is_trained_nothing_is_wrong_with_it(make_task: Any, make_pipeline: Any, values: dict[str, Any]) -> None:
    assert find_problems(job_of(Experiment(make_task, make_pipeline, values))) == []


def job_of(experiment: Experiment, num_workers: int = 2, **scale: int) -> Job:
    spec, pipeline = experiment.spec(num_workers), experiment.make_pipeline()
    spec = spec.model_copy(update={"scale": spec.scale.model_copy(update=scale)})
    manifest = take_manifest(pipeline)
    planned = make_plan(spec, manifest, ClusterFacts(num_cpus=8, num_gpus=8, memory_bytes=2**32))
    return assemble(spec, planned, manifest, pipeline, num_workers, lambda: experiment.make_task(pipeline.schema))


class Unlucky(mixed.Mixed):
    """Goes wrong in its fifth step, or its second evaluation."""

    def __init__(self, schema: Schema, what: str = "loss") -> None:
        super().__init__(schema)
        self.what, self.num_calls = what, 0

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        self.num_calls += self.what == "loss"
        if self.num_calls > 8:
            raise LookupError("no luck")
        return super().loss(model, batch)

    def evaluate(self, model: torch.nn.Module, batch: Any) -> dict[str, Any]:
        self.num_calls += self.what == "evaluate"
        measured = super().evaluate(model, batch)
        return measured if self.num_calls < 3 else {name: torch.tensor(0.5) for name in measured}


def test_an_error_at_a_later_step_is_the_codes_own_and_says_rank_step_and_rows(tmp_path: Path) -> None:
    experiment = Experiment(Unlucky, mixed.pipeline, mixed.VALUES)
    assert find_problems(job_of(experiment, 1)) == [], "a few rows cannot show it"
    with pytest.raises(LookupError, match="no luck") as caught:
        run_rank(0, 1, 0, experiment, Start(tmp_path, 1, None, None, warm_up=True))
    expected, where = caught.value.__notes__
    assert expected.startswith("expected: loss(model, batch) to give the mean loss")
    assert "image float32 [1, 1, 4, 4], label int64 [1]" in expected
    found = re.fullmatch(r"rank 0, step 5 \(epoch 0, batch 4\), train rows (\d+), (\d+)", where)
    assert found, where


def test_what_the_code_gives_is_held_against_what_it_must_in_a_run_too(tmp_path: Path) -> None:
    experiment = Experiment(partial(Unlucky, what="evaluate"), mixed.pipeline, mixed.VALUES)
    with pytest.raises(InputError, match=r"found 'loss': float32 \[\] for \d+ rows; expected evaluate") as caught:
        run_rank(0, 1, 0, experiment, Start(tmp_path, 1, None, None, warm_up=True))
    (where,) = caught.value.__notes__
    assert re.match(r"rank 0, evaluation \(epoch 1, batch 0\), validation rows \d", where)


class Sparing(mixed.Mixed):
    """Makes a layer that it never uses."""

    def build(self) -> torch.nn.Module:
        model = super().build()
        model.spare = torch.nn.Linear(2, 2)
        model.forward = torch.nn.Sequential(*list(model)[:-1]).forward
        return model


def test_a_parameter_that_the_loss_leaves_out_is_no_mistake_at_any_number_of_workers(new_run: NewRun) -> None:
    experiment = Experiment(Sparing, mixed.pipeline, mixed.VALUES)
    for workers in (1, 2):
        assert find_problems(job_of(experiment, workers)) == []
        assert new_run(experiment).go(workers).first.status == "finished"


class OnGpus(mixed.Mixed):
    """Wants a GPU, which this machine may not have."""

    def build(self) -> torch.nn.Module:
        raise AssertionError("Torch not compiled with CUDA enabled")


def test_a_job_for_gpus_is_not_refused_where_there_is_none() -> None:
    experiment = Experiment(OnGpus, mixed.pipeline, mixed.VALUES)
    assert find_problems(job_of(experiment, gpus_per_worker=1)) == []
    assert [problem.found for problem in find_problems(job_of(experiment))] == [
        "AssertionError: Torch not compiled with CUDA enabled"
    ]


def test_nothing_of_the_process_is_changed_and_what_the_code_prints_is_not_the_result(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONBREAKPOINT", "pdb.set_trace")
    noisy = [
        (
            LOSS,
            '        print("in the loss")\n        breakpoint()\n        torch.manual_seed(1)\n        random.random()\n' + LOSS,
        ),
        ("import torch\n", "import random\n\nimport torch\n"),
    ]
    Mistake("noisy", noisy).write(project)

    def state() -> list[Any]:
        drawn = np.random.get_state()
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            [str(part) for part in drawn],
            dict(os.environ),
            torch.get_num_threads(),
        ]

    before = state()
    result = run("check", "tiny", "--run", "--json")
    assert (result.exit_code, json.loads(result.stdout)["valid"]) == (0, True)
    assert "in the loss" in result.stderr
    assert state() == before
