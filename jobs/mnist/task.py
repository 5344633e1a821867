"""Classify handwritten digits."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from jobs.mnist.model import Cnn
from raymill.task import Schema, Task, Total


class Digits(Task):
    """Cross-entropy on a small CNN; accuracy and confusion matrix as metrics."""

    def __init__(self, schema: Schema, width: int = 32) -> None:
        """The head has as many classes as the data's label column says; `width` is the channels of the first block."""
        classes = schema["label"].classes
        if classes is None:
            raise ValueError("the pipeline's label column does not say how many classes there are")
        self.num_classes = classes
        self.width = width

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return Cnn(self.width, self.num_classes)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(model(batch["image"]), batch["label"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Total]:
        """Loss and correctness of each row, and the confusion matrix (rows: truth, columns: prediction)."""
        scores, label = model(batch["image"]), batch["label"]
        predicted = scores.argmax(dim=1)
        pairs = label * self.num_classes + predicted
        confusion = torch.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)
        return {
            "loss": functional.cross_entropy(scores, label, reduction="none"),
            "accuracy": (predicted == label).float(),
            "confusion": Total(confusion),
        }

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        """What the network takes."""
        return (batch["image"],)
