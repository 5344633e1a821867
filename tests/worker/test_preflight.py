"""A user's mistakes, found by a few rows before a run: each with its line, what was found and expected, and what to do."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from mistakes import BUILD, LOSS, MISTAKES, SPARE, Mistake
from raymill.cli.app import app

Command = Callable[..., Result]


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
        assert mistake.line in problem["where"]
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
)
SPOILED = Mistake(
    "rows that are not numbers, in a job that leaves them out",
    [('    return {"x": x,', '    x[:] = np.nan\n    return {"x": x,')],
    job=[("threads: 1}", "threads: 1, on_nan: skip}")],
)
FOR_GPUS = Mistake(
    "a model that is moved to a GPU",
    [(BUILD, "        raise AssertionError('Torch not compiled with CUDA enabled')\n")],
)
ONE_WORKER = Mistake(
    "a parameter without a gradient, and one worker",
    [
        (
            BUILD,
            SPARE,
        )
    ],
    job=[("workers: 2", "workers: 1")],
)


@pytest.mark.parametrize("right", [Mistake("none"), FIXED_SIZE, WHOLE_WINDOWS, SPOILED, ONE_WORKER], ids=lambda right: right.name)
def test_a_job_that_would_run_is_not_refused(right: Mistake, project: Path) -> None:
    right.write(project)
    result = run("check", "tiny", "--run", "--json")
    assert result.exit_code == 0, result.stderr


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
