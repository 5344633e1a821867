"""The digest of a safetensors file's weights, without torch.

It is the one that `snapshot.weights_sha256` makes of the tensors: over what the weights are, not over how a file holds them. So a
checkpoint whose files and checksums were changed together is told from the one that training saved.
"""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

from raymill.files import parse_json

HEADER_SIZE_BYTES = 8
METADATA = "__metadata__"

TORCH_TYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
"""What safetensors calls a type -> what torch does. A type that is not here has no digest without torch."""


def file_weights_sha256(path: Path) -> str | None:
    """SHA-256 over names, types, shapes and bytes of all tensors, in the order of the names; None where a type is not known here.

    Raises:
        OSError, ValueError: it cannot be read, or its header is none.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as data:
        start = HEADER_SIZE_BYTES + int.from_bytes(data[:HEADER_SIZE_BYTES], "little")
        header = parse_json(bytes(data[HEADER_SIZE_BYTES:start]))
        try:
            tensors = {name: entry for name, entry in header.items() if name != METADATA}
            for name in sorted(tensors):
                entry = tensors[name]
                if entry["dtype"] not in TORCH_TYPES:
                    return None
                digest.update(f"{name} torch.{TORCH_TYPES[entry['dtype']]} {tuple(entry['shape'])}\n".encode())
                first, end = entry["data_offsets"]
                # Offsets that lie give other bytes, and so another digest.
                digest.update(data[start + first : start + end])
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header is not one of safetensors: {type(error).__name__}: {error}") from error
    return digest.hexdigest()
