"""What GPUs the cluster has: nodes with the same product, memory and resource are one flavour.

Labels are those of NVIDIA's GPU feature discovery (k8s-device-plugin, docs/gpu-feature-discovery).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MIB = 1024**2
RESOURCE = "nvidia.com/gpu"
PRODUCT = "nvidia.com/gpu.product"
MEMORY = "nvidia.com/gpu.memory"
SHARING = "nvidia.com/gpu.sharing-strategy"


@dataclass(frozen=True)
class Flavour:
    """GPUs that are alike."""

    product: str
    memory_bytes: int


@dataclass(frozen=True)
class Refused:
    """GPUs that a job cannot have, and why."""

    product: str
    reason: str


@dataclass(frozen=True)
class Demands:
    """What a job says about nodes: its own selector, tolerations and products."""

    products: tuple[str, ...] = ()
    node_selector: Mapping[str, str] | None = None
    tolerations: tuple[Mapping[str, Any], ...] = ()


def flavours(nodes: Iterable[Mapping[str, Any]], demands: Demands) -> tuple[list[Flavour], list[Refused]]:
    """The flavours that a job with `demands` may use among `nodes` (raw Node objects), and those it may not.

    A flavour is refused only if none of its nodes will do; the reason is then the one of its first node. Judged by
    what nodes can allocate, not by what is free: other tenants' pods are not ours to read, the scheduler queues.
    """
    usable: set[tuple[str, int]] = set()
    refused: dict[str, str] = {}
    for node in nodes:
        count = int(node.get("status", {}).get("allocatable", {}).get(RESOURCE, 0))
        labels = node["metadata"].get("labels", {})
        if not count and PRODUCT not in labels:
            continue
        product = labels.get(PRODUCT, "unlabelled GPU")
        if reason := _unfit(node, count, demands):
            refused.setdefault(product, reason)
        else:
            usable.add((product, int(labels[MEMORY])))
    found = [Flavour(product=product, memory_bytes=mib * MIB) for product, mib in sorted(usable)]
    names = {flavour.product for flavour in found}
    return found, [Refused(product, reason) for product, reason in sorted(refused.items()) if product not in names]


def _unfit(node: Mapping[str, Any], count: int, demands: Demands) -> str | None:
    """Why the job cannot use this node's GPUs, or None."""
    labels = node["metadata"].get("labels", {})
    name = node["metadata"]["name"]
    if PRODUCT not in labels:
        return f"node {name} has no label {PRODUCT}: run NVIDIA's GPU feature discovery"
    if demands.products and labels[PRODUCT] not in demands.products:
        return "not among spec.hardware.gpuProducts"
    if not labels.get(MEMORY, "").isdigit():
        return f"node {name} has no label {MEMORY} in MiB: its memory is unknown"
    if (sharing := labels.get(SHARING, "none")) != "none" or labels[PRODUCT].endswith("-SHARED"):
        return f"its GPUs are shared ({sharing}): another tenant may take the memory that was planned"
    if not count:
        return f"node {name} has no {RESOURCE} to allocate"
    return closed(node, demands)


def closed(node: Mapping[str, Any], demands: Demands) -> str | None:
    """Why no pod of the job may run on this node, or None."""
    labels = node["metadata"].get("labels", {})
    name = node["metadata"]["name"]
    if not _is_ready(node):
        return f"node {name} is not ready"
    if wanted := {k: v for k, v in (demands.node_selector or {}).items() if labels.get(k) != v}:
        return "spec.podTemplate.nodeSelector asks for " + ", ".join(f"{k}={v}" for k, v in sorted(wanted.items()))
    for taint in node.get("spec", {}).get("taints", ()):
        if taint.get("effect") != "PreferNoSchedule" and not any(tolerates(t, taint) for t in demands.tolerations):
            if taint["key"] == "node.kubernetes.io/unschedulable":
                return f"node {name} is cordoned"
            said = f"{taint['key']}={taint.get('value', '')}:{taint['effect']}"
            return f"taint {said} is not in spec.podTemplate.tolerations"
    return None


def _is_ready(node: Mapping[str, Any]) -> bool:
    conditions = node.get("status", {}).get("conditions", ())
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    """Whether `toleration` covers `taint`, by the rules of core/v1 (empty key with Exists: everything)."""
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key", "") in ("", taint["key"])
    return toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", "")
