"""An unchanged model of Hugging Face transformers as a Task.

    class Reviews(TransformersTask):
        def __init__(self, schema: Schema, layers: int = 2):
            self.layers = layers

        def network(self):
            return BertForSequenceClassification(BertConfig(num_hidden_layers=self.layers, num_labels=2))

A batch is a dict with the arguments of the model's `forward` by name, `labels` among them; other columns are left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from raymill.task import Batch, Kept, Task, Total

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersTask(Task):
    """Trains a model by its own loss. Subclass it, and give it the model."""

    def network(self) -> PreTrainedModel:
        """Make the model: from a config, or with pretrained weights from a folder of one's own."""
        raise NotImplementedError(f"{type(self).__name__} must define network()")

    def build(self) -> torch.nn.Module:
        """The model. What it leaves out at random in training is seeded by the step."""
        network: torch.nn.Module = self.network().train()
        return network

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The model's own loss."""
        loss: torch.Tensor = model(**arguments(model, batch)).loss
        return loss

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor | Total | Kept]:
        """The loss, which the model gives as a mean over the batch; of a classifier, whether each row is right."""
        output, labels = model(**arguments(model, batch)), batch["labels"]
        measured: dict[str, torch.Tensor | Total | Kept] = {"loss": output.loss.detach().double().expand(len(labels))}
        logits = getattr(output, "logits", None)
        if logits is not None and labels.ndim == 1 and logits.ndim == 2 and not labels.is_floating_point():
            measured["accuracy"] = (logits.argmax(dim=1) == labels).double()
        return measured

    def predict(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, Any]:
        """The scores of each row, and of a classifier the name of the best class."""
        given = {name: value for name, value in arguments(model, batch).items() if name != "labels"}
        logits = model(**given).logits
        names = getattr(model.config, "id2label", None)
        if logits.ndim != 2 or not names:
            return {"logits": logits}
        return {"logits": logits, "label": [str(names[place]) for place in logits.argmax(dim=1).tolist()]}


def arguments(model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model's `forward` takes."""
    taken = inspect.signature(model.forward).parameters
    return {name: value for name, value in batch.items() if name in taken}
