"""Pictures as files: a folder of folders, each named after a class. They stay as they are until the transform decodes them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np

from raymill.errors import DataError, InputError, Problem
from raymill.storage.find import place_of
from raymill.storage.place import Entry, digest_of, files_of, in_parallel, where
from raymill.task import Field, Fragment, Rows, Schema

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")

MOST_FILES, MOST_BYTES = 256, 16 * 2**20
"""Of a fragment."""

MOST_PIXELS = 2**26
"""Of a picture, 8192 x 8192; a file of some bytes may claim far more, for which memory would be set aside."""


@dataclass(frozen=True)
class ImageFolderSource:
    """The pictures of FOLDER/CLASS/NAME.jpg (or png, bmp, gif, webp): "image", which is the file's bytes, "label" and "path".

    A fragment is some pictures of a class, known by their names, sizes and times of change. `decode_images` makes pixels of them.

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
        groups = _listed(self.folder)
        empty = [f"{self.folder}/{one.name}" for pictures in groups.values() for one in pictures if not one.size_bytes]
        problems = [Problem(path, "an empty file", "a picture", "Restore or delete it.") for path in empty]
        strange = sorted({label for label, _ in groups} - set(self.names))
        expected, fix = f"a folder of one of the classes {', '.join(self.names)}", "Name it, or move it away."
        problems += [Problem(f"{self.folder}/{name}", "no class", expected, fix) for name in strange]
        if problems:
            raise InputError(problems)
        return [_fragment(label, number, pictures) for (label, number), pictures in groups.items()]

    def read(self, fragment: Fragment) -> Rows:
        """The files of a fragment.

        Raises:
            DataError: one is gone, or was changed.
        """
        place = place_of(self.folder)

        def read(name: str) -> tuple[bytes, Entry]:
            try:
                # As it is behind the reading: what was read is then of the version that was listed.
                return place.read(name), place.entry(name)
            except OSError as error:
                said = error.strerror or str(error)
                raise DataError(f"{where(place, name)}: cannot be read: {said}. Restore this file, then resume.") from error

        names = [one.name for one in self._pictures(fragment)]
        found = in_parallel(place, read, names)
        if _fragment(fragment.path, fragment.part, [now for _, now in found]) != fragment:
            raise self._changed(fragment)
        labels = np.full(len(names), self.names.index(fragment.path), np.int64)
        return {"image": [content for content, _ in found], "label": labels, "path": names}

    def _pictures(self, fragment: Fragment) -> Sequence[Entry]:
        """The pictures of a fragment, as they were listed."""
        for listed in (_listed_once, _listed):
            pictures = listed(self.folder).get((fragment.path, fragment.part), [])
            if pictures and _fragment(fragment.path, fragment.part, pictures) == fragment:
                return pictures
        raise self._changed(fragment)

    def _changed(self, fragment: Fragment) -> DataError:
        what = f"{self.folder}/{fragment.path}, pictures {fragment.part}"
        return DataError(f"{what}: they have changed since the run's manifest was taken. Restore them, or start a new run.")


def _fragment(label: str, number: int, pictures: Sequence[Entry]) -> Fragment:
    identity = digest_of([(one.name.rpartition("/")[2], one.size_bytes, one.mtime_ns) for one in pictures])
    return Fragment(label, number, len(pictures), sum(one.size_bytes for one in pictures), identity)


def _listed(folder: str) -> dict[tuple[str, int], list[Entry]]:
    """(class, number) -> the pictures of a fragment."""
    listed = files_of(place_of(folder), "*/**/*", "pictures")
    pictures = [one for one in listed if one.name.lower().endswith(SUFFIXES)]
    if not pictures:
        raise InputError([Problem(folder, "no pictures", f"files that end with {', '.join(SUFFIXES)}", "Name another folder.")])
    found: dict[tuple[str, int], list[Entry]] = {}
    for label, of_label in groupby(pictures, key=lambda one: one.name.partition("/")[0]):
        number, num_bytes = 0, 0
        for one in of_label:
            group = found.setdefault((label, number), [])
            if group and (len(group) == MOST_FILES or num_bytes + one.size_bytes > MOST_BYTES):
                number, num_bytes = number + 1, 0
                group = found.setdefault((label, number), [])
            group.append(one)
            num_bytes += one.size_bytes
    return found


_listed_once = lru_cache(maxsize=4)(_listed)


def decode_images(
    files: Sequence[bytes], size: tuple[int, int] | None = None, mode: str = "RGB", names: Sequence[str] | None = None
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
    from PIL import Image, UnidentifiedImageError

    found = []
    for number, content in enumerate(files):
        where = names[number] if names is not None else f"picture {number}"
        try:
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise DataError(f"{where}: {image.width} x {image.height} pixels are more than {MOST_PIXELS}. Leave it out.")
                pixels = image.convert(mode)
                found.append(np.asarray(pixels if size is None else pixels.resize(size[::-1], Image.Resampling.BILINEAR)))
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{where}: is no whole picture: {error}. Restore or delete it.") from error
    return found if size is None else np.stack(found)
