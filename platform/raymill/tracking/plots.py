"""Pictures of a run, as PNG files. matplotlib draws them without a display and without global state.

What is drawn comes from the job's own code, so its number and size are bounded, names are never read as formulas, and a picture
that cannot be drawn is logged and left out.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raymill.record.events import EvaluationDone, Event, StepDone
from raymill.task import VALIDATION

log = logging.getLogger("raymill.tracking")

MAX_CLASSES_WITH_NUMBERS = 20
MAX_CLASSES = 1000
MAX_TABLES = 8
MAX_PLOTS = 20
MAX_CURVES_PER_PLOT = 10
MAX_POINTS_PER_CURVE = 2000
MAX_TITLE_LETTERS = 60


def draw(events: Iterable[Event], into: Path) -> None:
    """Draw what a run's events hold: `curves.png`, and a heat map of each square table among the last totals.

    Of very many, the first by name are drawn. Never raises for what the events hold.
    """
    series: dict[str, dict[int, float]] = {}
    totals: dict[str, Any] = {}
    for event in events:
        if isinstance(event, StepDone | EvaluationDone):
            totals |= event.totals if isinstance(event, EvaluationDone) else {}
            for key, value in event.metrics.items():
                series.setdefault(key, {})[event.step] = value
    if series:
        points = {key: _thinned(sorted(by_step.items())) for key, by_step in series.items()}
        _try("curves.png", lambda: curves(points, into / "curves.png"))
    tables = sorted(name for name, total in totals.items() if _is_square_table(total))
    for name in tables[:MAX_TABLES]:
        file = f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:MAX_TITLE_LETTERS]}.png"
        _try(file, lambda name=name, file=file: confusion_matrix(totals[name], into / file, name))  # type: ignore[misc]
    if len(tables) > MAX_TABLES:
        log.warning("%d tables were not drawn: there are more than %d", len(tables) - MAX_TABLES, MAX_TABLES)


def _try(name: str, picture: Callable[[], None]) -> None:
    try:
        picture()
    except Exception as error:  # matplotlib raises whatever its parts raise, and no picture is worth a run
        log.warning("the picture %s was not drawn: %s: %s", name, type(error).__name__, error)


def _is_square_table(total: Any) -> bool:
    """Whether these totals are counts by true and predicted class."""
    if not isinstance(total, list) or not 0 < len(total) <= MAX_CLASSES:
        return False
    rows = [row for row in total if isinstance(row, list) and len(row) == len(total)]
    return len(rows) == len(total) and all(isinstance(count, int | float) for row in rows for count in row)


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """At most `MAX_POINTS_PER_CURVE` of the points, the last among them; a picture has no more pixels."""
    every = math.ceil(len(points) / MAX_POINTS_PER_CURVE)
    return points if every <= 1 else points[::-1][::every][::-1]


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
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title[:MAX_TITLE_LETTERS], parse_math=False)
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

    What was evaluated comes first. Of more than `MAX_PLOTS` plots, the first are drawn.

    Args:
        series: metric name -> (step, value) in the order of steps.
        path: the PNG file to write.
    """
    from matplotlib.figure import Figure

    plots: dict[str, list[str]] = {}
    for name in series:
        plots.setdefault(name.partition("/")[2] or name, []).append(name)
    if len(plots) > MAX_PLOTS:
        log.warning("%d metrics were not drawn: there are more than %d", len(plots) - MAX_PLOTS, MAX_PLOTS)
    shown = sorted(plots.items(), key=lambda plot: (not _is_evaluated(plot[1]), plot[0]))[:MAX_PLOTS]
    num_columns = min(2, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    # So small that MLflow, which shows pictures as large as they are, has room for them in a run's description.
    figure = Figure(figsize=(2.8 * num_columns, 1.9 * num_rows), layout="constrained")
    for number, (title, names) in enumerate(shown, start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        for name in sorted(names)[:MAX_CURVES_PER_PLOT]:
            steps, values = [step for step, _ in series[name]], [value for _, value in series[name]]
            axes.plot(
                steps,
                values,
                label=name[:MAX_TITLE_LETTERS].lstrip("_"),
                linewidth=1,
                marker="o" if len(values) < 30 else None,
                markersize=2,
            )
        axes.set_title(title[:MAX_TITLE_LETTERS], parse_math=False, fontsize=8)
        axes.set_xlabel("step", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.grid(alpha=0.3)
        for label in axes.legend(fontsize=6).get_texts():
            label.set_parse_math(False)
    figure.savefig(path, dpi=100)


def _is_evaluated(names: Iterable[str]) -> bool:
    return any(name.startswith(f"{VALIDATION}/") for name in names)
