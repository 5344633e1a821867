"""Nuclei of cells under a microscope: one real picture of 512 x 512 pixels, in which each of 125 nuclei was outlined.

It comes with StarDist (Schmidt et al., "Cell Detection with Star-Convex Polygons", 2018), BSD-3-Clause. The left 352 columns are
trained on, the other 160 are not.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.augment import stacked, with_masks
from pipelines.packages import Package, fetched_once, package_files
from raymill.data.sources import MaskSource, decode_images, decode_masks
from raymill.paths import data_folder, home
from raymill.task import Pipeline, Rows

PACKAGE = Package("stardist", "0.9.2")
PICTURE, MASK = "stardist/data/images/img2d.tif", "stardist/data/images/mask2d.tif"
SHA256_OF = {
    PICTURE: "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750",
    MASK: "59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f",
}
TILE = 128
TILES = {
    "train": [(top, left, TILE) for top in range(0, 385, 48) for left in range(0, 225, 56)],
    "validation": [(top, 352, 160) for top in range(0, 512, TILE)],
}
"""Split -> top, left and width of each tile; those to train on overlap."""


def nuclei(root: str | None = None) -> Pipeline:
    """45 tiles of 128 x 128 pixels to train, which overlap, are turned and flipped; 4 of 128 x 160 of another region to validate.

    A batch has `image`, float32 [num_rows, 1, 128, width] from 0 to 1; `mask`, int64 [num_rows, 128, width], 1 in a
    nucleus; `path`.

    Args:
        root: the folder; None: the project's own, filled by `raymill data get`.
    """
    folder = Path(root) if root is not None else data_folder("nuclei")
    sources = {split: MaskSource(str(folder / "tiles" / split)) for split in TILES}
    return Pipeline(
        sources=sources,
        schema=sources["train"].schema,
        transform=decode_and_turn,
        get=partial(get_nuclei, folder),
        targets=["mask"],
    )


def decode_and_turn(rows: Rows, split: str, generator: np.random.Generator) -> Rows:
    """Pixels and masks; those to train on are turned, flipped and made brighter or darker at random, both alike."""
    from torchvision.transforms import v2

    images = decode_images(rows["image"], mode="L", names=rows.get("path"))
    if "mask" not in rows:
        return {**rows, "image": stacked([image[None].astype(np.float32) / 255 for image in images])}
    masks = [(mask > 0).astype(np.int64) for mask in decode_masks(rows["mask"], names=rows.get("path"))]
    turned = [v2.RandomChoice([v2.RandomRotation((angle, angle)) for angle in (0, 90, 180, 270)]), v2.RandomHorizontalFlip()]
    move = v2.Compose([*turned, v2.ColorJitter(brightness=0.3, contrast=0.3)] if split == "train" else [v2.Identity()])
    moved = with_masks(move, {**rows, "image": list(images), "mask": masks})
    return {**moved, "image": np.asarray(moved["image"], np.float32) / 255}


def get_nuclei(folder: Path) -> Path:
    """Fetch the picture and cut it into `tiles/`, where that is not done yet.

    Raises:
        DataError: the registry does not answer or serves other files.
    """
    fetched_once(folder, "tiles", _make_tiles)
    return folder


def _make_tiles(stage: Path) -> None:
    found = package_files(PACKAGE, SHA256_OF, home() / "cache")
    pixels, mask = (np.asarray(Image.open(io.BytesIO(found[name]))).astype(np.uint8) for name in (PICTURE, MASK))
    for split, tiles in TILES.items():
        for part in ("images", "masks"):
            (stage / split / part).mkdir(parents=True)
        for number, (top, left, width) in enumerate(tiles):
            place = slice(top, top + TILE), slice(left, left + width)
            Image.fromarray(pixels[place]).save(stage / split / "images" / f"{number:02d}.png")
            Image.fromarray(mask[place]).save(stage / split / "masks" / f"{number:02d}.png")
