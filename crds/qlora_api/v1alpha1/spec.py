"""What users write: `spec`."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from qlora_api.v1alpha1.fields import (
    AS_SET,
    ENDPOINT_PATTERN,
    GROUP,
    WORD_PATTERN,
    Accelerator,
    AdapterInit,
    Allocation,
    Annotation,
    Attention,
    BestMetric,
    ComputeDtype,
    DataFormat,
    Distinct,
    Duration,
    Flag,
    GateMetric,
    Integer,
    LabelValue,
    Loss,
    MergeBase,
    Method,
    Metric,
    Number,
    ObjectName,
    Offload,
    OnOutOfMemory,
    Optimizer,
    OutputFormat,
    Quantity,
    QuantType,
    Retain,
    Rule,
    Schedule,
    SpecPart,
    Uri,
    Word,
    at_most_one,
    exactly_one,
)


class SecretRef(SpecPart):
    """A Secret in the job's namespace."""

    name: ObjectName = Field(description="Name of the Secret.")


STORE_SECRET = (
    "Secret with what the store asks for. s3: accessKey and secretKey; where they differ from AWS and us-east-1, "
    "endpoint (https://host) and region; where needed, sessionToken and caBundle (PEM); absent, what the pod's "
    "environment gives. hf: token, and where needed caBundle; absent, what anybody may read. A claim needs none."
)


#: A field that would be ignored is refused.
NO_SECRET_FOR_A_CLAIM = Rule(
    "!has(self.credentialsSecretRef) || !self.uri.startsWith('pvc://')",
    lambda place: place.credentials_secret_ref is None or not str(place.uri).startswith("pvc://"),
    "a claim needs no credentialsSecretRef: remove it, or name a store in uri",
)
NO_REVISION_OF_PLAIN_FILES = Rule(
    "!has(self.revision) || self.uri.startsWith('hf://') || self.uri.startsWith('oci://')",
    lambda place: place.revision is None or str(place.uri).startswith(("hf://", "oci://")),
    "only hf:// and oci:// have revisions: remove revision, or name such a place in uri",
)


class ModelSource(SpecPart):
    """The base model."""

    rules = (NO_SECRET_FOR_A_CLAIM, NO_REVISION_OF_PLAIN_FILES)

    uri: Uri = Field(
        description="Where the model lies: hf://owner/name, s3://bucket/path, oci://registry/name or pvc://claim/path "
        "(a claim in the job's namespace). The directory holds config.json, safetensors and the tokenizer."
    )
    revision: Word | None = Field(default=None, description="Branch, tag or commit (hf://), or tag (oci://).")
    credentials_secret_ref: SecretRef | None = Field(default=None, description=STORE_SECRET)
    trust_remote_code: Flag = Field(
        default=False, description="Run Python code that comes with the model. Leave it off unless you have read it."
    )


class DataSource(SpecPart):
    """A file of examples (JSONL, JSON, Parquet or CSV), or a directory of such files."""

    rules = (NO_SECRET_FOR_A_CLAIM, NO_REVISION_OF_PLAIN_FILES)

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
    credentials_secret_ref: SecretRef | None = Field(default=None, description=STORE_SECRET)


class TrainSource(DataSource):
    """A file of training examples, or a directory of such files."""

    weight: Number | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="How often each example of this source occurs in an epoch: 2 is twice, 0.5 is one half of them, "
        "always the same, chosen by a hash of each example. Absent: once.",
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
        "Absent: assistant for messages and sharegpt, completion for prompt-completion and instruction, all for text.",
    )
    log_samples: Flag = Field(
        default=False,
        description="Print the first five tokenised examples to the pod's log. Shows data to log readers.",
    )

    @property
    def holds_out(self) -> bool:
        """Whether there are examples for the evaluation loss."""
        return self.eval is not None or self.eval_fraction is not None


class Quantization(SpecPart):
    """How the frozen base is held in memory under QLoRA."""

    type: QuantType = Field(
        default="nf4",
        description="4-bit type of the frozen weights. hqq (half-quadratic quantisation) needs a trainer image that "
        "has the package, GPUs do not share its weights, and it is for plain LoRA on models without experts.",
    )
    double_quant: Flag = Field(
        default=True,
        description="Quantise the scale factors too: 0.4 bit less per weight, at no measurable loss. Means nothing to "
        "hqq, which has a scale and a zero point in the compute type for every 64 weights.",
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
        description="Names of the linear layers that get an adapter, such as q_proj. Absent: all but the LM head; "
        "of a mixture of experts, those of the attention.",
    )
    rslora: Flag = Field(default=False, description="Rank-stabilised scale: alpha/√rank. For ranks of 64 and more.")
    dora: Flag = Field(
        default=False,
        description="Learn magnitude and direction apart (DoRA). Slower, closer to full; with dropout each layer is "
        "computed twice.",
    )
    init: AdapterInit = Field(
        default="default",
        description="How the adapter starts: default and gaussian (as no change at all, A from a uniform or a normal "
        "distribution) or loftq (making good what 4 bits round away). PiSSA and OLoRA would change the frozen base.",
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
    gradient_checkpointing: Flag | None = Field(
        default=None,
        description="Recompute activations in the backward pass: much less memory, half as much arithmetic again. "
        "Absent: where the GPU has no room to keep them, and on the CPU.",
    )
    attention: Attention | None = Field(
        default=None,
        description="Attention kernel. Absent: sdpa, or eager where the model caps scores. The others need a GPU, and "
        "a trainer image with their package (flash_attention_2, flash_attention_3) or a C compiler (flex_attention).",
    )
    offload: Offload | None = Field(
        default=None,
        description="What waits in host memory. Absent: nothing, and the activations after running out of GPU memory "
        "at micro-batch 1.",
    )
    max_grad_norm: Number = Field(default=1.0, gt=0, le=1000, description="Gradients are clipped to this norm.")
    evals_per_epoch: Integer = Field(
        default=4, ge=0, le=100, description="Evaluations of the held-out loss per epoch, where there is held-out data."
    )
    early_stopping_epochs: Integer = Field(
        default=2,
        ge=0,
        le=100,
        description="Stop after so many epochs without gain by bestMetric. 0: never; nor where nothing is held out.",
    )
    best_metric: BestMetric = Field(
        default="evalLoss",
        description="The adapter that is best by it at one of the evaluations leaves. evalLoss needs data held out "
        "(dataset.eval or evalFraction), without which the last adapter leaves; the others are those of a slice of "
        "evaluation.golden.",
    )


class Gate(SpecPart):
    """A condition on a score; nothing is published unless all hold."""

    rules = (exactly_one("min", "max", "max_drop_from_base"),)

    metric: GateMetric = Field(description="The score that is judged.")
    min: Number | None = Field(default=None, ge=-1e9, le=1e9, description="The tuned model's score is at least this.")
    max: Number | None = Field(default=None, ge=-1e9, le=1e9, description="The tuned model's score is at most this.")
    max_drop_from_base: Number | None = Field(
        default=None,
        ge=0,
        le=1e9,
        description="The tuned model's score is worse than the base's by at most this; of perplexity and evalLoss the "
        "higher is the worse.",
    )


class Judge(SpecPart):
    """A language model that scores answers, behind an OpenAI-compatible endpoint."""

    endpoint: str = Field(pattern=ENDPOINT_PATTERN, max_length=1024, description="Address, up to and including /v1.")
    model: Word = Field(description="Name of the model at that endpoint.")
    credentials_secret_ref: SecretRef | None = Field(
        default=None, description="Secret with the keys `token` and `caBundle`, both optional."
    )


def _gated(evaluation: "Evaluation") -> set[str]:
    return {gate.metric for gate in evaluation.gates or ()}


class Evaluation(SpecPart):
    """What the tuned model is measured on, beside its base, before anything is published."""

    rules = (
        Rule(
            "!has(self.gates) || has(self.canary) || self.gates.all(gate, !gate.metric.startsWith('canary.'))",
            lambda evaluation: (
                evaluation.canary is not None or not any(name.startswith("canary.") for name in _gated(evaluation))
            ),
            "a gate on canary. needs evaluation.canary",
        ),
        Rule(
            "!has(self.gates) || has(self.judge) || self.gates.all(gate, gate.metric != 'judge')",
            lambda evaluation: evaluation.judge is not None or "judge" not in _gated(evaluation),
            "a gate on judge needs evaluation.judge",
        ),
        Rule(
            # a default is judged as it is written, before the defaults within it are filled
            "has(self.answerSchema) || ((!has(self.metrics) || !self.metrics.exists(name, name == 'jsonSchema'))"
            " && (!has(self.gates) || self.gates.all(gate, gate.metric != 'jsonSchema')))",
            lambda evaluation: (
                evaluation.answer_schema is not None or "jsonSchema" not in {*evaluation.metrics, *_gated(evaluation)}
            ),
            "the metric jsonSchema needs evaluation.answerSchema",
        ),
        Rule(
            "!has(self.judge) || has(self.golden)",
            lambda evaluation: evaluation.judge is None or evaluation.golden is not None,
            "a judge needs evaluation.golden: it scores the answers to that",
        ),
    )

    golden: DataSource | None = Field(
        default=None, description="Examples with known answers. Base and tuned model are both scored on them."
    )
    canary: DataSource | None = Field(
        default=None, description="General examples that show what the model has forgotten."
    )
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1, max_length=8), Distinct] = Field(
        default=("exactMatch",),
        json_schema_extra=AS_SET,
        description="How the golden set is scored. exactMatch: share of answers that are equal, but for white space "
        "around them. tokenF1: overlap of their words. rougeL: longest common subsequence of their words. jsonSchema: "
        "share of answers that are JSON as answerSchema asks. perplexity: of the expected answers, the lower the "
        "better.",
    )
    answer_schema: str | None = Field(
        default=None,
        min_length=2,
        max_length=8192,
        description="JSON Schema, written as JSON, that answers are to satisfy; {} asks for JSON and no more.",
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

    rules = (NO_SECRET_FOR_A_CLAIM,)

    uri: Uri = Field(
        description="Where the artifacts go, each into a directory of its name: s3://bucket/path, oci://registry/name, "
        "hf://owner/name or pvc://claim/path (a claim in the job's namespace)."
    )
    credentials_secret_ref: SecretRef | None = Field(default=None, description=STORE_SECRET)
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
        "checkpoint; at micro-batch 1 what gradientCheckpointing and offload leave open) or fail.",
    )


class Budget(SpecPart):
    """What the job may use up before it is stopped, with a checkpoint."""

    max_gpu_hours: Number | None = Field(default=None, gt=0, le=10_000_000, description="GPUs × hours of training.")
    max_runtime: Duration | None = Field(
        default=None,
        description="Time that pods of the job run, such as 12h or 3d; waiting for a node does not count.",
    )


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
            "self.lora.init != 'loftq' || self.output.mergeBase == 'dequantized'",
            lambda spec: spec.lora.init != "loftq" or spec.output.merge_base == "dequantized",
            "lora.init loftq puts what quantisation takes away into the adapter: with output.mergeBase original it "
            "would be there twice",
        ),
        Rule(
            "!has(self.evaluation.gates) || has(self.evaluation.golden) || self.evaluation.gates.all(gate, "
            "gate.metric == 'evalLoss' || gate.metric.startsWith('canary.'))",
            lambda spec: (
                spec.evaluation.golden is not None
                or all(name == "evalLoss" or name.startswith("canary.") for name in _gated(spec.evaluation))
            ),
            "a gate on a score needs evaluation.golden",
        ),
        Rule(
            "!has(self.evaluation.gates) || has(self.dataset.eval) || has(self.dataset.evalFraction)"
            " || self.evaluation.gates.all(gate, gate.metric != 'evalLoss')",
            lambda spec: spec.dataset.holds_out or "evalLoss" not in _gated(spec.evaluation),
            "a gate on evalLoss needs dataset.eval or dataset.evalFraction",
        ),
        Rule(
            "self.training.bestMetric == 'evalLoss' || has(self.evaluation.golden)",
            lambda spec: spec.training.best_metric == "evalLoss" or spec.evaluation.golden is not None,
            "training.bestMetric: all but evalLoss need evaluation.golden",
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
        description="Delete pods, orders and the work volume (unless storage.retain is Keep) so long after the end. "
        "The job itself stays, and what is published. Absent: never. May be changed at any time.",
    )


#: Top-level fields that may change at any time, and those that may change while the job is suspended.
MUTABLE = frozenset({"suspend", "ttlSecondsAfterFinished"})
MUTABLE_WHILE_SUSPENDED = frozenset({"hardware", "queue", "budget", "retry", "podTemplate"})
