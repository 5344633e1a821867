"""Sentences packed into windows of one length: a word sees those before it in its sentence; a batch counts by its words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Objective, Pipeline, Rows, Schema, Task, Total

WINDOW, NUM_WORDS, DIM = 10, 7, 8

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "Adam", "lr": 0.02},
    "loop": {"epochs": 3, "global_batch_rows": 12, "gradient_accumulation_steps": 2, "seed": 8},
}


def make_rows(num_sentences: int, seed: int) -> Rows:
    """Sentences that count upwards, as many to a window as there is room for; 0 fills up. Some windows hold single words alone,
    of which none has another to be told from.
    """
    generator = np.random.default_rng(seed)
    windows: list[list[tuple[int, int]]] = [[]]
    for number in range(num_sentences):
        length = 1 if number % 8 > 5 else int(generator.integers(2, WINDOW + 1))
        sentence = [(int(generator.integers(NUM_WORDS)) + place) % NUM_WORDS + 1 for place in range(length)]
        if len(windows[-1]) + length > WINDOW or number % 8 == 6:
            windows.append([])
        windows[-1] += [(word, number + 1) for word in sentence]
    filled = [window + [(0, 0)] * (WINDOW - len(window)) for window in windows]
    pairs = np.array(filled, np.int64)
    return {"words": pairs[:, :, 0], "sentence": pairs[:, :, 1]}


def pipeline() -> Pipeline:
    sources = {split: ArraySource(f"packed/{split}", partial(make_rows, count, count), 6) for split, count in SENTENCES.items()}
    return Pipeline(sources=sources, schema={"words": Field("int64", (WINDOW,)), "sentence": Field("int64", (WINDOW,))})


SENTENCES = {"train": 120, "validation": 30}


class Attention(nn.Module):
    """One layer, in which a word sees those of its own sentence up to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(NUM_WORDS + 1, DIM), nn.Embedding(WINDOW, DIM)
        self.mix, self.head = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, NUM_WORDS + 1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, words: torch.Tensor, sentence: torch.Tensor) -> torch.Tensor:
        hidden = self.words(words) + self.places.weight
        seen = (sentence[:, :, None] == sentence[:, None, :]).tril()
        query, key, value = self.mix(hidden).chunk(3, dim=-1)
        hidden = hidden + functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        scores: torch.Tensor = self.head(self.dropout(hidden))
        return scores


def targets(batch: Any) -> torch.Tensor:
    """The next word of the same sentence; -100 where there is none."""
    words, sentence = batch["words"], batch["sentence"]
    known = (sentence[:, 1:] == sentence[:, :-1]) & (sentence[:, 1:] > 0)
    return words[:, 1:].masked_fill(~known, -100)


def num_targets(batch: Any) -> torch.Tensor:
    return (targets(batch) >= 0).sum()


class NextWord(Task):
    """Predict each word of a sentence but its first."""

    def __init__(self, schema: Schema) -> None:
        pass

    def build(self) -> nn.Module:
        return Attention()

    def objectives(self) -> Sequence[Objective]:
        return [Objective("loss", self.mean_of_words, weight=num_targets)]

    def mean_of_words(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        scores, wanted = model(batch["words"], batch["sentence"])[:, :-1], targets(batch)
        right = (scores.argmax(dim=-1) == wanted)[wanted >= 0].float().mean()
        return {"loss": functional.cross_entropy(scores.transpose(1, 2), wanted), "right": right}

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Total]:
        scores, wanted = model(batch["words"], batch["sentence"])[:, :-1], targets(batch)
        losses = functional.cross_entropy(scores.transpose(1, 2), wanted, reduction="none")
        return {"loss_sum": losses.sum(dim=1), "words": Total(num_targets(batch))}
