"""Random numbers of training: every generator is seeded from where the run is, so there is no random state to save."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def unchanged_caller() -> Iterator[None]:
    """Give the caller back its environment, its number of threads and its random state."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads(threads)
        # torch adds variables when parts of it are imported.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
