"""Bad rows in real ranks: all other rows stay in their steps, each bad one is listed once, and too many end the run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from probes import broken, mixed
from raymill.errors import DataError
from worker_harness import Attempt, Crash, Experiment, NewRun

EPOCHS = 2
SOME = frozenset({0, 3, *range(14, 21), 60, 97})


def experiment(refused: frozenset[int], policy: str = "skip", budget: int | None = 200, **loop: Any) -> Experiment:
    values = {**mixed.VALUES, "bad_rows": {"policy": policy, "budget": budget}}
    return Experiment(mixed.Mixed, partial(broken.checked, refused), values).with_values(loop={"epochs": EPOCHS, **loop})


def listed(attempt: Attempt) -> list[int]:
    """The numbers of all rows that were listed, in order."""
    events = [event for event in attempt.events if event["kind"] == "bad_rows"]
    return [
        row["row"] + (broken.VALIDATION_FROM if row["split"] == "validation" else 0) for event in events for row in event["rows"]
    ]


def undisturbed(new_run: NewRun, world_size: int = 1) -> dict[int, list[int]]:
    """The rows of each step where none is bad."""
    run = new_run(experiment(frozenset(), policy="fail", budget=None))
    run.go(world_size)
    return run.batches


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bad_rows_leave_holes_and_are_counted(new_run: NewRun, world_size: int) -> None:
    validation = frozenset({broken.VALIDATION_FROM + 5, broken.VALIDATION_FROM + 30})
    run = new_run(experiment(SOME | validation))
    attempt = run.go(world_size)
    expected = undisturbed(new_run)
    assert run.batches == {position: [row for row in rows if row not in SOME] for position, rows in expected.items()}
    assert sorted(listed(attempt)) == sorted(SOME | validation)
    for outcome in attempt.outcomes:
        assert outcome.rows_used == EPOCHS * (mixed.TRAIN_ROWS - len(SOME))
        assert outcome.rows_skipped == EPOCHS * len(SOME)
        assert outcome.position == EPOCHS * mixed.TRAIN_ROWS
    rows = [event["rows"] for event in attempt.events if event["kind"] == "evaluation"]
    assert rows == [mixed.VALIDATION_ROWS - len(validation)] * EPOCHS


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_run_with_bad_rows_is_the_uninterrupted_one(new_run: NewRun, world_size: int) -> None:
    expected = new_run(experiment(SOME)).go(world_size)
    run = new_run(experiment(SOME).with_values(checkpoint={"every_steps": 2}))
    attempts = [run.go(world_size, stop_after=2)]
    with pytest.raises(Crash):
        run.go(world_size, crash_after=5)
    attempts += [run.go(world_size, stop_after=6), run.go(world_size)]
    assert attempts[-1].sha256 == expected.sha256
    assert attempts[-1].first.rows_used == expected.first.rows_used
    assert attempts[-1].first.rows_skipped == expected.first.rows_skipped
    events = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    rows = [row["row"] for event in events if event["kind"] == "bad_rows" for row in event["rows"]]
    assert sorted(rows) == sorted(SOME), "each once, over all attempts"


def test_strict_weights_with_bad_rows_are_the_same_at_any_number_of_workers(new_run: NewRun) -> None:
    batch = undisturbed(new_run)[2 * mixed.GLOBAL_BATCH_ROWS]
    # Rank 0 of 2 and of 3 has no row in the third step.
    refused = SOME | frozenset(batch[: mixed.GLOBAL_BATCH_ROWS // 2])
    attempts = [
        new_run(experiment(refused, strict=True, gradient_accumulation_steps=1)).go(world_size) for world_size in (1, 2, 3)
    ]
    assert len({attempt.sha256 for attempt in attempts}) == 1
    assert {attempt.first.rows_used for attempt in attempts} == {EPOCHS * (mixed.TRAIN_ROWS - len(refused))}


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_without_a_good_row_is_passed_over(new_run: NewRun, world_size: int) -> None:
    expected = undisturbed(new_run)
    position = 2 * mixed.GLOBAL_BATCH_ROWS
    refused = frozenset(expected[position])
    run = new_run(experiment(refused))
    attempt = run.go(world_size)
    assert run.batches[position] == []
    steps = {event["step"]: event["metrics"] for event in attempt.events if event["kind"] == "step"}
    assert list(steps) == list(range(1, EPOCHS * mixed.STEPS_PER_EPOCH + 1))
    assert [step for step, metrics in steps.items() if not metrics] == [2]
    assert attempt.first.rows_used == EPOCHS * (mixed.TRAIN_ROWS - len(refused))
    stopped = new_run(experiment(refused))
    stopped.go(world_size, stop_after=1)
    assert stopped.go(world_size).sha256 == attempt.sha256


def test_a_resume_where_rank_0_has_no_good_row_settles_the_same_buckets(new_run: NewRun) -> None:
    position = 3 * mixed.GLOBAL_BATCH_ROWS
    refused = frozenset(undisturbed(new_run)[position][: mixed.GLOBAL_BATCH_ROWS // 3])
    values = experiment(refused).values
    crossing = Experiment(broken.Crossing, partial(broken.checked, refused), values)
    expected = new_run(crossing).go(3)
    stopped = new_run(crossing)
    assert stopped.go(3, stop_after=1).first.position == 2 * mixed.GLOBAL_BATCH_ROWS
    assert stopped.go(3).sha256 == expected.sha256


def test_ranks_without_a_good_row_take_part_in_an_evaluation(new_run: NewRun) -> None:
    good = broken.VALIDATION_FROM + 4
    numbers = frozenset(range(broken.VALIDATION_FROM, broken.VALIDATION_FROM + 5))
    values = {**mixed.VALUES, "bad_rows": {"policy": "skip", "budget": 10}, "loop": {"epochs": 1, "global_batch_rows": 24}}
    run = new_run(Experiment(mixed.Mixed, partial(broken.checked, numbers - {good}, 5), values))
    [evaluation] = [event for event in run.go(3).events if event["kind"] == "evaluation"]
    assert evaluation["rows"] == sum(map(sum, evaluation["totals"]["validation/confusion"])) == 1
    assert evaluation["metrics"]["validation/accuracy"] in (0.0, 1.0)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_row_group_is_left_out_and_quarantined(new_run: NewRun, tmp_path: Path, world_size: int) -> None:
    file = broken.write(tmp_path / "data")
    broken.damage(file, group=0)
    broken.damage(file, group=4)
    bad = {*range(broken.FRAGMENT_ROWS), *range(4 * broken.FRAGMENT_ROWS, 5 * broken.FRAGMENT_ROWS)}
    values = {**mixed.VALUES, "checkpoint": {}, "bad_rows": {"policy": "quarantine", "budget": len(bad)}}
    run = new_run(Experiment(mixed.Mixed, partial(broken.from_parquet, str(tmp_path / "data")), values))
    run.go(world_size, stop_after=3)
    quarantine = run.folder / "quarantine.jsonl"
    with quarantine.open("a") as lines:
        lines.write('{"split": "tr')  # as a kill would leave it
    outcome = run.go(world_size).first
    assert (outcome.rows_used, outcome.rows_skipped) == (3 * (mixed.TRAIN_ROWS - len(bad)), 3 * len(bad))
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted(row["row"] for row in rows) == sorted(bad)
    assert {(row["file"], row["part"], row["row"] - row["index"]) for row in rows} == {
        (file.name, 0, 0),
        (file.name, 4, 4 * broken.FRAGMENT_ROWS),
    }
    assert all("row group" in row["reason"] for row in rows)


@pytest.mark.parametrize("world_size", [1, 2])
def test_more_bad_rows_than_the_budget_end_the_run(new_run: NewRun, world_size: int) -> None:
    run = new_run(experiment(SOME, policy="quarantine", budget=len(SOME) - 1))
    message = rf"at least {len(SOME)} rows are bad, more than bad_rows.budget: {len(SOME) - 1}. .*number \d+.*larger bad_rows"
    with pytest.raises(DataError, match=message):
        run.go(world_size)
    # What was listed before stays; a run that found more at once listed none.
    assert len((run.folder / "quarantine.jsonl").read_text().splitlines()) < len(SOME)


def test_by_default_the_first_bad_row_ends_the_run_and_is_named(new_run: NewRun) -> None:
    run = new_run(experiment(frozenset({60}), policy="fail", budget=None))
    with pytest.raises(DataError, match=r"broken/train, part 8, row 4: number 60\. .*bad_rows\.policy to skip or quarantine"):
        run.go(2)
