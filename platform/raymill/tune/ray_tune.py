"""Ray Tune as it runs a search: a searcher and a scheduler that ask the study, and the function that its actors call.

Nothing that Ray Tune keeps is read again: its experiment lies in the session's folder and goes with it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raymill.orchestration.cluster_facts import address
from raymill.orchestration.on_ray import mirror
from raymill.tune.trial import TrialSpec, run_trial

if TYPE_CHECKING:
    from raymill.tune.driver import Search

OUTCOME = "outcome"
"""What a trial has come to, in its last report."""


class Suggestions(Searcher):
    """Asks the study what to try, and tells it what came of it."""

    def __init__(self, search: Search, ended_early: set[int]) -> None:
        """Of this search; `ended_early` are the numbers of trials that the scheduler has ended."""
        super().__init__(metric="value", mode=search.mode)
        self._search, self._ended_early = search, ended_early
        self._numbers: dict[str, int] = {}
        self._live: set[int] = set()

    def suggest(self, trial_id: str) -> Any:
        """The next trial, as the configuration of an actor."""
        trial = self._search.next()
        if trial is None and not self._live:
            return Searcher.FINISHED
        if not isinstance(trial, TrialSpec):
            # One that runs may have to be run again.
            return None
        self._numbers[trial_id] = trial.number
        self._live.add(trial.number)
        return asdict(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial is over."""
        number = self._numbers[trial_id]
        self._live.discard(number)
        outcome = None if error or not result else json.loads(result.get(OUTCOME) or "null")
        self._search.ended(number, outcome, pruned=number in self._ended_early)

    def save(self, checkpoint_path: str) -> None:
        """There is nothing to save: the study is."""

    def restore(self, checkpoint_path: str) -> None:
        """Likewise."""


class EndsEarly(FIFOScheduler):
    """Asks the study whether a trial goes on."""

    def __init__(self, search: Search, ended_early: set[int]) -> None:
        """Of this search; notes which trials it ends."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._search, self._ended_early = search, ended_early

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """A trial was evaluated."""
        if "value" not in result:
            return str(TrialScheduler.CONTINUE)
        number = trial.config["number"]
        if not self._search.report(number, result["evaluation"], result["value"]):
            return str(TrialScheduler.CONTINUE)
        self._ended_early.add(number)
        return str(TrialScheduler.STOP)


class WhenStopped(tune.Stopper):
    """Ends running trials too, once the search is to stop."""

    def __init__(self, search: Search) -> None:
        """Of this search."""
        self._search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether one trial is to end."""
        return self._search.is_stopped()

    def stop_all(self) -> bool:
        """Whether all are."""
        return self._search.is_stopped()


def run(search: Search, scratch: Path) -> None:
    """Run trials until the study is over.

    Args:
        scratch: for what Ray Tune writes.
    """
    ended_early: set[int] = set()
    # What a trial takes is its workers': the actor itself, and what drives several of them, mostly waits.
    scale = search.spec.scale
    per_worker = {"CPU": scale.cpus_per_worker or 1, "GPU": scale.gpus_per_worker}
    resources = {name: amount * search.num_workers for name, amount in per_worker.items() if amount}
    # On a Ray of our own every actor sees the runs' folders.
    home = mirror.start_home() if address() else None
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial_in_actor, home=home), resources),
        tune_config=tune.TuneConfig(
            search_alg=Suggestions(search, ended_early),
            scheduler=EndsEarly(search, ended_early),
            num_samples=-1,
            max_concurrent_trials=search.parallel,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(scratch),
            stop=WhenStopped(search),
            verbose=0,
        ),
    )
    tuner.fit()


def trial_in_actor(config: dict[str, Any], home: Any = None) -> None:
    """A trial, in an actor of Ray Tune's that outlives it."""
    ends: list[int] = []

    def report(evaluation: int, value: float) -> None:
        try:
            tune.report({"evaluation": evaluation, "value": value})
        except SystemExit:
            ends.append(evaluation)
            raise

    outcome = run_trial(TrialSpec(**config), report, home)
    if ends:
        # Its state is saved by now; nobody waits for another report.
        raise SystemExit
    # As text: Ray Tune would take it apart.
    tune.report({OUTCOME: json.dumps(outcome)})
