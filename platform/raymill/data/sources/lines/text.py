"""Text files: a row is a line, or a whole file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from raymill.data.sources.lines import pieces
from raymill.errors import DataError
from raymill.task import Field, Fragment, Rows, Schema


@dataclass(frozen=True)
class TextSource:
    """The lines of all text files of a folder that are not empty, or the files, as the column "text"; UTF-8.

    Attributes:
        folder: holds the pieces.
        pattern: which files, as in `Path.glob`.
        by: what a row is. A fragment is about 4 MiB of lines, or one file.
    """

    folder: str
    pattern: str = "**/*.txt"
    by: Literal["line", "file"] = "line"

    schema: ClassVar[Schema] = {"text": Field("text")}

    def fragments(self) -> Sequence[Fragment]:
        """List the pieces, in one pass over the pieces.

        Raises:
            InputError: there are no files or no text, or one cannot be read.
        """
        found = pieces.line_fragments(self.folder, self.pattern, "text files", whole=self.by == "file")
        one = self.by == "file"
        return [Fragment(each.path, each.part, 1 if one else each.num_rows, each.num_bytes, each.identity) for each in found]

    def read(self, fragment: Fragment) -> Rows:
        """The rows of one piece.

        Raises:
            DataError: the file was changed, or is no UTF-8; names the file and the byte.
        """
        data = pieces.read_piece(self.folder, fragment)
        try:
            texts = [data.decode()] if self.by == "file" else [line.decode() for line in pieces.lines_of(data)]
        except UnicodeDecodeError:
            where, at = f"{self.folder}/{fragment.path}", int(fragment.identity.split(" ")[0]) + _first_wrong(data)
            fix = "Write the file as UTF-8, or read it with a Source of your own."
            raise DataError(f"{where}: byte {at} is no UTF-8. {fix}") from None
        return {"text": texts}


def _first_wrong(data: bytes) -> int:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0
