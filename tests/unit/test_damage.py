"""Files of a run that were damaged, or changed to do harm: passed over or refused in words, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raymill.checkpoint import directory, snapshot
from raymill.checkpoint.commit import commit
from raymill.checkpoint.directory import POINTER, find_latest, read_pointer, verify, write_checksums
from raymill.checkpoint.snapshot import Snapshot, weights_sha256
from raymill.checkpoint.weights_digest import TORCH_TYPES, file_weights_sha256
from raymill.config.load import load_job
from raymill.data.manifest import from_record
from raymill.data.rows import pack, unpack
from raymill.data.sources import ParquetSource, write_parquet
from raymill.errors import CheckpointError, DataError, InputError, Problem
from raymill.files import read_record
from raymill.orchestration.attempts import committed_step
from raymill.orchestration.prepare import store_problems
from raymill.record.events import read_events
from raymill.record.folder import RunFolder
from raymill.record.store import begin_attempt
from raymill.task import Field, Schema
from raymill.tracking.mlflow_client import tracking_uri

DEEP = "[" * 100_000 + "]" * 100_000
OLDER, NEWER = "step-00000001.1", "step-00000002.1"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with two whole checkpoints."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for step in (1, 2):
        weights = {"layer.weight": torch.full((2, 3), float(step)), "layer.count": torch.tensor(step)}
        record = {"step": step, "position": 10 * step}
        commit(folder.checkpoints, 1, 5, snapshot.content(Snapshot(weights, {}, record), best=False), best=False)
    return folder


def passed_over(run: RunFolder) -> str:
    """What is said of the newer checkpoint when the older one is taken."""
    point = begin_attempt(run)
    assert (point.checkpoint, point.position) == (OLDER, 10)
    (note,) = point.notes
    assert note.startswith(f"checkpoint {NEWER} is passed over: ")
    committed_step(run)
    return note


# ---------------------------------------------------------------- one checkpoint


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link(path: Path) -> None:
    elsewhere = path.parents[1] / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("harm", [a_folder, a_link, lambda path: path.write_text(DEEP)], ids=["folder", "link", "deep"])
@pytest.mark.parametrize("name", ["checksums.json", "state.json", "weights.safetensors", "optimizer.safetensors"])
def test_a_file_of_a_checkpoint_that_is_none_is_passed_over(name: str, harm: Callable[[Path], None], run: RunFolder) -> None:
    harm(run.checkpoints / NEWER / name)
    assert name in passed_over(run)


STATES: list[Any] = [
    [],
    7,
    {},
    {"position": 20},
    {"step": 2},
    {"step": 2, "position": "20"},
    {"step": 2, "position": -20},
    {"step": 2, "position": True},
    {"step": 2, "position": 20.0},
    {"step": 2, "position": 2**63},
    {"step": None, "position": 20},
    {"step": 2, "position": 20, "weights_sha256": 5},
    {"step": 2, "position": 20, "weights_sha256": "0" * 64},
]


@pytest.mark.parametrize("state", STATES, ids=str)
def test_a_state_whose_position_is_none_is_passed_over_though_its_checksum_fits(state: Any, run: RunFolder) -> None:
    path = run.checkpoints / NEWER
    (path / "state.json").write_text(json.dumps(state))
    write_checksums(path)
    verify(path)
    passed_over(run)
    (run.checkpoints / POINTER).unlink()
    assert read_pointer(run.checkpoints) == directory.Pointer(OLDER, None, 1)


def test_a_deep_state_is_passed_over_though_its_checksum_fits(run: RunFolder) -> None:
    (run.checkpoints / NEWER / "state.json").write_text(DEEP)
    write_checksums(run.checkpoints / NEWER)
    assert "nests too deep" in passed_over(run)


def rehashed(path: Path) -> None:
    weights = {"layer.weight": torch.full((2, 3), 9.0), "layer.count": torch.tensor(2)}
    save_file(weights, path / "weights.safetensors")
    write_checksums(path)


def test_weights_changed_together_with_their_checksums_are_passed_over_and_not_loaded(run: RunFolder) -> None:
    path = run.checkpoints / NEWER
    rehashed(path)
    verify(path)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: the weights have SHA-256 .* were saved; .* were changed"):
        snapshot.load(path)
    with pytest.raises(CheckpointError, match="checkpoint of step 2: the weights have SHA-256"):
        snapshot.unpack(directory.read(path))
    assert "the weights have SHA-256" in passed_over(run)


def test_the_digest_of_a_file_is_that_of_its_tensors_for_every_type(tmp_path: Path) -> None:
    weights = {f"z{name}": torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in TORCH_TYPES.values()}
    weights |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "one": torch.ones(1), "n\u00e4me": torch.ones(2)}
    save_file(weights, tmp_path / "w", metadata={"by": "a test"})
    assert file_weights_sha256(tmp_path / "w") == weights_sha256(weights)


# ---------------------------------------------------------------- the pointer


POINTERS: list[Any] = [
    {"latest": NEWER, "best": None, "attempt": "9"},
    {"latest": NEWER, "best": None, "attempt": -1},
    {"latest": NEWER, "best": None, "attempt": True},
    {"latest": NEWER, "best": None, "attempt": 1.0},
    {"latest": NEWER, "best": None, "attempt": 10**30},
    {"latest": NEWER, "best": None, "attempt": 7},
    {"latest": f"../checkpoints/{OLDER}", "best": None, "attempt": 1},
    {"latest": f"{OLDER}/../{OLDER}", "best": None, "attempt": 1},
    {"latest": "..", "best": None, "attempt": 1},
    {"latest": "", "best": None, "attempt": 1},
    {"latest": None, "best": None, "attempt": 1},
    {"latest": [OLDER], "best": None, "attempt": 1},
    {"latest": NEWER, "best": "../../elsewhere", "attempt": 1},
    {"latest": NEWER, "best": 5, "attempt": 1},
]


@pytest.mark.parametrize("pointer", POINTERS, ids=str)
def test_a_pointer_that_no_commit_has_written_is_not_followed(pointer: Any, run: RunFolder) -> None:
    (run.checkpoints / POINTER).write_text(json.dumps({"format_version": 1, **pointer}))
    assert read_pointer(run.checkpoints) == directory.Pointer(NEWER, None, 1)
    assert begin_attempt(run).checkpoint == NEWER
    weights = {"w": torch.ones(1)}
    taken = Snapshot(weights, {}, {"step": 3, "position": 30})
    commit(run.checkpoints, 1, 5, snapshot.content(taken, best=False), best=False)
    assert read_pointer(run.checkpoints) == directory.Pointer("step-00000003.1", None, 1)


@pytest.mark.parametrize("harm", [a_folder, lambda path: path.write_text(DEEP)], ids=["folder", "deep"])
def test_a_pointer_that_cannot_be_read_is_not_followed(harm: Callable[[Path], None], run: RunFolder) -> None:
    assert begin_attempt(run).notes == ()
    harm(run.checkpoints / POINTER)
    assert read_pointer(run.checkpoints) == directory.Pointer(NEWER, None, 1)
    point = begin_attempt(run)
    assert point.checkpoint == NEWER
    assert [note.partition(" ")[0] for note in point.notes] == [POINTER]


def test_without_a_pointer_a_damaged_newest_checkpoint_is_told_of_too(run: RunFolder) -> None:
    (run.checkpoints / POINTER).write_text("{")
    (run.checkpoints / NEWER / "state.json").write_text("{}")
    of_pointer, of_checkpoint = begin_attempt(run).notes
    assert POINTER in of_pointer
    assert "state.json" in of_checkpoint


def test_if_none_is_left_the_reasons_are_said(run: RunFolder) -> None:
    for name in (OLDER, NEWER):
        rehashed(run.checkpoints / name)
    with pytest.raises(CheckpointError, match=r"none of .* is whole: .*SHA-256.*; .*SHA-256"):
        find_latest(run.checkpoints, lambda note: None)


# ---------------------------------------------------------------- other records


def test_records_that_nest_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(DEEP)
    with pytest.raises(ValueError, match="nests too deep"):
        read_record(path)
    path.write_text('{"format_version": true}')
    with pytest.raises(InputError, match="format_version True"):
        read_record(path)
    events = tmp_path / "events.jsonl"
    events.write_text(f"{DEEP}\n")
    assert read_events(events) == ([], len(DEEP) + 1)


def test_a_manifest_that_nests_too_deep_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    columns = {"path": [["a", 1]], "part": [deep], "num_rows": [1], "num_bytes": [1], "identity": [["b", 1]]}
    with pytest.raises(DataError, match="incomplete"):
        from_record({"digest": "", "splits": {"train": columns}})
    while deep:  # taking it apart at once would be a recursion too
        deep = deep.pop()


@pytest.mark.parametrize("totals", [{"m": {"\ud800": None}}, {"m": ["\udfff"]}, {"\ud800": 1}])
def test_an_event_with_half_a_character_is_refused(totals: Any, tmp_path: Path) -> None:
    values = {"format_version": 1, "kind": "evaluation", "time_s": 3.0, "step": 1, "epoch": 0, "rows": 8, "metrics": {}}
    (tmp_path / "events.jsonl").write_text(json.dumps({**values, "totals": totals}) + "\n")
    with pytest.raises(InputError, match=r"found evaluation\.totals"):
        read_events(tmp_path / "events.jsonl")


def test_a_manifest_that_repeats_a_path_without_end_is_refused() -> None:
    columns = {"path": [["a", 10**30]], "part": [1], "num_rows": [1], "num_bytes": [1], "identity": [["b", 1]]}
    with pytest.raises(DataError, match="incomplete"):
        from_record({"digest": "", "splits": {"train": columns}})


@pytest.mark.parametrize("text", ['{"\\ud800"}', '"\\ud800": 1', 'name: "\\ud800"', 'model: {a: ["x\\udfffy"]}'])
def test_half_a_character_in_a_job_is_a_problem_like_others(text: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(InputError, match=r"job\.yaml:1.*: found .*half a character") as caught:
        load_job(tmp_path / "job.yaml")
    str(caught.value).encode()


# ---------------------------------------------------------------- packets


HEADERS: list[Any] = [
    None,
    5,
    {},
    [5],
    [{}],
    [{"name": "a"}],
    [{"name": "a", "kind": "moon"}],
    [{"name": "a", "kind": "array", "dtype": "<i4", "shape": [-1]}],
    [{"name": "a", "kind": "array", "dtype": "<i4", "shape": [-2, -2]}],
    [{"name": "a", "kind": "array", "dtype": "<i4", "shape": [3]}],
    [{"name": "a", "kind": "array", "dtype": "<i4", "shape": [5]}],
    [{"name": "a", "kind": "array", "dtype": "<i4", "shape": []}],
    [{"name": "a", "kind": "array", "dtype": "<i4", "shape": 4}],
    [{"name": "a", "kind": "array", "dtype": "<i4", "shape": [True, 4]}],
    [{"name": "a", "kind": "array", "dtype": "<i4", "shape": [2**62, 4]}],
    [{"name": "a", "kind": "array", "dtype": "<i4", "shape": [2.0, 2]}],
    [{"name": "a", "kind": "array", "dtype": "O", "shape": [2]}],
    [{"name": "a", "kind": "array", "dtype": "<U2", "shape": [2]}],
    [{"name": "a", "kind": "array", "dtype": "<i4,O", "shape": [2]}],
    [{"name": "a", "kind": "array", "dtype": None, "shape": [2]}],
    [{"name": "a", "kind": "array", "dtype": "nothing", "shape": [2]}],
    [{"name": "a", "kind": "arrays", "dtype": "<i4", "shapes": [[-1]]}],
    [{"name": "a", "kind": "arrays", "dtype": "<i4", "shapes": [[2], [1]]}],
    [{"name": "a", "kind": "arrays", "dtype": "<i4", "shapes": [[2], [3]]}],
    [{"name": "a", "kind": "arrays", "dtype": "<i4", "shapes": [[6], [-2]]}],
    [{"name": "a", "kind": "bytes", "sizes": [10, 10]}],
    [{"name": "a", "kind": "bytes", "sizes": [20, -4]}],
    [{"name": "a", "kind": "bytes", "sizes": [3]}],
    [{"name": "a", "kind": "bytes", "sizes": ["16"]}],
    [{"name": "a", "kind": "text", "sizes": [4, 12]}],
    [{"name": ["a"], "kind": "bytes", "sizes": [16]}],
    [{"name": 7, "kind": "bytes", "sizes": [16]}],
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_a_packet_whose_header_lies_is_refused(header: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unpack(json.dumps(header), ["\u65e5\u672c\u8a9e\u65e5\u672c".encode() + b"x"])


@pytest.mark.parametrize(("header", "buffers"), [("", []), (DEEP, []), ("[]", [b"a"]), ("[{}]", [])])
def test_a_packet_without_a_header_or_with_other_buffers_is_refused(header: str, buffers: list[bytes]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unpack(header, buffers)


def test_a_packet_that_names_a_column_twice_or_of_other_lengths_is_refused() -> None:
    header, buffers = pack({"a": np.arange(3)})
    (entry,) = json.loads(header)
    with pytest.raises(ValueError, match="each of its columns once"):
        unpack(json.dumps([entry, entry]), [*buffers, *buffers])
    with pytest.raises(ValueError, match="columns differ in length"):
        unpack(
            json.dumps([entry, {**entry, "name": "b", "shape": [3, 0]}, {**entry, "name": "c", "shape": [0]}]),
            [*buffers, b"", b""],
        )


# ---------------------------------------------------------------- where the store may be


@pytest.mark.parametrize("name", ["a?b", "a%20b", "100%"])
def test_a_home_that_no_address_can_name_is_refused_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMILL_HOME", str(tmp_path / name))
    (problem,) = store_problems()
    assert isinstance(problem, Problem)
    assert problem.found == str(tmp_path / name)
    with pytest.raises(InputError, match="RAYMILL_HOME"):
        tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert store_problems() == []


def test_links_are_refused_in_the_files_of_a_model_version_too(run: RunFolder, tmp_path: Path) -> None:
    version = tmp_path / "version"
    shutil.copytree(run.checkpoints / NEWER, version)
    a_link(version / "weights.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        verify(version)


def test_a_page_that_has_lost_its_checksum_is_damaged(tmp_path: Path) -> None:
    """Two bits: one makes a header's checksum a field that nobody knows, so that Arrow verifies nothing; one changes a value."""
    schema: Schema = {"a": Field("int64")}
    write_parquet(tmp_path, {"a": np.array([0, 220959, -326, 0])}, schema, num_shards=1, row_group_rows=3)
    source = ParquetSource(str(tmp_path), schema)
    fragment = source.fragments()[0]
    assert source.read(fragment)["a"].tolist() == [0, 220959, -326]
    path = tmp_path / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    content[32] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="a page of it has lost its checksum"):
        source.read(fragment)
