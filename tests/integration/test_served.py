"""Models that cannot be exported are registered all the same, loaded, and asked: raw rows in, answers out."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import raymill
from integration.commands import Home
from probes import served
from raymill.data.arrow import table_from_rows
from raymill.errors import CheckpointError, InputError
from raymill.files import read_record
from raymill.models import registry, tables
from raymill.task import Field, Rows

JOBS = {
    "finder": ("served:Finder", "served:pictures", "{epochs: 25, global_batch_rows: 16}", "validation/loss, mode: min"),
    "mood": ("served:Mood", "served:texts", "{epochs: 6, global_batch_rows: 16}", "validation/accuracy"),
}
JOB = """\
name: {name}
task: asking.{task}
pipeline: asking.{pipeline}
optimizer: {{kind: AdamW, lr: 0.03}}
loop: {loop}
checkpoint: {{metric: {metric}}}
register: {{model: {name}}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("mine")
    (root / "asking").mkdir()
    (root / "asking" / "__init__.py").touch()
    shutil.copyfile(str(served.__file__), root / "asking" / "served.py")
    (root / "pyproject.toml").write_text('[tool.raymill]\npackages = ["asking"]\n')
    for name, (task, pipeline, loop, metric) in JOBS.items():
        (root / "jobs" / name).mkdir(parents=True)
        text = JOB.format(name=name, task=task, pipeline=pipeline, loop=loop, metric=metric)
        (root / "jobs" / name / "job.yaml").write_text(text)
    home = Home(root / ".raymill", root)
    home.environment.pop("PYTHONPATH", None)
    return home


@pytest.fixture(scope="module")
def trained(home: Home) -> dict[str, Any]:
    """The summary of each job."""
    return {name: home.json("train", name, "--in-process", "--json") for name in JOBS}


@pytest.fixture
def inside(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.project)
    monkeypatch.syspath_prepend(home.project)
    monkeypatch.setenv("RAYMILL_HOME", str(home.path))
    for name in ("asking", "asking.served"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_model_that_cannot_be_exported_ends_with_a_version_that_says_why(home: Home, trained: dict[str, Any]) -> None:
    for name, reason in (("finder", "Seeing|forward"), ("mood", "no inputs(batch)")):
        summary = trained[name]
        assert (summary["status"], summary["delivered_to_mlflow"]) == ("finished", True)
        model = summary["model"]
        assert (model["name"], model["version"]) == (name, 1)
        assert any(part in model["not_exported"] for part in reason.split("|")), model
        shown = home.json("models", "show", f"{name}@candidate", "--json")
        assert (shown["exported"], shown["not_exported"]) == (False, model["not_exported"])
    assert home.json("models", "show", "finder/1", "--json")["takes"] == "picture bytes"
    gives = "boxes float32 of shape (None, None), best float32 of shape (4,), said text"
    assert home.json("models", "show", "finder/1", "--json")["gives"] == gives


def ask(home: Home, *arguments: str, stdin: str = "") -> str:
    code, stdout, stderr = home.run("predict", *arguments, stdin=stdin)
    assert code == 0, stderr
    return stdout


def test_texts_go_in_as_they_are_and_answers_come_out_line_by_line(home: Home, trained: dict[str, Any]) -> None:
    lines = "".join(
        json.dumps({"text": text}) + "\n" for text in ("joy joy sun", "tears", "cold rain grief cold tears rain cold")
    )
    answers = [json.loads(line) for line in ask(home, "mood@candidate", "--rows", "-", stdin=lines).splitlines()]
    assert [answer["mood"] for answer in answers] == ["glad", "sad", "sad"]
    assert all(answer["share"] > 0.5 for answer in answers)
    one = json.loads(ask(home, "mood/1", "--rows", "-", "--json", stdin=lines))
    assert (one["model"], one["rows"]) == ("mood/1", 3)
    assert one["predictions"] == answers


def test_pictures_in_bytes_give_boxes_and_the_answer_does_not_hang_on_the_batch(
    home: Home, trained: dict[str, Any], tmp_path: Path
) -> None:
    rows = {"picture": served.make_pictures(23, 7)["picture"]}
    pq.write_table(
        table_from_rows(rows, {"picture": served.pictures().schema["picture"]}), tmp_path / "in.parquet", row_group_size=9
    )
    lines = "".join(json.dumps({"picture": base64.b64encode(raw).decode()}) + "\n" for raw in rows["picture"])
    (tmp_path / "in.jsonl").write_text(lines)
    written = json.loads(
        ask(home, "finder@candidate", "--rows", str(tmp_path / "in.parquet"), "--out", str(tmp_path / "out.parquet"), "--json")
    )
    assert (written["rows"], written["out"]) == (23, str(tmp_path / "out.parquet"))
    ask(home, "finder/1", "--rows", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--batch-rows", "4")
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["said"] for answer in answers] == table["said"]
    for answer, stored in zip(answers, table["boxes"], strict=True):
        np.testing.assert_allclose(np.ravel(answer["boxes"]), stored["data"], rtol=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing unfinished is left"


def test_from_python_and_with_the_answer_given_nothing_changes(inside: None, trained: dict[str, Any]) -> None:
    model = raymill.model("finder@candidate")
    rows: Rows = served.make_pictures(20, 7)
    with_answer, without = model.predict(rows), model.predict({"picture": rows["picture"]})
    assert with_answer["said"] == without["said"]
    right = np.abs(np.asarray(without["best"]) - rows["box"]).max(axis=1) <= 1
    assert right.mean() > 0.5, "it has learned to find them"
    with pytest.raises(InputError, match="found no such column; expected bytes"):
        model.predict({"text": ["where?"]})
    texts = served.make_texts(30, 7)["text"]
    reader = raymill.model("mood/1")
    together, alone = reader.predict({"text": texts}), [reader.predict({"text": [text]}) for text in texts]
    assert together["mood"] == [answer["mood"][0] for answer in alone]
    np.testing.assert_allclose(together["share"], [answer["share"][0] for answer in alone], rtol=1e-5)
    by_run = raymill.model(trained["finder"]["run_id"]).predict({"picture": rows["picture"]})
    assert by_run["said"] == without["said"]


def test_wrong_rows_are_refused_with_their_line(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    schema = {"text": Field("text"), "weight": Field("float32"), "place": Field("uint8", (None, 2)), "raw": Field("bytes")}
    good = {"text": "joy", "weight": 1, "place": [[1, 2], [3, 4]], "raw": "AAE="}
    place.write_text("".join(json.dumps(one) + "\n" for one in (good, {**good, "place": [], "weight": 0.5})))
    (rows,) = tables.read(str(place), schema, (), 5)
    assert (rows["text"], rows["raw"], rows["weight"].dtype) == (["joy", "joy"], [b"\0\1"] * 2, np.dtype("float32"))
    assert [(found.dtype.name, found.shape) for found in rows["place"]] == [("uint8", (2, 2)), ("uint8", (0, 2))]
    for wrong, said in {
        json.dumps({**good, "text": 3}): "rows.jsonl:2: column 'text': found a int; expected text",
        json.dumps({**good, "weight": "3"}): "rows.jsonl:2: column 'weight': found <U1",
        json.dumps({**good, "weight": True}): "found bool; expected float32",
        json.dumps({**good, "place": [[1, 2.5]]}): "found a number with a fraction; expected uint8 of shape (None, 2)",
        json.dumps({**good, "place": [[1, 256]]}): "rows.jsonl:2: column 'place': found Python integer 256 out of bounds",
        json.dumps({**good, "place": [[1, 2], [3]]}): "rows.jsonl:2: column 'place': found setting an array element",
        json.dumps({**good, "raw": "é"}): "rows.jsonl:2: column 'raw': found",
        '{"txt": "joy"}': "rows.jsonl:2: column 'text': found no such column",
        '["joy"]': "rows.jsonl:2: found a list; expected a JSON object",
        '{"text": "joy"': "rows.jsonl:2: found Expecting",
    }.items():
        place.write_text(f"{json.dumps(good)}\n{wrong}\n")
        with pytest.raises(InputError, match=re.escape(said)):
            list(tables.read(str(place), schema, (), 1))
    place.write_text("\n")
    with pytest.raises(InputError, match="no rows"):
        list(tables.read(str(place), schema, (), 1))
    with pytest.raises(InputError, match=r"a file that ends with \.parquet or \.jsonl, or -"):
        tables.read("rows.csv", schema, (), 1)
    with pytest.raises(InputError, match=r"a file that ends with \.parquet or \.jsonl, or -"):
        tables.write("rows.csv", (), sys.stdout)


def test_a_file_of_answers_is_whole_or_as_it_was(tmp_path: Path) -> None:
    def batches() -> Iterator[Rows]:
        yield {"x": np.array([1.0, np.nan]), "raw": [b"a", b"b"]}
        raise LookupError

    for name in ("out.jsonl", "out.parquet"):
        (tmp_path / name).write_text("before")
        with pytest.raises(LookupError):
            tables.write(str(tmp_path / name), batches(), sys.stdout)
        assert (tmp_path / name).read_text() == "before"
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.jsonl", "out.parquet"]
    assert tables.write(str(tmp_path / "out.jsonl"), islice(batches(), 1), sys.stdout) == 2
    assert (tmp_path / "out.jsonl").read_text() == '{"x": 1.0, "raw": "YQ=="}\n{"x": null, "raw": "Yg=="}\n'


def test_a_version_without_a_graph_is_verified_as_any_other(inside: None, trained: dict[str, Any]) -> None:
    files = registry.model_files(registry.resolve("mood/1"))
    assert read_record(files / "signature.json")["takes"] == {"text": {"dtype": "text", "shape": [], "classes": None}}
    path = files / "weights.safetensors"
    content = path.read_bytes()
    os.chmod(path, 0o600)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="weights"):
        raymill.model("mood/1")
    path.write_bytes(content)


def test_where_an_export_is_required_the_job_is_refused_before_it_starts(home: Home) -> None:
    code, stdout, stderr = home.run("train", "finder", "--in-process", "--json", "--set", "register.export=required")
    assert code == 2, stderr
    (problem,) = json.loads(stdout)["problems"]
    assert "register.export" in problem["where"]
    assert "served.py" in problem["found"]
    assert "register.export: try" in problem["fix"]
