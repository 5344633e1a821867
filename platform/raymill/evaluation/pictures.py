"""A picture as the bytes of a PNG file."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from raymill.task import Picture


def as_png(picture: Picture) -> bytes:
    """The file of a picture.

    Raises:
        TypeError, ValueError: it is none; says what was found.
    """
    from matplotlib import image
    from matplotlib.figure import Figure

    file = io.BytesIO()
    if isinstance(picture.value, Figure):
        picture.value.savefig(file, format="png")
    else:
        image.imsave(file, _pixels(picture.value), format="png", cmap="gray", vmin=0, vmax=255)
    return file.getvalue()


def _pixels(value: Any) -> np.ndarray:
    """Pixels as uint8, [height, width] or [height, width, 3]."""
    if isinstance(value, torch.Tensor):
        value = (value.permute(1, 2, 0) if value.ndim == 3 else value).detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "uif":
        raise TypeError(f"a picture of {type(value).__name__}; give a figure of matplotlib, an array or a tensor")
    shape = value.shape
    if value.ndim == 3 and shape[-1] == 1:
        value = value[..., 0]
    if not value.size or value.ndim not in (2, 3) or (value.ndim == 3 and shape[-1] != 3):
        raise ValueError(
            f"a picture of shape {shape}; give [height, width] or [height, width, 3], or a tensor [3, height, width]"
        )
    if value.dtype.kind == "f":
        value = (np.nan_to_num(value).clip(0, 1) * 255).round()
    return np.asarray(value.clip(0, 255), np.uint8)
