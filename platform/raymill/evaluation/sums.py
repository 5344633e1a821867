"""An evaluation: every validation row measured once, and sums that are exact over rows and ranks.

An evaluation hands over one value per row, or a Total that is summed. Values are summed in float64, and ranks are added
in the order of their numbers, so that a mean is over all rows, each counted once, at any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from raymill.task import Total

Gather = Callable[[torch.Tensor], list[torch.Tensor]]
"""A tensor -> the tensors of all ranks, in the order of the ranks."""


@dataclass
class Evaluation:
    """Sums over the batches that one rank has seen."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    totals: dict[str, torch.Tensor] = field(default_factory=dict)
    num_rows: int = 0

    def add(self, measured: Mapping[str, torch.Tensor | Total], num_rows: int) -> None:
        """Add one batch of `num_rows` rows: as `contracts.evaluate` lets it pass."""
        self.num_rows += num_rows
        for name, value in measured.items():
            if isinstance(value, Total):
                added = value.value.detach().to("cpu", torch.float64)
                self.totals[name] = self.totals[name] + added if name in self.totals else added
                continue
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach().to(torch.float64).sum())
            self.counts[name] = self.counts.get(name, 0) + num_rows

    def quantities(self) -> dict[str, Any]:
        """What was measured so far, as JSON-ready values for `expect`; empty before the first batch."""
        totals = {name: tuple(total.shape) for name, total in self.totals.items()}
        return {"means": list(self.sums), "totals": totals} if self.num_rows else {}

    def expect(self, quantities: Mapping[str, Any]) -> None:
        """Count as measured, over no rows, what another rank has measured: all ranks must reduce the same quantities."""
        for name in quantities["means"]:
            self.sums.setdefault(name, 0.0)
            self.counts.setdefault(name, 0)
        for name, shape in quantities["totals"].items():
            self.totals.setdefault(name, torch.zeros(shape, dtype=torch.float64))

    def reduce(self, gather: Gather) -> tuple[dict[str, float], dict[str, Any], int]:
        """Add up all ranks.

        Returns:
            (name -> mean over all rows, name -> total as nested lists, rows of all ranks)
        """
        means, shapes = sorted(self.sums), {name: tuple(self.totals[name].shape) for name in sorted(self.totals)}
        flat = [torch.tensor([float(self.num_rows)], dtype=torch.float64)]
        flat += [torch.tensor([self.sums[name], float(self.counts[name])], dtype=torch.float64) for name in means]
        flat += [self.totals[name].reshape(-1) for name in shapes]
        summed = torch.zeros_like(torch.cat(flat))
        for part in gather(torch.cat(flat)):
            summed = summed + part
        values = {name: float(summed[1 + 2 * i] / summed[2 + 2 * i]) for i, name in enumerate(means)}
        totals: dict[str, Any] = {}
        start = 1 + 2 * len(means)
        for name, shape in shapes.items():
            size = int(torch.Size(shape).numel())
            totals[name] = _numbers(summed[start : start + size].reshape(shape))
            start += size
        return values, totals, int(summed[0])


def _numbers(total: torch.Tensor) -> Any:
    whole = bool((total == total.round()).all())
    return total.to(torch.int64).tolist() if whole else total.tolist()
