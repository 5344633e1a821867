"""A linear layer on features that were learned without labels."""

from typing import Any

import torch
from torch import nn

from jobs.contrastive.model import NUM_FEATURES
from jobs.vision.classify import Classifier
from raymill.task import Schema


class Probed(nn.Module):
    """An encoder that stays as it is, and a linear layer."""

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        """The batch norm between them has no parameters, and brings features to one scale."""
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.head = nn.Sequential(nn.BatchNorm1d(NUM_FEATURES, affine=False), nn.Linear(NUM_FEATURES, num_classes))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 1, 28, 28] to scores [N, K]."""
        scores: torch.Tensor = self.head(self.encoder(image))
        return scores


class Probe(Classifier):
    """Trains the linear layer alone."""

    def __init__(self, schema: Schema, inputs: Any) -> None:
        """`inputs`: `encoder`, a model of the job contrastive."""
        super().__init__(schema)
        self.encoder = inputs["encoder"].load_model()

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return Probed(self.encoder, self.num_classes)
