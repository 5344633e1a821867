"""What raymill uses of Ray without Ray's promise to keep it: each name is there in the installed version, and does what it is
used for. A name that a new Ray has moved or changed fails here, with what it was for, rather than in a run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import mmap
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.exceptions
from ray.train import RunConfig, ScalingConfig

from raymill import ray_internals
from raymill.ray_internals import PRIVATE_NAMES, PrivateName

pytestmark = pytest.mark.integration

RAY = Path(ray.__file__).parent
COMPILED = ("_raylet.so", "core/src/ray/raylet/raylet", "core/src/ray/gcs/gcs_server")
VARIABLES = [name for name in PRIVATE_NAMES if name.path.startswith("$")]
KEYWORDS = [name for name in PRIVATE_NAMES if name.path.startswith("ray.init(")]
ATTRIBUTES = [name for name in PRIVATE_NAMES if name not in VARIABLES and name not in KEYWORDS]
SETTINGS = ray_internals.RAY_SETTINGS | ray_internals.EMBEDDED_SETTINGS | ray_internals.ELASTIC_SETTINGS
SETTINGS |= ray_internals.NODE_SETTINGS | ray_internals.HEAD_SETTINGS
DOCUMENTED = {"RAY_DATA_DISABLE_PROGRESS_BARS", "RAY_USAGE_STATS_ENABLED", "RAY_COLOR_PREFIX", "RAY_DEDUP_LOGS"}
"""Settings that Ray's own documentation names."""


def by_path(names: list[PrivateName]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names, ids=[name.path for name in names])


def complain(name: PrivateName, found: object) -> None:
    """Fail with what a name was for that this Ray does not have."""
    pytest.fail(
        f"Ray {ray.__version__} does not know {name.path}: {found}.\nIt is used for this: {name.why}.\n"
        f"Without it: {name.without}.\nFind what took its place, or do without it, in {ray_internals.__file__}."
    )


# ---------------------------------------------------------------- the names


@by_path(ATTRIBUTES)
def test_an_attribute_is_there(name: PrivateName) -> None:
    module, _, attributes = name.path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        complain(name, error)


@by_path(KEYWORDS)
def test_a_keyword_of_init_is_taken(name: PrivateName) -> None:
    keyword = name.path.removeprefix("ray.init(").removesuffix(")")
    taken = inspect.signature(ray.init).parameters
    known = keyword in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    # Where `ray.init` takes any keyword, those that it knows stand in its source.
    if not known or (keyword not in taken and f'"{keyword}"' not in inspect.getsource(ray.init)):
        complain(name, "ray.init does not take it")


@cache
def source_files() -> list[bytes]:
    """The text of Ray's own Python files."""
    return [path.read_bytes() for path in RAY.rglob("*.py") if "thirdparty_files" not in path.parts]


def knows_variable(variable: str) -> bool:
    """Whether Ray's Python files or programs hold the name of an environment variable."""
    if any(variable.encode() in text for text in source_files()):
        return True
    for name in COMPILED:
        with open(RAY / name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(variable.encode()) >= 0:
                return True
    return False


@by_path(VARIABLES)
def test_a_variable_is_looked_at(name: PrivateName) -> None:
    if not knows_variable(name.path.removeprefix("$")):
        complain(name, "none of its files holds the name")


def test_a_name_that_is_gone_is_noticed_and_told_with_what_it_was_for() -> None:
    gone = PrivateName("ray.train.v2._internal.callbacks.datasets:NoSuchCallback", "reason so and so", "this would be lost")
    with pytest.raises(pytest.fail.Exception, match=r"NoSuchCallback(.|\n)*reason so and so(.|\n)*this would be lost"):
        test_an_attribute_is_there(gone)
    with pytest.raises(pytest.fail.Exception, match="no_such_keyword"):
        test_a_keyword_of_init_is_taken(PrivateName("ray.init(_no_such_keyword)", "-", "-"))
    with pytest.raises(pytest.fail.Exception, match="RAY_NO_SUCH_THING"):
        test_a_variable_is_looked_at(PrivateName("$RAY_NO_SUCH_THING", "-", "-"))


def test_every_private_name_that_is_used_is_listed() -> None:
    used = {f"${variable}" for variable in SETTINGS.keys() - DOCUMENTED}
    used |= {f"ray.init({keyword})" for keyword in ray_internals.private_session("folder")}
    trees = [ast.parse(Path(ray_internals.__file__).read_text()), ast.parse(ray_internals.ASK_WITHOUT_TOKEN)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ray."):
            used |= {f"{node.module}:{alias.name}" for alias in node.names}
    written = {text for node in nodes if isinstance(node, ast.Attribute) and (text := ast.unparse(node)).startswith("ray._")}
    whole = {text for text in written if not any(other.startswith(f"{text}.") for other in written)}
    assert whole, "the names that are written out in full are found"
    used |= {":".join(text.rsplit(".", 1)) for text in whole}
    assert used <= {name.path for name in PRIVATE_NAMES}


# ---------------------------------------------------------------- Ray Train


def make_trainer(folder: Path, *, embedded: bool) -> Any:
    return ray_internals.trainer_class(embedded=embedded)(
        lambda: None,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="ray-train", storage_path=str(folder)),  # type: ignore[arg-type]
    )


def test_an_embedded_trainer_leaves_out_two_callbacks_and_no_other(tmp_path: Path) -> None:
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    whole, embedded = (
        [type(callback) for callback in make_trainer(tmp_path, embedded=here)._create_default_callbacks()]
        for here in (False, True)
    )
    unused = {DatasetsCallback, PlacementGroupCleanerCallback}
    assert unused <= set(whole), "Ray still makes them of its own accord"
    assert embedded == [kind for kind in whole if kind not in unused]


def test_a_run_has_an_id_of_ray_that_can_be_replaced(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, embedded=True)
    assert trainer.train_run_context.run_id not in ("", "smoke-1")
    ray_internals.name_run(trainer, "smoke-1")
    assert trainer.train_run_context.run_id == "smoke-1"


def test_the_callback_hears_of_a_resize_and_holds_that_shutdown_alone() -> None:
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
    from ray.train.v2._internal.execution.controller.state import InitializingState, ResizingState
    from ray.train.v2._internal.execution.scaling_policy.scaling_policy import ResizeDecision

    said: list[object] = []
    callback = ray_internals.resize_callback(said.append, lambda: said.append("held"))
    assert isinstance(callback, ControllerCallback)
    assert isinstance(callback, WorkerGroupCallback)
    # What Ray calls is what raymill overrides.
    assert callable(ControllerCallback.after_controller_state_update)
    assert callable(WorkerGroupCallback.before_worker_group_shutdown)
    callback.after_controller_state_update(InitializingState(), InitializingState())
    callback.before_worker_group_shutdown(None)
    assert said == []
    resizing = ResizingState(ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1.0}))
    callback.after_controller_state_update(InitializingState(), resizing)
    assert said == [3]
    callback.before_worker_group_shutdown(None)
    callback.before_worker_group_shutdown(None)
    assert said == [3, "held"]


def test_what_is_raised_for_a_lost_process_are_exceptions_and_none_of_a_users_own() -> None:
    kinds = ray_internals.lost_process_errors()
    assert {kind.__name__ for kind in kinds} == {
        "RayActorError",
        "ActorUnschedulableError",
        "WorkerCrashedError",
        "WorkerHealthCheckFailedError",
    }
    assert all(issubclass(kind, Exception) for kind in kinds)
    assert not issubclass(ray.exceptions.RayTaskError, kinds)
    assert not any(issubclass(kind, kinds) for kind in (RuntimeError, ValueError, OSError))


# ---------------------------------------------------------------- Ray Core

SESSION = """
import json, os, subprocess, sys

import psutil
import ray

from raymill import ray_internals

folder = sys.argv[1]
info = ray.init(
    address="local",
    include_dashboard=False,
    num_cpus=2,
    object_store_memory=100 * 2**20,
    log_to_driver=False,
    logging_level="ERROR",
    **ray_internals.private_session(folder),
).address_info


@ray.remote(num_cpus=0)
class Sitter:
    def node(self):
        return ray.get_runtime_context().get_node_id()


used_before = ray_internals.nodes_in_use()
sitter = Sitter.remote()
node = ray.get(sitter.node.remote())


def ask(variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    command = [sys.executable, "-c", ray_internals.ASK_WITHOUT_TOKEN, info["gcs_address"]]
    return subprocess.run(command, env=kept | variables, capture_output=True, check=False).returncode


# The members of this process's session: some of Ray's processes hide their environment, and outlive their parents.
members = [process for process in psutil.process_iter() if os.getsid(process.pid) == os.getpid()]
listening = [
    (process.name(), connection.laddr.ip)
    for process in members
    for connection in process.net_connections("inet")
    if connection.status == psutil.CONN_LISTEN
]
print(json.dumps({
    "session": info["session_dir"],
    "address": info["gcs_address"],
    "listening": listening,
    "nodes": {name: dict(has) for name, has in ray_internals.node_resources().items()},
    "draining": ray_internals.draining_nodes(),
    "used": [sorted(used_before), sorted(ray_internals.nodes_in_use())],
    "node": node,
    "asked": [ask({"RAY_AUTH_MODE": "disabled"}), ask({name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})],
}))
ray.shutdown()
"""


@pytest.fixture(scope="module")
def session() -> Iterator[dict[str, Any]]:
    """What an embedded Ray with raymill's settings says of itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    settings = ray_internals.RAY_SETTINGS | ray_internals.EMBEDDED_SETTINGS
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # Short, because the sockets in it have a length limit.
    with tempfile.TemporaryDirectory(prefix="ri-") as folder:
        started = subprocess.Popen(
            [sys.executable, "-c", SESSION, f"{folder}/ray"],
            env=kept | settings | own,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = started.communicate(timeout=180)
            assert started.returncode == 0, err
            yield {**json.loads(out.splitlines()[-1]), "folder": folder}
        finally:
            left = [process for process in psutil.process_iter() if session_of(process) == started.pid]
            _, left = psutil.wait_procs(left, timeout=10)
            for process in left:
                process.kill()
            psutil.wait_procs(left)


def session_of(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def test_the_session_lies_in_the_folder_that_is_given(session: dict[str, Any]) -> None:
    assert Path(session["session"]).parent == Path(session["folder"]).resolve() / "ray"


def test_an_embedded_ray_listens_on_the_loopback_address_alone(session: dict[str, Any]) -> None:
    programs = {program for program, _ in session["listening"]}
    assert {"gcs_server", "raylet"} <= programs
    assert [(program, ip) for program, ip in session["listening"] if ip not in ("127.0.0.1", "::ffff:127.0.0.1")] == []


def test_its_state_says_what_each_node_has_which_are_used_and_which_are_to_leave(session: dict[str, Any]) -> None:
    assert session["nodes"].keys() == {session["node"]}
    assert session["nodes"][session["node"]]["CPU"] == 2
    assert session["used"] == [[], [session["node"]]]
    assert session["draining"] == {}


def test_it_answers_whoever_has_the_token_and_nobody_else(session: dict[str, Any]) -> None:
    without, with_token = session["asked"]
    assert without != 0
    assert with_token == 0
