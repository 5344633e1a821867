"""The typed job: what a job file may say. Frozen, closed, units in names, no torch, no Ray.

`None` always means "derive it"; `raymill plan` prints what was derived and why. Types and ranges are checked here;
whether the names of optimizers and arguments exist is checked in `load`, whether the numbers fit in `plan`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from raymill.config.search import SearchSpec
from raymill.config.strict_model import StrictModel

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _plain_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError("a name is 1 to 100 letters, digits, '.', '_' or '-', and starts with a letter or digit")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
Positive = Annotated[int, Field(gt=0)]
Workers = Annotated[int, Field(gt=0, le=100_000)]
Pieces = Annotated[int, Field(gt=0, le=1_000_000)]
BatchRows = Annotated[int, Field(gt=0, le=2**31 - 1)]
Threads = Annotated[int, Field(gt=0, le=1024)]
"""Counts that something is made for, one by one. Far more than any job needs, and few enough for 64 bits and for memory."""


PLATEAU = "ReduceLROnPlateau"
"""The one schedule that goes by a metric."""


class ClassSpec(StrictModel):
    """A class by name, with its arguments beside it: `{kind: AdamW, lr: 1e-3}`; one of the job's own by its import path."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    kind: str = Field(description="class name, or package.module:Class")

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments given beside `kind` (and beside a subclass's own fields)."""
        return dict(self.__pydantic_extra__ or {})


class ScheduleSpec(ClassSpec):
    """Any class of torch.optim.lr_scheduler, advanced at each optimizer step or each epoch; ReduceLROnPlateau at each evaluation.

    `T_max` and `total_steps` are derived.
    """

    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up before it")
    steps: Positive | None = Field(default=None, description="steps (or epochs) it lasts, in a list of schedules; null: the rest")
    per: Literal["step", "epoch"] = Field(default="step", description="what its arguments count")
    metric: str | None = Field(default=None, description="that ReduceLROnPlateau goes by, such as validation/loss")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if (self.kind == PLATEAU) != (self.metric is not None):
            raise ValueError(f"metric goes with kind {PLATEAU}, and {PLATEAU} needs one")
        if self.per == "epoch" and (self.warmup_steps or self.kind == PLATEAU):
            what = f"kind {PLATEAU}, which goes by evaluations" if self.kind == PLATEAU else "warmup_steps"
            raise ValueError(f"per: epoch does not go with {what}")
        return self


def _one_or_list(value: Any) -> str:
    # A plain union would report every error once per member; the shape decides which member is meant.
    return "several" if isinstance(value, list) else "one"


OneOrSeveralSchedules = Annotated[
    Annotated[ScheduleSpec, Tag("one")] | Annotated[list[ScheduleSpec], Field(min_length=1), Tag("several")],
    Discriminator(_one_or_list),
]


class OptimizerSpec(ClassSpec):
    """Any class of torch.optim; its arguments are checked against its signature."""

    max_grad_norm: float | None = Field(default=None, gt=0, description="largest gradient norm; null: no clipping")
    parameters: list[str] | None = Field(
        default=None, description="patterns of parameter names, in a list; null: all that are left"
    )
    from_step: int = Field(default=0, ge=0, description="its first step; until then its parameters stay as they are")
    schedule: OneOrSeveralSchedules | None = Field(default=None, description="of its rate; null: that of the job")


def _is_optimizer(value: Any) -> bool:
    items = value if isinstance(value, list) and value else [value]
    return all(isinstance(item, dict | ClassSpec) for item in items)


def _one_or_several(value: Any) -> str:
    # A plain union would report every error once per member; the shape decides which member is meant.
    many = isinstance(value, list) or (
        isinstance(value, dict) and bool(value) and all(_is_optimizer(item) for item in value.values())
    )
    return "several" if many else "one"


def _optimizer_shape(value: Any) -> str:
    return "groups" if isinstance(value, list) else _one_or_several(value)


OneOrGroups = Annotated[
    Annotated[OptimizerSpec, Tag("one")] | Annotated[list[OptimizerSpec], Field(min_length=1), Tag("groups")],
    Discriminator(_optimizer_shape),
]
OneOrSeveralOptimizers = Annotated[
    Annotated[OptimizerSpec, Tag("one")]
    | Annotated[list[OptimizerSpec], Field(min_length=1), Tag("groups")]
    | Annotated[dict[str, OneOrGroups], Tag("several")],
    Discriminator(_optimizer_shape),
]


class AverageSpec(StrictModel):
    """An average of the weights over steps, which is evaluated, saved and registered in their place."""

    kind: Literal["ema", "swa"] = Field(description="exponential moving average, or the mean of all")
    decay: float = Field(default=0.999, ge=0, le=1, description="share of the old average that stays in each step, for ema")
    from_step: int = Field(default=0, ge=0, description="first step whose weights count")

    @model_validator(mode="after")
    def _decay_is_used(self) -> Self:
        if self.kind == "swa" and "decay" in self.model_fields_set and self.decay != AverageSpec.model_fields["decay"].default:
            raise ValueError("decay goes with kind ema; swa counts all alike")
        return self


class EarlyStoppingSpec(StrictModel):
    """End the training where a metric has stopped to improve."""

    metric: str = Field(description="such as validation/loss")
    mode: Literal["max", "min"] = Field(description="whether more or less of the metric is better")
    patience: Positive = Field(default=3, description="evaluations in a row without improvement that end the training")
    min_delta: float = Field(default=0.0, ge=0, description="smallest change that is an improvement")


class LoopSpec(StrictModel):
    """The training loop."""

    epochs: Pieces = Field(default=1, description="passes over the training rows")
    steps: Pieces | None = Field(default=None, description="optimizer steps, in place of epochs")
    max_hours: float | None = Field(
        default=None, gt=0, description="hours of work, all attempts together, after which training ends where it is"
    )
    early_stopping: EarlyStoppingSpec | None = Field(default=None, description="null: train to the end")
    global_batch_rows: BatchRows = Field(default=64, description="rows between optimizer steps, all workers together")
    gradient_accumulation_steps: Pieces = Field(default=1, description="backward passes per optimizer step on each worker")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="type of the forward pass; with fp16, losses are scaled so that small gradients are not lost"
    )
    seed: int = Field(default=0, ge=0, description="seed of first weights, order, transforms and dropout")
    window_rows: BatchRows | None = Field(default=None, description="rows that are read and shuffled together")
    threads: Threads | None = Field(default=None, description="CPU threads per worker for tensor operations")
    strict: bool = Field(default=False, description="the same weights to the bit at any number of workers; slower")
    shards: Pieces | None = Field(default=None, description="pieces a strict step is computed in")
    deterministic: bool = Field(
        default=True, description="on a GPU, algorithms that give the same bits each time; false: others may be faster"
    )
    on_nan: Literal["stop", "skip", "rollback"] = Field(
        default="stop", description="a gradient is NaN: end the run, skip the batch, or go back and leave it out"
    )
    average: AverageSpec | None = Field(default=None, description="null: the weights as the last step left them")
    stall_timeout_s: float = Field(default=60, gt=0, description="seconds without a step before the run is restarted")
    record_order: bool = Field(default=False, description="write the row ids of each step, for tests")

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if self.steps is not None and self.epochs != LoopSpec.model_fields["epochs"].default:
            raise ValueError("give epochs or steps, not both")
        return self


class EvaluationSpec(StrictModel):
    """An evaluation of a split: after every so many epochs or steps, and at the end of the training in any case."""

    split: Name = Field(default="validation", description="a split of the pipeline")
    every_epochs: Pieces | None = Field(default=None, description="epochs between two of them")
    every_steps: Pieces | None = Field(default=None, description="optimizer steps between two; null, both: only at the end")
    rows: BatchRows | None = Field(default=None, description="rows that are measured, from the first on; null: all")

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("give every_epochs or every_steps, not both")
        return self


class ScaleSpec(StrictModel):
    """How many workers: a fixed number, or as many as there is room for, between a least and a most."""

    workers: Workers | None = Field(default=None, description="worker processes; null: 1, or min_workers to max_workers")
    min_workers: Workers | None = Field(default=None, description="least workers of an elastic job")
    max_workers: Workers | None = Field(default=None, description="most workers of an elastic job")
    resize_check_s: float = Field(default=60, gt=0, description="seconds between looks whether another number would fit")
    strategy: Literal["ddp"] = Field(default="ddp", description="how the model is spread over workers")
    gpus_per_worker: int = Field(default=0, ge=0, description="GPUs of each worker; whole ones, since each rank needs its own")
    cpus_per_worker: float | None = Field(default=None, gt=0, description="CPUs reserved for each worker")

    @model_validator(mode="after")
    def _fixed_or_elastic(self) -> Self:
        if (self.min_workers is None) != (self.max_workers is None):
            raise ValueError("min_workers and max_workers go together")
        if self.workers is not None and self.max_workers is not None:
            raise ValueError("give workers, or min_workers and max_workers, not both")
        if self.min_num_workers > self.max_num_workers:
            raise ValueError(f"min_workers {self.min_num_workers} is more than max_workers {self.max_num_workers}")
        return self

    @property
    def min_num_workers(self) -> int:
        """Fewest workers it may run with."""
        return self.min_workers or self.workers or 1

    @property
    def max_num_workers(self) -> int:
        """Most workers it may run with."""
        return self.max_workers or self.workers or 1

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.max_workers is not None


class CheckpointSpec(StrictModel):
    """When the state is saved and which saves are kept."""

    every_steps: Positive | None = Field(default=None, description="optimizer steps between saves; null: each epoch")
    keep: Positive = Field(default=2, description="checkpoints kept beside the best one")
    metric: str | None = Field(default=None, description="decides which is best, such as validation/accuracy")
    mode: Literal["max", "min"] = Field(default="max", description="whether more or less of the metric is better")


class RetrySpec(StrictModel):
    """How often a run goes on by itself after a failure. Progress, a newer checkpoint, makes each budget whole again."""

    lost_processes: int = Field(
        default=3, ge=0, description="deaths of a worker, controller, coordinator or driver; likewise machines taken away"
    )
    stalls: int = Field(default=1, ge=0, description="stalls without progress")
    rollbacks: int = Field(default=3, ge=0, description="returns to a checkpoint after NaN, with loop.on_nan: rollback")
    storage: int = Field(default=2, ge=0, description="checkpoints that could not be written or read")
    standby: bool | None = Field(
        default=None,
        description="keep a second driver with its workers ready, on this machine; null: in a run of more than five minutes",
    )


class BadRowsSpec(StrictModel):
    """What becomes of rows that cannot be read, or that the pipeline's check refuses."""

    policy: Literal["fail", "skip", "quarantine"] = Field(
        default="fail", description="end the run, leave them out, or leave them out and list them in a file"
    )
    budget: int | None = Field(default=None, ge=0, description="different rows that may be bad; null: 1 % of the training rows")

    @model_validator(mode="after")
    def _budget_is_used(self) -> Self:
        if self.policy == "fail" and self.budget:
            raise ValueError("a budget goes with the policy skip or quarantine; with fail, the first bad row ends the run")
        return self

    @property
    def lenient(self) -> bool:
        """Whether a run goes on without them."""
        return self.policy != "fail"


class RegisterSpec(StrictModel):
    """Under which name the best model is registered, and whether also as a graph that needs no code of the job."""

    model: Name = Field(description="registered model name")
    alias: Name = Field(default="candidate", description="alias that is moved to the new version")
    export: Literal["required", "try", "never"] = Field(
        default="try", description="torch.export: no model without it, with it where that works, or without"
    )


class InitFromSpec(StrictModel):
    """Begin with what another run has learned, in place of first weights from the seed."""

    model: str = Field(description="name@alias, name/version, or the id of a run")
    take: Literal["weights", "all"] = Field(
        default="weights",
        description="weights and buffers of the best checkpoint; or all of a run's last one, and go on behind its step",
    )
    step: int | None = Field(default=None, gt=0, description="with take: all, the checkpoint of this step; null: the last one")
    hyperparameters: Literal["checkpoint", "job"] = Field(
        default="job", description="with take: all, whose rates, schedules and other arguments of the optimizers count"
    )

    @model_validator(mode="after")
    def _hyperparameters_are_used(self) -> Self:
        if self.take == "weights" and self.hyperparameters != "job":
            raise ValueError("hyperparameters goes with take: all; with take: weights they are the job's")
        if self.take == "weights" and self.step is not None:
            raise ValueError("step goes with take: all; with take: weights it is the best checkpoint")
        return self


class BoundSpec(StrictModel):
    """What a metric is to reach."""

    at_least: float | None = Field(default=None, description="of a metric that grows")
    at_most: float | None = Field(default=None, description="of one that shrinks")

    def is_met_by(self, value: float) -> bool:
        """Whether a value is good enough; one that is no number is not."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and value == value
        )

    def __str__(self) -> str:
        """As it is written in tables."""
        lower = [] if self.at_least is None else [f">= {self.at_least:g}"]
        return " and ".join([*lower, *([] if self.at_most is None else [f"<= {self.at_most:g}"])]) or "any value"


class CardSpec(StrictModel):
    """What a reader of the catalogue wants to know. It changes nothing of a run."""

    topic: str = Field(description="what the job shows")
    data: str = Field(description="what it is trained on")
    licence: str = Field(default="", description="of the data, and of weights that it begins with")
    download_mb: float | None = Field(default=None, ge=0, description="what `raymill data get` fetches, in MB")
    minutes: float | None = Field(default=None, ge=0, description="how long it takes, on two CPU cores")
    expect: dict[str, BoundSpec] = Field(default_factory=dict, description="metric -> what it reaches: {at_least: 0.9}")
    picture: str | None = Field(default=None, description="split and name of a picture that stands for it, such as test-boxes")


class JobSpec(StrictModel):
    """A whole job."""

    name: Name = Field(description="also the name of the MLflow experiment")
    task: str = Field(description="import path of the Task, package.module:Class")
    pipeline: str = Field(description="import path of the function that makes the Pipeline, package.module:function")
    model: dict[str, Any] = Field(default_factory=dict, description="arguments of the task")
    data: dict[str, Any] = Field(default_factory=dict, description="arguments of the pipeline")
    inputs: dict[Name, str] = Field(
        default_factory=dict, description="trained models for the task: name@alias, name/version or the id of a run, by name"
    )
    init_from: InitFromSpec | None = Field(default=None, description="null: first weights as build() makes them, from the seed")
    optimizer: OneOrSeveralOptimizers | None = Field(
        default=None,
        description="one, several by parameters in a list, or either per objective by name; null: the task makes its own",
    )
    schedule: OneOrSeveralSchedules | None = Field(default=None, description="of the rate of optimizers without their own")
    loop: LoopSpec = Field(default_factory=LoopSpec)
    evaluate: list[EvaluationSpec] | None = Field(
        default=None, description="which splits are measured when; null: validation, if there is one, after each epoch"
    )
    scale: ScaleSpec = Field(default_factory=ScaleSpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    retry: RetrySpec = Field(default_factory=RetrySpec)
    bad_rows: BadRowsSpec = Field(default_factory=BadRowsSpec)
    register_: RegisterSpec | None = Field(default=None, alias="register", description="null: do not register")
    card: CardSpec | None = Field(default=None, description="for the catalogue, `raymill jobs`")
    search: SearchSpec | None = Field(default=None, description="for `raymill tune`; it may stand in search.yaml beside the job")

    @model_validator(mode="after")
    def _each_split_once(self) -> Self:
        splits = [one.split for one in self.evaluate or ()]
        if twice := sorted({split for split in splits if splits.count(split) > 1}):
            raise ValueError(f"evaluate names {twice} more than once; give each split one evaluation")
        return self

    def evaluations(self, splits: Collection[str]) -> list[EvaluationSpec]:
        """The evaluations of a job whose pipeline has these splits."""
        if self.evaluate is not None:
            return self.evaluate
        default = EvaluationSpec(every_epochs=1)
        return [default] if default.split in splits else []

    def optimizers(self) -> Iterator[tuple[str, OptimizerSpec]]:
        """Each optimizer, with its field."""
        given = self.optimizer or []
        by_field = {f"optimizer.{name}": own for name, own in given.items()} if isinstance(given, dict) else {"optimizer": given}
        for field, own in by_field.items():
            for number, one in enumerate(own) if isinstance(own, list) else [(None, own)]:
                yield field if number is None else f"{field}.{number}", one

    def schedules(self) -> Iterator[tuple[str, ScheduleSpec]]:
        """Each schedule, with its field."""
        own = [("schedule", self.schedule), *((f"{field}.schedule", one.schedule) for field, one in self.optimizers())]
        for field, given in own:
            for number, one in enumerate(given) if isinstance(given, list) else [(None, given)]:
                if one is not None:
                    yield field if number is None else f"{field}.{number}", one

    @model_validator(mode="after")
    def _plateau_alone(self) -> Self:
        if found := [field for field, one in self.schedules() if one.kind == PLATEAU and field.rpartition(".")[2].isdigit()]:
            raise ValueError(f"{found[0]}: {PLATEAU} stands alone, not in a list; it may have warmup_steps")
        return self
