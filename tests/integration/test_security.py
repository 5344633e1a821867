"""What a run shows to others: nothing but loopback sockets, private folders, and no secret in anything that it leaves."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faults.cases import SLOWED
from faults.harness import Live, live
from raymill.checkpoint import directory
from raymill.data.sources import ParquetSource
from raymill.errors import CheckpointError, InputError
from raymill.files import write_record
from raymill.record.catalog import find_run
from raymill.task import Field

CANARY = "canary-5f0c9a7e"
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[Live, list[str], dict[str, int], Path]]:
    """A run that had secrets in its environment: its place, its open sockets, the modes of its folders, Ray's logs."""
    with live() as place:
        place.settings |= {"AWS_SECRET_ACCESS_KEY": CANARY, "HF_TOKEN": CANARY, "PLAIN": f"https://me:{CANARY}@host/x"}
        command = place.start(["train", "smoke", "--json"], SLOWED)
        deadline_s = time.monotonic() + 240
        while place.step() < 5:
            assert command.poll() is None, place.said(0)
            assert time.monotonic() < deadline_s, place.said(0)
            time.sleep(0.1)
        listening = [
            (process.name(), connection.laddr)
            for process in place.processes()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) > 3, "Ray listens somewhere"
        heard = [f"{name} on {at.ip}:{at.port}" for name, at in listening if at.ip not in LOOPBACK]
        session = next(place.scratch.glob("raymill-*"))
        modes = {path.name.partition("-")[0]: stat.S_IMODE(path.stat().st_mode) for path in (session, place.folder.path)}  # type: ignore[union-attr]
        logs = Path(shutil.copytree(next(session.glob("ray/session_2*")) / "logs", place.tmp / "logs"))
        assert command.wait(timeout=240) == 0, place.said(0)
        yield place, heard, modes, logs


@pytest.mark.integration
def test_nothing_listens_beyond_this_machine(watched: tuple[Live, list[str], dict[str, int], Path]) -> None:
    assert watched[1] == []


@pytest.mark.integration
def test_the_folders_of_a_run_and_its_ray_are_private(watched: tuple[Live, list[str], dict[str, int], Path]) -> None:
    assert set(watched[2].values()) == {0o700}


@pytest.mark.integration
def test_no_secret_of_the_environment_is_in_anything_that_a_run_leaves(
    watched: tuple[Live, list[str], dict[str, int], Path],
) -> None:
    place, _, _, logs = watched
    files = [path for folder in (place.home, logs) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"mlflow.db", "ray.log", "events.jsonl", "raylet.out"} <= {path.name for path in files}
    assert [str(path) for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in place.said(0) + (place.tmp / "0.out").read_text()


@pytest.mark.integration
def test_a_variable_that_reopens_ray_to_code_in_data_is_refused() -> None:
    with live() as place:
        place.settings["RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE"] = "1"
        assert place.start(["train", "smoke", "--json"]).wait(timeout=120) == 2
        assert "unset RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE" in place.printed(0)["message"]
        assert place.folder is None


# ---------------------------------------------------------------- files that carry code


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


def test_a_parquet_file_with_a_pickle_for_its_column_type_runs_no_code(tmp_path: Path) -> None:
    import ray.data  # noqa: F401  registers the column types that would read it

    bomb = pickle.dumps(Touch(tmp_path / "marker"))
    storage = pa.list_(pa.int64(), 2)
    for name in ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_variable_shaped_tensor"):
        metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": bomb}
        column = pa.field("label", storage).with_metadata(metadata)
        folder = tmp_path / name
        folder.mkdir()
        table = pa.Table.from_arrays([pa.array([[1, 2], [3, 4]], storage)], schema=pa.schema([column]))
        pq.write_table(table, folder / "part-00000.parquet")
        with pytest.raises(InputError, match=r"part-00000"):
            ParquetSource(str(folder), {"label": Field("int64")}).fragments()
        assert not (tmp_path / "marker").exists()


def test_a_pickle_in_the_place_of_a_checkpoints_tensors_is_refused_unread(tmp_path: Path) -> None:
    import torch

    from raymill.checkpoint import snapshot

    taken = snapshot.Snapshot({"w": torch.ones(2)}, {}, {"step": 1, "position": 10})
    directory.save(tmp_path, "step-00000001.1", snapshot.content(taken, best=False))
    path = tmp_path / "step-00000001.1"
    (path / "weights.safetensors").write_bytes(pickle.dumps(Touch(tmp_path / "marker")))
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        snapshot.load(path)
    # Also when the checksums were made to fit.
    for name in ("weights.safetensors", "optimizer.safetensors"):
        (path / name).write_bytes(pickle.dumps(Touch(tmp_path / "marker")))
    contents = {name: (path / name).read_bytes() for name in directory.FILES}
    fitting = {
        name: {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in contents.items()
    }
    write_record(path / directory.CHECKSUMS, {"files": fitting})
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: is no safetensors"):
        snapshot.load(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["../step-00000001.1", "/tmp/step-00000001.1", "step-00000001.1/../../x", "link"])
def test_a_pointer_out_of_the_folder_of_checkpoints_is_not_followed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints"
    (tmp_path / "step-00000001.1").mkdir()
    folder.mkdir()
    (folder / "step-00000002.1").symlink_to(tmp_path / "step-00000001.1")
    for latest in (name, "step-00000002.1"):
        write_record(folder / directory.POINTER, {"latest": latest, "best": None, "attempt": 1})
        assert directory.read_pointer(folder) is None


@pytest.mark.parametrize("name", ["../../etc", "/etc", "a/b", "..", ".", "", "a\nb", "x%2e%2e", "~", "a;touch marker"])
def test_a_run_that_is_no_name_is_not_looked_for(name: str) -> None:
    with pytest.raises(InputError, match="expected the id of a run of this project"):
        find_run(name)
