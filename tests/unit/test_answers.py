"""What a task says of rows is columns with one value per row, or it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raymill.data.arrow import schema_of
from raymill.errors import InputError
from raymill.own_code import contracts
from raymill.task import Field, Task

MODEL = nn.Linear(2, 2)
BATCH = torch.zeros(3, 2)


class Saying(Task):
    """Says what it is told to say."""

    def __init__(self, said: Any) -> None:
        self.said = said

    def predict(self, model: nn.Module, batch: Any) -> Any:
        assert not torch.is_grad_enabled()
        return self.said


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (torch.zeros(3, 4, dtype=torch.bfloat16), Field("float32", (4,))),
        (torch.ones(3, dtype=torch.bool, requires_grad=False), Field("bool")),
        (np.zeros((3, 0), np.int16), Field("int16", (0,))),
        ([torch.zeros(2, 5), torch.zeros(0, 5), torch.zeros(1, 5)], Field("float32", (None, None))),
        ([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)], Field("float32")),
        ([1, 2.5, 3], Field("float64")),
        ((True, False, True), Field("bool")),
        (["a", "", "c"], Field("text")),
        ([b"a", b"", b"c"], Field("bytes")),
    ],
)
def test_a_value_for_each_row_is_a_column(value: Any, field: Field) -> None:
    rows = contracts.predict(Saying({"x": value}), MODEL, BATCH, 3)
    assert schema_of(rows) == {"x": field}


@pytest.mark.parametrize(
    "said",
    [
        {"x": torch.zeros(2)},
        {"x": torch.tensor(1.0)},
        {"x": 3.0},
        {"x": ["a", "b"]},
        {"x": ["a", 1, "c"]},
        {"x": [None, None, None]},
        {"x": [torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.zeros(2)]},
        {"x": [torch.zeros(2), torch.zeros(2, 2), torch.zeros(2)]},
        {"x": torch.zeros(3, dtype=torch.complex64)},
        {"x": np.array(["a", "b", "c"])},
        {},
        {1: torch.zeros(3)},
        torch.zeros(3),
        None,
    ],
)
def test_anything_else_is_refused(said: Any) -> None:
    with pytest.raises(InputError, match=r"expected predict\(model, batch\) to give name -> a value for each"):
        contracts.predict(Saying(said), MODEL, BATCH, 3)


class Forward(Task):
    """Has `inputs` alone."""

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        return (batch,)


class Parts(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x[:, 0], {"whole": x}["whole"]


def test_without_predict_the_answer_is_what_the_model_returns() -> None:
    assert schema_of(contracts.predict(Forward(), MODEL, BATCH, 3)) == {"output": Field("float32", (2,))}
    assert schema_of(contracts.predict(Forward(), Parts(), BATCH, 3)) == {
        "output_0": Field("float32"),
        "output_1": Field("float32", (2,)),
    }
    with pytest.raises(InputError, match=r"'output': float32 \[6\] for 3 rows.*Define predict"):
        contracts.predict(Forward(), nn.Flatten(0), BATCH, 3)
