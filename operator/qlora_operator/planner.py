"""From a spec, what inspection found and the cluster's nodes to a plan. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_api.exchange import Inspection, ModelShape, Recipe
from qlora_api.peaks import peak_flops
from qlora_api.v1alpha1 import JobSpec, Loss, MemoryItem, MemoryPlan, Method, Plan, Rejected
from qlora_operator.placement.choice import (
    SHARED_OPTIMIZER,
    Infeasible,
    Layout,
    Placed,
    Recipes,
    Wishes,
    alternatives,
    choose,
    micro_batches,
    with_headroom,
)
from qlora_operator.placement.flavours import Demands, Flavour, Refused
from qlora_operator.placement.inventory import Inventory
from qlora_operator.sizing.host import disk, host_memory
from qlora_operator.sizing.memory import GIB, Item, training_memory
from qlora_operator.sizing.training import adapted_by_default, attention_by_default

DEFAULT_EPOCHS = 3.0
CPU = "cpu"


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


@dataclass(frozen=True)
class Unfit:
    """No plan is possible. `final` where the spec itself is at fault, and no node could help."""

    reason: str
    message: str
    final: bool = False


def plan(
    spec: JobSpec,
    inspection: Inspection,
    inventory: Inventory,
    installation: Installation | None = None,
    *,
    keep: Recipe | None = None,
) -> Plan | Unfit:
    """How to run the job on the nodes of `inventory`.

    `keep` is the recipe of a training that has begun: its checkpoints are bound to it, so only the place may change.
    """
    installation = installation or Installation()
    found = _found(spec, inspection, keep)
    if isinstance(found, Unfit):
        return found
    if refusal := contradiction(spec, installation):
        return refusal
    demands = _demands(spec, installation)
    if spec.hardware.accelerator == CPU:
        return _plan_on_cpu(spec, inspection, found, inventory.largest_memory_bytes(demands))
    if spec.lora.init == "loftq" and (refusal := _loftq_too_large(inspection, inventory.largest_memory_bytes(demands))):
        return refusal
    offers = inventory.offers(demands)
    bound = _is_bound(spec, keep)
    able, refused = _able(spec, offers.flavours, found, bound=bound)
    choice = choose(
        inspection.shape,
        _for_gpus(found, spec, keep),
        able,
        (*offers.refused, *refused),
        wishes=wishes(spec, installation.prices),
    )
    if isinstance(choice, Infeasible):
        return Unfit("NoFlavourFits", f"no GPU can take this training: {choice.message}. {_CURE}")
    made = _as_plan(spec, inspection, _in_the_card_s_type(choice, bound=bound))
    if spec.hardware.accelerator == "amd" and not (installation.amd_image or spec.pod_template.image):
        where = f"{made.gpus} × {made.flavour}"
        return Unfit(
            "NoTrainerImage",
            f"it fits {where}, and this installation names no trainer image for AMD GPUs: set the chart's value "
            "trainer.amdImage, or spec.podTemplate.image",
        )
    return made


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
    if spec.offline and not installation.mirror and (hub := sorted(_on_the_hub(spec))):
        return Unfit(
            "NoMirror",
            f"spec.offline: {hub[0]} is to come from Hugging Face's hub, and this installation names no mirror of it: "
            "set HF_ENDPOINT in the chart's stageEnv, or give the place of a copy (pvc://, s3://)",
            final=True,
        )
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
    if effective % (gpus * size):
        return Unfit(
            "BatchNotDivisible",
            f"spec.training.effectiveBatchSize: {effective} sequences cannot be shared by {gpus} GPUs in "
            f"micro-batches of {size}; make it a multiple of {gpus * size}",
            final=True,
        )
    return None


def _on_the_hub(spec: JobSpec) -> set[str]:
    data = (*spec.dataset.train, spec.dataset.eval, spec.evaluation.golden, spec.evaluation.canary)
    places = (spec.model, *(source for source in data if source))
    return {place.uri for place in places if place.uri.startswith("hf://")}


def _loftq_too_large(inspection: Inspection, largest_bytes: int) -> Unfit | None:
    """LoftQ starts from the whole base in fp32, on the host (training.md, LoftQ)."""
    need = 4 * inspection.shape.parameters
    if need <= largest_bytes:
        return None
    return Unfit(
        "LoftqTooLarge",
        f"spec.lora.init: loftq needs the base in fp32, {need / GIB:.0f} GiB of host memory, and the largest node has "
        f"{largest_bytes / GIB:.0f}; leave init out",
    )


def sharded(found: Sequence[Recipe], optimizer: str | None) -> list[Recipe]:
    """The recipes for GPUs that share a model, with the `optimizer` that is set, if one is; none where it cannot."""
    if optimizer in ONE_GPU_OPTIMIZERS:
        return []
    return [recipe.model_copy(update={"optimizer": optimizer or SHARED_OPTIMIZER}) for recipe in found]


#: So many other products are named to a job that waits for its own.
ALTERNATIVES = 3


def advice(
    spec: JobSpec,
    inspection: Inspection,
    plan_: Plan,
    inventory: Inventory,
    installation: Installation,
    *,
    keep: Recipe | None = None,
) -> str:
    """What a user can do about a training that waits for the GPUs of `plan_`: how many there are, and which others
    would do if spec.hardware named them."""
    anything = spec.model_copy(update={"hardware": spec.hardware.model_copy(update={"gpu_products": None})})
    offers = inventory.offers(_demands(anything, installation))
    own = (flavour for flavour in offers.flavours if flavour.product == plan_.flavour)
    need = with_headroom(plan_.memory.total_bytes, plan_.memory.headroom_percent)
    enough = (f for f in own if f.gpus_per_node >= plan_.gpus_per_node and f.memory_bytes >= need)
    nodes = sum(flavour.nodes for flavour in enough)
    such = f"{plan_.gpus_per_node} × {plan_.flavour}"
    if 0 < nodes < plan_.nodes:
        there = f"the cluster has {nodes} of the {plan_.nodes} nodes with {such} or more"
    elif nodes:
        there = f"the cluster has {nodes} node{'s' * (nodes > 1)} with {such} or more, none of them free for it"
    else:
        why = next((f": {refused.reason}" for refused in offers.refused if refused.product == plan_.flavour), "")
        there = f"the cluster has no node with {such} that it may use{why}"
    others = [flavour for flavour in offers.flavours if flavour.product != plan_.flavour]
    found = _found(spec, inspection, keep)
    possible = [] if isinstance(found, Unfit) else _alternatives(spec, inspection, found, others, installation, keep)
    if not possible:
        return f"{there}; no other GPU here can take the training, see status.plan.rejected"
    named = " or ".join(f"[{p.flavour.product}] ({p.recipe.method}, {p.layout})" for p in possible[:ALTERNATIVES])
    return f"{there}; not to wait: suspend the job, set spec.hardware.gpuProducts to {named}, and resume"


def _found(spec: JobSpec, inspection: Inspection, keep: Recipe | None) -> list[Recipe] | Unfit:
    """The recipes for one GPU: that of a training that has begun alone."""
    if keep:
        return [keep]
    return recipes(spec, inspection.shape, max_length=inspection.max_length, loss=inspection.loss)


def _for_gpus(found: Sequence[Recipe], spec: JobSpec, keep: Recipe | None) -> Recipes:
    """The recipes by the number of GPUs."""
    optimizer = spec.training.optimizer or (keep.optimizer if keep else None)
    return lambda gpus: found if gpus == 1 else sharded(found, optimizer)


def _alternatives(
    spec: JobSpec,
    inspection: Inspection,
    found: Sequence[Recipe],
    flavours: Sequence[Flavour],
    installation: Installation,
    keep: Recipe | None,
) -> list[Placed]:
    able, _ = _able(spec, flavours, found, bound=_is_bound(spec, keep))
    asked = wishes(spec, installation.prices)
    return alternatives(inspection.shape, _for_gpus(found, spec, keep), able, wishes=asked)


def _demands(spec: JobSpec, installation: Installation) -> Demands:
    given = [*installation.tolerations, *(t.to_api() for t in spec.pod_template.tolerations or ())]
    on_cpu = spec.hardware.accelerator == CPU
    return Demands(
        accelerator=spec.hardware.accelerator,
        products=tuple(spec.hardware.gpu_products or ()),
        node_selector=spec.pod_template.node_selector,
        tolerations=tuple(given) if on_cpu else (*GPU_TOLERATIONS, *given),
    )


def _is_bound(spec: JobSpec, keep: Recipe | None) -> bool:
    """Whether the compute type is not to be chosen: the user has, or a training has begun."""
    return keep is not None or spec.quantization.compute_dtype is not None


def _able(
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


def _in_the_card_s_type(choice: Placed, *, bound: bool) -> Placed:
    """float16 on cards that have no bfloat16; both take the same memory."""
    compute = choice.flavour.compute
    if bound or compute is None or compute >= BFLOAT16_SINCE or choice.recipe.compute_dtype != "bfloat16":
        return choice
    return replace(choice, recipe=choice.recipe.model_copy(update={"compute_dtype": "float16"}))


_CURE = "Add such a node, or suspend the job, change spec.hardware and resume (what else is said needs a new job)"

#: Nodes with GPUs are commonly tainted with the resource's name (as the ExtendedResourceToleration plugin expects).
GPU_TOLERATIONS: tuple[dict[str, Any], ...] = (
    {"key": "nvidia.com/gpu", "operator": "Exists"},
    {"key": "amd.com/gpu", "operator": "Exists"},
)
#: Share of the peak that QLoRA trainings reach. Published best are 43 % (Unsloth, 7B on an A100) and 63 to 66 %
#: (torchtune, 405B and 8B); not measured here.
USUAL_UTILISATION = 0.4
#: bitsandbytes' optimizers, which fail on weights that FSDP2 has sharded.
ONE_GPU_OPTIMIZERS = frozenset({"paged_adamw_8bit", "adamw_8bit"})
#: CUDA compute capability from which on a card has bfloat16: Ampere.
BFLOAT16_SINCE = (8, 0)


def recipes(spec: JobSpec, shape: ModelShape, *, max_length: int, loss: Loss) -> list[Recipe] | Unfit:
    """The recipes that the spec allows for a model, the preferred one first: LoRA where it fits, else QLoRA."""
    known = list(dict.fromkeys(m.name for m in shape.linear))
    targets = list(spec.lora.target_modules or adapted_by_default(shape))
    if unknown := sorted(set(targets) - set(known)):
        return Unfit(
            "UnknownTargetModules",
            f"spec.lora.targetModules: the model has no linear layer {', '.join(unknown)}; it has {', '.join(known)}",
            final=True,
        )
    if max_length > shape.max_position:
        return Unfit(
            "SequenceTooLong",
            f"spec.dataset.maxLength: {max_length} tokens, the model takes {shape.max_position}",
            final=True,
        )
    usual = attention_by_default(shape)
    attention = spec.training.attention or usual
    if attention == "sdpa" != usual:
        return Unfit(
            "AttentionCannotWork",
            f"spec.training.attention: sdpa cannot cap scores, as {shape.family} does: "
            f"leave the field out, or give {usual}",
            final=True,
        )
    methods: list[Method] = [spec.method] if spec.method else ["lora", "qlora"]
    on_cpu = spec.hardware.accelerator == CPU
    training = spec.training
    neither = training.epochs is None and training.max_steps is None
    return [
        Recipe(
            method=method,
            quant_type=spec.quantization.type,
            double_quant=spec.quantization.double_quant,
            # CPUs without AMX emulate bfloat16: fp32 is several times faster there and exact.
            compute_dtype=spec.quantization.compute_dtype or ("float32" if on_cpu else "bfloat16"),
            rank=spec.lora.rank,
            alpha=spec.lora.alpha or 2 * spec.lora.rank,
            dropout=spec.lora.dropout,
            target_modules=sorted(targets),
            rslora=spec.lora.rslora,
            max_length=max_length,
            packing=spec.dataset.packing,
            loss=loss,
            epochs=DEFAULT_EPOCHS if neither else training.epochs,
            max_steps=training.max_steps,
            learning_rate=training.learning_rate,
            min_learning_rate=training.min_learning_rate or 0.0,
            schedule=training.schedule,
            warmup_fraction=training.warmup_fraction,
            effective_batch_size=training.effective_batch_size,
            optimizer=training.optimizer or "paged_adamw_8bit",
            seed=training.seed,
            gradient_checkpointing=training.gradient_checkpointing,
            offload=training.offload,
            attention=attention,
            max_grad_norm=training.max_grad_norm,
            evals_per_epoch=training.evals_per_epoch,
        )
        for method in methods
    ]


def with_half_the_micro_batch(plan: Plan, inspection: Inspection) -> Plan:
    """The plan with the next smaller micro-batch that divides a GPU's share of the effective batch, which stays."""
    share = plan.recipe.effective_batch_size // max(1, plan.gpus)
    size = next(n for n in range(max(1, plan.micro_batch_size // 2), 0, -1) if share % n == 0)
    on_gpu = plan.flavour != CPU
    memory = training_memory(inspection.shape, plan.recipe, micro_batch_size=size, gpus=plan.sharing, gpu=on_gpu)
    smaller = plan.memory.model_copy(update={"items": _items(memory.items), "total_bytes": memory.total_bytes})
    return plan.model_copy(update={"micro_batch_size": size, "gradient_accumulation": share // size, "memory": smaller})


def _plan_on_cpu(
    spec: JobSpec, inspection: Inspection, candidates: Sequence[Recipe], largest_bytes: int
) -> Plan | Unfit:
    """The first recipe that fits the memory of the largest node."""
    headroom, wanted = spec.hardware.headroom_percent, spec.training.micro_batch_size
    for recipe in candidates:
        for size in micro_batches(recipe, wanted):
            memory = training_memory(inspection.shape, recipe, micro_batch_size=size, gpu=False)
            if with_headroom(memory.total_bytes, headroom) <= largest_bytes:
                node = Flavour(CPU, CPU, largest_bytes, 0, 1)
                return _as_plan(spec, inspection, Placed(node, Layout(1, 0), recipe, size, memory))
    recipe = candidates[-1]
    smallest = training_memory(inspection.shape, recipe, micro_batch_size=micro_batches(recipe, wanted)[-1], gpu=False)
    need = with_headroom(smallest.total_bytes, headroom)
    return Unfit(
        "NoNodeFits",
        f"no node that the job may run on has the memory: {need / GIB:.1f} GiB needed, the largest has "
        f"{largest_bytes / GIB:.1f}. {_CURE}",
    )


def _items(items: Sequence[Item]) -> tuple[MemoryItem, ...]:
    return tuple(MemoryItem(name=item.name, bytes=item.bytes) for item in items)


def _as_plan(spec: JobSpec, inspection: Inspection, choice: Placed) -> Plan:
    flavour, layout, recipe, memory = choice.flavour, choice.layout, choice.recipe, choice.memory
    steps = recipe.steps(inspection.sequences)
    seconds = estimated_seconds(inspection.shape, recipe, flavour.product, layout.gpus, steps)
    host = (
        memory
        if flavour.product == CPU
        else host_memory(
            inspection.shape,
            recipe,
            micro_batch_size=choice.micro_batch_size,
            gpus_per_node=layout.gpus_per_node,
            gpus=layout.gpus if choice.sharded else 1,
        )
    )
    room = disk(
        inspection.shape,
        recipe,
        download_bytes=inspection.download_bytes,
        checkpoints_kept=spec.checkpoint.keep,
        merged="merged" in spec.output.formats,
    )
    return Plan(
        recipe=recipe,
        accelerator=spec.hardware.accelerator,
        flavour=flavour.product,
        resource=None if flavour.product == CPU else flavour.resource,
        labels=dict(flavour.labels),
        memory_label=flavour.memory_label,
        gpus=layout.gpus,
        gpus_per_node=layout.gpus_per_node,
        nodes=layout.nodes,
        sharded=choice.sharded,
        micro_batch_size=choice.micro_batch_size,
        gradient_accumulation=recipe.effective_batch_size // (choice.micro_batch_size * max(1, layout.gpus)),
        steps=steps,
        estimated_seconds=seconds,
        estimated_gpu_hours=None if seconds is None else round(seconds * layout.gpus / 3600, 2),
        memory=MemoryPlan(
            items=_items(memory.items),
            total_bytes=memory.total_bytes,
            gpu_bytes=flavour.memory_bytes,
            headroom_percent=spec.hardware.headroom_percent,
            notes=memory.notes,
        ),
        host_memory_bytes=host.total_bytes,
        host_memory_items=_items(host.items),
        disk_bytes=sum(item.bytes for item in room),
        disk_items=_items(room),
        rejected=tuple(Rejected(flavour=r.product, reason=r.reason) for r in choice.rejected),
    )


def estimated_seconds(shape: ModelShape, recipe: Recipe, product: str, gpus: int, steps: int) -> int | None:
    """Seconds that `steps` take on `gpus` of `product`; None where the GPU's peak is not known.

    6 FLOPs per token and weight at work: forward, backward to the activations, and forward again where they are
    recomputed.
    """
    peak = peak_flops(product, recipe.compute_dtype)
    if not peak or not gpus:
        return None
    tokens = steps * recipe.effective_batch_size * recipe.max_length
    per_weight = 6 if recipe.gradient_checkpointing else 4
    return max(1, round(per_weight * shape.active_parameters * tokens / (peak * USUAL_UTILISATION * gpus)))
