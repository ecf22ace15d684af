"""A cluster's GPU nodes of many kinds, played by kwok: a thousand of them, or a few of the kinds that matter most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.cluster import gpus, kwok
from tests.cluster.client import Cluster, Manifest

PREFIX = "fleet"
FLEET = "example.com/fleet"
#: Tells two halves of the H100s apart, as the flavours of a queue do.
POOL = "example.com/pool"
RESERVED: Manifest = {"key": "example.com/reserved", "value": "team-b", "effect": "NoSchedule"}
AMD_TAINT: Manifest = {"key": "amd.com/gpu", "value": "present", "effect": "NoSchedule"}
NVIDIA_TAINT: Manifest = {"key": gpus.RESOURCE, "value": "present", "effect": "NoSchedule"}
MI300X = "AMD_Instinct_MI300X_OAM"
ADA = gpus.Product("NVIDIA-RTX-6000-Ada-Generation", 49140, "ada-lovelace", (8, 9))
#: Of nodes whose GPUs a DRA driver publishes, too.
DRA_DRIVER, DRA_NODES = "gpu.nvidia.com", "h200x4"


@dataclass(frozen=True)
class Kind:
    """Nodes that are alike, and how many of them there are."""

    name: str
    described: gpus.Described
    count: int
    taints: tuple[Manifest, ...] = (NVIDIA_TAINT,)
    labels: dict[str, str] = field(default_factory=dict)
    cordoned: bool = False

    def nodes(self) -> Iterator[Manifest]:
        labels, allocatable = self.described
        for number in range(self.count):
            name = f"{PREFIX}-{self.name}-{number}"
            ours = {FLEET: PREFIX} | self.labels
            yield kwok.node(name, labels | ours, allocatable, self.taints, self.cordoned)


KINDS = (
    Kind("h100-blue", gpus.whole(gpus.H100, 8), 40, labels={POOL: "blue"}),
    Kind("h100-green", gpus.whole(gpus.H100, 8), 40, labels={POOL: "green"}),
    Kind("h200", gpus.whole(gpus.H200, 8), 24),
    Kind(DRA_NODES, gpus.whole(gpus.H200, 4), 16),
    Kind("a100-40gb", gpus.whole(gpus.A100_40GB, 8), 150),
    Kind("a100-80gb", gpus.whole(gpus.A100_80GB, 8), 100),
    Kind("l40s", gpus.whole(gpus.L40S, 4), 200),
    Kind("rtx-4090", gpus.whole(gpus.RTX_4090, 2), 120),
    Kind("t4", gpus.whole(gpus.T4, 4), 100),
    Kind("v100", gpus.whole(gpus.V100, 4), 20),
    Kind("mig-single", gpus.mig_single(gpus.H100, gpus.SEVENTH), 60),
    Kind("mig-mixed", gpus.mig_mixed(gpus.H100, [gpus.HALF]), 50),
    Kind("mi300x", gpus.amd(MI300X, 192, 8), 30, taints=(AMD_TAINT,)),
    Kind("time-sliced", gpus.shared(gpus.A10, 4), 28),
    Kind("cordoned", gpus.whole(gpus.L4, 8), 10, cordoned=True),
    Kind("reserved", gpus.whole(ADA, 4), 10, taints=(NVIDIA_TAINT, RESERVED)),
    Kind("b200", gpus.whole(gpus.B200, 8), 2),
)
NODES = [node for kind in KINDS for node in kind.nodes()]
#: Bought later.
LATECOMERS = list(Kind("gb200", gpus.whole(gpus.GB200, 4), 2).nodes())


@contextmanager
def up(cluster: Cluster) -> Iterator[None]:
    """The fleet, with what its DRA driver publishes; gone afterwards."""
    names = [node["metadata"]["name"] for node in NODES]
    published = [DEVICE_CLASS, *(_devices(name) for name in names if name.startswith(f"{PREFIX}-{DRA_NODES}-"))]
    try:
        kwok.create(cluster, NODES, timeout=180)
        cluster.apply(*published)
        yield
    finally:
        for one in published:
            cluster.delete(one["kind"], one["metadata"]["name"])
        kwok.delete_labelled(cluster, FLEET, PREFIX)


#: As NVIDIA's driver installs it.
DEVICE_CLASS: Manifest = {
    "apiVersion": "resource.k8s.io/v1",
    "kind": "DeviceClass",
    "metadata": {"name": DRA_DRIVER},
    "spec": {
        "selectors": [
            {
                "cel": {
                    "expression": f"device.driver == '{DRA_DRIVER}' && device.attributes['{DRA_DRIVER}'].type == 'gpu'"
                }
            }
        ]
    },
}


def _devices(node: str) -> Manifest:
    """The ResourceSlice of a node with four H200s."""
    attributes = {"type": {"string": "gpu"}, "productName": {"string": "NVIDIA H200"}}
    memory = {"memory": {"value": f"{gpus.H200.memory_mib}Mi"}}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": node},
        "spec": {
            "driver": DRA_DRIVER,
            "nodeName": node,
            "pool": {"name": node, "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": f"gpu-{n}", "attributes": attributes, "capacity": memory} for n in range(4)],
        },
    }
