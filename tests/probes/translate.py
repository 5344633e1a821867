"""Say a sentence backwards: an encoder and a decoder, teacher forcing that fades, and a score over whole texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.data.sources import ArraySource
from raymill.task import Field, Kept, Now, Picture, Pipeline, Rows, Schema, Task

NUM_WORDS, LENGTH = 5, 4

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "Adam", "lr": 0.02},
    "loop": {"epochs": 3, "global_batch_rows": 12, "gradient_accumulation_steps": 2, "seed": 8},
    "checkpoint": {"metric": "validation/bleu"},
}


def make_rows(count: int, seed: int) -> Rows:
    return {"words": np.random.default_rng(seed).integers(0, NUM_WORDS, (count, LENGTH))}


def pipeline() -> Pipeline:
    sources = {
        "train": ArraySource("words/train", partial(make_rows, 50, 1), 9),
        "validation": ArraySource("words/validation", partial(make_rows, 19, 2), 9),
    }
    return Pipeline(sources=sources, schema={"words": Field("int64", (LENGTH,), classes=NUM_WORDS)})


class _Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS + 1, 8)
        self.encoder = nn.GRU(8, 16, batch_first=True)
        self.decoder = nn.GRUCell(8, 16)
        self.head = nn.Linear(16, NUM_WORDS)

    def forward(self, words: torch.Tensor, target: torch.Tensor | None, forced: float) -> torch.Tensor:
        """Scores [rows, LENGTH, NUM_WORDS]; with a target, a word of it is shown with this probability."""
        _, state = self.encoder(self.embedding(words))
        hidden, said = state[0], torch.full((len(words),), NUM_WORDS)
        scores = []
        for place in range(LENGTH):
            hidden = self.decoder(self.embedding(said), hidden)
            scores.append(self.head(hidden))
            shown = target is not None and float(torch.rand(())) < forced
            said = target[:, place] if shown and target is not None else scores[-1].argmax(dim=1)
        return torch.stack(scores, dim=1)


def bleu(said: list[str], meant: list[str]) -> float:
    """The geometric mean of the precision of words and of pairs, over all texts (Papineni et al., BLEU, ACL 2002, at n = 2)."""
    score = 1.0
    for size in (1, 2):
        right = total = 0
        for one, other in zip(said, meant, strict=True):
            grams, wanted = (Counter(text[at : at + size] for at in range(len(text) - size + 1)) for text in (one, other))
            right, total = right + sum((grams & wanted).values()), total + sum(grams.values())
        score *= (right / total) ** 0.5
    return score


class Backwards(Task):
    """Trains it."""

    def __init__(self, schema: Schema) -> None:
        pass

    def build(self) -> nn.Module:
        return _Translator()

    def loss(self, model: nn.Module, batch: Any, now: Now) -> torch.Tensor:  # type: ignore[override]
        target = batch["words"].flip(1)
        scores = model(batch["words"], target, 1 - now.step / now.total_steps)
        return functional.cross_entropy(scores.flatten(0, 1), target.flatten())

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Kept]:
        scores, target = model(batch["words"], None, 0.0), batch["words"].flip(1)
        said = [" ".join(map(str, words)) for words in scores.argmax(dim=2).tolist()]
        meant = [" ".join(map(str, words)) for words in target.tolist()]
        losses = functional.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="none")
        return {"loss": losses.view(-1, LENGTH).mean(dim=1), "said": Kept(said), "meant": Kept(meant)}

    def conclude(self, kept: Mapping[str, Any], totals: Mapping[str, torch.Tensor]) -> Mapping[str, float | Picture]:
        return {"bleu": bleu(kept["said"], kept["meant"])}
