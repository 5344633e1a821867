"""What a job's code draws depends on where the run is, not on what drew before it, nor on the process."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np

from raymill.data.seeds import seed_everything, unchanged_generators

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
first, again = (reader.read(item)[0].rows["value"].tolist() for _ in range(2))
assert first == again, (first, again)
assert reader.read(Stream(order, 0)[1])[0].rows["value"].tolist() != first
"""


def test_a_source_that_imports_torch_while_it_reads_draws_the_same_the_first_time() -> None:
    done = subprocess.run([sys.executable, "-c", READ_TWICE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


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
