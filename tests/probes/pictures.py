"""Small pictures as files, by class, in tar files, with boxes or masks; decoded, and mirrored at random, in chunks."""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from raymill.data.sources import (
    ArrowSource,
    CocoSource,
    ImageFolderSource,
    JsonLinesSource,
    MaskSource,
    TarSource,
    VocSource,
    decode_images,
    decode_masks,
    split_by_share,
)
from raymill.task import Pipeline, Rows, Source, Task

CLASSES = ("bright", "dark")
NUM_PICTURES = 60

VALUES: dict[str, Any] = {
    "optimizer": {"kind": "SGD", "lr": 0.02, "momentum": 0.9},
    "loop": {"epochs": 4, "global_batch_rows": 6, "seed": 2, "window_rows": 20},
}


def make() -> list[tuple[str, int, bytes]]:
    """Name, label and content of each."""
    generator = np.random.default_rng(0)
    found = []
    for number in range(NUM_PICTURES):
        label = number % 2
        pixels = generator.integers(0, 90, (10, 12, 3)) + (160 if CLASSES[label] == "bright" else 0)
        content = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(content, "PNG")
        found.append((f"{number:03d}", label, content.getvalue()))
    return found


def write_folders(folder: Path) -> None:
    """As an image folder."""
    for name, label, content in make():
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (folder / CLASSES[label] / f"{name}.png").write_bytes(content)


def write_tar(folder: Path) -> None:
    """As three tar files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(3):
        with tarfile.open(folder / f"{part}.tar", "w") as archive:
            for name, label, content in make()[part::3]:
                for extension, data in (("png", content), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{name}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def write_lines(folder: Path) -> None:
    """As JSON Lines of their mean colours, in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        rows = [
            {"label": label, "image": np.asarray(Image.open(io.BytesIO(content)).resize((8, 8)))[..., 0].tolist()}
            for _, label, content in make()[part::2]
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(folder: Path) -> None:
    """As CSV of their sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{name},{label},{len(content)}" for name, label, content in make()]
    (folder / "sizes.csv").write_text("\n".join(["name,label,size", *lines]) + "\n")


def decode(rows: Rows, split: str, generator: np.random.Generator, image: str = "image") -> Rows:
    """Pixels [num_rows, 3, 8, 8]; half of the training pictures are mirrored."""
    if isinstance(rows[image][0], bytes):
        pixels = np.asarray(decode_images(rows[image], size=(8, 8)))
    else:
        pixels = np.stack([np.stack([one] * 3, axis=-1) for one in rows[image]])
    pixels = np.moveaxis(pixels, 3, 1) / np.float32(255)
    if split == "train":
        mirrored = generator.random(len(pixels)) < 0.5
        pixels[mirrored] = pixels[mirrored, :, :, ::-1]
    return {"image": np.ascontiguousarray(pixels, np.float32), "label": label_of(rows)}


def label_of(rows: Rows) -> np.ndarray:
    """As it stands, of the first box, or of the mask."""
    if "labels" in rows:
        return np.array([labels[0] for labels in rows["labels"]])
    return np.asarray(rows["label"]) if "label" in rows else np.asarray(decode_masks(rows["mask"], (1, 1)))[:, 0, 0]


def pipeline(source: Source, image: str = "image") -> Pipeline:
    """Of any of them."""
    stratify = "label" if "label" in source.schema else None  # type: ignore[attr-defined]
    splits = split_by_share(source, {"train": 0.8, "validation": 0.2}, stratify=stratify)
    return Pipeline(sources=splits, schema=source.schema, transform=partial(decode, image=image))  # type: ignore[attr-defined]


def folders(folder: str) -> Pipeline:
    """Of an image folder."""
    return pipeline(ImageFolderSource(folder))


def tars(folder: str) -> Pipeline:
    """Of tar files."""
    return pipeline(TarSource(folder, {"image": "png", "label": "cls"}, classes=2))


def lines(folder: str) -> Pipeline:
    """Of JSON Lines."""
    return pipeline(JsonLinesSource.inferred(folder))


def write_voc(folder: Path) -> None:
    """With a box in a file of XML beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, label, content in make():
        (folder / f"{name}.png").write_bytes(content)
        corners = "".join(f"<{side}>{at}</{side}>" for side, at in (("xmin", 1), ("ymin", 2), ("xmax", 12), ("ymax", 9)))
        box = f"<object><name>{CLASSES[label]}</name><bndbox>{corners}</bndbox></object>"
        (folder / f"{name}.xml").write_text(f"<annotation><filename>{name}.png</filename>{box}</annotation>")


def write_coco(folder: Path) -> None:
    """With all boxes in a file of JSON."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    pictures, boxes = [], []
    for number, (name, label, content) in enumerate(make()):
        (folder / "pictures" / f"{name}.png").write_bytes(content)
        pictures.append({"id": number, "file_name": f"{name}.png"})
        boxes.append({"id": number, "image_id": number, "category_id": 7 + label, "bbox": [1, 2, 11, 7]})
    categories = [{"id": 7 + label, "name": name} for label, name in enumerate(CLASSES)]
    told = {"images": pictures, "annotations": boxes, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(told))


def write_masks(folder: Path) -> None:
    """With a mask for each, all of whose pixels are the label."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, label, content in make():
        (folder / "images" / f"{name}.png").write_bytes(content)
        Image.new("L", (12, 10), label).save(folder / "masks" / f"{name}.png")


def voc(folder: str) -> Pipeline:
    """Of Pascal VOC."""
    return pipeline(VocSource(folder, CLASSES))


def coco(folder: str) -> Pipeline:
    """Of COCO."""
    return pipeline(CocoSource(folder, "boxes.json", "pictures"))


def masks(folder: str) -> Pipeline:
    """Of masks."""
    return pipeline(MaskSource(folder))


def write_arrow(folder: Path) -> None:
    """As Hugging Face keeps them: a stream of small batches in each of two files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        names, labels, contents = zip(*make()[part::2], strict=True)
        table = pa.table({"name": names, "label": labels, "image": [{"bytes": one, "path": None} for one in contents]})
        with pa.ipc.new_stream(folder / f"data-0000{part}-of-00002.arrow", table.schema) as stream:
            stream.write_table(table, max_chunksize=4)


def arrows(folder: str) -> Pipeline:
    """Of Arrow's streams."""
    return pipeline(ArrowSource.inferred(folder, ["image.bytes", "label"]), image="image.bytes")


KINDS = {
    "arrow": (write_arrow, arrows),
    "voc": (write_voc, voc),
    "coco": (write_coco, coco),
    "masks": (write_masks, masks),
    "folders": (write_folders, folders),
    "tar": (write_tar, tars),
    "lines": (write_lines, lines),
}


def made(kind: str, folder: Path) -> partial[Pipeline]:
    """The files of a kind, written, and what makes their pipeline."""
    write, make_pipeline = KINDS[kind]
    write(folder)
    return partial(make_pipeline, str(folder))


class Brightness(Task):
    """Tells the class."""

    def build(self) -> nn.Module:
        norm = nn.BatchNorm2d(4, momentum=0.5)
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * 36, 2))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["image"]), batch["label"])

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"accuracy": (model(batch["image"]).argmax(1) == batch["label"]).float()}
