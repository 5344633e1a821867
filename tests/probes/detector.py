"""Find bright boxes: images of different sizes, with different numbers of boxes each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Kept, Picture, Pipeline, Rows, Schema, Task, Total

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "AdamW", "lr": 0.02},
    "loop": {"epochs": 4, "global_batch_rows": 20, "seed": 2},
    "checkpoint": {"metric": "validation/loss", "mode": "min"},
}


def make_rows(count: int, seed: int) -> Rows:
    """Grey images, and boxes [num_boxes, 4] as (top, left, bottom, right), none to three per image."""
    generator = np.random.default_rng(seed)
    images, boxes = [], []
    for _ in range(count):
        height, width = generator.integers(8, 17, 2)
        image = generator.normal(0, 0.1, (height, width)).astype(np.float32)
        found = []
        for _ in range(generator.integers(0, 4)):
            top, left = generator.integers(0, height - 4), generator.integers(0, width - 4)
            bottom, right = top + generator.integers(2, 5), left + generator.integers(2, 5)
            image[top:bottom, left:right] += 1
            found.append((top, left, bottom, right))
        images.append(image)
        boxes.append(np.array(found, np.float32).reshape(-1, 4))
    return {"image": images, "boxes": boxes}


def flip(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    """Mirror half of the training images, and their boxes."""
    if split != "train":
        return rows
    images, boxes = list(rows["image"]), [np.array(found) for found in rows["boxes"]]
    for place in np.flatnonzero(generator.random(len(images)) < 0.5):
        images[place] = images[place][:, ::-1]
        boxes[place][:, [1, 3]] = images[place].shape[1] - boxes[place][:, [3, 1]]
    return {**rows, "image": images, "boxes": boxes}


def pipeline() -> Pipeline:
    sources = {
        "train": ArraySource("boxes/train", partial(make_rows, 130, 1), 16),
        "validation": ArraySource("boxes/validation", partial(make_rows, 33, 2), 16),
    }
    schema: Schema = {"image": Field("float32", (None, None)), "boxes": Field("float32", (None, 4))}
    return Pipeline(sources=sources, schema=schema, transform=flip)


class Boxes(Task):
    """A score per pixel: inside a box or not. The loss is a mean per image, so large images weigh no more."""

    def __init__(self, schema: Schema) -> None:
        pass

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 3, padding=1))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return torch.stack([loss for loss, _ in self._measured(model, batch)]).mean()

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Total]:
        measured = self._measured(model, batch)
        return {
            "loss": torch.stack([loss for loss, _ in measured]),
            "pixels": Total(torch.stack([counts for _, counts in measured]).sum(dim=0)),
        }

    def _measured(self, model: nn.Module, batch: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per image: the loss, and counts of (found, right, all) pixels."""
        measured = []
        for image, boxes in zip(batch["image"], batch["boxes"], strict=True):
            scores = model(image[None, None])[0, 0]
            truth = torch.zeros_like(image)
            for top, left, bottom, right in boxes.long().tolist():
                truth[top:bottom, left:right] = 1
            found = scores > 0
            counts = torch.stack([found.sum(), (found == (truth > 0)).sum(), torch.tensor(image.numel())])
            measured.append((functional.binary_cross_entropy_with_logits(scores, truth), counts))
        return measured


class Detector(Boxes):
    """The same, which also says which boxes it sees: average precision over all images."""

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Total | Kept]:  # type: ignore[override]
        seen = [boxes_of(model(image[None, None])[0, 0]) for image in batch["image"]]
        return {**super().evaluate(model, batch), "seen": Kept(seen), "true": Kept(batch["boxes"])}

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float | Picture]:
        precision, recall = precision_and_recall(kept["seen"], kept["true"])
        figure = Figure((2, 2))
        figure.subplots().plot(recall, precision)
        gained = torch.diff(recall, prepend=torch.zeros(1))
        return {"ap50": (precision * gained).sum(), "precision over recall": Picture(figure)}


def boxes_of(scores: torch.Tensor) -> torch.Tensor:
    """A box around each patch of pixels above zero, with its mean score: [num_boxes, 5]."""
    inside = scores > 0
    patches = torch.where(inside, torch.arange(1.0, scores.numel() + 1).view_as(scores), 0.0)
    for _ in range(scores.numel()):
        grown = functional.max_pool2d(patches[None], 3, stride=1, padding=1)[0] * inside
        if torch.equal(grown, patches):
            break
        patches = grown
    found = [torch.zeros(0, 5)]
    for number in patches.unique()[1 if not inside.all() else 0 :]:
        rows, columns = torch.nonzero(patches == number, as_tuple=True)
        corners = torch.stack([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]).float()
        found.append(torch.cat([corners, scores[patches == number].mean()[None].float()])[None])
    return torch.cat(found)


def precision_and_recall(seen: list[torch.Tensor], true: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Behind each box that is seen, the surest first; one is right if half of it and a true box of its own overlap."""
    taken: set[tuple[int, int]] = set()
    entries = [(float(box[4]), image, box[:4]) for image, boxes in enumerate(seen) for box in boxes]
    right = []
    for _, image, box in sorted(entries, key=lambda entry: -entry[0]):
        overlaps = [_overlap(box, other) for other in true[image]]
        best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
        hit = best is not None and overlaps[best] >= 0.5 and (image, best) not in taken
        right.append(float(hit))
        if hit and best is not None:
            taken.add((image, best))
    hits = torch.tensor(right).cumsum(0)
    return hits / torch.arange(1, len(right) + 1), hits / max(1, sum(map(len, true)))


def _overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    sides = (torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])).clamp(min=0)
    shared = sides.prod()
    return float(shared / ((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared))
