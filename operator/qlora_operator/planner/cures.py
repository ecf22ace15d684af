"""What a user can do about a training that waits for its GPUs, or that has run out of their memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_api.exchange import Inspection, Recipe
from qlora_api.v1alpha1 import JobSpec, Plan
from qlora_operator.placement.choice import Placed, alternatives, with_headroom
from qlora_operator.placement.flavours import Flavour
from qlora_operator.placement.inventory import Inventory
from qlora_operator.planner.demands import Installation, able_to, demands_of, is_bound, wishes
from qlora_operator.planner.recipe import Unfit, by_gpus, open_recipes

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
    offers = inventory.offers(demands_of(anything, installation))
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
    found = open_recipes(spec, inspection, keep)
    possible = [] if isinstance(found, Unfit) else _on_others(spec, inspection, found, others, installation, keep)
    if not possible:
        return f"{there}; no other GPU here can take the training, see status.plan.rejected"
    named = " or ".join(f"[{p.flavour.product}] ({p.recipe.method}, {p.layout})" for p in possible[:ALTERNATIVES])
    return f"{there}; not to wait: suspend the job, set spec.hardware.gpuProducts to {named}, and resume"


def _on_others(
    spec: JobSpec,
    inspection: Inspection,
    found: Sequence[Recipe],
    flavours: Sequence[Flavour],
    installation: Installation,
    keep: Recipe | None,
) -> list[Placed]:
    able, _ = able_to(spec, flavours, found, bound=is_bound(spec, keep))
    asked = wishes(spec, installation.prices)
    return alternatives(inspection.shape, by_gpus(found, spec, keep), able, wishes=asked)


def after_out_of_memory(
    spec: JobSpec, inspection: Inspection, plan: Plan, inventory: Inventory, installation: Installation
) -> str:
    """What another job would have to ask for, for a training that ran out of memory with the smallest plan it may have.

    The GPUs of the cluster that have more memory than those it ran on are named, if the training is planned to fit.
    """
    cures: list[str] = []
    if spec.retry.on_out_of_memory == "fail" and plan.micro_batch_size > 1:
        cures.append("retry.onOutOfMemory left out")
    if spec.training.gradient_checkpointing is False:
        cures.append("training.gradientCheckpointing left out")
    elif spec.training.offload == "none" and plan.gpus:  # what is kept whole cannot be offloaded
        cures.append("training.offload left out")
    if plan.recipe.method == "lora":
        cures.append("method: qlora")
    cures.append(f"dataset.maxLength below {plan.recipe.max_length}")
    if plan.gpus:
        cures += _more_of_gpus(spec, inspection, plan, inventory, installation)
    else:
        cures.append("nodes with more memory")
    return f"the micro-batch was {plan.micro_batch_size}; apply it anew with {' or '.join(cures)}"


def _more_of_gpus(
    spec: JobSpec, inspection: Inspection, plan: Plan, inventory: Inventory, installation: Installation
) -> list[str]:
    anything = spec.model_copy(update={"hardware": spec.hardware.model_copy(update={"gpu_products": None})})
    had = plan.memory.gpu_bytes or 0
    offers = inventory.offers(demands_of(anything, installation)).flavours
    larger = [flavour for flavour in offers if flavour.memory_bytes > had and flavour.product != plan.flavour]
    found = open_recipes(spec, inspection, None)
    if isinstance(found, Unfit) or not larger:
        return []
    possible = _on_others(spec, inspection, found, larger, installation, None)
    named = [f"hardware.gpuProducts [{p.flavour.product}] ({p.recipe.method}, {p.layout})" for p in possible]
    return named[:ALTERNATIVES]
