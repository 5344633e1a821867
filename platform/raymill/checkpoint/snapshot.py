"""A training state as tensors and plain values, and as the bytes of files.

Everything that a resume needs is in it: weights, buffers, optimizers, schedules, position. There is no random state: each step
seeds all generators from (seed, position, shard, objective), so randomness is a function of where the run is, as the order of
samples is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save, save_file

from raymill.checkpoint.directory import (
    OPTIMIZER,
    RECORD,
    WEIGHTS,
    Content,
    Packed,
    other_weights,
    parse_state,
    read_state,
    verify,
)
from raymill.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A state on the CPU, apart from the training that goes on.

    Attributes:
        weights: parameter and buffer names of the model -> tensors.
        optimizer: "objective/parameter/value" -> tensors.
        record: everything else, as JSON-ready values.
    """

    weights: Tensors
    optimizer: Tensors
    record: dict[str, Any]


def content(snapshot: Snapshot, *, best: bool) -> Content:
    """What is to be written of a snapshot; `best` is remembered in it."""
    return Content(
        snapshot.record["step"],
        {
            WEIGHTS: partial(save_file, snapshot.weights),
            OPTIMIZER: partial(save_file, snapshot.optimizer),
            RECORD: lambda path: path.write_text(_record_text(snapshot, best)),
        },
    )


def pack(snapshot: Snapshot, *, best: bool) -> Packed:
    """The files of a snapshot, byte for byte as `content` writes them."""
    files = {WEIGHTS: save(snapshot.weights), OPTIMIZER: save(snapshot.optimizer)}
    return Packed(snapshot.record["step"], {**files, RECORD: _record_text(snapshot, best).encode()})


def unpack(packed: Packed) -> Snapshot:
    """The snapshot of these files.

    Raises:
        CheckpointError: the weights are not those that were saved.
    """
    files, where = packed.files, f"the checkpoint of step {packed.step}"
    record = parse_state(files[RECORD], where, "weights_sha256")
    return _with_its_weights(Snapshot(load_tensors(files[WEIGHTS]), load_tensors(files[OPTIMIZER]), record), where)


def load(path: Path) -> Snapshot:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: when it is not whole, or its weights are not those that were saved.
    """
    verify(path)
    tensors = {}
    for name in (WEIGHTS, OPTIMIZER):
        try:
            tensors[name] = load_file(path / name)
        except SafetensorError as error:
            raise CheckpointError(f"{path / name}: is no safetensors file: {error}") from error
    record = read_state(path, "weights_sha256")
    return _with_its_weights(Snapshot(tensors[WEIGHTS], tensors[OPTIMIZER], record), str(path / WEIGHTS))


def _with_its_weights(snapshot: Snapshot, where: str) -> Snapshot:
    """The snapshot, if its weights hash to what its record says: checksums that were changed along with a file say nothing."""
    found, recorded = weights_sha256(snapshot.weights), snapshot.record["weights_sha256"]
    if found != recorded:
        raise CheckpointError(other_weights(where, found, recorded))
    return snapshot


def _record_text(snapshot: Snapshot, best: bool) -> str:
    return json.dumps({**snapshot.record, "is_best": best, "weights_sha256": weights_sha256(snapshot.weights)}, indent=1)


# ---------------------------------------------------------------- hashes, and values that JSON can hold


def weights_sha256(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights and buffers, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def as_plain(value: Any) -> Any:
    """Values of a state_dict as JSON can hold them, marking what JSON would change."""
    if isinstance(value, torch.Tensor):
        return {"__tensor__": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"__tuple__": [as_plain(item) for item in value]}
    if isinstance(value, Counter):
        return {"__counter__": as_plain(dict(value))}
    if isinstance(value, dict):
        if all(isinstance(name, str) for name in value):
            return {name: as_plain(item) for name, item in value.items()}
        return {"__pairs__": [[as_plain(name), as_plain(item)] for name, item in value.items()]}
    if isinstance(value, list):
        return [as_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"a {type(value).__name__} in an optimizer's or schedule's state cannot be saved without pickle")


def from_plain(value: Any) -> Any:
    """The value that `as_plain` was given."""
    if isinstance(value, dict):
        if "__tensor__" in value:
            return torch.tensor(value["__tensor__"], dtype=getattr(torch, value["dtype"]))
        if "__tuple__" in value:
            return tuple(from_plain(item) for item in value["__tuple__"])
        if "__counter__" in value:
            return Counter(from_plain(value["__counter__"]))
        if "__pairs__" in value:
            return {from_plain(name): from_plain(item) for name, item in value["__pairs__"]}
        return {name: from_plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    return value
