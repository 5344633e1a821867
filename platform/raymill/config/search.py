"""What a job's `search:` may say: which of its fields are tried with which values, how many trials, and what decides.

Frozen and closed as the rest of a job. What a value would make of the job is checked where the space is laid out (`tune/space`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raymill.config.strict_model import StrictModel

Scalar = bool | int | float | str | None


class ParameterSpec(StrictModel):
    """The values of one field: `{kind: loguniform, low: 1e-4, high: 1e-1}`."""

    kind: Literal["choice", "uniform", "loguniform", "int"] = Field(description="choice, uniform, loguniform or int")
    values: list[Scalar] | None = Field(default=None, min_length=1, description="those of a choice")
    low: float | None = Field(default=None, description="smallest")
    high: float | None = Field(default=None, description="largest")
    step: float | None = Field(default=None, gt=0, description="between two of uniform or int; null: any, 1")
    log: bool = Field(default=False, description="whether an int is drawn on a logarithmic scale")
    when: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="fields of the space, with the values for which this one is tried at all"
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if (self.kind == "choice") != (self.values is not None):
            raise ValueError("values goes with kind choice, and choice needs them")
        if (self.kind == "choice") == (self.low is not None or self.high is not None):
            raise ValueError("low and high go with every kind but choice")
        if self.low is None or self.high is None:
            if self.kind != "choice":
                raise ValueError("give both low and high")
            return self
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.kind == "loguniform" and (self.low <= 0 or self.step):
            raise ValueError("loguniform needs a low above 0, and has no step")
        if self.kind == "int" and any(number is not None and number % 1 for number in (self.low, self.high, self.step)):
            raise ValueError("an int has whole low, high and step")
        if self.log and (self.kind != "int" or self.low < 1 or self.step):
            raise ValueError("log goes with kind int from 1 on, without a step")
        return self


SAMPLERS = ("tpe", "gp", "cmaes", "nsgaii", "random", "quasirandom", "grid")
"""Of Optuna."""


class SamplerSpec(StrictModel):
    """Where suggestions come from."""

    kind: str = Field(
        default="tpe",
        description=f"of Optuna: {', '.join(SAMPLERS)}; or a searcher of Ray Tune or the project: package.module:Class",
    )
    startup_trials: int = Field(default=10, ge=0, description="trials at random before tpe or gp")
    args: dict[str, Scalar] = Field(default_factory=dict, description="arguments of a searcher that is named by its path")

    @property
    def is_searcher(self) -> bool:
        """Whether it is a class that is named by its import path."""
        return ":" in self.kind

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in SAMPLERS and ":" not in kind:
            raise ValueError(f"one of {', '.join(SAMPLERS)}, or package.module:Class")
        return kind

    @model_validator(mode="after")
    def _arguments_have_a_taker(self) -> Self:
        if self.args and not self.is_searcher:
            raise ValueError(f"args goes with a searcher that is named by its path; {self.kind} takes none")
        return self


class LimitSpec(StrictModel):
    """What a metric may come to: `{most: 0.2}`."""

    least: float | None = Field(default=None, description="no less than this")
    most: float | None = Field(default=None, description="no more than this")

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.least is None and self.most is None:
            raise ValueError("give least, most, or both")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least {self.least} is above most {self.most}")
        return self

    def excess(self, value: float) -> float:
        """By how much a value breaks it; 0 and less: it does not."""
        over = [value - self.most] if self.most is not None else []
        under = [self.least - value] if self.least is not None else []
        return max(over + under)


class SchedulerSpec(StrictModel):
    """Which trials end early."""

    kind: Literal["none", "asha", "hyperband", "median", "pbt"] = Field(
        default="none",
        description="none; asha: of those that came as far, the best part goes on; hyperband; median; or pbt",
    )
    grace: int = Field(default=1, gt=0, description="evaluations before a trial may end")
    reduction_factor: int = Field(default=3, gt=1, description="asha, hyperband: one in so many goes on")
    population: int = Field(default=8, gt=1, le=1000, description="pbt: members; trials / population is the generations")
    quantile: float = Field(default=0.25, gt=0, le=0.5, description="pbt: share of the members that goes on from one of the best")


class SearchSpec(StrictModel):
    """A search over a job's fields, for `raymill tune`."""

    space: dict[str, ParameterSpec] = Field(min_length=1, description="field of the job -> its values")
    metric: str | None = Field(default=None, description="what is searched for; null: checkpoint.metric")
    mode: Literal["max", "min"] | None = Field(default=None, description="whether more of it is better; null: checkpoint.mode")
    also: dict[str, Literal["max", "min"]] = Field(
        default_factory=dict, description="further metrics, each with whether more or less of it is better"
    )
    limits: dict[str, LimitSpec] = Field(default_factory=dict, description="metric -> what a good trial's may come to")
    trials: int = Field(default=20, gt=0, le=100_000, description="trials in all")
    max_hours: float | None = Field(default=None, gt=0, description="hours after which no trial begins; null: no limit")
    target: float | None = Field(default=None, description="value of the metric that is enough; null: go on to the last trial")
    workers: int | None = Field(default=None, gt=0, description="of each trial; null: those of the job")
    parallel: int | None = Field(default=None, gt=0, description="trials at once; null: as many as there is room for")
    sampler: SamplerSpec = Field(default_factory=SamplerSpec)
    scheduler: SchedulerSpec = Field(default_factory=SchedulerSpec)
    points: list[dict[str, Scalar]] = Field(default_factory=list, description="tried first, behind the job as it stands")
    seeds: int = Field(default=1, gt=0, le=100, description="runs of a trial with other loop.seed; their mean counts")
    folds: int | None = Field(default=None, gt=1, le=100, description="runs of a trial with data.fold 0, 1 and so on; likewise")
    on_error: Literal["skip", "stop"] = Field(default="skip", description="what becomes of the search when a trial fails")
    seed: int = Field(default=0, ge=0, description="of the sampler")

    @model_validator(mode="after")
    def _one_run_where_trials_end_early(self) -> Self:
        if self.scheduler.kind != "none" and (self.seeds > 1 or self.folds):
            raise ValueError("a scheduler ends trials of one run; leave it out, or seeds and folds")
        if self.also and self.scheduler.kind != "none":
            raise ValueError("a scheduler ends trials by one metric; leave it out, or also")
        if self.also and (self.sampler.kind == "cmaes" or self.sampler.is_searcher):
            raise ValueError("cmaes and searchers of others search for one metric; leave also out, or take tpe or nsgaii")
        if self.metric in self.also:
            raise ValueError(f"{self.metric} is the metric already; leave it out of also")
        if self.scheduler.kind == "pbt":
            if self.trials % self.scheduler.population:
                raise ValueError(f"trials {self.trials} is no multiple of the scheduler's population {self.scheduler.population}")
            if named := [name for name, one in self.space.items() if one.when]:
                raise ValueError(f"pbt changes each field of each member; {named[0]} is not always tried")
        if self.sampler.kind == "grid":
            free = [name for name, one in self.space.items() if one.when or (one.kind != "choice" and not _is_stepped(one))]
            if free:
                raise ValueError(f"a grid needs a choice, an int or a step for each field, always tried; {free[0]} is not so")
        return self

    def breaks(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """By how much a trial's metrics break each limit; 0 and less: they do not."""
        return {name: limit.excess(metrics[name]) for name, limit in self.limits.items()}

    def repeats(self, seed: int) -> list[list[str]]:
        """The overrides of each run of a trial, beside its values."""
        seeds = [[f"loop.seed={seed + number}"] for number in range(self.seeds)] if self.seeds > 1 else [[]]
        folds = [[f"data.fold={number}"] for number in range(self.folds)] if self.folds else [[]]
        return [[*one, *other] for one in folds for other in seeds]


def _is_stepped(one: ParameterSpec) -> bool:
    return one.kind == "int" or one.step is not None


def values_of(one: ParameterSpec) -> list[Any]:
    """All values of a field of a grid."""
    if one.values is not None:
        return list(one.values)
    assert one.low is not None
    assert one.high is not None
    step = one.step or 1
    count = int((one.high - one.low) / step + 1e-9) + 1
    found = [min(one.low + number * step, one.high) for number in range(count)]
    return [int(value) for value in found] if one.kind == "int" else found
