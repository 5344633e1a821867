"""An unchanged LightningModule as a Task.

    class Classifier(LightningTask):
        def __init__(self, hidden: int = 32):
            self.hidden = hidden

        def module(self):
            return LitClassifier(self.hidden)

`training_step`, `validation_step`, `predict_step`, `self.log`, `configure_optimizers` with its schedulers, torchmetrics and the
epoch hooks mean what they mean under Lightning's Trainer; the job file names no optimizer. Whatever else a module overrides or
asks its trainer for is refused by name.

Manual optimization becomes an objective for each optimizer, in the order in which they are stepped: each runs `training_step`
anew up to its own `step()`, so that its loss is that of the module with all optimizers before it already stepped. Random numbers
are drawn anew in each, and buffers keep what its own part did to them. Metrics that are logged in training are those of a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import lr_scheduler

from raymill.adapters.lightning_log import Log, forget_metrics, keep_metrics_apart, metric_states, restored_metrics
from raymill.errors import InputError, Problem
from raymill.task import VALIDATION, Batch, Kept, Now, Objective, OwnOptimizer, Picture, Task, Total

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

HONOURED = frozenset(
    {
        "forward",
        "training_step",
        "validation_step",
        "predict_step",
        "configure_optimizers",
        "configure_model",
        "setup",
        "on_train_epoch_end",
        "on_validation_epoch_end",
    }
)
"""The methods of a LightningModule that may be overridden."""


class LightningTask(Task):
    """Trains a LightningModule. Subclass it, and give it the module."""

    max_grad_norm: float | None = None
    """What the Trainer calls gradient_clip_val."""

    def module(self) -> LightningModule:
        """Make the module with its first weights."""
        raise NotImplementedError(f"{type(self).__name__} must define module()")

    def build(self) -> torch.nn.Module:
        """The module, with this task in its trainer's place.

        Raises:
            InputError: with everything that it overrides and that cannot be honoured.
        """
        module = self.module()
        _refuse_what_is_not_honoured(module)
        self._module, self._log, self._metrics = module, Log(), dict[str, Any]()
        module.trainer = _Trainer()
        module.log = self._log.add
        module.setup("fit")
        module.configure_model()
        keep_metrics_apart(module)
        built: torch.nn.Module = module
        return built

    # ------------------------------------------------------------ training

    def objectives(self) -> Sequence[Objective]:
        """One, or one for each optimizer of a module that steps them itself."""
        if self._module.automatic_optimization:
            return [Objective("loss", self._automatic_loss)]
        made = self._configured()
        return [
            Objective(f"optimizer_{number}", _ManualLoss(self, number, len(made)), trains=_children(self._module, one.optimizer))
            for number, one in enumerate(made)
        ]

    def optimizers(self, model: torch.nn.Module, total_steps: int) -> Mapping[str, Sequence[OwnOptimizer]]:
        """Those of `configure_optimizers`."""
        self._trainer.values["estimated_stepping_batches"] = total_steps
        made = self._configured()
        if self._module.automatic_optimization:
            if len(made) > 1:
                raise _refusal("configure_optimizers", f"{len(made)} optimizers with automatic optimization", "one, as Lightning")
            return {"loss": made}
        if any(one.schedule is not None for one in made):
            found = "schedulers beside manual optimization, which steps them itself"
            raise _refusal("configure_optimizers", found, "optimizers alone there")
        return {f"optimizer_{number}": [one] for number, one in enumerate(made)}

    @property
    def _trainer(self) -> _Trainer:
        trainer: _Trainer = self._module.trainer
        return trainer

    def _configured(self) -> list[OwnOptimizer]:
        return configured(self._module.configure_optimizers(), self.max_grad_norm)

    def _automatic_loss(self, model: torch.nn.Module, batch: Batch, now: Now) -> Mapping[str, torch.Tensor | float]:
        with self._moment(now):
            result = self._step("training_step", batch, (now.step - 1) % now.steps_per_epoch)
        loss = result["loss"] if isinstance(result, Mapping) else result
        if loss is None:
            raise _refusal("training_step", "None, which skips a batch", "the loss of each batch")
        return {**self._logged(), "loss": loss}

    def after_epoch(self, model: torch.nn.Module, now: Now) -> None:
        """`on_train_epoch_end`."""
        with self._moment(now):
            self._module.on_train_epoch_end()
        self._logged()

    def _logged(self) -> dict[str, torch.Tensor | float]:
        """What was logged in training; its metrics begin anew."""
        numbers = self._log.take_numbers()
        forget_metrics(self._module)
        return numbers

    # ------------------------------------------------------------ evaluation and answers

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, torch.Tensor | Total | Kept]:
        """What `validation_step` logs, and the state of each metric that it updates."""
        num_rows = _num_rows(batch)
        self._step("validation_step", batch, 0)
        numbers = self._log.take_numbers(metrics=self._metrics)
        measured: dict[str, torch.Tensor | Total | Kept] = {
            name: torch.as_tensor(value, dtype=torch.float64).detach().expand(num_rows) for name, value in numbers.items()
        }
        return measured | metric_states(self._module, num_rows)

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float | Picture]:
        """What its metrics come to over all rows, and what `on_validation_epoch_end` logs."""
        with restored_metrics(self._module, kept, totals):
            found = {name: float(metric.compute()) for name, metric in self._metrics.items()}
            self._module.on_validation_epoch_end()
            found |= {name: float(value) for name, value in self._log.take_numbers(metrics={}).items()}
        return found

    def predict(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, Any]:
        """What `predict_step` gives, as "prediction" where it is one tensor."""
        found = self._step("predict_step", batch, 0)
        return found if isinstance(found, Mapping) else {"prediction": found}

    # ------------------------------------------------------------ calls

    def _step(self, name: str, batch: Batch, number: int) -> Any:
        method = getattr(self._module, name)
        arguments = {"batch_idx": number, "dataloader_idx": 0}
        taken = inspect.signature(method).parameters
        return method(batch, **{name: value for name, value in arguments.items() if name in taken})

    @contextmanager
    def _moment(self, now: Now) -> Iterator[None]:
        self._trainer.values |= {
            "current_epoch": now.epoch,
            "global_step": now.step - 1,
            "estimated_stepping_batches": now.total_steps,
            "num_training_batches": now.steps_per_epoch,
        }
        yield


class _ManualLoss:
    """The loss of one optimizer of a module that steps its optimizers itself."""

    def __init__(self, task: LightningTask, number: int, count: int) -> None:
        self.task, self.number, self.count = task, number, count

    def __call__(self, model: torch.nn.Module, batch: Batch, now: Now) -> Mapping[str, torch.Tensor | float]:
        """Run `training_step` up to this optimizer's step; what it passed to `manual_backward` for it, added up."""
        replay = _Replay(self.number, self.count, self.task._module, self.task._log)
        with self.task._moment(now), replay.installed(), suppress(_Stepped):
            self.task._step("training_step", batch, (now.step - 1) % now.steps_per_epoch)
        if replay.loss is None or not replay.is_stepped:
            found = f"optimizer {self.number} was not stepped, or without manual_backward since its zero_grad"
            raise _refusal("training_step", found, "a backward pass and a step of each optimizer in each training step")
        return {**self.task._logged(), "loss": replay.loss}


class _Stepped(Exception):
    """This optimizer's part of a training step is over."""


class _Replay:
    """Stands for the optimizers while one training step is run for the loss of one of them."""

    def __init__(self, number: int, count: int, module: LightningModule, log: Log) -> None:
        self.number, self.count, self.module, self.log = number, count, module, log
        self.buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        self.loss: torch.Tensor | None = None
        self.toggled: int | None = None
        self.num_stepped = 0
        self.is_stepped = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within this, the module's own calls come here."""
        optimizers = [_OptimizerInReplay(self, number) for number in range(self.count)]
        calls: dict[str, Callable[..., Any]] = {
            "optimizers": lambda use_pl_optimizer=True: optimizers if self.count > 1 else optimizers[0],
            "manual_backward": self.backward,
            "toggle_optimizer": lambda optimizer: setattr(self, "toggled", optimizer.number),
            "untoggle_optimizer": lambda optimizer: setattr(self, "toggled", None),
            "lr_schedulers": lambda: None,
        }
        for name, call in calls.items():
            setattr(self.module, name, call)
        try:
            yield
        finally:
            for name in calls:
                delattr(self.module, name)

    def backward(self, loss: torch.Tensor, *arguments: Any, **keywords: Any) -> None:
        """`manual_backward`: it counts where it reaches this optimizer's parameters."""
        if self.toggled in (None, self.number):
            self.loss = loss if self.loss is None else self.loss + loss

    def zero_grad(self, number: int) -> None:
        """Gradients so far do not count for this one."""
        if number == self.number:
            self.loss = None

    def step(self, number: int) -> None:
        """An optimizer steps: one before this one, whose part is over, or this one."""
        if number != self.num_stepped:
            found = f"optimizer {number} stepped as the {self.num_stepped + 1}. of a training step"
            raise _refusal("training_step", found, "each stepped once, in the order of configure_optimizers")
        self.num_stepped += 1
        self.is_stepped |= number == self.number
        if number < self.number:
            self.log.take_numbers()
            with torch.no_grad():
                for buffer, before in self.buffers:
                    buffer.copy_(before)
        elif number < self.count - 1:
            raise _Stepped


class _OptimizerInReplay:
    """What `self.optimizers()` gives in `training_step`."""

    def __init__(self, replay: _Replay, number: int) -> None:
        self._replay, self.number = replay, number

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self._replay.zero_grad(self.number)

    def step(self, closure: Any = None) -> None:
        """As torch's, without a closure."""
        if closure is not None:
            raise _refusal("training_step", "optimizer.step(closure)", "step() without a closure")
        self._replay.step(self.number)

    def __getattr__(self, name: str) -> Any:
        raise _refusal("training_step", f"optimizer.{name}", "optimizer.zero_grad() and optimizer.step()")


class _Trainer:
    """What a module may ask its trainer for: where the run is."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {
            "current_epoch": 0,
            "global_step": 0,
            "estimated_stepping_batches": 0,
            "num_training_batches": 0,
            "sanity_checking": False,
        }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "values" not in self.__dict__:
            raise AttributeError(name)
        if name not in self.values:
            raise _refusal("self.trainer", f"trainer.{name}", f"one of {', '.join(self.values)}")
        return self.values[name]


# ---------------------------------------------------------------- what a module says of itself


def configured(given: Any, max_grad_norm: float | None) -> list[OwnOptimizer]:
    """What `configure_optimizers` returned, in any of the forms that Lightning documents.

    Raises:
        InputError: it is none of these, or asks for what cannot be honoured.
    """
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, list | tuple) for part in given):
        optimizers, schedulers = given
        if schedulers and len(schedulers) != len(optimizers):
            found = f"{len(schedulers)} schedulers for {len(optimizers)} optimizers"
            raise _refusal("configure_optimizers", found, "one for each, or dicts of optimizer and lr_scheduler")
        pairs = list(zip(optimizers, schedulers or [None] * len(optimizers), strict=True))
    else:
        entries = given if isinstance(given, list | tuple) else [given]
        pairs = [(one["optimizer"], one.get("lr_scheduler")) if isinstance(one, Mapping) else (one, None) for one in entries]
    made = []
    for optimizer, scheduler in pairs:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise _refusal("configure_optimizers", f"{type(optimizer).__name__} for an optimizer", "optimizers of torch")
        made.append(OwnOptimizer(optimizer, max_grad_norm=max_grad_norm, **_scheduled(scheduler)))
    return made


def _scheduled(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    settings = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    scheduler, interval = settings.pop("scheduler"), settings.pop("interval", "epoch")
    monitor, frequency = settings.pop("monitor", None), settings.pop("frequency", 1)
    settings.pop("name", None), settings.pop("strict", None), settings.pop("reduce_on_plateau", None)
    if frequency != 1 or interval not in ("step", "epoch") or settings:
        found = f"a scheduler with interval {interval!r}, frequency {frequency!r} {settings or ''}".rstrip()
        raise _refusal("configure_optimizers", found, "interval step or epoch, and frequency 1")
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) != (monitor is not None):
        raise _refusal("configure_optimizers", f"{type(scheduler).__name__} with monitor {monitor!r}", "both or neither")
    metric = None if monitor is None else monitor if "/" in monitor else f"{VALIDATION}/{monitor}"
    return {"schedule": scheduler, "per": interval, "metric": metric}


def _children(module: LightningModule, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of the submodules whose parameters an optimizer has.

    Raises:
        InputError: it has only some of a submodule's parameters.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = []
    for name, child in module.named_children():
        held = [id(parameter) in own for parameter in child.parameters() if parameter.requires_grad]
        if any(held) and not all(held):
            raise _refusal("configure_optimizers", f"an optimizer of some parameters of {name!r}", "all of a submodule, or none")
        found += [name] if any(held) else []
    return tuple(found)


def _refuse_what_is_not_honoured(module: LightningModule) -> None:
    from lightning.pytorch import LightningModule as Base

    hooks = [name for name, value in inspect.getmembers(Base, inspect.isfunction) if not name.startswith("_")]
    of_modules = {name for name in hooks if not hasattr(torch.nn.Module, name)} - HONOURED
    ours = [cls for cls in type(module).__mro__ if cls is not Base and issubclass(cls, Base)]
    overridden = sorted({name for cls in ours for name in vars(cls) if name in of_modules})
    if overridden:
        expected = f"a LightningModule that overrides none but {', '.join(sorted(HONOURED))}"
        fix = "Take it out: rows come from the job's pipeline, and saving, devices and clipping are the job's."
        name = type(module).__name__
        raise InputError([Problem(f"{name}.{method}", "a method that is not honoured", expected, fix) for method in overridden])


def _refusal(where: str, found: str, expected: str) -> InputError:
    return InputError([Problem(where, found, expected, "Write it so, or write a raymill.task.Task.")])


def _num_rows(batch: Batch) -> int:
    """Rows of a batch: the length of its first tensor."""
    values = list(batch.values()) if isinstance(batch, Mapping) else list(batch) if isinstance(batch, list | tuple) else [batch]
    return len(values[0])
