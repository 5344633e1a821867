"""A classifier of Hugging Face transformers on a data set of torch, both unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from raymill.adapters.transformers import TransformersTask
from raymill.data.sources import MapStyleSource
from raymill.task import Field, Pipeline, Schema

NUM_WORDS, LENGTH = 12, 6

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "AdamW", "lr": 0.005, "max_grad_norm": 1.0},
    "loop": {"epochs": 2, "global_batch_rows": 12, "gradient_accumulation_steps": 2, "seed": 2, "window_rows": 20},
    "checkpoint": {"metric": "validation/accuracy"},
}


class Reviews(Dataset[dict[str, Any]]):
    """Texts of numbered words; good ones hold a word of the upper half first. Words are masked at random whenever one is read."""

    def __init__(self, count: int, seed: int) -> None:
        self.words = torch.randint(1, NUM_WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, number: int) -> dict[str, Any]:
        words = self.words[number].clone()
        label = int(words[0] >= NUM_WORDS // 2)
        words[1:][torch.rand(LENGTH - 1) < 0.1] = 0
        return {"input_ids": words.numpy(), "attention_mask": np.ones(LENGTH, np.int64), "labels": label}


def train() -> Reviews:
    return Reviews(50, 1)


def validation() -> Reviews:
    return Reviews(19, 2)


def columns(item: dict[str, Any]) -> dict[str, Any]:
    return item


def pipeline() -> Pipeline:
    sources = {
        "train": MapStyleSource("reviews", train, columns, 7),
        "validation": MapStyleSource("reviews", validation, columns, 7),
    }
    words = Field("int64", (LENGTH,))
    return Pipeline(sources=sources, schema={"input_ids": words, "attention_mask": words, "labels": Field("int64", classes=2)})


class Sentiment(TransformersTask):
    """Trains it."""

    def __init__(self, schema: Schema, layers: int = 1) -> None:
        self.layers = layers

    def network(self) -> PreTrainedModel:
        config = BertConfig(
            vocab_size=NUM_WORDS,
            hidden_size=16,
            num_hidden_layers=self.layers,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=LENGTH,
            num_labels=2,
        )
        return BertForSequenceClassification(config)
