"""GPUs that are not there: labels and capacity as the device plugin and GPU feature discovery would give them.

The scheduler and the kubelet account for them like real ones; a container sees no device.
"""

from dataclasses import dataclass

from tests.cluster import settings
from tests.cluster.client import Cluster

RESOURCE = "nvidia.com/gpu"
_PREFIX = "nvidia.com/"


@dataclass(frozen=True)
class Product:
    """A GPU as its node's labels describe it; memory in MiB of one GPU."""

    name: str
    memory_mib: int
    family: str
    compute: tuple[int, int]


# Memory as the driver reports it, which is what the label carries.
A2 = Product("NVIDIA-A2", 15356, "ampere", (8, 6))
T4 = Product("Tesla-T4", 15360, "turing", (7, 5))
L4 = Product("NVIDIA-L4", 23034, "ada-lovelace", (8, 9))
L40S = Product("NVIDIA-L40S", 46068, "ada-lovelace", (8, 9))
A100_40GB = Product("NVIDIA-A100-SXM4-40GB", 40960, "ampere", (8, 0))
A100_80GB = Product("NVIDIA-A100-SXM4-80GB", 81920, "ampere", (8, 0))
H100 = Product("NVIDIA-H100-80GB-HBM3", 81559, "hopper", (9, 0))
H200 = Product("NVIDIA-H200", 143771, "hopper", (9, 0))


def labels(product: Product, count: int) -> dict[str, str]:
    """The labels of a node with `count` such GPUs."""
    major, minor = product.compute
    return {
        f"{_PREFIX}gpu.present": "true",
        f"{_PREFIX}gpu.product": product.name,
        f"{_PREFIX}gpu.memory": str(product.memory_mib),
        f"{_PREFIX}gpu.count": str(count),
        f"{_PREFIX}gpu.replicas": "1",
        f"{_PREFIX}gpu.sharing-strategy": "none",
        f"{_PREFIX}gpu.family": product.family,
        f"{_PREFIX}gpu.compute.major": str(major),
        f"{_PREFIX}gpu.compute.minor": str(minor),
        f"{_PREFIX}mig.capable": "false",
    }


def give(cluster: Cluster, product: Product, count: int, node: str = settings.NODE) -> None:
    """Give the node `count` GPUs, instead of those it may have."""
    take(cluster, node)
    amount = {RESOURCE: str(count)}
    cluster.patch("node", node, {"metadata": {"labels": labels(product, count)}})
    cluster.patch("node", node, {"status": {"capacity": amount, "allocatable": amount}}, status=True)


def take(cluster: Cluster, node: str = settings.NODE) -> None:
    """Take the GPUs and their labels away; pods that hold some keep running."""
    found = cluster.get("node", node)
    ours = {name: None for name in found["metadata"]["labels"] if name.startswith(_PREFIX)}
    cluster.patch("node", node, {"metadata": {"labels": ours}})
    if RESOURCE in found["status"]["capacity"]:
        gone = {RESOURCE: None}
        cluster.patch("node", node, {"status": {"capacity": gone, "allocatable": gone}}, status=True)
