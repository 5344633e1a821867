"""What a LightningModule logs, and the metrics of torchmetrics that it keeps: over all rows and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from raymill.errors import InputError, Problem
from raymill.task import Kept, Total

if TYPE_CHECKING:
    from torchmetrics import Metric


class Log:
    """Takes the place of `self.log`."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def add(self, name: str, value: Any, *arguments: Any, **keywords: Any) -> None:
        """As `LightningModule.log`; when and where it is shown is the platform's."""
        self._values[name] = value

    def take_numbers(self, metrics: dict[str, Any] | None = None) -> dict[str, torch.Tensor | float]:
        """What was logged since it was last asked.

        Args:
            metrics: is given the metrics of torchmetrics that were logged; None: each stands for its value of this batch.
        """
        taken, self._values = self._values, {}
        found: dict[str, torch.Tensor | float] = {}
        for name, value in taken.items():
            if not _is_metric(value):
                found[name] = value.detach() if isinstance(value, torch.Tensor) else float(value)
            elif metrics is None:
                found[name] = _value_of_batch(value)
            else:
                metrics[name] = value
        return found


def metric_states(module: torch.nn.Module, num_rows: int) -> dict[str, Total | Kept]:
    """The state of each metric that was updated with one batch, which is then as new: sums, and what there is of each row.

    Raises:
        InputError: a state that is neither.
    """
    found: dict[str, Total | Kept] = {}
    for name, metric in _metrics(module):
        if not metric.update_called:
            continue
        for state, reduction in metric._reductions.items():
            value = getattr(metric, state)
            if isinstance(value, list):
                value = torch.cat([part.reshape(-1) if part.ndim == 0 else part for part in value])
            if getattr(reduction, "__name__", "") == "dim_zero_sum":
                found[f"{name}@{state}"] = Total(value.clone())
            elif getattr(reduction, "__name__", "") == "dim_zero_cat" and len(value) == num_rows:
                found[f"{name}@{state}"] = Kept(value.clone())
            else:
                what = f"state {state!r} of metric {name!r}, which is neither a sum over rows nor kept of each row"
                expected = "metrics of torchmetrics whose states are"
                fix = "Return what it needs as Kept from a raymill.task.Task, and compute it in conclude()."
                raise InputError([Problem("validation_step", what, expected, fix)])
        metric.reset()
    return found


@contextmanager
def restored_metrics(module: torch.nn.Module, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within this, each metric holds what all ranks have measured; afterwards it is as new."""
    metrics = list(_metrics(module))
    for name, metric in metrics:
        states = {state: f"{name}@{state}" for state in metric._reductions}
        if not any(key in totals or key in kept for key in states.values()):
            continue
        metric._update_count = 1
        for state, key in states.items():
            default = metric._defaults[state]
            value = totals[key] if key in totals else kept[key]
            setattr(metric, state, [value] if isinstance(default, list) else value.to(default.dtype))
    try:
        yield
    finally:
        forget_metrics(module)


def keep_metrics_apart(module: torch.nn.Module) -> None:
    """Let no metric ask other ranks for their part, which come together elsewhere."""
    for _, metric in _metrics(module):
        metric.sync_on_compute = metric.dist_sync_on_step = metric._to_sync = False


def forget_metrics(module: torch.nn.Module) -> None:
    """Let each metric begin anew."""
    for _, metric in _metrics(module):
        metric.reset()


def _value_of_batch(metric: Metric) -> torch.Tensor:
    """What a metric gave for the batch that it was called with."""
    value = metric._forward_cache if metric._forward_cache is not None else metric.compute()
    return torch.as_tensor(value).detach().float()


def _metrics(module: torch.nn.Module) -> Iterator[tuple[str, Metric]]:
    for name, part in module.named_modules():
        if _is_metric(part):
            yield name, part


def _is_metric(value: Any) -> bool:
    return hasattr(value, "_reductions") and hasattr(value, "update") and hasattr(value, "compute")
