"""KubeRay's manifests: only fields of its v1 API, and of one mind with each other and the image.

`FIELDS` is written by hand from KubeRay's API reference (1.6); None stands for anything, because
Kubernetes' own types are below it.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cafemed import paths
from serve import haproxy

FOLDER = paths.PROJECT_DIR / "platform/k8s"
PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}

CLUSTER: dict[str, Any] = {
    "rayVersion": str,
    "authOptions": {"mode": str, "secretName": str},
    "gcsFaultToleranceOptions": {
        "redisAddress": str,
        "redisUsername": {"value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str}}},
        "redisPassword": {"value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str}}},
        "externalStorageNamespace": str,
    },
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "upscalingMode": str,
        "idleTimeoutSeconds": int,
        "resources": {"requests": None, "limits": None},
    },
    "headGroupSpec": {"rayStartParams": None, "template": {"metadata": None, "spec": None}},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": None,
            "template": {"metadata": None, "spec": None},
        }
    ],
}
FIELDS: dict[str, dict[str, Any]] = {
    "RayCluster": CLUSTER,
    "RayJob": {
        "entrypoint": str,
        "submissionMode": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": CLUSTER,
    },
    "RayService": {"serveConfigV2": str, "rayClusterConfig": CLUSTER},
}
POD = {"restartPolicy", "securityContext", "tolerations", "containers", "volumes"}
CONTAINER = {"name", "image", "ports", "env", "resources", "readinessProbe", "volumeMounts"}


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return content


def wrong(given: Any, allowed: Any, path: str) -> Iterator[str]:
    """The fields that the API does not have, or has of another type."""
    if allowed is None:
        return
    if isinstance(allowed, dict):
        for key, value in given.items():
            if key in allowed:
                yield from wrong(value, allowed[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(allowed, list):
        for i, value in enumerate(given):
            yield from wrong(value, allowed[0], f"{path}[{i}]")
    elif type(given) is not allowed:
        yield f"{path}: {type(given).__name__}"


def cluster(content: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = content["spec"]
    inner: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return inner


def templates(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of the head and of every worker group."""
    spec = cluster(content)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def locked_ray() -> str:
    lock = (paths.PROJECT_DIR / "requirements.lock").read_text()
    return re.findall(r"^ray==(\S+)$", lock, re.MULTILINE)[0]


each = pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])


@each
def test_there_are_no_other_fields_than_the_apis(name: str):
    content = read(name)
    assert set(content) == {"apiVersion", "kind", "metadata", "spec"}
    assert content["apiVersion"] == "ray.io/v1"
    assert content["kind"].lower() == name
    assert list(wrong(content["spec"], FIELDS[content["kind"]], "spec")) == []
    for pod in templates(content):
        assert set(pod) <= POD
        [container] = pod["containers"]
        assert set(container) <= CONTAINER


def test_a_field_that_is_not_the_apis_would_be_found():
    spec = read("raycluster")["spec"]
    spec["workerGroupSpecs"][0]["numWorkers"] = 3
    spec["enableInTreeAutoscaling"] = "true"
    found = list(wrong(spec, CLUSTER, "spec"))
    assert found == ["spec.enableInTreeAutoscaling: str", "spec.workerGroupSpecs[0].numWorkers"]


@each
def test_every_pod_has_the_launchers_image_the_token_and_the_disk(name: str):
    content = read(name)
    claim = read("storage")["metadata"]["name"]
    secret = cluster(content)["authOptions"]["secretName"]
    assert cluster(content)["authOptions"]["mode"] == "token"
    assert (
        f"secret generic {secret} --from-literal=auth_token="
        in (FOLDER / "storage.yaml").read_text()
    )
    launcher = yaml.safe_load((paths.PROJECT_DIR / "ray_cluster.yaml").read_text())
    for pod in templates(content):
        [container] = pod["containers"]
        assert container["image"] == launcher["docker"]["image"]
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        source = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert source == {"name": secret, "key": "auth_token"}
        [mount], [volume] = container["volumeMounts"], pod["volumes"]
        assert mount == {"name": volume["name"], "mountPath": env["CAFEMED_HOME"]["value"]}
        assert volume["persistentVolumeClaim"] == {"claimName": claim}
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        # With the autoscaler a pod that was restarted in place would join as a node that is lost.
        assert pod["restartPolicy"] == "Never"


@each
def test_resources_ports_and_version_fit(name: str):
    content = read(name)
    assert cluster(content)["rayVersion"] == locked_ray()
    head = templates(content)[0]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert PORTS.items() <= ports.items()
    assert head["readinessProbe"]["httpGet"]["port"] in ports
    for pod in templates(content):
        # KubeRay tells Ray what the limits say, so more than is kept for the pod must not be there.
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= set(resources["limits"])
        assert all(isinstance(value, str | int) for value in resources["limits"].values())
    for group in cluster(content)["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] < group["maxReplicas"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_trials_find_cpu_workers_and_nodes_with_several_gpus_but_not_the_head(name: str):
    spec = cluster(read(name))
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["enableInTreeAutoscaling"] is True
    gpus = {
        group["groupName"]: group["template"]["spec"]["containers"][0]["resources"]["limits"].get(
            "nvidia.com/gpu", 0
        )
        for group in spec["workerGroupSpecs"]
    }
    assert gpus == {"cpu": 0, "gpu": 4}


def test_the_job_runs_a_sweep_on_the_same_cluster_that_raycluster_starts():
    job = read("rayjob")["spec"]
    assert job["rayClusterSpec"] == read("raycluster")["spec"]
    program, job_file, *overrides = job["entrypoint"].split()
    assert (program, job_file) == ("python", "jobs/tune.py")
    keys = [override.split("=")[0] for override in overrides]
    assert keys == ["name", "search", "search.num_samples", "search.gpus"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own schema
def test_the_service_serves_what_the_projects_own_serve_file_does():
    from ray.serve.schema import ServeDeploySchema

    service = yaml.safe_load(read("rayservice")["spec"]["serveConfigV2"])
    own = yaml.safe_load((paths.PROJECT_DIR / "serve/config.yaml").read_text())
    ServeDeploySchema(**service)
    [application] = own["applications"]
    assert application["args"]["serve"].pop("access") == {"auth": "none"}
    application["args"]["serve"]["access"] = {"auth": "keys"}  # it listens beyond the loopback
    assert service["applications"] == own["applications"]
    assert service["proxy_location"] == own["proxy_location"]
    assert service["http_options"] == {**own["http_options"], "host": "0.0.0.0"}
    assert service["logging_config"] == own["logging_config"]  # no paths: they may be of a patient
    for pod in templates(read("rayservice")):
        ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        assert ports["serve"] == own["http_options"]["port"]


def test_the_services_nodes_have_haproxy_as_a_local_endpoint_has_it():
    for pod in templates(read("rayservice")):
        env = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
        of_serve = {name: value for name, value in env.items() if name.startswith("RAY_SERVE_")}
        script = of_serve.pop("RAY_SERVE_HAPROXY_BINARY_PATH")
        expected = dict(haproxy.ON_NODES_WITH_HAPROXY)
        assert script == f"/home/ray/cafemed/{expected.pop('RAY_SERVE_HAPROXY_BINARY_PATH')}"
        assert of_serve == expected


def test_a_service_that_outlives_its_head_is_a_matter_of_taking_comment_marks_off():
    text = (FOLDER / "rayservice.yaml").read_text()
    [block] = re.findall(r"^    # gcsFaultToleranceOptions:\n(?:    #   .*\n)+", text, re.MULTILINE)
    changed = yaml.safe_load(text.replace(block, block.replace("    # ", "    ")))
    assert list(wrong(changed["spec"], FIELDS["RayService"], "spec")) == []
    options = cluster(changed).pop("gcsFaultToleranceOptions")
    assert changed == read("rayservice")
    assert re.fullmatch(r"[\w.]+:6379", options["redisAddress"])
    secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in text
    # Replicas go on with the workers: none may be on the head.
    assert cluster(changed)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_no_two_of_them_would_make_services_of_the_same_name():
    """KubeRay names the services after them: `-head-svc` of a cluster and of a service."""
    names = {read(name)["metadata"]["name"] for name in ("raycluster", "rayjob", "rayservice")}
    assert len(names) == 3


def test_the_disk_can_be_written_by_all_nodes_at_once():
    content = read("storage")
    assert (content["apiVersion"], content["kind"]) == ("v1", "PersistentVolumeClaim")
    assert content["spec"]["accessModes"] == ["ReadWriteMany"]
    assert set(content["spec"]) == {"storageClassName", "accessModes", "resources"}
