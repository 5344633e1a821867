"""The study: Optuna's, in a store of its own, which is all that is kept of a search. Every change is one transaction.

What is suggested for a trial follows from the seed, the trial's number and what is known by then: the sampler is made anew for
each field of each trial, so a search that was killed between any two of them suggests the same again.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raymill.config.search import ParameterSpec, SearchSpec
from raymill.tune.population import Member, changed, parent_of
from raymill.tune.searcher import Searched
from raymill.tune.space import Values, in_order, is_tried

DEVIATION, MESSAGE, METRICS, RUNS, SECONDS, STEP = "deviation", "message", "metrics", "runs", "seconds", "step"
"""What is noted of a trial beside its value, as attributes."""

ENDS = "ends"
"""Likewise: it was decided that the trial ends early."""


DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass(frozen=True)
class Suggestion:
    """A trial that is to be run.

    Attributes:
        number: of the trial, from 0 on.
        values: what it tries.
        parent: the trial that it goes on from; None: it begins anew.
        step: of that one's run.
    """

    number: int
    values: Values
    parent: int | None = None
    step: int | None = None


class Wait:
    """There is no trial yet: one that is to be known first still runs."""


class Study:
    """One search's study. One process at a time suggests and tells."""

    def __init__(self, store: Path | None, name: str, search: SearchSpec, mode: str, first: Sequence[Values] = ()) -> None:
        """Open it, or make it.

        Args:
            store: Optuna's file; None: it is not to be kept.
            mode: "max" or "min"; of the first metric, where there are several.
            first: values to begin with; for a field that is left out, one is suggested.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.search, self.mode = search, mode
        self.optuna = optuna.create_study(
            storage=f"sqlite:///{store}" if store else None,
            study_name=name,
            directions=[DIRECTIONS[one] for one in (mode, *search.also.values())],
            load_if_exists=True,
            pruner=_pruner(search),
        )
        if store is not None:
            store.chmod(0o600)
        for values in first[len(self.optuna.get_trials(deepcopy=False)) :]:
            self.optuna.enqueue_trial(dict(values))
        # Begun by a process that is no more: to be run again, each under its number.
        self._live: dict[int, optuna.trial.Trial] = {}
        self._searched: Searched | None = None
        self._begun = [one.number for one in self.trials() if one.state == TrialState.RUNNING]

    def trials(self) -> list[FrozenTrial]:
        """All trials that were begun, by number."""
        return [one for one in self.optuna.get_trials(deepcopy=False) if one.state != TrialState.WAITING]

    def best(self) -> FrozenTrial | None:
        """The best, by the first metric, of the trials that ran to their end and are inside the limits."""
        return next(iter(self.ranked(self.trials())), None)

    def ranked(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """All of these that ran to their end and are inside the limits, the best by the first metric first."""
        done = [
            one
            for one in trials
            if one.state == TrialState.COMPLETE and self.is_whole(one.number, len(trials)) and is_inside(one)
        ]
        return sorted(done, key=lambda one: (-self.worth(one.values[0]), one.number))

    def front(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Of the ranked ones, those that no other is as good as in every metric, and better in one (Pareto's front)."""
        modes = [self.mode, *self.search.also.values()]

        def worths(trial: FrozenTrial) -> list[float]:
            return [worth(value, mode) for value, mode in zip(trial.values, modes, strict=True)]

        ranked = [(one, worths(one)) for one in self.ranked(trials)]
        return [
            one
            for one, own in ranked
            if not any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for _, other in ranked)
        ]

    def is_whole(self, number: int, num_trials: int) -> bool:
        """Whether a trial that ended is a whole training, and not a part of one that others go on from.

        Args:
            num_trials: that there are; asked for once, since each time the store is read.
        """
        size = self.search.scheduler.population
        beyond = num_trials % size
        return self.search.scheduler.kind != "pbt" or number >= num_trials - (beyond or size)

    def worth(self, value: float | None) -> float:
        """A value of the first metric such that more is better."""
        return worth(value, self.mode)

    def next(self, most_trials: int) -> Suggestion | Wait | None:
        """The next trial: one that was begun before, or a new one; None: there are enough."""
        if self.search.scheduler.kind == "pbt" and not self._begun and self._must_wait(len(self.trials()), most_trials):
            return Wait()
        if self._begun:
            number = self._begun.pop(0)
            self._reseed(number, "")
            trial = optuna.trial.Trial(self.optuna, self._frozen(number)._trial_id)
        elif len(self.trials()) < most_trials:
            self._reseed(len(self.trials()), "")
            trial = self.optuna.ask()
        else:
            return None
        self._live[trial.number] = trial
        inherited, parent = self._inherited(trial.number)
        values: dict[str, Any] = {}
        for name in in_order(self.search.space):
            if is_tried(self.search.space[name], values):
                self._reseed(trial.number, name, inherited)
                values[name] = suggest(trial, name, self.search.space[name])
        step = None if parent is None else self.trials()[parent].user_attrs[STEP]
        return Suggestion(trial.number, values, parent, step)

    def _must_wait(self, number: int, most_trials: int) -> bool:
        """Whether a trial's generation has to wait for the one before."""
        first = number - number % self.search.scheduler.population
        return number < most_trials and any(not one.state.is_finished() for one in self.trials()[:first])

    def _inherited(self, number: int) -> tuple[Values, int | None]:
        """What a trial of a later generation tries, and whom it goes on from; nothing for others."""
        size = self.search.scheduler.population
        if self.search.scheduler.kind != "pbt" or number < size:
            return {}, None
        member, first = number % size, number - number % size - size
        before = [Member(dict(one.params), self.worth(one.value)) for one in self.trials()[first : first + size]]
        seed = f"{self.search.seed} {number}"
        parent = parent_of(member, before, self.search.scheduler.quantile, seed)
        values = before[parent].values
        if before[parent].worth == -math.inf:
            # All have failed: it begins anew.
            return values, None
        return (values if parent == member else changed(values, self.search.space, seed)), first + parent

    def again(self, number: int) -> None:
        """Give a trial again: its process died."""
        self._begun.append(number)

    def report(self, number: int, evaluation: int, value: float) -> bool:
        """Note what a trial has come to at its n-th evaluation; returns whether it is to end there. The same twice is once."""
        if self.search.also:
            # Optuna notes no evaluations of such a study.
            return False
        trial = self._live[number]
        trial.report(value, evaluation)
        if self.search.scheduler.kind in ("none", "pbt"):
            return False
        # Noted, since a trial that goes on behind its place in a round is not asked for it again.
        if ENDS not in trial.user_attrs and not trial.should_prune():
            return False
        trial.set_user_attr(ENDS, True)
        return True

    def tell(
        self,
        number: int,
        state: str,
        values: Sequence[float] | None,
        facts: Mapping[str, Any],
        breaks: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Note how a trial ended that `next` has given. Done once: a trial that is over stays as it is.

        Args:
            state: "complete", "pruned" or "failed".
            values: of each metric, if it is complete.
            breaks: limit -> by how much the trial breaks it; 0 and less: it does not.
            facts: name -> what else is known of it, JSON-ready.
        """
        if number not in self._live:
            return
        trial = self._live.pop(number)
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        known = self._frozen(number).constraints if breaks else {}
        for name, excess in breaks.items():
            # Whoever noted it before may have died before the trial was over.
            if name not in known:
                trial.set_constraint(name, excess)
        self.optuna.tell(number, values, state=STATES[state], skip_if_finished=True)

    def _frozen(self, number: int) -> FrozenTrial:
        return next(one for one in self.optuna.get_trials(deepcopy=False) if one.number == number)

    def _reseed(self, number: int, name: str, inherited: Values | None = None) -> None:
        digest = hashlib.blake2b(json.dumps([self.search.seed, number, name]).encode(), digest_size=4).digest()
        if self.search.sampler.is_searcher:
            self._searched = self._searched or Searched(self.search, self.mode)
        sampler = self._searched or _sampler(self.search, int.from_bytes(digest, "little"))
        fixed = optuna.samplers.PartialFixedSampler(dict(inherited), sampler) if inherited else sampler
        self.optuna.sampler = fixed


def store_problem(error: BaseException, store: Path) -> str | None:
    """What is wrong with a study's store, and what to do, where an error came from that; else None."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, optuna.exceptions.StorageInternalError):
            cause = at.__cause__ or at
            # What the driver of the database said; SQLAlchemy adds the statement, with all that was to be written.
            said = getattr(cause, "orig", None) or cause
            return (
                f"the study's store {store} could not be read or written: {said}. Free its disk, or end what holds it; "
                "the same command goes on."
            )
        at = at.__cause__ or at.__context__
    return None


def suggest(trial: optuna.trial.Trial, name: str, one: ParameterSpec) -> Any:
    """A field's value in a trial."""
    if one.values is not None:
        return trial.suggest_categorical(name, one.values)
    assert one.low is not None
    assert one.high is not None
    if one.kind == "int":
        return trial.suggest_int(name, int(one.low), int(one.high), step=int(one.step or 1), log=one.log)
    return trial.suggest_float(name, one.low, one.high, step=one.step, log=one.kind == "loguniform")


def _sampler(search: SearchSpec, seed: int) -> optuna.samplers.BaseSampler:
    startup = search.sampler.startup_trials
    match search.sampler.kind:
        case "random" | "grid":
            # A grid's trials are all given.
            return optuna.samplers.RandomSampler(seed=seed)
        case "nsgaii":
            # Of generations of so many; those before the first is whole are at random.
            return optuna.samplers.NSGAIISampler(population_size=max(2, startup), seed=seed)
        case "quasirandom":
            return optuna.samplers.QMCSampler(seed=search.seed, scramble=True)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        case _:
            # tpe. Trials that run are taken for bad ones, so that those beside them look elsewhere.
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def is_inside(trial: FrozenTrial) -> bool:
    """Whether a trial is inside the limits."""
    return all(excess <= 0 for excess in trial.constraints.values())


def worth(value: float | None, mode: str) -> float:
    """A value such that more is better."""
    if value is None or math.isnan(value):
        return -math.inf
    return value if mode == "max" else -value


def _pruner(search: SearchSpec) -> optuna.pruners.BasePruner:
    """Which ends trials early; by what stands in the store, so it decides the same after a restart.

    Sources: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (ASHA), 2020; Li et al., "Hyperband", 2018;
    Golovin et al., "Google Vizier" (median), 2017.
    """
    kind, grace, factor = search.scheduler.kind, search.scheduler.grace, search.scheduler.reduction_factor
    match kind:
        case "asha":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=factor)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=grace, reduction_factor=factor)
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=grace)
        case "none" | "pbt":
            return optuna.pruners.NopPruner()


def first_value(trial: FrozenTrial) -> float:
    """Of the first metric, of a trial that is complete."""
    return float(trial.values[0])


def facts_of(trial: FrozenTrial) -> dict[str, Any]:
    """A trial as it is shown, JSON-ready: number, state, value, inside, deviation, seconds, values, runs, metrics, message."""
    names = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
        TrialState.RUNNING: "running",
    }
    noted = trial.user_attrs
    last = max(trial.intermediate_values, default=None)
    value = trial.values[0] if trial.values else None if last is None else trial.intermediate_values[last]
    return {
        "number": trial.number,
        "state": names.get(trial.state, "waiting"),
        "value": value,
        "inside": is_inside(trial),
        "deviation": noted.get(DEVIATION),
        "seconds": noted.get(SECONDS),
        "values": dict(trial.params),
        "runs": noted.get(RUNS, []),
        "metrics": noted.get(METRICS, {}),
        "message": noted.get(MESSAGE),
    }
