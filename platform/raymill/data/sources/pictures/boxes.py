"""Pictures with boxes around what is on them: of Pascal VOC, with a file of XML for each, or of COCO, with one of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import PurePosixPath
from typing import Any, TypeAlias
from xml.etree import ElementTree

import numpy as np

from raymill.data.rows import BAD
from raymill.data.sources.pictures.decode import picture_size
from raymill.data.sources.pictures.samples import (
    Groups,
    Sample,
    empty_files,
    fragments_of,
    grouped,
    pictures_of,
    read_fragment,
)
from raymill.errors import DataError, InputError, Problem, did_you_mean
from raymill.storage.find import place_of
from raymill.storage.place import Place, files_of, in_parallel, where
from raymill.task import Field, Fragment, Rows, Schema

MOST_XML_BYTES = 16 * 2**20
"""Of the annotations of a picture."""

Boxes: TypeAlias = list[tuple[str, float, float, float, float]]
"""Class, left, top, right and bottom of each box of a picture."""

SCHEMA: Schema = {
    "image": Field("bytes"),
    "boxes": Field("float32", (None, 4)),
    "labels": Field("int64", (None,)),
    "path": Field("text"),
}


@dataclass(frozen=True)
class VocSource:
    """Pictures with their boxes in files NAME.xml of Pascal VOC, beside them or in other folders.

    The columns: "image", the file's bytes; "boxes", float32 [num_boxes, 4] as left, top, right, bottom in pixels, as they are
    written; "labels", int64 [num_boxes]; "path". A row with a box that is empty or reaches out of its picture is bad, and one
    whose file of boxes is damaged.

    Attributes:
        folder: holds both kinds of files, at any depth. Each picture has its file of boxes, with or without any in it.
        classes: their names, in the order of the labels; None: those that occur; every file is read for that.
    """

    folder: str
    classes: tuple[str, ...] | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes by label.

        Raises:
            InputError: there are no boxes.
        """
        return self.classes if self.classes is not None else _classes_of(self.folder)

    @property
    def schema(self) -> Schema:
        """The columns, as the pipeline's schema."""
        return SCHEMA

    def fragments(self) -> Sequence[Fragment]:
        """List the pictures.

        Raises:
            InputError: there are none; one has no file of boxes, or two that could be its, is empty or leads elsewhere.
        """
        return fragments_of(_listed_voc(self.folder))

    def read(self, fragment: Fragment) -> Rows:
        """The pictures of a fragment, with their boxes.

        Raises:
            DataError: a file is gone, or was changed.
        """
        place = place_of(self.folder)
        samples, found = read_fragment(fragment, place, _listed_voc, self.folder)
        told: list[Boxes | str] = []
        for (_, annotation), (_, content) in zip(samples, found, strict=True):
            try:
                told.append(boxes_of_voc(content, where(place, annotation.name)))
            except DataError as error:
                told.append(str(error))
        return _rows(place, samples, [image for image, _ in found], told, self.names)


@dataclass(frozen=True)
class CocoSource:
    """Pictures whose boxes are listed in a file of COCO; columns as of `VocSource`.

    Attributes:
        folder: holds the pictures.
        annotations: the file of JSON, inside the folder, with "images", "annotations" and "categories".
        pictures: the folder inside it that the names in the file begin from; "" for itself.
        crowds: take boxes around crowds as well (`iscrowd`).
    """

    folder: str
    annotations: str
    pictures: str = ""
    crowds: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The classes by label, in the order of their numbers in the file."""
        return _read_coco_once(self.folder, self.annotations, self.crowds)[0]

    @property
    def schema(self) -> Schema:
        """The columns, as the pipeline's schema."""
        return SCHEMA

    def fragments(self) -> Sequence[Fragment]:
        """List the pictures that the file names.

        Raises:
            InputError: the file is none of COCO; a picture is missing, named twice, an empty file, or its name leads elsewhere.
        """
        _, boxes = _read_coco(self.folder, self.annotations, self.crowds)
        return fragments_of(_grouped_coco(self.folder, self.annotations, self.pictures, boxes), partial(self._known, boxes))

    def read(self, fragment: Fragment) -> Rows:
        """The pictures of a fragment, with their boxes.

        Raises:
            DataError: a picture is gone, or it or its boxes were changed.
        """
        names, boxes = _read_coco_once(self.folder, self.annotations, self.crowds)
        place = place_of(self.folder)
        named = (self.folder, self.annotations, self.pictures, self.crowds)
        samples, found = read_fragment(fragment, place, _listed_coco, *named, known=partial(self._known, boxes))
        told: list[Boxes | str] = [boxes[_told_as(self.pictures, picture.name)] for [picture] in samples]
        return _rows(place, samples, [image for [image] in found], told, names)

    def _known(self, boxes: Mapping[str, Boxes], samples: Sequence[Sample]) -> object:
        return [boxes[_told_as(self.pictures, picture.name)] for [picture] in samples]


# ---------------------------------------------------------------- rows


def _rows(
    place: Place, samples: Sequence[Sample], images: Sequence[bytes], told: Sequence[Boxes | str], names: Sequence[str]
) -> Rows:
    """Rows of pictures and their boxes; in place of these, why there are none."""
    paths = [sample[0].name for sample in samples]
    labels, boxes, bad = [], [], []
    for path, image, found in zip(paths, images, told, strict=True):
        reason = found if isinstance(found, str) else _unfit(image, found, where(place, path), names)
        known = [] if reason or isinstance(found, str) else found
        bad.append(reason)
        labels.append(np.array([names.index(name) for name, *_ in known], np.int64))
        boxes.append(np.array([corners for _, *corners in known], np.float32).reshape(-1, 4))
    rows: Rows = {"image": list(images), "boxes": boxes, "labels": labels, "path": paths}
    return {**rows, BAD: bad} if any(bad) else rows


def _unfit(image: bytes, boxes: Boxes, path: str, names: Sequence[str]) -> str:
    """Why boxes do not go with their picture; "" where they do."""
    try:
        height, width = picture_size(image, path)
    except DataError as error:
        return str(error)
    for number, (name, left, top, right, bottom) in enumerate(boxes):
        box = f"{path}: box {number} ({name}: {left:g}, {top:g}, {right:g}, {bottom:g})"
        if name not in names:
            return f"{box} is of no class. {did_you_mean(name, names)}"
        if not (left < right and top < bottom):
            return f"{box} is empty: left, top, right, bottom are expected. Correct or delete it."
        if left < 0 or top < 0 or right > width or bottom > height:
            return f"{box} reaches out of the picture, which has {width} x {height} pixels. Correct it."
    return ""


# ---------------------------------------------------------------- Pascal VOC


def _listed_voc(folder: str) -> Groups:
    place = place_of(folder)
    annotations: dict[str, list[Any]] = {}
    for one in files_of(place, "**/*.xml", "files of boxes"):
        annotations.setdefault(PurePosixPath(one.name).stem, []).append(one)
    samples, problems = [], []
    for picture in pictures_of(place, "**/*"):
        path = PurePosixPath(picture.name)
        named = annotations.get(path.stem, [])
        beside = [one for one in named if PurePosixPath(one.name).parent == path.parent] or named
        if len(beside) == 1:
            samples.append((picture, beside[0]))
            continue
        found = " and ".join(one.name for one in beside) or f"no file {path.stem}.xml"
        fix = "Add one without boxes if none are on it, or move the picture away." if not beside else "Keep the one beside it."
        problems.append(Problem(where(place, picture.name), found, "one file with its boxes", fix))
    groups = grouped(samples)
    problems += empty_files(place, groups)
    if problems:
        raise InputError(problems)
    return groups


@lru_cache(maxsize=4)
def _classes_of(folder: str) -> tuple[str, ...]:
    place = place_of(folder)

    def classes_in(name: str) -> set[str]:
        try:
            return {box[0] for box in boxes_of_voc(place.read(name), where(place, name))}
        except (OSError, DataError):
            return set()  # What is wrong with it is said where its row is read.

    names = [one.name for one in files_of(place, "**/*.xml", "files of boxes")]
    found = sorted(set().union(*in_parallel(place, classes_in, names)))
    if not found:
        raise InputError([Problem(folder, "no boxes in any file", "files of Pascal VOC with boxes", "Name another folder.")])
    return tuple(found)


def boxes_of_voc(content: bytes, name: str) -> Boxes:
    """The boxes in a file of Pascal VOC; `name` is for messages.

    Raises:
        DataError: it is none, or would have to be expanded.
    """
    if len(content) > MOST_XML_BYTES:
        raise DataError(f"{name}: {len(content)} bytes are more than {MOST_XML_BYTES}. Leave the picture out.")
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise DataError(f"{name}: declares entities, which files of boxes do not need. Delete the declaration.")
    try:
        root = ElementTree.fromstring(content)
        return [_box_of_xml(one) for one in root.iter("object")]
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{name}: is no file of Pascal VOC: {error}. Restore it.") from error


def _box_of_xml(one: ElementTree.Element) -> tuple[str, float, float, float, float]:
    name, corners = one.findtext("name"), [one.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    if not name or None in corners:
        raise ValueError("an object without name, or without xmin, ymin, xmax and ymax")
    left, top, right, bottom = (float(value or "") for value in corners)
    return name, left, top, right, bottom


# ---------------------------------------------------------------- COCO


def _read_coco(folder: str, annotations: str, crowds: bool = False) -> tuple[tuple[str, ...], Mapping[str, Boxes]]:
    """The classes by label, and name of a picture -> its boxes.

    Raises:
        InputError: the file cannot be read or is none of COCO.
    """
    place = place_of(folder)
    source = where(place, annotations)
    try:
        told = json.loads(place.read(annotations))
        categories = {int(one["id"]): str(one["name"]) for one in sorted(told["categories"], key=lambda one: int(one["id"]))}
        pictures = {int(one["id"]): str(one["file_name"]) for one in told["images"]}
        boxes: dict[str, Boxes] = {name: [] for name in pictures.values()}
        for one in told["annotations"]:
            left, top, width, height = map(float, one["bbox"])
            box = (categories[int(one["category_id"])], left, top, left + width, top + height)
            if crowds or not one.get("iscrowd", 0):
                boxes[pictures[int(one["image_id"])]].append(box)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        said = f"no such number or name: {error}" if isinstance(error, LookupError) else str(error)
        fix = "Name the file that holds images, annotations with bbox, and categories."
        raise InputError([Problem(source, said, "a file of COCO", fix)]) from error
    if len(boxes) < len(pictures):
        raise InputError([Problem(source, "a picture that is named twice", "each once", "Delete one of them.")])
    return tuple(categories.values()), boxes


_read_coco_once = lru_cache(maxsize=4)(_read_coco)


def _listed_coco(folder: str, annotations: str, pictures: str, crowds: bool) -> Groups:
    return _grouped_coco(folder, annotations, pictures, _read_coco_once(folder, annotations, crowds)[1])


def _grouped_coco(folder: str, annotations: str, pictures: str, boxes: Mapping[str, Boxes]) -> Groups:
    place, prefix = place_of(folder), f"{pictures}/" if pictures else ""
    there = {_told_as(pictures, one.name): one for one in pictures_of(place, f"{prefix}**/*")}
    missing = [where(place, prefix + name) for name in sorted(boxes.keys() - there.keys())]
    groups = grouped([(there[name],) for name in boxes if name in there])
    expected, fix = (
        f"what {where(place, annotations)} names",
        "Restore it, or correct `pictures`, the folder that the names begin from.",
    )
    problems = [Problem(path, "no such picture", expected, fix) for path in missing] + empty_files(place, groups)
    if problems:
        raise InputError(problems)
    return groups


def _told_as(pictures: str, name: str) -> str:
    """What the file of COCO calls a picture of the place."""
    return name.removeprefix(f"{pictures}/") if pictures else name
