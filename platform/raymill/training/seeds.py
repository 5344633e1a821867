"""Random numbers of training: every generator is seeded from where the run is, so there is no random state to save."""

from __future__ import annotations

import random

import numpy as np
import torch

from raymill.data.order import key

FIRST_WEIGHTS, STEP, EVALUATION = 4, 5, 6
"""Keep the random numbers of the first weights, of steps and of evaluations apart."""


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch (all devices) from these numbers."""
    seed = key(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)
