"""A few rows through all of a job's own code, as a run would take them: read, check, transform, travel, collate, loss, backward,
optimizer and schedule, evaluate, and what a registered model takes.

A job is refused only for what would end its run too. So a batch of a few rows stands for the job's own, much larger one, and
where the few fail, it is tried with as many rows as the job's batches really have.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from raymill.config.evaluations import deciding_metrics
from raymill.data.arrow import digest_rows
from raymill.data.bad_rows import read_good_rows
from raymill.data.order import Item, key
from raymill.data.reader import Packet, lengths_of, transformed
from raymill.data.rows import ROW_ID, join, num_rows, take, unpack
from raymill.data.seeds import EVALUATION, FIRST_WEIGHTS, HOOK, STEP, TRANSFORM, seed_everything, unchanged_caller
from raymill.errors import DataError, InputError, Problem, did_you_mean
from raymill.evaluation.kept import gathered
from raymill.evaluation.pictures import as_png
from raymill.evaluation.sums import Evaluation
from raymill.optim.optimizers import make_optimizers
from raymill.own_code import contracts, seams
from raymill.own_code.export import why_not
from raymill.own_code.seams import Seam, problem
from raymill.own_code.traces import definition, headline, row_ids
from raymill.parallel.ddp import DistributedObjective
from raymill.parallel.gradients import strategy_of
from raymill.parallel.precision import autocast
from raymill.preflight.shapes import all_finite, batch_sizes, misfit, tensors
from raymill.task import PREDICT, TRAIN, Batch, Kept, Now, Objective, OwnOptimizer, Picture, Rows, Task, Total
from raymill.training.assembly import Job
from raymill.training.batch import prediction_batch, prediction_rows, to_device

MOST_ROWS = 64
"""Rows of a split that are looked at, spread over its first fragment."""

FEW_ROWS = 8
"""Rows of a batch that stands for a larger one."""

MOST_FRAGMENTS = 8
"""Fragments that are read for the first few rows of a split, where they are small."""

OF_A_DEVICE = re.compile(r"cuda|nvidia|on the same device|torch\.device|\bHIP\b", re.IGNORECASE)
"""What torch says where a GPU is missing, or a tensor is on another device than the model."""

CPU = torch.device("cpu")

T = TypeVar("T")


def find_problems(job: Job, weights: Path | None = None) -> list[Problem]:
    """Try the job's own code on a few of its rows, on the CPU. Nothing of this process is changed.

    Args:
        weights: the file of those that the run begins with, or goes on with; None: those that `build` makes.

    Returns:
        what would end a run: at a line of the code, or at a field of the job by its name. Each part of the code is tried that
        does not need one that failed.
    """
    trial = _Trial(job, weights)
    # What the code prints is not the result of the command.
    with unchanged_caller(), redirect_stdout(sys.stderr):
        os.environ["PYTHONBREAKPOINT"] = "0"
        torch.set_num_threads(job.plan.threads)
        trial.run()
    # What fails at one line is one mistake, whichever parts of the code came by.
    unique = {one.line: one.problem for one in reversed(trial.found)}.values()
    return list({one.where: one for one in unique}.values())[::-1]


@dataclass(frozen=True)
class _Found:
    """A problem, and the line that raised it, in the job's own code or a library's."""

    problem: Problem
    line: str


def _line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


class _Trial:
    """What was found so far.

    Attributes:
        parts: objective -> the names of its loss's parts.
        logged: metric of a step -> the objective that it is of.
    """

    def __init__(self, job: Job, weights: Path | None) -> None:
        self.job, self.weights = job, weights
        self.found: list[_Found] = []
        self.own_optimizers: Mapping[str, Sequence[OwnOptimizer]] | None = None
        self.parts: dict[str, Collection[str]] = {}
        self.logged: dict[str, str] = {}
        self.asked: Rows | None = None  # as a source gave them

    def run(self) -> None:
        """Try all parts, in the order of a run."""
        rows = {split: self.rows_of(split) for split in self.job.shardings}
        task = self.tried(seams.TASK, self.job.make_task)
        if task is None:
            return
        seed_everything(self.job.spec.loop.seed, FIRST_WEIGHTS)
        model = self.tried(seams.BUILD, lambda: contracts.build(task), task.build)
        if model is None:
            return
        field = "init_from.model" if self.job.spec.init_from else "task"
        if self.weights is not None and (found := misfit(model, self.weights, field)):
            self.note([found])
        if train := rows.get(TRAIN):
            self.train(task, model, train)
        model.eval()
        measured = {split: self.evaluate(task, model, split, some) for split, some in rows.items() if split != TRAIN and some}
        self.look_for_metrics(task, {split: names for split, names in measured.items() if names is not None})
        if measured:
            self.draw(task, model)
        if self.job.spec.register_ is not None and self.asked is not None:
            self.answer(task, model, self.asked, self.job.spec.register_.export)

    # ------------------------------------------------------------ one call

    def tried(self, seam: Seam, call: Callable[[], T], function: Any = None, given: Any = None, at: str = "") -> T | None:
        """What a call gives; None, and a problem more, where it fails.

        Args:
            function: whose definition is shown where the error came through no line of the job's own.
            given: what the code is given, for the message.
            at: what was worked on.
        """
        line = ""
        try:
            return call()
        except InputError as error:
            found = list(error.problems)
        except DataError as error:
            # With its reason and what to do; `raymill data check` finds all of them.
            found = [Problem(at or seam.call, str(error), seam.expected, seam.fix)]
        except (Exception, SystemExit) as error:
            if self._is_of_another_device(error):
                return None
            found, line = [problem(seam, error, function, given)], _line(error)
        self.note([replace(one, found=f"{one.found} ({at})") if at else one for one in found], line)
        return None

    def note(self, problems: Sequence[Problem], line: str = "") -> None:
        """Take note of problems; `line` is where their error was raised, in whatever file."""
        self.found += [_Found(one, line or one.where) for one in problems]

    def _is_of_another_device(self, error: BaseException) -> bool:
        """Whether an error says that this is the CPU, of a job that trains on GPUs."""
        return bool(self.job.spec.scale.gpus_per_worker) and OF_A_DEVICE.search(str(error)) is not None

    def field(self, name: str, call: Callable[[], T]) -> T | None:
        """What torch makes of a field of the job; None, and a problem more, where it fails."""
        try:
            return call()
        except InputError as error:
            self.note(error.problems)
        except Exception as error:
            expected = f"what torch can train this model with for {self.job.plan.total_steps} steps"
            self.note([Problem(name, headline(error), expected, f"Correct {name} in the job.")])
        return None

    # ------------------------------------------------------------ rows

    def rows_of(self, split: str) -> Rows | None:
        """A few rows of a split as a worker gets them."""
        read = self.read(split)
        if read is None:
            return None
        rows, ids = read
        self.asked = copy.deepcopy(take(rows, np.resize(np.arange(num_rows(rows)), FEW_ROWS)))
        before = len(self.found)
        changed = self.transformed(split, rows, ids)
        if changed is None and (changed := self._window(split)) is not None:
            # They were too few for this transform, which takes those of a window.
            del self.found[before:]
        if changed is None:
            return None
        changed.setdefault(ROW_ID, ids)
        # As they travel from the process that reads: packed, and read-only.
        packet = Packet(Item(split, 0, 0, 0), 0, changed, np.ones(num_rows(changed), bool))
        pack = self.job.reader("preflight").pack
        return self.tried(seams.TRANSFORM, lambda: unpack(*pack(packet)), at=f"split {split!r}")

    def read(self, split: str) -> tuple[Rows, np.ndarray] | None:
        """A few rows spread over the first fragment, or over some small ones, and their ids; None: there is none."""
        parts: list[Rows] = []
        ids: list[np.ndarray] = []
        start = 0
        for fragment in self.job.fragments[split][:MOST_FRAGMENTS]:
            read_fragment = partial(read_good_rows, self.job.pipeline, split, fragment, lenient=self.job.spec.bad_rows.lenient)
            read = self.tried(seams.READ, read_fragment, at=f"split {split!r}, {fragment.path} part {fragment.part}")
            if read is None:
                return None
            rows, bad = read
            chosen = self._spread(rows)
            good = np.setdiff1d(np.arange(fragment.num_rows), list(bad))
            if len(chosen):
                parts.append(take(rows, chosen))
                ids.append(start + good[chosen])
            start += fragment.num_rows
            if sum(map(num_rows, parts)) >= FEW_ROWS:
                break
        return (join(parts), np.concatenate(ids)) if parts else None

    def _spread(self, rows: Rows) -> np.ndarray:
        """The places of about MOST_ROWS rows, those with the extreme labels first."""
        count = num_rows(rows)
        labels = [np.asarray(rows[name]) for name, field in self.job.pipeline.schema.items() if field.classes and name in rows]
        extremes = [int(at) for label in labels if label.ndim == 1 and count for at in (label.argmax(), label.argmin())]
        spread = np.linspace(0, count - 1, min(count, MOST_ROWS)).astype(int).tolist() if count else []
        return np.array(list(dict.fromkeys([*extremes, *spread])), np.int64)

    def transformed(self, split: str, rows: Rows, ids: np.ndarray) -> Rows | None:
        """The rows after the transform."""
        seed = key(self.job.spec.loop.seed, 0, 0, TRANSFORM)
        generator = np.random.Generator(np.random.Philox(key=seed))
        transform = self.job.pipeline.transform
        at = f"split {split!r}, rows {row_ids(ids)}"
        if (length := self.job.pipeline.length) is not None and split == TRAIN:
            self.tried(seams.LENGTH, lambda: lengths_of(length, rows), length, rows, at)
        return self.tried(seams.TRANSFORM, lambda: transformed(transform, rows, split, generator), transform, rows, at)

    def _window(self, split: str) -> Rows | None:
        """Rows of a whole window after the transform; None where that fails as well."""
        try:
            (first, *_) = self.job.reader("preflight").read(Item(split, 0, 0, 0))
        except Exception:
            return None
        return take(first.rows, slice(0, MOST_ROWS))

    # ------------------------------------------------------------ training

    def train(self, task: Task, model: nn.Module, rows: Rows) -> None:
        """One optimizer step of each objective, and what its optimizer and schedule need."""
        spec = self.job.spec
        objectives = self.tried(seams.OBJECTIVES, lambda: contracts.objectives(task, model), task.objectives)
        if objectives is None:
            return
        names = [one.name for one in objectives]
        before = len(self.found)
        total_steps = self.job.plan.total_steps
        self.own_optimizers = self.tried(
            seams.OPTIMIZERS, lambda: contracts.optimizers(task, model, names, total_steps), task.optimizers
        )
        if len(self.found) > before:
            return
        self.logged = {contracts.metric_name(name, contracts.MAIN): name for name in names}
        for index, objective in enumerate(objectives):
            make = partial(DistributedObjective, model, objective, spec.loop.precision, CPU, strategy_of(strict=spec.loop.strict))
            distributed = self.tried(seams.OBJECTIVES, make, task.objectives)
            if distributed is not None:
                self.minimise(distributed, index, names, rows)
        if len(self.found) == before:
            self.after_steps(task, model)

    def after_steps(self, task: Task, model: nn.Module) -> None:
        """What the task does to its model behind a step and behind an epoch; it must leave the tensors that `build` made."""
        order = self.job.order
        last = min(order.steps_per_epoch, self.job.plan.total_steps)
        moments = {"after_step": self._now(1), "after_epoch": self._now(last)}
        for name, seam in contracts.HOOKS.items():
            if not contracts.overrides(task, name):
                continue
            function = getattr(task, name)
            seed_everything(self.job.spec.loop.seed, HOOK, moments[name].position)
            before = tensors(model)
            self.tried(seam, partial(contracts.hook, task, name, model, moments[name]), function)
            if changed := sorted({name for name, _, _ in {*before} ^ {*tensors(model)}}):
                fix = "Make all of them in build(), and change their values in place: tensor.copy_(...), tensor.mul_(...)."
                found = f"other parameters or buffers than there were: {', '.join(changed)}"
                self.note(seams.wrong(seam, function, found, fix).problems)

    def _now(self, step: int) -> Now:
        """The moment of one of the first epoch's steps."""
        order, rows = self.job.order, self.job.plan.global_batch_rows
        return Now(step, 0, order.steps_per_epoch, self.job.plan.total_steps, min(step * rows, order.train.num_rows))

    def minimise(self, distributed: DistributedObjective, index: int, names: Sequence[str], rows: Rows) -> None:
        """One optimizer step of an objective."""
        spec, total_steps, epochs = self.job.spec, self.job.plan.total_steps, self.job.order.num_epochs
        own = self.own_optimizers
        groups = self.field("optimizer", lambda: make_optimizers(spec, distributed, names, total_steps, epochs, own))
        with distributed.only_own():
            trained = self.for_each_size(TRAIN, rows, lambda batch, count: self._backward(distributed, index, batch))
        if not trained:
            return
        for group in groups or ():
            self.field("optimizer", partial(group.step, max(1, group.spec.from_step)))
            self.field("schedule", partial(group.schedule.advance, epoch_ended=True))

    def for_each_size(self, split: str, rows: Rows, use: Callable[[Batch, int], Any]) -> bool:
        """Use a batch of each size that the job's batches have, with few rows for many; returns whether all went well.

        Where the few rows fail, the true number is tried: code may well lean on the size of a batch.
        """
        sizes = batch_sizes(self.job.shardings[split])
        before = len(self.found)
        for few in dict.fromkeys(min(size, FEW_ROWS) for size in sizes):
            if not self._use(rows, few, use):
                found = self.found[before:]
                del self.found[before:]
                true = [size for size in sizes if min(size, FEW_ROWS) == few]
                if not all(size != few and self._use(rows, size, use) for size in true):
                    self.found[before:] = self.found[before:] or found
                    return False
        return True

    def _use(self, rows: Rows, count: int, use: Callable[[Batch, int], Any]) -> bool:
        before = len(self.found)
        chosen = take(rows, np.resize(np.arange(num_rows(rows)), count))
        for column in chosen.values():
            if isinstance(column, np.ndarray):
                column.flags.writeable = False  # as it is in a run
        collate = self.job.pipeline.collate
        at = f"rows {row_ids(chosen[ROW_ID])}"
        batch = self.tried(seams.COLLATE, lambda: to_device(self.job.collate(chosen), CPU), collate, chosen, at)
        if batch is not None:
            use(batch, count)
        return len(self.found) == before

    def _backward(self, distributed: DistributedObjective, index: int, batch: Batch) -> None:
        spec, objective, model = self.job.spec, distributed.objective, distributed.model
        checked, now = contracts.checked_loss(objective), self._now(1)
        for parameter in distributed.parameters:
            parameter.grad = None

        def compute() -> tuple[float, float]:
            # A batch that weighs nothing is not trained on.
            if objective.weight is not None and not contracts.weight(objective, batch):
                return 0.0, 0.0
            seed_everything(spec.loop.seed, STEP, 0, 0, index)
            with autocast(spec.loop.precision, CPU):
                given = contracts.features(objective, model, batch, now) if objective.features else batch
                measured = checked(model, given, now)
            self._compare_parts(objective, measured)
            torch.autograd.backward(measured.loss.float())
            return float(measured.loss.detach()), float(distributed.strategy.norm(distributed.parameters))

        computed = self.tried(seams.LOSS, compute, checked.own, batch)
        if computed is None or spec.loop.on_nan != "stop" or not all_finite(batch):
            return
        if not np.isfinite(computed).all():
            found = "a loss of {}, with a gradient of norm {}, from rows whose numbers are all finite".format(*computed)
            fix = "Look for a division by zero, or the logarithm or root of what may be zero or less."
            self.note(seams.wrong(seams.LOSS, checked.own, found, fix, batch).problems)

    def _compare_parts(self, objective: Objective, measured: contracts.Measured) -> None:
        """Raise what is wrong with the names of a loss's parts, beside those of other batches and of other objectives."""
        name = objective.name
        expected = self.parts.setdefault(name, measured.parts.keys())
        if measured.parts.keys() != expected:
            raise contracts.other_parts(objective, measured.parts, expected)
        metrics = {contracts.metric_name(name, part) for part in measured.parts}
        if taken := sorted(metric for metric in metrics if self.logged.setdefault(metric, name) != name):
            found = f"parts that are logged as {', '.join(taken)}, as what objective {self.logged[taken[0]]!r} logs"
            raise seams.wrong(seams.LOSS, objective.loss, found, "Give them names of their own.")

    # ------------------------------------------------------------ evaluation and registration

    def evaluate(self, task: Task, model: nn.Module, split: str, rows: Rows) -> dict[str, str] | None:
        """Measure batches of each size of a split, and let the task conclude.

        Returns:
            name -> "" for a metric, or what it is instead; None: something failed, or was not found out.
        """
        names: dict[str, str] = {}
        shapes: dict[str, torch.Size] = {}
        evaluation = Evaluation()
        precision = self.job.spec.loop.precision

        def measure(batch: Batch, count: int) -> None:
            def call() -> Mapping[str, torch.Tensor | Total | Kept]:
                seed_everything(self.job.spec.loop.seed, EVALUATION, 0, 0)
                with torch.no_grad(), autocast(precision, CPU):
                    return contracts.evaluate(task, model, batch, count)

            found = self.tried(seams.EVALUATE, call, task.evaluate, batch) or {}
            for name, value in found.items():
                names[name] = "a Total" if isinstance(value, Total) else "Kept" if isinstance(value, Kept) else ""
                shape = value.value.shape if isinstance(value, Total) else None
                if shape is not None and shapes.setdefault(name, shape) != shape:
                    two = f"the Total {name!r} of shapes {[list(one) for one in (shapes[name], shape)]}"
                    fix = "Let it have one shape, whatever rows a batch has."
                    self.note(seams.wrong(seams.EVALUATE, task.evaluate, two, fix, batch).problems)
                    return
            evaluation.kept.clear()
            evaluation.add(found, np.arange(count))

        if not self.for_each_size(split, rows, measure):
            return None
        concluded = self.conclude(task, evaluation)
        return None if concluded is None else names | concluded

    def conclude(self, task: Task, evaluation: Evaluation) -> dict[str, str] | None:
        """What the task concludes. Nothing is said of what may fail with few rows only, as a score that needs all classes."""
        if not contracts.overrides(task, "conclude"):
            return {}
        _, totals, _ = evaluation.reduce(lambda tensor: [tensor])
        try:
            with torch.no_grad():
                found = contracts.conclude(task, gathered(evaluation.kept), totals)
        except InputError as error:
            self.note(error.problems)
        except (NameError, AttributeError, ImportError, TypeError, KeyError) as error:
            self.note([problem(seams.CONCLUDE, error, task.conclude)], _line(error))
        except Exception:
            return None
        else:
            drawn = [value for value in found.values() if isinstance(value, Picture)]
            self.tried(seams.CONCLUDE, lambda: [as_png(one) for one in drawn], task.conclude)
            return {name: "a Picture" if isinstance(value, Picture) else "" for name, value in found.items()}
        return None

    def draw(self, task: Task, model: nn.Module) -> None:
        """The task's pictures of its model."""
        with torch.no_grad():
            drawn = self.tried(seams.PICTURES, lambda: contracts.pictures(task, model, self._now(1)), task.pictures) or {}
            self.tried(seams.PICTURES, lambda: [as_png(one) for one in drawn.values()], task.pictures)

    def look_for_metrics(self, task: Task, measured: Mapping[str, Mapping[str, str]]) -> None:
        """What decides something must be among what is measured.

        Args:
            measured: split -> name -> "" for a metric, or what it is instead.
        """
        for field, metric, _ in deciding_metrics(self.job.spec):
            split, _, name = metric.partition("/")
            if split not in measured or measured[split].get(name) == "":
                continue
            metrics = [f"{split}/{name}" for name, other in measured[split].items() if not other]
            found = f"{metric!r}, which is {measured[split][name]}" if name in measured[split] else repr(metric)
            expected = (
                f"one of {', '.join(metrics) or 'none'}, of which evaluate() gives a value per row ({definition(task.evaluate)})"
            )
            self.note([Problem(field, found, f"{expected}, or that conclude() gives", did_you_mean(metric, metrics))])

    def answer(self, task: Task, model: nn.Module, rows: Rows, export: str) -> None:
        """What a registered model says of rows, and whether it can be exported where it must be."""
        pipeline, at = self.job.pipeline, f"split {PREDICT!r}"
        count = num_rows(rows)

        def twice() -> tuple[str, str]:
            # Each time a copy, since a transform may work in place.
            one, two = (prediction_rows(pipeline, copy.deepcopy(rows), seed) for seed in (0, 1))
            return digest_rows(one), digest_rows(two)

        digests = self.tried(seams.TRANSFORM, twice, pipeline.transform, rows, at)
        if digests is None:
            return
        if digests[0] != digests[1]:
            fix = f"Let it draw at random only if split == {TRAIN!r}."
            self.note(seams.wrong(seams.TRANSFORM, pipeline.transform, f"other rows at each call ({at})", fix, rows).problems)
        batch = self.tried(seams.COLLATE, lambda: prediction_batch(pipeline, copy.deepcopy(rows)), pipeline.collate, rows, at)
        if batch is None:
            return
        function = task.predict if contracts.overrides(task, "predict") else type(model)
        self.tried(seams.PREDICT, lambda: contracts.predict(task, model, batch, count), function, batch)
        if export != "required":
            return
        inputs = self.tried(seams.INPUTS, lambda: contracts.inputs(task, batch), task.inputs, batch)
        if inputs is not None and (found := why_not(model, inputs)):
            fix = "Change forward(), or let the job say `register.export: try`, which registers it as it is."
            self.note([Problem("register.export", found, "a model that torch.export can export", fix)])
