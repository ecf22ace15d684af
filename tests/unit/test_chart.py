"""The chart: what it renders, what it grants, what it refuses. Needs helm, which `python -m tests.cluster up` compiles.

`PYTHONPATH=crds:operator python -m tests.unit.test_chart` writes the table of values in the chart's README anew.
"""

import contextlib
import functools
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from qlora_api.v1alpha1 import QLoRAJob
from qlora_operator.leadership import LEADER_LABEL
from qlora_operator.settings import DEFAULT_PATH, Settings
from tests.cluster import Cluster, build, ensure_up, prometheus
from tests.cluster.client import KubectlError
from tests.cluster.settings import REPOSITORY, cache

pytestmark = pytest.mark.cluster

CHART = REPOSITORY / "charts" / "qlora-operator"
CRD = "qlora.dev_qlorajobs.yaml"
RELEASE, NAMESPACE = "qlora-operator", "qlora-system"
TRIAL = "chart-trial"
DIGEST = "sha256:" + "a" * 64

Values = dict[str, Any]
Manifest = dict[str, Any]


def helm(*arguments: str, values: Values | None = None) -> subprocess.CompletedProcess[str]:
    """Run the helm that the cluster's programs bring."""
    program = cache() / "bin" / build.key() / "helm"
    if not program.exists():
        pytest.fail(f"{program} is not there: `python -m tests.cluster up` compiles it")
    more = ["--values=-"] if values is not None else []
    return subprocess.run([program, *arguments, *more], input=yaml.safe_dump(values), capture_output=True, text=True)


def rendered_text(values: Values, namespace: str = NAMESPACE, chart: Path = CHART) -> str:
    """What an installation with `values` sends to the server."""
    result = helm("template", RELEASE, str(chart), f"--namespace={namespace}", values=values)
    assert result.returncode == 0, result.stderr
    return result.stdout


def rendered(values: Values | None = None, chart: Path = CHART) -> list[Manifest]:
    """Every object that an installation with `values` makes."""
    return [document for document in yaml.safe_load_all(rendered_text(values or {}, chart=chart)) if document]


def of_kind(kind: str, values: Values | None = None) -> list[Manifest]:
    return [manifest for manifest in rendered(values) if manifest["kind"] == kind]


def the(kind: str, values: Values | None = None) -> Manifest:
    """The only object of this kind."""
    (found,) = of_kind(kind, values)
    return found


def pod(values: Values | None = None) -> Manifest:
    """The template of the operator's pod."""
    return the("Deployment", values)["spec"]["template"]


def settings(values: Values | None = None) -> Manifest:
    """The operator's settings as written into the ConfigMap."""
    return yaml.safe_load(the("ConfigMap", values)["data"]["config.yaml"])


def notes(values: Values) -> str:
    result = helm("install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client", values=values)
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\nNOTES:\n")[1]


# What is installed


MONITORED: Values = {"monitoring": {kind: {"enabled": True} for kind in ("podMonitor", "rules", "dashboard")}}


@pytest.mark.parametrize("values", [{}, {"namespaces": ["team-a"]}, {"crds": {"install": False}}, MONITORED], ids=str)
def test_lint_is_silent(values: Values):
    result = helm("lint", "--strict", str(CHART), values=values)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[WARNING]" not in result.stdout


def test_the_objects_of_an_installation():
    names = {(m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]) for m in rendered()}
    assert names == {
        ("CustomResourceDefinition", None, "qlorajobs.qlora.dev"),
        ("ServiceAccount", NAMESPACE, RELEASE),
        ("ConfigMap", NAMESPACE, RELEASE),
        ("Deployment", NAMESPACE, RELEASE),
        ("ClusterRole", None, f"{NAMESPACE}:{RELEASE}"),
        ("ClusterRole", None, "qlorajobs-edit"),
        ("ClusterRole", None, "qlorajobs-view"),
        ("ClusterRoleBinding", None, f"{NAMESPACE}:{RELEASE}"),
        ("Role", NAMESPACE, f"{RELEASE}-replica"),
        ("RoleBinding", NAMESPACE, f"{RELEASE}-replica"),
        ("Service", NAMESPACE, f"{RELEASE}-reports"),
    }


def test_chart_and_images_have_the_version_of_the_project():
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    assert pod()["spec"]["containers"][0]["image"] == f"qlora-operator:{version}"
    assert settings()["trainerImage"] == f"qlora-trainer:{version}"


@pytest.mark.parametrize(
    ("image", "reference"),
    [
        ({"repository": "r.example.com:5000/a/b", "tag": "v1"}, "r.example.com:5000/a/b:v1"),
        ({"repository": "r.example.com/b", "digest": DIGEST}, f"r.example.com/b@{DIGEST}"),
        ({"repository": "r.example.com/b", "tag": "v1", "digest": DIGEST}, f"r.example.com/b@{DIGEST}"),
    ],
)
def test_an_image_by_tag_or_by_digest(image: Values, reference: str):
    values = {"operator": {"image": image}, "trainer": {"image": image}}
    assert pod(values)["spec"]["containers"][0]["image"] == reference
    assert settings(values)["trainerImage"] == reference


@pytest.mark.parametrize(("version", "fit"), [("v1.28.9", False), ("v1.29.0", True), ("v1.33.1-gke.100", True)])
def test_the_kubernetes_it_takes(version: str, fit: bool):
    result = helm("template", RELEASE, str(CHART), f"--kube-version={version}")
    assert (result.returncode == 0) is fit, result.stderr
    assert fit or "incompatible with Kubernetes v1.28.9" in result.stderr


# The resource


def test_the_chart_holds_the_generated_crd():
    generated, shipped = REPOSITORY / "crds" / CRD, CHART / "files" / CRD
    assert shipped.read_bytes() == generated.read_bytes(), f"run: cp {generated} {shipped}"


def test_the_generated_crd_is_what_is_installed_and_survives_an_uninstall():
    crd = the("CustomResourceDefinition")
    metadata = crd["metadata"]
    assert metadata["annotations"].pop("helm.sh/resource-policy") == "keep"
    labels = metadata.pop("labels")
    assert labels["app.kubernetes.io/managed-by"] == "Helm"
    if not metadata["annotations"]:
        del metadata["annotations"]
    assert crd == yaml.safe_load((REPOSITORY / "crds" / CRD).read_text())


def test_the_crd_can_be_left_to_another_installation():
    assert of_kind("CustomResourceDefinition", {"crds": {"install": False}}) == []


def test_a_package_installs_what_the_folder_does(tmp_path: Path):
    assert helm("package", str(CHART), "--destination", str(tmp_path)).returncode == 0
    (package,) = tmp_path.glob("qlora-operator-*.tgz")
    assert rendered(chart=package) == rendered()


def test_a_package_without_the_crd_says_what_to_do(tmp_path: Path):
    for file in CHART.rglob("*"):
        if file.is_file() and file.name != CRD:
            copy = tmp_path / file.relative_to(CHART)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    result = helm("template", RELEASE, str(tmp_path))
    assert result.returncode != 0
    assert f"files/{CRD} is missing from this chart" in result.stderr


# Rights

Right = tuple[str, str, str]
RIGHTS_IN_THE_CLUSTER = {
    *(("", "nodes", verb) for verb in ("get", "list", "watch")),
    ("authentication.k8s.io", "tokenreviews", "create"),
}
RIGHTS_OF_REPLICAS = {
    *(("coordination.k8s.io", f"leases {RELEASE}", verb) for verb in ("get", "update")),
    *(("", f"secrets {RELEASE}-reports-tls", verb) for verb in ("get", "update")),
    ("coordination.k8s.io", "leases", "create"),
    ("", "secrets", "create"),
    ("", "pods", "patch"),
}
RIGHTS_WHERE_JOBS_ARE = {
    (group, resource, verb)
    for group, resource, verbs in (
        ("qlora.dev", "qlorajobs", "get list watch"),
        ("qlora.dev", "qlorajobs/status", "patch"),
        ("batch", "jobs", "get list watch create delete"),
        ("", "pods", "get list watch"),
        ("", "configmaps", "get create delete"),
        ("", "services", "get create delete"),
        ("resource.k8s.io", "resourceclaimtemplates", "get create delete"),
        ("", "persistentvolumeclaims", "get create delete"),
        ("", "events", "create"),
    )
    for verb in verbs.split()
}


def rights(role: Manifest) -> set[Right]:
    """Every (group, resource, verb) of a role, `resource name` where it is limited to a name.

    A rule of another shape (URLs, aggregation) is an error.
    """
    assert set(role) == {"apiVersion", "kind", "metadata", "rules"}
    found: set[Right] = set()
    for rule in role["rules"]:
        assert set(rule) - {"resourceNames"} == {"apiGroups", "resources", "verbs"}
        names = [f" {name}" for name in rule.get("resourceNames", ())] or [""]
        which = [f"{resource}{name}" for resource in rule["resources"] for name in names]
        found |= {(g, r, v) for g in rule["apiGroups"] for r in which for v in rule["verbs"]}
    return found


def is_for_users(role: Manifest) -> bool:
    """Whether the role becomes a part of the cluster's own ones."""
    return any(label.startswith("rbac.authorization.k8s.io/aggregate-to-") for label in role["metadata"]["labels"])


def granted(values: Values) -> dict[str | None, set[Right]]:
    """What the operator's ServiceAccount may do, by namespace; None is the whole cluster."""
    manifests = rendered(values)
    roles = {
        (m["kind"], m["metadata"].get("namespace"), m["metadata"]["name"]): rights(m)
        for m in manifests
        if m["kind"] in ("ClusterRole", "Role") and not is_for_users(m)
    }
    account = pod(values)["spec"]["serviceAccountName"]
    found: dict[str | None, set[Right]] = {}
    bound = set()
    for binding in manifests:
        if binding["kind"] not in ("ClusterRoleBinding", "RoleBinding"):
            continue
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]
        where = binding["metadata"].get("namespace")
        assert binding["roleRef"]["kind"] == binding["kind"].removesuffix("Binding")
        role = (binding["roleRef"]["kind"], where, binding["roleRef"]["name"])
        bound.add(role)
        found[where] = found.get(where, set()) | roles[role]
    assert bound == set(roles), "a role that is bound to nobody"
    return found


def test_rights_in_the_whole_cluster():
    assert granted({}) == {None: RIGHTS_IN_THE_CLUSTER | RIGHTS_WHERE_JOBS_ARE, NAMESPACE: RIGHTS_OF_REPLICAS}


def test_rights_in_named_namespaces_alone():
    assert granted({"namespaces": ["team-a", "team-b"]}) == {
        None: RIGHTS_IN_THE_CLUSTER,
        NAMESPACE: RIGHTS_OF_REPLICAS,
        "team-a": RIGHTS_WHERE_JOBS_ARE,
        "team-b": RIGHTS_WHERE_JOBS_ARE,
    }


def test_users_get_rights_to_jobs_with_the_definition():
    by_label = {
        label.rpartition("-")[2]: rights(role)
        for role in of_kind("ClusterRole")
        for label in role["metadata"]["labels"]
        if is_for_users(role) and "aggregate" in label
    }
    seeing = {("qlora.dev", "qlorajobs", verb) for verb in ("get", "list", "watch")}
    running = {("qlora.dev", "qlorajobs", verb) for verb in ["create", "delete", "deletecollection", "patch", "update"]}
    assert by_label == {"view": seeing, "edit": running}
    assert not [role for role in of_kind("ClusterRole", {"crds": {"install": False}}) if is_for_users(role)]


def test_an_account_of_the_users_own_gets_the_rights_and_is_not_made():
    values = {"serviceAccount": {"create": False, "name": "ours"}}
    assert of_kind("ServiceAccount", values) == []
    assert pod(values)["spec"]["serviceAccountName"] == "ours"
    assert granted(values)[None] == RIGHTS_IN_THE_CLUSTER | RIGHTS_WHERE_JOBS_ARE


# The pod


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The spec of every pod that the manifests would start."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Pod":
            yield spec
        elif manifest["kind"] == "CronJob":
            yield spec["jobTemplate"]["spec"]["template"]["spec"]
        elif manifest["kind"] != "CustomResourceDefinition" and "template" in spec:
            yield spec["template"]["spec"]


def test_every_pod_is_restricted():
    found = list(pods(rendered()))
    assert len(found) == 1
    for spec in found:
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"} & set(spec)
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert all(set(volume) - {"name"} <= {"configMap", "emptyDir"} for volume in spec["volumes"])
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert container["resources"]["limits"] == {"memory": "512Mi"}


def test_reports_are_led_to_the_leader():
    service, values = the("Service"), {"operator": {"replicas": 2}, "reportPort": 9443}
    assert the("Deployment", values)["spec"]["replicas"] == 2
    assert service["metadata"]["name"] == settings()["reportService"]
    assert service["spec"]["selector"].items() - {(LEADER_LABEL, "true")} <= pod()["metadata"]["labels"].items()
    assert service["spec"]["selector"][LEADER_LABEL] == "true"
    (container,) = pod(values)["spec"]["containers"]
    assert {"name": "reports", "containerPort": 9443} in container["ports"]
    assert (settings(values)["reportPort"], the("Service", values)["spec"]["ports"][0]["port"]) == (9443, 9443)
    assert settings()["lease"] == RELEASE


def test_probes_ask_the_port_that_the_operator_opens():
    (container,) = pod({"probePort": 9090})["spec"]["containers"]
    assert settings({"probePort": 9090})["probePort"] == 9090
    assert {"name": "probes", "containerPort": 9090} in container["ports"]
    asked = {kind: container[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {
        "startupProbe": {"path": "/healthz", "port": "probes"},
        "livenessProbe": {"path": "/healthz", "port": "probes"},
        "readinessProbe": {"path": "/readyz", "port": "probes"},
    }


def test_the_operator_finds_its_settings_and_a_place_to_write():
    spec = pod()["spec"]
    (container,) = spec["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    config = volumes[mounts[str(Path(DEFAULT_PATH).parent)]]["configMap"]["name"]
    assert config == the("ConfigMap")["metadata"]["name"]
    assert list(the("ConfigMap")["data"]) == [Path(DEFAULT_PATH).name]
    assert "emptyDir" in volumes[mounts["/tmp"]]
    environment = {entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"] for entry in container["env"]}
    assert environment == {"POD_NAME": "metadata.name", "POD_NAMESPACE": "metadata.namespace"}


def test_a_change_of_the_settings_restarts_the_pod_and_nothing_else_does():
    def checksum(values: Values) -> str:
        return pod(values)["metadata"]["annotations"]["checksum/config"]

    assert checksum({"workers": 3}) != checksum({})
    assert checksum({"trainer": {"image": {"tag": "v2"}}}) != checksum({})
    assert checksum({"operator": {"nodeSelector": {"a": "b"}}}) == checksum({})


def test_values_of_the_operators_pod_reach_it():
    toleration = {"key": "infra", "operator": "Exists", "effect": "NoSchedule"}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}
    values = {
        "imagePullPolicy": "Always",
        "imagePullSecrets": ["one", "two"],
        "operator": {
            "resources": {"requests": {"cpu": 1}, "limits": {"memory": "1Gi"}},
            "nodeSelector": {"infra": "yes"},
            "tolerations": [toleration],
            "affinity": affinity,
            "priorityClassName": "high",
            "podAnnotations": {"team": "ml"},
            "podLabels": {"team": "ml", "app.kubernetes.io/name": "another"},
        },
        "serviceAccount": {"annotations": {"role": "arn"}},
    }
    deployment = the("Deployment", values)
    template = deployment["spec"]["template"]
    spec, (container,) = template["spec"], template["spec"]["containers"]
    assert container["resources"] == {"requests": {"cpu": 1, "memory": "128Mi"}, "limits": {"memory": "1Gi"}}
    assert container["imagePullPolicy"] == "Always"
    assert spec["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]
    assert spec["nodeSelector"] == {"infra": "yes"}
    assert spec["tolerations"] == [toleration]
    assert spec["affinity"] == affinity
    assert spec["priorityClassName"] == "high"
    assert template["metadata"]["annotations"]["team"] == "ml"
    assert template["metadata"]["labels"]["team"] == "ml"
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector["app.kubernetes.io/name"] == "qlora-operator"
    assert selector.items() <= template["metadata"]["labels"].items()
    assert the("ServiceAccount", values)["metadata"]["annotations"] == {"role": "arn"}


# On a real API server


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The running cluster, with a namespace that enforces the restricted standard."""
    running = ensure_up()
    labels = {"pod-security.kubernetes.io/enforce": "restricted", "pod-security.kubernetes.io/warn": "restricted"}
    running.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": TRIAL, "labels": labels}})
    running.wait("the namespace's ServiceAccount", lambda: running.find("serviceaccount", "default", TRIAL))
    yield running
    running.delete("namespace", TRIAL)


@pytest.mark.parametrize(
    "values",
    [{}, {"namespaces": [TRIAL, "default"]}, MONITORED],
    ids=["everywhere", "named namespaces", "with PodMonitors, alerts and dashboard"],
)
def test_the_server_takes_every_object(cluster: Cluster, values: Values):
    with prometheus.kinds(cluster) if values == MONITORED else contextlib.nullcontext():
        server_takes(cluster, values)


def server_takes(cluster: Cluster, values: Values) -> None:
    text = rendered_text(values, namespace=TRIAL)  # as it is: Go and Python do not read all YAML alike
    # an installed release of another version may own some of the fields
    flags = ["--server-side", "--dry-run=server", "--force-conflicts"]
    said = cluster.kubectl("apply", *flags, "--filename=-", stdin=text)
    assert said.count("serverside-applied (server dry run)") == len(rendered(values)), said


def test_the_restricted_standard_admits_the_operators_pod(cluster: Cluster):
    """A dry run goes through admission; the Deployment alone would be taken and its pods refused later."""
    template = pod()
    spec = template["spec"] | {"serviceAccountName": "default"}  # the chart's own does not exist in a dry run
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator"}, "spec": spec}

    def create() -> str:
        return cluster.kubectl(
            "create", "--dry-run=server", "--filename=-", namespace=TRIAL, stdin=yaml.safe_dump(manifest)
        )

    assert "created (server dry run)" in create()
    del spec["containers"][0]["securityContext"]["capabilities"]
    with pytest.raises(KubectlError, match="unrestricted capabilities"):
        create()


# The settings


def test_defaults_of_chart_and_operator_agree():
    assert Settings.model_validate(settings()) == Settings(trainer_image=settings()["trainerImage"])


def test_every_setting_of_the_operator_is_a_value_of_the_chart():
    every: Values = {
        "imagePullPolicy": "Never",
        "imagePullSecrets": ["regcred"],
        "namespaces": ["team-a"],
        "cpuAllowed": True,
        "storageClass": "fast",
        "cpuStages": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
        "trainStage": {"requests": {"cpu": "7"}, "limits": {"cpu": "9"}},
        "stageEnv": {"OMP_NUM_THREADS": "1", "TRICKY": 'a: "b" {{ c }} # d'},
        "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
        "gpuPrices": {"NVIDIA-L40S": 1.5},
        "graceSeconds": 30,
        "workers": 2,
        "resyncSeconds": 10,
        "probePort": 9090,
        "reportPort": 9443,
    }
    rocm = "registry.example.com/trainer:rocm"
    written = settings(every | {"fullnameOverride": "ours", "trainer": {"amdImage": rocm, "backEnds": ["hqq"]}})
    named = {"lease": "ours", "reportService": "ours-reports", "amdTrainerImage": rocm, "backEnds": ["hqq"]}
    assert written == {"trainerImage": written["trainerImage"], **named, **every}
    assert set(written) == {field.alias for field in Settings.model_fields.values()}
    read = Settings.model_validate(written)
    defaults = Settings(trainer_image="")
    unchanged = {name for name in Settings.model_fields if getattr(read, name) == getattr(defaults, name)}
    assert unchanged == set()


def test_quantities_may_be_numbers_and_keep_their_digits():
    values = {"cpuStages": {"requests": {"cpu": 0.5, "memory": 8589934592}}, "trainStage": {"limits": {"cpu": 16}}}
    read = Settings.model_validate(settings(values))
    assert read.cpu_stages.requests == {"cpu": "0.5", "memory": "8589934592"}
    assert read.train_stage.limits == {"cpu": "16"}


class Refused(NamedTuple):
    values: Values
    where: str
    why: str


REFUSED = [
    Refused({"worker": 8}, "", "additional properties 'worker' not allowed"),
    Refused({"operator": {"replica": 2}}, "/operator", "additional properties 'replica' not allowed"),
    Refused({"operator": {"replicas": -1}}, "/operator/replicas", "minimum: got -1, want 0"),
    Refused({"operator": {"image": {"registry": "a"}}}, "/operator/image", "additional properties 'registry'"),
    Refused({"operator": {"image": None}}, "/operator", "missing property 'image'"),
    Refused({"operator": {"image": {"repository": "a/b:v1"}}}, "/operator/image/repository", "does not match"),
    Refused({"operator": {"image": {"repository": ""}}}, "/operator/image/repository", "does not match"),
    Refused({"operator": {"image": {"tag": 1.5}}}, "/operator/image/tag", "got number, want string"),
    Refused({"operator": {"podLabels": {"a": 1}}}, "/operator/podLabels/a", "got number, want string"),
    Refused({"operator": {"affinity": {"node": {}}}}, "/operator/affinity", "additional properties 'node'"),
    Refused({"operator": {"resources": {"request": {}}}}, "/operator/resources", "additional properties 'request'"),
    Refused({"trainer": {"image": {"digest": "sha256:abc"}}}, "/trainer/image/digest", "does not match"),
    Refused({"trainer": {"image": {"digest": "a" * 64}}}, "/trainer/image/digest", "does not match"),
    Refused({"imagePullPolicy": "ifNotPresent"}, "/imagePullPolicy", "'Always', 'IfNotPresent', 'Never'"),
    Refused({"imagePullSecrets": [{"name": "a"}]}, "/imagePullSecrets/0", "got object, want string"),
    Refused({"namespaces": "team-a"}, "/namespaces", "got string, want array"),
    Refused({"namespaces": ["Team_A"]}, "/namespaces/0", "does not match"),
    Refused({"namespaces": ["*"]}, "/namespaces/0", "does not match"),
    Refused({"namespaces": ["a", "a"]}, "/namespaces", "items at 0 and 1 are equal"),
    Refused({"cpuAllowed": "yes please"}, "/cpuAllowed", "got string, want boolean"),
    Refused({"storageClass": "Fast SSD"}, "/storageClass", "does not match"),
    Refused({"cpuStages": {"requests": {"memory": "2GB"}}}, "/cpuStages/requests/memory", "does not match"),
    Refused({"cpuStages": {"requests": {"cpu": -1}}}, "/cpuStages/requests/cpu", "minimum: got -1, want 0"),
    Refused({"trainStage": {"limits": ["1Gi"]}}, "/trainStage/limits", "got array, want object"),
    Refused({"stageEnv": {"OMP_NUM_THREADS": 1}}, "/stageEnv/OMP_NUM_THREADS", "got number, want string"),
    Refused({"stageEnv": {"A-B": "1"}}, "/stageEnv", "additional properties 'A-B' not allowed"),
    Refused({"tolerations": [{"effect": "NoRun"}]}, "/tolerations/0/effect", "'NoSchedule'"),
    Refused({"tolerations": [{"keys": "a"}]}, "/tolerations/0", "additional properties 'keys'"),
    Refused({"graceSeconds": 4}, "/graceSeconds", "minimum: got 4, want 5"),
    Refused({"workers": 0}, "/workers", "minimum: got 0, want 1"),
    Refused({"workers": 65}, "/workers", "maximum: got 65, want 64"),
    Refused({"workers": 1.5}, "/workers", "got number, want integer"),
    Refused({"workers": None}, "", "missing property 'workers'"),
    Refused({"resyncSeconds": "60"}, "/resyncSeconds", "got string, want integer"),
    Refused({"probePort": 80}, "/probePort", "minimum: got 80, want 1,024"),
    Refused({"monitoring": {"podMonitor": {"interval": "30"}}}, "/monitoring/podMonitor/interval", "does not match"),
    Refused({"monitoring": {"alerts": {}}}, "/monitoring", "additional properties 'alerts' not allowed"),
    Refused({"serviceAccount": {"create": False}}, "/serviceAccount/name", "minLength: got 0, want 1"),
    Refused({"crds": {"keep": True}}, "/crds", "additional properties 'keep'"),
    Refused({"fullnameOverride": "-a"}, "/fullnameOverride", "does not match"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: json.dumps(case.values))
def test_what_does_not_fit_is_refused_and_named(case: Refused):
    for command in (["template", RELEASE, str(CHART)], ["lint", "--strict", str(CHART)]):
        result = helm(*command, values=case.values)
        assert result.returncode != 0
        said = result.stdout + result.stderr
        lines = [line for line in said.splitlines() if f"at '{case.where}':" in line]
        assert any(case.why in line for line in lines), said


def test_a_parent_chart_may_hand_its_globals_down():
    assert rendered({"global": {"domain": "example.com"}}) == rendered()


# What people read


@functools.cache
def documented() -> dict[str, str]:
    """Every value with a comment `# --`, by its path, and what the comment says."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in (CHART / "values.yaml").read_text().splitlines():
        if match := re.match(r" *# (-- )?(.*)", line):
            if match[1]:
                comment = [match[2]]
            elif comment:
                comment.append(match[2])
        elif match := re.match(r"( *)(\w+):", line):
            indent = len(match[1])
            path = [*(step for step in path if step[0] < indent), (indent, match[2])]
            if comment:
                found[".".join(name for _, name in path)] = " ".join(comment)
            comment = []
        else:
            comment = []
    return found


def table_of_values() -> str:
    """The chart's values as a table in Markdown."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())

    def row(path: str) -> str:
        value = functools.reduce(lambda inner, name: inner[name], path.split("."), defaults)
        return f"| `{path}` | `{json.dumps(value)}` | {documented()[path]} |"

    return "\n".join(["| value | default | what it decides |", "|---|---|---|", *map(row, documented())])


def readme_with(table: str) -> str:
    """The chart's README with its table of values replaced."""
    head, rest = re.split(r"(?<=<!-- values: )", (CHART / "README.md").read_text())
    first_line, rest = rest.split("\n", 1)
    tail = rest[rest.index("<!-- end of values -->") :]
    return f"{head}{first_line}\n{table}\n{tail}"


def undocumented(values: Values, above: str = "") -> Iterator[str]:
    for name, value in values.items():
        path = above + name
        if path in documented():
            continue
        if isinstance(value, dict) and value:
            yield from undocumented(value, f"{path}.")
        else:
            yield path


def test_every_value_is_documented():
    assert list(undocumented(yaml.safe_load((CHART / "values.yaml").read_text()))) == []


def test_the_readme_lists_the_values_as_they_are():
    current = (CHART / "README.md").read_text()
    assert current == readme_with(table_of_values()), "run: PYTHONPATH=crds:operator python -m tests.unit.test_chart"


@pytest.mark.parametrize(
    ("values", "namespace", "said", "unsaid"),
    [
        ({}, "default", ["jobs in every namespace", "the cluster's default storage class"], ["cpuAllowed", "crds."]),
        (
            {"namespaces": ["team-a", "team-b"], "storageClass": "fast", "cpuAllowed": True},
            "team-a",
            ["jobs in team-a, team-b, and nowhere else", "storage class fast", "(cpuAllowed)"],
            ["every namespace", "default storage class", "crds."],
        ),
        ({"crds": {"install": False}}, "default", ["(crds.install is false)"], ["cpuAllowed"]),
    ],
    ids=["defaults", "named namespaces", "no CRD"],
)
def test_the_notes_are_true_and_their_job_is_valid(values: Values, namespace: str, said: list[str], unsaid: list[str]):
    text = notes(values)
    assert [phrase for phrase in said if phrase not in text] == []
    assert [phrase for phrase in unsaid if phrase in text] == []
    assert f"-n {NAMESPACE} rollout status deployment/{the('Deployment', values)['metadata']['name']}" in text
    job = yaml.safe_load(text.split("<<EOF\n")[1].split("  EOF\n")[0])
    assert QLoRAJob.read(job).metadata.namespace == namespace


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme_with(table_of_values()))
