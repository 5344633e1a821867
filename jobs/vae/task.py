"""Put digits into a few numbers, and get them back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from jobs.vae.model import Autoencoder
from jobs.vision.draw import grid
from raymill.task import Kept, Now, Picture, Schema, Task


class Digits(Task):
    """The evidence lower bound (Kingma and Welling, 2014), in nats; its divergence comes in slowly."""

    def __init__(self, schema: Schema, num_latent: int = 16, width: int = 64, warm_up: float = 0.2) -> None:
        """`num_latent`: numbers of a picture; `warm_up`: the part of the training until the divergence counts whole."""
        self.num_latent, self.width, self.warm_up = num_latent, width, warm_up

    def build(self) -> nn.Module:
        """The network with its first weights."""
        return Autoencoder(self.num_latent, self.width)

    def loss(  # type: ignore[override]
        self, model: nn.Module, batch: Any, now: Now
    ) -> dict[str, torch.Tensor | float]:
        """What is lost on the way, and what it costs to say the numbers, both a mean over pictures."""
        lost, divergence = (part.mean() for part in bound(model, batch["image"]))
        share = min(1.0, now.step / max(1, self.warm_up * now.total_steps))
        return {"loss": lost + share * divergence, "lost": lost.detach(), "divergence": divergence.detach(), "share": share}

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Kept]:
        """The bound of each picture, and its parts."""
        lost, divergence = bound(model, batch["image"])
        both = torch.cat([batch["image"], model(batch["image"])[1]], dim=1)
        return {"elbo": -(lost + divergence), "lost": lost, "divergence": divergence, "both": Kept(both)}

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, Picture]:
        """Ten digits, and below them what comes back of each."""
        return {"reconstructions": Picture(grid(kept["both"][:10].transpose(0, 1).flatten(0, 1), 10))}

    def pictures(self, model: nn.Module, now: Now) -> Mapping[str, Picture]:
        """Digits of noise; and what becomes of one along each of ten numbers, from -2.5 to 2.5."""
        drawn = torch.randn(60, self.num_latent)
        walked = drawn[:1].repeat(100, 1) / 2
        rows, steps = torch.arange(100) // 10 % self.num_latent, torch.linspace(-2.5, 2.5, 10).repeat(10)
        walked[torch.arange(100), rows] = steps
        made = [model.decoder(latent).sigmoid()[:, 0] for latent in (drawn, walked)]  # type: ignore[operator]
        return {"samples": Picture(grid(made[0], 10)), "traversal": Picture(grid(made[1], 10))}

    def predict(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """The numbers of each picture, and what comes back of them."""
        latent, image = model(batch["image"])
        return {"latent": latent, "image": image}

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        """What the network takes."""
        return (batch["image"],)


def bound(model: Any, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each picture, in nats: what is lost of it with numbers drawn once, and their divergence from a normal distribution."""
    mean, log_variance = model.encode(image)
    drawn = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    lost = functional.binary_cross_entropy_with_logits(model.decoder(drawn), image, reduction="none").sum(dim=(1, 2, 3))
    return lost, (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
