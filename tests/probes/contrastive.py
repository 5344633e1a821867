"""Two views of each image, drawn in `collate`, told from those of all others (InfoNCE), at a temperature that is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from probes import mixed
from raymill.task import Objective, Pipeline, Rows, Schema, Task

DIM = 4

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "SGD", "lr": 0.1, "momentum": 0.9},
    "loop": {"epochs": 2, "global_batch_rows": 24, "gradient_accumulation_steps": 2, "seed": 9},
}


def two_views(rows: Rows) -> dict[str, torch.Tensor]:
    image = torch.tensor(np.asarray(rows["image"]))
    views = {f"view_{number}": image + 0.1 * torch.randn_like(image) for number in (1, 2)}
    return {**views, "label": torch.tensor(np.asarray(rows["label"]))}


def pipeline() -> Pipeline:
    plain = mixed.pipeline()
    return Pipeline(sources=plain.sources, schema=plain.schema, collate=two_views)


class Encoder(nn.Module):
    """An encoder, a temperature that the loss alone uses, and what the loss keeps of the batch before."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        hidden = [nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.2)] if norm else [nn.Tanh()]
        self.net = nn.Sequential(nn.Conv2d(1, 4, kernel_size=3), *hidden, nn.Flatten(), nn.Linear(16, DIM))
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("centre", torch.zeros(DIM))
        self.register_buffer("num_losses", torch.tensor(0))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.net(image), dim=1)


class Views(Task):
    """Each view is to be most like the other one of its image."""

    def __init__(self, schema: Schema, norm: bool = True) -> None:
        self.norm = norm

    def build(self) -> nn.Module:
        return Encoder(self.norm)

    def objectives(self) -> Sequence[Objective]:
        return [Objective("loss", self.told_apart, features=self.embedded)]

    def embedded(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        batch["view_1"] /= 2  # in place, as code written for other loops does
        return {"first": model(batch.pop("view_1")), "second": model(batch["view_2"] / 2), "label": batch["label"]}

    def told_apart(self, model: nn.Module, features: Any) -> dict[str, torch.Tensor]:
        assert isinstance(model, Encoder)
        first, second = features["first"] - model.centre, features["second"]  # type: ignore[operator]
        with torch.no_grad():
            model.centre.lerp_(second.mean(dim=0), 0.1)  # type: ignore[operator]
            model.num_losses += 1  # type: ignore[operator]
        scores = model.log_scale.exp() * first @ second.T
        target = torch.arange(len(scores))
        same_label = features["label"][scores.argmax(dim=1)] == features["label"]
        loss = (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target)) / 2
        return {"loss": loss, "same_label": same_label.float().mean(), "rows": torch.tensor(len(scores))}

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"likeness": (model(batch["view_1"] / 2) * model(batch["view_2"] / 2)).sum(dim=1)}


def plain(schema: Schema) -> Views:
    """The same without batch norm and dropout, whose gradient does not depend on how a batch is cut."""
    return Views(schema, norm=False)
