"""What the tests of the operator start from: jobs as users write them, and the cluster and history around them.

Nothing here stands in for a part of the operator: specs are read by the models, histories are statuses as recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from qlora_api.exchange import (
    Inspection,
    LinearModule,
    MergeResult,
    ModelShape,
    PublishResult,
    Recipe,
    Report,
    Score,
    Stage,
    TokenCounts,
    TrainResult,
)
from qlora_api.v1alpha1 import Artifact, Attempt, JobStatus, MemoryItem, MemoryPlan, Plan, QLoRAJob, WorkVolume
from qlora_operator.lifecycle.observed import Ended, Job, Observed, Seen
from qlora_operator.lifecycle.planning import planned_for
from qlora_operator.lifecycle.tasks import INSPECT, MERGE, TRAIN, Task
from qlora_operator.lifecycle.volumes import output_claim, work_claim
from qlora_operator.placement.inventory import Inventory

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)
UID = "1b9f7c52-0000-4000-8000-000000000000"
NAME = "support-bot"

PUBLISH_ADAPTER = Task(Stage.PUBLISH, "adapter", needs=("train",))
PUBLISH_MERGED = Task(Stage.PUBLISH, "merged", needs=("merge",))
BOTH = ["adapter", "merged"]

MIB = 1024**2
GIB = 1024**3


def document(edits: Mapping[str, Any] | None = None, *, name: str = NAME, generation: int = 1) -> dict[str, Any]:
    """The smallest manifest this version runs, with `edits` to its spec: dotted path to value."""
    spec: dict[str, Any] = {
        "model": {"uri": "pvc://models/base"},
        "dataset": {"train": [{"uri": "pvc://data/train.jsonl"}]},
        "output": {"uri": "pvc://results/tuned"},
    }
    for path, value in (edits or {}).items():
        *parents, last = path.split(".")
        node = spec
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name, "namespace": "team-a", "uid": UID, "generation": generation},
        "spec": spec,
    }


def job(
    edits: Mapping[str, Any] | None = None,
    status: JobStatus | None = None,
    *,
    name: str = NAME,
    generation: int = 1,
) -> Job:
    """The smallest job with `edits`, and `status` as recorded."""
    read = QLoRAJob.read(document(edits, name=name, generation=generation))
    return Job(read.metadata, read.spec, status or JobStatus())


# --- the model and the data that inspection found ---


def shape(*, layers: int = 4, hidden: int = 256, vocabulary: int = 1000, max_position: int = 2048) -> ModelShape:
    """A small decoder: tests about lifecycle never come near a GPU's memory."""
    linear = [
        LinearModule(name=name, in_features=i, out_features=o, count=layers)
        for name, i, o in (
            ("q_proj", hidden, hidden),
            ("k_proj", hidden, hidden),
            ("v_proj", hidden, hidden),
            ("o_proj", hidden, hidden),
            ("gate_proj", hidden, 4 * hidden),
            ("up_proj", hidden, 4 * hidden),
            ("down_proj", 4 * hidden, hidden),
        )
    ]
    parameters = sum(m.in_features * m.out_features * m.count for m in linear) + vocabulary * hidden
    return ModelShape(
        parameters=parameters,
        hidden_size=hidden,
        layers=layers,
        heads=4,
        kv_heads=4,
        head_dim=hidden // 4,
        intermediate_size=4 * hidden,
        vocab_size=vocabulary,
        tied_embeddings=True,
        max_position=max_position,
        dtype="bfloat16",
        bytes_on_disk=2 * parameters,
        linear=linear,
        family="llama",
    )


def inspection(of: ModelShape | None = None, *, max_length: int = 512, sequences: int = 100) -> Inspection:
    return Inspection(
        architecture="LlamaForCausalLM",
        model_digest="sha256:model",
        data_digest="sha256:data",
        shape=of or shape(),
        examples=400,
        tokens=TokenCounts(p50=90, p95=200, max=600, total=40_000),
        max_length=max_length,
        sequences=sequences,
        loss="assistant",
        truncated_percent=0.5,
        loss_token_percent=40.0,
        duplicates=3,
        leakage=0,
    )


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "method": "qlora",
        "rank": 16,
        "alpha": 32,
        "dropout": 0.05,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "max_length": 512,
        "packing": True,
        "loss": "assistant",
        "epochs": 3.0,
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "warmup_fraction": 0.03,
        "effective_batch_size": 32,
        "optimizer": "paged_adamw_8bit",
        "seed": 42,
        "gradient_checkpointing": True,
        "attention": "sdpa",
        "max_grad_norm": 1.0,
    }
    return Recipe.model_validate(fields | changes)


def plan(of: Job, *, micro_batch_size: int = 8, effective_batch_size: int = 32, **changes: Any) -> Plan:
    """A plan that fits the job's hardware as it stands."""
    on_cpu = of.spec.hardware.accelerator == "cpu"
    fields: dict[str, Any] = {
        "recipe": recipe(effective_batch_size=effective_batch_size),
        "accelerator": of.spec.hardware.accelerator,
        "flavour": "cpu" if on_cpu else "NVIDIA-L40S",
        "resource": None if on_cpu else "nvidia.com/gpu",
        "labels": {} if on_cpu else {"nvidia.com/gpu.product": "NVIDIA-L40S"},
        "memory_label": None if on_cpu else "nvidia.com/gpu.memory",
        "gpus": 0 if on_cpu else 1,
        "gpus_per_node": 0 if on_cpu else 1,
        "nodes": 1,
        "micro_batch_size": micro_batch_size,
        "gradient_accumulation": effective_batch_size // micro_batch_size,
        "steps": 12,
        "memory": MemoryPlan(
            items=(MemoryItem(name="base weights, 4 bit", bytes=3 * GIB), MemoryItem(name="activations", bytes=GIB)),
            total_bytes=4 * GIB,
            gpu_bytes=48 * GIB,
            headroom_percent=15,
        ),
        "host_memory_bytes": 6 * GIB,
        "disk_bytes": 20 * GIB,
        "planned_for": planned_for(of),
    }
    return Plan.model_validate(fields | changes)


# --- histories ---


def attempt(task: Task, n: int, outcome: str, *, ended: datetime = NOW, of: str = NAME, **more: Any) -> Attempt:
    return Attempt(
        number=n,
        stage=task.stage,
        artifact=task.artifact,
        job=task.job_name(of, n),
        outcome=outcome,
        ended=ended,
        **more,
    )


def history(
    of: Job, *done: Task, planned: bool = True, volume: bool = True, before: Iterable[Attempt] = (), **changes: Any
) -> Job:
    """`of` with `done` succeeded at their first attempt and all that they bring recorded, after the attempts `before`.

    From the inspection on there is a plan, and from the plan on a work volume, unless told otherwise.
    """
    attempts = [*before]
    update: dict[str, Any] = {}
    artifacts: dict[str, Artifact] = {}
    for task in done:
        n = 1 + sum(1 for a in attempts if a.stage == task.stage and a.artifact == task.artifact)
        attempts.append(attempt(task, n, "Succeeded", of=of.metadata.name))
        if task == INSPECT:
            update["inspection"] = inspection()
        elif task == TRAIN:
            artifacts["adapter"] = Artifact(name="adapter", state="Made", digest="sha256:adapter", bytes=5 * MIB)
        elif task == MERGE:
            artifacts["merged"] = Artifact(name="merged", state="Made", digest="sha256:merged", bytes=GIB, parity=1e-3)
        elif task.artifact is not None:
            published = {"state": "Published", "uri": f"{of.spec.output.uri}/{task.artifact}"}
            artifacts[task.artifact] = artifacts[task.artifact].model_copy(update=published)
    if INSPECT in done and planned:
        update["plan"] = plan(of)
    if INSPECT in done and planned and volume:
        update["work_volume"] = WorkVolume(claim_name=work_claim(of))
    update |= {"attempts": tuple(attempts), "artifacts": tuple(artifacts.values())} | changes
    return Job(of.metadata, of.spec, of.status.model_copy(update=update))


# --- what stages report ---

RESULTS: dict[Stage, Inspection | TrainResult | MergeResult | PublishResult] = {
    Stage.INSPECT: inspection(),
    Stage.TRAIN: TrainResult(
        adapter_digest="sha256:adapter",
        adapter_bytes=5 * MIB,
        steps=12,
        epochs=3.0,
        train_loss=0.51239,
        eval_loss=0.6,
        tokens=120_000,
        tokens_per_second=1234.5,
        mfu=0.41239,
        seconds=97.0,
        device="NVIDIA L40S",
        peak_memory_bytes=3 * GIB,
        scores=[Score(metric="exactMatch", base=0.1, tuned=0.7, examples=50)],
    ),
    Stage.MERGE: MergeResult(digest="sha256:merged", bytes=GIB, shards=1, parity=1e-3),
    Stage.PUBLISH: PublishResult(uri="pvc://results/tuned/adapter", digest="sha256:manifest", bytes=5 * MIB, files=3),
}


def report(task: Task, n: int = 1, *, failure: str | None = None) -> Report:
    """What `task`'s attempt `n` writes when it ends: its result, or `failure`."""
    if failure is not None:
        return Report(stage=task.stage, attempt=n, job_uid=UID, failure=failure)
    data = RESULTS[task.stage].model_dump(mode="json", by_alias=True, exclude_none=True)
    return Report(stage=task.stage, attempt=n, job_uid=UID, result=data)


def succeeded(task: Task, n: int = 1) -> Ended:
    return Ended(
        True, exit_code=0, report=report(task, n), node="node-1", started=NOW - timedelta(minutes=5), ended=NOW
    )


def exited(code: int, task: Task = TRAIN, *, says: str = "it says why", n: int = 1) -> Ended:
    return Ended(False, exit_code=code, report=report(task, n, failure=says), node="node-1", ended=NOW)


def seen(
    of: Job,
    attempts: Mapping[str, Seen] | None = None,
    *,
    claim: bool = True,
    outputs: bool = True,
    nodes: Iterable[Any] | None = None,
) -> Observed:
    """What is there of `of`: attempts by the end of their names (`train-1`), its work volume's claim, its results'."""
    claims = {output_claim(of) or "": outputs, work_claim(of): claim}
    named = {f"{of.metadata.name}-{end}": state for end, state in (attempts or {}).items()}
    return Observed(named, claims, inventory=Inventory.of(nodes or ()))


# --- nodes ---


def gpu_node(
    name: str,
    product: str,
    memory_mib: int | None,
    *,
    gpus: int = 1,
    labels: Mapping[str, str] | None = None,
    taints: Iterable[Mapping[str, str]] = (),
    ready: bool = True,
    memory: str = "65536000Ki",
) -> dict[str, Any]:
    """A raw Node as NVIDIA's device plugin and feature discovery leave it."""
    of_gpu = {} if memory_mib is None else {"nvidia.com/gpu.memory": str(memory_mib)}
    return {
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": product} | of_gpu | dict(labels or {})},
        "spec": {"taints": [dict(taint) for taint in taints]} if taints else {},
        "status": {
            "allocatable": {"cpu": "8", "memory": memory, "nvidia.com/gpu": str(gpus)},
            "conditions": [
                {"type": "MemoryPressure", "status": "False"},
                {"type": "Ready", "status": "True" if ready else "False"},
            ],
        },
    }


def cpu_node(name: str, memory: str) -> dict[str, Any]:
    """A raw Node without GPUs."""
    return {
        "metadata": {"name": name, "labels": {}},
        "spec": {},
        "status": {
            "allocatable": {"cpu": "8", "memory": memory},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


A10 = ("NVIDIA-A10", 23028)
L40S = ("NVIDIA-L40S", 46068)
A100_40 = ("NVIDIA-A100-SXM4-40GB", 40960)
A100_80 = ("NVIDIA-A100-SXM4-80GB", 81920)
H100 = ("NVIDIA-H100-80GB-HBM3", 81559)
