"""Make digits that look real."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from jobs.gan.model import Networks
from jobs.vision.draw import grid
from jobs.vision.frechet import frechet_distance
from pipelines.images import MNIST_MEAN, MNIST_STD
from raymill.task import Kept, Now, Objective, Picture, Schema, Task

CRITIC_STEPS = 5
PENALTY = 10.0


class Digits(Task):
    """A critic learns to tell pictures from those that a generator makes, which learns to mislead it.

    `kind: dcgan` is the game of Goodfellow et al. (2014), in which both take turns; `kind: wgan_gp` that of Gulrajani et al.
    (2017), with five steps of the critic for each of the generator, and a penalty on the critic's slope.
    """

    def __init__(
        self, schema: Schema, inputs: Any, kind: Literal["dcgan", "wgan_gp"] = "dcgan", num_noise: int = 64, width: int = 64
    ) -> None:
        """`inputs`: `judge`, a classifier of the same pictures, whose features say how like real ones made ones are."""
        self.judge = inputs["judge"].load_model()
        self.kind, self.num_noise, self.width = kind, num_noise, width

    def build(self) -> nn.Module:
        """Both networks with their first weights."""
        return Networks(self.num_noise, self.width)

    def objectives(self) -> Sequence[Objective]:
        """The critic's, then the generator's."""
        if self.kind == "dcgan":
            return [Objective("critic", self.tell_apart, ("critic",)), Objective("generator", self.mislead, ("generator",))]
        return [
            Objective("critic", self.tell_how_far, ("critic",)),
            Objective("generator", self.come_near, ("generator",), every=CRITIC_STEPS),
        ]

    def tell_apart(self, model: Any, batch: Any) -> torch.Tensor:
        """Real ones are 0.9, so that the critic is never too sure (Salimans et al., 2016); made ones are 0."""
        real, made = real_images(batch), self.make(model, len(batch["image"])).detach()
        scores = model.critic(torch.cat([real, made]))
        truth = torch.cat([torch.full((len(real),), 0.9), torch.zeros(len(made))]).to(scores)
        return functional.binary_cross_entropy_with_logits(scores, truth)

    def mislead(self, model: Any, batch: Any) -> torch.Tensor:
        """Made ones are to look real."""
        scores = model.critic(self.make(model, len(batch["image"])))
        return functional.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))

    def tell_how_far(self, model: Any, batch: Any) -> dict[str, torch.Tensor]:
        """The critic's estimate of the distance between both, with a slope of 1 between them."""
        real, made = real_images(batch), self.make(model, len(batch["image"])).detach()
        between = torch.lerp(real, made, torch.rand(len(real), 1, 1, 1).to(real)).requires_grad_()
        [slope] = torch.autograd.grad(model.critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        distance = model.critic(real).mean() - model.critic(made).mean()
        return {"loss": PENALTY * penalty - distance, "distance": distance.detach(), "penalty": penalty.detach()}

    def come_near(self, model: Any, batch: Any) -> torch.Tensor:
        """Made ones are to be where the critic sees real ones."""
        scores: torch.Tensor = model.critic(self.make(model, len(batch["image"])))
        return -scores.mean()

    def make(self, model: Any, count: int) -> torch.Tensor:
        """Pictures of noise, from -1 to 1."""
        made: torch.Tensor = model.generator(torch.randn(count, self.num_noise))
        return made

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, Kept]:
        """What the judge sees in real pictures, in made ones, and in noise."""
        made, noise = self.make(model, len(batch["image"])), torch.rand_like(batch["image"]) * 2 - 1
        seen = {"real": batch["image"], "made": as_judged(made), "noise": as_judged(noise)}
        return {name: Kept(self.features(images)) for name, images in seen.items()}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The means over the picture of what the judge's last convolution sees: [N, channels]."""
        return self.judge.features(images).mean(dim=(2, 3))  # type: ignore[no-any-return]

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        """Fréchet distances to real pictures: of made ones, of one half of the real ones to the other, and of noise."""
        real = kept["real"]
        return {
            "frechet": frechet_distance(real, kept["made"]),
            "frechet_of_real": frechet_distance(real[::2], real[1::2]),
            "frechet_of_noise": frechet_distance(real, kept["noise"]),
        }

    def pictures(self, model: nn.Module, now: Now) -> Mapping[str, Picture]:
        """Of the same noise each time."""
        return {"digits": Picture(grid(self.make(model, 60)[:, 0] / 2 + 0.5, 10))}

    def predict(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """How real each picture looks to the critic."""
        return {"real": model.critic(real_images(batch))}  # type: ignore[operator]


def real_images(batch: Any) -> torch.Tensor:
    """A batch's pictures from -1 to 1; they come with mean 0 and deviation 1."""
    images: torch.Tensor = (batch["image"] * MNIST_STD + MNIST_MEAN) * 2 - 1
    return images


def as_judged(images: torch.Tensor) -> torch.Tensor:
    """Pictures from -1 to 1 as the judge knows them."""
    return ((images + 1) / 2 - MNIST_MEAN) / MNIST_STD
