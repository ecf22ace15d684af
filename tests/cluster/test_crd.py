"""The contract on a real API server: accepted, filling defaults, refusing bad specs, keeping a job one run.

The definition is the generated one under a group of its own, so that neither a product that is installed on the same
cluster nor its operator takes these jobs for theirs.
"""

import copy
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from qlora_api.exchange import (
    ExpertWeights,
    Finding,
    Inspection,
    LinearModule,
    ModelShape,
    Recipe,
    Score,
    SourceShare,
    TokenCounts,
    Verdict,
)
from qlora_api.findings import FindingCode
from qlora_api.schema import crd
from qlora_api.v1alpha1 import (
    PLURAL,
    VERSION,
    Artifact,
    Attempt,
    Condition,
    EvaluationResult,
    JobStatus,
    MemoryItem,
    MemoryPlan,
    OlderAttempts,
    Phase,
    Plan,
    Progress,
    QLoRAJob,
    Rejected,
    Serving,
    Usage,
    WorkVolume,
)
from tests.bad_specs import BAD, SMALLEST, Bad, edited
from tests.cluster.client import Cluster, KubectlError, Manifest

pytestmark = pytest.mark.cluster

GROUP = "contract-test.qlora.dev"
KIND = f"{PLURAL}.{GROUP}"


def ours(job: Manifest, namespace: str) -> Manifest:
    """The job, in the group of this test."""
    return {**job, "apiVersion": f"{GROUP}/{VERSION}", "metadata": {**job["metadata"], "namespace": namespace}}


@pytest.fixture(scope="module")
def definition(cluster: Cluster) -> Iterator[Manifest]:
    """The definition, as the server holds it once it serves it."""
    renamed = crd()
    renamed["metadata"]["name"] = KIND
    renamed["spec"]["group"] = GROUP
    cluster.kubectl("apply", "--server-side", "--filename=-", stdin=json.dumps(renamed))
    try:
        cluster.wait("it is served", lambda: cluster.kubectl("get", KIND, "--all-namespaces", "--output=name") == "")
        cluster.wait("it is explained", lambda: explain(cluster, "spec"))
        yield cluster.get("crd", KIND)
    finally:
        cluster.delete("crd", KIND)


def explain(cluster: Cluster, field: str) -> str:
    """What `kubectl explain` says of a field, as one line."""
    return " ".join(cluster.kubectl("explain", f"{PLURAL}.{field}", f"--api-version={GROUP}/{VERSION}").split())


@pytest.fixture(scope="module")
def team(cluster: Cluster, definition: Manifest) -> Iterator[str]:
    """A namespace for all jobs of this module."""
    name = f"contract-test-{uuid.uuid4().hex[:8]}"
    cluster.create_namespace(name)
    yield name
    cluster.delete("namespace", name, wait=False)


@pytest.fixture
def job(cluster: Cluster, team: str, request: pytest.FixtureRequest) -> Manifest:
    """A job, as stored; parametrised indirectly by the edits that it begins with. Goes with its namespace."""
    return cluster.create(ours(edited(getattr(request, "param", {}) | fresh_name()), team), team)


def fresh_name() -> dict[str, str]:
    """An edit."""
    return {"metadata.name": f"job-{uuid.uuid4().hex[:8]}"}


def dry_run(cluster: Cluster, text: str) -> Manifest:
    """What the server would store of a manifest, read by kubectl and checked as strictly as can be."""
    return json.loads(
        cluster.kubectl("create", "--dry-run=server", "--validate=strict", "--output=json", "--filename=-", stdin=text)
    )


# --- accepted ---


def test_definition_is_served_and_structural(definition: Manifest):
    conditions = {each["type"]: each["status"] for each in definition["status"]["conditions"]}
    assert conditions == {"Established": "True", "NamesAccepted": "True"}


def test_server_keeps_every_part_of_the_schema(definition: Manifest):
    sent = crd()["spec"]["versions"][0]
    stored = definition["spec"]["versions"][0]
    assert stored["schema"] == sent["schema"]
    assert stored["additionalPrinterColumns"] == sent["additionalPrinterColumns"]


def test_names_for_hands(cluster: Cluster, definition: Manifest):
    line = cluster.kubectl("api-resources", f"--api-group={GROUP}", "--output=wide", "--no-headers").split()
    assert line[:2] == [PLURAL, "qj"]
    assert line[-1] == "ml"


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("spec.lora.rank", "Rank of the adapter's matrices. Default: 16. Range: 1 to 512."),
        ("spec.dataset.maxLength", "Absent: covers 99.5 % of the examples"),
        ("spec.output.formats", "adapter (a PEFT directory)"),
        ("status.plan.memory.items.bytes", "Predicted bytes: of a GPU's memory on one GPU."),
    ],
)
def test_explain(cluster: Cluster, definition: Manifest, field: str, says: str):
    assert says in explain(cluster, field)


# --- refused ---


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_server_refuses(cluster: Cluster, team: str, bad: Bad):
    with pytest.raises(KubectlError) as caught:
        dry_run(cluster, json.dumps(ours(edited(bad.edits), team)))
    said = str(caught.value)
    assert bad.where in said
    assert bad.server in said


def test_unknown_field_is_not_stored_where_the_client_does_not_ask(cluster: Cluster, team: str):
    text = json.dumps(ours(edited({"spec.lora.ranc": 8, "spec.lora.rank": 4}), team))
    flags = ("--dry-run=server", "--validate=ignore", "--output=json", "--filename=-")
    stored = json.loads(cluster.kubectl("create", *flags, stdin=text))
    assert stored["spec"]["lora"]["rank"] == 4
    assert "ranc" not in stored["spec"]["lora"]


# --- defaults ---

WRITTEN = {
    "as little as possible": "",
    "numbers in every notation": "  training: {learningRate: 2e-4, minLearningRate: 1E-5, epochs: 2}\n",
    "small numbers": "  training: {learningRate: 1.5e-05, warmupFraction: 0}\n  lora: {dropout: 0.0}\n",
    "nulls": "  method: null\n  lora: {rank: null, alpha: null}\n  training: null\n",
    "empty objects": "  quantization: {}\n  lora: {}\n  evaluation: {}\n  hardware: {}\n  storage: {}\n",
    "everything": """\
  method: qlora
  quantization: {type: fp4, doubleQuant: false, computeDtype: float32}
  lora: {rank: 64, alpha: 16, dropout: 0.1, targetModules: [q_proj, v_proj], rslora: true, dora: true, init: loftq}
  training:
    maxSteps: 100
    learningRate: 3e-4
    schedule: linear
    effectiveBatchSize: 16
    microBatchSize: 4
    optimizer: adamw_torch
    seed: 7
    gradientCheckpointing: false
    attention: sdpa
    offload: activations
    evalsPerEpoch: 1
    earlyStoppingEpochs: 2
    bestMetric: evalLoss
  evaluation:
    golden: {uri: "pvc://data/golden.jsonl", format: messages}
    canary: {uri: "hf://org/general", revision: main}
    metrics: [exactMatch, rougeL]
    answerSchema: '{"type": "object"}'
    gates: [{metric: exactMatch, min: 0.5}, {metric: canary.exactMatch, maxDropFromBase: 0.02}]
    judge: {endpoint: "https://judge.example/v1", model: big, credentialsSecretRef: {name: judge}}
  hardware: {gpuProducts: [NVIDIA-L40S], gpus: 2, maxGPUs: 4, nodes: 1, headroomPercent: 20, allocation: dra}
  podTemplate:
    labels: {team: a}
    annotations: {note: "for the audit"}
    serviceAccountName: trainer
    imagePullSecrets: [{name: registry}]
    runtimeClassName: nvidia
    nodeSelector: {pool: gpu}
    tolerations: [{key: gpu, effect: NoSchedule}, {operator: Exists, tolerationSeconds: 60}]
    priorityClassName: low
    image: registry.example/trainer@sha256:0123
  queue: {name: team-a, priorityClass: low}
  storage: {className: fast, size: 200Gi, retain: Keep}
  checkpoint: {every: 1h30m, keep: 1}
  retry: {maxRestarts: 0, onOutOfMemory: fail}
  budget: {maxGPUHours: 12.5, maxRuntime: 3d}
  suspend: true
  planOnly: true
  offline: true
  ttlSecondsAfterFinished: 0
""",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_server_stores_what_the_command_line_reads(cluster: Cluster, team: str, name: str):
    text = yaml.safe_dump(ours(SMALLEST, team), sort_keys=False) + WRITTEN[name]  # spec is last: it goes on
    read = QLoRAJob.read({**yaml.safe_load(text), "apiVersion": SMALLEST["apiVersion"]})
    assert dry_run(cluster, text)["spec"] == read.spec.to_api()


# --- one job, one run ---

FROZEN = "is immutable: a job is one run"
SUSPENDED = "can change only while the job is suspended"
ONE_WAY = "planOnly can only change from true to false"
ANOTHER = {
    "model": {"uri": "pvc://models/other"},
    "dataset": {"packing": False},
    "method": "lora",
    "quantization": {"type": "fp4"},
    "lora": {"rank": 8},
    "training": {"learningRate": 1e-4},
    "evaluation": {"golden": {"uri": "pvc://data/golden.jsonl"}},
    "storage": {"size": "10Gi"},
    "checkpoint": {"keep": 3},
    "output": {"overwrite": True},
    "offline": True,
    "hardware": {"gpus": 2},
    "podTemplate": {"nodeSelector": {"pool": "gpu"}},
    "queue": {"name": "team-a"},
    "retry": {"maxRestarts": 1},
    "budget": {"maxRuntime": "12h"},
}
WHILE_SUSPENDED = ("hardware", "podTemplate", "queue", "retry", "budget")
#: What the job begins with, what is changed, and what the server says (None: it does it).
CHANGES: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    *(({}, {field: ANOTHER[field]}, FROZEN) for field in ANOTHER if field not in WHILE_SUSPENDED),
    *(
        ({"spec.suspend": True}, {field: ANOTHER[field]}, FROZEN)
        for field in ANOTHER
        if field not in WHILE_SUSPENDED
    ),
    *(({}, {field: ANOTHER[field]}, SUSPENDED) for field in WHILE_SUSPENDED),
    *(({"spec.suspend": True}, {field: ANOTHER[field]}, None) for field in WHILE_SUSPENDED),
    ({}, {"hardware": {"gpus": 2}, "suspend": True}, SUSPENDED),
    ({"spec.suspend": True}, {"hardware": {"gpus": 2}, "suspend": False}, None),
    ({"spec.queue": {"name": "a"}}, {"queue": None}, SUSPENDED),
    ({"spec.queue": {"name": "a"}, "spec.suspend": True}, {"queue": None}, None),
    ({"spec.method": "qlora"}, {"method": None}, FROZEN),
    ({"spec.dataset.evalFraction": 0.1}, {"dataset": {"evalFraction": None}}, FROZEN),
    ({}, {"suspend": True}, None),
    ({"spec.suspend": True}, {"suspend": False}, None),
    ({}, {"ttlSecondsAfterFinished": 60}, None),
    ({"spec.ttlSecondsAfterFinished": 60}, {"ttlSecondsAfterFinished": None}, None),
    ({"spec.planOnly": True}, {"planOnly": False}, None),
    ({}, {"planOnly": True}, ONE_WAY),
]  # fmt: skip


@pytest.mark.parametrize(
    ("job", "change", "refusal"),
    CHANGES,
    ids=[f"{json.dumps(change)} of {json.dumps(begins)}" for begins, change, _ in CHANGES],
    indirect=["job"],
)
def test_change(cluster: Cluster, team: str, job: Manifest, change: dict[str, Any], refusal: str | None):
    def patch() -> None:
        cluster.patch(KIND, job["metadata"]["name"], {"spec": change}, team)

    if refusal is None:
        patch()
        generation = cluster.get(KIND, job["metadata"]["name"], team)["metadata"]["generation"]
        assert generation == job["metadata"]["generation"] + 1
    else:
        with pytest.raises(KubectlError, match=refusal):
            patch()


@pytest.mark.parametrize("job", [{"spec.planOnly": True}], indirect=True)
def test_a_plan_is_released_once(cluster: Cluster, team: str, job: Manifest):
    name = job["metadata"]["name"]
    cluster.patch(KIND, name, {"spec": {"planOnly": False}}, team)
    with pytest.raises(KubectlError, match=ONE_WAY):
        cluster.patch(KIND, name, {"spec": {"planOnly": True}}, team)


# --- the status ---

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STATUS = JobStatus(
    observed_generation=1,
    phase=Phase.TRAINING,
    start_time=NOW,
    completion_time=NOW,
    message="Training on one NVIDIA-L40S.",
    conditions=(
        Condition(
            type="Ready",
            status="False",
            observed_generation=1,
            last_transition_time=NOW,
            reason="Training",
            message="Step 130 of 310.",
        ),
    ),
    inspection=Inspection(
        architecture="LlamaForCausalLM",
        model_digest="sha256:1",
        model_revision="0e9e39f249a16976918f6564b8830bc894c89659",
        data_digest="sha256:2",
        data_revisions={"dataset.train[0]": "12ab34cd"},
        shape=ModelShape(
            parameters=8_030_261_248,
            hidden_size=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            head_dim=128,
            intermediate_size=14336,
            vocab_size=128256,
            tied_embeddings=False,
            max_position=131072,
            dtype="bfloat16",
            bytes_on_disk=16_060_522_496,
            linear=[LinearModule(name="q_proj", in_features=4096, out_features=4096, count=32)],
            family="mixtral",
            sliding_window=4096,
            experts=[ExpertWeights(name="down_proj", experts=8, in_features=14336, out_features=4096, count=32)],
            experts_per_token=2,
        ),
        examples=1000,
        eval_examples=50,
        sources=[SourceShare(examples_percent=90, tokens_percent=84.25)],
        golden_examples=20,
        tokens=TokenCounts(p50=180, p95=420, max=900, total=200_000),
        max_length=512,
        sequences=400,
        loss="assistant",
        truncated_percent=0.4,
        loss_token_percent=31.5,
        duplicates=3,
        leakage=0,
        near_duplicates=4,
        findings=[Finding(severity="warns", code=FindingCode.TRUNCATED, count=4, example="train[0] line 7")],
    ),
    plan=Plan(
        recipe=Recipe(
            method="qlora",
            rank=16,
            alpha=32,
            dropout=0.05,
            target_modules=["q_proj"],
            max_length=512,
            packing=True,
            loss="assistant",
            epochs=3,
            best_metric="evalLoss",
            early_stopping_epochs=2,
            learning_rate=2e-4,
            schedule="cosine",
            warmup_fraction=0.03,
            effective_batch_size=32,
            optimizer="paged_adamw_8bit",
            seed=42,
            gradient_checkpointing=True,
            attention="sdpa",
            max_grad_norm=1.0,
        ),
        accelerator="nvidia",
        flavour="NVIDIA-L40S",
        resource="nvidia.com/gpu",
        labels={"nvidia.com/gpu.product": "NVIDIA-L40S"},
        memory_label="nvidia.com/gpu.memory",
        gpus=1,
        gpus_per_node=1,
        nodes=1,
        micro_batch_size=8,
        gradient_accumulation=4,
        steps=310,
        estimated_seconds=4000,
        estimated_gpu_hours=1.11,
        memory=MemoryPlan(
            items=(MemoryItem(name="weights", bytes=5_000_000_000),),
            total_bytes=5_000_000_000,
            gpu_bytes=48_000_000_000,
            headroom_percent=15,
            measured_bytes=5_100_000_000,
            notes=("4 bits do not reach the experts",),
        ),
        host_memory_bytes=16_000_000_000,
        host_memory_items=(MemoryItem(name="loading", bytes=16_000_000_000),),
        disk_bytes=50_000_000_000,
        disk_items=(MemoryItem(name="checkpoints", bytes=50_000_000_000),),
        rejected=(Rejected(flavour="NVIDIA-L4", reason="needs 30 GiB of 24"),),
        planned_for="sha256:3",
    ),
    work_volume=WorkVolume(claim_name="support-bot-work"),
    progress=Progress(
        percent=42, step=130, steps=310, epoch=1.3, loss=1.2345, eval_loss=1.3, tokens_per_second=4200,
        mfu=0.41, remaining="12m", last_report_time=NOW,
    ),
    attempts=(
        Attempt(
            number=1, stage="train", artifact="adapter", job="support-bot-train-1", node="node1", started=NOW,
            ended=NOW,
            outcome="OutOfMemory", exit_code=13, message="no memory", change="micro-batch 4",
            step=7,
        ),
    ),
    older_attempts=(OlderAttempts(stage="publish", artifact="adapter", outcome="Interrupted", count=3, seconds=40),),
    usage=Usage(run_seconds=4000, gpu_seconds=3600),
    cleanup_time=NOW,
    evaluation=EvaluationResult(
        scores=(Score(metric="exactMatch", base=0.2, tuned=0.9, examples=20),),
        gates=(Verdict(metric="exactMatch", bound="min", limit=0.5, base=0.2, tuned=0.9, passed=True),),
        selected_step=220,
        stopped_early=True,
    ),
    artifacts=(
        Artifact(
            name="adapter", state="Published", uri="pvc://models/tuned/adapter", digest="sha256:4", bytes=1,
            parity=0.001, serving=Serving(vllm="vllm serve x", kserve="pvc://models/tuned/adapter"),
        ),
    ),
)  # fmt: skip


def test_a_new_job_is_not_current(job: Manifest):
    assert job["status"] == {"observedGeneration": -1}


def test_status_is_stored_whole_and_shows_in_columns(cluster: Cluster, team: str, job: Manifest):
    name = job["metadata"]["name"]
    cluster.patch(KIND, name, {"status": STATUS.to_api()}, team, status=True)
    stored = cluster.get(KIND, name, team)
    assert stored["status"] == STATUS.to_api()
    assert JobStatus.model_validate(stored["status"]) == STATUS
    assert stored["metadata"]["generation"] == job["metadata"]["generation"]

    header, row = cluster.kubectl("get", KIND, name, namespace=team).splitlines()
    assert header.split() == ["NAME", "PHASE", "PROGRESS%", "GPUS", "LOSS", "REMAINING", "AGE"]
    assert row.split()[:-1] == [name, "Training", "42", "1", "1.2345", "12m"]
    header, row = cluster.kubectl("get", KIND, name, "--output=wide", namespace=team).splitlines()
    assert header.split()[6:13] == ["MODEL", "METHOD", "ARTIFACT", "STEP", "STEPS", "EVALLOSS", "TOKENS/S"]
    told = ["pvc://models/base", "qlora", "pvc://models/tuned/adapter", "130", "310", "1.3", "4200"]
    assert row.split()[6:13] == told


def test_every_field_of_the_status_is_in_the_sample():
    """Else the test above does not see a field that the server prunes."""
    assert sorted(_unset(STATUS)) == ["status.plan.recipe.maxSteps"]


def _unset(part: Any, path: str = "status") -> Iterator[str]:
    for field, info in type(part).model_fields.items():
        value, here = getattr(part, field), f"{path}.{info.alias}"
        if value is None:
            yield here
        for inner in value if isinstance(value, tuple | list) else (value,):
            if hasattr(type(inner), "model_fields"):
                yield from _unset(inner, here)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ({"phase": "Sleeping"}, 'Unsupported value: "Sleeping"'),
        ({"conditions": [{"type": "Ready", "status": "yes"}]}, 'Unsupported value: "yes"'),
        ({"progress": {"percent": "42%"}}, "must be of type integer"),
    ],
)
def test_a_status_that_is_not_ours_is_refused(cluster: Cluster, team: str, job: Manifest, status: Manifest, says: str):
    with pytest.raises(KubectlError, match=says):
        cluster.patch(KIND, job["metadata"]["name"], {"status": status}, team, status=True)


def test_conditions_merge_by_type(cluster: Cluster, team: str, job: Manifest):
    """Two writers of server-side apply keep each their own condition."""
    for manager, kind in (("one", "Ready"), ("two", "Audited")):
        condition = copy.deepcopy(STATUS.conditions[0].to_api()) | {"type": kind}
        part = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "QLoRAJob",
            "metadata": {"name": job["metadata"]["name"], "namespace": team},
            "status": {"conditions": [condition]},
        }
        flags = ("--server-side", "--subresource=status", f"--field-manager={manager}", "--filename=-")
        cluster.kubectl("apply", *flags, stdin=json.dumps(part))
    stored = cluster.get(KIND, job["metadata"]["name"], team)
    assert {each["type"] for each in stored["status"]["conditions"]} == {"Ready", "Audited"}
