"""Fake nodes: kwok plays their kubelets, so that thousands of GPU nodes cost nothing."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import yaml

from tests.cluster import build, settings
from tests.cluster.client import Cluster, Manifest
from tests.cluster.process import Server

Some = TypeVar("Some")

FAKE = "kwok.x-k8s.io/node"
TAINT: Manifest = {"key": FAKE, "value": "fake", "effect": "NoSchedule"}
TOLERATION: Manifest = {"key": FAKE, "operator": "Exists", "effect": "NoSchedule"}


#: Of a fake node. The controller that looks for lost nodes is as patient (controlplane.py).
LEASE_SECONDS = 120
#: Of a pod: which stage of a QLoRAJob it runs. A training on a fake node goes on until somebody ends it.
STAGE = "qlora.dev/stage"
#: Name, whether Ready, and the taint that goes a while later: until then no pod is bound there.
_STATES = (
    "{range .items[*]}{.metadata.name} {.status.conditions[?(@.type=='Ready')].status} "
    "{.spec.taints[?(@.key=='node.kubernetes.io/not-ready')].key}{'\\n'}{end}"
)
#: At a time; more do not make a small machine faster.
_AT_ONCE, _IN_ONE_CALL = 4, 125


def server(binaries: Path) -> Server:
    """The controller for nodes that carry the annotation `FAKE`."""
    stages = settings.STATE / build.STAGES
    stages.write_text(yaml.safe_dump_all(_stages(yaml.safe_load_all((binaries / build.STAGES).read_text()))))
    command = [
        f"{binaries}/kwok",
        f"--kubeconfig={settings.KUBECONFIGS}/kwok.kubeconfig",
        "--manage-all-nodes=false",
        f"--manage-nodes-with-annotation-selector={FAKE}=fake",
        # renewed four times as often: for a thousand nodes, every 10 s, that is half a core of the control plane's
        f"--node-lease-duration-seconds={LEASE_SECONDS}",
        f"--config={stages}",
    ]
    return Server("kwok", command, lambda: True)


def _stages(stages: Iterable[Manifest]) -> list[Manifest]:
    """kwok's own, but that the pod of a training does not succeed as soon as it runs, as those of other Jobs do."""
    found = list(stages)
    (complete,) = (stage for stage in found if stage["metadata"]["name"] == "pod-complete")
    not_train = {"key": f'.metadata.labels["{STAGE}"]', "operator": "NotIn", "values": ["train"]}
    complete["spec"]["selector"]["matchExpressions"].append(not_train)
    return found


def node(
    name: str,
    labels: dict[str, str],
    allocatable: dict[str, str],
    taints: Sequence[Manifest] = (TAINT,),
    cordoned: bool = False,
) -> Manifest:
    """A fake node. `allocatable` is added to 64 CPUs, 512Gi of memory and 110 pods."""
    resources = {"cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "2Ti"} | allocatable
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {FAKE: "fake", "node.alpha.kubernetes.io/ttl": "0"},
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "type": "kwok"} | labels,
        },
        "spec": {"taints": list(taints)} | ({"unschedulable": True} if cordoned else {}),
        "status": {"allocatable": resources, "capacity": resources},
    }


def create_nodes(
    cluster: Cluster,
    prefix: str,
    count: int,
    labels: dict[str, str],
    allocatable: dict[str, str],
    taints: Sequence[Manifest] = (TAINT,),
    timeout: float = 60.0,
) -> list[str]:
    """Create `count` fake nodes that are alike and return their names once all are Ready.

    The nodes carry `taints`, so that no pod that is meant to run comes to lie on one; by default pods need
    `TOLERATION`.
    """
    return create(
        cluster, [node(f"{prefix}-{number}", labels, allocatable, taints) for number in range(count)], timeout
    )


def create(cluster: Cluster, nodes: Sequence[Manifest], timeout: float = 60.0) -> list[str]:
    """Create fake nodes and return their names once all are Ready."""

    def make(some: Sequence[Manifest]) -> None:
        document = {"apiVersion": "v1", "kind": "List", "items": some}
        cluster.kubectl("create", "--filename=-", "--output=name", stdin=json.dumps(document))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(make, _parts(nodes)))
    names = [made["metadata"]["name"] for made in nodes]
    wanted = set(names)

    def not_ready() -> list[str]:
        lines = cluster.kubectl("get", "nodes", "--selector=type=kwok", f"--output=jsonpath={_STATES}").splitlines()
        return sorted(wanted - {name for name, *state in map(str.split, lines) if state == ["True"]})

    expected = f"{len(names)} kwok nodes are Ready (seen: those that are not)"
    cluster.wait(expected, not_ready, lambda left: not left, timeout, interval=0.5)
    return names


def delete_nodes(cluster: Cluster, names: Sequence[str]) -> None:
    """Remove fake nodes; their pods are removed by the cluster's garbage collector."""
    if names:
        cluster.kubectl("delete", "node", "--ignore-not-found", *names)


def delete_labelled(cluster: Cluster, label: str, value: str) -> None:
    """Remove all nodes with a label, in one request: a thousand, one by one, take a minute."""
    cluster.kubectl("delete", "--raw", f"/api/v1/nodes?labelSelector={quote(label)}%3D{quote(value)}")


def _parts(things: Sequence[Some]) -> list[Sequence[Some]]:
    return [things[start : start + _IN_ONE_CALL] for start in range(0, len(things), _IN_ONE_CALL)]
