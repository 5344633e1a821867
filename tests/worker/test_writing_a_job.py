"""The examples of docs/writing-a-job.md, run as they stand."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from raymill import task
from raymill.adapters.lightning import LightningTask
from raymill.data.seeds import unchanged_caller
from raymill.data.sources import ArraySource
from raymill.own_code import contracts
from raymill.task import Field, Pipeline, Rows, Schema, Task
from raymill.training.batch import prediction_batch
from worker_harness import Experiment, Start, run_rank

DOCUMENT = Path(__file__).parents[2] / "docs" / "writing-a-job.md"
SECTIONS = DOCUMENT.read_text().split("\n## ")
VALUES: dict[str, Any] = {"optimizer": {"kind": "SGD", "lr": 0.05}, "loop": {"steps": 6, "global_batch_rows": 8}}


def make_rows(count: int) -> Rows:
    x = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    return {"x": x, "y": x.sum(axis=1, keepdims=True)}


def pipeline() -> Pipeline:
    sources = {split: ArraySource(split, partial(make_rows, 20), 5) for split in ("train", "validation", "test")}
    return Pipeline(sources=sources, schema={"x": Field("float32", (3,)), "y": Field("float32", (1,))})


def examples() -> list[Any]:
    """The tasks of the document with the values of a job, by the name of the task or by the kind of the values.

    Values go with the last task of their section, or with the first of all.
    """
    names: dict[str, Any] = {"nn": nn, "torch": torch, **vars(task)}
    found = []
    for section in SECTIONS:
        made = names.get("Lines")
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            if language == "python":
                before = set(names)
                exec(text, names)
                for name in [name for name, value in names.items() if name not in before and _is_task(value)]:
                    made = names[name]
                    found.append(pytest.param(made, {}, id=name))
            elif language == "yaml":
                values = yaml.safe_load(text)
                found.append(pytest.param(made, values, id=" ".join(values)))
    return found


def _is_task(value: Any) -> bool:
    return isinstance(value, type) and Task in value.__mro__[1:] and value is not LightningTask


class Teacher:
    """In place of a model that was trained."""

    def load_model(self) -> nn.Module:
        return nn.Linear(3, 1).requires_grad_(False)


def made(make_task: Any, schema: Schema) -> Task:
    given = {"schema": schema, "inputs": {"teacher": Teacher()}}
    return make_task(**{name: given[name] for name in inspect.signature(make_task).parameters if name in given})  # type: ignore[no-any-return]


def test_the_document_has_examples_on_two_pages() -> None:
    assert len(examples()) >= 8
    assert len(DOCUMENT.read_text().splitlines()) <= 2 * 78


def test_the_pipeline_of_the_document_is_fitted_and_its_rows_meet_by_length(tmp_path: Path) -> None:
    [text] = re.findall(r"^```python\n(def prices.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {**vars(task), "partial": partial, "divide": divide, "padded": padded}
    names["sources"] = {split: ArraySource(split, make_texts, 8) for split in ("train", "validation")}
    exec(text, names)
    prices: Any = names["prices"]
    fitted = prices({}).fit(iter([make_texts()]))
    assert fitted == {"largest": b"24.0"}
    experiment = Experiment(lambda schema: Prices(), partial(prices, fitted), VALUES)
    with unchanged_caller():
        outcome, _ = run_rank(0, 1, 0, experiment, Start(tmp_path, 1, None, None, True))
    assert outcome.status == "finished"
    answer = prediction_batch(prices(fitted), {"text": ["a", "bcd"]})
    assert (answer["text"].shape, "price" in answer) == ((2, 3), False)


def make_texts() -> Rows:
    return {"text": ["x" * (number % 5 + 1) for number in range(25)], "price": np.arange(25, dtype=np.float32)}


def divide(rows: Rows, split: str, generator: np.random.Generator, by: float) -> Rows:
    return rows if split == task.PREDICT else {**rows, "price": np.asarray(rows["price"]) / by}


def padded(rows: Rows) -> dict[str, torch.Tensor]:
    texts = [torch.tensor(list(map(float, text.encode()))) for text in rows["text"]]
    numbers = {"price": torch.tensor(rows["price"])} if "price" in rows else {}
    return {"text": nn.utils.rnn.pad_sequence(texts, batch_first=True), **numbers}


class Prices(Task):
    """Guesses the price from the mean letter."""

    def build(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch["text"].mean(dim=1, keepdim=True) / 100)[:, 0] - batch["price"]).square().mean()

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"error": (model(batch["text"].mean(dim=1, keepdim=True) / 100)[:, 0] - batch["price"]).abs()}


@pytest.mark.parametrize(("make_task", "values"), examples())
def test_an_example_of_the_document_trains(tmp_path: Path, make_task: Any, values: dict[str, Any]) -> None:
    own = issubclass(make_task, LightningTask)
    merged = {**VALUES, **({"optimizer": None} if own else {}), **values, "loop": {**VALUES["loop"], **values.get("loop", {})}}
    experiment = Experiment((lambda schema: make_task()) if own else partial(made, make_task), pipeline, merged)
    with unchanged_caller():
        outcome, events = run_rank(0, 1, 0, experiment, Start(tmp_path, 1, None, None, True))
    assert outcome.status == "finished"
    assert [event["step"] for event in events if event["kind"] == "task_changed"] == []


@pytest.mark.parametrize(("make_task", "values"), [one for one in examples() if "predict" in vars(one.values[0])])
def test_an_example_of_the_document_answers_for_each_row(make_task: Any, values: dict[str, Any]) -> None:
    asked = made(make_task, pipeline().schema)
    batch = prediction_batch(replace(pipeline(), targets=["y"]), make_rows(3))
    answer = contracts.predict(asked, asked.build(), batch, 3)
    assert (len(answer["sum"]), [said.partition(" ")[0] for said in answer["said"]]) == (3, ["about"] * 3)
