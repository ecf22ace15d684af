"""Where a job stands, and what came out: `status`. Written by the operator alone."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, model_validator

from qlora_api.exchange import Inspection, Recipe, Score, Verdict
from qlora_api.v1alpha1.fields import Accelerator, ConditionStatus, Document, Timestamp


class Phase(StrEnum):
    """Where a job stands, for people. Programs read the conditions."""

    PENDING = "Pending"  # accepted, nothing done yet
    INSPECTING = "Inspecting"
    PLANNING = "Planning"
    PLANNED = "Planned"  # rests at its plan: planOnly
    SCHEDULING = "Scheduling"  # waits for its volume or a GPU
    TRAINING = "Training"
    MERGING = "Merging"
    PUBLISHING = "Publishing"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class ConditionType(StrEnum):
    """The conditions that the operator writes: kstatus' three, the job's milestones, and batch/v1's ends."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    INSPECTED = "Inspected"
    PLANNED = "Planned"
    SCHEDULED = "Scheduled"
    TRAINED = "Trained"
    PUBLISHED = "Published"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Condition(Document):
    """One aspect of the job's state, as everywhere in Kubernetes."""

    type: str = Field(max_length=316, description="Which aspect, such as Ready, Planned or Failed.")
    status: ConditionStatus = Field(description="True, False or Unknown.")
    observed_generation: int | None = Field(default=None, description="Generation of the spec that this is said of.")
    last_transition_time: Timestamp = Field(description="When the status last changed.")
    reason: str = Field(max_length=1024, description="Why, in one word, for programs.")
    message: str = Field(max_length=32768, description="Why, and what to do, for people.")


class MemoryItem(Document):
    """One use of memory or room."""

    name: str = Field(description="What it is for.")
    bytes: int = Field(description="Predicted bytes: of a GPU's memory on one GPU.")


class MemoryPlan(Document):
    """What is predicted to lie in one GPU's memory at the peak."""

    items: tuple[MemoryItem, ...] = Field(description="Use by use.")
    total_bytes: int = Field(description="Their sum.")
    gpu_bytes: int | None = Field(default=None, description="What one GPU of the chosen flavour has.")
    headroom_percent: int = Field(description="Memory kept free, in percent of the sum.")
    measured_bytes: int | None = Field(
        default=None, description="What the training took at its peak, beside what was predicted."
    )
    notes: tuple[str, ...] = Field(default=(), description="What is particular to this model's plan.")


class Rejected(Document):
    """A flavour that was not chosen."""

    flavour: str = Field(description="The flavour.")
    reason: str = Field(description="Why not.")


class Plan(Document):
    """How the training will run, and why there."""

    recipe: Recipe = Field(description="The training as decided.")
    accelerator: Accelerator = Field(description="nvidia, amd or cpu.")
    flavour: str = Field(description="Product of the chosen GPUs, as in the node label, or cpu.")
    resource: str | None = Field(default=None, description="What a pod asks for to get one of these GPUs.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels of the nodes that have them.")
    memory_label: str | None = Field(
        default=None, description="Label of those nodes with a GPU's memory in MiB, where they have one."
    )
    gpus: int = Field(description="GPUs in all.")
    gpus_per_node: int = Field(description="GPUs in each node.")
    nodes: int = Field(description="Nodes.")
    sharded: bool = Field(default=False, description="Whether the GPUs share one model; else each has it whole.")
    micro_batch_size: int = Field(description="Sequences per GPU at a time.")
    gradient_accumulation: int = Field(description="Micro-batches per optimizer step on each GPU.")
    steps: int | None = Field(default=None, description="Optimizer steps, as far as known before packing.")
    estimated_seconds: int | None = Field(
        default=None,
        description="Time that the steps take if the GPUs reach the usual share of their peak; absent where that is "
        "not known.",
    )
    estimated_gpu_hours: float | None = Field(default=None, description="The same times GPUs, in hours.")
    memory: MemoryPlan = Field(description="One GPU's memory at the peak, item by item.")
    host_memory_bytes: int = Field(description="Memory that the training pod asks for.")
    host_memory_items: tuple[MemoryItem, ...] = Field(default=(), description="The same use by use.")
    disk_bytes: int = Field(description="Size of the work volume.")
    disk_items: tuple[MemoryItem, ...] = Field(default=(), description="The same use by use.")
    rejected: tuple[Rejected, ...] = Field(default=(), description="The flavours not chosen, and why.")

    @property
    def sharing(self) -> int:
        """GPUs that share one model."""
        return self.gpus if self.sharded else 1

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_version(cls, stored: Any) -> Any:
        """Plans of NVIDIA's GPUs were once stored without what a pod asks for and by which labels, and several GPUs
        always shared one model."""
        if isinstance(stored, dict) and "sharded" not in stored and stored.get("gpus", 1) > 1:
            stored = stored | {"sharded": True}
        if not isinstance(stored, dict) or stored.get("flavour") in (None, "cpu") or stored.get("resource"):
            return stored
        return stored | {
            "resource": "nvidia.com/gpu",
            "labels": {"nvidia.com/gpu.product": stored["flavour"]},
            "memoryLabel": "nvidia.com/gpu.memory",
        }

    planned_for: str | None = Field(
        default=None, description="Fingerprint of spec.hardware and spec.podTemplate that it was made for."
    )


class Progress(Document):
    """How far the training is. Rounded, and written rarely."""

    percent: int = Field(
        default=0,
        description="Share of the work that is done: the stages and publications, the training by its steps and most.",
    )
    step: int | None = Field(default=None, description="Optimizer steps done.")
    steps: int | None = Field(default=None, description="Optimizer steps in all.")
    epoch: float | None = Field(default=None, description="Passes over the data done.")
    loss: float | None = Field(default=None, description="Training loss.")
    eval_loss: float | None = Field(default=None, description="Loss on the held-out data.")
    tokens_per_second: int | None = Field(default=None, description="Tokens per second, over all GPUs.")
    mfu: float | None = Field(
        default=None, description="Model FLOPs utilisation: the share of the GPUs' peak that learning takes, 0 to 1."
    )
    remaining: str | None = Field(default=None, description="Time left, such as 12m.")
    last_report_time: Timestamp | None = Field(default=None, description="When the trainer last reported.")


class Attempt(Document):
    """One run of one stage."""

    number: int = Field(description="Counts from 1 per stage (and artifact).")
    stage: str = Field(description="inspect, train, merge or publish.")
    artifact: str | None = Field(default=None, description="What was published.")
    job: str = Field(description="Name of the batch/v1 Job.")
    node: str | None = Field(default=None, description="Where its pod ran.")
    started: Timestamp | None = Field(default=None, description="When its pod started.")
    ended: Timestamp | None = Field(default=None, description="When it ended.")
    outcome: str | None = Field(default=None, description="How it ended. Absent: it has not.")
    exit_code: int | None = Field(default=None, description="Exit code of its container.")
    message: str | None = Field(default=None, description="What it said at the end.")
    change: str | None = Field(default=None, description="What is done differently in the next attempt.")
    step: int | None = Field(
        default=None, description="The furthest step that the training was known to have come to by then."
    )


class OlderAttempts(Document):
    """Ends of attempts that `attempts` lists no longer, counted."""

    stage: str = Field(description="inspect, train, merge or publish.")
    artifact: str | None = Field(default=None, description="What was published.")
    outcome: str = Field(description="How they ended.")
    count: int = Field(default=0, description="How many.")
    seconds: int = Field(default=0, description="So long they ran, together.")


class Usage(Document):
    """What the job has used up, over all attempts; what `spec.budget` is compared with."""

    run_seconds: int = Field(default=0, description="Seconds that pods of the job have run.")
    gpu_seconds: int = Field(default=0, description="GPUs × seconds of training.")


class EvaluationResult(Document):
    """What the tuned model is worth, beside its base."""

    scores: tuple[Score, ...] = Field(
        default=(),
        description="Metric by metric.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["metric"]},
    )
    gates: tuple[Verdict, ...] = Field(default=(), description="The gates and their verdicts.")
    selected_step: int | None = Field(
        default=None, description="The step whose adapter leaves. Absent: it is that of the last step."
    )
    stopped_early: bool = Field(default=False, description="Whether the training ended early, for want of gain.")


class Serving(Document):
    """How to serve an artifact: lines to copy."""

    vllm: str | None = Field(default=None, description="The command for vLLM.")
    kserve: str | None = Field(default=None, description="The storage URI for KServe.")


class Artifact(Document):
    """One thing that came out."""

    name: str = Field(description="adapter, merged, or a quantised form.")
    state: Literal["Made", "Published"] = Field(description="Made: on the work volume. Published: at its uri.")
    uri: str | None = Field(default=None, description="Where it lies.")
    digest: str | None = Field(default=None, description="Digest of its files.")
    bytes: int | None = Field(default=None, description="Size of its files.")
    parity: float | None = Field(
        default=None, description="How far the merged weights are from base + adapter: the largest relative difference."
    )
    serving: Serving | None = Field(default=None, description="How to serve it.")


class WorkVolume(Document):
    """The claim that the stages work in."""

    claim_name: str = Field(description="Name of the claim.")
    retained: bool = Field(default=True, description="Whether it is still there.")


class JobStatus(Document):
    """Where the job stands. Written by the operator alone."""

    observed_generation: int = Field(default=-1, description="Generation of the spec that this status speaks of.")
    phase: Phase | None = Field(default=None, description="Where the job stands, in one word, for people.")
    start_time: Timestamp | None = Field(default=None, description="When the operator took the job up.")
    completion_time: Timestamp | None = Field(default=None, description="When it succeeded or failed.")
    message: str | None = Field(
        default=None, description="Where the job stands, or why it does not move, in a sentence."
    )
    conditions: tuple[Condition, ...] = Field(
        default=(),
        description="The job's state for programs: Ready, Reconciling and Stalled; Inspected, Planned, Scheduled, "
        "Trained and Published; Suspended, Complete and Failed.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    inspection: Inspection | None = Field(default=None, description="What a look at the model and the data has shown.")
    plan: Plan | None = Field(default=None, description="How the training will run, and why there.")
    work_volume: WorkVolume | None = Field(default=None, description="The claim that the stages work in.")
    progress: Progress | None = Field(default=None, description="How far the training is.")
    attempts: tuple[Attempt, ...] = Field(
        default=(),
        description="The runs of every stage, in order: of those that have ended the first, the newest ten and those "
        "after which something was changed.",
    )
    older_attempts: tuple[OlderAttempts, ...] = Field(
        default=(), description="The other runs that have ended, by stage and outcome."
    )
    usage: Usage | None = Field(default=None, description="What the job has used up.")
    evaluation: EvaluationResult | None = Field(default=None, description="What the tuned model is worth.")
    cleanup_time: Timestamp | None = Field(
        default=None, description="When pods and work volume were deleted, spec.ttlSecondsAfterFinished after the end."
    )
    artifacts: tuple[Artifact, ...] = Field(
        default=(),
        description="What came out, and where it lies.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
