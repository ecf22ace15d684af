"""What one node has, read from the raw object: its GPUs as their labels describe them, and who may run there.

Labels of NVIDIA's GPU feature discovery: k8s-device-plugin, docs/gpu-feature-discovery and internal/lm. Of AMD's node
labeller: ROCm/k8s-device-plugin, cmd/k8s-node-labeller.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from sys import intern
from typing import Any, NamedTuple

from qlora_api.v1alpha1 import quantity_bytes
from qlora_operator.placement.flavours import (
    AMD,
    AMD_RESOURCE,
    MIB,
    NVIDIA,
    PRODUCT,
    RESOURCE,
    Flavour,
    tolerates,
)
from qlora_operator.placement.products import products

Raw = Mapping[str, Any]
Labels = Mapping[str, str]

GIB = 1024**3
UNLABELLED = "unlabelled GPU"
VENDORS = ("nvidia.com/", "amd.com/", "beta.amd.com/")
#: Slices of the mixed strategy: the resource, and before a dot and a name its labels.
MIG = "nvidia.com/mig-"
#: In a product's name: a slice of it. "INVALID" after it: its GPUs are not all cut alike.
SLICE_OF = "-MIG-"
MIG_STATE = "nvidia.com/mig.config.state"
MIG_UNDERWAY = ("pending", "rebooting")
#: How AMD's GPUs are cut, such as cpx_nps4; spx: they are whole.
AMD_PARTITION = "amd.com/gpu.compute-memory-partition"
#: What the device plugin adds to a resource that it shares, if told to rename it.
RENAMED = ".shared"
#: From this value on the memory label is in bytes: https://github.com/NVIDIA/gpu-feature-discovery/issues/26
BYTES_FROM = 10**8
#: Kubernetes' own taints: not ready, unreachable, cordoned, short of memory, disk or process numbers.
OF_CONDITIONS = "node.kubernetes.io/"
UNSCHEDULABLE = f"{OF_CONDITIONS}unschedulable"


class Taint(NamedTuple):
    """A taint that keeps pods away."""

    key: str
    value: str
    effect: str


@dataclass(frozen=True, slots=True)
class Access:
    """Who may run on a node, but for what its labels say."""

    is_ready: bool
    is_leaving: bool
    system: str
    taints: tuple[Taint, ...]

    @property
    def at_best(self) -> Access:
        """The same when what passes has passed: the node is there, and none of its conditions keeps pods away."""
        taints = tuple(taint for taint in self.taints if not taint.key.startswith(OF_CONDITIONS))
        return replace(self, is_ready=True, taints=taints)

    def closed(self, node: str, tolerations: Sequence[Mapping[str, Any]]) -> str | None:
        """Why no pod with `tolerations` may run on such a `node`, or None."""
        if self.is_leaving:
            return f"node {node} is being deleted"
        if not self.is_ready:
            return f"node {node} is not ready"
        if self.system != "linux":
            return f"node {node} runs {self.system}; training needs linux"
        for taint in self.taints:
            if not any(tolerates(toleration, taint._asdict()) for toleration in tolerations):
                if taint.key == UNSCHEDULABLE:
                    return f"node {node} is cordoned"
                said = f"{taint.key}={taint.value}:{taint.effect}"
                return f"taint {said} is not in spec.podTemplate.tolerations"
        return None


@dataclass(frozen=True, slots=True)
class Unusable:
    """GPUs that no job can have. `reason` has {node} where the node is named."""

    accelerator: str
    product: str
    reason: str


Gpus = Flavour | Unusable


@dataclass(frozen=True, slots=True)
class Node:
    """A node, as far as a plan may depend on it. Of a flavour, `nodes` is 1."""

    name: str
    access: Access
    gpus: tuple[Gpus, ...]
    memory_bytes: int
    labels: Labels
    #: Those of the labels that describe GPUs.
    of_gpus: Labels


def read(node: Raw, before: Node | None = None) -> Node:
    """What a raw Node object says. `before` is what it said the last time: most often its labels are the same."""
    metadata, status = node["metadata"], node.get("status") or {}
    said = metadata.get("labels") or {}
    if before and before.labels == said:
        labels, of_gpus = before.labels, before.of_gpus
    else:  # of thousands of nodes nearly all labels are the same text: kept once
        labels = {intern(name): intern(value) for name, value in said.items()}
        of_gpus = {name: value for name, value in labels.items() if name.startswith(VENDORS)}
    allocatable = status.get("allocatable") or {}
    return Node(
        metadata["name"],
        _access(node, labels),
        tuple(dict.fromkeys((*_nvidia(of_gpus, allocatable), *_amd(of_gpus, allocatable)))),
        amount(allocatable.get("memory", "0")),
        labels,
        of_gpus,
    )


@lru_cache(maxsize=4096)  # nodes of a kind say the same, and say it with each heartbeat
def amount(text: str) -> int:
    """How much of something a node can allocate, in all the ways that nodes write it; 0 where that cannot be read: one
    odd node is no reason to plan nothing."""
    try:
        if text.endswith("m"):  # thousandths: seen where a kubelet's reservation is a percentage
            return int(float(text[:-1])) // 1000
        return int(float(text)) if text[-1:].isdigit() else quantity_bytes(text)
    except ValueError:
        return 0


def _access(node: Raw, labels: Labels) -> Access:
    spec, status = node.get("spec") or {}, node.get("status") or {}
    taints = {
        Taint(taint["key"], taint.get("value", ""), taint["effect"])
        for taint in spec.get("taints") or ()
        if taint["effect"] != "PreferNoSchedule"
    }
    if spec.get("unschedulable"):  # the taint follows a moment later
        taints.add(Taint(UNSCHEDULABLE, "", "NoSchedule"))
    return Access(
        is_ready=any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ()),
        is_leaving="deletionTimestamp" in node["metadata"],
        system=labels.get("kubernetes.io/os") or (status.get("nodeInfo") or {}).get("operatingSystem") or "linux",
        taints=tuple(sorted(taints)),
    )


# --- NVIDIA ---


def _nvidia(labels: Labels, allocatable: Labels) -> Iterator[Gpus]:
    sliced = {name for name in allocatable if name.startswith(MIG)}
    sliced |= {name.removesuffix(".product") for name in labels if name.startswith(MIG) and name.endswith(".product")}
    renamed = RESOURCE + RENAMED in allocatable
    count = amount(allocatable.get(RESOURCE, "0"))
    if count or renamed or PRODUCT in labels:
        slices = any(amount(allocatable.get(name, "0")) for name in sliced)
        yield _whole(labels, count, is_renamed=renamed, has_slices=slices)
    for resource in sorted(name for name in sliced if name + RENAMED not in sliced):
        yield _slice(labels, resource, amount(allocatable.get(resource, "0")))


def _whole(labels: Labels, count: int, *, is_renamed: bool, has_slices: bool) -> Gpus:
    """What stands behind nvidia.com/gpu: whole GPUs, or under MIG's single strategy slices."""
    product = labels.get(PRODUCT)
    if product is None:
        text = f"node {{node}} has no label {PRODUCT}: run NVIDIA's GPU feature discovery"
        return Unusable(NVIDIA, UNLABELLED, text)
    if reason := _recut(labels) or _shared(labels, RESOURCE, product, is_renamed=is_renamed):
        return Unusable(NVIDIA, product, reason)
    if product.endswith(f"{SLICE_OF}INVALID"):
        text = (
            "the GPUs of node {node} are not all cut alike, as MIG's single strategy needs: set nvidia.com/mig.config"
        )
        return Unusable(NVIDIA, product, text)
    if not count and has_slices:
        return Unusable(NVIDIA, product, "node {node} has no whole GPU to allocate: all are cut into MIG slices")
    return _flavour(labels, RESOURCE, product, count)


def _slice(labels: Labels, resource: str, count: int) -> Gpus:
    """Slices of MIG's mixed strategy: each profile is a resource with labels of its own."""
    is_renamed, resource = resource.endswith(RENAMED), resource.removesuffix(RENAMED)
    product = labels.get(f"{resource}.product")
    if product is None:
        text = f"node {{node}} has no label {resource}.product: run NVIDIA's GPU feature discovery"
        return Unusable(NVIDIA, resource, text)
    if reason := _recut(labels) or _shared(labels, resource, product, is_renamed=is_renamed):
        return Unusable(NVIDIA, product, reason)
    return _flavour(labels, resource, product, count)


def _flavour(labels: Labels, resource: str, product: str, count: int) -> Gpus:
    if not count:
        text = f"node {{node}} has no {resource} to allocate: see the pod of NVIDIA's device plugin there"
        return Unusable(NVIDIA, product, text)
    whole, _, profile = product.partition(SLICE_OF)
    known = products().get(whole)
    label: str | None = f"{resource}.memory"
    written = labels.get(f"{resource}.memory", "")
    value = int(written) if written.isdecimal() else 0
    memory = value if value >= BYTES_FROM else value * MIB
    if value >= BYTES_FROM:
        label = None
    elif not value and known and not profile:  # a slice's memory is not in its name: of 1g.10gb it is 9728 MiB
        memory, label = known.memory_mib * MIB, None
    if not memory:
        text = (
            f"node {{node}} has no label {resource}.memory in MiB, and {product} is no GPU whose memory is known by "
            f"its name: run NVIDIA's GPU feature discovery, or kubectl label node {{node}} {resource}.memory=MIB"
        )
        return Unusable(NVIDIA, product, text)
    major, minor = labels.get("nvidia.com/gpu.compute.major", ""), labels.get("nvidia.com/gpu.compute.minor", "")
    return Flavour(
        resource=intern(resource),
        product=product,
        memory_bytes=memory,
        gpus_per_node=count,
        nodes=1,
        compute=(int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else known and known.compute,
        labels=((f"{resource}.product", product),),
        memory_label=label,
        partition=bool(profile),
    )


def _recut(labels: Labels) -> str | None:
    """Why none of the node's GPUs is what its labels say, or None: MIG's manager is cutting them, or could not."""
    state = labels.get(MIG_STATE)
    if state in MIG_UNDERWAY:
        return f"the GPUs of node {{node}} are being cut ({MIG_STATE} is {state}): wait until it says success"
    if state == "failed":
        wanted = labels.get("nvidia.com/mig.config", "asked for")
        return (
            f"the GPUs of node {{node}} could not be cut as {wanted} ({MIG_STATE} is failed): "
            "see the log of NVIDIA's MIG manager there"
        )
    return None


def _shared(labels: Labels, resource: str, product: str, *, is_renamed: bool) -> str | None:
    """Why a job cannot rely on the memory of these GPUs, or None."""
    how = labels.get(f"{resource}.sharing-strategy", "none")
    replicas = labels.get(f"{resource}.replicas", "1")
    several = replicas.isdecimal() and int(replicas) > 1
    if how == "none" and not (several or is_renamed or product.endswith("-SHARED")):
        return None
    how = "time-slicing" if how == "none" else how  # the label is younger than time-slicing, and older than MPS
    return (
        f"its GPUs are shared ({how}): another tenant may take the memory that was planned; "
        "turn sharing off for node {node} in the configuration of NVIDIA's device plugin"
    )


# --- AMD ---


def _amd(labels: Labels, allocatable: Labels) -> Iterator[Gpus]:
    if AMD_RESOURCE not in allocatable and all(name.startswith("nvidia.com/") for name in labels):
        return
    names, memories = _labelled(labels, "product-name"), _labelled(labels, "vram")
    count = amount(allocatable.get(AMD_RESOURCE, "0"))
    if not (count or names or memories):
        return
    product = "+".join(name for _, _, name in names) or "AMD GPU"
    sizes = [int(size[1]) for _, _, text in memories if (size := re.fullmatch(r"(\d+)G", text))]
    parts = labels.get(AMD_PARTITION, "spx")
    if not parts.startswith("spx"):
        text = f"the GPUs of node {{node}} are partitioned ({parts}), which is not supported: set them to SPX and NPS1"
        yield Unusable(AMD, product, text)
    elif not count:
        text = f"node {{node}} has no {AMD_RESOURCE} to allocate: see the pod of AMD's device plugin there"
        yield Unusable(AMD, product, text)
    elif not sizes or min(sizes) < 1:
        text = "node {node} has no label amd.com/gpu.vram that tells its memory: run AMD's node labeller with -vram"
        yield Unusable(AMD, product, text)
    else:
        yield Flavour(
            resource=AMD_RESOURCE,
            product=product,
            # Rounded to whole GiB by the labeller, so up to half of one may be missing; and of unlike GPUs in a node
            # a pod may get the smallest.
            memory_bytes=min(sizes) * GIB - GIB // 2,
            gpus_per_node=count,
            nodes=1,
            labels=tuple((label, value) for label, value, _ in (*names, *memories)),
        )


def _labelled(labels: Labels, kind: str) -> list[tuple[str, str, str]]:
    """What AMD's labeller says of `kind`: label, value, and what is said.

    Where a node's GPUs differ, and in older versions always, it is in the label's name and the value counts them.
    """
    for prefix in (f"amd.com/gpu.{kind}", f"beta.amd.com/gpu.{kind}"):
        if value := labels.get(prefix):
            return [(prefix, value, value)]
        counted = sorted(name for name in labels if name.startswith(f"{prefix}."))
        if counted:
            return [(name, labels[name], name.removeprefix(f"{prefix}.")) for name in counted]
    return []
