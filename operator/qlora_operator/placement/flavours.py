"""What jobs ask of GPUs, and what they are offered: plain values, and the rule of tolerations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MIB = 1024**2
NVIDIA, AMD = "nvidia", "amd"
RESOURCE = "nvidia.com/gpu"
PRODUCT = "nvidia.com/gpu.product"
MEMORY = "nvidia.com/gpu.memory"
AMD_RESOURCE = "amd.com/gpu"


@dataclass(frozen=True, slots=True)
class Flavour:
    """GPUs that are alike, in nodes that are alike."""

    #: What a pod asks for: nvidia.com/gpu, nvidia.com/mig-3g.40gb, amd.com/gpu.
    resource: str
    product: str
    #: Of one GPU.
    memory_bytes: int
    #: Allocatable in each node.
    gpus_per_node: int
    #: Such nodes that the job may use.
    nodes: int
    #: CUDA's compute capability; None where nothing tells it.
    compute: tuple[int, int] | None = None
    #: Node labels that mean this product, for node affinity `In`.
    labels: tuple[tuple[str, str], ...] = ()
    #: A label with the memory in whole MiB, for node affinity `Gt`; None where the memory is known otherwise.
    memory_label: str | None = None
    #: A MIG slice: several cannot work together, for there is no peer-to-peer between slices.
    partition: bool = False

    @property
    def accelerator(self) -> str:
        """Whose it is, as in `spec.hardware.accelerator`."""
        return AMD if self.resource.startswith("amd.com/") else NVIDIA


@dataclass(frozen=True)
class Refused:
    """GPUs that a job cannot have, and why."""

    product: str
    reason: str
    #: The job itself asks for others.
    by_its_own_wish: bool = False


@dataclass(frozen=True)
class Demands:
    """What a job says about nodes: whose GPUs, which products, its own selector and tolerations."""

    accelerator: Literal["nvidia", "amd", "cpu"] = "nvidia"
    products: tuple[str, ...] = ()
    node_selector: Mapping[str, str] | None = None
    tolerations: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Offers:
    """What a job may use, and what it may not. No product is in both."""

    flavours: tuple[Flavour, ...]
    refused: tuple[Refused, ...]


def tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    """Whether `toleration` covers `taint`, by the rules of core/v1 (empty key with Exists: everything)."""
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key", "") in ("", taint["key"])
    return toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", "")
