"""What a run was given: written down, read back, carried to where its folder is not seen; and refused where it was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymill.config.plan import ClusterFacts, Plan, make_plan
from raymill.config.spec import JobSpec
from raymill.data.manifest import Manifest, SplitManifest
from raymill.errors import CheckpointError
from raymill.files import read_record, write_record
from raymill.orchestration.given import _cannot_go_on
from raymill.record import inputs
from raymill.record.inputs import Pinned
from raymill.task import TRAIN, Fragment
from raymill.tracking.description import opening_tags
from raymill.trained.model import Trained

TEACHER = Pinned(
    reference="mnist@live", model="mnist/3", run_id="mnist-1", weights_sha256="a" * 64, code_changes=("x.py changed",)
)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (inputs.place(folder, "teacher") / "code").mkdir(parents=True)
    (inputs.place(folder, "teacher") / "weights.safetensors").write_bytes(b"weights")
    (inputs.place(folder, "teacher") / "code" / "net.py").write_bytes(b"class Net: ...")
    inputs.keep(folder, {"teacher": TEACHER})
    return folder


def test_it_is_read_back_as_it_was_given(records: Path, tmp_path: Path) -> None:
    assert inputs.read(records) == {"teacher": TEACHER}
    assert inputs.read(tmp_path) == {}
    assert str(TEACHER) == "mnist@live, which was mnist/3 (weights aaaaaaaaaaaa)"
    (note,) = inputs.notes(records)
    assert "input teacher is mnist@live, which was mnist/3 (weights aaaaaaaaaaaa), whose code was changed" in note


def test_it_is_said_in_words_and_what_the_run_began_with_too(records: Path, tmp_path: Path) -> None:
    inputs.keep(records, {"teacher": TEACHER}, TEACHER.model_copy(update={"reference": "mnist/3"}))
    said = {
        "inputs.teacher": "mnist@live, which was mnist/3 (weights aaaaaaaaaaaa)",
        "init_from": "mnist/3 (weights aaaaaaaaaaaa)",
    }
    assert inputs.described(records) == said
    assert opening_tags("run-1", "mnist", {}, given=said)["raymill.inputs.teacher"] == said["inputs.teacher"]
    assert inputs.described(tmp_path) == {}


def test_all_of_it_is_carried_to_another_machine(records: Path, tmp_path: Path) -> None:
    packed = inputs.pack(records)
    assert sorted(packed) == ["inputs.json", "inputs/teacher/code/net.py", "inputs/teacher/weights.safetensors"]
    inputs.unpack(packed, tmp_path / "there")
    assert inputs.pack(tmp_path / "there") == packed
    assert inputs.pack(tmp_path) == {}


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "a/b", ""])
def test_a_record_that_was_changed_leads_nowhere_else(records: Path, name: str) -> None:
    record = read_record(records / inputs.FILE)
    write_record(records / inputs.FILE, {"inputs": {name: record["inputs"]["teacher"]}})
    with pytest.raises(CheckpointError, match="no plain names"):
        inputs.read(records)


DAMAGED = ["", "{", '{"format_version": 2}', '{"format_version": 2, "inputs": {"teacher": {"model": 3}}}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_record_that_is_damaged_is_said_to_be(records: Path, content: str) -> None:
    (records / inputs.FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"inputs\.json: cannot be read"):
        inputs.read(records)


# ---------------------------------------------------------------- where a job cannot go on

MANIFEST = Manifest({TRAIN: SplitManifest((Fragment("a", 0, 100, 1000, "-"),))})


def job(**loop: Any) -> tuple[JobSpec, Plan]:
    values = {"epochs": 3, "global_batch_rows": 10, **loop}
    spec = JobSpec.model_validate(
        {"name": "x", "task": "-", "pipeline": "-", "optimizer": {"kind": "SGD", "lr": 0.1}, "loop": values}
    )
    return spec, make_plan(spec, MANIFEST, ClusterFacts(num_cpus=4, num_gpus=0, memory_bytes=2**33))


def refused(position: int, spec: JobSpec, planned: Plan, *, same_rows: bool = True) -> list[str]:
    stands = Trained("run-1", "run-1", Path(), "-", *job(), Path())
    return [problem.where for problem in _cannot_go_on(spec, planned, same_rows, stands, position, str)]


@pytest.mark.parametrize(
    ("position", "loop", "fields"),
    [
        (130, {}, []),
        (130, {"seed": 7}, ["loop.seed"]),
        (130, {"global_batch_rows": 20, "window_rows": 40}, ["loop.global_batch_rows"]),
        (130, {"window_rows": 5, "seed": 7}, ["loop.seed", "loop.window_rows"]),
        (200, {"window_rows": 5, "seed": 7, "global_batch_rows": 20}, []),
        (300, {}, ["init_from.model"]),
        (300, {"epochs": 4}, []),
        (200, {"epochs": 1, "global_batch_rows": 20}, ["init_from.model"]),
    ],
)
def test_it_is_refused_where_rows_would_be_trained_on_twice_or_not_at_all(
    position: int, loop: dict[str, Any], fields: list[str]
) -> None:
    assert refused(position, *job(**loop)) == fields
    assert refused(position, *job(**loop), same_rows=False) == ["init_from.model", *fields]
