"""An evaluation: every validation row measured once, and sums that are exact over rows and ranks.

An evaluation hands over one value per row, or a Total that is summed. Values are summed in float64, and ranks are added
in the order of their numbers, so that a mean is over all rows, each counted once, at any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from raymill.data.rows import ROW_ID
from raymill.evaluation.kept import as_column
from raymill.task import Kept, Rows, Total

Gather = Callable[[torch.Tensor], list[torch.Tensor]]
"""A tensor -> the tensors of all ranks, in the order of the ranks."""


@dataclass
class Evaluation:
    """What one rank has measured: sums over its batches, and what is kept of its rows."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    totals: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: list[Rows] = field(default_factory=list)
    num_rows: int = 0

    def add(self, measured: Mapping[str, torch.Tensor | Total | Kept], row_ids: np.ndarray) -> None:
        """Add one batch of rows with these ids, as `contracts.evaluate` lets it pass. Only what is kept waits for the device."""
        self.num_rows += len(row_ids)
        kept: Rows = {}
        for name, value in measured.items():
            match value:
                case Kept():
                    kept[name] = as_column(value)
                case Total():
                    added = value.value.detach().to(torch.float64)
                    self.totals[name] = self.totals[name] + added if name in self.totals else added
                case _:
                    added = value.detach().to(torch.float64).sum()
                    self.sums[name] = self.sums[name] + added if name in self.sums else added
                    self.counts[name] = self.counts.get(name, 0) + len(row_ids)
        if kept:
            self.kept.append({**kept, ROW_ID: row_ids})

    def quantities(self) -> dict[str, Any]:
        """What was measured so far, as JSON-ready values for `expect`; empty before the first batch."""
        totals = {name: tuple(total.shape) for name, total in self.totals.items()}
        return {"means": list(self.sums), "totals": totals} if self.num_rows else {}

    def expect(self, quantities: Mapping[str, Any]) -> None:
        """Count as measured, over no rows, what another rank has measured: all ranks must reduce the same quantities."""
        for name in quantities["means"]:
            self.sums.setdefault(name, torch.zeros((), dtype=torch.float64))
            self.counts.setdefault(name, 0)
        for name, shape in quantities["totals"].items():
            self.totals.setdefault(name, torch.zeros(shape, dtype=torch.float64))

    def reduce(self, gather: Gather) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
        """Add up all ranks.

        Returns:
            (name -> mean over all rows, name -> total on the CPU, rows of all ranks)
        """
        means, shapes = sorted(self.sums), {name: tuple(self.totals[name].shape) for name in sorted(self.totals)}
        flat = [torch.tensor([float(self.num_rows)], dtype=torch.float64)]
        flat += [torch.tensor([float(self.sums[name]), float(self.counts[name])], dtype=torch.float64) for name in means]
        flat += [self.totals[name].reshape(-1).cpu() for name in shapes]
        summed = torch.zeros_like(torch.cat(flat))
        for part in gather(torch.cat(flat)):
            summed = summed + part
        values = {name: float(summed[1 + 2 * i] / summed[2 + 2 * i]) for i, name in enumerate(means)}
        totals: dict[str, torch.Tensor] = {}
        start = 1 + 2 * len(means)
        for name, shape in shapes.items():
            size = int(torch.Size(shape).numel())
            totals[name] = summed[start : start + size].reshape(shape)
            start += size
        return values, totals, int(summed[0])


def as_numbers(total: torch.Tensor) -> Any:
    """A total as nested lists, of whole numbers where all are."""
    whole = bool((total == total.round()).all())
    return total.to(torch.int64).tolist() if whole else total.tolist()
