"""Pixels of pictures and masks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from raymill.errors import DataError
from raymill.task import Column, Rows

if TYPE_CHECKING:
    from PIL.Image import Image as OpenImage

MOST_PIXELS = 2**26
"""Of a picture, 8192 x 8192; a file of some bytes may claim far more, for which memory would be set aside."""


def decode_images(
    files: Column, size: tuple[int, int] | None = None, mode: str = "RGB", names: Column | None = None
) -> list[np.ndarray] | np.ndarray:
    """The pixels of pictures.

    Args:
        files: their bytes.
        size: height and width that each is resized to; None: as they are.
        mode: of Pillow: "RGB", or "L" for grey.
        names: for messages.

    Returns:
        uint8 [num_rows, height, width, 3], without the last axis for grey; of pictures as they are, a list of such.

    Raises:
        DataError: one is damaged, cut short, or claims more than 8192 x 8192 pixels.
    """
    from PIL import Image

    found = []
    for number, content in enumerate(files):
        with _opened(content, names[number] if names is not None else f"picture {number}") as image:
            # Pillow copies a picture that it need not change.
            pixels = image if image.mode == mode else image.convert(mode)
            if size is not None and pixels.size != size[::-1]:
                pixels = pixels.resize(size[::-1], Image.Resampling.BILINEAR)
            found.append(np.asarray(pixels))
    return found if size is None else np.stack(found)


def decode_masks(
    files: Column, size: tuple[int, int] | None = None, names: Column | None = None
) -> list[np.ndarray] | np.ndarray:
    """The numbers in masks: a class or an object for each pixel, as grey of 8 or 16 bits or as places in a palette.

    Args:
        files: their bytes.
        size: height and width that each is resized to, to the nearest pixel; None: as they are.
        names: for messages.

    Returns:
        int64 [num_rows, height, width]; of masks as they are, a list of such.

    Raises:
        DataError: one is damaged, too large, or in colour without a palette.
    """
    from PIL import Image

    found = []
    for number, content in enumerate(files):
        name = names[number] if names is not None else f"mask {number}"
        with _opened(content, name) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16", "I;16L", "I;16B"):
                raise DataError(f"{name}: a mask of mode {image.mode!r}, in which a pixel is no number. Write it in grey.")
            sized = image if size is None else image.resize(size[::-1], Image.Resampling.NEAREST)
            found.append(np.asarray(sized).astype(np.int64))
    return found if size is None else np.stack(found)


def picture_size(content: bytes, name: str) -> tuple[int, int]:
    """Height and width as the file's head says, without reading its pixels.

    Raises:
        DataError: it is no picture, or claims more than 8192 x 8192 pixels.
    """
    with _opened(content, name) as image:
        return image.height, image.width


def broken_pictures(rows: Rows, column: str = "image") -> dict[int, str]:
    """A pipeline's `check`: which pictures cannot be decoded, and why. Each is decoded once more for that."""
    found = {}
    for number, content in enumerate(rows[column]):
        try:
            decode_images([content], names=[column])
        except DataError as error:
            found[number] = str(error)
    return found


@contextmanager
def _opened(content: bytes, name: str) -> Iterator[OpenImage]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{name}: {image.width} x {image.height} pixels are more than {MOST_PIXELS}. Leave it out.")
            yield image
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: is no whole picture: {error}. Restore or delete it.") from error
