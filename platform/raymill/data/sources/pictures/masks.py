"""Pictures in one folder and a mask for each in another, of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from raymill.data.rows import BAD
from raymill.data.sources.pictures.decode import picture_size
from raymill.data.sources.pictures.samples import (
    Groups,
    empty_files,
    fragments_of,
    grouped,
    pictures_of,
    read_fragment,
)
from raymill.errors import DataError, InputError, Problem
from raymill.storage.find import place_of
from raymill.storage.place import Entry, Place, where
from raymill.task import Field, Fragment, Rows, Schema


@dataclass(frozen=True)
class MaskSource:
    """FOLDER/PICTURES/NAME.jpg and FOLDER/MASKS/NAME.png: "image" and "mask", the files' bytes, and "path".

    A row whose mask is no picture or has another size than its picture is bad. `decode_images` and `decode_masks` make pixels.

    Attributes:
        folder: holds both folders.
        pictures: name of the folder of pictures, at any depth.
        masks: name of the folder of masks, laid out alike.
    """

    folder: str
    pictures: str = "images"
    masks: str = "masks"

    @property
    def schema(self) -> Schema:
        """The columns, as the pipeline's schema."""
        return {"image": Field("bytes"), "mask": Field("bytes"), "path": Field("text")}

    def fragments(self) -> Sequence[Fragment]:
        """List the pictures.

        Raises:
            InputError: there are none, one is without mask or a mask without picture, is an empty file or leads elsewhere.
        """
        return fragments_of(_listed(self.folder, self.pictures, self.masks))

    def read(self, fragment: Fragment) -> Rows:
        """The files of a fragment.

        Raises:
            DataError: one is gone, or was changed.
        """
        place = place_of(self.folder)
        samples, found = read_fragment(fragment, place, _listed, self.folder, self.pictures, self.masks)
        rows: Rows = {"image": [image for image, _ in found], "mask": [mask for _, mask in found]}
        rows["path"] = [picture.name for picture, _ in samples]
        bad = [
            _unfit(image, mask, where(place, of_image.name), where(place, of_mask.name))
            for (image, mask), (of_image, of_mask) in zip(found, samples, strict=True)
        ]
        return {**rows, BAD: bad} if any(bad) else rows


def _unfit(image: bytes, mask: bytes, name: str, mask_name: str) -> str:
    """Why picture and mask do not go together; "" where they do."""
    try:
        size, mask_size = picture_size(image, name), picture_size(mask, mask_name)
    except DataError as error:
        return str(error)
    if size == mask_size:
        return ""
    (height, width), (mask_height, mask_width) = size, mask_size
    return f"{mask_name}: a mask of {mask_width} x {mask_height} pixels for a picture of {width} x {height}. Restore one of them."


def _listed(folder: str, pictures: str, masks: str) -> Groups:
    place = place_of(folder)
    images, of_images = _by_stem(place, pictures), _by_stem(place, masks)
    problems, fix = [], "Add it, or move this file away."
    for here, there, part, missing in ((images, of_images, pictures, masks), (of_images, images, masks, pictures)):
        problems += [
            Problem(where(place, here[stem].name), f"no file {missing}/{stem}.*", f"one for each of {part}", fix)
            for stem in sorted(here.keys() - there.keys())
        ]
    both = [(one, of_images[stem]) for stem, one in images.items() if stem in of_images]
    groups = grouped(both)
    problems += empty_files(place, groups)
    if problems:
        raise InputError(problems)
    return groups


def _by_stem(place: Place, part: str) -> dict[str, Entry]:
    """The pictures in a folder of the place by their names in it, without suffix."""
    listed = pictures_of(place, f"{part}/**/*")
    return {str(PurePosixPath(one.name).relative_to(part).with_suffix("")): one for one in listed}
