"""Rows that come twice, and the page about a data set."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from raymill.data.manifest import take_manifest
from raymill.data.quality import repeated
from raymill.data.quality.look import shown
from raymill.data.quality.page import bars, cell, page
from raymill.data.quality.repeated import repeated_rows
from raymill.data.quality.statistics import statistics
from raymill.data.sources import ArraySource
from raymill.task import Field, Pipeline, Rows, Schema

SCHEMA: Schema = {
    "x": Field("float32", (2,)),
    "name": Field("text"),
    "crop": Field("uint8", (None,)),
    "label": Field("int64", classes=3),
}


def rows_of(numbers: list[int], label: int = 0) -> Rows:
    return {
        "x": np.array([[number, number % 2] for number in numbers], np.float32),
        "name": [f"<{number}>" for number in numbers],
        "crop": [np.arange(number, dtype=np.uint8) for number in numbers],
        "label": np.full(len(numbers), label, np.int64),
    }


def pipeline_of(schema: Schema = SCHEMA, **splits: Rows) -> Pipeline:
    def source(name: str, rows: Rows) -> ArraySource:
        return ArraySource(name, lambda: rows, 3)

    sources = {name: source(name, rows) for name, rows in splits.items()}
    return Pipeline(sources=sources, schema=schema, targets=["label"] if "label" in schema else None)


def test_rows_are_counted_that_are_there_already_in_their_split_or_another_one() -> None:
    pipeline = pipeline_of(train=rows_of([1, 2, 3, 2, 5, 2]), validation=rows_of([7, 2, 5, 8], label=1), test=rows_of([9, 7]))
    read = []
    found = repeated_rows(pipeline, take_manifest(pipeline), lambda split, num_rows: read.append((split, num_rows)))
    assert found["columns"] == ["x", "name", "crop"], "the answer may differ where the rows are the same"
    assert found["within"] == {"train": 2, "validation": 0, "test": 0}
    assert found["across"] == {"train, validation": 2, "train, test": 0, "validation, test": 1}
    assert sum(count for _, count in read) == 12


def test_texts_that_run_into_each_other_are_not_alike() -> None:
    schema: Schema = {"a": Field("text"), "b": Field("text")}
    pipeline = pipeline_of(schema, train={"a": ["ab", "a"], "b": ["c", "bc"]})
    assert repeated_rows(pipeline, take_manifest(pipeline))["within"] == {"train": 0}


def test_pictures_are_alike_by_their_files_alone_whatever_they_are_called() -> None:
    schema: Schema = {"image": Field("bytes"), "path": Field("text"), "label": Field("int64")}
    rows: Rows = {"image": [b"a", b"b", b"a"], "path": ["1", "2", "3"], "label": np.arange(3)}
    pipeline = pipeline_of(schema, train=rows)
    found = repeated_rows(pipeline, take_manifest(pipeline))
    assert (found["columns"], found["within"]) == (["image"], {"train": 1})


def test_of_more_rows_than_are_held_each_so_manieth_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [number % 100 for number in range(200)]
    pipeline = pipeline_of(train=rows_of(numbers), validation=rows_of(numbers[:100]))
    whole = repeated_rows(pipeline, take_manifest(pipeline))
    monkeypatch.setattr(repeated, "MOST_KEPT", 100)
    found = repeated_rows(pipeline, take_manifest(pipeline))
    assert (whole["one_in"], whole["within"]["train"], whole["across"]["train, validation"]) == (1, 100, 100)
    assert found["one_in"] == 3
    assert 0 < found["within"]["train"] == found["across"]["train, validation"] < 100


# ---------------------------------------------------------------- the page


class Tags(HTMLParser):
    """Which tags are open, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures = 0
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures += 1
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_whole_html_that_fetches_nothing_and_runs_nothing() -> None:
    schema: Schema = {**SCHEMA, "picture": Field("uint8", (8, 9))}
    rows = {**rows_of([1, 2, 3, 2]), "name": ["<script>alert(1)</script>"] * 4, "picture": np.zeros((4, 8, 9), np.uint8)}
    pipeline = pipeline_of(schema, train=rows)
    manifest = take_manifest(pipeline)
    found = {"train": statistics(pipeline, manifest, "train")}
    written = page("A <b> set", found, repeated_rows(pipeline, manifest), {"train": shown(pipeline, manifest, "train", 3)})
    parsed = Tags()
    parsed.feed(written)
    assert parsed.open == []
    assert parsed.pictures == 3
    assert "A <b> set" in parsed.text
    assert "<script>" in parsed.text
    assert "<script" not in written
    assert not re.search(r'(src|href)="(?!data:)', written)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((3, 20, 30), np.float32),
        np.full((1, 20, 30), np.nan, np.float32),
        np.zeros((20, 30, 3), np.uint8),
        np.zeros((20, 300), np.uint8),
    ],
)
def test_what_looks_like_a_picture_is_shown_as_one(value: np.ndarray) -> None:
    assert cell(value).startswith("<img")


def test_a_file_that_is_a_picture_is_shown_and_another_one_is_counted() -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "JPEG")
    assert cell(file.getvalue()).startswith("<img")
    assert cell(b"no picture") == "10 bytes"
    assert cell(np.arange(4.0)) == "[0.0, 1.0, 2.0, 3.0]"
    assert len(cell("a" * 1000)) < 300


def test_bars_are_as_high_as_their_share_of_the_most() -> None:
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"><title>', bars([1, 4, 0]))]
    assert heights == [10.0, 40.0, 0.0]
    assert bars(None) == bars([]) == ""
