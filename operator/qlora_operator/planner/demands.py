"""What a job needs of nodes and cards, whatever the memory that its training takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from qlora_api.exchange import Recipe
from qlora_api.v1alpha1 import BackEnd, JobSpec
from qlora_operator.placement.choice import Placed, Wishes
from qlora_operator.placement.flavours import Demands, Flavour, Refused
from qlora_operator.planner.recipe import CPU, Unfit, asks_for_hqq

#: Nodes with GPUs are commonly tainted with the resource's name (as the ExtendedResourceToleration plugin expects).
GPU_TOLERATIONS: tuple[dict[str, Any], ...] = (
    {"key": "nvidia.com/gpu", "operator": "Exists"},
    {"key": "amd.com/gpu", "operator": "Exists"},
)
#: CUDA compute capability from which on a card has bfloat16: Ampere.
BFLOAT16_SINCE = (8, 0)


@dataclass(frozen=True)
class Installation:
    """What an installation decides of its jobs' plans."""

    tolerations: Sequence[Mapping[str, Any]] = ()
    #: Of one GPU for an hour, by product.
    prices: Mapping[str, float] = field(default_factory=dict)
    #: Whether it names a trainer image for AMD's GPUs.
    amd_image: bool = True
    #: Whether it names a mirror of Hugging Face's hub.
    mirror: bool = False
    #: What the stages that take no GPU ask for of a node's memory; 0: nothing.
    stage_memory_bytes: int = 0
    #: Optional packages that its trainer images were built with.
    back_ends: Set[BackEnd] = frozenset()


def wishes(spec: JobSpec, prices: Mapping[str, float] | None = None) -> Wishes:
    """What the spec fixes of the choice."""
    hardware = spec.hardware
    return Wishes(
        gpus=hardware.gpus,
        nodes=hardware.nodes,
        max_gpus=hardware.max_gpus,
        micro_batch_size=spec.training.micro_batch_size,
        headroom_percent=hardware.headroom_percent,
        prices=prices or {},
    )


def contradiction(spec: JobSpec, installation: Installation) -> Unfit | None:
    """The first pair of settings that no cluster can serve together."""
    training, hardware = spec.training, spec.hardware
    if spec.offline and (judge := spec.evaluation.judge) and not _in_cluster(judge.endpoint):
        return Unfit(
            "JudgeOutside",
            f"spec.evaluation.judge.endpoint: {judge.endpoint} is not a Service of this cluster "
            "(http://name.namespace.svc/v1), and spec.offline lets nothing out: name one that is, or leave judge out",
            final=True,
        )
    if spec.offline and not installation.mirror and (hub := sorted(_on_the_hub(spec))):
        return Unfit(
            "NoMirror",
            f"spec.offline: {hub[0]} is to come from Hugging Face's hub, and this installation names no mirror of it: "
            "set HF_ENDPOINT in the chart's stageEnv, or give the place of a copy (pvc://, s3://)",
            final=True,
        )
    if asks_for_hqq(spec) and (refusal := _without_hqq(spec, installation)):
        return refusal
    if hardware.accelerator == CPU:
        return None
    if hardware.allocation == "dra" and hardware.accelerator == "amd":
        return Unfit(
            "DraForNvidiaOnly",
            "spec.hardware.allocation: dra asks NVIDIA's driver for devices; with accelerator amd use devicePlugin",
            final=True,
        )
    gpus = max(hardware.gpus or 1, hardware.nodes or 1)
    effective, size = training.effective_batch_size, training.micro_batch_size or 1
    if training.offload == "activations" and training.gradient_checkpointing is False:
        return Unfit(
            "NothingToOffload",
            "spec.training.offload: activations moves what gradientCheckpointing keeps; leave gradientCheckpointing "
            "out, or offload",
            final=True,
        )
    if effective % (gpus * size):
        return Unfit(
            "BatchNotDivisible",
            f"spec.training.effectiveBatchSize: {effective} sequences cannot be shared by {gpus} GPUs in "
            f"micro-batches of {size}; make it a multiple of {gpus * size}",
            final=True,
        )
    return None


def _without_hqq(spec: JobSpec, installation: Installation) -> Unfit | None:
    """Why the base cannot be held by HQQ. What an image of the job's own has is not known here: its trainer says it."""
    if "hqq" not in installation.back_ends and not spec.pod_template.image:
        return Unfit(
            "NotInTheImage",
            "spec.quantization.type: hqq needs a trainer image that was built with it (--build-arg HQQ=hqq==…) and is "
            "said to be (the chart's value trainer.backEnds); use nf4, or name such an image in spec.podTemplate.image",
            final=True,
        )
    asks = {
        "lora.dora": spec.lora.dora,
        "lora.init: loftq": spec.lora.init == "loftq",
        "training.offload: parameters": spec.training.offload == "parameters",
    }
    if other := next((field for field, asked in asks.items() if asked), None):
        return Unfit(
            "NotWithHqq",
            f"spec.quantization.type: hqq does not go together with {other}; use nf4, or leave that out",
            final=True,
        )
    return None


def _in_cluster(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".svc", ".svc.cluster.local"))


def _on_the_hub(spec: JobSpec) -> set[str]:
    data = (*spec.dataset.train, spec.dataset.eval, spec.evaluation.golden, spec.evaluation.canary)
    places = (spec.model, *(source for source in data if source))
    return {place.uri for place in places if place.uri.startswith("hf://")}


def demands_of(spec: JobSpec, installation: Installation) -> Demands:
    given = [*installation.tolerations, *(t.to_api() for t in spec.pod_template.tolerations or ())]
    on_cpu = spec.hardware.accelerator == CPU
    return Demands(
        accelerator=spec.hardware.accelerator,
        products=tuple(spec.hardware.gpu_products or ()),
        node_selector=spec.pod_template.node_selector,
        tolerations=tuple(given) if on_cpu else (*GPU_TOLERATIONS, *given),
    )


def is_bound(spec: JobSpec, keep: Recipe | None) -> bool:
    """Whether the compute type is not to be chosen: the user has, or a training has begun."""
    return keep is not None or spec.quantization.compute_dtype is not None


def able_to(
    spec: JobSpec, flavours: Sequence[Flavour], found: Sequence[Recipe], *, bound: bool
) -> tuple[list[Flavour], list[Refused]]:
    """The flavours that the job's compute type (where it is `bound`) and allocation allow, and why not the others."""
    able, refused = _with_compute_type(flavours, found[0].compute_dtype if bound else None)
    if spec.hardware.allocation != "dra":
        return able, refused
    slices = {flavour.product for flavour in able if flavour.partition}
    why = "a slice cannot be claimed by DRA here; use hardware.allocation devicePlugin"
    return [f for f in able if not f.partition], [*refused, *(Refused(product, why) for product in sorted(slices))]


def _with_compute_type(flavours: Sequence[Flavour], bound: str | None) -> tuple[list[Flavour], list[Refused]]:
    """The flavours that compute in the type `bound`, and the others with the reason."""
    able = [f for f in flavours if bound != "bfloat16" or f.compute is None or f.compute >= BFLOAT16_SINCE]
    names = {flavour.product for flavour in able}
    lacking = {flavour.product: flavour for flavour in flavours if flavour.product not in names}
    return able, [
        Refused(
            product,
            f"has no bfloat16 (compute capability {'.'.join(map(str, flavour.compute or ()))}); leave out "
            "quantization.computeDtype, or set it to float16",
        )
        for product, flavour in lacking.items()
    ]


def in_the_card_s_type(choice: Placed, *, bound: bool) -> Placed:
    """float16 on cards that have no bfloat16; both take the same memory."""
    compute = choice.flavour.compute
    if bound or compute is None or compute >= BFLOAT16_SINCE or choice.recipe.compute_dtype != "bfloat16":
        return choice
    return replace(choice, recipe=choice.recipe.model_copy(update={"compute_dtype": "float16"}))
