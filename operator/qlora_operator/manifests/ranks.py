"""A training of several processes: where they meet, and which of them each is (torchrun's PET_ variables)."""

from __future__ import annotations

from typing import Any

from qlora_api.v1alpha1 import Plan
from qlora_operator.lifecycle.observed import INDEX, Job
from qlora_operator.lifecycle.tasks import TRAIN, Task
from qlora_operator.manifests.names import JOB_LABEL, STAGE_LABEL, child_metadata

#: torchrun's own choice.
PORT = 29500
RANK = f"metadata.annotations['{INDEX}']"


def meeting_point(job: Job, task: Task, name: str) -> dict[str, Any] | None:
    """The headless Service by which the pods of the attempt `name` find the first of them, and of the same name; None
    for one pod."""
    if task != TRAIN or job.status.plan is None or job.status.plan.nodes == 1:
        return None
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": child_metadata(job, name, task),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # they meet before any is ready
            "selector": {JOB_LABEL: job.metadata.name, STAGE_LABEL: task.stage.value},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def indexed(plan: Plan | None) -> dict[str, Any]:
    """What makes of a Job one pod for each node, all at once."""
    if plan is None or plan.nodes == 1:
        return {}
    return {"completionMode": "Indexed", "completions": plan.nodes, "parallelism": plan.nodes}


#: Of the grace period, what is left to the pod's first process to say how it ended; torchrun kills the others before.
LAST_WORDS_SECONDS = 5


def environment(plan: Plan | None, attempt: str, grace_seconds: int) -> list[dict[str, Any]]:
    """torchrun's settings, for several processes."""
    if plan is None or plan.gpus <= 1:
        return []
    values = {
        "PET_NNODES": str(plan.nodes),
        "PET_NPROC_PER_NODE": str(plan.gpus_per_node),
        "PET_MASTER_PORT": str(PORT),
        "PET_SHUTDOWN_TIMEOUT": str(max(1, grace_seconds - LAST_WORDS_SECONDS)),
    }
    if plan.nodes > 1:
        values["PET_MASTER_ADDR"] = f"{attempt}-0.{attempt}"
    found: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(values.items())]
    if plan.nodes > 1:
        found.append({"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": RANK}}})
    return found
