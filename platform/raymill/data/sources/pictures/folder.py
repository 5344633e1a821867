"""Pictures in folders, each named after a class. They stay as they are until the transform decodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raymill.data.sources.pictures.samples import (
    Groups,
    Sample,
    empty_files,
    fragments_of,
    grouped,
    pictures_of,
    read_fragment,
)
from raymill.errors import InputError, Problem
from raymill.storage.find import place_of
from raymill.task import Field, Fragment, Rows, Schema


@dataclass(frozen=True)
class ImageFolderSource:
    """The pictures of FOLDER/CLASS/NAME.jpg (or png, bmp, gif, webp, tif): "image", the file's bytes, "label" and "path".

    A fragment is some pictures of all classes, known by names, sizes and times of change. `decode_images` makes pixels of them.

    Attributes:
        folder: holds a folder for each class, and pictures in each, at any depth.
        classes: their names, in the order of the labels; None: those that are there, in the order of their names.
    """

    folder: str
    classes: tuple[str, ...] | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes by label.

        Raises:
            InputError: there is no folder of a class.
        """
        if self.classes is not None:
            return self.classes
        found = place_of(self.folder).folders()
        if not found:
            fix = "Run `raymill data get`, or name the folder that holds a folder for each class."
            raise InputError([Problem(self.folder, "no folders", "a folder for each class", fix)])
        return tuple(found)

    @property
    def schema(self) -> Schema:
        """The columns, as the pipeline's schema."""
        return {"image": Field("bytes"), "label": Field("int64", classes=len(self.names)), "path": Field("text")}

    def fragments(self) -> Sequence[Fragment]:
        """List the pictures.

        Raises:
            InputError: there are none, one lies in no class's folder, or is an empty file or a link that leads elsewhere.
        """
        place, groups = place_of(self.folder), _listed(self.folder)
        problems = empty_files(place, groups)
        strange = sorted({_class_of(sample) for samples in groups for sample in samples} - set(self.names))
        expected, fix = f"a folder of one of the classes {', '.join(self.names)}", "Name it, or move it away."
        problems += [Problem(f"{self.folder}/{name}", "no class", expected, fix) for name in strange]
        if problems:
            raise InputError(problems)
        return fragments_of(groups)

    def read(self, fragment: Fragment) -> Rows:
        """The files of a fragment.

        Raises:
            DataError: one is gone, or was changed.
        """
        samples, found = read_fragment(fragment, place_of(self.folder), _listed, self.folder)
        labels = np.array([self.names.index(_class_of(sample)) for sample in samples], np.int64)
        return {"image": [content for [content] in found], "label": labels, "path": [picture.name for [picture] in samples]}


def _listed(folder: str) -> Groups:
    return grouped([(one,) for one in pictures_of(place_of(folder), "*/**/*")])


def _class_of(sample: Sample) -> str:
    return sample[0].name.partition("/")[0]
