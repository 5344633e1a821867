"""Which class a picture is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional
from torchmetrics.functional.classification import (
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from raymill.task import Kept, Picture, Schema, Task


class Classifier(Task):
    """Cross-entropy on "image" and "label"; the metrics are exact over all rows, however they were dealt out. Give it `build`."""

    def __init__(self, schema: Schema) -> None:
        """The head has as many classes as the data's label column says."""
        classes = schema["label"].classes
        if classes is None:
            raise ValueError("the pipeline's label column does not say how many classes there are")
        self.num_classes = classes

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(model(batch["image"]), batch["label"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Kept]:
        """Loss and correctness of each row; its probabilities and label are kept for the rest."""
        scores, label = model(batch["image"]), batch["label"]
        return {
            "loss": functional.cross_entropy(scores, label, reduction="none"),
            "accuracy": (scores.argmax(dim=1) == label).float(),
            "probabilities": Kept(scores.softmax(dim=1)),
            "label": Kept(label),
        }

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float | Picture]:
        """Means over the classes of precision, recall, F1, ROC AUC and average precision; the confusion matrix."""
        found, label, num = kept["probabilities"], kept["label"], self.num_classes
        return {
            "precision": multiclass_precision(found, label, num),
            "recall": multiclass_recall(found, label, num),
            "f1": multiclass_f1_score(found, label, num),
            "roc_auc": multiclass_auroc(found, label, num),
            "average_precision": multiclass_average_precision(found, label, num),
            "confusion": Picture(confusion(found.argmax(dim=1), label, num)),
        }

    def predict(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """The likeliest class and how likely it is."""
        probability, label = model(batch["image"]).softmax(dim=1).max(dim=1)
        return {"label": label, "probability": probability}

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        """What the network takes."""
        return (batch["image"],)


def confusion(predicted: torch.Tensor, label: torch.Tensor, num_classes: int) -> Figure:
    """Rows are the truth, columns what was said."""
    counts = torch.bincount(label * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)
    figure = Figure((4, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow((counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).numpy(), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in zip(
        torch.cartesian_prod(*[torch.arange(num_classes)] * 2).tolist(), counts.flatten(), strict=True
    ):
        axes.text(column, row, str(int(count)), ha="center", va="center", fontsize=6, color="white" if row == column else "black")
    axes.set(xlabel="said", ylabel="true", xticks=range(num_classes), yticks=range(num_classes))
    return figure
