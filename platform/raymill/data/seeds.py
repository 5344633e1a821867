"""Random numbers: every generator is seeded from where the run is, so there is no random state to save.

Whatever of a job's code may draw is seeded just before it runs: a source's `read` and a transform from (seed, epoch, fragment or
window), `collate` and a loss from (seed, position, shard). It may draw from Python's, NumPy's or torch's global generator.
Reading rows must not import torch for the sake of its generator, so this file takes torch only where it is imported already.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from raymill.data.order import key

TRANSFORM, FIRST_WEIGHTS, STEP, EVALUATION, COLLATE, READ, EVALUATION_COLLATE, MAKE, HOOK, CONCLUDE, PICTURES, ROW, LENGTH = (
    range(3, 16)
)
"""Keep the random numbers of different purposes apart."""


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and, where it is imported, torch (CPU and GPUs) from these numbers."""
    seed = key(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch := imported_torch():
        # Not torch.manual_seed: where a device is not used yet, it notes a stack trace for each call, a third of a millisecond.
        torch.default_generator.manual_seed(seed % 2**63)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed % 2**63)


_reading: ContextVar[tuple[int, ...]] = ContextVar("reading", default=())


@contextmanager
def reading(seed: int, epoch: int) -> Iterator[None]:
    """Within this, sources are read for this epoch of a job with this seed."""
    token = _reading.set((seed, epoch))
    try:
        yield
    finally:
        _reading.reset(token)


def seed_row(number: int) -> None:
    """Seed everything for one row of a source, whatever it is read together with."""
    watch = _watching.get()
    if watch is not None:
        watch.look()
    seed_everything(*_reading.get(), number, ROW)
    if watch is not None:
        watch.begin()


class DrawWatch:
    """Whether code draws random numbers from one of the global generators.

    Attributes:
        noticed: it did.
    """

    def __init__(self) -> None:
        """From now on."""
        self.noticed = False
        self.begin()

    def begin(self) -> None:
        """What was drawn until now is seen, or none of the code's."""
        self._states = _states()

    def look(self) -> None:
        """Notice what was drawn since."""
        self.noticed |= not all(map(_same, self._states, _states()))


_watching: ContextVar[DrawWatch | None] = ContextVar("watching", default=None)


@contextmanager
def watching_draws() -> Iterator[DrawWatch]:
    """Within this, notice whether anything is drawn. A generator that code makes for itself is its own affair."""
    watch = DrawWatch()
    token = _watching.set(watch)
    try:
        yield watch
    finally:
        watch.look()
        _watching.reset(token)


def _states() -> tuple[Any, ...]:
    """Of Python's, NumPy's and torch's generators; None where torch is not imported."""
    torch, (_, words, place, *_) = imported_torch(), np.random.get_state(legacy=True)
    return random.getstate(), words, place, torch.get_rng_state().numpy() if torch else None


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, np.ndarray) and isinstance(now, np.ndarray):
        return bool(np.array_equal(before, now))
    # Who imports torch meanwhile may have drawn from it, and is not the same.
    return type(before) is type(now) and bool(before == now)


def imported_torch() -> Any:
    """The module torch; None where it is not imported."""
    return sys.modules.get("torch")


@contextmanager
def unchanged_generators() -> Iterator[None]:
    """Give Python's, NumPy's and torch's generators back as they were."""
    python, numpy, torch = random.getstate(), np.random.get_state(), imported_torch()
    if torch:
        on_cpu, on_gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch:
            torch.set_rng_state(on_cpu)
            torch.cuda.set_rng_state_all(on_gpus)


@contextmanager
def unchanged_caller() -> Iterator[None]:
    """Give the caller back its environment, its number of threads and its random state. Torch is imported before."""
    torch = imported_torch()
    environment, threads = dict(os.environ), torch.get_num_threads()
    try:
        with unchanged_generators():
            yield
    finally:
        torch.set_num_threads(threads)
        # torch adds variables when parts of it are imported.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ |= environment
