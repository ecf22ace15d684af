"""From a spec, what inspection found and the cluster's nodes to a plan. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_api.exchange import Inspection, ModelShape, Recipe
from qlora_api.peaks import peak_flops
from qlora_api.v1alpha1 import JobSpec, MemoryItem, MemoryPlan, Plan, Rejected
from qlora_operator.placement.choice import (
    Infeasible,
    Layout,
    Placed,
    choose,
    keeping_activations,
    micro_batches,
    with_headroom,
)
from qlora_operator.placement.flavours import Flavour
from qlora_operator.placement.inventory import Inventory
from qlora_operator.planner.demands import (
    Installation,
    able_to,
    contradiction,
    demands_of,
    in_the_card_s_type,
    is_bound,
    wishes,
)
from qlora_operator.planner.recipe import CPU, Unfit, by_gpus, open_recipes
from qlora_operator.sizing.host import disk, host_memory
from qlora_operator.sizing.memory import GIB, Item, training_memory

_CURE = "Add such a node, or suspend the job, change spec.hardware and resume (what else is said needs a new job)"
#: Share of the peak that QLoRA trainings reach. Published best are 43 % (Unsloth, 7B on an A100) and 63 to 66 %
#: (torchtune, 405B and 8B); not measured here.
USUAL_UTILISATION = 0.4


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
    found = open_recipes(spec, inspection, keep)
    if isinstance(found, Unfit):
        return found
    if refusal := contradiction(spec, installation):
        return refusal
    if inspection.eval_examples == 0 and any(gate.metric == "evalLoss" for gate in spec.evaluation.gates or ()):
        return Unfit(
            "NothingHeldOut",
            "spec.evaluation.gates: a gate is on evalLoss, and no example is held out: raise dataset.evalFraction, or "
            "name dataset.eval",
            final=True,
        )
    demands = demands_of(spec, installation)
    if spec.hardware.accelerator == CPU:
        return _plan_on_cpu(spec, inspection, found, inventory.largest_memory_bytes(demands))
    offers = inventory.offers(demands)
    bound = is_bound(spec, keep)
    able, refused = able_to(spec, offers.flavours, found, bound=bound)
    choice = choose(
        inspection.shape,
        by_gpus(found, spec, keep),
        able,
        (*offers.refused, *refused),
        wishes=wishes(spec, installation.prices),
    )
    if isinstance(choice, Infeasible):
        return Unfit("NoFlavourFits", f"no GPU can take this training: {choice.message}. {_CURE}")
    choice = in_the_card_s_type(choice, bound=bound)
    if _may_keep_activations(spec, keep):
        choice = keeping_activations(inspection.shape, choice, spec.hardware.headroom_percent)
    made = as_plan(spec, inspection, choice)
    if spec.hardware.accelerator == "amd" and not (installation.amd_image or spec.pod_template.image):
        where = f"{made.gpus} × {made.flavour}"
        return Unfit(
            "NoTrainerImage",
            f"it fits {where}, and this installation names no trainer image for AMD GPUs: set the chart's value "
            "trainer.amdImage, or spec.podTemplate.image",
        )
    return made


def _may_keep_activations(spec: JobSpec, keep: Recipe | None) -> bool:
    """Unless the spec has decided, or running out of memory has."""
    training = spec.training
    begun = keep is not None and keep.gradient_checkpointing
    return training.gradient_checkpointing is None and training.offload in (None, "none") and not begun


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
                return as_plan(spec, inspection, Placed(node, Layout(1, 0), recipe, size, memory))
    recipe = candidates[-1]
    smallest = training_memory(inspection.shape, recipe, micro_batch_size=micro_batches(recipe, wanted)[-1], gpu=False)
    need = with_headroom(smallest.total_bytes, headroom)
    return Unfit(
        "NoNodeFits",
        f"no node that the job may run on has the memory: {need / GIB:.1f} GiB needed, the largest has "
        f"{largest_bytes / GIB:.1f}. {_CURE}",
    )


def items_of(items: Sequence[Item]) -> tuple[MemoryItem, ...]:
    return tuple(MemoryItem(name=item.name, bytes=item.bytes) for item in items)


def _all_tokens(inspection: Inspection) -> int:
    """Of training and evaluation examples, taken to be equally long."""
    examples = inspection.examples + inspection.eval_examples
    return -(-inspection.tokens.total * examples // max(1, inspection.examples))


def as_plan(spec: JobSpec, inspection: Inspection, choice: Placed) -> Plan:
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
        tokens=_all_tokens(inspection),
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
            items=items_of(memory.items),
            total_bytes=memory.total_bytes,
            gpu_bytes=flavour.memory_bytes,
            headroom_percent=spec.hardware.headroom_percent,
            notes=memory.notes,
        ),
        host_memory_bytes=host.total_bytes,
        host_memory_items=items_of(host.items),
        disk_bytes=sum(item.bytes for item in room),
        disk_items=items_of(room),
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
