"""A language model on documents of any length, packed into rows of one length across the borders of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from raymill.task import Field, Fragment, Pipeline, Rows, Schema, Task, Total

ROW_TOKENS = 12
FRAGMENT_ROWS = 5
END = 0
NUM_WORDS = 8

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "RMSprop", "lr": 0.01},
    "schedule": {"kind": "LinearLR", "start_factor": 1.0, "end_factor": 0.1},
    "loop": {"epochs": 4, "global_batch_rows": 16, "gradient_accumulation_steps": 2, "seed": 3},
}


@lru_cache
def documents(count: int, seed: int) -> tuple[np.ndarray, ...]:
    """Texts that count upwards from a random word, each closed by END; some are shorter than a row, some longer."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 3 * ROW_TOKENS, count)
    starts = generator.integers(0, NUM_WORDS, count)
    return tuple(
        np.append((start + np.arange(length)) % NUM_WORDS + 1, END).astype(np.int64)
        for start, length in zip(starts, lengths, strict=True)
    )


@dataclass(frozen=True)
class PackedDocuments:
    """All documents as one text, cut into rows of ROW_TOKENS + 1 tokens that overlap by one; a rest is left out.

    A fragment is a range of rows, so it neither begins nor ends where a document or a file of documents does.
    """

    num_documents: int
    seed: int

    def fragments(self) -> Sequence[Fragment]:
        num_rows = (sum(map(len, documents(self.num_documents, self.seed))) - 1) // ROW_TOKENS
        starts = range(0, num_rows, FRAGMENT_ROWS)
        sizes = [min(FRAGMENT_ROWS, num_rows - start) for start in starts]
        return [
            Fragment("documents", part, rows, 8 * rows * ROW_TOKENS, self._identity(part * FRAGMENT_ROWS, rows))
            for part, rows in enumerate(sizes)
        ]

    def read(self, fragment: Fragment) -> Rows:
        return {"tokens": self._rows(fragment.part * FRAGMENT_ROWS, fragment.num_rows)}

    def _identity(self, first: int, count: int) -> str:
        return hashlib.sha256(self._rows(first, count).tobytes()).hexdigest()[:16]

    def _rows(self, first: int, count: int) -> np.ndarray:
        """Rows first..first+count-1, reading only the documents they lie in."""
        texts = documents(self.num_documents, self.seed)
        ends = np.cumsum([len(text) for text in texts])
        start, stop = first * ROW_TOKENS, (first + count) * ROW_TOKENS + 1
        low, high = int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop - 1, "right"))
        text = np.concatenate(texts[low : high + 1])
        offset = start - (int(ends[low - 1]) if low else 0)
        return np.stack([text[offset + k * ROW_TOKENS : offset + (k + 1) * ROW_TOKENS + 1] for k in range(count)])


def pipeline() -> Pipeline:
    sources = {"train": PackedDocuments(70, 1), "validation": PackedDocuments(20, 2)}
    return Pipeline(sources=sources, schema={"tokens": Field("int64", (ROW_TOKENS + 1,), classes=NUM_WORDS + 1)})


class NextWord(Task):
    """Predict each token from those before it, with a recurrent network."""

    def __init__(self, schema: Schema) -> None:
        self.num_tokens = schema["tokens"].classes or 0

    def build(self) -> nn.Module:
        return _Recurrent(self.num_tokens)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return self._per_token(model, batch["tokens"]).mean()

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | Total]:
        losses = self._per_token(model, batch["tokens"])
        return {"loss": losses.mean(dim=1), "tokens": Total(torch.tensor(losses.numel()))}

    def _per_token(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        scores = model(tokens[:, :-1])
        return functional.cross_entropy(scores.transpose(1, 2), tokens[:, 1:], reduction="none")


class _Recurrent(nn.Module):
    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, 8)
        self.recurrent = nn.GRU(8, 16, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, num_tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.recurrent(self.embedding(tokens))
        scores: torch.Tensor = self.head(self.dropout(hidden))
        return scores
