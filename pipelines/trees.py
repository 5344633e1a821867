"""Trees from above: real pictures taken from aeroplanes, with a box drawn by hand around the crown of each tree.

They come with DeepForest (Weinstein et al., "DeepForest: A Python package for RGB deep learning tree crown delineation", 2020),
under MIT: two pictures of Yellowstone, one of 2299 x 2472 pixels with 574 boxes to train on, and one of 1249 x 1035 with 279.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from pipelines.augment import with_boxes
from pipelines.packages import Package, fetched_once, package_files
from pipelines.pretrained import get_lite0
from raymill.data.sources import ImageFolderSource, VocSource, decode_images
from raymill.data.sources.pictures.boxes import boxes_of_voc
from raymill.paths import data_folder, home
from raymill.task import Pipeline, Rows

PACKAGE = Package("deepforest", "2.1.0")


@dataclass(frozen=True)
class Photograph:
    """A picture of the package.

    Attributes:
        name: of its files, without suffix.
        picture_sha256, boxes_sha256: of the picture, and of the file with its boxes.
        grid: in how many rows and columns it is cut.
    """

    name: str
    picture_sha256: str
    boxes_sha256: str
    grid: tuple[int, int]


PHOTOGRAPHS = {
    "train": Photograph(
        "deepforest/data/2019_YELL_2_528000_4978000_image_crop2",
        "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
        "bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11",
        (6, 6),
    ),
    "validation": Photograph(
        "deepforest/data/2019_YELL_2_541000_4977000_image_crop",
        "178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131",
        "cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631",
        (3, 3),
    ),
}
CROP_SEED = 574


# ---------------------------------------------------------------- pictures with boxes


def tree_boxes(root: str | None = None, crop: int = 256) -> Pipeline:
    """36 pictures of about 380 x 410 pixels to train, a part of each at random, flipped; 9 of another place to validate.

    A batch has `image`, uint8 [num_rows, 3, height, width]; `boxes`, a list of float32 [num_boxes, 4] as left, top, right,
    bottom; `labels`, a list of int64 [num_boxes], all 0; `path`.

    Args:
        root: the folder; None: the project's own, filled by `raymill data get`.
        crop: pixels of a side of the part that is trained on.
    """
    folder = Path(root) if root is not None else data_folder("trees")
    sources = {split: VocSource(str(folder / "tiles" / split), ("Tree",)) for split in PHOTOGRAPHS}
    return Pipeline(
        sources=sources,
        schema=sources["train"].schema,
        transform=partial(decode_and_move, crop=crop),
        get=partial(get_trees_and_weights, folder),
        targets=["boxes", "labels"],
    )


def decode_and_move(rows: Rows, split: str, generator: np.random.Generator, crop: int) -> Rows:
    """Pixels of the pictures; those to train on cut and flipped, with their boxes."""
    from torchvision.transforms import v2

    images = decode_images(rows["image"], names=rows.get("path"))
    if split != "train":
        return {**rows, "image": [np.ascontiguousarray(np.moveaxis(image, 2, 0)) for image in images]}
    placed = [v2.RandomCrop(crop, pad_if_needed=True), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    # Another place has another light.
    lit = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)
    return with_boxes(v2.Compose([*placed, lit]), {**rows, "image": list(images)})


# ---------------------------------------------------------------- pictures of one tree, or of none


def tree_crops(root: str | None = None, size: int = 96) -> Pipeline:
    """1,148 small pictures, half of them of a tree, to train; 558 of another place to validate.

    A batch has `image`, float32 [num_rows, 3, size, size] from -1 to 1; `label`, int64 [num_rows], 1 for a tree; `path`.

    Args:
        root: as of `tree_boxes`.
        size: pixels of a side.
    """
    folder = Path(root) if root is not None else data_folder("trees")
    sources = {split: ImageFolderSource(str(folder / "crops" / split), ("no_tree", "tree")) for split in PHOTOGRAPHS}
    return Pipeline(
        sources=sources,
        schema=sources["train"].schema,
        transform=partial(decode_and_scale, size=size),
        get=partial(get_trees_and_weights, folder),
        targets=["label"],
    )


def decode_and_scale(rows: Rows, split: str, generator: np.random.Generator, size: int) -> Rows:
    """Pixels from -1 to 1; those to train on are turned and mirrored at random, as a picture from above may be."""
    pixels = np.asarray(decode_images(rows["image"], (size, size), names=rows.get("path")))
    if split == "train":
        turns, mirrored = generator.integers(0, 4, len(pixels)), generator.random(len(pixels)) < 0.5
        mirror = np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)
        pixels = np.stack([np.rot90(one, turn) for one, turn in zip(mirror, turns, strict=True)])
    return {**rows, "image": np.ascontiguousarray(np.moveaxis(pixels, 3, 1), np.float32) / 127.5 - 1}


# ---------------------------------------------------------------- fetched, and cut to pieces


def get_trees(folder: Path) -> Path:
    """Fetch both pictures, and cut them into `tiles/` with boxes and `crops/` by class, where that is not done yet.

    Raises:
        DataError: the registry does not answer or serves other files.
    """
    fetched_once(folder, "tiles", _make_tiles)
    fetched_once(folder, "crops", _make_crops)
    return folder


def get_trees_and_weights(folder: Path) -> Path:
    """As `get_trees`, and the weights of a network to begin with."""
    get_lite0()
    return get_trees(folder)


def _photographs() -> Iterator[tuple[str, tuple[int, int], np.ndarray, np.ndarray]]:
    """Split, grid, pixels [height, width, 3] and boxes [num_boxes, 4] of each."""
    sha256_of: dict[str, str] = {}
    for one in PHOTOGRAPHS.values():
        sha256_of |= {f"{one.name}.png": one.picture_sha256, f"{one.name}.xml": one.boxes_sha256}
    found = package_files(PACKAGE, sha256_of, home() / "cache")
    for split, one in PHOTOGRAPHS.items():
        pixels = np.asarray(Image.open(io.BytesIO(found[f"{one.name}.png"])).convert("RGB"))
        corners = [box for _, *box in boxes_of_voc(found[f"{one.name}.xml"], one.name)]
        yield split, one.grid, pixels, np.array(corners)


def _make_tiles(stage: Path) -> None:
    """Each tile has the boxes whose middle lies in it, cut at its edges."""
    for split, (rows, columns), pixels, boxes in _photographs():
        (stage / split).mkdir()
        height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
        middle, size = (boxes[:, :2] + boxes[:, 2:]) / 2, np.array([width, height])
        for number, (row, column) in enumerate(np.ndindex(rows, columns)):
            corner = np.array([column * width, row * height])
            inside = ((middle >= corner) & (middle < corner + size)).all(axis=1)
            local = np.clip(boxes[inside] - np.tile(corner, 2), 0, np.tile(size, 2))
            tile = pixels[corner[1] : corner[1] + height, corner[0] : corner[0] + width]
            Image.fromarray(tile).save(stage / split / f"{number:02d}.png")
            (stage / split / f"{number:02d}.xml").write_text(_as_voc(f"{number:02d}.png", local))


def _as_voc(name: str, boxes: np.ndarray) -> str:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = name
    for box in boxes:
        one = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(one, "name").text = "Tree"
        bounds = ElementTree.SubElement(one, "bndbox")
        for side, at in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(bounds, side).text = f"{at:g}"
    return ElementTree.tostring(root, encoding="unicode")


def _make_crops(stage: Path) -> None:
    """A square around each tree, and one of the same size where none is."""
    for split, _, pixels, boxes in _photographs():
        generator = np.random.default_rng(CROP_SEED)
        for kind in ("tree", "no_tree"):
            (stage / split / kind).mkdir(parents=True)
        for number, box in enumerate(boxes):
            side = int(max(24, 1.2 * max(box[2:] - box[:2])))
            around = ((box[:2] + box[2:]) / 2 - side / 2).astype(int)
            _save(pixels, around, side, stage / split / "tree" / f"{number:03d}.png")
            _save(pixels, _without_tree(pixels, boxes, side, generator), side, stage / split / "no_tree" / f"{number:03d}.png")


def _without_tree(pixels: np.ndarray, boxes: np.ndarray, side: int, generator: np.random.Generator) -> np.ndarray:
    """Left and top of a square that overlaps no box, as far as a thousand tries find one; else the one that does least."""
    corners = generator.integers(0, [pixels.shape[1] - side, pixels.shape[0] - side], (1000, 2))
    shared = np.minimum(corners[:, None] + side, boxes[None, :, 2:]) - np.maximum(corners[:, None], boxes[None, :, :2])
    found: np.ndarray = corners[shared.clip(0).prod(axis=2).sum(axis=1).argmin()]
    return found


def _save(pixels: np.ndarray, corner: np.ndarray, side: int, path: Path) -> None:
    left, top = np.clip(corner, 0, [pixels.shape[1] - side, pixels.shape[0] - side])
    Image.fromarray(pixels[top : top + side, left : left + side]).save(path)
