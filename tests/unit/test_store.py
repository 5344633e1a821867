"""The run's folder as a worker uses it: where an attempt begins, what is committed and told, and when to stop."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from raymill import faults
from raymill.checkpoint import snapshot
from raymill.checkpoint.directory import Pointer, names, read_pointer
from raymill.checkpoint.snapshot import Snapshot
from raymill.errors import CheckpointError
from raymill.record.events import CheckpointSaved, Event, StepRefused, append_event, read_events
from raymill.record.folder import RunFolder
from raymill.record.store import LocalRunStore, ResumePoint, begin_attempt, commit_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run-1")
    made.path.mkdir()
    return made


def state(step: int) -> Snapshot:
    return Snapshot({"weight": torch.full((2,), float(step))}, {}, {"step": step, "position": 10 * step})


def commit(folder: RunFolder, step: int, attempt: int) -> CheckpointSaved:
    return commit_checkpoint(folder, attempt, 10, snapshot.content(state(step), best=False), best=False)


def refused(position: int, policy: str) -> StepRefused:
    return StepRefused(step=position // 10, epoch=0, position=position, rows=[1], policy=policy)  # type: ignore[arg-type]


# ---------------------------------------------------------------- where an attempt begins


def test_a_run_begins_at_its_first_row(folder: RunFolder) -> None:
    assert begin_attempt(folder) == ResumePoint(attempt=1, checkpoint=None, position=0)


def test_attempts_are_numbered_and_begin_at_the_newest_checkpoint(folder: RunFolder) -> None:
    begin_attempt(folder)
    commit(folder, 4, attempt=1)
    commit(folder, 9, attempt=1)
    assert begin_attempt(folder) == ResumePoint(attempt=2, checkpoint="step-00000009.1", position=90)
    assert begin_attempt(folder).attempt == 3


def test_a_damaged_checkpoint_is_passed_over_and_noted(folder: RunFolder) -> None:
    begin_attempt(folder)
    commit(folder, 4, attempt=1)
    commit(folder, 9, attempt=1)
    (folder.checkpoints / "step-00000009.1" / "weights.safetensors").write_bytes(b"")
    point = begin_attempt(folder)
    assert (point.checkpoint, point.position) == ("step-00000004.1", 40)
    (note,) = point.notes
    assert note.startswith("checkpoint step-00000009.1 is passed over: ")


def test_a_run_of_damaged_checkpoints_only_does_not_begin_anew(folder: RunFolder) -> None:
    begin_attempt(folder)
    commit(folder, 4, attempt=1)
    (folder.checkpoints / "step-00000004.1" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="Start a new run"):
        begin_attempt(folder)


def test_only_batches_that_were_refused_to_go_back_are_left_out(folder: RunFolder) -> None:
    for event in (refused(30, "skip"), refused(50, "rollback"), refused(70, "stop"), refused(90, "rollback")):
        append_event(folder, event)
    assert begin_attempt(folder).skipped_positions == {50, 90}


@pytest.mark.parametrize("killed_at", ["after_rename", "before_pointer", "after_pointer", "after_commit"])
def test_the_best_checkpoint_is_the_best_wherever_in_its_commit_the_writer_was_killed(
    killed_at: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_attempt(folder)
    for step in (4, 9):
        # Before its evaluation, and behind it: of one name.
        commit(folder, step, attempt=1)
        if step == 9:
            monkeypatch.setattr(faults, "point", partial(killed, killed_at))
        with suppress(KeyboardInterrupt):
            saved = commit_checkpoint(folder, 1, 10, snapshot.content(state(step), best=True), best=True)
            append_event(folder, saved)
    monkeypatch.undo()
    assert begin_attempt(folder).checkpoint == "step-00000009.1"
    assert read_pointer(folder.checkpoints) == Pointer("step-00000009.1", "step-00000009.1", 1)
    told = [event for event in read_events(folder.events)[0] if isinstance(event, CheckpointSaved) and event.best]
    assert [(event.step, event.path) for event in told] == [(step, f"checkpoints/step-0000000{step}.1") for step in (4, 9)]
    # It is told once.
    begin_attempt(folder)
    assert len([event for event in read_events(folder.events)[0] if isinstance(event, CheckpointSaved)]) == 2


def killed(at: str, name: str, path: Path | None = None) -> None:
    if name == at:
        raise KeyboardInterrupt


def test_one_that_is_not_the_best_takes_nothing_from_the_one_that_is(folder: RunFolder) -> None:
    begin_attempt(folder)
    commit_checkpoint(folder, 1, 10, snapshot.content(state(4), best=True), best=True)
    commit(folder, 9, attempt=1)
    begin_attempt(folder)
    assert read_pointer(folder.checkpoints) == Pointer("step-00000009.1", "step-00000004.1", 1)


def test_what_a_killed_attempt_left_is_gone_when_the_next_begins(folder: RunFolder) -> None:
    half = folder.checkpoints / ".stage-step-00000009.1"
    half.mkdir(parents=True)
    (half / "weights.safetensors").write_bytes(b"half")
    folder.handover_request.touch()
    begin_attempt(folder)
    assert list(folder.checkpoints.iterdir()) == []
    assert not folder.handover_request.exists()


# ---------------------------------------------------------------- commits


def test_an_attempt_writes_no_more_once_another_has_begun(folder: RunFolder) -> None:
    begin_attempt(folder)
    commit(folder, 4, attempt=1)
    begin_attempt(folder)
    with pytest.raises(CheckpointError, match="attempt 2 of run run-1 has begun; attempt 1 writes no more"):
        commit(folder, 9, attempt=1)
    assert names(folder.checkpoints) == ["step-00000004.1"]
    commit(folder, 5, attempt=2)
    assert read_pointer(folder.checkpoints) == Pointer("step-00000005.2", None, 2)


def test_each_checkpoint_is_told_of_once_it_is_safe(folder: RunFolder) -> None:
    store = LocalRunStore(folder)
    told: list[Event] = []

    def report(event: Event) -> None:
        assert isinstance(event, CheckpointSaved)
        pointer = read_pointer(folder.checkpoints)
        assert pointer is not None
        assert event.path == f"checkpoints/{pointer.latest}"
        assert store.load(pointer.latest).record["step"] == event.step
        told.append(event)

    writer = store.checkpoint_writer(store.begin_attempt().attempt, keep=1, report=report)
    for step in (1, 2):
        writer.save(state(step), best=step == 2)
    writer.close()
    expected = [
        CheckpointSaved(time_s=0, step=1, path="checkpoints/step-00000001.1", best=False),
        CheckpointSaved(time_s=0, step=2, path="checkpoints/step-00000002.1", best=True),
    ]
    assert [event.model_copy(update={"time_s": 0}) for event in told] == expected
    pointer = read_pointer(folder.checkpoints)
    assert pointer is not None
    assert pointer.best == "step-00000002.1"


# ---------------------------------------------------------------- stopping, and what tests ask for


def test_workers_stop_for_good_or_to_hand_over_and_say_when_all_is_saved(folder: RunFolder) -> None:
    store = LocalRunStore(folder)
    assert not store.wants_stop()
    folder.handover_request.touch()
    assert store.wants_stop()
    store.confirm_saved()
    assert not store.wants_stop()
    folder.stop_request.touch()
    assert store.wants_stop()
    store.confirm_saved()
    assert store.wants_stop(), "a request to stop for good stays"


def test_the_order_is_recorded_by_rank(folder: RunFolder) -> None:
    for rank in (0, 1):
        LocalRunStore(folder, rank).record_order({"position": 10, "rows": [rank]})
    LocalRunStore(folder, 1).record_order({"position": 20, "rows": [7]})
    lines = [json.loads(line) for line in (folder.path / "order-1.jsonl").read_text().splitlines()]
    assert lines == [{"position": 10, "rows": [1]}, {"position": 20, "rows": [7]}]
