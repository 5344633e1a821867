"""A searcher of Ray Tune's, or of the project's own kind, as a sampler of the study.

Such a searcher keeps what it knows in memory, and saves it as pickles only. Nothing of it is saved here: what it was asked and
told stands in the study's store, with the times, and a new one is asked and told the same in the same order. So a search that was
killed goes on with what it would have suggested, as far as the searcher draws from its own seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, TrialState

from raymill.config.load import import_class
from raymill.config.search import ParameterSpec, SearchSpec, values_of
from raymill.errors import RunError

METRIC = "value"
"""What a searcher knows the metric as."""


class Searched(BaseSampler):
    """Suggests what a searcher does. Of one study, for as long as the process that asks it lives."""

    def __init__(self, search: SearchSpec, mode: str) -> None:
        """With nothing asked or told yet; `search.sampler.kind` was looked up when the job was checked."""
        from ray.tune.search import Searcher

        self._space, self._name = search.space, search.sampler.kind
        self._searcher: Searcher = import_class(self._name, "search.sampler.kind", "searcher")(**search.sampler.args)
        space = {field: _domain(one) for field, one in search.space.items()}
        if not self._searcher.set_search_properties(METRIC, mode, space):
            raise RunError(f"{self._name} did not take the space; its set_search_properties() returned False.")
        self._takes_points = type(self._searcher).add_evaluated_point is not Searcher.add_evaluated_point
        self._suggested: dict[int, Mapping[str, Any]] = {}
        self._told: set[int] = set()

    def infer_relative_search_space(self, study: OptunaStudy, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Each field is asked for by itself."""
        return {}

    def sample_relative(
        self, study: OptunaStudy, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Likewise."""
        return {}

    def sample_independent(
        self, study: OptunaStudy, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A field's value in a trial."""
        if trial.number not in self._suggested:
            self._catch_up(study.get_trials(deepcopy=False), trial.number)
        found = self._suggested[trial.number][param_name]
        one = self._space[param_name]
        return values_of(one)[found] if one.step is not None else found

    def _catch_up(self, trials: list[FrozenTrial], number: int) -> None:
        """Ask and tell all that the store says was asked and told up to the asking of this trial, in that order."""
        asked = [(one.datetime_start, 1, one) for one in trials if one.datetime_start and one.number <= number]
        told = [(one.datetime_complete, 0, one) for one in trials if one.datetime_complete]
        for _, is_asked, one in sorted(asked + told, key=lambda event: (event[0], event[1], event[2].number)):
            if is_asked and one.number not in self._suggested:
                self._suggested[one.number] = self._ask(one.number)
            elif not is_asked and one.number not in self._told:
                self._told.add(one.number)
                self._tell(one)
            if is_asked and one.number == number:
                return

    def _ask(self, number: int) -> Mapping[str, Any]:
        found = self._searcher.suggest(str(number))
        if not isinstance(found, dict) or not set(self._space) <= set(found):
            wanted = f"a value for each of {sorted(self._space)}"
            raise RunError(
                f"{self._name} suggested {found!r:.300} for trial {number}, not {wanted}. Correct it, or take another."
            )
        return found

    def _tell(self, trial: FrozenTrial) -> None:
        # One that ended early counts with what it had come to.
        last = max(trial.intermediate_values, default=None)
        value = trial.value if trial.value is not None else None if last is None else trial.intermediate_values[last]
        if trial.state == TrialState.FAIL:
            value = None
        suggested = {name: self._suggested[trial.number][name] for name in trial.params}
        if "fixed_params" not in trial.system_attrs:
            result = None if value is None else {**suggested, METRIC: value, "training_iteration": last or 1}
            self._searcher.on_trial_complete(str(trial.number), result, error=value is None)
        else:
            # It was given, and the searcher's own suggestion was not tried.
            self._searcher.on_trial_complete(str(trial.number), None, error=True)
            if self._takes_points and value is not None:
                points = {
                    **self._suggested[trial.number],
                    **{name: self._as_asked(name, one) for name, one in trial.params.items()},
                }
                self._searcher.add_evaluated_point(points, value)

    def _as_asked(self, name: str, value: Any) -> Any:
        one = self._space[name]
        return values_of(one).index(value) if one.step is not None else value


def _domain(one: ParameterSpec) -> Any:
    """A field's values in Ray Tune's words; of one with steps, the number of the step."""
    from ray import tune

    if one.values is not None:
        return tune.choice(list(one.values))
    assert one.low is not None
    assert one.high is not None
    if one.step is not None:
        return tune.randint(0, len(values_of(one)))
    if one.kind == "int":
        return (tune.lograndint if one.log else tune.randint)(int(one.low), int(one.high) + 1)
    return (tune.loguniform if one.kind == "loguniform" else tune.uniform)(one.low, one.high)
