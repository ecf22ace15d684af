"""Static local volumes: a default StorageClass, and a keeper that sees to it that claims always find some.

The keeper (`python -m tests.cluster.volumes`, one of the cluster's servers) plays the part of a static provisioner: it
empties volumes whose claim is gone and offers new ones, so that nobody has to count them.
"""

import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import settings
from tests.cluster.client import Cluster, KubectlError, Manifest
from tests.cluster.process import Server

CLASS = "local-static"
_KEPT = "qlora.dev/kept-by-test-cluster"
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
    command = [sys.executable, "-m", "tests.cluster.volumes", f"{settings.KUBECONFIGS}/volumes.kubeconfig"]
    wanted = sum(offer.free for offer in OFFERS)
    return Server("volume-keeper", [*command, str(binaries)], lambda: len(free(cluster)) >= wanted)


def free(cluster: Cluster) -> list[Manifest]:
    """The volumes that a claim can have now."""
    return [volume for volume in _volumes(cluster) if volume.get("status", {}).get("phase") == "Available"]


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
            "metadata": {"name": name, "labels": {_KEPT: offer.name}},
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


def _volumes(cluster: Cluster) -> list[Manifest]:
    return cluster.list("persistentvolumes", selector=_KEPT)


def _tend(cluster: Cluster) -> None:
    """One round: remove what is released, files and all, and make good what is missing."""
    volumes = _volumes(cluster)
    for volume in volumes:
        if volume.get("status", {}).get("phase") in ("Released", "Failed"):
            cluster.delete("persistentvolume", volume["metadata"]["name"])
            shutil.rmtree(volume["spec"]["local"]["path"], ignore_errors=True)
    for offer in OFFERS:
        # one without a phase yet was made a moment ago
        ours = [v for v in volumes if v["metadata"]["labels"][_KEPT] == offer.name]
        open_now = [v for v in ours if v.get("status", {}).get("phase", "Pending") in ("Pending", "Available")]
        for _ in range(offer.free - len(open_now)):
            create(cluster, offer)


def _keep(cluster: Cluster) -> None:
    """For ever: a round now, and another at each change of any volume."""
    while True:
        watch = [f"{cluster.binaries}/kubectl", f"--kubeconfig={cluster.kubeconfig}"]
        watch += ["get", "persistentvolumes", "--watch", "--output=name"]
        with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as changes:
            assert changes.stdout
            try:
                _tend(cluster)
                for _ in changes.stdout:
                    _tend(cluster)
            except KubectlError as error:  # a conflict, or the API server is away: look again
                print(error, file=sys.stderr, flush=True)
            finally:
                changes.kill()
        time.sleep(1)


if __name__ == "__main__":
    _keep(Cluster(Path(sys.argv[1]), Path(sys.argv[2])))
