"""Rows from plain files: lines, JSON, CSV, tar, pictures. Each row once; what is damaged, hostile or changed is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raymill.data.bad_rows import read_good_rows
from raymill.data.manifest import take_manifest
from raymill.data.sources import (
    CsvSource,
    ImageFolderSource,
    JsonLinesSource,
    TarSource,
    TextSource,
    decode_images,
    split_by_share,
    tar,
)
from raymill.data.sources.lines import pieces
from raymill.data.sources.pictures import samples as pictures
from raymill.errors import DataError, InputError
from raymill.task import Column, Field, Pipeline, Source


def column(source: Source, name: str) -> list[Any]:
    """All values of a column, each fragment read by a copy as another process has it."""
    found: list[Any] = []
    for fragment in source.fragments():
        rows = pickle.loads(pickle.dumps(source)).read(fragment)
        assert {len(values) for values in rows.values()} == {fragment.num_rows}
        found += plain(rows[name])
    return found


def plain(values: Column) -> list[Any]:
    return [value.tolist() if isinstance(value, np.ndarray | np.generic) else value for value in values]


def refused(source: Source) -> str:
    with pytest.raises(InputError) as caught:
        source.fragments()
    return str(caught.value)


def unreadable(source: Source, number: int = 0, fragments: Any = None) -> str:
    with pytest.raises(DataError) as caught:
        source.read((fragments or source.fragments())[number])
    return str(caught.value)


# ---------------------------------------------------------------- lines


@settings(max_examples=60)
@given(
    lines=st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=9), max_size=40),
    end=st.sampled_from(["\n", "\r\n"]),
    closed=st.booleans(),
    piece_bytes=st.integers(1, 60),
)
def test_each_line_is_in_one_piece(tmp_path_factory: Any, lines: list[str], end: str, closed: bool, piece_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("lines")
    (folder / "a.txt").write_bytes((end.join(lines) + (end if closed and lines else "")).encode())
    expected = [line for line in lines if line.encode().strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        if expected:
            assert column(TextSource(str(folder)), "text") == expected
        else:
            assert "no rows in any file" in refused(TextSource(str(folder)))


def test_a_row_may_be_a_whole_file(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\nlast")
    assert column(TextSource(str(tmp_path), by="file"), "text") == ["a\n\nlast", "b\n\nlast"]


def test_what_is_no_utf_8_is_named_with_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nbad \xff here\n")
    assert "a.txt: byte 9 is no UTF-8" in unreadable(TextSource(str(tmp_path)))


def test_a_file_that_was_changed_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    source = TextSource(str(tmp_path))
    fragments = source.fragments()
    (tmp_path / "a.txt").write_text("one\ntwO\n")
    assert "has changed since the run's manifest was taken" in unreadable(source, fragments=fragments)
    (tmp_path / "a.txt").unlink()
    assert "cannot be read" in unreadable(source, fragments=fragments)


def test_a_line_without_end_a_link_that_leads_out_and_no_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "MOST_LINE_BYTES", 100)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_text("x" * 1000)
    assert "a.txt: found a line of more than 100 bytes" in refused(TextSource(str(tmp_path / "set")))
    (tmp_path / "outside.txt").write_text("secret\n")
    os.symlink(tmp_path / "outside.txt", tmp_path / "set" / "b.txt")
    assert "b.txt: found a link that leads elsewhere" in refused(TextSource(str(tmp_path / "set")))
    assert "no such folder" in refused(TextSource(str(tmp_path / "nothing")))
    assert "File name too long" in refused(TextSource("x" * 5000))


# ---------------------------------------------------------------- JSON Lines

OBJECTS = [
    {"id": 1, "text": "a", "score": 1, "x": [1, 2], "in": {"deep": 5}, "when": "2024-01-01"},
    {"id": 2, "text": "b\nc", "score": 2.5, "x": [3, 4], "in": {"deep": 6}, "when": "2024-01-01 00:00:01", "more": None},
]


def written(folder: Path, objects: list[Any], name: str = "a.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in objects))
    return str(folder)


def test_json_is_inferred_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = JsonLinesSource.inferred(written(tmp_path, OBJECTS), ["id", "text", "score", "x", "in.deep", "when"])
    assert source.schema["score"] == Field("float64")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    written(tmp_path, [*OBJECTS, *OBJECTS], "b.jsonl")
    assert len(source.fragments()) >= 4
    assert column(source, "id") == [1, 2, 1, 2, 1, 2]
    assert column(source, "text") == ["a", "b\nc"] * 3
    assert column(source, "score") == [1.0, 2.5] * 3, "also where a piece has whole numbers alone"
    assert (column(source, "x"), column(source, "in.deep")) == ([[1, 2], [3, 4]] * 3, [5, 6] * 3)
    start = 1_704_067_200_000_000
    assert column(source, "when") == [start, start + 1_000_000] * 3, "microseconds, of dates and times alike"


@pytest.mark.parametrize(
    ("line", "field", "said"),
    [
        ('{"x": 1.5}', Field("int64"), "column 'x': row 1: 1.5, which int64 cannot hold"),
        ('{"x": "text"}', Field("int64"), "a.jsonl, from byte 0 on"),
        ('{"x": 300}', Field("uint8"), "row 1: 300, which uint8 cannot hold"),
        ('{"x": 12345678901234567890123}', Field("int64"), "a.jsonl"),
        ('{"x": 1', Field("int64"), "JSON parse error"),
        ("[1, 2]", Field("int64"), "JSON parse error"),
        ('{"x": [1]}', Field("int64"), "a.jsonl"),
        (
            '{"y": 1}',
            Field("int64"),
            "row 1: null; 1 in all. Say what stands for a value that is missing, Field(..., fill=0); or",
        ),
    ],
)
def test_json_that_does_not_fit_is_named(tmp_path: Path, line: str, field: Field, said: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n' + line + "\n")
    assert said in unreadable(JsonLinesSource(str(tmp_path), {"x": field}))


def test_a_missing_name_may_be_filled_or_make_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    folder = written(tmp_path, [{"id": 1, "x": 1}, {"id": 2}, {"id": 3, "x": None}])
    assert column(JsonLinesSource(folder, {"id": Field("int64"), "x": Field("int64", fill=7)}), "x") == [1, 7, 7]
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10**6)
    pieces._pieces.cache_clear()
    source = JsonLinesSource(folder, {"id": Field("int64"), "x": Field("int64")}, nulls="bad_rows")
    pipeline = Pipeline(sources={"train": source}, schema=source.schema)
    (fragment,) = take_manifest(pipeline, lenient=True).splits["train"].fragments
    rows, reasons = read_good_rows(pipeline, "train", fragment, lenient=True)
    assert (plain(rows["id"]), sorted(reasons)) == ([1], [1, 2])


# ---------------------------------------------------------------- CSV


def test_csv_is_inferred_and_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 12)
    (tmp_path / "a.csv").write_text('id,name,value,day\r\n1,a,1.5,2024-01-02\r\n2,"b,c",2,2024-01-03\r\n3,NA,3.25,2024-01-04\r\n')
    source = CsvSource.inferred(str(tmp_path), value=Field("float64"))
    assert list(source.schema) == ["id", "name", "value", "day"]
    assert len(source.fragments()) == 3
    assert column(source, "name") == ["a", "b,c", "NA"]
    assert column(source, "value") == [1.5, 2.0, 3.25]
    assert column(source, "day")[0] == 1_704_153_600_000_000


def test_quoted_line_ends_make_a_file_one_fragment(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id;text\n1;"two\nlines"\n2;one\n')
    source = CsvSource.inferred(str(tmp_path), delimiter=";", newlines_in_values=True)
    assert [fragment.num_rows for fragment in source.fragments()] == [2]
    assert column(source, "text") == ["two\nlines", "one"]
    without = CsvSource(str(tmp_path), source.schema, delimiter=";")
    assert "a.csv, from byte 8 on" in unreadable(without)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("id,x\n1,2\n1,2,3\n", "Expected 2 columns, got 3"),
        ("id,x\n1,a\n", "column 'x' is string, not int64"),
        ("id,x\n1,\n", "row 0: it is null"),
        ("id,y\n1,2\n", "there are 0 columns 'x'"),
        ("id,x,x\n1,2,3\n", "there are 2 columns 'x'"),
    ],
)
def test_csv_that_does_not_fit_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    message = unreadable(CsvSource(str(tmp_path), {"id": Field("int64"), "x": Field("int64")}))
    assert "a.csv, from byte" in message
    assert said in message


# ---------------------------------------------------------------- tar


def make_tar(path: Path, members: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] = lambda info: None) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            change(info)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int) -> dict[str, bytes]:
    return {
        f"{number:04d}.{extension}": content
        for number in range(first, first + count)
        for extension, content in (("JPG", b"picture %d" % number), ("cls", b"%d" % (number % 3)), ("note.txt", "ä".encode()))
    }


COLUMNS = {"image": "jpg", "label": "cls", "note": "note.txt"}


def test_samples_of_tar_files_are_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MOST_BYTES", 40)
    make_tar(tmp_path / "b.tar", samples(5, 3))
    make_tar(tmp_path / "a.tar", samples(0, 5))
    source = TarSource(str(tmp_path), COLUMNS, classes=3)
    assert source.schema["label"] == Field("int64", classes=3)
    assert len(source.fragments()) > 2
    assert column(source, "key") == [f"{number:04d}" for number in range(8)]
    assert column(source, "image") == [b"picture %d" % number for number in range(8)]
    assert column(source, "label") == [number % 3 for number in range(8)]
    assert take_manifest(Pipeline(sources=split_by_share(source, {"train": 0.5, "validation": 0.5}), schema=source.schema))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def _claim(path: Path) -> None:
    with tarfile.open(path) as archive:
        info = next(iter(archive))
    info.size = 2**31
    path.write_bytes(info.tobuf() + path.read_bytes()[512:])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_cut, "a.tar"),
        (_claim, "claims 2147483648 bytes, which the file does not have"),
        (lambda path: path.write_bytes(b""), "a whole tar file of samples"),
        (lambda path: path.write_bytes(os.urandom(2000)), "a whole tar file of samples"),
        (lambda path: make_tar(path, {"1.jpg": b""}, lambda info: setattr(info, "type", tarfile.SYMTYPE)), "is a link, a device"),
        (lambda path: make_tar(path, {"1.jpg": b""}, lambda info: setattr(info, "type", tarfile.CHRTYPE)), "is a link, a device"),
        (lambda path: make_tar(path, {"1.jpg": b"x"}), "sample '1' has no cls, note.txt, but jpg"),
        (lambda path: make_tar(path, {"1.jpg": b"x", "1.JPG": b"y"}), "sample '1' has two files .jpg"),
    ],
)
def test_a_tar_file_that_is_damaged_or_hostile_is_refused(tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    spoil(make_tar(tmp_path / "a.tar", samples(0, 2)))
    message = refused(TarSource(str(tmp_path), COLUMNS))
    assert "a.tar" in message
    assert said in message


def test_names_that_lead_out_of_a_tar_file_lead_nowhere_and_bad_labels_are_named(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"../../x.cls": b"1", "/etc/y.cls": b"one"})
    source = TarSource(str(tmp_path), {"label": "cls"})
    assert "sample '/etc/y', cls" in unreadable(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


# ---------------------------------------------------------------- pictures


def picture(path: Path, size: tuple[int, int] = (6, 4), value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)
    return path


def test_pictures_have_the_label_of_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_FILES", 2)
    for name in ("dog/1.png", "dog/deep/2.JPG", "cat/1.png", "cat/2.png", "cat/3.png", "cat/.hidden.png", "cat/notes.md"):
        picture(tmp_path / name) if not name.endswith("md") else (tmp_path / name).write_text("no picture")
    source = ImageFolderSource(str(tmp_path))
    assert source.schema["label"] == Field("int64", classes=2)
    found = dict(zip(column(source, "path"), column(source, "label"), strict=True))
    assert found == {"cat/1.png": 0, "cat/2.png": 0, "cat/3.png": 0, "dog/1.png": 1, "dog/deep/2.JPG": 1}
    pixels = decode_images(column(source, "image"), size=(2, 3))
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (5, 2, 3, 3)
    assert [image.shape for image in decode_images(column(source, "image"), mode="L")] == [(4, 6)] * 5
    assert take_manifest(
        Pipeline(sources=split_by_share(source, {"train": 0.7, "validation": 0.3}, seed=2), schema=source.schema)
    )


def test_pictures_that_are_empty_of_no_class_or_changed_are_named(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "2.png").touch()
    picture(tmp_path / "dgo" / "1.png")
    message = refused(ImageFolderSource(str(tmp_path), ("cat", "dog")))
    assert "cat/2.png: found an empty file" in message
    assert "dgo: found no class; expected a folder of one of the classes cat, dog" in message
    (tmp_path / "cat" / "2.png").unlink()
    source = ImageFolderSource(str(tmp_path))
    fragments = source.fragments()
    picture(tmp_path / "cat" / "1.png", (60, 40))
    assert f"{tmp_path}, pictures 0: they have changed" in unreadable(source, fragments=fragments)
    (tmp_path / "cat" / "1.png").unlink()
    assert "they have changed" in unreadable(source, fragments=fragments)
    assert "no such folder" in refused(ImageFolderSource(str(tmp_path / "nothing")))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bomb(9000, 9000), "9000 x 9000 pixels are more than"),
        (bomb(2**31 - 1, 2**31 - 1), "is no whole picture"),
        (b"", "is no whole picture"),
        (b"no picture at all", "is no whole picture"),
        (bomb(50, 50), "is no whole picture"),
    ],
)
def test_a_picture_that_is_damaged_or_claims_too_much_is_named(content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=r"cat/1\.png: ") as caught:
        decode_images([content], names=["cat/1.png"])
    assert said in str(caught.value)


def test_a_picture_that_is_cut_short_is_named(tmp_path: Path) -> None:
    whole = picture(tmp_path / "a.jpg", (300, 300)).read_bytes()
    with pytest.raises(DataError, match="picture 0: is no whole picture: image file is truncated"):
        decode_images([whole[: len(whole) // 2]])
