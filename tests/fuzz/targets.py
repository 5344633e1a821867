"""What is fuzzed: each target draws an input, reads it as the engine does, and holds what came of it against what was written.

The errors that the engine documents are caught here, so whatever a target raises is a find.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fuzz.strategies import json_values, mutated_bytes, mutated_json, rows_of, schemas, strange_texts
from raymill.checkpoint import directory
from raymill.checkpoint.commit import commit
from raymill.checkpoint.weights_digest import file_weights_sha256
from raymill.config.load import load_job, resolved
from raymill.config.spec import JobSpec
from raymill.config.strict_yaml import parse
from raymill.data.arrow import digest_rows
from raymill.data.manifest import Manifest, SplitManifest, as_record, from_record
from raymill.data.rows import pack, take, unpack
from raymill.data.sources.parquet import ParquetSource, write_parquet
from raymill.errors import CheckpointError, DataError, InputError
from raymill.record import events
from raymill.record.events import parse_event, read_events
from raymill.task import Fragment, Schema

JOB = (Path(__file__).parents[2] / "jobs" / "mnist" / "job.yaml").read_bytes()
YAML_TOKENS = (
    *(
        b": ",
        b"- ",
        b"\n",
        b"  ",
        b"&a ",
        b"*a",
        b"!!int ",
        b"!!python/object:os.system ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"'",
        b'"',
        b"#",
    ),
    *(
        b"|",
        b">",
        b"? ",
        b"---\n",
        b"...",
        b"%YAML 1.1\n",
        b"<<: ",
        b"1e999",
        b"0o7",
        b".nan",
        b"9" * 5000,
        b"\t",
        b"\xef\xbb\xbf",
    ),
    *(b"[" * 500, b"{a: " * 200, b"\xff", b"null", b"~", b"true", b"-1", b"\\ud800", b"\x85", b"\xe2\x80\xa8"),
)


def same(one: Any, other: Any) -> bool:
    """Whether two JSON-ready values are equal, NaN to itself too."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def job_file(draw: Callable[[Any], Any], folder: Path) -> None:
    anything = st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
    content = draw(
        st.one_of(mutated_bytes(JOB, YAML_TOKENS), anything, json_values.map(lambda value: json.dumps(value).encode()))
    )
    document = parse(content)
    assert document.problems or document.value == parse(content).value
    path = folder / "job.yaml"
    path.write_bytes(content)
    with suppress(InputError):
        spec = load_job(path).spec
        assert JobSpec.model_validate(json.loads(json.dumps(resolved(spec)))) == spec


FIELDS = [
    "name",
    "loop",
    "loop.epochs",
    "loop.batch_size",
    "optimizer.lr",
    "optimizer",
    "schedule",
    "model",
    "data",
    "scale.workers",
]


def override(draw: Callable[[Any], Any], folder: Path) -> None:
    value = st.one_of(
        st.text(max_size=20), json_values.map(json.dumps), st.sampled_from([one.decode("latin-1") for one in YAML_TOKENS])
    )
    name = st.one_of(st.sampled_from(FIELDS), st.builds("{}.{}".format, st.sampled_from(FIELDS), strange_texts), strange_texts)
    given = draw(st.lists(st.one_of(st.builds("{}={}".format, name, value), st.text(max_size=10)), min_size=1, max_size=2))
    path = folder / "job.yaml"
    path.write_bytes(JOB)
    with suppress(InputError):
        spec = load_job(path, given).spec
        assert JobSpec.model_validate(json.loads(json.dumps(resolved(spec)))) == spec


def data_manifest(draw: Callable[[Any], Any], folder: Path) -> None:
    counts = st.integers(0, 2**40)
    texts = st.text(st.characters(codec="utf-8"), max_size=4)
    fragments = st.lists(st.builds(Fragment, texts, counts, counts, counts, texts), max_size=4).map(tuple)
    manifest = Manifest(draw(st.dictionaries(texts, fragments.map(SplitManifest), max_size=3)))
    record = json.loads(json.dumps(as_record(manifest)))
    assert from_record(record) == manifest
    with suppress(DataError):
        assert from_record(json.loads(json.dumps(draw(mutated_json(record))))) == manifest


def checkpoint_folder(folder: Path) -> Path:
    """Two whole checkpoints and their pointer, made once and copied."""
    made = folder / "made"
    if not made.exists():
        for step in (1, 2):
            weights = {"w": np.full(3, step, np.float32)}
            save_file(weights, folder / "weights")
            record = {"step": step, "position": 10 * step, "is_best": step == 1}
            text = json.dumps({**record, "weights_sha256": file_weights_sha256(folder / "weights")})
            writers: dict[str, Callable[[Path], object]] = {
                directory.WEIGHTS: lambda path, weights=weights: save_file(weights, path),  # type: ignore[misc]
                directory.OPTIMIZER: lambda path: save_file({}, path),
                directory.RECORD: lambda path, text=text: path.write_text(text),  # type: ignore[misc]
            }
            commit(made, 1, 5, directory.Content(step, writers), best=step == 1)
    copied = folder / "copied"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(made, copied)
    return copied


def checkpoint(draw: Callable[[Any], Any], folder: Path) -> None:
    checkpoints = checkpoint_folder(folder)
    newest = checkpoints / "step-00000002.1"
    name = draw(st.sampled_from([directory.POINTER, directory.POINTER, directory.CHECKSUMS, *directory.FILES]))
    path = checkpoints / name if name == directory.POINTER else newest / name
    content = path.read_bytes()
    changed: Any = mutated_bytes(content)
    if name.endswith(".json"):
        changed = st.one_of(changed, mutated_json(json.loads(content)).map(lambda value: json.dumps(value).encode()))
    path.write_bytes(draw(changed))
    if name == directory.RECORD and draw(st.booleans()):
        directory.write_checksums(newest)
    notes: list[str] = []
    found = directory.find_latest(checkpoints, notes.append)
    assert found is not None
    state = directory.read_state(checkpoints / found, "step", "position")
    assert directory.is_count(state["position"])
    if name != directory.RECORD:
        assert state["position"] == 10 * state["step"]
        assert found == newest.name or notes or name == directory.POINTER
    pointer = directory.read_pointer(checkpoints)
    assert pointer is not None
    assert {pointer.latest, pointer.best} - {None} <= set(directory.names(checkpoints))
    with suppress(CheckpointError):
        directory.read(newest)


EVENTS = [
    events.AttemptStarted(time_s=1.0, attempt=1, num_workers=2, step=0, num_total_steps=9, resumed=False, notes=("a",), pid=7),
    events.StepDone(time_s=2.0, step=1, epoch=0, rows=8, metrics={"train/loss": math.nan, "b": math.inf}, rows_per_s=0.1),
    events.EvaluationDone(time_s=3.0, step=1, epoch=0, rows=8, metrics={"a": 0.1 + 0.2}, totals={"m": [[1, 2], [3, 4]]}),
    events.StepRefused(time_s=4.0, step=1, epoch=0, position=8, rows=[1, 2], policy="skip"),
    events.RunFinished(time_s=5.0, best_checkpoint=None, metrics={}),
]


def event_lines(draw: Callable[[Any], Any], folder: Path) -> None:
    lines = [json.dumps(events.as_record(event)).encode() for event in EVENTS]
    number = draw(st.integers(0, len(lines) - 1))
    valid = json.loads(lines[number])
    lines[number] = draw(
        st.one_of(
            mutated_bytes(lines[number]),
            mutated_json(valid).map(lambda value: json.dumps(value).encode()),
            st.binary(max_size=30),
        )
    )
    path = folder / "events.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with suppress(InputError):
        found, offset = read_events(path)
        assert offset == path.stat().st_size
        texts = {json.dumps(events.as_record(event)) for event in found}
        assert {json.dumps(events.as_record(event)) for at, event in enumerate(EVENTS) if at != number} <= texts
        for event in found:
            again = parse_event(json.loads(json.dumps(events.as_record(event))))
            assert same(events.as_record(again), events.as_record(event))


def packet(draw: Callable[[Any], Any], folder: Path) -> None:
    schema: Schema = draw(schemas())
    rows = draw(rows_of(schema, draw(st.integers(0, 4))))
    header, buffers = pack(rows)
    assert digest_rows(unpack(header, buffers)) == digest_rows(rows)
    header = json.dumps(draw(mutated_json(json.loads(header))))
    if buffers and draw(st.booleans()):
        buffers[0] = draw(mutated_bytes(bytes(buffers[0]), (b"\0", b"\xff")))
    with suppress(ValueError):
        found = unpack(header, buffers)
        # Of what came, each byte once and in its place.
        assert list(map(bytes, pack(found)[1])) == list(map(bytes, buffers))


def parquet(draw: Callable[[Any], Any], folder: Path) -> None:
    schema: Schema = draw(schemas())
    num_rows = draw(st.integers(1, 7))
    rows = draw(rows_of(schema, num_rows))
    data = folder / "set"
    shutil.rmtree(data, ignore_errors=True)
    write_parquet(data, rows, schema, num_shards=1, row_group_rows=3)
    source = ParquetSource(str(data), schema)
    fragments = source.fragments()
    for number, fragment in enumerate(fragments):
        written = take(rows, slice(3 * number, min(num_rows, 3 * number + 3)))
        assert digest_rows(source.read(fragment)) == digest_rows(written)
    path = data / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[-8:-4], "little")
    in_pages = draw(st.booleans())
    low, high = (4, len(content) - 9 - size) if in_pages else (len(content) - 8 - size, len(content) - 1)
    for _ in range(draw(st.integers(1, 3))):
        content[draw(st.integers(low, high))] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(content)
    with suppress(InputError):
        source.fragments()
    for number, fragment in enumerate(fragments):
        with suppress(DataError):
            # The index of a run's manifest, so a changed footer is known for one.
            found = digest_rows(source.read(fragment))
            assert found == digest_rows(take(rows, slice(3 * number, min(num_rows, 3 * number + 3))))
    with suppress(InputError, DataError):
        for fragment in source.fragments():
            source.read(fragment)


TARGETS: dict[str, Callable[[Callable[[Any], Any], Path], None]] = {
    target.__name__: target for target in (job_file, override, data_manifest, checkpoint, event_lines, packet, parquet)
}
