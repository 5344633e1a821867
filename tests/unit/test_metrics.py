"""A mean is over all rows, each once, at any number of ranks; a total is a sum; anything else is refused."""

from __future__ import annotations

import io

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from raymill.errors import InputError
from raymill.evaluation.kept import gathered
from raymill.evaluation.pictures import as_png
from raymill.evaluation.sums import Evaluation, as_numbers
from raymill.own_code import contracts
from raymill.task import Batch, Kept, Picture, Task, Total


def flat(evaluation: Evaluation) -> torch.Tensor:
    """What a rank sends."""
    sent: list[torch.Tensor] = []

    def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
        sent.append(tensor)
        return [tensor]

    evaluation.reduce(gather)
    return sent[0]


def reduce(ranks: list[Evaluation]) -> tuple[dict[str, float], dict[str, object], int]:
    values, totals, rows = ranks[0].reduce(lambda _: [flat(rank) for rank in ranks])
    return values, {name: as_numbers(total) for name, total in totals.items()}, rows


@given(
    correct=st.lists(st.booleans(), min_size=1, max_size=60),
    batch_rows=st.integers(1, 20),
    num_ranks=st.integers(1, 4),
)
def test_a_mean_over_rows_is_exact_however_they_are_dealt(correct: list[bool], batch_rows: int, num_ranks: int) -> None:
    ranks = [Evaluation() for _ in range(min(num_ranks, len(correct)))]
    for number, rank in enumerate(ranks):
        own = torch.tensor(correct[number :: len(ranks)], dtype=torch.float32)
        for batch in torch.split(own, batch_rows):
            counts = torch.bincount(batch.long(), minlength=2)
            rank.add({"accuracy": batch, "counts": Total(counts)}, np.arange(len(batch)))
    values, totals, rows = reduce(ranks)
    assert values == {"accuracy": sum(correct) / len(correct)}
    assert totals == {"counts": [len(correct) - sum(correct), sum(correct)]}
    assert rows == len(correct)


def test_values_are_added_in_double_precision() -> None:
    evaluation = Evaluation()
    for _ in range(1000):
        evaluation.add({"loss": torch.full((100,), 0.1)}, np.arange(100))
    single = float(torch.tensor(0.1))
    assert evaluation.reduce(lambda tensor: [tensor])[0]["loss"] == pytest.approx(single, rel=1e-12)


def test_small_batches_weigh_by_their_rows() -> None:
    evaluation = Evaluation()
    evaluation.add({"loss": torch.tensor([1.0, 1.0, 1.0])}, np.arange(3))
    evaluation.add({"loss": torch.tensor([5.0])}, np.arange(1))
    assert evaluation.reduce(lambda tensor: [tensor])[0] == {"loss": 2.0}


def test_totals_keep_their_shape_and_whole_numbers_stay_whole() -> None:
    evaluation = Evaluation()
    for _ in range(2):
        evaluation.add(
            {"grid": Total(torch.ones(2, 3)), "area": Total(torch.tensor(0.25)), "big": Total(torch.tensor(2**52))}, np.arange(1)
        )
    assert reduce([evaluation])[1] == {"grid": [[2, 2, 2], [2, 2, 2]], "area": 0.5, "big": 2**53}


def test_several_metrics_do_not_mix() -> None:
    evaluation = Evaluation()
    evaluation.add({"b": torch.tensor([2.0]), "total": Total(torch.tensor([7.0, 8.0])), "a": torch.tensor([1.0])}, np.arange(1))
    values, totals, _ = reduce([evaluation])
    assert values == {"a": 1.0, "b": 2.0}
    assert totals == {"total": [7, 8]}


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(3), torch.ones(2, 1)])
def test_a_value_that_is_not_one_number_per_row_is_refused(value: torch.Tensor) -> None:
    class Measuring(Task):
        def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            return {"loss": value}

    with pytest.raises(InputError, match=r"found 'loss': float32 \[.*\] for 2 rows; expected .* one value for each"):
        contracts.evaluate(Measuring(), torch.nn.Identity(), {}, 2)


def test_what_is_kept_comes_back_in_the_order_of_the_rows_with_shapes_and_texts() -> None:
    evaluation = Evaluation()
    boxes = [torch.zeros(2, 4), torch.ones(0, 4), torch.ones(1, 4)]
    evaluation.add({"score": Kept(torch.tensor([0.5, 0.25], dtype=torch.bfloat16)), "text": Kept(["e", "c"])}, np.array([4, 2]))
    evaluation.add({"score": Kept(torch.tensor([0.75])), "text": Kept(["b"])}, np.array([1]))
    kept = gathered(evaluation.kept)
    assert kept["score"].tolist() == [0.75, 0.25, 0.5]
    assert kept["text"] == ["b", "c", "e"]
    ragged = Evaluation()
    ragged.add({"boxes": Kept(boxes)}, np.array([2, 0, 1]))
    assert [tuple(value.shape) for value in gathered(ragged.kept)["boxes"]] == [(0, 4), (1, 4), (2, 4)]
    assert gathered([]) == {}


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (torch.rand(3, 5, 7), (5, 7)),
        (torch.randint(0, 255, (1, 5, 7), dtype=torch.uint8), (5, 7)),
        (np.zeros((5, 7)), (5, 7)),
        (np.full((5, 7, 3), float("nan")), (5, 7)),
        (Figure((0.7, 0.5), dpi=10), (5, 7)),
    ],
)
def test_a_picture_becomes_a_file_of_its_size(value: object, shape: tuple[int, int]) -> None:
    assert matplotlib.image.imread(io.BytesIO(as_png(Picture(value)))).shape[:2] == shape


@pytest.mark.parametrize("value", ["a path", torch.zeros(3), np.zeros((0, 4)), np.zeros((5, 7, 2)), np.array([["a"]])])
def test_what_is_no_picture_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError), match="a picture of"):
        as_png(Picture(value))


def test_a_total_that_is_not_a_number_stays_visible() -> None:
    evaluation = Evaluation()
    evaluation.add({"loss": torch.tensor([float("nan")]), "sum": Total(torch.tensor(float("nan")))}, np.arange(1))
    values, totals, _ = evaluation.reduce(lambda tensor: [tensor])
    assert values["loss"] != values["loss"]
    assert totals["sum"] != totals["sum"]
