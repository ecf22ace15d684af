"""Fake nodes: kwok plays their kubelets, so that thousands of GPU nodes cost nothing."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.cluster import build, settings
from tests.cluster.client import Cluster, Manifest
from tests.cluster.process import Server

FAKE = "kwok.x-k8s.io/node"
TAINT: Manifest = {"key": FAKE, "value": "fake", "effect": "NoSchedule"}
TOLERATION: Manifest = {"key": FAKE, "operator": "Exists", "effect": "NoSchedule"}


def server(binaries: Path) -> Server:
    """The controller for nodes that carry the annotation `FAKE`."""
    command = [
        f"{binaries}/kwok",
        f"--kubeconfig={settings.KUBECONFIGS}/kwok.kubeconfig",
        "--manage-all-nodes=false",
        f"--manage-nodes-with-annotation-selector={FAKE}=fake",
        "--node-lease-duration-seconds=40",
        f"--config={binaries}/{build.STAGES}",
    ]
    return Server("kwok", command, lambda: True)


def create_nodes(
    cluster: Cluster,
    prefix: str,
    count: int,
    labels: dict[str, str],
    allocatable: dict[str, str],
    taints: Sequence[Manifest] = (TAINT,),
    timeout: float = 60.0,
) -> list[str]:
    """Create `count` fake nodes and return their names once all are Ready.

    `allocatable` is added to 64 CPUs, 512Gi of memory and 110 pods. The nodes carry `taints`,
    so that no pod that is meant to run comes to lie on one; by default pods need `TOLERATION`.
    """
    resources = {"cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "2Ti"} | allocatable
    names = [f"{prefix}-{number}" for number in range(count)]
    manifests = [
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "annotations": {FAKE: "fake", "node.alpha.kubernetes.io/ttl": "0"},
                "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "type": "kwok"} | labels,
            },
            "spec": {"taints": list(taints)},
            "status": {"allocatable": resources, "capacity": resources},
        }
        for name in names
    ]
    cluster.kubectl("create", "--filename=-", stdin=yaml.safe_dump_all(manifests))
    wanted = set(names)

    def not_ready() -> list[str]:
        ready = {
            node["metadata"]["name"]
            for node in cluster.list("nodes", selector="type=kwok")
            for condition in node["status"].get("conditions", [])
            if condition["type"] == "Ready" and condition["status"] == "True"
        }
        return sorted(wanted - ready)

    cluster.wait(f"{count} kwok nodes are Ready (seen: those that are not)", not_ready, lambda left: not left, timeout)
    return names


def delete_nodes(cluster: Cluster, names: list[str]) -> None:
    """Remove fake nodes; their pods are removed by the cluster's garbage collector."""
    if names:
        cluster.kubectl("delete", "node", "--ignore-not-found", *names)
