"""The part of the faults that `make test` has time for; `make faults` runs all of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from multiprocessing import shared_memory as segments
from pathlib import Path

import pytest

import shared_memory
from faults.cases import CASES, Case
from faults.run_faults import run_case
from raymill import faults

ENGINE = Path(faults.__file__).parent
QUICK = [case for case in CASES if case.quick]


@pytest.mark.integration
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", QUICK, ids=[f"{case.number}-{case.name.replace(' ', '-')}" for case in QUICK])
def test_a_run_survives_or_says_why_not(case: Case) -> None:
    assert run_case(case).problems == []


def test_every_point_is_passed_somewhere_and_has_a_description() -> None:
    passed = set()
    for file in ENGINE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "faults.point":
                assert isinstance(node.args[0], ast.Constant)
                passed.add(node.args[0].value)
    assert passed == set(faults.POINTS)


def run_with(fault: str, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAYMILL_FAULT": fault, "RAYMILL_FAULT_FOLDER": str(folder)}
    command = [sys.executable, "-c", f"from raymill import faults\nfrom pathlib import Path\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_fault_happens_at_its_place_and_once_over_restarts(tmp_path: Path) -> None:
    code = "for step in (1, 2, 3):\n faults.here(rank=1, step=step)\n faults.point('step_done')\nprint('end')"
    first = run_with("step_done:kill:rank=1:step=2", tmp_path, code)
    assert first.returncode == -9
    assert '"step": 2' in (tmp_path / "fired.jsonl").read_text()
    assert run_with("step_done:kill:rank=1:step=2", tmp_path, code).stdout == "end\n"
    assert run_with("step_done:kill:rank=0:step=2", tmp_path / "other", code).stdout == "end\n"


def test_kinds_do_what_their_names_say(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    call = f"faults.point('after_pointer', Path({str(file)!r}))"
    assert "RuntimeError" in run_with("after_pointer:raise", tmp_path, call).stderr
    (tmp_path / "fired-0").unlink()
    assert "[Errno 28]" in run_with("after_pointer:disk_full", tmp_path, call).stderr
    (tmp_path / "fired-0").unlink()
    assert run_with("after_pointer:corrupt", tmp_path, call).returncode == 0
    assert file.read_bytes() == b"a\x9dc"


@pytest.mark.parametrize("text", ["nowhere:kill", "step_done:explode", "step_done:kill:rnak=1"])
def test_a_fault_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="RAYMILL_FAULT"):
        faults.parse(text)


def test_shared_memory_is_left_once_nobody_holds_it() -> None:
    segment = segments.SharedMemory(create=True, size=4096)
    assert segment.name not in shared_memory.abandoned(), "this process holds it"
    segment.close()
    assert segment.name in shared_memory.abandoned()
    segment.unlink()
    assert segment.name not in shared_memory.abandoned()
