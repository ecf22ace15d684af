"""GPUs that are not there: labels and capacity as the device plugin and GPU feature discovery would give them.

The scheduler and the kubelet account for them like real ones; a container sees no device.
"""

from collections.abc import Sequence
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
RTX_4090 = Product("NVIDIA-GeForce-RTX-4090", 24564, "ada-lovelace", (8, 9))
V100 = Product("Tesla-V100-SXM2-32GB", 32768, "volta", (7, 0))
A10 = Product("NVIDIA-A10", 23028, "ampere", (8, 6))
B200 = Product("NVIDIA-B200", 183359, "blackwell", (10, 0))
GB200 = Product("NVIDIA-GB200", 189471, "blackwell", (10, 0))


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


# --- what is not whole, or not NVIDIA's: labels, and what the node can allocate, as `kwok.create_nodes` takes them ---

Described = tuple[dict[str, str], dict[str, str]]


@dataclass(frozen=True)
class Slice:
    """A MIG profile and how many of it a node has; memory in MiB as the label says it, not as the profile's name."""

    profile: str
    memory_mib: int
    count: int


#: Of an H100 of 80 GB.
HALF = Slice("3g.40gb", 40448, 2)
SEVENTH = Slice("1g.10gb", 9728, 7)


def whole(product: Product, count: int) -> Described:
    """GPUs as they come: each for one pod."""
    return labels(product, count), {RESOURCE: str(count)}


def mig_single(product: Product, cut: Slice) -> Described:
    """All GPUs of the node cut alike: the slices are the node's GPUs."""
    slices = Product(f"{product.name}-MIG-{cut.profile}", cut.memory_mib, product.family, product.compute)
    mig = {f"{_PREFIX}mig.capable": "true", f"{_PREFIX}mig.strategy": "single", f"{_PREFIX}mig.config.state": "success"}
    return labels(slices, cut.count) | mig, {RESOURCE: str(cut.count)}


def mig_mixed(product: Product, cuts: Sequence[Slice], whole: int = 0) -> Described:
    """GPUs that are cut in several ways, each a resource with labels of its own, beside `whole` ones."""
    described = labels(product, whole)
    described |= {
        f"{_PREFIX}mig.capable": "true",
        f"{_PREFIX}mig.strategy": "mixed",
        f"{_PREFIX}mig.config.state": "success",
    }
    amounts = {RESOURCE: str(whole)}
    for cut in cuts:
        resource = f"{_PREFIX}mig-{cut.profile}"
        amounts[resource] = str(cut.count)
        described |= {
            f"{resource}.product": f"{product.name}-MIG-{cut.profile}",
            f"{resource}.memory": str(cut.memory_mib),
            f"{resource}.count": str(cut.count),
            f"{resource}.replicas": "1",
            f"{resource}.sharing-strategy": "none",
        }
    return described, amounts


def shared(product: Product, count: int, replicas: int = 4, strategy: str = "time-slicing") -> Described:
    """GPUs that several pods share, by time-slicing or MPS."""
    described = labels(product, count) | {
        f"{_PREFIX}gpu.product": f"{product.name}-SHARED",
        f"{_PREFIX}gpu.replicas": str(replicas),
        f"{_PREFIX}gpu.sharing-strategy": strategy,
    }
    return described, {RESOURCE: str(count * replicas)}


def amd(product: str, vram_gib: int, count: int) -> Described:
    """GPUs as AMD's node labeller describes them, under both its prefixes; counted under the older one."""
    described = {
        "amd.com/gpu.product-name": product,
        "amd.com/gpu.vram": f"{vram_gib}G",
        f"beta.amd.com/gpu.product-name.{product}": str(count),
        f"beta.amd.com/gpu.vram.{vram_gib}G": str(count),
    }
    return described, {"amd.com/gpu": str(count)}


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
