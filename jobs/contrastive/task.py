"""Learn features without labels: two views of a picture are to be alike, those of others are not."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import nn
from torch.nn import functional

from jobs.contrastive.model import Encoder
from raymill.task import Kept, Objective, Picture, Schema, Task


class Views(Task):
    """InfoNCE over the global batch, as in SimCLR (Chen et al., "A Simple Framework for Contrastive Learning", 2020)."""

    def __init__(self, schema: Schema, width: int = 32, temperature: float = 0.2) -> None:
        """`temperature`: the smaller, the more the nearest of the others count."""
        self.width, self.temperature = width, temperature

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return Encoder(self.width)

    def objectives(self) -> Sequence[Objective]:
        """One, over all rows of a step, whatever ranks they are on."""
        return [Objective("loss", self.alike, features=self.both_views)]

    @staticmethod
    def both_views(model: Any, batch: Any) -> dict[str, torch.Tensor]:
        """What is compared."""
        return {"one": model.compared(batch["image"]), "other": model.compared(batch["view"])}

    def alike(self, model: nn.Module, features: Any) -> dict[str, torch.Tensor]:
        """Each view is to be found among all others by its partner."""
        views = torch.cat([features["one"], features["other"]])
        scores = (views @ views.T / self.temperature).fill_diagonal_(-torch.inf)
        num = len(features["one"])
        partner = torch.cat([torch.arange(num, 2 * num), torch.arange(num)]).to(scores.device)
        found = (scores.argmax(dim=1) == partner).float().mean()
        return {"loss": functional.cross_entropy(scores, partner), "found": found}

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Kept]:
        """Features and labels, which nothing was trained on."""
        return {"features": Kept(model(batch["image"])), "label": Kept(batch["label"])}

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float | Picture]:
        """How often a row's nearest neighbour among the others has its label; all of them in two dimensions."""
        features, label = functional.normalize(kept["features"], dim=1), kept["label"]
        nearest = (features @ features.T).fill_diagonal_(-torch.inf).argmax(dim=1)
        return {"neighbour": (label[nearest] == label).float().mean(), "features": Picture(in_two_dimensions(features, label))}

    def predict(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """The features."""
        return {"features": model(batch["image"])}

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        """What the network takes."""
        return (batch["image"],)


def in_two_dimensions(features: torch.Tensor, label: torch.Tensor) -> Figure:
    """t-SNE (van der Maaten and Hinton, 2008) of features [num, channels], coloured by label."""
    places = TSNE(random_state=0, perplexity=min(30.0, len(features) / 4)).fit_transform(features.numpy())
    figure = Figure((4, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(places[:, 0], places[:, 1], c=label.numpy(), cmap="tab10", s=6)
    axes.set_axis_off()
    return figure
