"""LightningModules as they are written for Lightning's own Trainer: a classifier, and a GAN that steps its optimizers itself."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from probes import gan, mixed
from raymill.adapters.lightning import LightningTask
from raymill.task import Schema


class LitClassifier(pl.LightningModule):
    """Unchanged."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(hidden, mixed.NUM_CLASSES)
        self.train_accuracy = MulticlassAccuracy(mixed.NUM_CLASSES)
        self.accuracy = MulticlassAccuracy(mixed.NUM_CLASSES)
        self.auroc = MulticlassAUROC(mixed.NUM_CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.net(image))
        return scores

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        scores = self(batch["image"])
        loss = functional.cross_entropy(scores, batch["label"])
        self.log("train_loss", loss)
        self.train_accuracy(scores, batch["label"])
        self.log("train_accuracy", self.train_accuracy, on_step=True, on_epoch=False)
        self.log("fraction", (self.global_step + 1) / self.trainer.estimated_stepping_batches)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores = self(batch["image"])
        self.log("val_loss", functional.cross_entropy(scores, batch["label"]), prog_bar=True)
        self.accuracy.update(scores, batch["label"])
        self.log("val_accuracy", self.accuracy)
        self.auroc.update(scores.softmax(dim=1), batch["label"])

    def on_validation_epoch_end(self) -> None:
        self.log("val_auroc", self.auroc.compute())
        self.auroc.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch["image"]).argmax(dim=1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            [{"params": self.net.parameters(), "lr": 0.01}, {"params": self.head.parameters(), "lr": 0.03, "weight_decay": 0.0}]
        )
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class LitGan(pl.LightningModule):
    """Unchanged: manual optimization, as in Lightning's guide."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(gan.NOISE, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.discriminator = nn.Sequential(nn.Linear(1, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def training_step(self, batch: Any) -> None:
        real = batch["point"]
        first, second = self.optimizers()
        noise = torch.randn(len(real), gan.NOISE)
        self.toggle_optimizer(first)
        loss = functional.softplus(-self.discriminator(self.generator(noise))).mean()
        self.log("generator_loss", loss)
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        found = self.discriminator(real)
        made = self.discriminator(self.generator(noise).detach())
        loss = functional.softplus(-found).mean() + functional.softplus(made).mean()
        self.log_dict({"discriminator_loss": loss, "real": torch.sigmoid(found).mean()})
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean", self.generator(torch.randn(len(batch["point"]), gan.NOISE)).mean())

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.02, betas=(0.5, 0.9)),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.02, momentum=0.5),
        ]


class Classifier(LightningTask):
    """Trains the first."""

    max_grad_norm = 1.0

    def __init__(self, schema: Schema, hidden: int = 12) -> None:
        self.hidden = hidden

    def module(self) -> pl.LightningModule:
        return LitClassifier(self.hidden)


class Gan(LightningTask):
    """Trains the second."""

    def __init__(self, schema: Schema) -> None:
        pass

    def module(self) -> pl.LightningModule:
        return LitGan()


CLASSIFIER: dict[str, Any] = {
    "loop": {**mixed.VALUES["loop"], "epochs": 4},
    "checkpoint": {"metric": "validation/val_auroc"},
}
GAN: dict[str, Any] = {"loop": {"epochs": 3, "global_batch_rows": 36, "seed": 1}}
