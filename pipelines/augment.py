"""Pictures moved at random together with their boxes and masks, by torchvision's transforms.

They draw from torch's own generator, which is seeded before each window, so that a run that was killed draws the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from raymill.task import Rows


def with_boxes(move: Callable[..., Any], rows: Rows) -> Rows:
    """Move pictures and boxes alike; a box of which nothing is left goes, and its label.

    Args:
        move: a transform of torchvision's v2.
        rows: "image", uint8 [height, width, 3] each; "boxes", float32 [num_boxes, 4] as left, top, right, bottom; "labels".

    Returns:
        the rows with "image" uint8 [3, height, width], boxes and labels changed.
    """
    import torch
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    whole = v2.Compose([move, v2.SanitizeBoundingBoxes(min_size=3)])
    images, boxes, labels = [], [], []
    for pixels, corners, known in zip(rows["image"], rows["boxes"], rows["labels"], strict=True):
        image = tv_tensors.Image(torch.tensor(pixels).permute(2, 0, 1))
        box = tv_tensors.BoundingBoxes(torch.tensor(corners), format="XYXY", canvas_size=tuple(image.shape[-2:]))
        moved = whole({"image": image, "boxes": box, "labels": torch.tensor(known)})
        images.append(np.ascontiguousarray(moved["image"].numpy()))
        boxes.append(moved["boxes"].numpy().astype(np.float32).reshape(-1, 4))
        labels.append(moved["labels"].numpy().astype(np.int64))
    return {**rows, "image": stacked(images), "boxes": boxes, "labels": labels}


def with_masks(move: Callable[..., Any], rows: Rows) -> Rows:
    """Move pictures, uint8 [height, width, 3] or [height, width] each, and "mask", int64 [height, width], alike.

    Returns:
        the rows with "image" uint8 [channels, height, width] and "mask" changed.
    """
    import torch
    from torchvision import tv_tensors

    images, masks = [], []
    for pixels, numbers in zip(rows["image"], rows["mask"], strict=True):
        channels = torch.tensor(pixels)[None] if pixels.ndim == 2 else torch.tensor(pixels).permute(2, 0, 1)
        image, mask = move(tv_tensors.Image(channels), tv_tensors.Mask(torch.tensor(numbers)))
        images.append(np.ascontiguousarray(image.numpy()))
        masks.append(np.ascontiguousarray(mask.numpy()))
    return {**rows, "image": stacked(images), "mask": stacked(masks)}


def stacked(arrays: Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    """One array where all are of one shape."""
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else list(arrays)
