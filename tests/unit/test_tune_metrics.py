"""Searches for several metrics at once, inside limits, and by searchers of others."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from raymill.config import load
from raymill.config.search import SearchSpec
from raymill.errors import InputError
from raymill.files import write_record
from raymill.tune.folder import StudyFolder
from raymill.tune.outcome import table
from raymill.tune.searcher import Searched
from raymill.tune.space import Values
from raymill.tune.study import METRICS, Study, Suggestion

SPACE = {
    "x": {"kind": "uniform", "low": 0.0, "high": 1.0},
    "n": {"kind": "int", "low": 3, "high": 15, "step": 4},
    "how": {"kind": "choice", "values": ["a", None, True]},
    "rate": {"kind": "loguniform", "low": 1e-4, "high": 1.0, "when": {"how": ["a", True]}},
    "width": {"kind": "int", "low": 1, "high": 1000, "log": True},
}
OPTUNA_SEARCH = "ray.tune.search.optuna:OptunaSearch"


def search(**more: Any) -> SearchSpec:
    return SearchSpec.model_validate({"space": SPACE, **more})


def two(values: Values) -> list[float]:
    """Costs that pull in two directions: a small x is good for one, a large one for the other."""
    x = float(values["x"])
    return [x**2 + 0.001 * values["n"], (1 - x) ** 2]


def run(study: Study, trials: int) -> list[tuple[int, Values, list[float]]]:
    found = []
    while isinstance(suggestion := study.next(trials), Suggestion):
        values = two(suggestion.values)[: 1 + len(study.search.also)]
        study.tell(suggestion.number, "complete", values, {}, study.search.breaks({"x": suggestion.values["x"]}))
        found.append((suggestion.number, suggestion.values, values))
    return found


@pytest.mark.parametrize("kind", ["tpe", "nsgaii", "random"])
def test_a_search_for_two_metrics_keeps_what_no_other_beats(kind: str, tmp_path: Path) -> None:
    made = search(sampler={"kind": kind, "startup_trials": 4}, also={"second": "min"})
    whole = run(Study(tmp_path / "whole.db", "s", made, "min"), 14)
    parts = run(Study(tmp_path / "parts.db", "s", made, "min"), 5)
    lost = Study(tmp_path / "parts.db", "s", made, "min").next(14)
    study = Study(tmp_path / "parts.db", "s", made, "min")
    assert parts + run(study, 14) == whole
    assert isinstance(lost, Suggestion)
    front = {one.number for one in study.front(study.trials())}
    assert front == {
        number
        for number, _, own in whole
        if not any(other != own and other[0] <= own[0] and other[1] <= own[1] for *_, other in whole)
    }
    assert len(front) > 1
    best = study.best()
    assert best is not None
    assert best.values[0] == min(values[0] for *_, values in whole)


@pytest.mark.parametrize("kind", ["tpe", "nsgaii", "random"])
def test_what_breaks_a_limit_is_not_the_best_and_a_sampler_looks_elsewhere(kind: str, tmp_path: Path) -> None:
    # Without the limit, the best would be at x = 0.
    made = search(sampler={"kind": kind, "startup_trials": 8}, limits={"x": {"least": 0.6, "most": 0.7}})
    study = Study(tmp_path / "s.db", "s", made, "min")
    found = run(study, 40)
    best = study.best()
    assert best is not None
    inside = [number for number, values, _ in found if 0.6 <= values["x"] <= 0.7]
    assert best.number == min(inside, key=lambda number: found[number][2][0])
    assert len(inside) < len(found)
    if kind == "tpe":
        assert len([number for number in inside if number >= 20]) > len([number for number in inside if number < 20])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"also": {"second": "min"}, "scheduler": {"kind": "asha"}}, "by one metric"),
        ({"also": {"second": "min"}, "sampler": {"kind": "cmaes"}}, "for one metric"),
        ({"also": {"second": "min"}, "sampler": {"kind": OPTUNA_SEARCH}}, "for one metric"),
        ({"also": {"first": "min"}, "metric": "first"}, "the metric already"),
        ({"also": {"second": "most"}}, "'max' or 'min'"),
        ({"limits": {"first": {}}}, "least, most, or both"),
        ({"limits": {"first": {"least": 2.0, "most": 1.0}}}, "above most"),
        ({"sampler": {"kind": "tpee"}}, "one of tpe"),
        ({"sampler": {"kind": "tpe", "args": {"seed": 1}}}, "args goes with a searcher"),
    ],
)
def test_what_does_not_go_together_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        search(**more)


def test_a_searcher_of_ray_tune_suggests_and_after_a_death_goes_on_with_the_same(tmp_path: Path) -> None:
    made = search(sampler={"kind": OPTUNA_SEARCH, "args": {"seed": 3}})
    given = [{"x": 0.5, "n": 7, "how": None, "width": 9}]

    def opened(name: str) -> Study:
        return Study(tmp_path / f"{name}.db", "s", made, "min", given)

    whole = run(opened("whole"), 30)
    parts = run(opened("parts"), 4)
    lost = opened("parts").next(30)
    parts += run(opened("parts"), 9)
    parts += run(opened("parts"), 30)
    assert parts == whole
    assert isinstance(lost, Suggestion)
    assert lost.values == whole[4][1]
    assert whole[0][1] == given[0]
    assert all(("rate" in values) == (values["how"] is not None) for _, values, _ in whole)
    assert {values["n"] for _, values, _ in whole} <= {3, 7, 11, 15}
    # It was told what came of them: those behind its ten random ones are nearer.
    assert sum(values["x"] for _, values, _ in whole[20:]) < sum(values["x"] for _, values, _ in whole[1:11])
    other = search(sampler={"kind": OPTUNA_SEARCH, "args": {"seed": 4}})
    assert run(Study(tmp_path / "other.db", "s", other, "min", given), 5)[1] != whole[1]


def test_a_searcher_is_told_in_the_order_in_which_trials_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = search(sampler={"kind": "ray.tune.search.optuna:OptunaSearch", "args": {"seed": 1}})
    heard: dict[str, list[tuple[str, Any]]] = {"live": [], "again": []}
    into = "live"

    def listen(self: Any, trial_id: str, result: Any = None, error: bool = False) -> None:
        heard[into].append((trial_id, "failed" if error else result["value"]))

    monkeypatch.setattr("ray.tune.search.optuna.OptunaSearch.on_trial_complete", listen)
    study = Study(tmp_path / "s.db", "s", made, "min")
    for _ in range(3):
        study.next(9)
    study.tell(2, "complete", [0.25], {})
    study.tell(0, "failed", None, {})
    study.next(9)
    study.report(1, 1, 4.0)
    study.tell(1, "pruned", None, {})
    study.next(9)
    assert heard["live"] == [("2", 0.25), ("0", "failed"), ("1", 4.0)]
    into = "again"
    again = Study(tmp_path / "s.db", "s", made, "min")
    again.next(9)
    again.next(9)
    again.next(9)
    assert heard["again"] == heard["live"]


def test_one_that_suggests_nothing_is_named() -> None:
    made = search(sampler={"kind": OPTUNA_SEARCH})
    searched = Searched(made, "min")
    searched._searcher.suggest = lambda trial_id: None  # type: ignore[method-assign]
    study = Study(None, "s", made, "min")
    study._searched = searched
    with pytest.raises(Exception, match="OptunaSearch suggested None for trial 0"):
        study.next(3)


def job(tmp_path: Path, sampler: dict[str, Any], **more: Any) -> Path:
    values = yaml.safe_load(load.find_job("smoke").read_text())
    values["search"] = {"space": {"optimizer.lr": {"kind": "uniform", "low": 0.1, "high": 0.2}}, "sampler": sampler, **more}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("sampler", "where", "said"),
    [
        ({"kind": "ray.tune.search.optuna:OptunaSerch"}, "search.sampler.kind", "Did you mean 'OptunaSearch'?"),
        ({"kind": "ray.tune.schedulers:ASHAScheduler"}, "search.sampler.kind", "the package 'ray'"),
        ({"kind": "os:system"}, "search.sampler.kind", "the package 'os'"),
        ({"kind": "jobs.smoke.task:Blobs"}, "search.sampler.kind", "the mark"),
        ({"kind": OPTUNA_SEARCH, "args": {"sed": 1}}, "search.sampler.args.sed", "Did you mean 'seed'?"),
        ({"kind": OPTUNA_SEARCH, "args": {"seed": "one"}}, "search.sampler.args.seed", "int"),
        ({"kind": OPTUNA_SEARCH, "args": {"metric": "loss"}}, "search.sampler.args.metric", "known argument"),
    ],
)
def test_a_searcher_that_is_none_is_refused(tmp_path: Path, sampler: dict[str, Any], where: str, said: str) -> None:
    found = load.examine_job(str(job(tmp_path, sampler)), []).problems
    assert len(found) == 1
    assert found[0].where.endswith(where)
    assert said in str(found[0])


def test_a_searcher_that_is_right_is_taken(tmp_path: Path) -> None:
    assert load.examine_job(str(job(tmp_path, {"kind": OPTUNA_SEARCH, "args": {"seed": 1}})), []).problems == ()
    (tmp_path / "ill.yaml").touch()
    with pytest.raises(InputError, match="one of tpe"):
        load.load_job(str(job(tmp_path, {"kind": "tpee"})), [])


def test_events_at_the_same_instant_have_an_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still, as one that is set back may: what ended is told before what begins."""
    made = search(sampler={"kind": OPTUNA_SEARCH, "args": {"seed": 3}})

    class Still(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Still:
            return cls(2026, 1, 1)

    monkeypatch.setattr("optuna.storages._in_memory.datetime", Still)
    found = run(Study(None, "s", made, "min"), 5)
    assert [number for number, *_ in found] == list(range(5))


def test_the_table_of_a_study_has_its_further_metrics(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "s")
    folder.path.mkdir()
    made = search(also={"second": "min"}, limits={"third": {"most": 0.5}})
    write_record(folder.record, {"search": made.model_dump(mode="json"), "mode": "min"})
    study = Study(folder.store, "s", made, "min")
    suggestion = study.next(1)
    assert isinstance(suggestion, Suggestion)
    study.tell(
        0, "complete", [1.0, 2.0], {METRICS: {"first": 1.0, "second": 2.0, "third": 0.25}}, study.search.breaks({"third": 0.25})
    )
    columns, [row] = table(folder)
    assert dict(zip(columns, row, strict=True)) == {
        **{"number": 0, "state": "complete", "value": 1.0, "second": 2.0, "third": 0.25},
        **{"deviation": None, "seconds": None, "message": None},
        **suggestion.values,
    }
