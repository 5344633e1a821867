"""An exported model is loaded only if none of its records could be a pickle."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from raymill.checkpoint.directory import file_sha256
from raymill.errors import CheckpointError
from raymill.models.exported import SAMPLE_INPUTS, check_archive, drop_example_inputs, load_exported

Records = dict[str, bytes]


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive as torch writes it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    path = tmp_path_factory.mktemp("export") / "model.pt2"
    dynamic = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(model, (torch.randn(2, 3),), dynamic_shapes=dynamic), path)
    return path


@pytest.fixture
def clean(plain: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    path.write_bytes(plain.read_bytes())
    drop_example_inputs(path)
    return path


def rewrite(path: Path, change: Callable[[Records], None], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        root = archive.namelist()[0].partition("/")[0]
    change(records)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"{root}/{name}", content)


def test_what_torch_writes_holds_a_pickle_and_is_refused(plain: Path) -> None:
    with pytest.raises(CheckpointError, match="example inputs, which are a pickle"):
        check_archive(plain)


def test_without_example_inputs_it_is_loaded_and_computes_the_same(plain: Path, clean: Path) -> None:
    rows = torch.randn(5, 3)
    expected = torch.export.load(plain).module()(rows)
    torch.testing.assert_close(load_exported(clean, file_sha256(clean))(rows), expected, rtol=0, atol=0)


def test_another_archive_than_the_registered_one_is_refused_before_it_is_looked_into(clean: Path) -> None:
    with pytest.raises(CheckpointError, match="was registered: the file was changed"):
        load_exported(clean, "0" * 64)


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark))


def torch_pickled(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    return buffer.getvalue()


def legacy_weights(records: Records, mark: Path) -> None:
    # torch takes this file for the weights where it is there; the config beside it says that nothing is pickled.
    records["data/weights/model.pt"] = torch_pickled(mark)
    records["data/weights/aux_config.json"] = json.dumps(
        {"config": {"x": {"path_name": "model.pt", "use_pickle": False, "is_param": True}}}
    ).encode()


def legacy_constants(records: Records, mark: Path) -> None:
    records["data/constants/model.pt"] = torch_pickled(mark)


def sample_inputs(records: Records, mark: Path) -> None:
    records[SAMPLE_INPUTS] = torch_pickled(mark)


def pickled_weight(records: Records, mark: Path) -> None:
    config = json.loads(records["data/weights/model_weights_config.json"])
    entry = next(iter(config["config"].values()))
    entry["use_pickle"] = True
    records["data/weights/model_weights_config.json"] = json.dumps(config).encode()
    records[f"data/weights/{entry['path_name']}"] = torch_pickled(mark)


def pickled_constant(records: Records, mark: Path) -> None:
    config = {"config": {"c": {"path_name": "custom_obj_0", "use_pickle": True, "is_param": False}}}
    records["data/constants/model_constants_config.json"] = json.dumps(config).encode()
    records["data/constants/custom_obj_0"] = pickled(mark)


def second_model(records: Records, mark: Path) -> None:
    records["models/other.json"] = records["models/model.json"]
    records["data/sample_inputs/other.pt"] = torch_pickled(mark)


def compiled_library(records: Records, mark: Path) -> None:
    records["data/aotinductor/model/model.so"] = b"\x7fELF"


def pickle_as_text(records: Records, mark: Path) -> None:
    records["byteorder"] = pickled(mark)


def config_out_of_the_folder(records: Records, mark: Path) -> None:
    config = json.loads(records["data/weights/model_weights_config.json"])
    next(iter(config["config"].values()))["path_name"] = "../../models/model.json"
    records["data/weights/model_weights_config.json"] = json.dumps(config).encode()


HARMFUL = [
    legacy_weights,
    legacy_constants,
    sample_inputs,
    pickled_weight,
    pickled_constant,
    second_model,
    compiled_library,
    pickle_as_text,
    config_out_of_the_folder,
]


@pytest.mark.parametrize("harm", HARMFUL)
def test_an_archive_made_to_run_code_is_refused_and_runs_none(
    clean: Path, tmp_path: Path, harm: Callable[[Records, Path], None]
) -> None:
    mark = tmp_path / "ran"
    rewrite(clean, lambda records: harm(records, mark))
    with pytest.raises(CheckpointError, match="could run code"):
        load_exported(clean, file_sha256(clean))
    assert not mark.exists()


@pytest.mark.parametrize("harm", [legacy_weights, sample_inputs])
def test_torch_alone_would_run_it(clean: Path, tmp_path: Path, harm: Callable[[Records, Path], None]) -> None:
    mark = tmp_path / "ran"
    rewrite(clean, lambda records: harm(records, mark))
    with pytest.raises(Exception):  # noqa: B017, PT011  what torch says of it is not the point
        torch.export.load(clean)
    assert mark.exists()


def test_doubled_compressed_cut_and_empty_archives_are_refused(clean: Path) -> None:
    whole = clean.read_bytes()
    with zipfile.ZipFile(clean, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"again")
    with pytest.raises(CheckpointError, match="have one name"):
        check_archive(clean)
    clean.write_bytes(whole)
    rewrite(clean, lambda records: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        check_archive(clean)
    for content in (whole[: len(whole) // 2], b"", b"PK"):
        clean.write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            check_archive(clean)
