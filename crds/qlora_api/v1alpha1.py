"""The QLoRAJob resource, `qlora.dev/v1alpha1`: what users write (`spec`) and what the operator answers (`status`).

These models are the single source of the CRD (`schema.py`), of `docs/reference.md` (`reference.py`) and of what the
command line accepts. A field that is absent and has no default means "decided for you"; what was decided stands in
`status.plan.recipe`. A rule that spans several fields is written twice, side by side, as a `Rule`: in CEL for the
API server, in Python for the command line; a test holds both against the same table of bad specs.
"""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from qlora_api.exchange import Inspection, Recipe, Score

GROUP = "qlora.dev"
VERSION = "v1alpha1"
API_VERSION: Final = "qlora.dev/v1alpha1"
KIND: Final = "QLoRAJob"
PLURAL = "qlorajobs"
NAME_MAX = 40  # the children carry the name: `<job>-publish-<artifact>-<attempt>` stays within a label's 63 characters

#: Optional leading dot, then anything but a dot or slash: no empty, `.` or `..` component, without look-around.
URI_PATTERN = r"^((hf|s3|oci)://[^/.\s][^/\s]*|pvc://[a-z0-9]([-.a-z0-9]*[a-z0-9])?)(/\.?[^/.\s][^/\s]*)+$"
DURATION_PATTERN = r"^([1-9][0-9]{0,5}d)?([1-9][0-9]{0,5}h)?([1-9][0-9]{0,5}m)?([1-9][0-9]{0,5}s)?$"
QUANTITY_PATTERN = r"^[1-9][0-9]{0,14}(\.[0-9]{1,3})?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
OBJECT_NAME_PATTERN = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"
LABEL_VALUE_PATTERN = r"^([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?$"
WORD_PATTERN = r"^\S+$"
ENDPOINT_PATTERN = r"^https?://[^\s/]+(/\S*)?$"

#: What a value that fails its pattern should have looked like, for people.
LOOKS_LIKE = {
    URI_PATTERN: "hf://owner/name, s3://bucket/path, oci://registry/name or pvc://claim/path",
    DURATION_PATTERN: "a duration such as 15m, 1h30m or 7d",
    QUANTITY_PATTERN: "a quantity such as 200Gi",
    NAME_PATTERN: "a DNS label: a lower-case letter, then lower-case letters, digits and '-'",
    OBJECT_NAME_PATTERN: "the name of a Kubernetes object: lower-case letters, digits, '-' and '.'",
    LABEL_VALUE_PATTERN: "the value of a label: at most 63 letters, digits, '-', '_' and '.'",
    WORD_PATTERN: "text without spaces",
    ENDPOINT_PATTERN: "https://host/path",
}

SECONDS_PER_UNIT = {"d": 86400, "h": 3600, "m": 60, "s": 1}
BYTES_PER_UNIT = {"": 1} | {
    prefix + suffix: factor**power
    for suffix, factor, prefixes in (("", 1000, "kMGTP"), ("i", 1024, "KMGTP"))
    for power, prefix in enumerate(prefixes, start=1)
}


def duration_seconds(duration: str) -> int:
    """Seconds in a duration of the resource, such as `1h30m` (checked against its pattern before)."""
    return sum(int(n) * SECONDS_PER_UNIT[unit] for n, unit in re.findall(r"([0-9]+)([dhms])", duration))


def quantity_bytes(quantity: str) -> int:
    """Bytes in a quantity of the resource, such as `200Gi` (checked against its pattern before)."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity).groups()  # pyright: ignore[reportOptionalMemberAccess]
    whole, _, thousandths = number.partition(".")
    return (int(whole) * 1000 + int(thousandths.ljust(3, "0"))) * BYTES_PER_UNIT[unit] // 1000


def camel(name: str) -> str:
    """The name of a field in YAML: `max_gpus` is `maxGPUs`."""
    return to_camel(name).replace("Gpu", "GPU")


def _yaml_1_2_float(value: Any) -> Any:
    """PyYAML follows YAML 1.1 and reads `2e-4` as text; the API server reads a number."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value):
        return float(value)
    return value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := sorted({str(value) for value in values if values.count(value) > 1}):
        raise ValueError(f"{', '.join(repeated)}: listed twice")
    return values


def _whole_seconds(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(microsecond=0)


# The server takes no "16" for 16; neither may the command line.
Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict(), BeforeValidator(_yaml_1_2_float)]
Flag = Annotated[bool, Strict()]
Uri = Annotated[str, Field(pattern=URI_PATTERN, max_length=1024)]
Duration = Annotated[str, Field(pattern=DURATION_PATTERN, min_length=2, max_length=32)]
Quantity = Annotated[str, Field(pattern=QUANTITY_PATTERN, max_length=24)]
ObjectName = Annotated[str, Field(pattern=OBJECT_NAME_PATTERN, max_length=253)]
Word = Annotated[str, Field(pattern=WORD_PATTERN, max_length=253)]
LabelValue = Annotated[str, Field(pattern=LABEL_VALUE_PATTERN, max_length=63)]
Annotation = Annotated[str, Field(max_length=4096)]
Distinct = AfterValidator(_distinct)
AS_SET: JsonDict = {"x-kubernetes-list-type": "set"}

#: A moment in UTC, whole seconds, as Kubernetes writes it.
Timestamp = Annotated[
    datetime, AfterValidator(_whole_seconds), PlainSerializer(lambda moment: moment.strftime("%Y-%m-%dT%H:%M:%SZ"))
]

DataFormat = Literal["messages", "prompt-completion", "instruction", "sharegpt", "text"]
Loss = Literal["assistant", "completion", "all"]
Method = Literal["qlora", "lora"]
QuantType = Literal["nf4", "fp4"]
ComputeDtype = Literal["bfloat16", "float16", "float32"]
AdapterInit = Literal["default", "loftq"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["paged_adamw_8bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
Offload = Literal["none", "activations", "parameters"]
Metric = Literal["exactMatch", "tokenF1", "rougeL", "perplexity"]
GateMetric = Literal["exactMatch", "tokenF1", "rougeL", "perplexity", "evalLoss", "canary", "judge"]
BestMetric = Literal["evalLoss", "exactMatch", "tokenF1", "rougeL"]
Accelerator = Literal["nvidia", "amd", "cpu"]
Allocation = Literal["devicePlugin", "dra"]
Retain = Literal["Delete", "OnFailure", "Keep"]
OutputFormat = Literal[
    "adapter", "merged", "fp8", "awq", "gptq",
    "gguf:BF16", "gguf:F16", "gguf:Q8_0", "gguf:Q5_1", "gguf:Q5_0", "gguf:Q4_1", "gguf:Q4_0",
]  # fmt: skip
MergeBase = Literal["dequantized", "original"]
OnOutOfMemory = Literal["halveMicroBatch", "fail"]
ConditionStatus = Literal["True", "False", "Unknown"]


class Rule(NamedTuple):
    """One rule that spans fields: `cel` for the API server, `holds` for the command line, one `message` for both."""

    cel: str
    holds: Callable[[Any], bool]
    message: str


def at_most_one(*fields: str) -> Rule:
    """Of these optional fields (snake_case), at most one is set."""
    names = [camel(field) for field in fields]
    return Rule(
        cel=" + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names) + " <= 1",
        holds=lambda model: sum(getattr(model, field) is not None for field in fields) <= 1,
        message=f"{' and '.join(names)} exclude each other: set one of them or none",
    )


def exactly_one(*fields: str) -> Rule:
    """Of these optional fields (snake_case), exactly one is set."""
    names = [camel(field) for field in fields]
    return Rule(
        cel=" + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names) + " == 1",
        holds=lambda model: sum(getattr(model, field) is not None for field in fields) == 1,
        message=f"set exactly one of {', '.join(names)}",
    )


class Document(BaseModel):
    """A part of the resource: snake_case in Python, camelCase in YAML, never changed once read."""

    model_config = ConfigDict(alias_generator=camel, populate_by_name=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        """The API server prunes a null where none is allowed, then fills the default."""
        if isinstance(data, Mapping):
            return {key: value for key, value in data.items() if value is not None}
        return data

    def to_api(self) -> dict[str, Any]:
        """As the API server holds it: camelCase, defaults filled, absent where nothing is set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class SpecPart(Document):
    """A part of what users write: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _obey_rules(self) -> Self:
        if broken := [rule.message for rule in self.rules if not rule.holds(self)]:
            raise ValueError("; ".join(broken))
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        if cls.rules:
            handler.resolve_ref_schema(schema)["x-kubernetes-validations"] = [
                {"rule": rule.cel, "message": rule.message} for rule in cls.rules
            ]
        return schema


class SecretRef(SpecPart):
    """A Secret in the job's namespace."""

    name: ObjectName = Field(description="Name of the Secret.")


class ModelSource(SpecPart):
    """The base model."""

    uri: Uri = Field(
        description="Where the model lies: hf://owner/name, s3://bucket/path, oci://registry/name or pvc://claim/path "
        "(a claim in the job's namespace). The directory holds config.json, safetensors and the tokenizer."
    )
    revision: Word | None = Field(default=None, description="Branch, tag or commit (hf://), or tag (oci://).")
    credentials_secret_ref: SecretRef | None = Field(
        default=None, description="Secret with what the store asks for: a token, or an endpoint, region and keys."
    )
    trust_remote_code: Flag = Field(
        default=False, description="Run Python code that comes with the model. Leave it off unless you have read it."
    )


class DataSource(SpecPart):
    """A file of examples, or a directory of such files."""

    uri: Uri = Field(
        description="Where the data lies: hf://owner/name, s3://bucket/path, oci://registry/name or pvc://claim/path "
        "(a claim in the job's namespace)."
    )
    revision: Word | None = Field(default=None, description="Branch, tag or commit (hf://), or tag (oci://).")
    format: DataFormat | None = Field(
        default=None,
        description="Shape of an example: messages (a chat), prompt-completion, instruction (instruction, input, "
        "output), sharegpt or text. Absent: detected from the first examples.",
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None, description="Secret with what the store asks for: a token, or an endpoint, region and keys."
    )


class TrainSource(DataSource):
    """A file of training examples, or a directory of such files."""

    weight: Number | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="How often this source is seen, relative to the others. Absent: each example once per epoch.",
    )


class Dataset(SpecPart):
    """What is learned, and what it is checked on while it is learned."""

    rules = (at_most_one("eval", "eval_fraction"),)

    train: tuple[TrainSource, ...] = Field(
        min_length=1, max_length=32, description="The training data: one source or several, which are mixed."
    )
    eval: DataSource | None = Field(
        default=None,
        description="Held-out examples for the evaluation loss. Excludes evalFraction; with neither there is none.",
    )
    eval_fraction: Number | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the training data to hold out instead, chosen by a hash of each example before any "
        "processing, so that the split never moves.",
    )
    max_length: Integer | None = Field(
        default=None,
        ge=16,
        le=1048576,
        description="Tokens per sequence; longer examples are truncated. Absent: covers 99.5 % of the examples, "
        "rounded up to 64, at most what the model can do.",
    )
    packing: Flag = Field(
        default=True, description="Put several short examples into one sequence; they do not see each other."
    )
    loss: Loss | None = Field(
        default=None,
        description="Which tokens are learned: assistant (the assistant's turns), completion, or all. "
        "Absent: assistant for messages, completion for prompt-completion and instruction, all for text.",
    )
    log_samples: Flag = Field(
        default=False,
        description="Print the first five tokenised examples to the pod's log. Shows data to log readers.",
    )


class Quantization(SpecPart):
    """How the frozen base is held in memory under QLoRA."""

    type: QuantType = Field(default="nf4", description="4-bit type of the frozen weights.")
    double_quant: Flag = Field(
        default=True, description="Quantise the scale factors too: 0.4 bit less per weight, at no measurable loss."
    )
    compute_dtype: ComputeDtype | None = Field(
        default=None,
        description="Type that the weights are dequantised to for the matrix products. Absent: bfloat16, and float32 "
        "on the CPU.",
    )


class Lora(SpecPart):
    """The adapter."""

    rank: Integer = Field(default=16, ge=1, le=512, description="Rank of the adapter's matrices.")
    alpha: Integer | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Scale of the adapter; its product is scaled by alpha/rank. Absent: 2·rank.",
    )
    dropout: Number = Field(default=0.05, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    target_modules: Annotated[tuple[Word, ...], Field(min_length=1, max_length=64), Distinct] | None = Field(
        default=None,
        json_schema_extra=AS_SET,
        description="Names of the linear layers that get an adapter, such as q_proj. Absent: all but the LM head.",
    )
    rslora: Flag = Field(default=False, description="Rank-stabilised scale: alpha/√rank. For ranks of 64 and more.")
    dora: Flag = Field(default=False, description="Learn magnitude and direction apart (DoRA). Slower, closer to full.")
    init: AdapterInit = Field(
        default="default",
        description="How the adapter starts: default (as no change at all) or loftq (making good the rounding of NF4).",
    )


class Training(SpecPart):
    """The optimisation."""

    rules = (
        at_most_one("epochs", "max_steps"),
        Rule(
            "!has(self.minLearningRate) || self.minLearningRate <= self.learningRate",
            lambda training: training.min_learning_rate is None or training.min_learning_rate <= training.learning_rate,
            "minLearningRate must not exceed learningRate",
        ),
        Rule(
            "!has(self.microBatchSize) || self.effectiveBatchSize % self.microBatchSize == 0",
            lambda training: (
                training.micro_batch_size is None or training.effective_batch_size % training.micro_batch_size == 0
            ),
            "effectiveBatchSize must be a multiple of microBatchSize",
        ),
    )

    epochs: Number | None = Field(
        default=None, gt=0, le=1000, description="Passes over the data. Excludes maxSteps; with neither it is 3."
    )
    max_steps: Integer | None = Field(
        default=None, ge=1, le=10_000_000, description="Optimizer steps, instead of epochs."
    )
    learning_rate: Number = Field(
        default=2e-4, gt=0, le=1, description="Highest learning rate, reached after the warm-up."
    )
    min_learning_rate: Number | None = Field(
        default=None, ge=0, le=1, description="Learning rate at the end of the schedule. Absent: 0."
    )
    schedule: Schedule = Field(default="cosine", description="How the learning rate falls after the warm-up.")
    warmup_fraction: Number = Field(
        default=0.03, ge=0, lt=1, description="Share of all steps over which the learning rate rises from 0."
    )
    effective_batch_size: Integer = Field(
        default=32,
        ge=1,
        le=65536,
        description="Sequences (after packing) per optimizer step, over all GPUs. Kept whatever else has to change.",
    )
    micro_batch_size: Integer | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Sequences per GPU at a time. Absent: as many as fit; the rest is gradient accumulation.",
    )
    optimizer: Optimizer | None = Field(
        default=None, description="Absent: paged_adamw_8bit, and adamw_torch_fused where the model is sharded."
    )
    seed: Integer = Field(
        default=42,
        ge=0,
        le=2**32 - 1,
        description="Seed of the order of examples, the dropout and the adapter's start.",
    )
    gradient_checkpointing: Flag = Field(
        default=True, description="Recompute activations in the backward pass: a fifth slower, much less memory."
    )
    attention: Attention | None = Field(default=None, description="Attention kernel. Absent: sdpa.")
    offload: Offload = Field(default="none", description="What is moved to host memory when GPU memory is short.")
    max_grad_norm: Number = Field(default=1.0, gt=0, le=1000, description="Gradients are clipped to this norm.")
    evals_per_epoch: Integer = Field(
        default=4, ge=0, le=100, description="Evaluations of the held-out loss per epoch, where there is held-out data."
    )
    early_stopping_epochs: Integer | None = Field(
        default=None, ge=1, le=100, description="Stop after so many epochs without gain. Absent: never."
    )
    best_metric: BestMetric | None = Field(
        default=None, description="The checkpoint that is best by this metric is published. Absent: the last one is."
    )


class Gate(SpecPart):
    """A condition on a score; nothing is published unless all hold."""

    rules = (exactly_one("min", "max", "max_drop_from_base"),)

    metric: GateMetric = Field(description="The score that is judged.")
    min: Number | None = Field(default=None, ge=-1e9, le=1e9, description="The tuned model's score is at least this.")
    max: Number | None = Field(default=None, ge=-1e9, le=1e9, description="The tuned model's score is at most this.")
    max_drop_from_base: Number | None = Field(
        default=None, ge=0, le=1e9, description="The tuned model's score is below the base's by at most this."
    )


class Judge(SpecPart):
    """A language model that scores answers, behind an OpenAI-compatible endpoint."""

    endpoint: str = Field(pattern=ENDPOINT_PATTERN, max_length=1024, description="Address, up to and including /v1.")
    model: Word = Field(description="Name of the model at that endpoint.")
    credentials_secret_ref: SecretRef | None = Field(default=None, description="Secret with the key `token`.")


class Evaluation(SpecPart):
    """What the tuned model is measured on, beside its base, before anything is published."""

    golden: DataSource | None = Field(
        default=None, description="Examples with known answers. Base and tuned model are both scored on them."
    )
    canary: DataSource | None = Field(
        default=None, description="General examples that show what the model has forgotten."
    )
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1, max_length=8), Distinct] = Field(
        default=("exactMatch",),
        json_schema_extra=AS_SET,
        description="How answers to the golden set are scored. exactMatch: share of answers that are equal, but for "
        "white space around them.",
    )
    gates: tuple[Gate, ...] | None = Field(
        default=None, max_length=16, description="Conditions on the scores, without which nothing is published."
    )
    judge: Judge | None = Field(default=None, description="A language model that scores answers.")


class Hardware(SpecPart):
    """What the training may run on. The operator picks the smallest choice that fits."""

    rules = (
        Rule(
            "!has(self.gpus) || self.gpus <= self.maxGPUs",
            lambda hardware: hardware.gpus is None or hardware.gpus <= hardware.max_gpus,
            "gpus must not exceed maxGPUs",
        ),
        Rule(
            "!has(self.gpus) || !has(self.nodes) || self.gpus % self.nodes == 0",
            lambda hardware: hardware.gpus is None or hardware.nodes is None or hardware.gpus % hardware.nodes == 0,
            "gpus must be a multiple of nodes",
        ),
        Rule(
            "self.accelerator != 'cpu' || (!has(self.gpus) && !has(self.gpuProducts))",
            lambda hardware: hardware.accelerator != "cpu" or (hardware.gpus is None and hardware.gpu_products is None),
            "with accelerator cpu, leave out gpus and gpuProducts",
        ),
    )

    accelerator: Accelerator = Field(
        default="nvidia",
        description="Whose GPUs to use. cpu trains without one: for tests and very small models.",
    )
    gpu_products: Annotated[tuple[LabelValue, ...], Field(min_length=1, max_length=32), Distinct] | None = Field(
        default=None,
        json_schema_extra=AS_SET,
        description="Products to choose from, as in the node label nvidia.com/gpu.product. Absent: any that fits.",
    )
    gpus: Integer | None = Field(default=None, ge=1, le=1024, description="GPUs in all. Absent: as few as fit.")
    max_gpus: Integer = Field(default=8, ge=1, le=1024, description="The most GPUs that the operator may choose.")
    nodes: Integer | None = Field(
        default=None, ge=1, le=128, description="Nodes to spread over. Absent: as few as fit."
    )
    headroom_percent: Integer = Field(
        default=15, ge=0, le=90, description="Memory kept free on each GPU, in percent of what is predicted."
    )
    allocation: Allocation = Field(
        default="devicePlugin",
        description="How GPUs are asked for: devicePlugin (resource limits) or dra (Dynamic Resource Allocation).",
    )


class LocalObject(SpecPart):
    """An object in the job's namespace."""

    name: ObjectName = Field(description="Name of the object.")


class Toleration(SpecPart):
    """As in a pod."""

    key: Word | None = Field(default=None, description="Key of the taint. Absent, with operator Exists: every taint.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="How the taint's value is compared.")
    value: LabelValue | None = Field(default=None, description="Value of the taint, with operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Effect of the taint. Absent: any."
    )
    toleration_seconds: Integer | None = Field(
        default=None, ge=0, le=31_536_000, description="How long a NoExecute taint is tolerated. Absent: for ever."
    )

    rules = (
        Rule(
            "has(self.key) || self.operator == 'Exists'",
            lambda toleration: toleration.key is not None or toleration.operator == "Exists",
            "a toleration without a key needs operator Exists",
        ),
        Rule(
            "self.operator == 'Equal' || !has(self.value)",
            lambda toleration: toleration.operator == "Equal" or toleration.value is None,
            "a toleration with operator Exists has no value",
        ),
    )


def _ours(labels: Mapping[str, str] | None) -> bool:
    return any(key.startswith(f"{GROUP}/") for key in labels or ())


class PodTemplate(SpecPart):
    """What every pod of the job gets, beside what the operator puts there."""

    rules = (
        Rule(
            f"!has(self.labels) || self.labels.all(key, !key.startsWith('{GROUP}/'))",
            lambda template: not _ours(template.labels),
            f"labels under {GROUP}/ belong to the operator",
        ),
        Rule(
            f"!has(self.annotations) || self.annotations.all(key, !key.startsWith('{GROUP}/'))",
            lambda template: not _ours(template.annotations),
            f"annotations under {GROUP}/ belong to the operator",
        ),
    )

    labels: dict[str, LabelValue] | None = Field(default=None, max_length=64, description="Labels of the pods.")
    annotations: dict[str, Annotation] | None = Field(
        default=None, max_length=64, description="Annotations of the pods."
    )
    service_account_name: ObjectName | None = Field(
        default=None, description="ServiceAccount of the pods. Its token is not mounted. Absent: default."
    )
    image_pull_secrets: tuple[LocalObject, ...] | None = Field(
        default=None, max_length=16, description="Secrets to pull the image with."
    )
    runtime_class_name: ObjectName | None = Field(
        default=None, description="RuntimeClass of the pods that get a GPU, such as nvidia."
    )
    node_selector: dict[str, LabelValue] | None = Field(
        default=None, max_length=32, description="Labels that a node must have, beside those that the plan asks for."
    )
    tolerations: tuple[Toleration, ...] | None = Field(
        default=None, max_length=32, description="Taints that the pods tolerate, beside those of the accelerator."
    )
    priority_class_name: ObjectName | None = Field(default=None, description="PriorityClass of the pods.")
    image: str | None = Field(
        default=None,
        pattern=WORD_PATTERN,
        max_length=512,
        description="Image of the trainer, by tag or digest. Absent: the one that the operator was installed with.",
    )


class Queue(SpecPart):
    """Kueue."""

    name: ObjectName = Field(description="The LocalQueue that the training waits in.")
    priority_class: ObjectName | None = Field(default=None, description="WorkloadPriorityClass of the training.")


class Storage(SpecPart):
    """The work volume: checkpoints, the adapter and the merged model, until they are published."""

    rules = (
        at_most_one("claim_name", "class_name"),
        Rule(
            "!has(self.claimName) || !has(self.size)",
            lambda storage: storage.claim_name is None or storage.size is None,
            "claimName names an existing volume: leave out size",
        ),
    )

    claim_name: ObjectName | None = Field(
        default=None, description="An existing claim to work in. It is never deleted. Excludes className."
    )
    class_name: ObjectName | None = Field(
        default=None, description="StorageClass of a claim made for this job. Absent: the cluster's default class."
    )
    size: Quantity | None = Field(default=None, description="Size of the claim. Absent: computed with the plan.")
    retain: Retain = Field(
        default="OnFailure",
        description="When the job's own claim outlives it: Delete (never), OnFailure (until the job is deleted, if it "
        "failed), Keep (until the job is deleted).",
    )


class Checkpoint(SpecPart):
    """What a restart continues from."""

    every: Duration = Field(default="15m", description="Time between checkpoints, such as 15m or 1h30m.")
    keep: Integer = Field(default=2, ge=1, le=100, description="How many of the latest are kept.")


class Output(SpecPart):
    """What comes out, and where it goes."""

    uri: Uri = Field(
        description="Where the artifacts go, each into a directory of its name: s3://bucket/path, oci://registry/name, "
        "hf://owner/name or pvc://claim/path (a claim in the job's namespace)."
    )
    credentials_secret_ref: SecretRef | None = Field(
        default=None, description="Secret with what the store asks for: a token, or an endpoint, region and keys."
    )
    formats: Annotated[tuple[OutputFormat, ...], Field(min_length=1, max_length=12), Distinct] = Field(
        default=("adapter",),
        json_schema_extra=AS_SET,
        description="What is published: adapter (a PEFT directory), merged (a model with the adapter merged in), and "
        "quantised forms of the merged model.",
    )
    merge_base: MergeBase = Field(
        default="dequantized",
        description="What the adapter is merged into: dequantized (the base as it was trained on, rounded to 4 bits "
        "and back) or original (the base as it was downloaded).",
    )
    overwrite: Flag = Field(default=False, description="Replace what lies at the destination. Off: the job fails then.")
    signing_key_secret_ref: SecretRef | None = Field(
        default=None, description="Secret with a cosign key that the artifacts are signed with."
    )


class Retry(SpecPart):
    """What happens when a training ends before its time."""

    max_restarts: Integer = Field(
        default=3,
        ge=0,
        le=100,
        description="How often a stage that crashed is started again, from its last checkpoint. A pod lost to a "
        "disruption does not count, and bad input is never tried again.",
    )
    on_out_of_memory: OnOutOfMemory = Field(
        default="halveMicroBatch",
        description="When the GPU's memory is exhausted: halveMicroBatch (and double the accumulation, from the last "
        "checkpoint) or fail.",
    )


class Budget(SpecPart):
    """What the job may use up before it is stopped, with a checkpoint."""

    max_gpu_hours: Number | None = Field(default=None, gt=0, le=10_000_000, description="GPUs × hours of training.")
    max_runtime: Duration | None = Field(default=None, description="Time from the first pod on, such as 12h or 3d.")


class JobSpec(SpecPart):
    """What to fine-tune, on which data, and where the result goes; everything else has a default.

    Immutable, for a job is one run, and another run is another job. But suspend and ttlSecondsAfterFinished may change
    at any time, planOnly from true to false, and hardware, queue, budget, retry and podTemplate while suspend is true.
    """

    rules = (
        Rule(
            "self.lora.init != 'loftq' || !has(self.method) || self.method == 'qlora'",
            lambda spec: spec.lora.init != "loftq" or spec.method != "lora",
            "lora.init loftq makes good the rounding of a quantised base: use it with method qlora",
        ),
        Rule(
            "!has(self.evaluation.gates) || size(self.evaluation.gates) == 0 || has(self.evaluation.golden)"
            " || self.evaluation.gates.all(gate, gate.metric in ['evalLoss', 'canary'])",
            lambda spec: (
                spec.evaluation.golden is not None
                or all(gate.metric in ("evalLoss", "canary") for gate in spec.evaluation.gates or ())
            ),
            "a gate on a score needs evaluation.golden",
        ),
    )

    model: ModelSource = Field(description="The base model.")
    dataset: Dataset = Field(description="What is learned, and what it is checked on while it is learned.")
    method: Method | None = Field(
        default=None,
        description="qlora (the base in 4 bits) or lora (the base in 16). Absent: lora where it fits, else qlora.",
    )
    quantization: Quantization = Field(
        default=Quantization(), description="How the frozen base is held in memory under QLoRA."
    )
    lora: Lora = Field(default=Lora(), description="The adapter.")
    training: Training = Field(default=Training(), description="The optimisation.")
    evaluation: Evaluation = Field(
        default=Evaluation(), description="What the tuned model is measured on before anything is published."
    )
    hardware: Hardware = Field(
        default=Hardware(),
        description="What the training may run on; the operator picks the smallest choice that fits. May be changed "
        "while suspend is true.",
    )
    pod_template: PodTemplate = Field(
        default=PodTemplate(), description="What every pod of the job gets. May be changed while suspend is true."
    )
    queue: Queue | None = Field(
        default=None, description="The Kueue queue to wait in. May be changed while suspend is true."
    )
    storage: Storage = Field(default=Storage(), description="The work volume.")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="What a restart continues from.")
    output: Output = Field(description="What comes out, and where it goes.")
    retry: Retry = Field(
        default=Retry(),
        description="What happens when a training ends before its time. May be changed while suspend is true.",
    )
    budget: Budget | None = Field(
        default=None, description="What the job may use up. May be changed while suspend is true."
    )
    suspend: Flag = Field(
        default=False,
        description="Checkpoint and free the GPUs; false continues. From birth: inspect and plan, then wait. May be "
        "changed at any time.",
    )
    plan_only: Flag = Field(
        default=False,
        description="Inspect and plan, then rest. Set to false, once, it goes on with the plan that status.plan shows.",
    )
    offline: Flag = Field(
        default=False, description="Cut the pods off from all but DNS, the operator and the declared stores."
    )
    ttl_seconds_after_finished: Integer | None = Field(
        default=None,
        ge=0,
        le=31_536_000,
        description="Delete the pods and the work volume so long after the end. The job itself stays. Absent: never. "
        "May be changed at any time.",
    )


#: Top-level fields that may change at any time, and those that may change while the job is suspended.
MUTABLE = frozenset({"suspend", "ttlSecondsAfterFinished"})
MUTABLE_WHILE_SUSPENDED = frozenset({"hardware", "queue", "budget", "retry", "podTemplate"})


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
    """One use of a GPU's memory."""

    name: str = Field(description="What it is for.")
    bytes: int = Field(description="Predicted bytes on one GPU.")


class MemoryPlan(Document):
    """What is predicted to lie in one GPU's memory at the peak."""

    items: tuple[MemoryItem, ...] = Field(description="Use by use.")
    total_bytes: int = Field(description="Their sum.")
    gpu_bytes: int | None = Field(default=None, description="What one GPU of the chosen flavour has.")
    headroom_percent: int = Field(description="Memory kept free, in percent of the sum.")
    measured_bytes: int | None = Field(
        default=None, description="What the training took at its peak, beside what was predicted."
    )


class Rejected(Document):
    """A flavour that was not chosen."""

    flavour: str = Field(description="The flavour.")
    reason: str = Field(description="Why not.")


class Plan(Document):
    """How the training will run, and why there."""

    recipe: Recipe = Field(description="The training as decided.")
    accelerator: Accelerator = Field(description="nvidia, amd or cpu.")
    flavour: str = Field(description="Product of the chosen GPUs, as in the node label, or cpu.")
    gpus: int = Field(description="GPUs in all.")
    gpus_per_node: int = Field(description="GPUs in each node.")
    nodes: int = Field(description="Nodes.")
    micro_batch_size: int = Field(description="Sequences per GPU at a time.")
    gradient_accumulation: int = Field(description="Micro-batches per optimizer step on each GPU.")
    steps: int | None = Field(default=None, description="Optimizer steps, as far as known before packing.")
    memory: MemoryPlan = Field(description="One GPU's memory at the peak, item by item.")
    host_memory_bytes: int = Field(description="Memory that the training pod asks for.")
    disk_bytes: int = Field(description="Size of the work volume.")
    rejected: tuple[Rejected, ...] = Field(default=(), description="The flavours not chosen, and why.")
    planned_for: str | None = Field(
        default=None, description="Fingerprint of spec.hardware and spec.podTemplate that it was made for."
    )


class Progress(Document):
    """How far the training is. Rounded, and written rarely."""

    percent: int = Field(
        default=0, description="Share of the tasks (stages, one publication per artifact) that is done."
    )
    step: int | None = Field(default=None, description="Optimizer steps done.")
    steps: int | None = Field(default=None, description="Optimizer steps in all.")
    epoch: float | None = Field(default=None, description="Passes over the data done.")
    loss: float | None = Field(default=None, description="Training loss.")
    eval_loss: float | None = Field(default=None, description="Loss on the held-out data.")
    tokens_per_second: int | None = Field(default=None, description="Tokens per second, over all GPUs.")
    remaining: str | None = Field(default=None, description="Time left, such as 12m.")
    last_report_time: Timestamp | None = Field(default=None, description="When the trainer last reported.")


class Attempt(Document):
    """One run of one stage."""

    n: int = Field(description="Counts from 1 per stage (and artifact).")
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


class EvaluationResult(Document):
    """What the tuned model is worth, beside its base."""

    scores: tuple[Score, ...] = Field(
        default=(),
        description="Metric by metric.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["metric"]},
    )


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
    attempts: tuple[Attempt, ...] = Field(default=(), description="Every run of every stage, in order.")
    evaluation: EvaluationResult | None = Field(default=None, description="What the tuned model is worth.")
    artifacts: tuple[Artifact, ...] = Field(
        default=(),
        description="What came out, and where it lies.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )


class Metadata(Document):
    """Of an object's metadata, what this project reads."""

    name: str = Field(pattern=NAME_PATTERN, max_length=NAME_MAX, description="Name of the job.")
    namespace: str = "default"
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: Timestamp | None = None
    deletion_timestamp: Timestamp | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class QLoRAJob(Document):
    """One fine-tune: a base model and a data set in, a trained, merged and published model out."""

    model_config = ConfigDict(extra="forbid")

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRAJob"] = KIND
    metadata: Metadata
    spec: JobSpec
    status: JobStatus = Field(default=JobStatus(), description="Where the job stands.")

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """The job in a manifest or an API object; only the names that the API server takes are taken.

        Raises pydantic's ValidationError; `problems` says it in sentences.
        """
        return cls.model_validate(document, by_alias=True, by_name=False)


def problems(error: ValidationError) -> list[str]:
    """What is wrong with a document, one sentence per field: where, what, and what it should look like."""
    details = error.errors(include_url=False)
    # a list whose only item is bad counts as too short as well
    around = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
    return [_problem(detail) for detail in details if detail["type"] != "too_short" or detail["loc"] not in around]


def _problem(detail: Any) -> str:
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in detail["loc"]).lstrip(".")
    value = detail["input"]
    shown = f" (found {value!r})" if isinstance(value, str | int | float) and len(str(value)) <= 100 else ""
    match detail["type"]:
        case "missing":
            what = "required, and not there"
        case "extra_forbidden":
            what, shown = "no such field; check the spelling and the indentation", ""
        case "string_pattern_mismatch":
            pattern = detail["ctx"]["pattern"]
            what = f"must be {LOOKS_LIKE.get(pattern, f'text that matches {pattern}')}"
        case "literal_error":
            what = f"must be one of {detail['ctx']['expected']}"
        case "string_type":
            what = "must be text; put it in quotes" if isinstance(value, int | float) else "must be text"
        case "string_too_long":
            what = f"must have at most {detail['ctx']['max_length']} characters"
        case "tuple_type":
            what = "must be a list"
        case "too_short":
            what = f"must have at least {detail['ctx']['min_length']} items"
        case "too_long":
            what = f"must have at most {detail['ctx']['max_length']} items"
        case "value_error":
            what, shown = str(detail["ctx"]["error"]), ""
        case _:
            what = detail["msg"].replace("Input should", "must")
    return f"{where}: {what}{shown}"
