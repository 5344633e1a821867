"""Every error says where, what and what to do, and is the same after it has travelled between processes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from raymill import errors
from raymill.errors import InputError, Interrupted, Problem, RaymillError, RunError, SearchStopped, WorkerError, did_you_mean

PROBLEMS = (Problem("job.yaml:7 loop.epochs", "-1", "a number above 0", "Set it to 1."), Problem("a", "b", "c", "D."))


def all_kinds(kind: type[RaymillError] = RaymillError) -> Iterator[type[RaymillError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from all_kinds(below)


def make(kind: type[RaymillError]) -> RaymillError:
    if kind is InputError:
        return InputError(PROBLEMS)
    if kind is Interrupted:
        return Interrupted("mnist-1", 40)
    if kind is WorkerError:
        return WorkerError("rank 1 failed", 1, "Traceback ...")
    return kind("it broke")


def test_all_kinds_are_those_the_module_shows() -> None:
    shown = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, RaymillError)}
    assert set(all_kinds()) == shown


@pytest.mark.parametrize("kind", list(all_kinds()), ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_with_all_that_it_holds(kind: type[RaymillError]) -> None:
    error = make(kind)
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert str(found) == str(error)
    assert vars(found) == vars(error)
    assert found.args == error.args
    assert found.exit_code == error.exit_code


def test_exit_codes_tell_the_users_mistake_from_a_failure_and_a_stop() -> None:
    codes = {kind: kind.exit_code for kind in all_kinds()}
    assert {kind for kind, code in codes.items() if code == 2} == {InputError}
    assert {kind for kind, code in codes.items() if code == 3} == {Interrupted, SearchStopped}
    assert all(code == 1 for kind, code in codes.items() if issubclass(kind, RunError))


def test_an_input_error_shows_every_problem() -> None:
    text = str(InputError(PROBLEMS))
    assert text.startswith("2 problems\n")
    assert all(str(problem) in text for problem in PROBLEMS)
    assert str(PROBLEMS[0]) == "job.yaml:7 loop.epochs: found -1; expected a number above 0. Set it to 1."
    assert str(InputError(PROBLEMS[:1])).startswith("1 problem\n")


def test_an_interrupted_run_says_how_to_go_on() -> None:
    assert "--resume mnist-1" in str(Interrupted("mnist-1", 40))


def test_a_wrong_name_leads_to_the_nearest_or_to_all() -> None:
    assert did_you_mean("AdmaW", ["SGD", "AdamW"]) == "Did you mean 'AdamW'?"
    assert did_you_mean("Adamw", ["Adam", "AdamW", "Adamax"]) == "Did you mean 'AdamW'?", "equal but for capitals"
    assert did_you_mean("zzz", ["SGD", "AdamW"]) == "Valid names: AdamW, SGD."
    assert did_you_mean("zzz", []) == "Valid names: (none)."
