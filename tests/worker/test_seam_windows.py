"""Rows of like length in a batch, and windows that are transformed in chunks: bit-equal after a stop and a crash."""

from __future__ import annotations

import pytest

from probes import lengths, mixed, served
from raymill.task import Schema, Task
from worker_harness import Batches, Experiment, NewRun, stopped_and_killed, strict_at_other_numbers


def mood(schema: Schema) -> Task:
    return served.Mood()


TEXTS = Experiment(mood, lengths.pipeline, lengths.VALUES, chunk_rows=lengths.CHUNK_ROWS)
EXPERIMENTS = {"like lengths": TEXTS, "chunks alone": Experiment(mixed.Mixed, mixed.pipeline, mixed.VALUES, chunk_rows=5)}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, experiment: Experiment, world_size: int) -> None:
    pair = stopped_and_killed(new_run, experiment, world_size)
    rows = sorted(row for batch in pair.whole.batches.values() for row in batch)
    num_rows = len(set(rows))
    assert rows == sorted([*range(num_rows)] * (len(rows) // num_rows)), "each row once in each epoch"


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, experiment: Experiment) -> None:
    strict_at_other_numbers(new_run, experiment)


def padding(batches: Batches) -> float:
    """The share of a batch's words that are padding, on average."""
    words = lengths.num_words(served.make_texts(192, 1))
    found = [1 - sum(words[row] for row in batch) / (len(batch) * max(words[row] for row in batch)) for batch in batches.values()]
    return sum(found) / len(found)


def test_batches_of_like_lengths_are_padded_less_and_are_others_in_each_epoch(new_run: NewRun) -> None:
    without = Experiment(mood, served.texts, lengths.VALUES)
    plain, run = new_run(without), new_run(TEXTS)
    for one in (plain, run):
        one.go(1)
    assert padding(run.batches) < padding(plain.batches) / 2
    first, second = ([run.batches[at] for at in sorted(run.batches)][start : start + 16] for start in (0, 16))
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))
    assert [max(lengths.num_words(served.make_texts(192, 1))[row] for row in batch) for batch in first] != sorted(
        max(lengths.num_words(served.make_texts(192, 1))[row] for row in batch) for batch in first
    ), "short ones do not always come first"
