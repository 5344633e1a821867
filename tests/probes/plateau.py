"""Rates that fall: by a metric, by epochs, and for each optimizer by a schedule of its own."""

from __future__ import annotations

from typing import Any

from probes import gan, mixed

BY_METRIC: dict[str, Any] = {
    **mixed.VALUES,
    "schedule": {
        "kind": "ReduceLROnPlateau",
        "metric": "validation/loss",
        "factor": 0.5,
        "patience": 0,
        "threshold": 0.2,
        "warmup_steps": 3,
    },
    "evaluate": [{"split": "validation", "every_steps": 2}],
}

BY_EPOCH: dict[str, Any] = {
    **mixed.VALUES,
    "schedule": [
        {"kind": "ConstantLR", "factor": 0.5, "steps": 1, "per": "epoch"},
        {"kind": "StepLR", "step_size": 1, "per": "epoch"},
    ],
}

EACH_ITS_OWN: dict[str, Any] = {
    **gan.VALUES,
    "optimizer": {
        "discriminator": {**gan.VALUES["optimizer"]["discriminator"], "schedule": {"kind": "ExponentialLR", "gamma": 0.9}},
        "generator": [{"kind": "SGD", "lr": 0.1, "schedule": {"kind": "CosineAnnealingLR", "per": "epoch"}}],
    },
    "schedule": None,
}
