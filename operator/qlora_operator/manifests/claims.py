"""The claim of the work volume."""

from __future__ import annotations

from typing import Any

from qlora_operator.lifecycle.observed import Job
from qlora_operator.lifecycle.volumes import work_claim
from qlora_operator.manifests.names import child_metadata
from qlora_operator.placement.flavours import MIB
from qlora_operator.settings import Settings


def work_volume_claim(job: Job, settings: Settings) -> dict[str, Any]:
    """The claim, as large as the plan says or the user wants. Raises LookupError when there is no plan yet."""
    if job.status.plan is None:
        raise LookupError("the plan is not recorded")
    storage = job.spec.storage
    size = storage.size or f"{-(-job.status.plan.disk_bytes // MIB)}Mi"
    storage_class = storage.class_name or settings.storage_class
    mode = "ReadWriteMany" if job.status.plan.nodes > 1 else "ReadWriteOnce"
    spec: dict[str, Any] = {"accessModes": [mode], "resources": {"requests": {"storage": size}}}
    if storage_class:
        spec["storageClassName"] = storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": child_metadata(job, work_claim(job)),
        "spec": spec,
    }
