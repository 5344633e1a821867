"""Thrift's compact protocol, read and written back: a Parquet file's index is made of it, and so tests can make it lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

MAGIC = b"PAR1"


@dataclass
class Value:
    """A value with its type on the wire; of a struct: field id -> Value, of a list: [element type, values]."""

    kind: int
    value: Any

    def __getitem__(self, key: int) -> Any:
        return self.value[key] if self.kind == STRUCT else self.value[1][key]


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    def zigzag(self) -> int:
        number = self.varint()
        return (number >> 1) ^ -(number & 1)

    def struct(self) -> dict[int, Value]:
        fields: dict[int, Value] = {}
        last = 0
        while head := self.byte():
            last = last + (head >> 4) if head >> 4 else self.zigzag()
            fields[last] = self.value(head & 15)
        return fields

    def value(self, kind: int) -> Value:
        if kind in (TRUE, FALSE):
            return Value(kind, None)
        if kind == BYTE:
            return Value(kind, self.byte())
        if kind in (I16, I32, I64):
            return Value(kind, self.zigzag())
        if kind == BINARY:
            size = self.varint()
            self.at += size
            return Value(kind, self.data[self.at - size : self.at])
        if kind == LIST:
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            return Value(kind, [head & 15, [self.value(head & 15) for _ in range(count)]])
        assert kind == STRUCT, kind
        return Value(kind, self.struct())


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def zigzag(number: int) -> bytes:
    return varint(number << 1 ^ number >> 63)


def written(found: Value) -> bytes:
    """The bytes of a value."""
    if found.kind in (TRUE, FALSE):
        return b""
    if found.kind == BYTE:
        return bytes([found.value])
    if found.kind in (I16, I32, I64):
        return zigzag(found.value)
    if found.kind == BINARY:
        return varint(len(found.value)) + found.value
    if found.kind == LIST:
        kind, values = found.value
        head = bytes([len(values) << 4 | kind]) if len(values) < 15 else bytes([0xF0 | kind]) + varint(len(values))
        return head + b"".join(map(written, values))
    # Always with the field's id in full, which readers have to understand.
    return b"".join(bytes([one.kind]) + zigzag(field) + written(one) for field, one in sorted(found.value.items())) + b"\0"


def read_footer(path: Path) -> tuple[bytes, Value]:
    """The pages of a Parquet file, and its index."""
    content = path.read_bytes()
    size = int.from_bytes(content[-8:-4], "little")
    return content[: -8 - size], Value(STRUCT, Reader(content[-8 - size : -8]).struct())


def write_footer(path: Path, pages: bytes, footer: Value) -> None:
    """A Parquet file of these pages with this index."""
    index = written(footer)
    path.write_bytes(pages + index + len(index).to_bytes(4, "little") + MAGIC)


# Where numbers of the index stand: in FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
SCHEMA, NUM_ROWS, ROW_GROUPS = 2, 3, 4
COLUMNS, TOTAL_BYTES, GROUP_ROWS = 1, 2, 3
META = 3
NUM_VALUES, UNCOMPRESSED_BYTES, COMPRESSED_BYTES, DATA_PAGE_OFFSET, STATISTICS = 5, 6, 7, 9, 12
STATISTICS_MAX, STATISTICS_MIN = 5, 6
SCHEMA_NAME = 4
SIZE_STATISTICS, DEFINITION_HISTOGRAM = 16, 3
