"""What a job's code draws depends on where the run is, not on what drew before it, nor on the process."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import torch

from raymill.data.order import BatchSharding, Item, JobOrder, SplitOrder
from raymill.data.reader import Reader
from raymill.data.rows import ROW_ID
from raymill.data.seeds import seed_everything, unchanged_generators
from raymill.data.sources import MapStyleSource
from raymill.task import Pipeline

READ_TWICE = """
import random, sys
from dataclasses import dataclass
import numpy as np
from raymill.data.order import BatchSharding, JobOrder, SplitOrder, Stream
from raymill.data.reader import Reader
from raymill.task import Field, Fragment, Pipeline

class Drawn:
    def fragments(self):
        return [Fragment("drawn", part, 4, 4, "") for part in range(2)]
    def read(self, fragment):
        import torch
        return {"value": torch.rand(4).numpy() + np.random.rand(4) + random.random()}

assert "torch" not in sys.modules
order = JobOrder(SplitOrder("train", np.array([4, 4]), 2, 0, True), (), 2, 4)
pipeline = Pipeline(sources={"train": Drawn()}, schema={"value": Field("float64")})
reader = Reader("run", order, {"train": BatchSharding(8, 4, 1, 1)}, {"train": Drawn().fragments()}, pipeline)
item = Stream(order, 0)[0]
first, again = (next(reader.read(item)).rows["value"].tolist() for _ in range(2))
assert first == again, (first, again)
assert next(reader.read(Stream(order, 0)[1])).rows["value"].tolist() != first
"""


def test_a_source_that_imports_torch_while_it_reads_draws_the_same_the_first_time() -> None:
    done = subprocess.run([sys.executable, "-c", READ_TWICE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


class Augmented:
    """Three numbers at random for each item, from the three generators that code draws from."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> tuple[float, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))


def augmented(fragment_rows: int, epoch: int) -> dict[int, list[float]]:
    """Row id -> what was drawn for it."""
    source = MapStyleSource("augmented", Augmented, lambda item: {"drawn": np.array(item)}, fragment_rows)
    fragments = source.fragments()
    rows = np.array([fragment.num_rows for fragment in fragments], np.int64)
    order = JobOrder(SplitOrder("train", rows, 2, 0, True), (), 4, 4)
    pipeline = Pipeline(sources={"train": source}, schema={})
    reader = Reader("run", order, {"train": BatchSharding(8, 4, 1, 1)}, {"train": fragments}, pipeline)
    packets = [next(reader.read(Item("train", epoch, window, 0))) for window in range(2)]
    return {
        int(row): drawn
        for packet in packets
        for row, drawn in zip(packet.rows[ROW_ID], packet.rows["drawn"].tolist(), strict=True)
    }


def test_what_an_item_draws_depends_on_its_number_and_the_epoch_and_not_on_what_it_is_read_with() -> None:
    first = augmented(3, 0)
    assert len({tuple(drawn) for drawn in first.values()}) == 8
    assert augmented(5, 0) == first
    assert augmented(3, 1) != first
    random.seed(1)
    expected = random.random()
    random.seed(1)
    MapStyleSource("augmented", Augmented, lambda item: {"drawn": np.array(item)}, 3).fragments()
    assert random.random() == expected, "who lists the fragments keeps his own"


def test_generators_are_given_back_as_they_were() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    with unchanged_generators():
        seed_everything(5)
        random.random(), np.random.rand()
    assert (random.random(), np.random.rand()) == expected
