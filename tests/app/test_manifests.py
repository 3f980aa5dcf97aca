"""The files that start curvd on several GPUs and machines say what their readers understand.

Kubernetes' objects are held against the schemas of its API, strictly: what they do not know is
an error. RayClusters are held against KubeRay's, and their pods against Kubernetes'; files for
`ray up` against Ray's. What they say to curvd is held against its options.
"""

import copy
import functools
import json
import re
import shlex
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

pytest.importorskip("torch")
from curvd_server import cli
from curvd_server.config import ServerConfig

ROOT = Path(__file__).parents[2]
VERSION = "1.34"
"""Of Kubernetes."""


def read(path):
    return [d for d in yaml.safe_load_all((ROOT / path).read_text()) if d]


OBJECTS = {
    f"{d['kind']} {d['metadata']['name']}": d
    for path in sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
    for d in read(path)
}
CLUSTER = OBJECTS["RayCluster curvd-ray"]
FRONT = OBJECTS["Deployment curvd"]
ON_MACHINES = read("deploy/ray/cluster.yaml")[0]
COMPOSE = read("docker-compose.yml")[0]


def closed(schema):
    """Make a schema refuse fields that it does not know."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in schema or schema.get(
        "x-kubernetes-preserve-unknown-fields"
    )
    if isinstance(schema.get("properties"), dict) and not open_ended:
        made["additionalProperties"] = False
    return made


@functools.cache
def schema_of(name):
    return closed(json.loads((ROOT / "tests/corpora" / name).read_text()))


def templates_of(cluster):
    spec = cluster["spec"]
    return [
        group["template"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]


def check(an_object):
    """Raise what a schema says against an object of Kubernetes'."""
    if an_object["kind"] != "RayCluster":
        kubernetes_validate.validate(an_object, VERSION, strict=True)
        return
    jsonschema.validate(an_object, schema_of("kuberay/raycluster-v1.json"))
    for template in templates_of(an_object):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **template}
        kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_is_what_its_schema_says(name):
    check(OBJECTS[name])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("Deployment curvd", ("spec", "replica")),
        ("Deployment curvd", ("spec", "template", "spec", "container")),
        ("Service curvd", ("spec", "ports", 0, "targetport")),
        ("PersistentVolumeClaim curvd-state", ("spec", "accessMode")),
        ("NetworkPolicy curvd", ("spec", "podSelectors")),
        ("RayCluster curvd-ray", ("spec", "authOption")),
        ("RayCluster curvd-ray", ("spec", "headGroupSpec", "rayStartParam")),
        ("RayCluster curvd-ray", ("spec", "workerGroupSpecs", 0, "replica")),
        ("RayCluster curvd-ray",
         ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "envs")),
    ],
)  # fmt: skip
def test_a_field_that_there_is_not_is_refused(name, path):
    wrong = copy.deepcopy(OBJECTS[name])
    functools.reduce(lambda at, key: at[key], path[:-1], wrong)[path[-1]] = {}
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


def test_a_field_of_the_wrong_type_is_refused():
    wrong = copy.deepcopy(CLUSTER)
    wrong["spec"]["workerGroupSpecs"][0]["replicas"] = "two"
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


def test_the_file_for_machines_of_ones_own_is_what_ray_up_reads():
    schema = schema_of("ray/ray-schema.json")
    jsonschema.validate(ON_MACHINES, schema)
    with pytest.raises(jsonschema.ValidationError, match="head_start"):
        jsonschema.validate(ON_MACHINES | {"head_start": []}, schema)


def container_of(deployment):
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


def configured(arguments):
    """What `curvd serve` makes of options, as far as it goes without their files."""
    without_files = [a for a in arguments if not re.match(r"--(tls|token)-", a)]
    context = cli.serve.make_context("serve", list(without_files))
    return context.params


def test_the_front_is_told_options_that_there_are():
    command, *arguments = container_of(FRONT)["args"]
    assert command == "serve"
    flags = {flag for option in cli.serve.params for flag in option.opts}
    assert {argument.partition("=")[0] for argument in arguments} <= flags
    told = configured(arguments)
    groups = CLUSTER["spec"]["workerGroupSpecs"]
    assert told["ray_workers"] == sum(group["replicas"] for group in groups)
    pod = FRONT["spec"]["template"]["spec"]
    assert told["drain_s"] < pod["terminationGracePeriodSeconds"]
    head = f"{CLUSTER['metadata']['name']}-head-svc"
    assert told["ray"] == f"ray://{head}:10001"


def test_environments_name_options_that_there_are():
    of_options = {option.envvar for option in cli.serve.params if option.envvar}
    environments = [
        {entry["name"] for entry in container_of(FRONT)["env"]},
        *(
            set(service.get("environment", ()))
            for service in COMPOSE["services"].values()
        ),
    ]
    for environment in environments:
        ours = {name for name in environment if name.startswith("CURVD_")}
        assert ours <= of_options


def test_ports_names_and_labels_fit_each_other():
    container = container_of(FRONT)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    labels = FRONT["spec"]["template"]["metadata"]["labels"]
    for name in ("Service curvd", "Service curvd-metrics"):
        spec = OBJECTS[name]["spec"]
        assert spec["selector"].items() <= labels.items()
        assert all(ports[p["targetPort"]] == p["port"] for p in spec["ports"])
    volumes = {v["name"] for v in FRONT["spec"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    images = {
        c["image"] for t in templates_of(CLUSTER) for c in t["spec"]["containers"]
    }
    assert images == {container["image"]}
    token = next(e for e in container["env"] if e["name"] == "RAY_AUTH_TOKEN")
    # KubeRay names the secret like the cluster, and its key so (v1.7.0).
    assert token["valueFrom"]["secretKeyRef"] == {
        "name": CLUSTER["metadata"]["name"],
        "key": "auth_token",
    }
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}


def test_machines_of_ones_own_ask_for_tokens_and_show_no_dashboard():
    head = ON_MACHINES["head_start_ray_commands"][-1]
    for command in (head, ON_MACHINES["worker_start_ray_commands"][-1]):
        words = shlex.split(command)
        assert words[0] == "RAY_AUTH_MODE=token"
        assert "--disable-usage-stats" in words
    assert "--include-dashboard=false" in shlex.split(head)


def test_several_gpus_are_a_profile_of_compose():
    service = COMPOSE["services"]["gpus"]
    assert service["profiles"] == ["gpus"]
    (reserved,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    default = re.search(r":-(.*)}", service["environment"]["CURVD_DEVICES"])[1]
    assert ServerConfig(devices=default).workers == ("cuda:0", "cuda:1")
    assert "CURVD_DEVICE" not in service["environment"]
