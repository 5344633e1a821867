"""Pictures for people."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def grid(images: torch.Tensor, columns: int) -> torch.Tensor:
    """Pictures [num, height, width] from 0 to 1 as one, some in a row: [rows * height, columns * width]."""
    num, height, width = images.shape
    rows = num // columns
    return images[: rows * columns].reshape(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)


def with_boxes(image: torch.Tensor, true: torch.Tensor, seen: torch.Tensor) -> Figure:
    """A picture, uint8 [3, height, width], with what is there in white and what was seen in red: boxes [num, 4 or more]."""
    figure = Figure((4, 4 * image.shape[1] / image.shape[2]), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_axis_off()
    for boxes, colour in ((true, "white"), (seen, "red")):
        for left, top, right, bottom, *_ in boxes.tolist():
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=0.8))
    return figure


def side_by_side(images: Sequence[torch.Tensor], titles: Sequence[str]) -> Figure:
    """Pictures [height, width] with what they are."""
    figure = Figure((2.2 * len(images), 2.4), layout="constrained")
    for axes, image, title in zip(figure.subplots(1, len(images), squeeze=False)[0], images, titles, strict=True):
        axes.imshow(image.numpy(), cmap="gray")
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    return figure


def curve(across: torch.Tensor, up: torch.Tensor, xlabel: str, ylabel: str) -> Figure:
    """A line of points [num] each."""
    figure = Figure((3, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(across.numpy(), up.numpy())
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 1), ylim=(0, 1.02))
    return figure
