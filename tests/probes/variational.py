"""A variational autoencoder whose divergence comes in slowly; what it consists of is logged beside the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from raymill.task import Now, Schema, Task

LATENT = 2

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "Adam", "lr": 0.01},
    "loop": {"epochs": 2, "global_batch_rows": 24, "gradient_accumulation_steps": 2, "seed": 6},
}


class Autoencoder(Task):
    """Puts an image through two numbers."""

    def __init__(self, schema: Schema) -> None:
        pass

    def build(self) -> nn.Module:
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2 * LATENT))
        return nn.ModuleDict({"encoder": encoder, "decoder": nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh(), nn.Linear(8, 16))})

    def loss(self, model: nn.Module, batch: Any, now: Now) -> dict[str, torch.Tensor | float]:
        reconstruction, divergence = (part.mean() for part in self._parts(model, batch["image"]))
        share = min(1.0, 2 * now.step / now.total_steps)
        return {
            "reconstruction": reconstruction,
            "loss": reconstruction + share * divergence,
            "divergence": divergence,
            "share": share,
        }

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        reconstruction, divergence = self._parts(model, batch["image"])
        return {"loss": reconstruction + divergence}

    @staticmethod
    def _parts(model: Any, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = model["encoder"](image).chunk(2, dim=1)
        drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        error = functional.mse_loss(model["decoder"](drawn), image.flatten(1), reduction="none").sum(dim=1)
        return error, (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
