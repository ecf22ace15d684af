"""Every job on the nodes that it should be on: a cluster of a thousand nodes of seventeen kinds.

kwok plays the nodes' kubelets. All else is real: the operator as its chart installs it, the inspections (on the real
node, of models that have true headers and no weights), the scheduler that binds the training's pods, the API server
and the Job controller. The pods of a training on a fake node just go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest
import yaml

from examples.quickstart.install import install
from examples.quickstart.upload import HERE
from tests.cluster import gpus, kwok, volumes
from tests.cluster.client import Cluster, Manifest
from tests.e2e import fleet, hollow, kueue
from tests.e2e.conftest import VALUES, Product, condition
from tests.e2e.judge import judge
from tests.e2e.kueue import Kueue
from tests.e2e.processes import leader, memory_bytes
from tests.e2e.troubleshooting import is_said

pytestmark = [pytest.mark.e2e, pytest.mark.soak]

#: The claim with models and data.
CLAIM = "hollow"
LLAMA_1B, LLAMA_3B, LLAMA_8B = (
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B",
)
LLAMA_70B, LLAMA_405B = "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-405B"
QWEN_14B, QWEN_32B = "Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-32B-Instruct"
GIANT, PATIENT, BY_DRA = "giant", "patient", "by-dra"
LATE, REVIEWED, QUEUED = "late", "reviewed", "queued"
#: What inspections take, one after the other on a small machine.
INSPECTED_SECONDS = 420
QUEUE = "team-a"


def products(*of: gpus.Product | str) -> dict[str, Any]:
    """The part of `hardware` that names them."""
    return {"gpuProducts": [product if isinstance(product, str) else product.name for product in of]}


@dataclass(frozen=True)
class Case:
    """A job, and how it is to be trained: `gpus_per_node` of a product on each of `nodes`."""

    name: str
    model: str
    length: int
    product: str
    method: str
    gpus_per_node: int = 1
    nodes: int = 1
    resource: str = gpus.RESOURCE
    spec: dict[str, Any] = field(default_factory=dict)
    compute: str = "bfloat16"


PLACED = (
    Case("one-b", LLAMA_1B, 1024, f"{gpus.H100.name}-MIG-1g.10gb", "lora"),
    Case("three-b", LLAMA_3B, 1024, gpus.T4.name, "lora", compute="float16"),
    Case("eight-b", LLAMA_8B, 2048, gpus.V100.name, "lora", compute="float16"),
    Case(
        "eight-b-bfloat16", LLAMA_8B, 2048, gpus.A100_40GB.name, "lora",
        spec={"quantization": {"computeDtype": "bfloat16"}},
    ),
    Case(
        "slice-of-single", LLAMA_1B, 512, f"{gpus.H100.name}-MIG-1g.10gb", "lora",
        spec={"hardware": products(f"{gpus.H100.name}-MIG-1g.10gb")},
    ),
    Case(
        "slice-of-mixed", LLAMA_8B, 2048, f"{gpus.H100.name}-MIG-3g.40gb", "lora", resource="nvidia.com/mig-3g.40gb",
        spec={"hardware": products(f"{gpus.H100.name}-MIG-3g.40gb")},
    ),
    Case("fourteen-b", QWEN_14B, 2048, gpus.L40S.name, "lora"),
    Case("thirty-two-b", QWEN_32B, 2048, gpus.H200.name, "lora"),
    Case("seventy-b", LLAMA_70B, 4096, gpus.A100_80GB.name, "qlora"),
    Case(
        "seventy-b-on-small-cards", LLAMA_70B, 2048, gpus.RTX_4090.name, "qlora", gpus_per_node=2, nodes=2,
        spec={"hardware": products(gpus.RTX_4090)},
    ),
    Case(
        "largest-on-h100", LLAMA_405B, 5120, gpus.H100.name, "qlora", gpus_per_node=8, nodes=2,
        spec={"hardware": products(gpus.H100) | {"maxGPUs": 16}},
    ),
    Case(
        "tolerated", LLAMA_8B, 2048, fleet.ADA.name, "lora",
        spec={"hardware": products(fleet.ADA), "podTemplate": {"tolerations": [fleet.RESERVED]}},
    ),
)  # fmt: skip
SEVERAL = Case("several", LLAMA_70B, 4096, gpus.H200.name, "lora", gpus_per_node=2, spec={"method": "lora"})
LARGEST = Case(
    GIANT, LLAMA_405B, 4096, gpus.B200.name, "lora", gpus_per_node=8, nodes=2,
    spec={"hardware": products(gpus.B200) | {"gpus": 16, "maxGPUs": 16}},
)  # fmt: skip


@dataclass(frozen=True)
class Held:
    """A job that cannot be placed: what is said, as in `troubleshooting`."""

    name: str
    model: str
    reason: str
    says: str
    hardware: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    phase: str = "Planning"
    length: int = 2048


HELD = (
    Held(
        "time-sliced", LLAMA_8B, "NoFlavourFits",
        "no GPU can take this training: NVIDIA-A10-SHARED: its GPUs are shared (time-slicing): another tenant may take "
        "the memory that was planned; turn sharing off for node fleet-time-sliced-0 in the configuration of NVIDIA's "
        "device plugin; ",
        products("NVIDIA-A10-SHARED"),
    ),
    Held(
        "amd-without-image", LLAMA_8B, "NoTrainerImage",
        f"it fits 1 × {fleet.MI300X}, and this installation names no trainer image for AMD GPUs: set the chart's value "
        "trainer.amdImage, or spec.podTemplate.image",
        {"accelerator": "amd"},
    ),
    Held(
        "not-tolerated", LLAMA_8B, "NoFlavourFits",
        f"no GPU can take this training: {fleet.ADA.name}: taint example.com/reserved=team-b:NoSchedule is not in "
        "spec.podTemplate.tolerations; ",
        products(fleet.ADA),
    ),
    Held(
        "on-cordoned-nodes", LLAMA_8B, "NoFlavourFits",
        f"no GPU can take this training: {gpus.L4.name}: node fleet-cordoned-0 is cordoned; ",
        products(gpus.L4),
    ),
    Held(
        "more-gpus-than-there-are", LLAMA_8B, "NoFlavourFits",
        f"no GPU can take this training: {gpus.B200.name}: has 2 nodes of 8 GPUs, too few for hardware.gpus 32; ",
        products(gpus.B200) | {"gpus": 32, "maxGPUs": 32},
    ),
    Held(
        "largest-on-one-node", LLAMA_405B, "NoFlavourFits",
        f"no GPU can take this training: {gpus.H100.name}: 79.6 GiB ×8: qlora at micro-batch 1 × 5120 tokens needs "
        "8… GiB, short by … GiB; fits with dataset.maxLength ≤ … or with training.offload activations or on 16 GPUs on "
        "2 nodes (hardware.maxGPUs); ",
        products(gpus.H100), length=5120,
    ),
)  # fmt: skip


# --- the cluster, and all jobs at once ---


@dataclass(frozen=True)
class Placement:
    """The product on a fleet, in a namespace of its own."""

    product: Product
    kueue: Kueue

    @property
    def cluster(self) -> Cluster:
        return self.product.cluster

    @property
    def namespace(self) -> str:
        return self.product.namespace

    def job_once(self, name: str, expected: str, holds: Any, timeout: float = 60) -> Manifest:
        """The job, once `holds` of it."""
        return self.cluster.wait(expected, lambda: self.product.job(name), holds, timeout, self.namespace, interval=1)

    def scheduled(self, name: str) -> Manifest:
        """The job, once it says that its training is on a node."""
        return self.job_once(name, "it is scheduled", lambda j: condition(j, "Scheduled").get("status") == "True")

    def bound(self, name: str, count: int = 1, timeout: float = INSPECTED_SECONDS) -> list[Manifest]:
        """The pods of the job's training, once `count` of them run on a node."""

        def running() -> list[Manifest]:
            found = self.product.pods(name, "train")
            return [p for p in found if p["status"]["phase"] == "Running" and "deletionTimestamp" not in p["metadata"]]

        expected = f"{count} pods train {name}"
        return self.cluster.wait(expected, running, lambda pods: len(pods) == count, timeout, self.namespace, 1)

    def labels_of_nodes(self, pods: list[Manifest]) -> list[dict[str, str]]:
        """The labels of the nodes that the pods are bound to."""
        return [self.cluster.get("node", pod["spec"]["nodeName"])["metadata"]["labels"] for pod in pods]


def job(name: str, model: str, length: int, **spec: Any) -> Manifest:
    """A QLoRAJob with a model and the data of `CLAIM`; `spec` is added."""
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": f"pvc://{CLAIM}/{directory(model)}"},
            "dataset": {"train": [{"uri": f"pvc://{CLAIM}/train.jsonl"}], "maxLength": length},
            "output": {"uri": f"pvc://{CLAIM}/results/{name}"},
            **spec,
        },
    }


def directory(model: str) -> str:
    return model.rpartition("/")[2].lower()


JOBS = [
    job(SEVERAL.name, SEVERAL.model, SEVERAL.length, **SEVERAL.spec),
    job(LARGEST.name, LARGEST.model, LARGEST.length, **LARGEST.spec),
    job(PATIENT, LLAMA_8B, 2048, hardware=products(gpus.B200) | {"gpus": 8}, suspend=True),
    job(BY_DRA, LLAMA_8B, 2048, hardware=products(gpus.H200) | {"gpus": 2, "allocation": "dra"}),
    job(LATE, LLAMA_8B, 2048, hardware=products(gpus.GB200)),
    job(QUEUED, LLAMA_8B, 2048, hardware=products(gpus.H100), queue={"name": QUEUE}),
    job(REVIEWED, LLAMA_3B, 2048, hardware=products(gpus.L40S), planOnly=True),
    *(job(case.name, case.model, case.length, **case.spec) for case in PLACED),
    *(
        job(held.name, held.model, held.length, hardware=held.hardware, training=held.training or {})
        for held in HELD
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def placement(product: Product) -> Iterator[Placement]:
    """All jobs applied, and the one that waits for GPUs held back."""
    cluster = product.cluster
    namespace = f"{product.namespace}-fleet"
    cluster.create_namespace(namespace)
    mine = Product(cluster, product.images, namespace)
    place = volumes.everywhere(cluster, CLAIM, namespace)
    data = (HERE / "train.jsonl").read_text().splitlines()[:40]
    (place / "train.jsonl").write_text("\n".join(data) + "\n")
    for model in sorted({LLAMA_8B, LLAMA_70B, LLAMA_405B} | {case.model for case in (*PLACED, *HELD)}):
        hollow.write(place / directory(model), model)
    with installed_as_it_comes(product), fleet.up(cluster), kueue.installed(cluster, namespace) as queue:
        cluster.kubectl("create", "--filename=-", namespace=namespace, stdin=yaml.safe_dump_all(JOBS))
        try:
            yield Placement(mine, queue)
        finally:
            cluster.kubectl("delete", "qlorajobs.qlora.dev", "--all", "--cascade=foreground", namespace=namespace)
            cluster.delete("namespace", namespace)


@contextmanager
def installed_as_it_comes(product: Product) -> Iterator[None]:
    """By the chart's defaults, so that what is said is not owed to a resync every few seconds, and with so few
    inspections at once that the operator gets its part of a small machine."""
    install(product.cluster, product.images, {"stageEnv": VALUES["stageEnv"]})
    yield
    install(product.cluster, product.images, VALUES)


# --- where they train ---


@pytest.mark.parametrize("case", [SEVERAL, LARGEST], ids=lambda case: case.name)
def test_several_gpus_on_one_node_and_on_two(placement: Placement, case: Case) -> None:
    is_as_it_should_be(placement, case)


@pytest.mark.parametrize("case", PLACED, ids=lambda case: case.name)
def test_each_job_trains_where_it_should(placement: Placement, case: Case) -> None:
    is_as_it_should_be(placement, case)


def is_as_it_should_be(placement: Placement, case: Case) -> None:
    pods = placement.bound(case.name, case.nodes)
    cluster, namespace = placement.cluster, placement.namespace
    plan = placement.product.job(case.name)["status"]["plan"]
    assert (plan["recipe"]["method"], plan["recipe"]["computeDtype"]) == (case.method, case.compute)
    planned = (plan["flavour"], plan["nodes"], plan["gpusPerNode"])
    assert planned == (case.product, case.nodes, case.gpus_per_node), plan["rejected"]

    of_product = f"{case.resource}.product"
    assert {labels[of_product] for labels in placement.labels_of_nodes(pods)} == {case.product}
    assert len({pod["spec"]["nodeName"] for pod in pods}) == case.nodes, "each on a node of its own"
    batch = cluster.get("job", f"{case.name}-train-1", namespace)["spec"]
    template = batch["template"]["spec"]
    (container,) = template["containers"]
    assert container["resources"]["limits"] == {case.resource: str(case.gpus_per_node)}

    # by what nodes are, never by what they are called
    assert "nodeName" not in template
    affinity = template["affinity"]["nodeAffinity"]
    assert affinity.keys() == {"requiredDuringSchedulingIgnoredDuringExecution"}
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [(e["key"], e["operator"]) for e in term["matchExpressions"]] == [
        (of_product, "In"),
        (f"{case.resource}.memory", "Gt"),
    ]
    nodes = [pod["spec"]["nodeName"] for pod in pods]
    scheduled = placement.scheduled(case.name)
    assert condition(scheduled, "Scheduled")["message"].removeprefix("on node ") in nodes

    if case.nodes > 1:
        assert (batch["completionMode"], batch["completions"], batch["parallelism"]) == (
            "Indexed",
            case.nodes,
            case.nodes,
        )
        service = cluster.get("service", template["subdomain"], namespace)
        assert service["spec"]["clusterIP"] == "None"
        work = cluster.get("persistentvolumeclaim", f"{case.name}-work", namespace)
        assert work["spec"]["accessModes"] == ["ReadWriteMany"]
        ranks = {pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] for pod in pods}
        assert ranks == {str(rank) for rank in range(case.nodes)}


def test_a_claim_for_devices_is_allocated_by_the_scheduler(placement: Placement) -> None:
    (pod,) = placement.bound(BY_DRA)
    assert pod["spec"]["nodeName"].startswith(f"{fleet.PREFIX}-{fleet.DRA_NODES}-"), "there a driver publishes devices"
    template = placement.cluster.get("resourceclaimtemplate", f"{BY_DRA}-train-1", placement.namespace)
    assert template["apiVersion"] == "resource.k8s.io/v1"
    (claim,) = placement.cluster.list("resourceclaim", placement.namespace)
    results = claim["status"]["allocation"]["devices"]["results"]
    assert {(r["driver"], r["pool"]) for r in results} == {(fleet.DRA_DRIVER, pod["spec"]["nodeName"])}
    assert len(results) == 2
    (container,) = pod["spec"]["containers"]
    assert "limits" not in container["resources"], "what the claim allocates is not asked for twice"


# --- that wait, and what helps ---


def test_a_job_that_waits_for_busy_gpus_is_told_what_to_do_and_that_helps(placement: Placement) -> None:
    """The only nodes with B200s are taken by the largest job."""
    placement.bound(GIANT, 2)
    placement.product.edit(PATIENT, {"suspend": False})
    waiting = placement.job_once(
        PATIENT,
        "it waits for GPUs",
        lambda j: condition(j, "Scheduled").get("reason") == "InsufficientGPUs",
        timeout=INSPECTED_SECONDS,
    )
    said = condition(waiting, "Scheduled")
    assert said["status"] == "False"
    assert is_said(
        "train waits: not scheduled: 0/… nodes are available: … Insufficient nvidia.com/gpu", said["message"]
    )
    advised = re.search(
        r"the cluster has 2 nodes with 8 × NVIDIA-B200 or more, none of them free for it; not to wait: suspend the "
        r"job, set spec\.hardware\.gpuProducts to (.*), and resume",
        said["message"],
    )
    assert advised, said["message"]
    assert f"[{gpus.A100_40GB.name}] (lora, 8 GPUs)" in advised[1]
    assert waiting["status"]["message"] == said["message"]
    assert judge([waiting])[0].status == "InProgress"

    placement.product.edit(PATIENT, {"suspend": True})
    placement.job_once(PATIENT, "it is suspended", lambda j: condition(j, "Ready").get("reason") == "Suspended")
    placement.product.edit(PATIENT, {"hardware": products(gpus.A100_40GB)})
    placement.product.edit(PATIENT, {"suspend": False})
    pods = placement.bound(PATIENT, timeout=60)
    assert placement.labels_of_nodes(pods)[0]["nvidia.com/gpu.product"] == gpus.A100_40GB.name
    status = placement.scheduled(PATIENT)["status"]
    assert (status["plan"]["flavour"], status["plan"]["gpus"]) == (gpus.A100_40GB.name, 8)
    assert [(a["stage"], a["number"]) for a in status["attempts"] if a["stage"] == "train"] == [("train", 1)]


@pytest.mark.parametrize("held", HELD, ids=lambda held: held.name)
def test_what_cannot_be_had_is_said_in_one_sentence(placement: Placement, held: Held) -> None:
    seen = placement.job_once(
        held.name,
        f"{held.name} is {held.phase}, {held.reason}",
        lambda j: condition(j, "Planned").get("reason") == held.reason,
        timeout=INSPECTED_SECONDS,
    )
    assert (seen["status"]["phase"], condition(seen, "Planned")["status"]) == (held.phase, "False")
    assert is_said(held.says, seen["status"]["message"]), seen["status"]["message"]
    assert condition(seen, "Planned")["message"] == seen["status"]["message"]
    assert placement.product.pods(held.name, "train") == []


def test_a_job_that_fits_nowhere_starts_when_nodes_come(placement: Placement) -> None:
    held = placement.job_once(
        LATE,
        "it is held",
        lambda j: condition(j, "Planned").get("reason") == "NoFlavourFits",
        timeout=INSPECTED_SECONDS,
    )
    nowhere = f"no GPU can take this training: {gpus.GB200.name}: no node of the cluster has it; "
    assert is_said(nowhere, held["status"]["message"]), held["status"]["message"]
    kwok.create(placement.cluster, fleet.LATECOMERS)
    (pod,) = placement.bound(LATE, timeout=20)
    assert pod["spec"]["nodeName"] in {node["metadata"]["name"] for node in fleet.LATECOMERS}


def test_a_plan_alone_rests_ready_until_it_is_to_run(placement: Placement) -> None:
    planned = placement.product.wait_for(REVIEWED, "Planned", timeout=INSPECTED_SECONDS)
    assert condition(planned, "Ready")["status"] == "True"
    assert judge([planned])[0].status == "Current"
    assert placement.cluster.list("job", placement.namespace, f"qlora.dev/job={REVIEWED},qlora.dev/stage=train") == []
    placement.product.edit(REVIEWED, {"planOnly": False})
    pods = placement.bound(REVIEWED, timeout=60)
    assert placement.labels_of_nodes(pods)[0]["nvidia.com/gpu.product"] == gpus.L40S.name
    assert placement.product.job(REVIEWED)["status"]["plan"] == planned["status"]["plan"]


def test_a_queue_admits_preempts_and_admits_again(placement: Placement) -> None:
    """The operator leaves the Job alone, says that it is queued, and the training stays the same attempt."""
    cluster, namespace, queue, batch = placement.cluster, placement.namespace, placement.kueue, f"{QUEUED}-train-1"

    def is_queued(job: Manifest) -> bool:
        return condition(job, "Scheduled").get("reason") == "Queued"

    waiting = placement.job_once(QUEUED, "it waits in the queue", is_queued, timeout=INSPECTED_SECONDS)
    assert condition(waiting, "Scheduled")["status"] == "False"
    says = f"train waits: the queue {QUEUE} has not admitted it yet"
    assert waiting["status"]["message"] == says
    created = cluster.get("job", batch, namespace)
    assert created["spec"]["suspend"]
    assert created["metadata"]["generation"] == 1

    for pool in ("blue", "green"):
        queue.admit(batch, {fleet.POOL: pool})
        pods = placement.bound(QUEUED, timeout=60)
        assert placement.labels_of_nodes(pods)[0][fleet.POOL] == pool
        running = placement.scheduled(QUEUED)
        assert running["status"]["phase"] == "Training"
        if pool == "blue":
            queue.preempt(batch)
            preempted = placement.job_once(QUEUED, "it waits in the queue again", is_queued)
            assert preempted["status"]["message"] == says
            cluster.wait("its pods are gone", lambda: placement.product.pods(QUEUED, "train"), lambda p: not p)

    trainings = [a for a in running["status"]["attempts"] if a["stage"] == "train"]
    assert [(a["number"], a.get("outcome")) for a in trainings] == [(1, None)]
    stays = cluster.get("job", batch, namespace)
    assert stays["metadata"]["uid"] == created["metadata"]["uid"]
    # the API server counts every change of the spec: all were the queue's
    assert stays["metadata"]["generation"] == 1 + queue.writes


# --- what it costs ---


def test_a_thousand_nodes_cost_the_operator_little(placement: Placement) -> None:
    assert len(fleet.NODES) == 1000
    job = placement.product.job(SEVERAL.name)
    (inspected,) = (a for a in job["status"]["attempts"] if a["stage"] == "inspect")
    planned = _moment(condition(job, "Planned")["lastTransitionTime"])
    since_apply = planned - _moment(job["metadata"]["creationTimestamp"])
    since_inspection = planned - _moment(inspected["ended"])
    used = memory_bytes(leader(placement.cluster), "qlora_operator")
    print(
        f"\noperator: {used / 2**20:.0f} MiB with 1000 nodes; {SEVERAL.name}: planned "
        f"{since_apply.total_seconds():.0f} s after it was applied, {since_inspection.total_seconds():.0f} s after its "
        "inspection ended"
    )
    assert used < 256 * 2**20, "half of what the chart allows"
    assert since_inspection.total_seconds() <= 30


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
