"""Tell clouds of made-up points apart."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from raymill.task import Schema, Task, Total


class Blobs(Task):
    """A small multilayer perceptron."""

    def __init__(self, schema: Schema, hidden: int = 16) -> None:
        """`hidden` units; inputs and classes are taken from the data's schema."""
        self.num_features = schema["features"].shape[0] or 1
        self.num_classes = schema["label"].classes or 2
        self.hidden = hidden

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return nn.Sequential(nn.Linear(self.num_features, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.num_classes))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(model(batch["features"]), batch["label"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Total]:
        """Loss and correctness of each row."""
        scores = model(batch["features"])
        return {
            "loss": functional.cross_entropy(scores, batch["label"], reduction="none"),
            "accuracy": (scores.argmax(dim=1) == batch["label"]).float(),
        }

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        """What the network takes."""
        return (batch["features"],)
