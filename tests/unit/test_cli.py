"""The command line: what `check` finds, what it leaves behind, exit codes, and what `--json` prints."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from raymill.cli.app import app
from raymill.cli.tune import _telling
from raymill.config import catalogue, load
from raymill.data.sources import write_parquet
from raymill.errors import InputError, Interrupted, Problem, RaymillError, RunError
from raymill.task import Field, Rows, Schema

PROJECT = Path(__file__).parents[2]
SCHEMA: Schema = {"x": Field("float32", (2,)), "label": Field("int64", classes=3)}

JOB = """\
# Nothing but a test.
name: tiny
task: tiny.code:Net
pipeline: tiny.code:rows
model: {width: 4}
data: {root: data}
optimizer: {kind: SGD, lr: 0.1}
schedule: {kind: CosineAnnealingLR}
loop:
  epochs: 2
  global_batch_rows: 12
scale:
  workers: 2
"""

CODE = """\
from raymill.data.sources import ParquetSource
from raymill.task import Field, Pipeline, Task

SCHEMA = {"x": Field("float32", (2,)), "label": Field("int64", classes=3)}


class Net(Task):
    def __init__(self, width: int = 4) -> None:
        self.width = width

    def build(self): ...

    def evaluate(self, model, batch): ...


def rows(root: str = "data") -> Pipeline:
    splits = ("train", "validation")
    return Pipeline(sources={split: ParquetSource(f"{root}/{split}", SCHEMA) for split in splits}, schema=SCHEMA)
"""


def rows_of(num_rows: int) -> Rows:
    x = np.random.default_rng(0).normal(size=(num_rows, 2)).astype(np.float32)
    return {"x": x, "label": np.arange(num_rows, dtype=np.int64) % 3}


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path, row_group_size=4)


def replaced(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


class Project:
    """A project in a folder of its own, with one job that is right until something in it is spoiled."""

    def __init__(self, root: Path) -> None:
        self.root, self.job, self.data = root, root / "jobs/tiny/job.yaml", root / "data"
        self.job.parent.mkdir(parents=True)
        (root / "tiny").mkdir()
        (root / "pyproject.toml").write_text('[tool.raymill]\npackages = ["tiny"]\n')
        (root / "tiny/code.py").write_text(CODE)
        self.job.write_text(JOB)
        write_parquet(self.data / "train", rows_of(36), SCHEMA, num_shards=3, row_group_rows=4)
        write_parquet(self.data / "validation", rows_of(6), SCHEMA, num_shards=1, row_group_rows=4)

    def edit(self, old: str, new: str) -> None:
        text = self.job.read_text()
        assert text.count(old) == 1
        self.job.write_text(text.replace(old, new))

    def shard(self, number: int) -> Path:
        return self.data / "train" / f"part-{number:05d}.parquet"

    def files(self) -> dict[str, bytes | None]:
        """Everything that is there, folders included."""
        paths = sorted(self.root.parent.rglob("*"))
        return {
            str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path): (
                path.read_bytes() if path.is_file() else None
            )
            for path in paths
        }


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    made = Project(tmp_path / "project")
    monkeypatch.chdir(made.root)
    # The command puts the project's folder on the path, and imports leave byte code.
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("tiny", "tiny.code"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def problems_of(result: Result) -> list[dict[str, str]]:
    found: dict[str, Any] = json.loads(result.stdout)
    return list(found["problems"])


# ---------------------------------------------------------------- what check finds


def test_a_right_job_is_valid(project: Project) -> None:
    result = run("check", "tiny", "--json")
    assert result.exit_code == 0
    rows = {"train": 36, "validation": 6}
    assert json.loads(result.stdout) == {"job": "tiny", "valid": True, "rows": rows, "problems": []}
    assert result.stderr == ""


def no_shards(project: Project) -> None:
    for number in range(3):
        project.shard(number).unlink()


def no_rows(project: Project) -> None:
    for number in range(3):
        rewrite(project.shard(number), lambda table: table.slice(0, 0))


def no_label(project: Project) -> None:
    rewrite(project.shard(1), lambda table: table.rename_columns(["x", "labels"]))


def cut_shard(project: Project) -> None:
    content = project.shard(0).read_bytes()
    project.shard(0).write_bytes(content[: len(content) // 2])


def label_outside(project: Project) -> None:
    labels = pa.array([0, 1, 2, 0, 1, 2, 7, 0, 1, 2, 0, 1], pa.int64())
    rewrite(project.shard(2), lambda table: replaced(table, "label", labels))


def editing(old: str, new: str) -> Callable[[Project], None]:
    return lambda project: project.edit(old, new)


# What is spoiled -> where it is found, and what found, expected and fix must say.
BAD = {
    "unknown key": (
        editing("epochs: 2", "epoch: 2"),
        "jobs/tiny/job.yaml:10 loop.epoch",
        ("'epoch'", "a known field", "'epochs'"),
    ),
    "wrong type": (
        editing("global_batch_rows: 12", "global_batch_rows: twelve"),
        "jobs/tiny/job.yaml:11 loop.global_batch_rows",
        ("'twelve'", "integer", "loop.global_batch_rows"),
    ),
    "duplicate key": (
        editing("  epochs: 2\n", "  epochs: 2\n  epochs: 3\n"),
        "jobs/tiny/job.yaml:10 loop.epochs",
        ("lines 10 and 11", "once", "Remove one"),
    ),
    "missing file": (no_shards, "data/train", ("no file", "Parquet files", "raymill data get")),
    "unknown optimizer": (
        editing("kind: SGD", "kind: SDG"),
        "jobs/tiny/job.yaml:7 optimizer.kind",
        ("'SDG'", "torch.optim", "'SGD'"),
    ),
    "unknown optimizer argument": (
        editing("lr: 0.1", "lr: 0.1, momentun: 0.9"),
        "jobs/tiny/job.yaml:7 optimizer.momentun",
        ("'momentun'", "known argument", "'momentum'"),
    ),
    "workers that do not divide the batch": (
        editing("workers: 2", "workers: 5"),
        "jobs/tiny/job.yaml:13 scale.workers",
        ("5 workers", "divides", "Use 4 or 6 workers"),
    ),
    "code from elsewhere": (
        editing("tiny.code:Net", "os.path:join"),
        "jobs/tiny/job.yaml:3 task",
        ("'os'", "tiny", "pyproject.toml"),
    ),
    "no rows": (no_rows, "data/train", ("0 rows", "at least one row", "again")),
    "fewer rows than workers": (
        editing("workers: 2", "workers: 12"),
        "jobs/tiny/job.yaml:13 scale.workers",
        ("12 workers for 6 validation rows", "one row per worker", "at most 6 workers"),
    ),
    "missing column": (
        no_label,
        "data/train/part-00001.parquet: column 'label'",
        ("no such column", "int64 in 0..2", "'labels'"),
    ),
    "truncated shard": (cut_shard, "data/train/part-00000.parquet", ("", "a whole Parquet file", "Restore")),
    "label outside the classes": (
        label_outside,
        "data/train/part-00002.parquet, row group 1: column 'label'",
        ("labels from 0 to 7", "labels in 0..2", "classes=8"),
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("verb", ["check", "plan", "train"])
def test_a_bad_input_is_found_before_anything_starts(what: str, verb: str, project: Project) -> None:
    spoil, where, said = BAD[what]
    spoil(project)
    before = project.files()
    result = run(verb, "tiny", "--json")
    assert result.exit_code == 2
    (problem,) = problems_of(result)
    assert problem["where"] == where
    for field, part in zip(("found", "expected", "fix"), said, strict=True):
        assert part in problem[field]
        assert problem[field] in result.stderr
    assert project.files() == before


ALL_AT_ONCE = (
    "unknown key",
    "unknown optimizer argument",
    "workers that do not divide the batch",
    "code from elsewhere",
    "missing column",
    "truncated shard",
    "label outside the classes",
)


def test_the_problems_of_the_file_the_numbers_and_the_data_come_at_once(project: Project) -> None:
    for what in ALL_AT_ONCE:
        BAD[what][0](project)
    project.edit("name: tiny", "name: tiny\nname: other")
    project.edit("SGD", "SGD, max_grad_norm: none")
    before = project.files()
    result = run("check", "tiny", "--json")
    assert result.exit_code == 2
    # The second name has put one line before all that follows.
    wheres = {problem["where"] for problem in problems_of(result)}
    assert wheres == {
        "jobs/tiny/job.yaml:2 name",
        "jobs/tiny/job.yaml:4 task",
        "jobs/tiny/job.yaml:8 optimizer.max_grad_norm",
        "jobs/tiny/job.yaml:8 optimizer.momentun",
        "jobs/tiny/job.yaml:11 loop.epoch",
        "jobs/tiny/job.yaml:14 scale.workers",
        "data/train/part-00000.parquet",
        "data/train/part-00001.parquet: column 'label'",
        "data/train/part-00002.parquet, row group 1: column 'label'",
    }
    assert project.files() == before


def test_numbers_that_hang_on_a_wrong_value_are_not_judged(project: Project) -> None:
    project.edit("global_batch_rows: 12", "global_batch_rows: twelve")
    project.edit("workers: 2", "workers: 5")
    (problem,) = problems_of(run("check", "tiny", "--json"))
    assert problem["where"] == "jobs/tiny/job.yaml:11 loop.global_batch_rows"


def test_data_are_not_looked_for_where_the_job_says_wrongly_which(project: Project) -> None:
    project.edit("root: data", "rot: nowhere")
    (problem,) = problems_of(run("check", "tiny", "--json"))
    assert problem["where"] == "jobs/tiny/job.yaml:6 data.rot"


def test_a_job_that_is_not_there_is_answered_with_the_nearest(project: Project) -> None:
    result = run("check", "tinny")
    assert result.exit_code == 2
    assert "Did you mean 'tiny'?" in result.stderr
    assert result.stdout == ""


def test_an_override_stands_for_the_line_in_the_file(project: Project) -> None:
    (problem,) = problems_of(run("check", "tiny", "--json", "--workers", "5"))
    assert problem["where"] == "--set scale.workers"


# ---------------------------------------------------------------- other verbs


def test_plan_gives_each_number_with_its_reason(project: Project) -> None:
    result = run("plan", "tiny", "--json")
    found = json.loads(result.stdout)
    assert (found["num_workers"], found["steps_per_epoch"], found["total_steps"]) == (2, 3, 6)
    assert "12" in found["reasons"]["steps_per_epoch"]
    assert "steps_per_epoch" in run("plan", "tiny").stdout


def test_jobs_lists_what_is_there_and_whether_it_is_valid(project: Project) -> None:
    other = project.root / "jobs/other"
    other.mkdir()
    (other / "job.yaml").write_text("name: other\n")
    (other / "README.md").write_text("\n# other: nothing yet\n\nMore.\n")
    (project.root / "jobs/empty").mkdir()
    listed = json.loads(run("jobs", "--json").stdout)["jobs"]
    assert [job["name"] for job in listed] == ["other", "tiny"]
    assert listed[0]["about"] == "other: nothing yet"
    assert (listed[0]["valid"], listed[0]["num_problems"]) == (False, 3)
    tiny = {"name": "tiny", "path": "jobs/tiny/job.yaml", "about": "Nothing but a test.", "valid": True}
    assert listed[1] == {**tiny, "num_problems": 0, "card": None}


def test_jobs_shows_what_a_card_says(project: Project) -> None:
    path = project.root / "jobs/tiny/job.yaml"
    card = "card: {topic: Nothing, data: made up, download_mb: 1.5, minutes: 2, expect: {validation/loss: {at_most: 0.5}}}\n"
    path.write_text(path.read_text() + card)
    [listed] = json.loads(run("jobs", "--json").stdout)["jobs"]
    assert listed["card"]["expect"] == {"validation/loss": {"at_least": None, "at_most": 0.5}}
    shown = run("jobs").stdout
    assert all(word in shown for word in ("Nothing", "made up", "1.5", "validation/loss <= 0.5"))
    path.write_text(path.read_text().replace("at_most: 0.5", "at_worst: 0.5"))
    assert "at_worst" in run("check", "tiny").stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("kind: here\n", "kind: found 'here'"),
        ("kind: local\nnodes: [{num_cpus: -1}]\n", "nodes.0.num_cpus"),
        ("kind: local\nnode: 3\n", "node"),
        ("kind: address\n", "cluster/some.yaml dashboard"),
        ("kind: address\nmlflow: true\n", "mlflow: found True; expected false"),
    ],
)
def test_a_file_of_a_cluster_that_is_wrong_is_refused(project: Project, content: str, said: str) -> None:
    (project.root / "cluster").mkdir()
    (project.root / "cluster" / "some.yaml").write_text(content)
    result = run("ps", "--cluster", "some")
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_a_cluster_that_is_not_there_or_does_not_run_or_is_elsewhere_is_told_apart(project: Project) -> None:
    (project.root / "cluster").mkdir()
    (project.root / "cluster" / "local.yaml").write_text("kind: local\n")
    assert "Did you mean 'local'?" in run("cluster", "up", "locale").stderr
    assert "`raymill cluster up local` starts it" in run("submit", "tiny").stderr
    (project.root / "cluster" / "far.yaml").write_text("kind: address\ndashboard: http://127.0.0.1:1\ntoken_file: token\n")
    assert "found 'address'; expected 'local'" in run("cluster", "up", "far").stderr
    assert "no such file; expected the cluster's token" in run("ps", "--cluster", "far").stderr


def test_a_job_at_the_root_is_listed_and_found_from_anywhere_in_the_project(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project.root / "job.yaml").write_text("# At the root.\n" + JOB)
    (project.root / "README.md").write_text("# About the whole project\n")
    monkeypatch.chdir(project.root / "tiny")
    listed = json.loads(run("jobs", "--json").stdout)["jobs"]
    assert [(job["name"], job["path"]) for job in listed] == [("job.yaml", "job.yaml"), ("tiny", "jobs/tiny/job.yaml")]
    assert (listed[0]["about"], listed[0]["valid"]) == ("At the root.", True)
    assert load.find_job("job.yaml").samefile(project.root / "job.yaml")


# ---------------------------------------------------------------- where the project is

READING = [
    (0, ("runs", "list")),
    (2, ("runs", "show", "tiny-1")),
    (0, ("models", "list")),
    (2, ("models", "show", "tiny@candidate")),
    (2, ("evaluate", "tiny@candidate")),
    (0, ("jobs",)),
    (0, ("check", "tiny", "--set", "data.root=../data")),
    (0, ("plan", "tiny", "--set", "data.root=../data")),
]


@pytest.mark.parametrize(("code", "arguments"), READING, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_reading_makes_no_store_and_a_subfolder_belongs_to_its_project(
    code: int, arguments: tuple[str, ...], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYMILL_HOME")
    monkeypatch.chdir(project.root / "tiny")
    before = project.files()
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    assert "project: found none" not in result.stderr
    assert project.files() == before


@pytest.mark.parametrize(
    "arguments", [arguments for _, arguments in READING if arguments[0] not in ("check", "plan")], ids=" ".join
)
def test_outside_of_a_project_every_verb_says_so_and_how_to_get_into_one(
    arguments: tuple[str, ...], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYMILL_HOME")
    outside = project.root.parent
    monkeypatch.chdir(outside)
    before = project.files()
    result = run(*arguments, "--json")
    assert result.exit_code == 2
    (problem,) = problems_of(result)
    assert (problem["where"], problem["found"]) == ("project", f"none at {outside}")
    assert "raymill init" in problem["fix"]
    assert project.files() == before


def test_runs_of_a_project_are_found_from_its_subfolders(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYMILL_HOME")
    events = project.root / ".raymill/runs/tiny-1/events.jsonl"
    events.parent.mkdir(parents=True)
    events.touch()
    monkeypatch.chdir(project.root / "jobs/tiny")
    assert [found["run_id"] for found in json.loads(run("runs", "list", "--json").stdout)["runs"]] == ["tiny-1"]


def test_data_check_counts_the_rows_of_right_data(project: Project) -> None:
    found = json.loads(run("data", "check", "tiny", "--json").stdout)
    assert {split: part["rows"] for split, part in found.items()} == {"train": 36, "validation": 6}
    assert found["train"]["fragments"] == 9


def test_data_check_reads_what_the_footers_do_not_tell(project: Project) -> None:
    def with_nan(table: pa.Table) -> pa.Table:
        values = np.zeros((12, 2), np.float32)
        values[[5, 7], [0, 1]] = np.nan, np.inf
        return replaced(table, "x", pa.array([row.tobytes() for row in values], pa.binary(8)))

    rewrite(project.shard(1), with_nan)
    content = bytearray(project.shard(2).read_bytes())
    second_group = pq.ParquetFile(project.shard(2)).metadata.row_group(1).column(0)
    content[second_group.data_page_offset + second_group.total_compressed_size - 1] ^= 1
    project.shard(2).write_bytes(content)
    result = run("data", "check", "tiny", "--json")
    assert result.exit_code == 2
    first, second = problems_of(result)
    assert first["where"] == "split 'train', part-00001.parquet, part 1: column 'x'"
    assert "2 of 4 rows, the first of them row 1" in first["found"]
    assert second["where"] == "split 'train', part-00002.parquet, part 1"


def test_data_stats_writes_a_page_and_says_where_it_is(project: Project, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert str(page) in run("data", "stats", "tiny", "--html", str(page)).stdout.replace("\n", "")
    assert "The data of tiny" in page.read_text()


def test_data_stats_measures_each_split(project: Project) -> None:
    found = json.loads(run("data", "stats", "tiny", "--json").stdout)
    assert found["splits"]["train"]["columns"]["label"]["class_counts"] == [12, 12, 12]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("train",), "train"),
        (("train", "tiny", "--resume", "tiny-1"), "train"),
        (("train", "--resume", "tiny-1"), "run"),
        (("train", "tiny", "--in-process", "--workers", "3"), "--in-process"),
        (("train", "--resume", "tiny-1", "--in-process", "--workers", "3"), "--in-process"),
        (("runs", "show", "tiny-1"), "run"),
        (("data", "get", "tiny"), "jobs/tiny/job.yaml:4 pipeline"),
    ],
)
def test_a_wrong_command_is_refused_with_the_place(arguments: tuple[str, ...], where: str, project: Project) -> None:
    before = project.files()
    result = run(*arguments, "--json")
    assert result.exit_code == 2
    assert [problem["where"] for problem in problems_of(result)] == [where]
    assert project.files() == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunError("it broke"), 1),
        (InputError([Problem("here", "this", "that", "Do so.")]), 2),
        (Interrupted("tiny-1", 7), 3),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    error: RaymillError, code: int, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[dict[str, Any]]:
        raise error

    monkeypatch.setattr(catalogue, "list_jobs", fail)
    result = run("jobs", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["message"] == str(error)
    assert str(error) in result.stderr
    assert run("jobs").stdout == ""


def test_an_error_of_the_jobs_own_code_is_told_with_its_line(project: Project) -> None:
    code = project.root / "tiny/code.py"
    code.write_text(CODE.replace('splits = ("train", "validation")', "splits = 1 / 0"))
    result = run("check", "tiny", "--json")
    assert result.exit_code == 2
    (problem,) = problems_of(result)
    assert problem["where"] == "tiny/code.py:17 in rows: splits = 1 / 0"
    assert problem["found"] == "ZeroDivisionError: division by zero"
    assert problem["expected"].startswith("the pipeline's function to give a Pipeline")
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------- what it costs

IMPORTS = """
import atexit, sys
from raymill.cli import main

heavy = {"torch", "ray", "mlflow", "pandas", "matplotlib"}
atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))
main()
"""


@pytest.mark.parametrize("verb", ["check", "plan", "jobs"])
def test_a_quick_verb_imports_none_of_the_heavy_libraries(verb: str) -> None:
    arguments = [] if verb == "jobs" else [str(PROJECT / "jobs" / "smoke")]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, verb, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_search_shows_each_trial_and_on_a_terminal_how_it_stands(is_terminal: bool) -> None:
    console = Console(file=StringIO(), force_terminal=is_terminal, width=120, markup=False, highlight=False)
    best = [{"number": 3, "value": 0.9871, "values": {"optimizer.lr": 0.02}}]
    states = {"complete": 2, "pruned": 1, "running": 2}
    so_far = {"states": states, "over": 3, "most_trials": 20, "left_s": 41.6, "each_cpus": 1.5, "top": best}
    trial = {"number": 4, "state": "pruned", "value": None, "values": {"optimizer.lr": 0.5}, "seconds": 2.0, "message": ""}
    with _telling(console) as tell:
        tell({**trial, "so_far": so_far})
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "trial 4  pruned  -, 2 s  optimizer.lr 0.5  (3 of 20, best 0.9871, ETA 42 s)" in shown
    assert ("3 of 20 trials: 2 complete, 1 pruned, 2 running on 3 CPUs; ETA 42 s" in shown) == is_terminal
    assert ("0.9871" in shown.replace("best 0.9871", "")) == is_terminal
