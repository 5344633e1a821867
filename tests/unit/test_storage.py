"""The same rows from an object store as from disk, whatever it answers; and what cannot be read said in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from object_store import KINDS, ObjectStore, serving
from probes import pictures
from raymill.data.sources import (
    ArrowSource,
    CsvSource,
    ImageFolderSource,
    JsonLinesSource,
    ParquetSource,
    TarSource,
    split_by_share,
    write_parquet,
)
from raymill.errors import DataError, InputError
from raymill.storage import far
from raymill.storage.far import glob_expression
from raymill.storage.find import place_of
from raymill.task import Field, Rows, Schema, Source

SCHEMA: Schema = {"number": Field("int64"), "name": Field("text")}
ROWS: Rows = {"number": np.arange(400), "name": [f"row {number}" for number in range(400)]}


def write_rows(folder: Path) -> None:
    write_parquet(folder, ROWS, SCHEMA, num_shards=3, row_group_rows=50)


SOURCES: dict[str, tuple[Callable[[Path], None], Callable[[str], Source]]] = {
    "parquet": (write_rows, lambda folder: ParquetSource(folder, SCHEMA)),
    "inferred": (write_rows, lambda folder: ParquetSource.inferred(folder)),
    "folders": (pictures.write_folders, lambda folder: ImageFolderSource(folder)),
    "tar": (pictures.write_tar, lambda folder: TarSource(folder, {"image": "png", "label": "cls"}, classes=2)),
    "arrow": (pictures.write_arrow, lambda folder: ArrowSource.inferred(folder, ["image.bytes", "label"])),
    "csv": (pictures.write_csv, lambda folder: CsvSource.inferred(folder)),
    "lines": (pictures.write_lines, lambda folder: JsonLinesSource.inferred(folder)),
}


@pytest.fixture(scope="module")
def service() -> Iterator[ObjectStore]:
    with serving() as store:
        yield store


@pytest.fixture
def store(service: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    monkeypatch.setattr(far, "WAITS_S", (0.01,) * 12)
    # Its waits are longer.
    monkeypatch.setattr(far, "CLIENT_TRIES", 1)
    far.far.cache_clear()
    yield service
    service.fault = lambda number, method, path: None
    far.far.cache_clear()


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    return f"bucket-{abs(hash(request.node.name)) % 10**12}"


def all_rows(source: Source) -> list[Any]:
    return [[(name, repr(list(column))) for name, column in source.read(one).items()] for one in source.fragments()]


@pytest.mark.parametrize("kind", SOURCES)
def test_rows_are_those_of_the_same_files_on_disk(kind: str, store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    write, source = SOURCES[kind]
    write(tmp_path / "set")
    address = store.upload(tmp_path / "set", bucket)
    assert all_rows(source(address)) == all_rows(source(str(tmp_path / "set")))
    shares = {"train": 0.7, "rest": 0.3}
    far_parts, near_parts = (split_by_share(source(at), shares) for at in (address, str(tmp_path / "set")))
    for split in shares:
        assert all_rows(far_parts[split]) == all_rows(near_parts[split])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["parquet", "folders", "tar", "lines"])
def test_what_fails_now_and_then_costs_no_row(kind: str, name: str, store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    write, source = SOURCES[name]
    write(tmp_path / "set")
    address = store.upload(tmp_path / "set", bucket)
    before, expected = store.faults, all_rows(source(str(tmp_path / "set")))
    store.fault = lambda number, method, path: kind if number % 7 == 0 else None
    for _ in range(2):
        assert all_rows(source(address)) == expected
    assert store.faults > before + 1


@pytest.mark.parametrize("name", ["parquet", "folders", "tar", "lines", "arrow"])
def test_an_object_that_changes_while_it_is_read_gives_no_row(name: str, store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    write, source = SOURCES[name]
    write(tmp_path / "set")
    address = store.upload(tmp_path / "set", bucket)
    made = source(address)
    fragment = made.fragments()[0]
    client, files = store.client, [path for path in (tmp_path / "set").rglob("*") if path.is_file()]
    # Where the store knows a file by the second in which it was written, one has to have passed.
    written = time.time()
    changed: list[str] = []

    def change(number: int, method: str, path: str) -> None:
        if method == "GET" and not changed and "list-type" not in path and path.count("/") > 1:
            changed.append(path)
            for file in files:
                content = file.read_bytes()
                key = file.relative_to(tmp_path / "set").as_posix()
                client.put_object(Bucket=bucket, Key=key, Body=content[:-30] + bytes(30))

    while time.time() < written + 1.1:
        time.sleep(0.05)
    store.fault = change
    with pytest.raises(DataError, match=r"changed since the run's manifest|cannot be read"):
        made.read(fragment)
    assert changed


def test_a_service_that_is_down_ends_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far, "WAITS_S", (0.01,))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    far.far.cache_clear()
    with pytest.raises(InputError, match=r"s3://nowhere-at-all.*NETWORK_CONNECTION"):
        ParquetSource("s3://nowhere-at-all/rows", SCHEMA).fragments()
    far.far.cache_clear()


def test_an_object_that_is_gone_is_named(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "set")
    source = ParquetSource(store.upload(tmp_path / "set", bucket), SCHEMA)
    fragments = source.fragments()
    store.client.delete_object(Bucket=bucket, Key="part-00001.parquet")
    with pytest.raises(DataError, match=rf"s3://{bucket}/part-00001.parquet, row group 0: cannot be read"):
        source.read(next(one for one in fragments if one.path == "part-00001.parquet"))


def test_an_empty_bucket_says_what_was_looked_for(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    address = store.upload(tmp_path, bucket)
    with pytest.raises(InputError, match=r"no file that matches '\*\.parquet'"):
        ParquetSource(address, SCHEMA).fragments()


def test_a_file_of_a_web_server_is_read_by_its_name(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "set")
    store.upload(tmp_path / "set", bucket)
    store.client.put_bucket_acl(Bucket=bucket, ACL="public-read")
    for key in ("part-00000.parquet", "part-00001.parquet"):
        store.client.put_object_acl(Bucket=bucket, Key=key, ACL="public-read")
    address = f"http://127.0.0.1:{store.port}/{bucket}"
    source = ParquetSource(address, SCHEMA, "part-00001.parquet")
    assert all_rows(source) == all_rows(ParquetSource(str(tmp_path / "set"), SCHEMA, "part-00001.parquet"))
    fragment = source.fragments()[0]
    store.client.put_object(Bucket=bucket, Key="part-00001.parquet", Body=b"something else", ACL="public-read")
    with pytest.raises(DataError, match=r"cannot be read|has changed"):
        source.read(fragment)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host/rows", "an address of ftp://"),
        ("s3://key:word@bucket/rows", "an address with a key in it"),
        ("s3://bucket/rows?endpoint_override=host", "region and endpoint come from the environment"),
        ("s3://", "one with a bucket or host"),
    ],
)
def test_a_wrong_address_is_refused_in_words(address: str, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("?", r"\?")) as caught:
        ParquetSource(address, SCHEMA).fragments()
    assert "word@" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["*", "*.parquet", "**/*.txt", "*/**/*", "a/*", "?.txt", "[ab]*", "[!a]*", "**/*"])
def test_names_fit_a_pattern_as_on_disk(pattern: str, tmp_path: Path) -> None:
    names = ["a.txt", "b.parquet", "ab.txt", "a/x.txt", "a/b/y.txt", "c/z.parquet", "a.b/c d.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    fits = glob_expression(pattern)
    on_disk = [one.name for one in place_of(str(tmp_path)).entries(pattern, may_link=False)]
    assert sorted(name for name in names if fits.fullmatch(name)) == sorted(on_disk)


def test_waits_draw_from_no_generator_of_the_job(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    import random

    write_rows(tmp_path / "set")
    source = ParquetSource(store.upload(tmp_path / "set", bucket), SCHEMA)
    (first, *_) = source.fragments()
    store.fault = lambda number, method, path: "503" if number % 4 == 0 else None
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    source.read(first)
    assert (random.random(), np.random.random()) == expected
