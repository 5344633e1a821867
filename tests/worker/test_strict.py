"""Strict mode: the same weights to the bit at any number of workers. And what becomes of a batch that spoils the numbers."""

from __future__ import annotations

import pytest

from probes import gan, mixed
from raymill.errors import NumberError
from worker_harness import Experiment, NewRun

STRICT = Experiment(mixed.Mixed, mixed.pipeline, mixed.VALUES).with_values(
    loop={"strict": True, "gradient_accumulation_steps": 1}
)


def test_strict_weights_are_the_same_at_any_number_of_workers(new_run: NewRun) -> None:
    found = {world_size: new_run(STRICT).go(world_size).sha256 for world_size in (1, 2, 3, 4)}
    assert len(set(found.values())) == 1, found


def test_without_strict_the_number_of_workers_shows_in_the_weights(new_run: NewRun) -> None:
    plain = STRICT.with_values(loop={"strict": False})
    assert new_run(plain).go(1).sha256 != new_run(plain).go(3).sha256


def test_a_strict_run_that_goes_on_with_other_workers_is_the_uninterrupted_one(new_run: NewRun) -> None:
    expected = new_run(STRICT).go(2)
    run = new_run(STRICT)
    for world_size, stop_after in ((2, 3), (1, 7), (3, 11)):
        assert run.go(world_size, stop_after=stop_after).first.status == "interrupted"
    found = run.go(4)
    assert found.sha256 == expected.sha256
    assert found.first.rows_used == expected.first.rows_used == 3 * mixed.TRAIN_ROWS


def test_strict_takes_shards_of_unequal_size_and_two_objectives(new_run: NewRun) -> None:
    uneven = STRICT.with_values(loop={"shards": 5})
    assert new_run(uneven).go(1).sha256 == new_run(uneven).go(3).sha256
    adversarial = Experiment(gan.Points, gan.pipeline, gan.VALUES).with_values(loop={"strict": True, "epochs": 1})
    assert new_run(adversarial).go(1).sha256 == new_run(adversarial).go(2).sha256


# ---------------------------------------------------------------- numbers that are none

SPOILED = Experiment(mixed.Mixed, mixed.pipeline_with_nan, {**mixed.VALUES, "checkpoint": {"every_steps": 1}})


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_spoiled_batch_is_named_and_can_be_skipped_as_if_it_were_not_there(new_run: NewRun, world_size: int) -> None:
    with pytest.raises(NumberError, match="Rows of the batch: "):
        new_run(SPOILED).go(world_size)
    skipping = SPOILED.with_values(loop={"on_nan": "skip"})
    run = new_run(skipping)
    skipped = run.go(world_size)
    refused = [event for event in skipped.events if event["kind"] == "refused"]
    assert len(refused) == 3, "row 60 is met once in each of three epochs"
    for event in refused:
        assert sorted(event["rows"]) == sorted(run.batches[event["position"]])
        assert 60 in event["rows"]
    total = 3 * mixed.TRAIN_ROWS
    assert skipped.first.rows_skipped == sum(len(event["rows"]) for event in refused)
    assert skipped.first.rows_used + skipped.first.rows_skipped == total
    left_out = new_run(skipping).go(world_size, skipped_positions=frozenset(event["position"] for event in refused))
    assert left_out.sha256 == skipped.sha256
    assert left_out.first.rows_skipped == skipped.first.rows_skipped
