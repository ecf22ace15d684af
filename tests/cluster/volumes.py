"""Static local volumes: a default StorageClass, and a keeper that sees to it that claims always find some.

The keeper (volume_keeper.py, one of the cluster's servers) plays the part of a static provisioner: it empties volumes
whose claim is gone and offers new ones, so that nobody has to count them.
"""

import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import settings
from tests.cluster.client import Cluster, Manifest
from tests.cluster.process import Server

CLASS = "local-static"
KEPT = "qlora.dev/kept-by-test-cluster"
STORAGE_CLASS: list[Manifest] = [
    {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": CLASS, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
        "reclaimPolicy": "Retain",
    }
]


@dataclass(frozen=True)
class Offer:
    """Volumes of which some shall always be free: how big, and on which nodes."""

    name: str
    size: str
    free: int
    node_label: tuple[str, str]


# The sizes are nominal: a directory has no quota. Fake nodes get volumes too, so that fake pods with claims are bound.
OFFERS = [
    Offer("local", "50Gi", 6, ("kubernetes.io/hostname", settings.NODE)),
    Offer("fake", "10Ti", 4, ("type", "kwok")),
]


def server(binaries: Path, cluster: Cluster) -> Server:
    """The keeper; ready when all offers stand."""
    command = [sys.executable, "-m", "tests.cluster.volume_keeper", f"{settings.KUBECONFIGS}/volumes.kubeconfig"]
    wanted = sum(offer.free for offer in OFFERS)
    return Server("volume-keeper", [*command, str(binaries)], lambda: len(free(cluster)) >= wanted)


def free(cluster: Cluster) -> list[Manifest]:
    """The volumes that a claim can have now."""
    return [volume for volume in volumes(cluster) if volume.get("status", {}).get("phase") == "Available"]


def directory(cluster: Cluster, claim: str, namespace: str) -> Path:
    """Where the files of a bound claim lie on this machine."""
    volume = cluster.get("persistentvolumeclaim", claim, namespace)["spec"]["volumeName"]
    return Path(cluster.get("persistentvolume", volume)["spec"]["local"]["path"])


def create(cluster: Cluster, offer: Offer) -> str:
    """Make one more volume and return its name."""
    name = f"{offer.name}-{uuid.uuid4().hex[:8]}"
    place = settings.VOLUMES / name
    place.mkdir(parents=True, mode=0o755)  # root's: a pod that sets no fsGroup cannot write, as on real volumes
    key, value = offer.node_label
    term = {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name, "labels": {KEPT: offer.name}},
            "spec": {
                "capacity": {"storage": offer.size},
                "accessModes": ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"],
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": CLASS,
                "local": {"path": str(place)},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}},
            },
        }
    )
    return name


def everywhere(cluster: Cluster, claim: str, namespace: str, size: str = "100Gi") -> Path:
    """Make the claim `claim` of a volume that pods on every node can mount, to be read, and return its directory.

    Real pods find there what is written to the directory; the keeper removes it once the namespace is gone.
    """
    name = f"{namespace}-{claim}"
    place = settings.VOLUMES / name
    place.mkdir(parents=True, mode=0o755)
    spec = {"accessModes": ["ReadOnlyMany", "ReadWriteMany"], "storageClassName": CLASS}
    any_node = {"matchExpressions": [{"key": "kubernetes.io/os", "operator": "Exists"}]}
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name, "labels": {KEPT: "everywhere"}},
            "spec": spec
            | {
                "capacity": {"storage": size},
                "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": {"name": claim, "namespace": namespace},
                "local": {"path": str(place)},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [any_node]}},
            },
        },
    )
    wanted = spec | {"volumeName": name, "resources": {"requests": {"storage": size}}}
    cluster.apply(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim}, "spec": wanted},
        namespace=namespace,
    )
    return place


def volumes(cluster: Cluster) -> list[Manifest]:
    """All that the keeper looks after, whatever their phase."""
    return cluster.list("persistentvolumes", selector=KEPT)
