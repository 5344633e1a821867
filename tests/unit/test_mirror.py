"""What of a run's folder travels, and what is there when only some of it has."""

from __future__ import annotations

from pathlib import Path

from raymill.orchestration.on_ray import mirror


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_sent_is_there_and_what_is_gone_is_gone(tmp_path: Path) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    for name in ("spec.json", "checkpoints/step-3/a", "checkpoints/step-3/checksums.json"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    first = mirror.stamps(here)
    mirror.write(home, mirror.read(here, first), list(first))
    assert content(home) == content(here)

    # The next commit; the one before is removed, and something was half written.
    for name in ("checkpoints/step-6/a", "checkpoints/.stage-step-9/a", "empty"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("" if name == "empty" else name)
    for path in (here / "checkpoints" / "step-3").iterdir():
        path.unlink()
    (here / "spec.json").write_text("another")
    second = mirror.stamps(here)
    changed = {name: stamp for name, stamp in second.items() if first.get(name) != stamp}
    assert set(changed) == {"empty", "spec.json", "checkpoints/step-6/a"}
    mirror.write(home, mirror.read(here, changed), list(second))
    assert content(home) == {"spec.json": b"another", "empty": b"", "checkpoints/step-6/a": b"checkpoints/step-6/a"}
    assert not (home / "checkpoints" / "step-3").exists()


def test_checkpoints_come_behind_all_that_tells_of_them(tmp_path: Path) -> None:
    for name in ("checkpoints/step-3/a", "zebra.json", "events.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(mirror.stamps(tmp_path)) == ["events.jsonl", "zebra.json", "checkpoints/step-3/a"]


def test_a_file_that_goes_away_in_between_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    assert list(mirror.read(tmp_path, {"gone": (1, 1), "there": (1, 1)})) == ["there"]
