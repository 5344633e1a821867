"""What a model takes and gives: the columns of a question and of an answer, to be recorded and to be read by people."""

from __future__ import annotations

from typing import Any

from raymill.data.arrow import describe
from raymill.task import Schema


def as_record(schema: Schema) -> dict[str, Any]:
    """The columns as JSON-ready values: name -> dtype, shape (null for an extent that differs between rows) and classes."""
    return {name: {"dtype": field.dtype, "shape": field.shape, "classes": field.classes} for name, field in schema.items()}


def in_words(schema: Schema) -> str:
    """The columns in words: "image uint8 of shape (28, 28), name text"."""
    return ", ".join(f"{name} {describe(field)}" for name, field in schema.items())
