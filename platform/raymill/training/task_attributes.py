"""State that is kept where it is not saved: attributes of a Task that change in a step.

What a checkpoint holds of a job's own code is the model: its parameters and buffers. A counter on the Task starts anew in every
attempt, so a run that is resumed would not be the one that was not. Whoever sees one change says so.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

MAX_DEPTH = 3
"""Attributes of attributes that are looked at."""


class AttributeWatch:
    """Compares a Task's attributes between the first and the second step of an attempt.

    What is only made on first use (a mask, a table) is there behind the first step, and stays.
    """

    def __init__(self, task: object) -> None:
        """Watch this Task."""
        self._task = task
        self._marks: dict[str, Any] | None = None
        self._done = False

    def changed(self) -> tuple[str, ...]:
        """Say that a step is done; returns the names of attributes that are seen to change, once in an attempt."""
        if self._done:
            return ()
        before, self._marks = self._marks, {name: _mark(value) for name, value in getattr(self._task, "__dict__", {}).items()}
        if before is None:
            return ()
        self._done = True
        return tuple(sorted(name for name in {*before, *self._marks} if before.get(name) != self._marks.get(name)))


def _mark(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Something small that differs when the value does, as far as one can see from outside."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value).__name__, repr(value)
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if isinstance(value, np.ndarray):
        return id(value), hashlib.sha256(value.tobytes()).digest()
    # A module's own state is its buffers; that of a module beside the model counts as soon as the model holds it.
    if depth == 0 or isinstance(value, torch.nn.Module):
        return id(value)
    if isinstance(value, dict):
        return [(_mark(name, depth - 1), _mark(item, depth - 1)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [_mark(item, depth - 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return id(value), [(name, _mark(item, depth - 1)) for name, item in getattr(value, "__dict__", {}).items()]
