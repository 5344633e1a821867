"""A run's code as it is kept: what changed is named, nothing is lost, no secret is copied."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import MagicMock

import pyarrow as pa
import pytest

from raymill.config.spec import JobSpec
from raymill.data import ray_stream
from raymill.errors import CheckpointError, InputError, RunError
from raymill.files import write_record
from raymill.record import kept_code
from raymill.record.folder import RunFolder
from raymill.record.store import begin_attempt
from raymill.redaction import code_holds_secret
from raymill.training import assembly

CODE = {"jobs/mine/task.py": b"a = 1\nb = 2\nc = 3\n", "jobs/mine/net.py": b"width = 8\n"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_a_run_keeps_the_files_and_a_digest_of_them(folder: RunFolder) -> None:
    kept_code.keep(folder, CODE, 0)
    record = kept_code.read(folder.path)
    assert record is not None
    assert record.kept is not None
    assert record.digest == kept_code.digest(kept_code.sha256s(dict(reversed(CODE.items()))))
    assert {name: (folder.path / record.kept / name).read_bytes() for name in CODE} == CODE
    assert record.libraries["raymill"]
    assert record.libraries["torch"]
    assert (folder.path / record.kept / "jobs/mine/net.py").stat().st_mode & 0o077 == 0
    assert kept_code.changes_since(folder.path, record, CODE) == []


def test_each_file_that_differs_is_named_with_its_lines(folder: RunFolder) -> None:
    kept_code.keep(folder, CODE, 0)
    record = kept_code.read(folder.path)
    assert record is not None
    now = {"jobs/mine/task.py": b"a = 1\nb = 5\nc = 3\nd = 4\n", "jobs/mine/more.py": b"x = 1\ny = 2\n"}
    found = kept_code.changes_since(folder.path, record, now)
    assert [str(change) for change in found] == [
        "jobs/mine/more.py added (+2 -0 lines)",
        "jobs/mine/net.py missing (+0 -1 lines)",
        "jobs/mine/task.py changed (+2 -1 lines)",
    ]
    assert [str(change) for change in kept_code.changes(record.files, {**CODE, "jobs/mine/net.py": b""})] == [
        "jobs/mine/net.py changed"
    ]
    with pytest.raises(RunError, match=r"not registered: .*jobs/mine/more.py added.*Undo that; it is kept in "):
        kept_code.refuse_to_export(folder, record, kept_code.changes_since(folder.path, record, now))


def test_code_that_was_accepted_is_the_runs_from_then_on_and_what_was_before_stays(folder: RunFolder) -> None:
    kept_code.keep(folder, CODE, 0)
    first = kept_code.read(folder.path)
    kept_code.keep(folder, CODE, 7)
    assert kept_code.read(folder.path) == first
    assert begin_attempt(folder).notes == ()

    changed = {**CODE, "jobs/mine/net.py": b"width = 9\n"}
    kept_code.keep(folder, changed, 12)
    record = kept_code.read(folder.path)
    assert first is not None
    assert record is not None
    assert first.kept
    assert record.kept
    [earlier] = record.earlier
    assert (earlier.digest, earlier.kept, earlier.until_step) == (first.digest, first.kept, 12)
    assert (folder.path / first.kept / "jobs/mine/net.py").read_bytes() == b"width = 8\n"
    assert (folder.path / record.kept / "jobs/mine/net.py").read_bytes() == b"width = 9\n"
    assert begin_attempt(folder).notes == (
        "the code was changed after step 12, which was accepted: jobs/mine/net.py changed (+1 -1 lines)",
    )
    change = {"file": "jobs/mine/net.py", "kind": "changed", "lines_added": 1, "lines_removed": 1, "after_step": 12}
    assert kept_code.accepted_changes(folder.path) == [change]


def test_a_run_from_before_such_records_says_that_its_code_is_not_known(folder: RunFolder) -> None:
    kept_code.keep(folder, CODE, 12)
    assert begin_attempt(folder).notes == ("the code of the first 12 steps is not known",)


def test_other_libraries_are_named(folder: RunFolder) -> None:
    kept_code.keep(folder, CODE, 0)
    values = json.loads(folder.code.read_text())
    folder.code.write_text(json.dumps({**values, "libraries": {**values["libraries"], "torch": "1.0"}}))
    [note] = begin_attempt(folder).notes
    assert note.startswith("other libraries than when the run began: torch 1.0 then, ")


def test_code_that_is_too_large_or_holds_a_secret_is_digested_and_not_kept(folder: RunFolder, tmp_path: Path) -> None:
    code = {**CODE, "jobs/mine/store.py": b"client = connect(api_key='sk-4711-abcdef')\n"}
    kept_code.keep(folder, code, 0)
    record = kept_code.read(folder.path)
    assert record is not None
    assert record.kept is not None
    assert not (folder.path / record.kept / "jobs/mine/store.py").exists()
    assert list(record.files) == sorted(code)
    assert begin_attempt(folder).notes == ("not kept of the code: jobs/mine/store.py: it holds what looks like a secret",)

    large = RunFolder(tmp_path / "large")
    large.path.mkdir()
    kept_code.keep(large, {"jobs/table.py": b"#" * (kept_code.MAX_BYTES + 1)}, 0)
    assert not (large.path / "code").exists()
    [note] = begin_attempt(large).notes
    assert "the code has 4194305 bytes in all; at most 4194304 are kept" in note


@pytest.mark.parametrize(
    ("source", "secret"),
    [
        ("password = 'hunter2-hunter2'", True),
        ("def f(api_token='abcdef'): pass", True),
        ("settings = {'secret': 'abcdef'}", True),
        ("url = 'postgres://me:hunter2@host/db'", True),
        ("self.access_key: str = 'AKIA0123'", True),
        ("token = tokenizer(text)", False),
        ("password = os.environ['PASSWORD']", False),
        ("keys = ['image', 'label']", False),
        ("def (", False),
    ],
)
def test_what_looks_like_a_secret_in_code(source: str, secret: bool) -> None:
    assert code_holds_secret(source.encode()) is secret


@pytest.mark.parametrize("values", [{}, {"digest": 3}, {"files": {"../../etc/passwd": "0"}}])
def test_a_damaged_record_is_refused_with_what_to_do(folder: RunFolder, values: dict[str, object]) -> None:
    write_record(folder.code, values)
    with pytest.raises(CheckpointError, match=r"code.json: cannot be read: .*Restore it"):
        kept_code.read(folder.path)
    folder.code.write_text("{}")
    with pytest.raises(InputError, match="format_version"):
        kept_code.read(folder.path)


def test_a_record_that_was_changed_leads_to_no_file_outside_its_folder(folder: RunFolder, tmp_path: Path) -> None:
    inner = RunFolder(tmp_path / "run")
    inner.path.mkdir()
    (tmp_path / "outside.py").write_text("x = 1\n")
    kept_code.keep(inner, CODE, 0)
    values = json.loads(inner.code.read_text())
    usual, outside = values["kept"], str(tmp_path / "outside.py")
    for kept, name in ((usual, "../../../outside.py"), (usual, outside), ("..", "outside.py"), (str(tmp_path), "outside.py")):
        inner.code.write_text(json.dumps({**values, "kept": kept, "files": {name: "0"}}))
        record = kept_code.read(inner.path)
        assert record is not None
        [change] = kept_code.changes_since(inner.path, record, {})
        assert (change.kind, change.lines_removed) == ("missing", None)


def test_a_process_that_begins_to_read_holds_the_code_against_the_runs_before_it_reads() -> None:
    reader = MagicMock(run="a run", check_code=MagicMock(side_effect=InputError([])))
    with pytest.raises(InputError):
        next(ray_stream._read_block(pa.table({"id": [0]}), reader, MagicMock()))
    reader.read.assert_not_called()


def test_workers_name_the_file_and_both_ways_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "code_when_imported", lambda spec: {**CODE, "jobs/mine/net.py": b""})
    spec = JobSpec.model_validate({"name": "mine", "task": "jobs.mine.task:T", "pipeline": "-", "optimizer": {"kind": "SGD"}})
    assembly.refuse_other_code("run-1", kept_code.sha256s({**CODE, "jobs/mine/net.py": b""}), spec)
    with pytest.raises(InputError) as caught:
        assembly.refuse_other_code("run-1", kept_code.sha256s(CODE), spec)
    [problem] = caught.value.problems
    assert (problem.where, problem.found) == ("jobs/mine/net.py", "changed")
    assert "Undo that and type --resume run-1, or" in problem.fix
    assert problem.fix.endswith("--resume run-1 --accept-code-changes")
