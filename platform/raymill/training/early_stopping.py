"""Early stopping: a pure function of what the evaluations of a run have measured so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raymill.config.spec import EarlyStoppingSpec


@dataclass(frozen=True)
class Patience:
    """How long a metric has not improved.

    Attributes:
        best: its best value so far; None: it never was a number.
        num_worse: evaluations in a row that were no improvement.
    """

    best: float | None = None
    num_worse: int = 0

    def after(self, measured: Mapping[str, float], spec: EarlyStoppingSpec) -> Patience:
        """The patience once these metrics were measured; the same where the metric is not among them."""
        value = measured.get(spec.metric)
        if value is None:
            return self
        sign = 1 if spec.mode == "max" else -1
        if not math.isnan(value) and (self.best is None or sign * (value - self.best) > spec.min_delta):
            return Patience(value)
        return Patience(self.best, self.num_worse + 1)


def end_reason(patience: Patience, spec: EarlyStoppingSpec) -> str | None:
    """Why the training ends; None: it goes on."""
    if patience.num_worse < spec.patience:
        return None
    change = f" by more than {spec.min_delta:g}" if spec.min_delta else ""
    best = "it never was a number" if patience.best is None else f"its best is {patience.best:g}"
    return f"{spec.metric} has not improved{change} in {patience.num_worse} evaluations in a row; {best}"
