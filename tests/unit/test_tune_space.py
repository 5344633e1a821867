"""The space of a search: its corners, what of it is tried, what a study suggests, also one that goes on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raymill.config.search import SearchSpec
from raymill.errors import InputError
from raymill.files import write_record
from raymill.tune import space
from raymill.tune.folder import StudyFolder, studies_folder, unfinished_study
from raymill.tune.pictures import importance
from raymill.tune.population import changed
from raymill.tune.study import Study, Suggestion, Wait


def search(space: dict[str, Any], **more: Any) -> SearchSpec:
    return SearchSpec.model_validate({"space": space, **more})


RATE = {"kind": "loguniform", "low": 1e-4, "high": 1.0}
TREE = {
    "kind": {"kind": "choice", "values": ["flat", "deep"]},
    "depth": {"kind": "int", "low": 1, "high": 9, "when": {"kind": "deep"}},
    "rate": RATE,
    "decay": {"kind": "uniform", "low": 0.0, "high": 1.0, "when": {"depth": [1, 9]}},
}


def test_corners_hold_what_is_tried_there_and_nothing_else() -> None:
    found = list(space.corners(search(TREE).space))
    assert all(("depth" in values) == (values["kind"] == "deep") for values in found)
    assert all(("decay" in values) == ("depth" in values) for values in found)
    assert {values["rate"] for values in found} == {1e-4, 1.0}
    assert {values.get("depth") for values in found} == {None, 1, 9}


@given(st.integers(1, 12))
def test_of_a_large_space_every_end_is_in_a_corner(count: int) -> None:
    wide = {f"f{number}": {"kind": "choice", "values": [0, 1, 2]} for number in range(count)}
    found = list(space.corners(search(wide).space))
    assert len(found) <= max(space.MOST_CORNERS, 3 * count)
    for name in wide:
        assert {values[name] for values in found} == {0, 1, 2}


def test_fields_that_wait_for_each_other_are_named() -> None:
    circle = {"a": {**RATE, "when": {"b": 1}}, "b": {**RATE, "when": {"a": 1}}, "c": {**RATE, "when": {"nobody": 1}}, "d": RATE}
    with pytest.raises(InputError) as caught:
        space.in_order(search(circle).space)
    assert [problem.where for problem in caught.value.problems] == [f"search.space.{name}.when" for name in "abc"]


@pytest.mark.parametrize(
    ("one", "said"),
    [
        ({"kind": "choice"}, "choice needs them"),
        ({"kind": "choice", "values": [1], "low": 0.0, "high": 1.0}, "every kind but choice"),
        ({"kind": "uniform", "low": 1.0, "high": 1.0}, "is not below"),
        ({"kind": "uniform", "low": 1.0}, "both low and high"),
        ({"kind": "loguniform", "low": 0.0, "high": 1.0}, "above 0"),
        ({"kind": "int", "low": 0.5, "high": 2.0}, "whole"),
        ({"kind": "int", "low": 0, "high": 2, "log": True}, "from 1 on"),
        ({"kind": "normal"}, "choice"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(one: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        search({"x": one})


def test_a_grid_has_each_point_once() -> None:
    made = search(
        {
            "a": {"kind": "choice", "values": ["x", "y"]},
            "b": {"kind": "int", "low": 0, "high": 4, "step": 2},
            "c": {"kind": "uniform", "low": 0.0, "high": 0.3, "step": 0.1},
        },
        sampler={"kind": "grid"},
    )
    points = space.grid(made)
    assert len({tuple(point.items()) for point in points}) == len(points) == 2 * 3 * 4
    assert all(space.holds(made.space[name], value) for point in points for name, value in point.items())
    with pytest.raises(ValidationError, match="always tried"):
        search({"a": RATE}, sampler={"kind": "grid"})


def worth(values: space.Values) -> float:
    """Of the one-dimensional test function of Forrester et al. (2008), -6.0207 at x = 0.757."""
    import math

    x = float(values["x"])
    return (6 * x - 2) ** 2 * math.sin(12 * x - 4)


def run(study: Study, trials: int) -> list[tuple[int, space.Values, float]]:
    found = []
    while isinstance(suggestion := study.next(trials), Suggestion):
        value = worth(suggestion.values)
        study.tell(suggestion.number, "complete", [value], {})
        found.append((suggestion.number, suggestion.values, value))
    return found


LINE = {"x": {"kind": "uniform", "low": 0.0, "high": 1.0}}


@pytest.mark.parametrize("kind", ["random", "tpe", "gp", "cmaes", "quasirandom"])
def test_a_study_that_goes_on_suggests_what_it_would_have(kind: str, tmp_path: Path) -> None:
    made = search({**LINE, "y": RATE}, sampler={"kind": kind, "startup_trials": 4})
    whole = run(Study(tmp_path / "whole.db", "s", made, "min"), 8)
    parts = run(Study(tmp_path / "parts.db", "s", made, "min"), 3)
    # Killed with a suggestion that nobody has answered.
    lost = Study(tmp_path / "parts.db", "s", made, "min").next(8)
    again = run(Study(tmp_path / "parts.db", "s", made, "min"), 8)
    assert isinstance(lost, Suggestion)
    assert [number for number, *_ in parts + again] == list(range(8))
    if kind != "quasirandom":
        assert lost.values == again[0][1]
        assert parts + again == whole


def test_points_come_first_and_once(tmp_path: Path) -> None:
    made = search(LINE, sampler={"kind": "random"})
    first = [{"x": 0.25}, {"x": 0.75}]
    begun = Study(tmp_path / "s.db", "s", made, "min", first).next(5)
    assert isinstance(begun, Suggestion)
    assert begun.values == {"x": 0.25}
    found = run(Study(tmp_path / "s.db", "s", made, "min", first), 5)
    assert [values["x"] for _, values, _ in found][:2] == [0.25, 0.75]
    assert len(found) == 5


def test_the_best_trial_is_found_with_one_look_at_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path / "s.db", "s", search(LINE, sampler={"kind": "random"}), "min")
    found = run(study, 12)
    looks: list[int] = []
    trials = study.trials
    monkeypatch.setattr(study, "trials", lambda: looks.append(1) or trials())
    best = study.best()
    assert best is not None
    assert (best.number, len(looks)) == (min(found, key=lambda one: one[2])[0], 1)


def test_a_trial_that_is_over_stays_as_it_is(tmp_path: Path) -> None:
    study = Study(tmp_path / "s.db", "s", search(LINE), "max")
    assert study.next(1) is not None
    study.tell(0, "complete", [2.0], {})
    study.tell(0, "failed", None, {"message": "late"})
    assert study.best() is not None
    assert [(one.value, one.user_attrs) for one in study.trials()] == [(2.0, {})]


def test_tpe_comes_closer_to_two_published_functions_than_chance() -> None:
    """Branin's and Rosenbrock's (as in Surjanovic and Bingham, "Virtual Library of Simulation Experiments")."""
    import math

    def branin(x: float, y: float) -> float:
        a = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
        return a**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10

    def rosenbrock(x: float, y: float) -> float:
        return 100 * (y - x**2) ** 2 + (1 - x) ** 2

    wins = []
    for function, seed in itertools.product((branin, rosenbrock), range(5)):
        best = {}
        for kind in ("random", "tpe"):
            made = search(
                {"x": {"kind": "uniform", "low": -5.0, "high": 10.0}, "y": {"kind": "uniform", "low": -5.0, "high": 15.0}},
                sampler={"kind": kind},
                seed=seed,
            )
            study = Study(None, "s", made, "min")
            while isinstance(suggestion := study.next(50), Suggestion):
                study.tell(suggestion.number, "complete", [function(suggestion.values["x"], suggestion.values["y"])], {})
            found = study.best()
            assert found is not None
            best[kind] = found.value
        wins.append(best["tpe"] < best["random"])
    assert sum(wins) >= 7, wins


def test_asha_finds_the_best_of_known_curves_with_less_than_half_of_the_work() -> None:
    """Each trial's curve rises to its own height, 1 - (x - 0.7)^2, in 27 evaluations; the best height wins."""
    made = search(LINE, sampler={"kind": "random"}, scheduler={"kind": "asha", "grace": 1, "reduction_factor": 3}, seed=1)
    study = Study(None, "s", made, "max")
    heights, work = {}, 0
    while isinstance(suggestion := study.next(60), Suggestion):
        x, ended = suggestion.values["x"], False
        heights[suggestion.number] = 1 - (x - 0.7) ** 2
        for step in range(1, 28):
            work += 1
            value = heights[suggestion.number] * (1 - 0.8**step)
            if study.report(suggestion.number, step, value):
                study.tell(suggestion.number, "pruned", None, {})
                ended = True
                break
        if not ended:
            study.tell(suggestion.number, "complete", [value], {})
    best = study.best()
    assert best is not None
    assert best.number == max(heights, key=lambda number: heights[number])
    assert work <= 0.4 * 60 * 27, work / (60 * 27)


def test_what_counts_is_found(tmp_path: Path) -> None:
    study = Study(tmp_path / "s.db", "s", search({**LINE, "y": RATE}, sampler={"kind": "random"}), "min")
    run(study, 40)
    assert importance(study)["x"] > 0.8
    assert optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 's.db'}").best_trial.number >= 0


def trained(theta: tuple[float, float], values: space.Values) -> tuple[float, float]:
    """Some steps up the surrogate 1.2 - h0 x^2 - h1 y^2, as in figure 2 of Jaderberg et al. (2017)."""
    x, y = theta
    for _ in range(4):
        x, y = x - 0.02 * 2 * values["h0"] * x, y - 0.02 * 2 * values["h1"] * y
    return x, y


def quality(theta: tuple[float, float]) -> float:
    return 1.2 - theta[0] ** 2 - theta[1] ** 2


SURROGATE = {name: {"kind": "uniform", "low": 0.0, "high": 1.0} for name in ("h0", "h1")}


@pytest.mark.parametrize("seed", range(5))
def test_population_based_training_beats_chance_on_its_authors_toy(seed: int) -> None:
    best = {}
    for kind in ("none", "pbt"):
        made = search(
            SURROGATE,
            trials=40,
            seed=seed,
            sampler={"kind": "random"},
            scheduler={"kind": kind, "population": 4, "quantile": 0.25},
        )
        study = Study(None, "s", made, "max")
        learned: dict[int, tuple[float, float]] = {}
        for _ in range(40):
            # At random, a member trains with the same values in all ten generations.
            if kind == "none" and len(learned) >= 4:
                number = len(learned) - 4
                learned[len(learned)] = trained(learned[number], study.trials()[number % 4].params)
                continue
            suggestion = study.next(40)
            assert isinstance(suggestion, Suggestion)
            begin = learned[suggestion.parent] if suggestion.parent is not None else (0.9, 0.9)
            learned[suggestion.number] = trained(begin, suggestion.values)
            study.tell(suggestion.number, "complete", [quality(learned[suggestion.number])], {"step": 4})
        best[kind] = max(quality(learned[number]) for number in range(36, 40))
    assert best["pbt"] > best["none"]


def test_a_generation_waits_for_the_one_before_and_is_found_again(tmp_path: Path) -> None:
    made = search(SURROGATE, trials=6, scheduler={"kind": "pbt", "population": 2, "quantile": 0.5})
    study = Study(tmp_path / "s.db", "s", made, "max")
    first, second = study.next(6), study.next(6)
    assert isinstance(first, Suggestion)
    assert isinstance(second, Suggestion)
    study.tell(0, "failed", None, {})
    assert isinstance(study.next(6), Wait)
    study.tell(1, "complete", [1.0], {"step": 8})
    third = study.next(6)
    assert isinstance(third, Suggestion)
    assert (third.parent, third.step) == (1, 8), "who failed goes on from who did not"
    assert third.values != second.values
    again = Study(tmp_path / "s.db", "s", made, "max").next(6)
    assert again == third


@given(st.integers(0, 10**6))
def test_changed_values_stay_inside_the_space(seed: int) -> None:
    made = search(
        {
            "a": {"kind": "choice", "values": ["x", "y", "z"]},
            "b": {"kind": "int", "low": 1, "high": 9, "step": 2},
            "c": RATE,
            "d": {"kind": "uniform", "low": 0.0, "high": 1.0, "step": 0.25},
        }
    )
    values: space.Values = {"a": "y", "b": 3, "c": 0.5, "d": 0.75}
    for turn in range(20):
        values = changed(values, made.space, f"{seed} {turn}")
        assert all(space.holds(made.space[name], value) for name, value in values.items()), values


def test_a_trial_that_was_to_end_ends_though_nobody_acted_on_it(tmp_path: Path) -> None:
    made = search(LINE, scheduler={"kind": "asha", "grace": 1, "reduction_factor": 2})
    study = Study(tmp_path / "s.db", "s", made, "max")
    for number, value in enumerate((3.0, 2.0, 1.0)):
        assert isinstance(study.next(9), Suggestion)
        ends = study.report(number, 1, value)
        if number < 2:
            study.tell(number, "complete", [value], {})
    assert ends
    again = Study(tmp_path / "s.db", "s", made, "max")
    given = again.next(9)
    assert isinstance(given, Suggestion)
    assert given.number == 2
    assert again.report(2, 2, 5.0)


def test_a_study_that_was_concluded_but_not_delivered_is_gone_on_with() -> None:
    folder = StudyFolder(studies_folder() / "smoke-20261129-000000-000000")
    folder.path.mkdir(parents=True)
    write_record(folder.record, {"job": "a", "search": {}})
    found = []
    for summary in (None, {}, {"delivered_to_mlflow": False}, {"delivered_to_mlflow": True}):
        if summary is not None:
            write_record(folder.summary, summary)
        found.append(unfinished_study("a", {}))
    assert found == [folder, folder, folder, None]
