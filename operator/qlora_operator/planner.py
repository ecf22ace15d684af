"""From a spec, what inspection found and the cluster's nodes to a plan. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_api.exchange import Inspection, ModelShape, Recipe
from qlora_api.v1alpha1 import JobSpec, Loss, MemoryItem, MemoryPlan, Method, Plan, Rejected, quantity_bytes
from qlora_operator.placement.choice import Infeasible, choose, largest_fitting, micro_batches, with_headroom
from qlora_operator.placement.flavours import Demands, Refused, closed, flavours
from qlora_operator.sizing.host import disk, host_memory
from qlora_operator.sizing.memory import GIB, Memory, training_memory

DEFAULT_EPOCHS = 3.0
CPU = "cpu"


@dataclass(frozen=True)
class Unfit:
    """No plan is possible. `final` where the spec itself is at fault, and no node could help."""

    reason: str
    message: str
    final: bool = False


def plan(
    spec: JobSpec,
    inspection: Inspection,
    nodes: Sequence[Mapping[str, Any]],
    *,
    tolerations: Sequence[Mapping[str, Any]] = (),
    keep: Recipe | None = None,
) -> Plan | Unfit:
    """How to run the job on `nodes` (raw Node objects).

    `tolerations` are the installation's, besides the job's own. `keep` is the recipe of a training that has begun: its
    checkpoints are bound to it, so only the place may change.
    """
    candidates = (
        [keep] if keep else recipes(spec, inspection.shape, max_length=inspection.max_length, loss=inspection.loss)
    )
    if isinstance(candidates, Unfit):
        return candidates
    on_cpu = spec.hardware.accelerator == CPU
    given = [*tolerations, *(t.to_api() for t in spec.pod_template.tolerations or ())]
    demands = Demands(
        products=tuple(spec.hardware.gpu_products or ()),
        node_selector=spec.pod_template.node_selector,
        tolerations=tuple(given) if on_cpu else (GPU_TOLERATION, *given),
    )
    if on_cpu:
        return _plan_on_cpu(spec, inspection, candidates, [node for node in nodes if not closed(node, demands)])
    found, refused = flavours(nodes, demands)
    choice = choose(
        inspection.shape,
        candidates,
        found,
        refused,
        micro_batch_size=spec.training.micro_batch_size,
        headroom_percent=spec.hardware.headroom_percent,
    )
    if isinstance(choice, Infeasible):
        return Unfit("NoFlavourFits", f"no GPU can take this training: {choice.message}. {_CURE}")
    return _as_plan(
        spec,
        inspection,
        choice.recipe,
        choice.memory,
        flavour=choice.flavour.product,
        capacity=choice.flavour.memory_bytes,
        micro_batch_size=choice.micro_batch_size,
        rejected=choice.rejected,
    )


_CURE = "Add such a node, or suspend the job, change spec.hardware and resume"

#: Nodes with GPUs are commonly tainted with the resource's name (as the ExtendedResourceToleration plugin expects).
GPU_TOLERATION: dict[str, Any] = {"key": "nvidia.com/gpu", "operator": "Exists"}


def recipes(spec: JobSpec, shape: ModelShape, *, max_length: int, loss: Loss) -> list[Recipe] | Unfit:
    """The recipes that the spec allows for a model, the preferred one first: LoRA where it fits, else QLoRA."""
    known = [m.name for m in shape.linear]
    targets = list(spec.lora.target_modules or known)
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
            attention=training.attention or "sdpa",
            max_grad_norm=training.max_grad_norm,
            evals_per_epoch=training.evals_per_epoch,
        )
        for method in methods
    ]


def with_half_the_micro_batch(plan: Plan, inspection: Inspection) -> Plan:
    """The plan with the next smaller micro-batch that divides the effective batch, which stays."""
    effective = plan.recipe.effective_batch_size
    size = next(n for n in range(max(1, plan.micro_batch_size // 2), 0, -1) if effective % n == 0)
    memory = training_memory(inspection.shape, plan.recipe, micro_batch_size=size, gpu=plan.flavour != CPU)
    items = tuple(MemoryItem(name=item.name, bytes=item.bytes) for item in memory.items)
    smaller = plan.memory.model_copy(update={"items": items, "total_bytes": memory.total_bytes})
    return plan.model_copy(
        update={"micro_batch_size": size, "gradient_accumulation": effective // size, "memory": smaller}
    )


def _plan_on_cpu(
    spec: JobSpec, inspection: Inspection, candidates: Sequence[Recipe], nodes: Sequence[Mapping[str, Any]]
) -> Plan | Unfit:
    """The first recipe that fits the memory of the largest of `nodes`."""
    largest = max((_allocatable_memory(node) for node in nodes), default=0)
    for recipe in candidates:
        sizes = micro_batches(recipe, spec.training.micro_batch_size)
        headroom = spec.hardware.headroom_percent
        fit = largest_fitting(
            inspection.shape, recipe, sizes, device_bytes=largest, headroom_percent=headroom, gpu=False
        )
        if fit:
            size, memory = fit
            return _as_plan(
                spec, inspection, recipe, memory, flavour=CPU, capacity=largest, micro_batch_size=size, rejected=()
            )
    smallest = training_memory(
        inspection.shape,
        candidates[-1],
        micro_batch_size=micro_batches(candidates[-1], spec.training.micro_batch_size)[-1],
        gpu=False,
    )
    need = with_headroom(smallest.total_bytes, spec.hardware.headroom_percent)
    return Unfit(
        "NoNodeFits",
        f"no node that the job may run on has the memory: {need / GIB:.1f} GiB needed, the largest has "
        f"{largest / GIB:.1f}. {_CURE}",
    )


def _allocatable_memory(node: Mapping[str, Any]) -> int:
    text = node.get("status", {}).get("allocatable", {}).get("memory", "0")
    if text.endswith("m"):  # thousandths: seen where a kubelet's reservation is a percentage
        return int(text[:-1]) // 1000
    try:
        return int(float(text))
    except ValueError:
        return quantity_bytes(text)


def _as_plan(
    spec: JobSpec,
    inspection: Inspection,
    recipe: Recipe,
    memory: Memory,
    *,
    flavour: str,
    capacity: int,
    micro_batch_size: int,
    rejected: Sequence[Refused],
) -> Plan:
    on_cpu = flavour == CPU
    return Plan(
        recipe=recipe,
        accelerator=spec.hardware.accelerator,
        flavour=flavour,
        gpus=0 if on_cpu else 1,
        gpus_per_node=0 if on_cpu else 1,
        nodes=1,
        micro_batch_size=micro_batch_size,
        gradient_accumulation=recipe.effective_batch_size // micro_batch_size,
        steps=recipe.steps(inspection.sequences),
        memory=MemoryPlan(
            items=tuple(MemoryItem(name=item.name, bytes=item.bytes) for item in memory.items),
            total_bytes=memory.total_bytes,
            gpu_bytes=capacity,
            headroom_percent=spec.hardware.headroom_percent,
        ),
        host_memory_bytes=memory.total_bytes if on_cpu else host_memory_bytes(inspection, recipe, micro_batch_size),
        disk_bytes=disk_bytes(spec, inspection, recipe),
        rejected=tuple(Rejected(flavour=r.product, reason=r.reason) for r in rejected),
    )


def host_memory_bytes(inspection: Inspection, recipe: Recipe, micro_batch_size: int) -> int:
    """Host memory of a training on one GPU."""
    return host_memory(inspection.shape, recipe, micro_batch_size=micro_batch_size).total_bytes


def disk_bytes(spec: JobSpec, inspection: Inspection, recipe: Recipe) -> int:
    """The work volume."""
    items = disk(
        inspection.shape,
        recipe,
        download_bytes=inspection.download_bytes,
        checkpoints_kept=spec.checkpoint.keep,
        merged="merged" in spec.output.formats,
    )
    return sum(item.bytes for item in items)
