"""A user's mistake on real runs: refused while Ray starts, or told with its line, rank, step and rows where it shows later."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from integration.commands import Home
from mistakes import LOSS, Mistake
from raymill.files import read_record

pytestmark = pytest.mark.integration


def project_with(mistake: Mistake, root: Path) -> Home:
    root.mkdir()
    mistake.write(root)
    home = Home(root / ".raymill", root)
    home.environment.pop("PYTHONPATH", None)
    return home


def refused(home: Home, *arguments: str) -> list[dict[str, str]]:
    code, stdout, stderr = home.run(*arguments, "--json")
    assert code == 2, stderr
    found: dict[str, Any] = json.loads(stdout)
    assert found["error"] == "InputError"
    return list(found["problems"])


def failed(home: Home, *arguments: str) -> str:
    code, stdout, stderr = home.run(*arguments, "--json")
    assert code == 1, stderr
    told = json.loads(stdout)
    assert "Traceback" not in stderr
    return "\n".join([told["message"], *told["notes"]])


# ---------------------------------------------------------------- before the first step

WRONG_LOSS = Mistake(
    "a loss that raises", [(LOSS, LOSS.replace('"label"', '"weight"'))], LOSS.replace('"label"', '"weight"').strip()
)


@pytest.mark.parametrize("how", [(), ("--in-process",)], ids=["on ray", "in process"])
def test_a_wrong_job_is_refused_while_its_run_starts_and_leaves_no_run(how: tuple[str, ...], tmp_path: Path) -> None:
    home = project_with(WRONG_LOSS, tmp_path / "mine")
    begun_s = time.perf_counter()
    (problem,) = refused(home, "train", "tiny", *how)
    print(f"refused after {time.perf_counter() - begun_s:.1f} s")
    assert problem["where"] == f"{WRONG_LOSS.place(home.project)} in loss: {WRONG_LOSS.line}"
    assert problem["found"] == "KeyError: 'weight'"
    assert list(home.path.glob("runs/*")) == []
    assert home.left_over() == []


# ---------------------------------------------------------------- later

LATE_LOSS = Mistake(
    "a loss that raises at step 5 on rank 1",
    [
        (
            LOSS,
            '        if CALLS["loss"] == 5 and torch.distributed.get_rank() == 1:\n            raise LookupError("no luck")\n'
            + LOSS,
        )
    ],
    'raise LookupError("no luck")',
)
LATE_TRANSFORM = Mistake(
    "a transform that raises for a whole window",
    [
        ("    return rows\n\n\ndef collate", "    return rows if len(rows['x']) < 20 else scale(rows)\n\n\ndef collate"),
        ('"train": 50', '"train": 200'),
    ],
    "return rows if len(rows['x']) < 20 else scale(rows)",
)


def test_an_error_on_one_rank_is_told_with_its_line_rank_step_and_rows(tmp_path: Path) -> None:
    home = project_with(LATE_LOSS, tmp_path / "mine")
    message = failed(home, "train", "tiny")
    assert message.startswith(
        f"rank 1 failed: LookupError: no luck\n  {LATE_LOSS.place(home.project)}, in loss\n    {LATE_LOSS.line}\n"
    )
    assert re.search(r"^expected: loss\(model, batch\) to give the mean loss", message, re.MULTILINE)
    rows = re.search(r"^rank 1, step 5 \(epoch 1, batch 0\), train rows ([\d, ]+)$", message, re.MULTILINE)
    assert rows, message
    assert len(rows[1].split(", ")) == 8
    log = home.folder().ray_log
    assert f"what Ray and the workers printed: {log}" in message
    assert "\x1b[" not in log.read_text()
    shown = home.json("runs", "show", home.folder().run_id, "--json")
    assert (shown["status"], shown["attempts"]) == ("failed", 1), "it is not tried again"
    assert message.startswith(shown["message"])
    assert read_record(home.folder().failure)["args"][1] == 1


def test_an_error_in_ray_data_is_the_jobs_own_with_its_window(tmp_path: Path) -> None:
    home = project_with(LATE_TRANSFORM, tmp_path / "mine")
    # The trial reads a window too where a fragment fails, but the first fragment is right.
    message = failed(home, "train", "tiny")
    assert message.startswith(
        f"reading the data failed: NameError: name 'scale' is not defined\n  {LATE_TRANSFORM.place(home.project)}, in change\n"
    )
    assert re.search(r"^split 'train', epoch 0, window \d, rows \d+", message, re.MULTILINE)
    assert "DataContext" not in message
    assert home.json("runs", "show", home.folder().run_id, "--json")["attempts"] == 1


# ---------------------------------------------------------------- corrected, and gone on with


def test_a_metric_that_is_not_measured_is_corrected_at_a_resume(tmp_path: Path) -> None:
    home = project_with(Mistake("none", job=[("validation/accuracy", "validation/f1")]), tmp_path / "mine")
    assert "'validation/f1' was not measured" in failed(home, "train", "tiny", "--in-process", "--no-preflight")
    folder = home.folder()
    before = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file() and path.suffix == ".json"}
    again = ("train", "--resume", folder.run_id, "--in-process")
    (problem,) = refused(home, *again, "--set", "checkpoint.metric=validation/f2")
    assert (problem["where"], problem["found"]) == ("--set checkpoint.metric", "'validation/f2'")
    assert {name: (folder.path / name).read_bytes() for name in before} == before
    assert refused(home, *again, "--set", "loop.seed=1")[0]["where"] == "--set loop.seed"
    summary = home.json(*again, "--set", "checkpoint.metric=validation/accuracy", "--json")
    assert summary["status"] == "finished"
    assert summary["best_step"] in (4, 8)
    whole = project_with(Mistake("none"), tmp_path / "other").json("train", "tiny", "--in-process", "--json")
    assert (summary["weights_sha256"], summary["best_step"]) == (whole["weights_sha256"], whole["best_step"])
