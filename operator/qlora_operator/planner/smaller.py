"""What takes less of a GPU's memory than a plan that ran out of it, and learns the same. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qlora_api.exchange import Inspection, Recipe
from qlora_api.v1alpha1 import JobSpec, Plan
from qlora_operator.planner.placing import estimated_seconds, items_of
from qlora_operator.planner.recipe import CPU
from qlora_operator.sizing.host import host_memory
from qlora_operator.sizing.memory import training_memory


@dataclass(frozen=True)
class Smaller:
    """A plan that takes less, and what of it is new."""

    plan: Plan
    change: str


def with_less_memory(spec: JobSpec, plan: Plan, inspection: Inspection) -> Smaller | None:
    """The next plan down the `LADDER`; None at its end. The effective batch and what is learned stay."""
    for rung in LADDER:
        if step := rung(spec, plan):
            recipe, size = step
            smaller = resized(plan, inspection, recipe, size)
            return Smaller(smaller, difference(plan, smaller))
    return None


def resized(plan: Plan, inspection: Inspection, recipe: Recipe, micro_batch_size: int) -> Plan:
    """`plan` on the same GPUs by another recipe of the same effective batch, in micro-batches of another size."""
    shape, gpus, on_gpu = inspection.shape, plan.sharing, plan.flavour != CPU
    share = recipe.effective_batch_size // max(1, plan.gpus)
    memory = training_memory(shape, recipe, micro_batch_size=micro_batch_size, gpus=gpus, gpu=on_gpu)
    host = memory
    if on_gpu:
        per_node = plan.gpus_per_node
        host = host_memory(shape, recipe, micro_batch_size=micro_batch_size, gpus_per_node=per_node, gpus=gpus)
    taken = plan.memory.model_copy(update={"items": items_of(memory.items), "total_bytes": memory.total_bytes})
    seconds = None
    if plan.steps is not None:
        seconds = estimated_seconds(shape, recipe, plan.flavour, plan.gpus, plan.steps)
    return plan.model_copy(
        update={
            "recipe": recipe,
            "micro_batch_size": micro_batch_size,
            "gradient_accumulation": share // micro_batch_size,
            "memory": taken,
            "host_memory_bytes": host.total_bytes,
            "host_memory_items": items_of(host.items),
            "estimated_seconds": seconds,
            "estimated_gpu_hours": None if seconds is None else round(seconds * plan.gpus / 3600, 2),
        }
    )


def difference(old: Plan, new: Plan) -> str:
    """What of `new` is not as in `old`, for people."""
    said: list[str] = []
    if old.micro_batch_size != new.micro_batch_size:
        said.append(f"micro-batch {old.micro_batch_size} → {new.micro_batch_size}")
        said.append(f"accumulation {old.gradient_accumulation} → {new.gradient_accumulation}")
    if old.recipe.gradient_checkpointing != new.recipe.gradient_checkpointing:
        said.append("gradient checkpointing off → on")
    if old.recipe.offload != new.recipe.offload:
        said.append(f"offload {old.recipe.offload} → {new.recipe.offload}")
    return ", ".join(said)


#: The recipe and the micro-batch of a plan's next attempt, or None where a way is not open.
Rung = Callable[[JobSpec, Plan], tuple[Recipe, int] | None]


def _half_the_micro_batch(spec: JobSpec, plan: Plan) -> tuple[Recipe, int] | None:
    """The next smaller one that divides a GPU's share of the effective batch."""
    if plan.micro_batch_size == 1:
        return None
    share = plan.recipe.effective_batch_size // max(1, plan.gpus)
    size = next(n for n in range(plan.micro_batch_size // 2, 0, -1) if share % n == 0)
    return plan.recipe, size


def _recomputed_activations(spec: JobSpec, plan: Plan) -> tuple[Recipe, int] | None:
    """Where the plan has kept them because there seemed to be room, and not the spec. It gives back the most."""
    if plan.recipe.gradient_checkpointing or spec.training.gradient_checkpointing is not None:
        return None
    return plan.recipe.model_copy(update={"gradient_checkpointing": True}), plan.micro_batch_size


def _offloaded_activations(spec: JobSpec, plan: Plan) -> tuple[Recipe, int] | None:
    """The checkpoints of recomputed activations, to the host; a training on the CPU has them there."""
    recipe = plan.recipe
    if not plan.gpus or not recipe.gradient_checkpointing or recipe.offload != "none":
        return None
    if spec.training.offload is not None:
        return None
    return recipe.model_copy(update={"offload": "activations"}), plan.micro_batch_size


LADDER: tuple[Rung, ...] = (_recomputed_activations, _half_the_micro_batch, _offloaded_activations)
