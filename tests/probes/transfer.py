"""A trunk that is frozen at first, then trained at a low rate; norms without decay; each by an optimizer of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from probes import mixed

UNFROZEN_FROM = 4

VALUES: dict[str, Any] = {
    **mixed.VALUES,
    "optimizer": [
        {"kind": "AdamW", "lr": 0.01, "weight_decay": 0.0, "parameters": ["*.bias", "norm.*"]},
        {"kind": "SGD", "lr": 0.001, "momentum": 0.9, "parameters": ["trunk.*"], "from_step": UNFROZEN_FROM},
        {"kind": "Muon", "lr": 0.02, "max_grad_norm": 1.0},
    ],
    "loop": {**mixed.VALUES["loop"], "epochs": 2},
}


class Headed(nn.Module):
    """A trunk, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(16, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, mixed.NUM_CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(torch.relu(self.norm(self.trunk(image.flatten(1)))))
        return scores


class Transfer(mixed.Mixed):
    """Trains it."""

    def build(self) -> nn.Module:
        return Headed()
