"""Models whose graph cannot be exported, as they are asked: boxes in pictures of any size, and a word for a text."""

from __future__ import annotations

import re
import zlib
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from raymill.data.sources import ArraySource
from raymill.task import PREDICT, Field, Pipeline, Rows, Task

# ---------------------------------------------------------------- boxes in a picture


def make_pictures(count: int, seed: int) -> Rows:
    """Grey pictures as bytes (height, width, pixels), each with a bright box [4]: top, left, bottom, right."""
    generator = np.random.default_rng(seed)
    pictures, boxes = [], []
    for _ in range(count):
        height, width = (int(extent) for extent in generator.integers(8, 17, 2))
        pixels = generator.integers(0, 40, (height, width), np.uint8)
        top, left = int(generator.integers(0, height - 4)), int(generator.integers(0, width - 4))
        pixels[top : top + 3, left : left + 4] = 220
        pictures.append(bytes([height, width]) + pixels.tobytes())
        boxes.append((top, left, top + 3, left + 4))
    return {"picture": pictures, "box": np.array(boxes, np.float32)}


def decode(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    """Bytes to pixels in 0..1; half of the training pictures are mirrored, with their boxes."""
    assert ("box" in rows) == (split != PREDICT)
    images = [np.frombuffer(raw, np.uint8, offset=2).reshape(raw[0], raw[1]).astype(np.float32) / 255 for raw in rows["picture"]]
    changed: Rows = {"image": images}
    if split != PREDICT:
        changed["box"] = np.array(rows["box"])
    if split == "train":
        for place in np.flatnonzero(generator.random(len(images)) < 0.5):
            images[place] = np.ascontiguousarray(images[place][:, ::-1])
            changed["box"][place, [1, 3]] = images[place].shape[1] - changed["box"][place, [3, 1]]
    return changed


def pictures() -> Pipeline:
    sources = {
        split: ArraySource(f"pictures/{split}", partial(make_pictures, count, seed), 16)
        for split, count, seed in (("train", 96, 1), ("validation", 20, 2))
    }
    schema = {"picture": Field("bytes"), "box": Field("float32", (4,))}
    return Pipeline(sources=sources, schema=schema, transform=decode, targets=["box"])


class Finder(Task):
    """A score per pixel; what is bright is boxed. How many boxes there are hangs on the values, which no graph can tell."""

    def build(self) -> nn.Module:
        return Seeing()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return self._losses(model, batch).mean()

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": self._losses(model, batch)}

    def predict(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        found = [model(image) for image in batch["image"]]
        return {
            "boxes": found,
            "best": torch.stack([boxes[0] if len(boxes) else torch.zeros(4) for boxes in found]),
            "said": [f"{len(boxes)} boxes" for boxes in found],
        }

    def inputs(self, batch: Any) -> tuple[torch.Tensor, ...]:
        return (batch["image"][0],)

    def _losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        losses = []
        for image, box in zip(batch["image"], batch["box"], strict=True):
            truth = torch.zeros_like(image)
            top, left, bottom, right = box.long().tolist()
            truth[top:bottom, left:right] = 1
            losses.append(functional.binary_cross_entropy_with_logits(model.scores(image), truth))
        return torch.stack(losses)


class Seeing(nn.Module):
    """Of a picture [height, width], the boxes [num_boxes, 4] around rows that hold something bright."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def scores(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.net(image[None, None])[0, 0]
        return scores

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        inside = self.scores(image) > 0
        found = []
        while inside.any():
            top, left = torch.nonzero(inside)[0]
            bottom, right = top, left
            while bottom < len(inside) and inside[bottom, left]:
                bottom = bottom + 1
            while right < inside.shape[1] and inside[top, right]:
                right = right + 1
            inside[top:bottom, left:right] = False
            found.append(torch.stack([top, left, bottom, right]).float())
        return torch.stack(found) if found else torch.zeros(0, 4)


# ---------------------------------------------------------------- a word for a text

NUM_BUCKETS = 64
MOODS = ("glad", "sad")
WORDS = (("joy", "sun", "laugh", "warm"), ("rain", "tears", "cold", "grief"))


def make_texts(count: int, seed: int) -> Rows:
    """Sentences of 1 to 9 words that are glad or sad."""
    generator = np.random.default_rng(seed)
    moods = generator.integers(0, 2, count)
    texts = [" ".join(generator.choice(WORDS[mood], generator.integers(1, 10))) for mood in moods]
    return {"text": texts, "mood": moods.astype(np.int64)}


def collate(rows: Rows) -> dict[str, Any]:
    """Texts to numbers of words, padded to the longest."""
    numbers = [
        torch.tensor([zlib.crc32(word.encode()) % NUM_BUCKETS for word in re.findall(r"\w+", text)]) for text in rows["text"]
    ]
    batch = {"words": pad_sequence(numbers, batch_first=True), "lengths": torch.tensor([len(one) for one in numbers])}
    return {**batch, "mood": torch.tensor(rows["mood"])} if "mood" in rows else batch


def texts() -> Pipeline:
    sources = {
        split: ArraySource(f"texts/{split}", partial(make_texts, count, seed), 32)
        for split, count, seed in (("train", 192, 1), ("validation", 40, 2))
    }
    schema = {"text": Field("text"), "mood": Field("int64", classes=2)}
    return Pipeline(sources=sources, schema=schema, collate=collate, targets=["mood"])


class Mood(Task):
    """An LSTM over words, packed by their true lengths. It has no `inputs`, so it is never exported."""

    def build(self) -> nn.Module:
        return Reading()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["words"], batch["lengths"]), batch["mood"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        scores = model(batch["words"], batch["lengths"])
        return {"accuracy": (scores.argmax(dim=1) == batch["mood"]).float()}

    def predict(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        shares = model(batch["words"], batch["lengths"]).softmax(dim=1)
        return {"mood": [MOODS[number] for number in shares.argmax(dim=1)], "share": shares.amax(dim=1)}


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BUCKETS, 8)
        self.recurrent = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 2)

    def forward(self, words: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.embedding(words), lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.recurrent(packed)
        scores: torch.Tensor = self.head(last[0])
        return scores
