"""Pictures of a search, as PNG files: how it went, which fields count, where good values lie, which trials ended early.

Optuna draws them with matplotlib; one that cannot be drawn of few trials is left out. All that this takes is imported with this
file, which is while trials run: at the end somebody waits for the pictures.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState
from optuna.visualization import matplotlib as plots

from raymill.files import read_record
from raymill.tune.folder import StudyFolder
from raymill.tune.outcome import open_study
from raymill.tune.study import Study, first_value

log = logging.getLogger("raymill.tune")


def draw(folder: StudyFolder) -> tuple[dict[str, float], list[Path]]:
    """Draw a study; returns the importance of each field, and the pictures' files."""
    matplotlib.use("Agg")
    study, study_metric = open_study(folder), read_record(folder.record)["metric"]
    found = importance(study)
    folder.pictures.mkdir(exist_ok=True)
    metrics = [study_metric, *study.search.also]
    # Of several metrics, the first; the front shows them all.
    first = {"target": first_value, "target_name": metrics[0]}
    wanted: dict[str, Callable[[Any], Any]] = {
        "history": partial(plots.plot_optimization_history, **first),
        "parallel_coordinates": partial(plots.plot_parallel_coordinate, **first),
        "slices": partial(plots.plot_slice, **first),
    }
    if study.search.also:
        wanted["front"] = partial(plots.plot_pareto_front, target_names=metrics)
    else:
        wanted["intermediate_values"] = plots.plot_intermediate_values
    drawn = [path for name, plot in wanted.items() if (path := _drawn(name, plot, study, folder.pictures))]
    if found:
        drawn.append(_bars(found, folder.pictures / "importance.png"))
    return found, drawn


def importance(study: Study) -> dict[str, float]:
    """How much of the differences between trials each field explains, by fANOVA (Hutter et al., 2014); {} of few trials."""
    done = [one for one in study.trials() if one.state == TrialState.COMPLETE]
    if len(done) < 4 or len({one.values[0] for one in done}) == 1:
        return {}
    evaluator = FanovaImportanceEvaluator(seed=0)
    return dict(get_param_importances(study.optuna, evaluator=evaluator, target=first_value))


def _drawn(name: str, plot: Callable[[Any], Any], study: Study, into: Path) -> Path | None:
    path = into / f"{name}.png"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes = plot(study.optuna)
            figure = (axes if hasattr(axes, "figure") else axes.flat[0]).figure
            figure.set_size_inches(max(8.0, figure.get_size_inches()[0]), max(5.0, figure.get_size_inches()[1]))
            figure.savefig(path, dpi=100, bbox_inches="tight")
    except Exception as error:  # matplotlib raises whatever its parts raise, and no picture is worth a search
        log.warning("the picture %s was not drawn: %s: %s", name, type(error).__name__, error)
        return None
    finally:
        plt.close("all")
    return path


def _bars(found: Mapping[str, float], path: Path) -> Path:
    figure = Figure(figsize=(8, 1 + 0.4 * len(found)))
    axes = figure.subplots()
    names = list(found)[::-1]
    axes.barh([name.replace("$", r"\$") for name in names], [found[name] for name in names])
    axes.set_xlabel("share of the differences between trials that the field explains (fANOVA)")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    return path
