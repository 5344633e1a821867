"""A model trained for whole numbers, with phases, and one that is pruned while it trains: both say so behind a step."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.utils import prune

from probes import mixed
from raymill.task import Now

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.ao import quantization

OBSERVED_FROM, ROUNDED_FROM, FROZEN_FROM = 2, 4, 9
PRUNED_EVERY = 3

VALUES: dict[str, Any] = {
    **mixed.VALUES,
    "optimizer": {"kind": "SGD", "lr": 0.05, "momentum": 0.9},
    "loop": {**mixed.VALUES["loop"], "epochs": 3},
}


class Quantised(mixed.Mixed):
    """Weights rounded by channel, by what observers see from a step on; behind another, what they saw stays."""

    def build(self) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, mixed.NUM_CLASSES)).train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            model.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
            quantization.prepare_qat(model, inplace=True)
        # By channel, an observer has room for nothing before its first tensor, and torch leaves what it makes then to chance.
        for layer in (model[1], model[3]):
            layer.weight_fake_quant(layer.weight)
        return model.apply(quantization.disable_observer).apply(quantization.disable_fake_quant)

    def after_step(self, model: nn.Module, now: Now) -> None:
        if now.step == OBSERVED_FROM:
            model.apply(quantization.enable_observer)
        if now.step == ROUNDED_FROM:
            model.apply(quantization.enable_fake_quant)
        if now.step == FROZEN_FROM:
            model.apply(quantization.disable_observer)


class Pruned(mixed.Mixed):
    """Half of the weights of a layer go, a few in every third step."""

    def build(self) -> nn.Module:
        model = super().build()
        prune.identity(model[5], "weight")
        return model

    def after_step(self, model: nn.Module, now: Now) -> None:
        if now.step % PRUNED_EVERY == 0:
            layer = model[5]  # type: ignore[index]
            count = int(layer.weight_orig.numel() * 0.5 * now.step / now.total_steps)
            smallest = (layer.weight_orig * layer.weight_mask).abs().flatten().argsort(stable=True)[:count]
            layer.weight_mask.view(-1)[smallest] = 0
