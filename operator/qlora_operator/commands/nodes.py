"""The nodes that a plan is made for: from a file, from a few words (`H100-80:8x4`), or from the cluster."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from qlora_operator.commands import kubectl
from qlora_operator.commands.documents import objects
from qlora_operator.commands.refusals import BadInput
from qlora_operator.placement.flavours import AMD_RESOURCE, MEMORY, PRODUCT, RESOURCE
from qlora_operator.placement.products import products

#: NVIDIA's GPUs by the names that people use, each with its label; memory and capability stand in the products' table.
NVIDIA_NAMES = {
    "T4": "Tesla-T4",
    "V100-16": "Tesla-V100-SXM2-16GB",
    "V100-32": "Tesla-V100-SXM2-32GB",
    "RTX3090": "NVIDIA-GeForce-RTX-3090",
    "RTX4090": "NVIDIA-GeForce-RTX-4090",
    "RTX5090": "NVIDIA-GeForce-RTX-5090",
    "A10": "NVIDIA-A10",
    "A10G": "NVIDIA-A10G",
    "A30": "NVIDIA-A30",
    "A40": "NVIDIA-A40",
    "A6000": "NVIDIA-RTX-A6000",
    "A100-40": "NVIDIA-A100-SXM4-40GB",
    "A100-80": "NVIDIA-A100-SXM4-80GB",
    "L4": "NVIDIA-L4",
    "L40": "NVIDIA-L40",
    "L40S": "NVIDIA-L40S",
    "H100-80": "NVIDIA-H100-80GB-HBM3",
    "H100-NVL": "NVIDIA-H100-NVL",
    "H200": "NVIDIA-H200",
    "B200": "NVIDIA-B200",
}
#: AMD's, with the labels of its node labeller: product and memory.
AMD_NAMES = {
    "MI210": ("Instinct_MI210", "64G"),
    "MI300X": ("AMD_Instinct_MI300X_OAM", "192G"),
}
NAMES = (*NVIDIA_NAMES, *AMD_NAMES)
_WORDS = re.compile(r"(?P<product>[^:]+)(:(?P<gpus>[1-9][0-9]{0,3})(x(?P<nodes>[1-9][0-9]{0,4}))?)?")
_SYNTAX = "write PRODUCT:GPUS-PER-NODExNODES, such as H100-80:8x4 or L40S:4x2,H100-80:8x1"


def labels_of(name: str) -> dict[str, str]:
    """The labels of a node that has GPUs with this short name, or this value of nvidia.com/gpu.product.

    Raises BadInput naming those known.
    """
    labels = {short.lower(): label for short, label in NVIDIA_NAMES.items()}
    labels |= {label.lower(): label for label in products()}
    if label := labels.get(name.lower()):
        known = products()[label]
        major, minor = known.compute
        return {
            PRODUCT: label,
            MEMORY: str(known.memory_mib),
            "nvidia.com/gpu.compute.major": str(major),
            "nvidia.com/gpu.compute.minor": str(minor),
        }
    if amd := {short.lower(): labels for short, labels in AMD_NAMES.items()}.get(name.lower()):
        return {"amd.com/gpu.product-name": amd[0], "amd.com/gpu.vram": amd[1]}
    near = [short for short in NAMES if short.lower().startswith(name.lower())]
    near = near or get_close_matches(name.upper(), NAMES, n=1)
    hint = f" (near: {', '.join(near)})" if near else ""
    raise BadInput(f"--gpus: {name} is no product known here{hint}; known are {', '.join(NAMES)}")


def nodes_described(text: str) -> list[dict[str, Any]]:
    """Nodes as `--gpus` describes them, labelled as by NVIDIA's feature discovery or AMD's labeller.

    Raises BadInput, naming the part, when it is not understood.
    """
    nodes = []
    for part in text.split(","):
        match = _WORDS.fullmatch(part.strip())
        if not match:
            raise BadInput(f"--gpus: {part.strip()!r} is not understood: {_SYNTAX}")
        labels = labels_of(match["product"])
        gpus, count = int(match["gpus"] or 1), int(match["nodes"] or 1)
        first = len(nodes) + 1
        nodes += [_node(f"node-{number}", labels, gpus) for number in range(first, first + count)]
    return nodes


def _node(name: str, labels: Mapping[str, str], gpus: int) -> dict[str, Any]:
    resource = RESOURCE if PRODUCT in labels else AMD_RESOURCE
    # Host memory is not what --gpus is about: as much as any such node has.
    allocatable = {"cpu": "256", "memory": "4Ti", resource: str(gpus)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {},
        "status": {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def open_to(node: Mapping[str, Any], selector: Mapping[str, str] | None) -> dict[str, Any]:
    """A described node with the labels that a job selects: who describes nodes means those that the job may use."""
    metadata = {**node["metadata"], "labels": {**(selector or {}), **node["metadata"]["labels"]}}
    return {**node, "metadata": metadata}


def nodes_of_file(path: str) -> list[dict[str, Any]]:
    """The nodes in the output of `kubectl get nodes -o yaml` (or json). Raises BadInput when there is none in it."""
    found = objects(path)
    nodes = [each.content for each in found if each.kind == "Node" and "name" in each.content.get("metadata", {})]
    if not nodes:
        kinds = ", ".join(sorted({each.kind or "something without kind" for each in found}))
        raise BadInput(
            f"{path}: has no Node, but {kinds or 'an empty list'}: write it with kubectl get nodes -o yaml > {path}"
        )
    return nodes


def nodes_of_cluster(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The nodes of the cluster that kubectl's options name. Raises NoCluster when it does not show them."""
    return kubectl.get(
        chosen, "nodes", otherwise="; to plan without a cluster give --nodes FILE or --gpus PRODUCT:GPUSxNODES"
    )["items"]
