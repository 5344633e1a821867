"""A data set written again as Parquet: every row once and in order, whatever it was killed at; and shown."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raymill import files
from raymill.data.manifest import take_manifest
from raymill.data.quality.look import in_words, shown
from raymill.data.sources import ArraySource, ParquetSource
from raymill.data.sources import prepare as preparing
from raymill.data.sources.prepare import Sizes, prepare
from raymill.errors import DataError, InputError
from raymill.task import Field, Pipeline, Rows

SCHEMA = {
    "image": Field("uint8", (4, 5)),
    "crop": Field("float32", (None,)),
    "text": Field("text"),
    "label": Field("int64", classes=3),
}
SMALL = Sizes(file_bytes=900, group_bytes=200)


def make_rows(count: int) -> Rows:
    generator = np.random.default_rng(count)
    return {
        "image": generator.integers(0, 255, (count, 4, 5), np.uint8),
        "crop": [generator.normal(size=number % 4).astype(np.float32) for number in range(count)],
        "text": [f"row {number}" for number in range(count)],
        "label": np.arange(count, dtype=np.int64) % 3,
    }


def odd(rows: Rows) -> dict[int, str]:
    """Every tenth row is bad."""
    return {number: "odd" for number, text in enumerate(rows["text"]) if text.endswith("7")}


def pipeline(**fields: Any) -> Pipeline:
    sources = {"train": ArraySource("a", partial(make_rows, 100), 7), "validation": ArraySource("b", partial(make_rows, 30), 7)}
    return Pipeline(sources=sources, schema=SCHEMA, **fields)


def texts(folder: Path) -> list[str]:
    source = ParquetSource(str(folder), SCHEMA)
    return [text for fragment in source.fragments() for text in source.read(fragment)["text"]]


def test_every_row_is_written_once_in_order_and_its_schema_with_it(tmp_path: Path) -> None:
    told: dict[str, int] = {}
    made = prepare(
        pipeline(),
        take_manifest(pipeline()),
        tmp_path / "set",
        sizes=SMALL,
        progress=lambda split, rows: told.update({split: told.get(split, 0) + rows}),
    )
    assert (made["train"]["rows"], made["validation"]["rows"], told) == (100, 30, {"train": 100, "validation": 30})
    assert made["train"]["files"] == len(list((tmp_path / "set" / "train").iterdir())) > 3
    assert texts(tmp_path / "set" / "train") == [f"row {number}" for number in range(100)]
    assert ParquetSource.inferred(str(tmp_path / "set" / "train")).schema == SCHEMA
    source = ParquetSource(str(tmp_path / "set" / "train"), SCHEMA)
    assert len(source.fragments()) > made["train"]["files"]


@pytest.mark.parametrize("killed_at", range(0, 12))
def test_killed_anywhere_it_ends_with_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    manifest = take_manifest(pipeline())
    whole = prepare(pipeline(), manifest, tmp_path / "whole", sizes=SMALL)
    calls = iter(range(1000))

    def killed(function: Any) -> Any:
        def call(*given: Any) -> Any:
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return function(*given)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "write_file", killed(preparing.write_file))
        patch.setattr(preparing, "replace_file", killed(files.replace_file))
        with pytest.raises(KeyboardInterrupt):
            prepare(pipeline(), manifest, tmp_path / "set", sizes=SMALL)
    assert prepare(pipeline(), manifest, tmp_path / "set", sizes=SMALL) == whole
    written = [
        sorted((path.relative_to(folder), path.read_bytes()) for path in folder.rglob("*.parquet"))
        for folder in (tmp_path / "set", tmp_path / "whole")
    ]
    assert written[0] == written[1]


def test_bad_rows_are_refused_or_left_out_and_counted(tmp_path: Path) -> None:
    checked = pipeline(check=odd)
    manifest = take_manifest(checked)
    with pytest.raises(DataError, match="row 0: odd"):
        prepare(checked, manifest, tmp_path / "set", sizes=SMALL)
    made = prepare(checked, manifest, tmp_path / "other", sizes=SMALL, lenient=True)
    assert (made["train"]["rows"], made["train"]["bad_rows"]) == (90, 10)
    assert "row 17" not in texts(tmp_path / "other" / "train")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    manifest = take_manifest(pipeline())
    with pytest.raises(InputError, match="found something else"):
        prepare(pipeline(), manifest, tmp_path / "mine")
    prepare(pipeline(), manifest, tmp_path / "set", sizes=SMALL)
    with pytest.raises(InputError, match="prepared of other data, or in another way"):
        prepare(pipeline(), manifest, tmp_path / "set")
    assert json.loads((tmp_path / "set" / "prepared.json").read_text())["input"] == manifest.digest


def test_what_was_written_wrongly_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = preparing.write_file

    def turned(path: Path, rows: Rows, *others: Any) -> None:
        write(path, {**rows, "text": rows["text"][::-1]}, *others)

    monkeypatch.setattr(preparing, "write_file", turned)
    with pytest.raises(DataError, match="what was written is not what was read"):
        prepare(pipeline(), take_manifest(pipeline()), tmp_path / "set", sizes=SMALL)


def test_rows_are_shown_in_words() -> None:
    found = shown(pipeline(), take_manifest(pipeline()), "train", 9)
    assert [len(column) for column in found.values()] == [9] * 4
    assert in_words(found["image"][0]).startswith("uint8 of shape (4, 5) from ")
    assert [in_words(value) for value in (np.zeros(2, np.int64), b"abc", "text", np.int64(3))] == [
        "[0, 0]",
        "3 bytes",
        "text",
        "3",
    ]
