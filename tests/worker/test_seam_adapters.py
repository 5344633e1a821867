"""Code of Lightning and of Hugging Face, unchanged: after a stop and a crash, the weights of the undisturbed run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from probes import gan, hub, lit, mixed, reviews
from raymill.adapters.lightning import configured
from raymill.data.seeds import unchanged_caller
from raymill.errors import InputError
from raymill.task import Now, Schema
from worker_harness import (
    Experiment,
    NewRun,
    Start,
    run_rank,
    stopped_and_killed,
    strict_at_other_numbers,
)

PROBES: Mapping[str, Experiment] = {
    "LightningModule": Experiment(lit.Classifier, mixed.pipeline, lit.CLASSIFIER),
    "LightningModule with two optimizers": Experiment(lit.Gan, gan.pipeline, lit.GAN),
    "Hugging Face classifier, torch Dataset": Experiment(reviews.Sentiment, reviews.pipeline, reviews.VALUES),
    "Hugging Face classifier and Dataset": Experiment(reviews.Sentiment, hub.pipeline, reviews.VALUES),
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("probe", PROBES)
def test_stopped_and_killed_it_ends_with_the_same_weights(new_run: NewRun, probe: str, world_size: int) -> None:
    stopped_and_killed(new_run, PROBES[probe], world_size)


@pytest.mark.parametrize("probe", PROBES)
def test_strict_it_ends_with_the_same_weights_at_any_number_of_workers(new_run: NewRun, probe: str) -> None:
    strict_at_other_numbers(new_run, PROBES[probe])


def test_what_a_module_logs_becomes_metrics_over_all_rows(new_run: NewRun) -> None:
    attempts = [new_run(PROBES["LightningModule"].with_values(loop={"gradient_accumulation_steps": 1})).go(n) for n in (1, 2)]
    steps = attempts[0].metrics("step")
    assert {"train/loss", "train/train_loss", "train/train_accuracy", "train/fraction", "train/learning_rate"} <= steps[0].keys()
    assert steps[0]["train/loss"] == pytest.approx(steps[0]["train/train_loss"], rel=1e-6)
    assert steps[-1]["train/fraction"] == pytest.approx(1)
    measured = attempts[0].metrics("evaluation")[-1]
    assert measured.keys() == {f"validation/{name}" for name in ("val_loss", "val_accuracy", "val_auroc")}
    assert measured["validation/val_auroc"] > 0.7
    assert min(metrics["train/learning_rate"] for metrics in steps) < 0.01, "a plateau lowered it"


class Unscheduled(lit.LitClassifier):
    """Its plateau would ask for an evaluation."""

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"]


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_one_step_is_that_of_lightnings_own_trainer(new_run: NewRun, tmp_path: Path) -> None:
    rows = {name: torch.as_tensor(column) for name, column in mixed.make_rows(24, 5).items()}
    module, ours = Unscheduled(), lit.Classifier({})
    built = ours.build()
    built.load_state_dict(module.state_dict())
    for part in (module, built):
        part.net[4].p = 0.0  # type: ignore[union-attr, index]
    trainer = pl.Trainer(
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader([{name: value[place] for name, value in rows.items()} for place in range(24)], batch_size=24))
    ((own,),) = ours.optimizers(built, 1).values()
    built.train()
    loss = ours.objectives()[0].loss(built, rows, Now(1, 0, 1, 1, 24))["loss"]  # type: ignore[call-arg, index]
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(built.parameters(), 1.0)
    own.optimizer.step()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(built.state_dict()[name], value, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what is refused


class Loads(lit.LitClassifier):
    """Brings its own rows, and steps in its own way."""

    def train_dataloader(self) -> Any:
        return []

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        pass


class AsksTrainer(lit.LitClassifier):
    """Asks for what there is not."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trainer.save_checkpoint("here")
        return super().training_step(batch, batch_idx)


class Skips(lit.LitGan):
    """Steps one of its optimizers now and then."""

    def training_step(self, batch: Any) -> None:
        first, _ = self.optimizers()
        loss = self.generator(torch.zeros(4, gan.NOISE)).mean()
        self.manual_backward(loss)
        first.step()


def of(module: type[pl.LightningModule]) -> Callable[[Schema], Any]:
    def make(schema: Schema) -> Any:
        task = lit.Classifier(schema)
        task.module = module  # type: ignore[method-assign, assignment]
        return task

    return make


@pytest.mark.parametrize(
    ("module", "rows", "found"),
    [
        (Loads, mixed.pipeline, r"Loads.optimizer_step: found a method that is not honoured(.|\n)*Loads.train_dataloader"),
        (AsksTrainer, mixed.pipeline, "trainer.save_checkpoint"),
        (Skips, gan.pipeline, "optimizer 1 was not stepped"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, module: Any, rows: Any, found: str) -> None:
    experiment = Experiment(of(module), rows, {"loop": {"global_batch_rows": 24}})
    with pytest.raises(InputError, match=found), unchanged_caller():
        run_rank(0, 1, 0, experiment, Start(tmp_path, 1, None, None, True))


def test_each_form_of_configure_optimizers_is_read() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    made = [torch.optim.SGD([weight], lr=0.1) for _ in range(2)]
    steps = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in made]
    assert [one.optimizer for one in configured(made[0], None)] == made[:1]
    assert [one.optimizer for one in configured(made, None)] == made
    assert [(one.optimizer, one.schedule, one.per) for one in configured((made, steps), None)] == [
        (made[0], steps[0], "epoch"),
        (made[1], steps[1], "epoch"),
    ]
    (one,) = configured({"optimizer": made[0], "lr_scheduler": {"scheduler": steps[0], "interval": "step"}}, 2.0)
    assert (one.per, one.max_grad_norm) == ("step", 2.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(made[0])
    (one,) = configured([{"optimizer": made[0], "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}], None)
    assert one.metric == "validation/val_loss"
    for wrong in (None, (made, steps[:1]), {"optimizer": made[0], "lr_scheduler": {"scheduler": steps[0], "frequency": 2}}):
        with pytest.raises(InputError, match="configure_optimizers"):
            configured(wrong, None)
    with pytest.raises(InputError, match="ReduceLROnPlateau with monitor None"):
        configured({"optimizer": made[0], "lr_scheduler": plateau}, None)
