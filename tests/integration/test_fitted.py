"""A pipeline that is fitted, on real Ray: once for a run, however often that is taken up again and whatever lies beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from integration.commands import PROJECT, Home
from raymill.files import read_record

JOB = """\
name: texts
task: texts.code:Asked
pipeline: texts.code:read
data: {stop_words: STOP}
optimizer: {kind: Adam, lr: 0.05}
loop: {epochs: 3, global_batch_rows: 12, seed: 4, window_rows: 15}
checkpoint: {every_steps: 2}
register: {model: texts}
"""

BESIDE = '''

class Asked(Reads):
    """What must be there for a job: a class of this file."""


def fit_without(rows: Iterator[Rows], stop_words: str) -> dict[str, bytes]:
    """As `fit`, without the words of a file."""
    made = fit(rows)
    left = set(json.loads(made["words"])) - set(open(stop_words).read().split())
    with open(stop_words + ".fitted", "a") as file:
        file.write("once ")
    return {**made, "words": json.dumps(sorted(left)).encode()}


def read(stop_words: str, fitted: Mapping[str, bytes]) -> Pipeline:
    """The rows."""
    return dataclasses.replace(pipeline(fitted), fit=partial(fit_without, stop_words=stop_words))
'''


@pytest.fixture
def home(tmp_path: Path) -> Home:
    project = tmp_path / "project"
    (project / "texts").mkdir(parents=True)
    (project / "jobs" / "texts").mkdir(parents=True)
    code = (
        (PROJECT / "tests" / "probes" / "fitted.py").read_text().replace("import json\n", "import dataclasses\nimport json\n", 1)
    )
    (project / "texts" / "code.py").write_text(code + BESIDE)
    (project / "texts" / "__init__.py").touch()
    (project / "pyproject.toml").write_text('[tool.raymill]\npackages = ["texts"]\n')
    (project / "jobs" / "texts" / "job.yaml").write_text(JOB.replace("STOP", str(tmp_path / "stop.txt")))
    (tmp_path / "stop.txt").write_text("warm")
    return Home(tmp_path / "home", project)


def test_it_is_fitted_once_and_what_lies_beside_may_change(home: Home, tmp_path: Path) -> None:
    whole = home.json("train", "texts", "--in-process", "--json", "--set", "register=null")
    fault = {"RAYMILL_FAULT": "step_done:raise:rank=0:step=7", "RAYMILL_FAULT_FOLDER": str(home.scratch)}
    code, _, stderr = home.run("train", "texts", "--workers", "1", variables=fault)
    assert code == 1, stderr
    (run,) = (path for path in (home.path / "runs").iterdir() if path.name != whole["run_id"])
    (tmp_path / "stop.txt").write_text("good bad fine")
    resumed = home.json("train", "--resume", run.name, "--json")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert (tmp_path / "stop.txt.fitted").read_text() == "once once ", "once for each of the two runs"
    assert set(read_record(run / "fitted.json")["artefacts"]) == {"words", "scale"}
    # From the model's version alone.
    shutil.rmtree(run)
    (tmp_path / "stop.txt").unlink()
    measured = home.json("evaluate", "texts@candidate", "--json")
    assert measured["metrics"]["validation/loss"] == pytest.approx(resumed["metrics"]["validation/loss"], rel=1e-9)


def test_a_run_whose_artefacts_are_gone_or_changed_is_not_taken_up(home: Home) -> None:
    fault = {"RAYMILL_FAULT": "step_done:raise:rank=0:step=7", "RAYMILL_FAULT_FOLDER": str(home.scratch)}
    assert home.run("train", "texts", "--in-process", variables=fault)[0] == 1
    (run,) = (home.path / "runs").iterdir()
    kept = (run / "fitted.json").read_text()
    (run / "fitted.json").unlink()
    code, _, stderr = home.run("train", "--resume", run.name, "--in-process")
    assert (code, "no fitted.json" in stderr) == (2, True), stderr
    record = json.loads(kept)
    record["artefacts"]["words"]["base64"] = record["artefacts"]["scale"]["base64"]
    (run / "fitted.json").write_text(json.dumps(record))
    code, _, stderr = home.run("train", "--resume", run.name, "--in-process")
    assert code != 0
    assert "is not what was fitted" in stderr
