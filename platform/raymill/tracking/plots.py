"""Pictures of a run, as PNG files. matplotlib draws them without a display and without global state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raymill.record.events import EvaluationDone, Event, StepDone

MAX_CLASSES_WITH_NUMBERS = 20


def draw(events: Iterable[Event], into: Path) -> None:
    """Draw what a run's events hold: `curves.png`, and a heat map of each square table among the last totals."""
    series: dict[str, dict[int, float]] = {}
    totals: dict[str, Any] = {}
    for event in events:
        if isinstance(event, StepDone | EvaluationDone):
            totals |= event.totals if isinstance(event, EvaluationDone) else {}
            for key, value in event.metrics.items():
                series.setdefault(key, {})[event.step] = value
    if series:
        curves({key: sorted(points.items()) for key, points in series.items()}, into / "curves.png")
    for name, total in totals.items():
        if isinstance(total, list) and all(isinstance(row, list) and len(row) == len(total) for row in total):
            confusion_matrix(total, into / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.png", name)


def confusion_matrix(matrix: Sequence[Sequence[float]], path: Path, title: str) -> None:
    """Draw a square table as a heat map: rows are the true classes, columns the predicted ones.

    Args:
        matrix: [num_classes][num_classes] counts.
        path: the PNG file to write.
        title: stands above it.
    """
    from matplotlib.figure import Figure

    num_classes = len(matrix)
    figure = Figure(figsize=(max(4.0, min(12.0, 0.55 * num_classes + 2)),) * 2, layout="constrained")
    axes = figure.add_subplot()
    # Shares of each true class, so that a rare class is seen as well as a frequent one.
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    if num_classes <= MAX_CLASSES_WITH_NUMBERS:
        axes.set_xticks(range(num_classes))
        axes.set_yticks(range(num_classes))
        for row in range(num_classes):
            for column in range(num_classes):
                color = "white" if shares[row][column] > 0.5 else "black"
                count = f"{matrix[row][column]:g}"
                axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=100)


def curves(series: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Draw metrics over steps; those that differ only in their split (train/loss, validation/loss) share one plot.

    Args:
        series: metric name -> (step, value) in the order of steps.
        path: the PNG file to write.
    """
    from matplotlib.figure import Figure

    plots: dict[str, list[str]] = {}
    for name in series:
        plots.setdefault(name.partition("/")[2] or name, []).append(name)
    figure = Figure(figsize=(7, 2.6 * max(1, len(plots))), layout="constrained")
    for number, (title, names) in enumerate(sorted(plots.items()), start=1):
        axes = figure.add_subplot(len(plots), 1, number)
        for name in sorted(names):
            steps, values = [step for step, _ in series[name]], [value for _, value in series[name]]
            axes.plot(steps, values, label=name, linewidth=1, marker="o" if len(values) < 30 else None, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)
