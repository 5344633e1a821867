"""The precision of the forward pass, and what fp16 needs beside it: a scale for the loss."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def use_deterministic_algorithms(device: torch.device) -> None:
    """Let a GPU compute the same bits each time. Where torch has no such algorithm, it warns and takes another.

    See https://docs.pytorch.org/docs/stable/notes/randomness.html. On a CPU they are the same anyway.
    """
    if device.type == "cuda":
        # Read when cuBLAS is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The forward pass's precision: "fp32", "bf16" or "fp16"."""
    return torch.autocast(device.type, dtype=_TYPES[precision]) if precision in _TYPES else nullcontext()


@dataclass(frozen=True)
class LossScale:
    """What the loss of a step is multiplied by, so that its gradients do not vanish in fp16.

    Micikevicius et al., "Mixed Precision Training", 2018; with the numbers of torch.amp.GradScaler. A power of two, so nothing is
    rounded by it.

    All ranks know the same, from the norm of the summed gradients. GradScaler would keep that per device, apart from the state.

    Attributes:
        scale: of the next step; 1 for good where the precision needs none.
        good_steps: taken with it, one after the other.
    """

    scale: float = 1.0
    good_steps: int = 0

    @classmethod
    def of(cls, precision: str) -> LossScale:
        """The first one."""
        return cls(FIRST_SCALE) if precision == "fp16" else cls()

    def behind(self, *, finite: bool) -> LossScale:
        """Behind a step: twice as much after many good ones; half as much where a gradient became infinite."""
        if not finite:
            return LossScale(self.scale / 2)
        if self.good_steps + 1 == GROWTH_STEPS:
            return LossScale(self.scale * 2)
        return LossScale(self.scale, self.good_steps + 1)
