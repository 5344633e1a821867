"""WGAN-GP on points of a line: a critic in every step, the generator in every fifth, both weighed by where the run is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from probes import gan
from raymill.task import Now, Objective, Schema, Task

VALUES: dict[str, Any] = {
    "optimizer": {
        "critic": {"kind": "Adam", "lr": 0.01, "betas": [0.0, 0.9]},
        "generator": {"kind": "Adam", "lr": 0.01, "betas": [0.0, 0.9]},
    },
    "loop": {"epochs": 2, "global_batch_rows": 48, "seed": 1, "average": {"kind": "ema", "decay": 0.8, "from_step": 2}},
}


class Networks(nn.Module):
    """A generator and a critic, and how often each was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(gan.NOISE, 8), nn.ReLU(), nn.Linear(8, 1))
        self.critic = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
        self.register_buffer("num_steps", torch.tensor(0))
        self.register_buffer("num_epochs", torch.tensor(0))
        self.register_buffer("noise", torch.zeros(()))


class Wasserstein(Task):
    """The generator moves its points to where the critic's slope leads."""

    def __init__(self, schema: Schema) -> None:
        pass

    def build(self) -> nn.Module:
        return Networks()

    def objectives(self) -> Sequence[Objective]:
        return [
            Objective("critic", self.criticise, ("critic",)),
            Objective("generator", self.please, ("generator",), every=5, from_step=4),
        ]

    def criticise(self, model: nn.Module, batch: Any, now: Now) -> torch.Tensor:
        real = batch["point"]
        made = self._make(model, len(real)).detach()
        between = torch.lerp(real, made, torch.rand(len(real), 1)).requires_grad_()
        [slope] = torch.autograd.grad(model.critic(between).sum(), between, create_graph=True)  # type: ignore[operator]
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return model.critic(made).mean() - model.critic(real).mean() + 10 * (now.step / now.total_steps) * penalty  # type: ignore

    def please(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return -model.critic(self._make(model, len(batch["point"]))).mean()  # type: ignore[operator]

    def after_step(self, model: nn.Module, now: Now) -> None:
        assert isinstance(model, Networks)
        model.num_steps += 1
        model.noise += torch.rand(())
        for parameter in model.critic.parameters():
            parameter.clamp_(-0.5, 0.5)

    def after_epoch(self, model: nn.Module, now: Now) -> None:
        assert isinstance(model, Networks)
        assert now.step == (now.epoch + 1) * now.steps_per_epoch
        model.num_epochs += 1
        model.generator[2].bias.add_(torch.randn(1) / 100)  # type: ignore[union-attr, operator]

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"distance": (self._make(model, len(batch["point"]))[:, 0] - gan.CENTRE).abs()}

    @staticmethod
    def _make(model: nn.Module, count: int) -> torch.Tensor:
        made: torch.Tensor = model.generator(torch.randn(count, gan.NOISE))  # type: ignore[operator]
        return made
