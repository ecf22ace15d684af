"""How a training's pods ask for their GPUs: by labels and amounts, never by the name of a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_api.v1alpha1 import Plan
from qlora_operator.lifecycle.observed import Job
from qlora_operator.lifecycle.tasks import TRAIN, Task
from qlora_operator.manifests.names import JOB_LABEL, STAGE_LABEL, child_metadata
from qlora_operator.planner import needed_mib

HOSTNAME = "kubernetes.io/hostname"
#: Nodes of one zone are nearer to one another than to others; ranks talk to each other in every layer.
ZONE = "topology.kubernetes.io/zone"
#: The driver that NVIDIA's DRA driver publishes whole GPUs under, and the name of its DeviceClass.
DRA_DRIVER = "gpu.nvidia.com"
#: Name of the claim within the pod, and of the request within the claim.
CLAIM = "gpus"
#: What NCCL's processes of one node speak through: the volume in the place of a container's 64 MiB.
SHARED_MEMORY: dict[str, Any] = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}


def limits(plan: Plan, job: Job) -> dict[str, str]:
    """The container's limits for them; with DRA a claim asks instead."""
    if plan.resource is None or uses_dra(job):
        return {}
    return {plan.resource: str(plan.gpus_per_node)}


def uses_dra(job: Job) -> bool:
    return job.spec.hardware.allocation == "dra"


def claim_template(job: Job, task: Task, name: str) -> dict[str, Any] | None:
    """The ResourceClaimTemplate of a training that asks by Dynamic Resource Allocation: so many devices, alike, with
    the memory. None where a device plugin is asked."""
    plan = job.status.plan
    if task != TRAIN or plan is None or not plan.gpus or not uses_dra(job):
        return None
    enough = f"device.capacity['{DRA_DRIVER}'].memory.compareTo(quantity('{needed_mib(plan)}Mi')) >= 0"
    exactly = {
        "deviceClassName": DRA_DRIVER,
        "allocationMode": "ExactCount",
        "count": plan.gpus_per_node,
        "selectors": [{"cel": {"expression": enough}}],
    }
    devices = {"requests": [{"name": CLAIM, "exactly": exactly}]}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": child_metadata(job, name, task),
        "spec": {"spec": {"devices": devices}},
    }


def affinity(plan: Plan | None, job: Job, unfit: Sequence[str]) -> dict[str, Any]:
    """The planned flavour, by its labels, and rather another node than those `unfit` that an attempt has found so.

    Pods of a training on several nodes keep off one another's node, and near to it.
    """
    found: dict[str, Any] = {}
    node: dict[str, Any] = {}
    if plan is not None:
        expressions = [{"key": key, "operator": "In", "values": [value]} for key, value in sorted(plan.labels.items())]
        if plan.memory_label is not None:
            more = {"key": plan.memory_label, "operator": "Gt", "values": [str(needed_mib(plan) - 1)]}
            expressions.append(more)
        node["requiredDuringSchedulingIgnoredDuringExecution"] = {
            "nodeSelectorTerms": [{"matchExpressions": expressions}]
        }
    if unfit:  # not required: where there is no other, its driver may have come back
        others = {"matchExpressions": [{"key": HOSTNAME, "operator": "NotIn", "values": list(unfit)}]}
        node["preferredDuringSchedulingIgnoredDuringExecution"] = [{"weight": 100, "preference": others}]
    if node:
        found["nodeAffinity"] = node
    if plan is not None and plan.nodes > 1:
        peers = {"matchLabels": {JOB_LABEL: job.metadata.name, STAGE_LABEL: TRAIN.stage.value}}
        apart = {"labelSelector": peers, "topologyKey": HOSTNAME}
        near = {"weight": 100, "podAffinityTerm": {"labelSelector": peers, "topologyKey": ZONE}}
        found["podAntiAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}
        found["podAffinity"] = {"preferredDuringSchedulingIgnoredDuringExecution": [near]}
    return found
