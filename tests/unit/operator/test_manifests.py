"""The children of a job, as they are sent to the API server: golden files, and what must hold for any of them.

`UPDATE_GOLDEN=1 python -m pytest tests/unit/operator/test_manifests.py` writes the golden files anew; read the diff.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_api.exchange import (
    ExitCode,
    InspectOrder,
    MergeOrder,
    PublishOrder,
    Stage,
    TrainOrder,
    mounted_path,
    parse_order,
)
from qlora_api.v1alpha1 import Attempt, QLoRAJob
from qlora_operator.lifecycle.observed import Job
from qlora_operator.lifecycle.tasks import INSPECT, MERGE, TRAIN, Task, tasks
from qlora_operator.manifests import attempts
from qlora_operator.manifests.claims import work_volume_claim
from qlora_operator.manifests.jobs import stage_job
from qlora_operator.manifests.orders import config_map, order
from qlora_operator.manifests.reporting import Endpoint
from qlora_operator.settings import Settings, StageResources
from tests.unit.operator import given
from tests.unit.operator.given import MIB

Raw = dict[str, Any]

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/job.yaml"))
UPDATE = "UPDATE_GOLDEN"

PLAIN = Settings(trainer_image="registry.example.com/trainer:0.1.0")
DECIDED = Settings(
    trainer_image="registry.example.com/trainer:0.1.0",
    image_pull_policy="Always",
    image_pull_secrets=["installation-token", "registry-token"],
    cpu_allowed=True,
    storage_class="standard",
    cpu_stages=StageResources(requests={"cpu": "1", "memory": "4Gi"}, limits={"memory": "4Gi"}),
    train_stage=StageResources(requests={"cpu": "4", "memory": "1Gi"}, limits={"cpu": "8"}),
    stage_env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    tolerations=[{"key": "dedicated", "operator": "Exists"}],
    grace_seconds=300,
)
ENDPOINT = Endpoint("https://qlora-operator-reports.qlora-system.svc:8443", "the authority, as PEM")
WITH_AMD = Settings(trainer_image=PLAIN.trainer_image, amd_trainer_image="registry.example.com/trainer:0.1.0-rocm")
ENDPOINTS = dict.fromkeys(NAMES) | {"full": ENDPOINT, "stores": ENDPOINT}
SETTINGS = dict.fromkeys(NAMES, PLAIN) | {"full": DECIDED, "amd": WITH_AMD}
#: What the plan of a golden job says otherwise than that of most.
PLANS: dict[str, Raw] = {
    "two-nodes": {"gpus": 16, "gpus_per_node": 8, "nodes": 2, "micro_batch_size": 1, "gradient_accumulation": 2},
    "dra": {"gpus": 2, "gpus_per_node": 2, "gradient_accumulation": 2},
    "amd": {
        "flavour": "AMD_Instinct_MI300X_OAM",
        "resource": "amd.com/gpu",
        "labels": {"amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM", "amd.com/gpu.vram": "192G"},
        "memory_label": None,
    },
}


def recorded(name: str) -> Job:
    """The golden job, when everything but its publications is done."""
    document = QLoRAJob.read(yaml.safe_load((GOLDEN / name / "job.yaml").read_text()))
    job = Job(document.metadata, document.spec, document.status)
    merged = (MERGE,) if "merged" in job.spec.output.formats else ()
    return given.history(job, INSPECT, TRAIN, *merged, plan=given.plan(job, **PLANS.get(name, {})))


JOBS = {name: recorded(name) for name in NAMES}
EVERY = [(name, task) for name in NAMES for task in tasks(JOBS[name].spec)]
STAGES = [pytest.param(name, task, id=f"{name}: {task.name}") for name, task in EVERY]


def children(name: str) -> list[Raw]:
    """All that the operator ever creates for the golden job, in order; orders are shown parsed."""
    job, settings, endpoint = JOBS[name], SETTINGS[name], ENDPOINTS[name]
    found = [work_volume_claim(job, settings)] if job.spec.storage.claim_name is None else []
    for task in tasks(job.spec):
        shown, *others = attempts.manifests(job, task, 1, settings, endpoint)
        shown["data"]["order.json"] = json.loads(shown["data"]["order.json"])
        found += [shown, *others]
    return found


class Plain(yaml.SafeDumper):
    """Without anchors: a golden file is read top to bottom."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@pytest.mark.parametrize("name", NAMES)
def test_children_are_as_in_the_golden_file(name: str) -> None:
    text = yaml.dump_all(json.loads(json.dumps(children(name))), Dumper=Plain, sort_keys=False, width=120)
    file = GOLDEN / name / "children.yaml"
    if os.environ.get(UPDATE):
        file.write_text(text)
    assert text == file.read_text(), f"the children changed; if that is meant, write them anew with {UPDATE}=1"


# --- what must hold for any of them ---


def built(name: str, task: Task) -> Raw:
    return stage_job(JOBS[name], task, 1, SETTINGS[name], ENDPOINTS[name])


def pod(name: str, task: Task) -> Raw:
    return built(name, task)["spec"]["template"]["spec"]


def writable_claims(spec: Raw) -> dict[str, str]:
    """Claims that the pod can write to, and where."""
    [container] = spec["containers"]
    claims = {v["name"]: v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v}
    return {
        claims[mount["name"]]["claimName"]: mount["mountPath"]
        for mount in container["volumeMounts"]
        if mount["name"] in claims and not mount.get("readOnly") and not claims[mount["name"]].get("readOnly")
    }


@pytest.mark.parametrize(("name", "task"), STAGES)
def test_every_pod_is_restricted_and_has_no_rights(name: str, task: Task) -> None:
    """The Pod Security Standard *restricted*, field by field, a read-only root file system, and no token."""
    spec = pod(name, task)
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"]["type"] == "RuntimeDefault"
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers"} & spec.keys()
    [container] = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }
    assert not any("hostPort" in port for port in container.get("ports", ()))
    kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    sources = [source for volume in spec["volumes"] for source in volume.get("projected", {}).get("sources", ())]
    audiences = {source["serviceAccountToken"]["audience"] for source in sources if "serviceAccountToken" in source}
    assert audiences <= {"qlora-progress"}, "a token of another audience would be one for the API server"


@pytest.mark.parametrize(("name", "task"), STAGES)
def test_only_publish_can_write_to_a_users_claim_and_only_to_the_output(name: str, task: Task) -> None:
    work = {"cpu": "scratch"}.get(name, f"{JOBS[name].metadata.name}-work")
    output = {"cpu": "shared", "stores": None}.get(name, "results")
    expected = {} if task.stage is Stage.INSPECT else {work: "/work"}
    if task.stage is Stage.PUBLISH and output:
        expected[output] = f"/claims/{output}"
    assert writable_claims(pod(name, task)) == expected


@pytest.mark.parametrize(("name", "task"), STAGES)
def test_what_the_order_names_is_mounted(name: str, task: Task) -> None:
    """A path in the order that no volume of the pod has would fail on the node, an hour later."""
    [container] = pod(name, task)["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    text = order(JOBS[name], task, 1, SETTINGS[name]).to_json()
    document = json.loads(text)
    document.pop("provenance", None)
    for uri in re.findall(r'pvc://[^"]+', json.dumps(document)):
        assert str(mounted_path(uri)).startswith(tuple(f"{mount}/" for mount in mounts if "claims" in mount)), uri
    assert {"/work", "/tmp", "/etc/qlora"} <= mounts
    volumes = [volume["name"] for volume in pod(name, task)["volumes"]]
    assert sorted(volumes) == sorted({mount["name"] for mount in container["volumeMounts"]})


SECRETS: dict[tuple[str, Stage], set[str]] = {
    ("stores", Stage.INSPECT): {"read-only", "held-out", "write.results"},  # it tries the store that publish writes to
    ("stores", Stage.TRAIN): {"read-only", "held-out"},
    ("stores", Stage.MERGE): {"read-only"},
    ("stores", Stage.PUBLISH): {"write.results"},
    ("full", Stage.TRAIN): {"judge-token"},
}


@pytest.mark.parametrize(("name", "task"), STAGES)
def test_a_stage_is_given_the_secrets_that_it_needs_and_no_others(name: str, task: Task) -> None:
    spec = pod(name, task)
    [container] = spec["containers"]
    volumes = {volume["name"]: volume["secret"] for volume in spec["volumes"] if "secret" in volume}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"] if mount["name"] in volumes}
    assert {secret["secretName"] for secret in volumes.values()} == SECRETS.get((name, task.stage), set())
    for volume, secret in volumes.items():
        assert mounts[volume]["mountPath"] == f"/credentials/{secret['secretName']}"
        assert mounts[volume]["readOnly"] is True
        assert secret["defaultMode"] == 0o440
        assert secret["optional"] is True, "the stage says what is missing; a pod that hangs says it in an event only"
    named = re.findall(r'[sS]ecret":"([^"]+)"', order(JOBS[name], task, 1, SETTINGS[name]).to_json())
    assert set(named) == {secret["secretName"] for secret in volumes.values()}
    sources = [source for entry in container.get("env", ()) for source in entry.get("valueFrom", ())]
    assert set(sources) <= {"fieldRef"}, "no Secret in the environment"


def test_what_was_inspected_on_the_hub_is_what_every_later_stage_reads() -> None:
    """A branch moves; a job that has begun does not move with it."""
    hub = {"uri": "hf://team/base", "revision": "main", "credentialsSecretRef": {"name": "hub"}}
    edits: Raw = {
        "model": hub,
        "dataset.train": [{"uri": "s3://data/a.jsonl"}, {"uri": "hf://team/chats", "revision": "v1"}],
        "dataset.eval": {"uri": "hf://team/chats/held-out.jsonl"},
        "evaluation.golden": {"uri": "hf://team/golden"},
        "output.formats": ["adapter", "merged"],
    }
    job = given.job(edits)
    to_inspect = order(job, INSPECT, 1, PLAIN)
    assert isinstance(to_inspect, InspectOrder)
    assert (to_inspect.model_revision, to_inspect.model_secret) == ("main", "hub")
    assert to_inspect.data.eval and to_inspect.data.golden
    assert [source.revision for source in to_inspect.data.train] == [None, "v1"]
    assert (to_inspect.data.eval.revision, to_inspect.data.golden.revision) == (None, None)

    found = {"dataset.train[1]": "c" * 40, "dataset.eval": "d" * 40, "evaluation.golden": "e" * 40}
    seen = given.inspection().model_copy(update={"model_revision": "a" * 40, "data_revisions": found})
    job = given.history(job, INSPECT, TRAIN, MERGE, plan=given.plan(job))
    job = replace(job, status=job.status.model_copy(update={"inspection": seen}))
    to_train, to_merge = (order(job, task, 1, PLAIN) for task in (TRAIN, MERGE))
    assert isinstance(to_train, TrainOrder)
    assert isinstance(to_merge, MergeOrder)
    assert to_train.model_revision == to_merge.model_revision == "a" * 40
    assert to_train.data.eval and to_train.data.golden
    sources = [*to_train.data.train, to_train.data.eval, to_train.data.golden]
    assert [source.revision for source in sources] == [None, "c" * 40, "d" * 40, "e" * 40]
    told = order(job, Task(Stage.PUBLISH, "adapter"), 1, PLAIN)
    assert isinstance(told, PublishOrder)
    assert told.provenance["model"]["revision"] == "a" * 40
    assert told.provenance["data"]["revisions"] == found


@pytest.mark.parametrize(("name", "task"), STAGES)
def test_orders_are_read_back_by_the_trainers_own_parser(name: str, task: Task) -> None:
    manifest = config_map(JOBS[name], task, 7, SETTINGS[name])
    assert manifest["immutable"] is True
    found = parse_order(manifest["data"]["order.json"])
    assert found == order(JOBS[name], task, 7, SETTINGS[name])
    assert (found.stage, found.attempt, found.job_uid) == (task.stage, 7, given.UID)
    assert found.work_dir == f"/work/{JOBS[name].metadata.name}.1b9f7c52", "jobs that share a claim share no directory"


@pytest.mark.parametrize(("name", "task"), STAGES)
def test_names_fit_where_kubernetes_puts_them(name: str, task: Task) -> None:
    """Names of Jobs become labels of pods (63 characters), also of the last attempt there can be."""
    manifest = stage_job(JOBS[name], task, 99_999, SETTINGS[name])
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", manifest["metadata"]["name"])
    labels = manifest["metadata"]["labels"] | manifest["spec"]["template"]["metadata"]["labels"]
    assert max(len(value) for value in labels.values()) <= 63


@pytest.mark.parametrize(("name", "task"), STAGES)
def test_children_are_the_jobs_own(name: str, task: Task) -> None:
    """By the reference the garbage collector removes them; by the labels the operator hears of them."""
    manifest = built(name, task)
    for child in (manifest, config_map(JOBS[name], task, 1, SETTINGS[name])):
        [owner] = child["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("QLoRAJob", given.UID, True)
        assert child["metadata"]["labels"]["qlora.dev/job"] == JOBS[name].metadata.name
        assert child["metadata"]["namespace"] == "team-a"
    pod_labels = manifest["spec"]["template"]["metadata"]["labels"]
    own = {key: value for key, value in manifest["metadata"]["labels"].items() if "kueue" not in key}
    assert pod_labels.items() >= own.items(), "the user's labels do not hide the operator's"


@pytest.mark.parametrize(("name", "task"), STAGES)
def test_the_job_controller_never_retries_by_itself_but_for_disruptions(name: str, task: Task) -> None:
    spec = built(name, task)["spec"]
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "Failed")
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    ignore, fail = spec["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"]) == (
        "Ignore", [{"type": "DisruptionTarget", "status": "True"}],
    )  # fmt: skip
    codes = fail["onExitCodes"]["values"]
    assert fail["action"] == "FailJob"
    assert codes == [code for code in sorted(ExitCode) if code and not code.retried]
    assert 0 not in codes, "the API server refuses 0 there"
    assert fail["onExitCodes"]["containerName"] == spec["template"]["spec"]["containers"][0]["name"]


def test_only_training_gets_a_gpu_and_only_on_the_planned_flavour() -> None:
    for name, task in EVERY:
        spec = pod(name, task)
        limits = spec["containers"][0]["resources"]["limits"]
        on_gpu = task == TRAIN and name != "cpu"
        asked = {"amd": {"amd.com/gpu"}, "dra": set()}.get(name, {"nvidia.com/gpu"})
        assert {key for key in limits if "/" in key} == (asked if on_gpu else set())
        assert ("affinity" in spec) == on_gpu
        assert ("runtimeClassName" in spec) == (on_gpu and name == "full")
        tolerated = {t.get("key") for t in spec.get("tolerations", [])}
        assert ({"nvidia.com/gpu", "amd.com/gpu"} <= tolerated) == on_gpu


def test_the_affinity_asks_for_just_the_memory_that_is_needed() -> None:
    """`Gt` is strict: a GPU of exactly the bytes that are needed must do, and one of a MiB less must not."""
    plan = JOBS["full"].status.plan
    assert plan is not None
    terms = pod("full", TRAIN)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    [term] = terms["nodeSelectorTerms"]
    product, memory = term["matchExpressions"]
    assert (product["key"], product["operator"], product["values"]) == (
        "nvidia.com/gpu.product", "In", [plan.flavour],
    )  # fmt: skip
    need = plan.memory.total_bytes * (100 + plan.memory.headroom_percent) // 100
    assert (memory["key"], memory["operator"]) == ("nvidia.com/gpu.memory", "Gt")
    least = int(memory["values"][0]) + 1
    assert least * MIB >= need > (least - 1) * MIB


def test_no_node_is_named() -> None:
    for name, task in EVERY:
        assert "nodeName" not in pod(name, task)
        assert '"key": "kubernetes.io/hostname"' not in json.dumps(built(name, task))


def test_all_that_an_attempt_is_made_of_is_removed_with_it() -> None:
    """What is left behind would bar the way of a later job of that name."""
    for name, task in EVERY:
        made = {(m["kind"], m["metadata"]["name"]) for m in attempts.manifests(JOBS[name], task, 1, SETTINGS[name])}
        assert made <= set(attempts.names(JOBS[name], task, 1))


def test_the_ranks_of_several_nodes_find_one_another_and_keep_apart() -> None:
    job = JOBS["two-nodes"]
    _, service, made = attempts.manifests(job, TRAIN, 1, PLAIN)
    spec = made["spec"]["template"]["spec"]
    [container] = spec["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert (made["spec"]["completionMode"], made["spec"]["completions"], made["spec"]["parallelism"]) == (
        "Indexed",
        2,
        2,
    )
    assert spec["subdomain"] == service["metadata"]["name"]
    assert environment["PET_MASTER_ADDR"] == f"{made['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(environment["PET_NNODES"] or 0) * int(environment["PET_NPROC_PER_NODE"] or 0) == 16
    labels = made["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    [apart] = spec["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert apart["labelSelector"]["matchLabels"].items() <= labels.items()
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert work_volume_claim(job, PLAIN)["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_queue_is_for_the_training_alone() -> None:
    for task in tasks(JOBS["two-nodes"].spec):
        found = built("two-nodes", task)["metadata"]["labels"]
        assert ("kueue.x-k8s.io/queue-name" in found) == (task == TRAIN)
        assert "suspend" not in built("two-nodes", task)["spec"], "it is Kueue's to write"


def test_a_claim_asks_for_devices_with_the_memory_in_the_place_of_limits() -> None:
    plan = JOBS["dra"].status.plan
    assert plan is not None
    _, template, made = attempts.manifests(JOBS["dra"], TRAIN, 1, PLAIN)
    [request] = template["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"]["count"] == 2
    need = -(-plan.memory.total_bytes * 115 // (100 * MIB))
    assert f"quantity('{need}Mi')" in request["exactly"]["selectors"][0]["cel"]["expression"]
    spec = made["spec"]["template"]["spec"]
    assert spec["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": template["metadata"]["name"]}]
    assert spec["containers"][0]["resources"]["claims"] == [{"name": "gpus"}]


# --- orders ---


def test_out_of_memory_changes_the_order_but_not_what_a_checkpoint_is_bound_to() -> None:
    job = JOBS["full"]
    plan = job.status.plan
    assert plan is not None
    smaller = plan.model_copy(update={"micro_batch_size": 4, "gradient_accumulation": 8})
    later = Job(job.metadata, job.spec, job.status.model_copy(update={"plan": smaller}))
    first, second = order(job, TRAIN, 1, DECIDED), order(later, TRAIN, 2, DECIDED)
    assert isinstance(first, TrainOrder)
    assert isinstance(second, TrainOrder)
    assert (second.micro_batch_size, second.gradient_accumulation) == (4, 8)
    assert first.binding() == second.binding()


def test_orders_carry_the_digests_of_what_they_build_on() -> None:
    job = JOBS["full"]
    merge, publish = order(job, MERGE, 1, DECIDED), order(job, given.PUBLISH_MERGED, 1, DECIDED)
    assert isinstance(merge, MergeOrder)
    assert isinstance(publish, PublishOrder)
    assert (merge.model_digest, merge.adapter_digest) == ("sha256:model", "sha256:adapter")
    assert (publish.artifact_digest, publish.output_uri) == ("sha256:merged", "pvc://results/team-a/merged")
    assert publish.provenance["data"]["digest"] == "sha256:data"
    assert publish.provenance["image"] == job.spec.pod_template.image


@pytest.mark.parametrize(
    ("task", "without", "says"),
    [
        (TRAIN, {"inspection": None}, "the inspection is not recorded"),
        (TRAIN, {"plan": None}, "the plan is not recorded"),
        (MERGE, {"artifacts": ()}, "the artifact adapter is not recorded"),
    ],
)
def test_no_order_is_written_on_what_is_not_recorded(task: Task, without: Raw, says: str) -> None:
    job = JOBS["full"]
    with pytest.raises(LookupError, match=says):
        order(Job(job.metadata, job.spec, job.status.model_copy(update=without)), task, 1, PLAIN)


# --- the claim ---


@pytest.mark.parametrize(
    ("edits", "settings", "size", "storage_class"),
    [
        ({}, PLAIN, "20480Mi", None),
        ({}, DECIDED, "20480Mi", "standard"),
        ({"storage.className": "fast"}, DECIDED, "20480Mi", "fast"),
        ({"storage.size": "200Gi"}, PLAIN, "200Gi", None),
    ],
)
def test_the_work_volume_is_as_large_as_planned_or_as_asked(
    edits: Raw, settings: Settings, size: str, storage_class: str | None
) -> None:
    job = given.history(given.job(edits), INSPECT)
    claim = work_volume_claim(job, settings)
    assert claim["metadata"]["name"] == "support-bot-work"
    assert claim["spec"]["resources"]["requests"]["storage"] == size
    assert claim["spec"].get("storageClassName") == storage_class


# --- reporting ---


def test_only_train_pods_can_report_and_only_where_there_is_an_endpoint() -> None:
    job = JOBS["full"]
    for task in tasks(job.spec):
        spec = stage_job(job, task, 1, DECIDED, ENDPOINT)["spec"]["template"]["spec"]
        told = {entry["name"] for entry in spec["containers"][0]["env"]} & {"KUBEFLOW_TRAINER_SERVER_URL"}
        mounted = any(volume["name"] == "progress" for volume in spec["volumes"])
        in_order = "ca.crt" in config_map(job, task, 1, DECIDED, ENDPOINT)["data"]
        assert {bool(told), mounted, in_order} == {task == TRAIN}
    without = stage_job(job, TRAIN, 1, DECIDED)["spec"]["template"]["spec"]
    assert not any(volume["name"] == "progress" for volume in without["volumes"])


def test_the_order_mounts_alone_where_the_stage_reads_it() -> None:
    (order_volume,) = (v for v in pod("full", TRAIN)["volumes"] if v["name"] == "order")
    assert order_volume["configMap"]["items"] == [{"key": "order.json", "path": "order.json"}]


def test_another_node_is_preferred_to_those_found_unfit() -> None:
    unfit = given.attempt(TRAIN, 1, "EnvironmentUnfit", node="gpu-7")
    crashed = given.attempt(TRAIN, 2, "Crashed", node="gpu-8")
    stalled = given.attempt(TRAIN, 3, "Stalled", node="gpu-9")
    job = given.history(given.job(), INSPECT, before=[unfit, crashed, stalled])
    affinity = stage_job(job, TRAIN, 4, PLAIN)["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (preferred,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = preferred["preference"]["matchExpressions"]
    assert expression == {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["gpu-7", "gpu-9"]}
    assert "requiredDuringSchedulingIgnoredDuringExecution" in affinity, "the flavour is still asked for"


@pytest.mark.parametrize(
    ("task", "before", "requested", "limit"),
    [
        (TRAIN, [given.attempt(TRAIN, 1, "HostOutOfMemory", change="more")], "9216Mi", "12288Mi"),
        (TRAIN, [given.attempt(TRAIN, 1, "HostOutOfMemory")], "6144Mi", "8Gi"),
        (MERGE, [given.attempt(MERGE, 1, "HostOutOfMemory", change="more")], "3072Mi", "6144Mi"),
        (MERGE, [given.attempt(TRAIN, 1, "HostOutOfMemory", change="more")], "2Gi", "4Gi"),
    ],
    ids=["killed for want of it", "and no more to be had", "a stage without a plan", "another stage's lack"],
)
def test_after_being_killed_for_want_of_memory_a_stage_asks_for_half_as_much_again(
    task: Task, before: list[Attempt], requested: str, limit: str
) -> None:
    stages = {"cpuStages": {"requests": {"memory": "2Gi"}, "limits": {"memory": "4Gi"}}}
    settings = Settings.model_validate(
        {"trainerImage": "trainer:1", "trainStage": {"limits": {"memory": "8Gi"}}, **stages}
    )
    job = given.history(given.job({"output.formats": given.BOTH}), INSPECT, before=before)
    resources = stage_job(job, task, 2, settings)["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert (resources["requests"]["memory"], resources["limits"]["memory"]) == (requested, limit)
