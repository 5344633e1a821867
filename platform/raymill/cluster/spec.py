"""What a file of `cluster/` says, checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from raymill.config import strict_yaml
from raymill.config.strict_model import StrictModel
from raymill.errors import InputError, Problem, did_you_mean
from raymill.files import make_private_folder
from raymill.paths import home, project_root

WRITABLE = re.compile(r"((s3|gs|gcs|abfs|abfss|az|hdfs)://[^/]+|/)")
"""Begins the name of a place that takes files."""

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


class NodeSpec(StrictModel):
    """One node of Ray, as processes on this machine."""

    num_cpus: int = Field(ge=0, le=1024, description="CPUs that it offers; Ray does not hold anybody to them")
    resources: dict[str, float] = Field(default_factory=dict, description="other things that it offers, by name")


class ClusterSpec(StrictModel):
    """A cluster: `local` is several nodes on this machine; `address` is one that is there already."""

    kind: Literal["local", "address"]
    nodes: list[NodeSpec] = Field(default_factory=lambda: [NodeSpec(num_cpus=2)], min_length=1, max_length=64)
    object_store_mb: int = Field(default=200, ge=80, description="of each node, in MB")
    quotas: dict[str, float] = Field(default_factory=dict, description="user -> CPUs that all runs of theirs may hold at once")
    keep_ready: bool = Field(default=True, description="after a run, hold workers ready for another one like it, for ten minutes")
    runs_at: str | None = Field(
        default=None,
        description="address or folder where the folders of runs are kept too, for when the head's disk is lost",
    )
    mlflow: bool = Field(default=False, description="of kind local: start an MLflow server with passwords beside the nodes")
    dashboard: str | None = Field(default=None, description="of kind address: where its Jobs API answers, http://HOST:8265")
    token_file: str | None = Field(default=None, description="of kind address: the file with its token, which only you may read")

    insecure: bool = Field(default=False, description="never in a file: --insecure, typed with each command")

    @field_validator("runs_at")
    @classmethod
    def _can_be_written(cls, runs_at: str | None) -> str | None:
        if runs_at is not None and not WRITABLE.match(runs_at):
            raise PydanticCustomError("runs_at", "an address, such as s3://BUCKET/runs, or the whole path of a folder")
        return runs_at

    @field_validator("insecure")
    @classmethod
    def _not_in_a_file(cls, insecure: bool) -> bool:
        raise PydanticCustomError("insecure", "nothing: type --insecure with each command")

    @field_validator("mlflow")
    @classmethod
    def _only_of_this_machine(cls, mlflow: bool, info: ValidationInfo) -> bool:
        if mlflow and info.data.get("kind") == "address":
            raise PydanticCustomError("kind", "false: a server is started beside nodes of this machine alone")
        return mlflow


def load_cluster(name: str, *, insecure: bool = False) -> ClusterSpec:
    """Read cluster/NAME.yaml of the project.

    Args:
        insecure: whoever uses it said that it may ask for no token.

    Raises:
        InputError: there is none, or something in it is wrong.
    """
    folder = project_root() / "cluster"
    path = folder / f"{name}.yaml"
    if not NAME.fullmatch(name) or not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        fix = did_you_mean(name, known) if known else "Write one: `kind: local` is enough for nodes on this machine."
        raise InputError([Problem("cluster", repr(name[:60]), f"a file NAME.yaml in {folder}", fix)])
    values = strict_yaml.parse(path.read_bytes()).value
    try:
        return ClusterSpec.model_validate(values).model_copy(update={"insecure": insecure})
    except ValidationError as error:
        raise InputError([_problem(path, one) for one in error.errors()]) from error


def _problem(path: Path, one: Any) -> Problem:
    field = ".".join(map(str, one["loc"])) or "the file"
    if one["type"] == "extra_forbidden":
        known = list((NodeSpec if "nodes" in one["loc"] else ClusterSpec).model_fields)
        return Problem(f"{path} {field}", "an unknown field", "a known one", did_you_mean(str(one["loc"][-1]), known))
    return Problem(f"{path} {field}", repr(one.get("input"))[:80], one["msg"], "Correct it; docs/cluster.md names the fields.")


class ClusterFolder:
    """Where what is known of a cluster is kept: `.raymill/clusters/NAME/`, for its user alone."""

    def __init__(self, name: str) -> None:
        """It may not exist yet."""
        self.name, self.path = name, home() / "clusters" / name

    def make(self) -> None:
        """Make the folder."""
        make_private_folder(home())
        make_private_folder(self.path)

    @property
    def token(self) -> Path:
        """The file with the token that whoever uses the cluster needs, of mode 0600."""
        return self.path / "token"

    @property
    def record(self) -> Path:
        """What runs: addresses, nodes and their processes. Absent where nothing does."""
        return self.path / "cluster.json"

    @property
    def gcs(self) -> Path:
        """What the head keeps of nodes, actors and jobs. Absent where none runs."""
        return self.path / "gcs"

    @property
    def mlflow(self) -> Path:
        """What its MLflow server has there: where it answers, the password, who may come in. Absent where there is none."""
        return self.path / "mlflow"

    @property
    def mlflow_log(self) -> Path:
        """What the MLflow server has printed."""
        return self.path / "mlflow.log"

    def log(self, number: int) -> Path:
        """What a node has printed."""
        return self.path / f"node-{number}.log"


def all_cluster_folders() -> list[ClusterFolder]:
    """Of each cluster of which anything is kept."""
    return [ClusterFolder(path.name) for path in sorted((home() / "clusters").glob("*/"))]
