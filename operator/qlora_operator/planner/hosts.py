"""The nodes that can take a stage's pods, judged by their own memory instead of their GPUs'. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nlargest

from qlora_api.v1alpha1 import JobSpec, Plan
from qlora_operator.placement.choice import with_headroom
from qlora_operator.placement.flavours import MIB
from qlora_operator.placement.inventory import Inventory, PodsGpus
from qlora_operator.planner.demands import Installation, demands_of
from qlora_operator.planner.recipe import CPU
from qlora_operator.sizing.memory import GIB


@dataclass(frozen=True)
class Host:
    """A node, and the memory that it can allocate."""

    name: str
    memory_bytes: int


def needed_mib(plan: Plan) -> int:
    """What one GPU must have, headroom included."""
    return -(-with_headroom(plan.memory.total_bytes, plan.memory.headroom_percent) // MIB)


def largest_host(spec: JobSpec, plan: Plan | None, inventory: Inventory, installation: Installation) -> Host | None:
    """Of the nodes that can take a pod of the training `plan`, or without one a pod of another stage, that with the
    most memory; for a plan on n nodes the n-th, for each of them takes one. None where there are too few.

    A node counts that is not ready at the moment, or that Kubernetes itself has tainted: one that was just short of
    memory is.
    """
    gpus = None
    if plan is not None and plan.resource:
        gpus = PodsGpus(
            plan.resource, plan.gpus_per_node, tuple(plan.labels.items()), plan.memory_label, needed_mib(plan)
        )
    else:  # such pods do not tolerate what keeps nodes for GPUs
        spec = spec.model_copy(update={"hardware": spec.hardware.model_copy(update={"accelerator": CPU})})
    each = 1 if plan is None else plan.nodes
    open_ = inventory.open_to(demands_of(spec, installation), gpus, sooner_or_later=True)
    largest = nlargest(each, open_, key=lambda node: (node.memory_bytes, node.name))
    return Host(largest[-1].name, largest[-1].memory_bytes) if len(largest) == each else None


def too_large(asked_bytes: int, plan: Plan | None, host: Host | None) -> str:
    """Which nodes there are for a pod that asks for more memory than they have; empty where they have it."""
    if host is not None and asked_bytes <= host.memory_bytes:
        return ""
    asked = f"it asks for {asked_bytes / GIB:.1f} GiB of its node's memory"
    such = f" with {plan.gpus_per_node} × {plan.flavour}" if plan is not None and plan.gpus else ""
    if plan is not None and plan.nodes > 1:
        such += f", of which it takes {plan.nodes}"
    if host is None:
        return f"{asked}, and there is no node{such} that it may run on"
    has = f"{host.name}, has {host.memory_bytes / GIB:.1f}"
    return f"{asked}, and of the nodes{such} that it may run on the largest, {has}"
