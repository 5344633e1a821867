"""What is known of a data set as one HTML file: numbers, bars, and some rows as people see them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raymill.data.quality.look import in_words
from raymill.data.sources.pictures.decode import decode_images
from raymill.errors import DataError
from raymill.task import Rows

SIDE = 96
"""Pixels of a picture's longer side."""

MOST_CHARACTERS = 200

STYLE = """body{font:15px system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse;margin:.6em 0 1.6em}
td,th{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:right;vertical-align:middle}th{color:#666;font-weight:600}
td:first-child,th:first-child,td.text{text-align:left}img{image-rendering:pixelated;display:block}rect{fill:#4477aa}
.warn{color:#a33;font-weight:600}"""


def page(title: str, splits: Mapping[str, Mapping[str, Any]], repeated: Mapping[str, Any], first_rows: Mapping[str, Rows]) -> str:
    """A whole page, with nothing in it that is fetched from elsewhere.

    Args:
        title: of the page.
        splits: split -> its `statistics`.
        repeated: `repeated_rows`.
        first_rows: split -> rows that are shown.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", _repeated(repeated)]
    for name, split in splits.items():
        bad = f", {split['bad_rows']} of them bad and not measured" if split["bad_rows"] else ""
        parts.append(f"<h2>{html.escape(name)}: {split['rows']:,} rows{bad}, {split['bytes']:,} bytes</h2>")
        parts.append(_columns(split["columns"]))
        parts.append(_rows(first_rows[name]))
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return head + "\n".join(parts) + "</html>\n"


def _repeated(found: Mapping[str, Any]) -> str:
    by = f"Rows are alike where {', '.join(found['columns'])} {'is' if len(found['columns']) == 1 else 'are'}."
    share = f" One row in {found['one_in']} was looked at." if found["one_in"] > 1 else ""
    rows = [(f"{split}: rows that are there already", count) for split, count in found["within"].items()]
    for pair, count in found["across"].items():
        first, second = pair.split(", ")
        rows.append((f"{second}: rows that are in {first} too", count))
    marked = [(html.escape(what), f"<span class=warn>{count:,}</span>" if count else "0") for what, count in rows]
    return f"<h2>Rows that come twice</h2><p>{html.escape(by + share)}</p>{_table(('', 'rows'), marked)}"


def _columns(columns: Mapping[str, Mapping[str, Any]]) -> str:
    measured = ("least", "5 %", "median", "95 %", "most", "mean", "not finite", "values", "rows of each class")
    rows = []
    for name, about in columns.items():
        numbers = about.get("length", about)
        quantiles = list((numbers["quantiles"] or {}).values()) or [None] * 3
        kind = f"length of {about['dtype']}" if "length" in about else about["dtype"]
        values = [numbers["min"], *quantiles, numbers["max"], numbers["mean"], about.get("num_not_finite")]
        shape = " x ".join("?" if extent is None else str(extent) for extent in about["shape"])
        cells = [html.escape(name), html.escape(kind), shape, *map(_number, values), bars(numbers["histogram"])]
        rows.append((*cells, bars(about.get("class_counts"))))
    return _table(("column", "type", "shape", *measured), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.6g}"


def bars(counts: Sequence[int] | None) -> str:
    """Counts as bars, with each count in words where the pointer is."""
    if not counts:
        return ""
    width, most = 240 / len(counts), max(*counts, 1)
    drawn = [
        f'<rect x="{i * width:.2f}" y="{40 - 40 * count / most:.2f}" width="{max(width - 0.5, 0.5):.2f}" '
        f'height="{40 * count / most:.2f}"><title>{i}: {count:,}</title></rect>'
        for i, count in enumerate(counts)
    ]
    return f'<svg width="240" height="40" role="img">{"".join(drawn)}</svg>'


def _rows(rows: Rows) -> str:
    lines = [
        [f'<div title="{html.escape(name)}">{cell(value)}</div>' for name, value in zip(rows, row, strict=True)]
        for row in zip(*rows.values(), strict=True)
    ]
    return _table([html.escape(name) for name in rows], lines)


def cell(value: Any) -> str:
    """A value: as a picture where it is one, in words elsewhere."""
    pixels = _pixels(value)
    if pixels is None:
        words = in_words(value)
        return html.escape(words if len(words) <= MOST_CHARACTERS else f"{words[:MOST_CHARACTERS]}...")
    from PIL import Image

    picture, file = Image.fromarray(pixels), io.BytesIO()
    scale = SIDE / max(picture.size)
    picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))).save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _pixels(value: Any) -> np.ndarray | None:
    """uint8 [height, width] or [height, width, 3] of a value that looks like a picture; else None."""
    if isinstance(value, bytes):
        try:
            return decode_images([value])[0]
        except DataError:
            return None
    if not isinstance(value, np.ndarray) or value.ndim not in (2, 3) or value.dtype.kind not in "uf":
        return None
    if value.ndim == 3 and value.shape[0] in (1, 3):
        value = np.moveaxis(value, 0, -1)
    if value.ndim == 3 and value.shape[-1] == 1:
        value = value[..., 0]
    if (value.ndim == 3 and value.shape[-1] != 3) or min(value.shape[:2]) < 8:
        return None
    if value.dtype == np.uint8:
        return np.ascontiguousarray(value)
    finite = value[np.isfinite(value)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    return np.asarray(np.nan_to_num((value - low) / max(high - low, 1e-12)).clip(0, 1) * 255, np.uint8)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{one}</th>" for one in head), *("".join(f"<td>{one}</td>" for one in row) for row in rows)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
