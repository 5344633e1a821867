"""Kinds of training the engine was not written around go through the same loop, stream and resume without a special case."""

from __future__ import annotations

import numpy as np
import pytest

from probes import detector, gan, language
from worker_harness import Attempt, Experiment, NewRun

GAN = Experiment(gan.Points, gan.pipeline, gan.VALUES)
DETECTOR = Experiment(detector.Boxes, detector.pipeline, detector.VALUES)
LANGUAGE = Experiment(language.NextWord, language.pipeline, language.VALUES)


def evaluations(attempt: Attempt, name: str) -> list[float]:
    return [metrics[name] for metrics in attempt.metrics("evaluation")]


@pytest.mark.parametrize("experiment", [GAN, DETECTOR, LANGUAGE], ids=["gan", "detector", "language"])
def test_interrupted_and_resumed_gives_the_same_weights(new_run: NewRun, experiment: Experiment) -> None:
    whole, resumed = new_run(experiment), new_run(experiment)
    expected = whole.go(2)
    for step in (3, 12):
        assert resumed.go(2, stop_after=step).first.status == "interrupted"
    found = resumed.go(2)
    assert found.sha256 == expected.sha256
    assert resumed.batches == whole.batches
    assert found.first.rows_used == expected.first.rows_used == sum(map(len, whole.batches.values()))


def test_a_generator_learns_where_real_points_lie(new_run: NewRun) -> None:
    attempt = new_run(GAN.with_values(loop={"epochs": 12})).go(2)
    distances = evaluations(attempt, "validation/distance")
    assert distances[-1] < 0.5 * distances[0]
    first = attempt.metrics("step")[0]
    assert {"train/discriminator_loss", "train/generator_loss"} <= set(first)
    assert first["train/generator_learning_rate"] == gan.VALUES["optimizer"]["generator"]["lr"]


def test_a_detector_learns_from_images_of_many_sizes(new_run: NewRun) -> None:
    attempt = new_run(DETECTOR).go(2)
    losses = evaluations(attempt, "validation/loss")
    assert losses[-1] < 0.5 * losses[0]
    totals = [event["totals"]["validation/pixels"] for event in attempt.events if event["kind"] == "evaluation"]
    images = detector.make_rows(33, 2)["image"]
    assert [pixels for _, _, pixels in totals] == [sum(image.size for image in images)] * 4


def test_a_language_model_learns_from_rows_that_cross_documents(new_run: NewRun) -> None:
    attempt = new_run(LANGUAGE).go(2)
    losses = evaluations(attempt, "validation/loss")
    assert losses[-1] < 0.85 * losses[0]
    num_rows = sum(fragment.num_rows for fragment in language.PackedDocuments(20, 2).fragments())
    counted = [event["totals"]["validation/tokens"] for event in attempt.events if event["kind"] == "evaluation"]
    assert counted == [num_rows * language.ROW_TOKENS] * 4


def test_packed_rows_laid_end_to_end_are_the_documents() -> None:
    source = language.PackedDocuments(70, 1)
    text = np.concatenate(language.documents(70, 1))
    rows = np.concatenate([source.read(fragment)["tokens"] for fragment in source.fragments()])
    np.testing.assert_array_equal(rows[:, :-1].reshape(-1), text[: rows.shape[0] * language.ROW_TOKENS])
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])
