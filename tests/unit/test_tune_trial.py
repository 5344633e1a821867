"""A trial that goes on after its death: what it was measured at before is told again, for whoever did not hear of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raymill.config import load
from raymill.config.search import SearchSpec
from raymill.files import write_record
from raymill.paths import project_root
from raymill.record.events import EvaluationDone, append_event
from raymill.record.folder import RunFolder, run_folder
from raymill.tune import trial
from raymill.tune.driver import Search
from raymill.tune.folder import StudyFolder
from raymill.tune.trial import TrialSpec


def evaluated(step: int, value: float, metric: str = "validation/loss") -> EvaluationDone:
    return EvaluationDone(step=step, epoch=step // 2, rows=4, metrics={metric: value})


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that was killed behind its second evaluation, and is trained no further."""
    folder = run_folder("study-0000")
    folder.path.mkdir(parents=True)
    for event in (evaluated(2, 0.5), evaluated(3, 9.0, "test/loss"), evaluated(4, 0.25), evaluated(4, 0.25)):
        append_event(folder, event)

    def go_on(spec: TrialSpec, folder: RunFolder, overrides: list[str], executor: object, watch: Any) -> dict[str, Any]:
        show = watch(folder)
        show(evaluated(6, 0.125))
        return {}

    monkeypatch.setattr(trial, "_train", go_on)
    return folder


def spec(stop_after: int | None = None) -> TrialSpec:
    return TrialSpec("study", 0, ".", "smoke", {"study-0000": []}, "validation/loss", [], ".", True, stop_after)


def test_evaluations_before_a_death_are_told_again_by_their_numbers(begun: RunFolder) -> None:
    heard: list[tuple[int, float]] = []
    trial.train(spec(), begun, [], lambda number, value: heard.append((number, value)))
    assert heard == [(1, 0.5), (2, 0.25), (2, 0.25), (3, 0.125)]
    assert not begun.stop_request.exists()


def test_one_that_was_to_end_at_an_evaluation_that_nobody_heard_of_ends(begun: RunFolder) -> None:
    def end(number: int, value: float) -> None:
        if number == 2:
            raise SystemExit

    trial.train(spec(), begun, [], end)
    assert begun.stop_request.exists()


@pytest.mark.parametrize(("is_evaluated", "ends"), [(True, True), (False, False), (None, False)])
def test_one_of_a_population_that_was_killed_ends_where_it_was_saved_behind_its_last_evaluation(
    begun: RunFolder, is_evaluated: bool | None, ends: bool
) -> None:
    # Else it evaluates once more, and ends there.
    if is_evaluated is not None:
        checkpoint = begun.checkpoints / "step-00000004.1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"evaluated": is_evaluated}))
    trial.train(spec(stop_after=2), begun, [], lambda number, value: None)
    assert begun.stop_request.exists() == ends


def test_one_of_a_population_that_goes_on_ends_behind_the_evaluation_that_it_makes_again(begun: RunFolder) -> None:
    trial.train(spec(stop_after=3), begun, [], lambda number, value: None)
    assert begun.stop_request.exists()


def test_a_search_that_goes_on_in_another_copy_of_the_project_has_its_job_from_there(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    folder.path.mkdir()
    space = {"optimizer.lr": {"kind": "uniform", "low": 0.1, "high": 0.2}}
    search = SearchSpec.model_validate({"space": space, "metric": "validation/loss", "mode": "min"})
    record = {
        "search": search.model_dump(mode="json"),
        "spec": load.resolved(load.load_job("smoke").spec),
        "job": "/lost/copy/jobs/smoke/job.yaml",
        "project": "/lost/copy",
        "cwd": "/lost/copy/jobs",
        "metric": "validation/loss",
        "mode": "min",
        "first": [{}],
        "trials": 3,
        "overrides": [],
    }
    write_record(folder.record, record)
    told = Search(folder).next()
    assert isinstance(told, TrialSpec)
    here = project_root()
    assert (told.project, told.job, told.cwd) == (str(here), str(here / "jobs/smoke/job.yaml"), str(here / "jobs"))
    # What lies elsewhere is where it was.
    assert Search(folder).here("/lost/other/job.yaml") == "/lost/other/job.yaml"
