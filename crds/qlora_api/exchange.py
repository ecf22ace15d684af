"""What operator and trainer say to each other: orders in, reports out, exit codes, progress.

An *order* is one JSON document in an immutable ConfigMap, mounted at `ORDER_PATH`. A *report* is one JSON
document of at most `REPORT_MAX_BYTES` in the container's termination message. Both carry `version`; a trainer
image that is given an order of another version refuses it and says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from enum import IntEnum, StrEnum
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from qlora_api.findings import FindingCode, Severity

VERSION = "v1alpha1"

ORDER_PATH = "/etc/qlora/order.json"
WORK_MOUNT = "/work"
#: Scratch space of a pod; inspect has nothing else. The kubelet evicts a pod that takes more, again and again.
SCRATCH_GIB = 4
#: A training multiplies with so many routed experts at a time as fit in here when they are dequantised, or with one.
EXPERTS_AT_ONCE_BYTES = 512 << 20
CLAIMS_MOUNT = "/claims"
#: Below it each Secret that the stage needs, a directory of its name with a file per key.
CREDENTIALS_MOUNT = "/credentials"
REPORT_PATH = "/dev/termination-log"
#: The kubelet cuts termination messages at 4096 bytes (all containers of a pod share 12 KiB).
REPORT_MAX_BYTES = 4096


class ExitCode(IntEnum):
    """How a stage ended. The operator's answers, the pods' `podFailurePolicy` and the docs derive from this table.

    The values stay clear of the shell's (126 and above) and of Python's 1 and 2.
    """

    SUCCEEDED = 0
    BAD_INPUT = 10
    GATE_FAILED = 11
    DIVERGED = 12
    OUT_OF_MEMORY = 13
    INTERRUPTED = 14
    ENVIRONMENT_UNFIT = 15
    STALLED = 16
    VOLUME_FULL = 17

    @property
    def retried(self) -> bool:
        """Whether another attempt can end otherwise."""
        return self in (ExitCode.OUT_OF_MEMORY, ExitCode.INTERRUPTED, ExitCode.ENVIRONMENT_UNFIT, ExitCode.STALLED)


class Stage(StrEnum):
    """A step that runs in a pod, in the order of a job's way."""

    INSPECT = "inspect"
    TRAIN = "train"
    MERGE = "merge"
    PUBLISH = "publish"


#: What a job can publish; also the name of its directory on the work volume.
ArtifactName = Literal["adapter", "merged"]


class Document(BaseModel):
    """A document that travels as camelCase JSON. Unknown fields are refused: both halves ship together."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid", allow_inf_nan=False
    )

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space, absent instead of null."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def fingerprint(self) -> str:
        """`sha256:…` of the canonical JSON."""
        return f"sha256:{hashlib.sha256(self.to_json().encode()).hexdigest()}"


# --- facts about the model and the data (inspect finds them, the status shows them, sizing reads them) ---


class LinearModule(Document):
    """One kind of linear layer, as often as it occurs: what NF4 quantises and LoRA attaches to."""

    name: str = Field(description="Last part of the module's name, for example q_proj.")
    in_features: int = Field(ge=1, description="Width of its input.")
    out_features: int = Field(ge=1, description="Width of its output.")
    count: int = Field(ge=1, description="How many of them the model has.")


class ExpertWeights(Document):
    """One kind of weights of a mixture's routed experts: those of all experts of a layer are one tensor."""

    name: str = Field(description="Last part of the parameter's name, for example gate_up_proj.")
    experts: int = Field(ge=1, description="Experts in one layer.")
    in_features: int = Field(ge=1, description="Width of one expert's input.")
    out_features: int = Field(ge=1, description="Width of its output.")
    count: int = Field(ge=1, description="Layers that have it.")

    @property
    def weights(self) -> int:
        """Weights in all layers."""
        return self.count * self.experts * self.in_features * self.out_features


class ModelShape(Document):
    """What the memory of a training depends on, read from config.json and the weights' headers."""

    parameters: int = Field(ge=1, description="All weights, tied ones once.")
    hidden_size: int = Field(ge=1, description="Width of the residual stream.")
    layers: int = Field(ge=1, description="Transformer blocks.")
    heads: int = Field(ge=1, description="Attention heads.")
    kv_heads: int = Field(ge=1, description="Heads of keys and values.")
    head_dim: int = Field(ge=1, description="Width of one head.")
    intermediate_size: int = Field(ge=1, description="Width of the MLP.")
    vocab_size: int = Field(ge=1, description="Rows of the embedding.")
    tied_embeddings: bool = Field(description="Whether the output head is the embedding.")
    max_position: int = Field(ge=1, description="Longest sequence the model was built for, in tokens.")
    dtype: str = Field(description="Type of the stored weights.")
    bytes_on_disk: int = Field(ge=0, description="Bytes of the weights' files.")
    linear: list[LinearModule] = Field(description="Linear layers of the blocks; the output head is not among them.")
    family: str = Field(default="", description="config.json's model_type, of the text model where there are several.")
    sliding_window: int | None = Field(
        default=None, ge=1, description="Tokens that layers look back, where some do not look back to the start."
    )
    experts: list[ExpertWeights] = Field(
        default_factory=list, description="Weights of routed experts; they are not among the linear layers."
    )
    experts_per_token: int = Field(default=0, ge=0, description="Routed experts that work on each token.")
    experts_quantized: bool = Field(
        default=False,
        description="Whether 4-bit loading reaches the routed experts; else they stay in the compute type.",
    )

    @property
    def active_parameters(self) -> int:
        """Weights that work on each token: of the routed experts only those that it is sent to."""
        idle = sum(
            kind.weights * max(0, kind.experts - self.experts_per_token) // kind.experts for kind in self.experts
        )
        return self.parameters - idle


class TokenCounts(Document):
    """Lengths of the training examples in tokens, chat template included, before truncation."""

    p50: int = Field(ge=0, description="Half of the examples are at most so long.")
    p95: int = Field(ge=0, description="95 % of the examples are at most so long.")
    max: int = Field(ge=0, description="The longest example.")
    total: int = Field(ge=0, description="All examples together.")


#: So many findings, each with so long a place, fit into a report beside everything else.
FINDINGS_REPORTED = 10
FINDING_PLACE_MAX = 80


class Finding(Document):
    """One kind of thing that inspection found in the data; docs/data.md says what each means."""

    severity: Severity = Field(description="fails or warns; a job that goes on has warnings only.")
    code: FindingCode = Field(description="What was found.")
    count: int = Field(ge=0, description="How many examples it is about.")
    example: str | None = Field(
        default=None, max_length=FINDING_PLACE_MAX, description="Where the first of them is: source, file and line."
    )


class SourceShare(Document):
    """What one training source gives of an epoch."""

    examples_percent: float = Field(ge=0, le=100, description="Its share of the examples.")
    tokens_percent: float = Field(ge=0, le=100, description="Its share of the tokens, cut to maxLength.")


class Inspection(Document):
    """What the inspect stage found in the model and the data."""

    architecture: str = Field(description="Class of the model, for example LlamaForCausalLM.")
    model_digest: str = Field(
        description="Over config, tokenizer files and the weights' headers and sizes; in a store, over their ETags too."
    )
    data_digest: str = Field(description="Over every data file's bytes, in the order of the spec.")
    shape: ModelShape = Field(description="The model's shape.")
    examples: int = Field(
        ge=0, description="Training examples of an epoch: without duplicates and the eval split, by weight."
    )
    eval_examples: int = Field(default=0, ge=0, description="Examples held out for the evaluation loss.")
    golden_examples: int = Field(default=0, ge=0, description="Examples of the golden set.")
    canary_examples: int = Field(default=0, ge=0, description="Examples of the canary set.")
    tokens: TokenCounts = Field(description="Tokens per training example.")
    max_length: int = Field(ge=1, description="The sequence length decided on, in tokens.")
    sequences: int = Field(ge=1, description="Training sequences per epoch at that length, after packing.")
    loss: Literal["assistant", "completion", "all"] = Field(description="Which tokens carry loss.")
    truncated_percent: float = Field(ge=0, le=100, description="Examples longer than maxLength.")
    loss_token_percent: float = Field(ge=0, le=100, description="Tokens that carry loss.")
    duplicates: int = Field(ge=0, description="Training examples removed because an equal one came before.")
    leakage: int = Field(ge=0, description="Held-out examples that are also training examples.")
    near_duplicates: int = Field(
        default=0, ge=0, description="Training examples that are nearly the same as an earlier one; they are kept."
    )
    findings: list[Finding] = Field(
        default_factory=list, max_length=FINDINGS_REPORTED, description="What to look at in the data, gravest first."
    )
    sources: list[SourceShare] = Field(
        default_factory=list,
        description="What each source gives of an epoch, in the order of dataset.train; empty where there is but one.",
    )
    download_bytes: int = Field(
        default=0, ge=0, description="Model and data in stores: what train downloads to the work volume."
    )
    model_revision: str | None = Field(
        default=None, description="Commit of the model on the hub, at which every later stage reads it."
    )
    data_revisions: dict[str, str] = Field(
        default_factory=dict, description="Commits of data on the hub, by the field that names it."
    )


class Recipe(Document):
    """Everything that decides what is learned, resolved: what the spec leaves open is decided here."""

    method: Literal["qlora", "lora"] = Field(description="Whether the frozen base is in 4 bits.")
    quant_type: Literal["nf4", "fp4", "hqq"] = Field(default="nf4", description="4-bit type of the base, under qlora.")
    double_quant: bool = Field(default=True, description="Whether scale factors are quantised too, under qlora.")
    compute_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Type of the matrix products."
    )
    rank: int = Field(ge=1, description="Rank of the adapter.")
    alpha: int = Field(ge=1, description="Scale of the adapter: its product is scaled by alpha/rank.")
    dropout: float = Field(ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] = Field(description="Linear layers that get an adapter.")
    rslora: bool = Field(default=False, description="Whether the scale is alpha/√rank instead.")
    dora: bool = Field(default=False, description="Whether magnitudes are learned apart from directions (DoRA).")
    init: Literal["default", "gaussian", "loftq"] = Field(default="default", description="How the adapter starts.")
    max_length: int = Field(ge=1, description="Tokens per sequence.")
    packing: bool = Field(description="Whether a sequence holds several examples.")
    loss: Literal["assistant", "completion", "all"] = Field(description="Which tokens are learned.")
    epochs: float | None = Field(default=None, description="Passes over the data.")
    max_steps: int | None = Field(default=None, description="Optimizer steps, instead of epochs.")
    learning_rate: float = Field(gt=0, description="Highest learning rate.")
    min_learning_rate: float = Field(default=0, ge=0, description="Learning rate at the end.")
    schedule: Literal["cosine", "linear", "constant"] = Field(description="How the learning rate falls.")
    warmup_fraction: float = Field(ge=0, le=1, description="Share of the steps over which it rises.")
    effective_batch_size: int = Field(ge=1, description="Sequences per optimizer step, over all GPUs.")
    optimizer: str = Field(description="The optimizer, by transformers' name.")
    seed: int = Field(description="Seed of the order of examples, the dropout and the adapter's start.")
    gradient_checkpointing: bool = Field(description="Whether activations are recomputed.")
    attention: str = Field(description="The attention kernel.")
    offload: Literal["none", "activations", "parameters"] = Field(
        default="none",
        description="What waits in host memory: the activation checkpoints, or the weights of the frozen base.",
    )
    max_grad_norm: float = Field(gt=0, description="Norm that gradients are clipped to.")
    evals_per_epoch: int = Field(default=4, ge=0, description="Evaluations of the held-out loss per epoch.")
    best_metric: Literal["evalLoss", "exactMatch", "tokenF1", "rougeL"] | None = Field(
        default=None, description="The adapter that is best by it at an evaluation leaves. Absent: the last one does."
    )
    early_stopping_epochs: int | None = Field(
        default=None, ge=1, description="Epochs without gain by it after which the training ends. Absent: never."
    )

    def steps_per_epoch(self, sequences: int) -> int:
        """Optimizer steps that see each of `sequences` once; the last batch may be short."""
        return -(-sequences // self.effective_batch_size)

    @property
    def half_quadratic(self) -> bool:
        """Whether the base is held by HQQ."""
        return self.method == "qlora" and self.quant_type == "hqq"

    def steps(self, sequences: int) -> int:
        """Optimizer steps of the whole training. Raises ValueError when neither epochs nor max_steps is said."""
        if self.max_steps is not None:
            return self.max_steps
        if self.epochs is None:
            raise ValueError("the recipe says neither epochs nor maxSteps")
        return max(1, round(self.epochs * self.steps_per_epoch(sequences)))


class Score(Document):
    """A metric before and after tuning."""

    metric: str = Field(description="The metric, for example exactMatch; canary. before it: on the canary set.")
    base: float = Field(description="The base model's score.")
    tuned: float = Field(description="The tuned model's score.")
    examples: int = Field(ge=1, description="Examples that it was measured on.")


class Verdict(Document):
    """Whether a gate holds."""

    metric: str = Field(description="The score that is judged.")
    bound: Literal["min", "max", "maxDropFromBase"] = Field(description="How it is bounded.")
    limit: float = Field(description="The bound.")
    base: float = Field(description="The base model's score.")
    tuned: float = Field(description="The tuned model's score.")
    passed: bool = Field(description="Whether the score keeps to it.")

    def sentence(self) -> str:
        """The verdict for people."""
        if self.bound == "maxDropFromBase":
            asked = f"may be worse than the base's {self.base:.4g} by {self.limit:g} at most"
        else:
            asked = f"is to be at {'least' if self.bound == 'min' else 'most'} {self.limit:g}"
        return f"{self.metric} {asked} and is {self.tuned:.4g}"


# --- orders ---

#: Fields of the spec that name data, as messages and `Inspection.data_revisions` call them.
EVAL_FIELD, GOLDEN_FIELD, CANARY_FIELD = "dataset.eval", "evaluation.golden", "evaluation.canary"


def train_field(index: int) -> str:
    """The field that names a source of training examples."""
    return f"dataset.train[{index}]"


class DataSource(Document):
    """Where examples are and how they are written (format absent: detected)."""

    uri: str
    revision: str | None = Field(default=None, description="On the hub; once it was inspected, the commit.")
    format: str | None = None
    secret: str | None = Field(default=None, description="Name of the Secret for the store, never its content.")
    weight: float | None = Field(
        default=None, gt=0, description="How often each example of a training source occurs in an epoch; absent: once."
    )


class DataOrder(Document):
    """The data of a job: what to train on, and what to hold back."""

    train: list[DataSource]
    eval: DataSource | None = None
    eval_fraction: float | None = None
    golden: DataSource | None = None
    canary: DataSource | None = None
    log_samples: bool = False


class GateOrder(Document):
    """A condition on a score; one of the bounds is set."""

    metric: str
    min: float | None = None
    max: float | None = None
    max_drop_from_base: float | None = None


class JudgeOrder(Document):
    """A language model that scores answers, behind an OpenAI-compatible endpoint."""

    endpoint: str = Field(description="Address, up to and including /v1.")
    model: str
    secret: str | None = Field(default=None, description="Name of the Secret with its token, never its content.")


class EvaluationOrder(Document):
    """What the tuned model is measured by, beside its base."""

    metrics: list[str] = Field(default_factory=lambda: ["exactMatch"])
    answer_schema: str | None = Field(default=None, description="JSON Schema, as JSON.")
    gates: list[GateOrder] = Field(default_factory=list)
    judge: JudgeOrder | None = None


class OrderEnvelope(Document):
    """What every order says."""

    version: Literal["v1alpha1"] = VERSION
    namespace: str
    job: str
    job_uid: str
    attempt: int = Field(ge=1)
    work_dir: str = Field(description="The job's own directory on the work volume; scratch space for inspect.")


class InspectOrder(OrderEnvelope):
    """Look at model and data; touch no weights."""

    stage: Literal[Stage.INSPECT] = Stage.INSPECT
    model_uri: str
    model_revision: str | None = None
    model_secret: str | None = None
    data: DataOrder
    output_uri: str | None = Field(default=None, description="A store that the results go to: whether it can be used.")
    output_secret: str | None = None
    max_length: int | None = None
    packing: bool = True
    loss: Literal["assistant", "completion", "all"] | None = None
    answer_schema: str | None = Field(default=None, description="As in `EvaluationOrder`: whether it is one.")


class TrainOrder(OrderEnvelope):
    """Train one adapter."""

    stage: Literal[Stage.TRAIN] = Stage.TRAIN
    model_uri: str
    model_revision: str | None = None
    model_secret: str | None = None
    model_digest: str
    data: DataOrder
    data_digest: str
    recipe: Recipe
    micro_batch_size: int = Field(ge=1)
    gradient_accumulation: int = Field(ge=1)
    accelerator: Literal["nvidia", "amd", "cpu"]
    nodes: int = Field(default=1, ge=1, description="Pods of the training, one in each node.")
    ranks_per_node: int = Field(default=1, ge=1, description="Processes in each pod, one for each of its GPUs.")
    sharded: bool = Field(default=False, description="The processes share one model; else each has it whole.")
    fused_loss: bool = Field(default=False, description="Head and loss in tiles of tokens; else the logits are whole.")
    cpu_allowed: bool = Field(default=False, description="Run on the CPU where the accelerator is not there.")
    checkpoint_every_seconds: int = Field(ge=1)
    checkpoint_keep: int = Field(ge=1)
    evaluation: EvaluationOrder = Field(default_factory=EvaluationOrder)

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return self.nodes * self.ranks_per_node

    def bound(self) -> dict[str, Any]:
        """What a checkpoint and an adapter are bound to, fact by fact: name to value.

        Micro-batch, accumulation, ranks, checkpoint interval, device, what is recomputed or waits in host memory, and
        Secrets may change under a checkpoint; nothing else. Of data on the hub the bytes count, not the commit that
        had them. What is at its default is left out, so that a field that a later version adds binds only the jobs
        that use it.
        """
        unbound = {"secret", "revision"}
        data = self.data.model_dump(
            mode="json",
            by_alias=True,
            exclude_defaults=True,
            exclude={
                "train": {"__all__": unbound},
                **dict.fromkeys(("eval", "golden", "canary"), unbound),
                "log_samples": True,
            },
        )
        recipe = self.recipe.model_dump(
            mode="json", by_alias=True, exclude_defaults=True, exclude={"offload", "gradient_checkpointing"}
        )
        return {
            "version": self.version,
            "model": self.model_digest,
            "dataset": self.data_digest,
            **_flat("dataset", data),
            **_flat("recipe", recipe),
        }

    def binding(self) -> str:
        """`sha256:…` of `bound`."""
        return binding_of(self.bound())


def binding_of(bound: Mapping[str, Any]) -> str:
    """`sha256:…` of what `TrainOrder.bound` says."""
    return f"sha256:{hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()}"


def _flat(name: str, value: Any) -> dict[str, Any]:
    """`value` taken apart into single facts, named by their paths below `name`."""
    if isinstance(value, dict):
        return {path: fact for key, below in value.items() for path, fact in _flat(f"{name}.{key}", below).items()}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
        return {path: fact for n, item in items for path, fact in _flat(f"{name}[{n}]", item).items()}
    return {name: value}


class MergeOrder(OrderEnvelope):
    """Write base + ΔW as an ordinary model directory."""

    stage: Literal[Stage.MERGE] = Stage.MERGE
    model_uri: str
    model_revision: str | None = None
    model_secret: str | None = None
    model_digest: str
    recipe: Recipe
    adapter_digest: str
    merge_base: Literal["dequantized", "original"] = "dequantized"


class PublishOrder(OrderEnvelope):
    """Copy one artifact to where the user wants it, with a manifest of digests and provenance."""

    stage: Literal[Stage.PUBLISH] = Stage.PUBLISH
    artifact: ArtifactName
    artifact_digest: str
    output_uri: str = Field(description="The artifact's own place: the spec's output.uri and the artifact's name.")
    output_secret: str | None = None
    overwrite: bool = False
    provenance: dict[str, Any] = Field(default_factory=dict, description="Goes into the artifact's manifest as it is.")


Order = InspectOrder | TrainOrder | MergeOrder | PublishOrder
_ORDER: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="stage")])


def parse_order(text: str) -> Order:
    """The order in `text`. Raises ValueError when it is not an order of this version."""
    try:
        version = json.loads(text).get("version")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"the order is not a JSON object: {error}") from error
    if version != VERSION:
        raise ValueError(
            f"the order has version {version!r}, this image reads {VERSION!r}: "
            "use operator and trainer images of one release"
        )
    try:
        return _ORDER.validate_json(text)
    except ValidationError as error:
        raise ValueError(f"the order does not fit version {VERSION}: {error}") from error


# --- reports ---


class TrainResult(Document):
    """What training reached. The adapter lies in `<work_dir>/adapter`."""

    adapter_digest: str
    adapter_bytes: int = Field(ge=0)
    steps: int = Field(ge=0)
    epochs: float = Field(ge=0)
    train_loss: float = Field(description="Mean over the last tenth of the steps.")
    eval_loss: float | None = None
    tokens: int = Field(ge=0, description="Tokens seen, padding not counted.")
    padding_percent: float = Field(default=0, ge=0, le=100, description="Share of padding in what the model was given.")
    tokens_per_second: float = Field(ge=0)
    mfu: float | None = Field(
        default=None,
        ge=0,
        description="Model FLOPs utilisation, mean of this attempt's steps; absent where the GPU's peak is not known.",
    )
    seconds: float = Field(ge=0, description="Spent in training steps, over all attempts.")
    device: str
    peak_memory_bytes: int = Field(
        ge=0, description="GPU memory reserved at the peak; on the CPU the process' peak resident size."
    )
    resumed_from_step: int | None = None
    scores: list[Score] = Field(default_factory=list)
    gates: list[Verdict] = Field(default_factory=list)
    selected_step: int | None = Field(
        default=None, ge=0, description="The step whose adapter is this one; absent where it is that of the last step."
    )
    stopped_early: bool = Field(default=False, description="Whether it ended before its last step, for want of gain.")


class MergeResult(Document):
    """The merged model lies in `<work_dir>/merged`."""

    digest: str
    bytes: int = Field(ge=0)
    shards: int = Field(ge=1)
    parity: float = Field(
        ge=0,
        description="Largest difference of a written weight from base + ΔW in fp32, relative to its tensor's largest.",
    )


class PublishResult(Document):
    """Where the artifact is now."""

    uri: str
    digest: str = Field(description="Of the manifest, which lists every file's digest.")
    bytes: int = Field(ge=0)
    files: int = Field(ge=1)


Result = Inspection | TrainResult | MergeResult | PublishResult
RESULT_OF: dict[Stage, type[Inspection] | type[TrainResult] | type[MergeResult] | type[PublishResult]] = {
    Stage.INSPECT: Inspection,
    Stage.TRAIN: TrainResult,
    Stage.MERGE: MergeResult,
    Stage.PUBLISH: PublishResult,
}


class Report(Document):
    """How one attempt of a stage ended: with a result, or with a failure that a user can read; with both at a gate."""

    version: Literal["v1alpha1"] = VERSION
    stage: Stage
    attempt: int = Field(ge=1)
    job_uid: str
    result: dict[str, Any] | None = None
    failure: str | None = Field(default=None, description="What was wrong, where, and what to do.")

    def fitted(self) -> str:
        """The JSON to write as termination message: a failure too long for `REPORT_MAX_BYTES` is cut.

        Raises ValueError when a result does not fit; a result is never cut.
        """
        text = self.to_json()
        excess = len(text.encode()) - REPORT_MAX_BYTES
        if excess <= 0:
            return text
        if self.failure is None:
            raise ValueError(f"a report of {len(text.encode())} bytes; termination messages hold {REPORT_MAX_BYTES}")
        cut = self.failure
        while cut and len(text.encode()) > REPORT_MAX_BYTES:
            cut = cut[: len(cut) * 9 // 10]
            text = self.model_copy(update={"failure": cut + " …"}).to_json()
        if len(text.encode()) > REPORT_MAX_BYTES:
            raise ValueError(f"a result that leaves no room; termination messages hold {REPORT_MAX_BYTES} bytes")
        return text


def succeeded(order: Order, result: Result) -> Report:
    """The report of a finished stage."""
    data = result.model_dump(mode="json", by_alias=True, exclude_none=True)
    return Report(stage=order.stage, attempt=order.attempt, job_uid=order.job_uid, result=data)


def failed(order: Order, failure: str, result: Result | None = None) -> Report:
    """The report of a stage that did not finish, or whose `result` did not pass."""
    data = result.model_dump(mode="json", by_alias=True, exclude_none=True) if result else None
    return Report(stage=order.stage, attempt=order.attempt, job_uid=order.job_uid, result=data, failure=failure)


def parse_report(text: str) -> Report:
    """The report in a termination message, with a result that fits its stage.

    Raises ValueError when there is none (a killed container writes nothing).
    """
    try:
        report = Report.model_validate_json(text)
        if report.result is not None:
            RESULT_OF[report.stage].model_validate(report.result)
        return report
    except ValidationError as error:
        raise ValueError(f"not a report: {error.errors()[0]['msg']}") from error


# --- progress: Kubeflow Trainer's wire format (proposal 2779), so that a foreign trainer image can speak it too ---


#: Where and how to post, as Kubeflow's environment says it: the address, a file with the CA, a file with the token.
PROGRESS_URL_ENV = "KUBEFLOW_TRAINER_SERVER_URL"
PROGRESS_CA_ENV = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
PROGRESS_TOKEN_ENV = "KUBEFLOW_TRAINER_SERVER_TOKEN"
PROGRESS_MOUNT = "/var/run/qlora-progress"
#: Audience of the token that a trainer pod is given; it is good for nothing else.
PROGRESS_AUDIENCE = "qlora-progress"
#: A report is small; the endpoint reads no further.
PROGRESS_MAX_BYTES = 16 * 1024
#: Port of a train pod that serves Prometheus metrics.
METRICS_PORT = 9400


class ProgressName(StrEnum):
    """The metrics of a progress document that the operator reads. Others are ignored; transformers' names where it has
    one, so that its own callback is understood."""

    STEP = "step"
    STEPS = "steps"
    EPOCH = "epoch"
    LOSS = "loss"
    EVAL_LOSS = "eval_loss"
    TOKENS_PER_SECOND = "tokens_per_second"
    MFU = "mfu"
    MEMORY_BYTES = "memory_bytes"  # reserved on the fullest GPU at the peak


class ProgressMetric(Document):
    """One named number."""

    name: str
    value: str


class TrainerStatus(Document):
    """How far a training is."""

    progress_percentage: int | None = Field(default=None, ge=0, le=100)
    estimated_remaining_seconds: int | None = Field(default=None, ge=0)
    metrics: list[ProgressMetric] = Field(default_factory=list)
    last_updated_time: str


class ProgressDocument(Document):
    """What a trainer posts while it trains."""

    trainer_status: TrainerStatus

    def numbers(self) -> dict[ProgressName, float]:
        """The metrics that the operator reads. Raises ValueError, naming it, for one that is no finite number."""
        known = {name.value: name for name in ProgressName}
        found: dict[ProgressName, float] = {}
        for metric in self.trainer_status.metrics:
            if (name := known.get(metric.name)) is None:
                continue
            try:
                found[name] = float(metric.value)
            except ValueError as error:
                raise ValueError(f"metric {name}: {metric.value!r} is not a number") from error
            if not math.isfinite(found[name]):
                raise ValueError(f"metric {name}: {metric.value} is not finite; leave it out")
        return found


# --- where claims and stores are ---


#: The name of a Kubernetes object.
CLAIM_NAME = r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?"


def claim_of(uri: str) -> tuple[str, str]:
    """`pvc://claim/path` as (claim, path); the path may be empty. Raises ValueError for anything else."""
    scheme, _, rest = uri.partition("://")
    claim, _, path = rest.partition("/")
    if scheme != "pvc" or not re.fullmatch(CLAIM_NAME, claim) or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{uri}: expected pvc://<claim>/<path>, the path without '..'")
    return claim, path.strip("/")


def mounted_path(uri: str, *, claims: str = CLAIMS_MOUNT) -> PurePosixPath:
    """Where a pod finds `pvc://claim/path`: `/claims/<claim>/<path>`. Raises ValueError as `claim_of`."""
    claim, path = claim_of(uri)
    return PurePosixPath(claims) / claim / path


def is_claim(uri: str) -> bool:
    """Whether `uri` lies on a claim, which pods mount, rather than in a store that they ask."""
    return uri.startswith("pvc://")


def bucket_of(uri: str) -> tuple[str, str]:
    """`s3://bucket/path` as (bucket, path). Raises ValueError for anything else."""
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")
    path = path.strip("/")
    if scheme != "s3" or not bucket or not path or {"", ".", ".."} & set(path.split("/")):
        raise ValueError(f"{uri}: expected s3://<bucket>/<path>, the path without '.' and '..'")
    return bucket, path


def is_hub(uri: str) -> bool:
    """Whether `uri` names a repository of Hugging Face's hub, or of a mirror of it."""
    return uri.startswith("hf://")


def hub_repo_of(uri: str, kind: Literal["model", "dataset"]) -> tuple[str, str]:
    """`hf://owner/name/path` as (owner/name, path); the path may be empty. Raises ValueError for anything else.

    The hub's own spelling with the kind before it, `hf://datasets/owner/name`, means the same.
    """
    part = r"[A-Za-z0-9_][\w.-]*"
    found = re.fullmatch(rf"hf://(?:{kind}s/(?=[^/]+/[^/]))?({part}/{part})(?:/(.*))?", uri.rstrip("/"), re.ASCII)
    path = (found[2] or "") if found else ""
    if found is None or (path and {"", ".", ".."} & set(path.split("/"))):
        raise ValueError(
            f"{uri}: expected hf://<owner>/<name>, or hf://<owner>/<name>/<path>, without '.' and '..'; a branch, tag "
            "or commit goes into revision"
        )
    return found[1], path
