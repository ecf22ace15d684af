"""Labels and owner references that every child carries."""

from __future__ import annotations

from typing import Any

from qlora_api.v1alpha1 import API_VERSION, KIND
from qlora_operator.lifecycle.observed import Job
from qlora_operator.lifecycle.tasks import Task

JOB_LABEL = "qlora.dev/job"
STAGE_LABEL = "qlora.dev/stage"
ARTIFACT_LABEL = "qlora.dev/artifact"
MANAGED_BY = "qlora-operator"


def labels(job: Job, task: Task | None = None) -> dict[str, str]:
    """Labels of a child of `job`; of one of `task`'s, if given."""
    said = {
        "app.kubernetes.io/name": "qlora-job",
        "app.kubernetes.io/managed-by": MANAGED_BY,
        JOB_LABEL: job.metadata.name,
    }
    if task is not None:
        said[STAGE_LABEL] = task.stage
        if task.artifact is not None:
            said[ARTIFACT_LABEL] = task.artifact
    return said


def child_metadata(job: Job, name: str, task: Task | None = None) -> dict[str, Any]:
    """Metadata of a child: the garbage collector removes it with the job."""
    return {
        "name": name,
        "namespace": job.metadata.namespace,
        "labels": labels(job, task),
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": job.metadata.name,
                "uid": job.metadata.uid,
                "controller": True,
            }
        ],
    }
