"""The place that a name means: a folder's path, or an address."""

from __future__ import annotations

import re

from raymill.storage.near import Near
from raymill.storage.place import Place

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def place_of(root: str) -> Place:
    """The place that is named so.

    Raises:
        InputError: an address of a kind that cannot be read, or whose parts are wrong.
    """
    if not (scheme := _SCHEME.match(root)):
        return Near(root)
    # Imported here: Arrow's file systems take a while.
    from raymill.storage.far import far

    return far(root, scheme[1].lower())
