"""What a Parquet file says of its columns, read from its index.

Arrow reads that too, but where a smallest value is cut short, or a histogram is of another length than it should, it ends the
whole process as soon as it is asked for a column ("terminate called", Arrow 25), from Python and from its own filters. So what is
needed is read here, from Thrift's compact protocol. All of it may be a lie, and rows are held against the schema again when they
are read; for those Arrow raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MOST_LEVELS = 32

# Field numbers of parquet.thrift, down to the statistics of a column.
_ROW_GROUPS, _COLUMNS, _META = 4, 1, 3
_TYPE, _NUM_VALUES, _COMPRESSED_BYTES, _DATA_AT, _DICTIONARY_AT, _STATISTICS = 1, 5, 7, 9, 11, 12
_OLD_MAX, _OLD_MIN, _NULL_COUNT, _MAX, _MIN = 1, 2, 3, 5, 6
_LEAF: dict[int, Any] = {}
_WANTED = {
    _ROW_GROUPS: {
        _COLUMNS: {
            _META: {
                **dict.fromkeys((_TYPE, _NUM_VALUES, _COMPRESSED_BYTES, _DATA_AT, _DICTIONARY_AT), _LEAF),
                _STATISTICS: dict.fromkeys((_OLD_MAX, _OLD_MIN, _NULL_COUNT, _MAX, _MIN), _LEAF),
            }
        }
    }
}

# Of a page's header.
_PAGE_BYTES, _CHECKSUM = 3, 4

_WIDTHS_BYTES = {0: 1, 1: 4, 2: 8}
"""Of the physical types that hold whole numbers: BOOLEAN, INT32, INT64."""


@dataclass(frozen=True)
class ColumnChunk:
    """What a file says of one column of a row group.

    Attributes:
        num_values: values, nulls among them; -1: not said.
        start: where its first page is in the file; -1: not said.
        compressed_bytes: bytes in the file; -1: not said.
        num_nulls: 0: none, or not said.
        low, high: the encoded smallest and largest number; None: not said, not whole numbers, or not as long as its type.
    """

    num_values: int
    start: int
    compressed_bytes: int
    num_nulls: int
    low: bytes | None
    high: bytes | None

    def limits(self, *, signed: bool) -> tuple[int, int] | None:
        """The smallest and the largest number, where both are said."""
        if self.low is None or self.high is None:
            return None
        return int.from_bytes(self.low, "little", signed=signed), int.from_bytes(self.high, "little", signed=signed)


def read_index(index: bytes) -> list[list[ColumnChunk]]:
    """The columns of each row group, in the order of the file.

    Args:
        index: the bytes of a file's footer, without its length and the mark at the end.

    Raises:
        ValueError: it is not what Thrift writes.
    """
    try:
        groups = _Scan(index).struct(_WANTED, 0).get(_ROW_GROUPS, [])
        return [[_chunk(column.get(_META, {})) for column in group.get(_COLUMNS, [])] for group in groups]
    except (IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"its index is damaged: {type(error).__name__}") from error


def _chunk(column: dict[int, Any]) -> ColumnChunk:
    found = column.get(_STATISTICS, {})
    kind = column.get(_TYPE)
    width_bytes = _WIDTHS_BYTES.get(kind) if isinstance(kind, int) else None

    def limit(name: int, old_name: int) -> bytes | None:
        encoded = found.get(name, found.get(old_name))
        return encoded if isinstance(encoded, bytes) and len(encoded) == width_bytes else None

    def number(values: dict[int, Any], name: int, otherwise: int) -> int:
        value = values.get(name)
        return value if isinstance(value, int) else otherwise

    num_values, compressed_bytes = number(column, _NUM_VALUES, -1), number(column, _COMPRESSED_BYTES, -1)
    data_at = number(column, _DATA_AT, -1)
    start = min(data_at, number(column, _DICTIONARY_AT, data_at))
    return ColumnChunk(
        num_values, start, compressed_bytes, number(found, _NULL_COUNT, 0), limit(_MIN, _OLD_MIN), limit(_MAX, _OLD_MAX)
    )


def all_pages_have_checksums(chunk: bytes) -> bool:
    """Whether each page of a column chunk says what its bytes hash to. Where one does not, Arrow does not look.

    Raises:
        ValueError: a page's header is not what Thrift writes.
    """
    scan = _Scan(chunk)
    try:
        while scan.at < len(chunk):
            header = scan.integers()
            if _CHECKSUM not in header:
                return False
            scan.bytes(header[_PAGE_BYTES])
    except (IndexError, KeyError) as error:
        raise ValueError(f"a page's header is damaged: {type(error).__name__}") from error
    return True


class _Scan:
    """Goes once over the bytes; keeps what is wanted and passes over the rest."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def struct(self, wanted: dict[int, Any] | None, level: int) -> dict[int, Any]:
        if level > _MOST_LEVELS:
            raise ValueError(f"its index nests deeper than {_MOST_LEVELS} levels")
        kept: dict[int, Any] = {}
        field = 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.number()
            inner = wanted.get(field) if wanted else None
            value = self.value(head & 15, inner, level)
            if inner is not None:
                kept[field] = value
        return kept

    def integers(self) -> dict[int, int]:
        """The 32-bit numbers of a struct, by field: one of another width is none of these, as for whoever reads by the format."""
        found: dict[int, int] = {}
        field = 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.number()
            value = self.value(head & 15, None, 0)
            if head & 15 == _I32:
                found[field] = value
        return found

    def value(self, kind: int, wanted: dict[int, Any] | None, level: int) -> Any:
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind == _BYTE:
            return self.byte()
        if kind in (_I16, _I32, _I64):
            return self.number()
        if kind == _DOUBLE:
            return self.bytes(8)
        if kind == _BINARY:
            return self.bytes(self.varint())
        if kind == _STRUCT:
            return self.struct(wanted, level + 1)
        if kind in (_LIST, _SET):
            return self.items(wanted, level + 1)
        raise ValueError(f"its index holds a value of the unknown kind {kind}")

    def items(self, wanted: dict[int, Any] | None, level: int) -> Sequence[Any]:
        head = self.byte()
        count, kind = head >> 4, head & 15
        if count == 15:
            count = self.varint()
        if count > len(self.data):
            raise ValueError(f"its index speaks of {count} items in {len(self.data)} bytes")
        if kind in (_TRUE, _FALSE):
            # In a list, unlike in a struct, each takes a byte.
            return self.bytes(count)
        if wanted is None:
            for _ in range(count):
                self.value(kind, None, level)
            return ()
        return [self.value(kind, wanted, level) for _ in range(count)]

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def bytes(self, count: int) -> bytes:
        self.at += max(0, count)
        if self.at > len(self.data):
            raise ValueError("its index ends too early")
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        number = shift = 0
        while shift < 64:
            byte = self.byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7
        raise ValueError("its index holds a number of more than 64 bits")

    def number(self) -> int:
        number = self.varint()
        return (number >> 1) ^ -(number & 1)
