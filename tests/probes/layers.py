"""What layers may do: a trunk in eval mode, constants among the buffers, a head without a target, layers left out at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from probes import mixed
from raymill.task import Schema

VALUES: dict[str, Any] = {
    **mixed.VALUES,
    "optimizer": {"kind": "AdamW", "lr": 0.01, "weight_decay": 0.1},
    "loop": {**mixed.VALUES["loop"], "epochs": 2},
}


class Constants(nn.Module):
    """Buffers that never change, and that rounding, a wrong sum or a copy of the sign would change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0.1, 0.7, 16))
        self.register_buffer("mask", torch.tensor([0.0, -0.0, float("-inf"), float("nan")]))
        self.register_buffer("phases", torch.polar(torch.ones(4), torch.linspace(0.1, 3.0, 4)))
        self.register_buffer("kept", torch.tensor([True, False]))
        self.register_buffer("wide", torch.linspace(0.1, 0.7, 3, dtype=torch.float64))


class Layered(nn.Module):
    """A trunk that keeps its statistics, layers of which one is left out by chance, two heads of which one has no target."""

    def __init__(self) -> None:
        super().__init__()
        self.constants = Constants()
        self.trunk = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12))
        self.first, self.second, self.third = (nn.Linear(12, 12) for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.head, self.unused = nn.Linear(12, mixed.NUM_CLASSES), nn.Linear(12, 5)
        self.register_buffer("rotation", torch.zeros(3, dtype=torch.complex64))
        self.register_buffer("countdown", torch.tensor(1000))
        self.trunk.eval()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(image.flatten(1) + self.constants.table)  # type: ignore[operator]
        for layer in (self.first, self.second, self.third):
            # For each shard anew, so ranks leave out different ones.
            if not self.training or torch.rand(()) > 0.4:
                hidden = hidden + torch.tanh(layer(hidden))
        if self.training:
            with torch.no_grad():
                self.rotation += torch.complex(hidden.mean(), hidden.std())  # type: ignore[operator]
                self.countdown -= 1  # type: ignore[operator]
        scores: torch.Tensor = self.head(self.norm(hidden.view(-1, 4, 3)).flatten(1))
        return scores


class Layers(mixed.Mixed):
    """Trains it."""

    def __init__(self, schema: Schema) -> None:
        super().__init__(schema)
        self.num_losses = 0

    def build(self) -> nn.Module:
        return Layered()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        batch["image"] /= 2  # in place, as code written for other loops does
        return functional.cross_entropy(model(batch["image"]), batch.pop("label"))


class Counting(Layers):
    """Keeps state where it is not saved."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.num_losses += 1
        return super().loss(model, batch)
