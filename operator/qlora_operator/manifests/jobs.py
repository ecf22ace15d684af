"""The batch/v1 Job of each stage: one restricted pod without API rights, that runs the trainer image on an order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from qlora_api.exchange import (
    CLAIMS_MOUNT,
    CREDENTIALS_MOUNT,
    ORDER_PATH,
    SCRATCH_GIB,
    WORK_MOUNT,
    ExitCode,
    Stage,
    claim_of,
    is_claim,
)
from qlora_api.v1alpha1 import spec
from qlora_operator.lifecycle.answers import ANOTHER_NODE
from qlora_operator.lifecycle.attempting import template_of
from qlora_operator.lifecycle.changes import memory_factor
from qlora_operator.lifecycle.observed import CONTAINER, QUEUE_LABEL, TEMPLATE, Job
from qlora_operator.lifecycle.tasks import TRAIN, Task, ended
from qlora_operator.lifecycle.volumes import work_claim
from qlora_operator.manifests import gpus, ranks, reporting
from qlora_operator.manifests.names import child_metadata, labels
from qlora_operator.manifests.orders import ORDER_KEY
from qlora_operator.manifests.reporting import Endpoint
from qlora_operator.placement.flavours import MIB
from qlora_operator.placement.nodes import amount
from qlora_operator.planner import CPU, GPU_TOLERATIONS
from qlora_operator.settings import Settings

USER = 65532
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
SCRATCH_LIMIT = f"{SCRATCH_GIB}Gi"
SCRATCH_MOUNT = "/tmp"
SECRET_MODE = 0o440  # for the pod's group, which fsGroup makes the owner

#: A pod lost to a disruption is replaced by the Job controller; every other end is an attempt's end, and the
#: operator's to answer. Exit codes that are never retried are named, so that the Job's own condition says so too.
POD_FAILURE_POLICY: dict[str, Any] = {
    "rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": CONTAINER,
                "operator": "In",
                "values": sorted(int(code) for code in ExitCode if code and not code.retried),
            },
        },
    ]
}

CONTAINER_SECURITY: dict[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
}


def stage_job(
    job: Job, task: Task, attempt: int, settings: Settings, endpoint: Endpoint | None = None
) -> dict[str, Any]:
    """The Job that runs `task`'s attempt; its order is the ConfigMap of the same name. Only train reports progress."""
    endpoint = endpoint if task.stage is Stage.TRAIN else None
    name = task.job_name(job.metadata.name, attempt)
    metadata = child_metadata(job, name, task)
    metadata["labels"] |= _queue_labels(job, task)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {**metadata, "annotations": {TEMPLATE: template_of(job)}},
        "spec": {
            "backoffLimit": 0,
            "podFailurePolicy": POD_FAILURE_POLICY,
            "podReplacementPolicy": "Failed",  # never two pods at one work directory
            **ranks.indexed(job.status.plan if task == TRAIN else None),
            "template": {"metadata": _pod_metadata(job, task), "spec": _pod(job, task, name, settings, endpoint)},
        },
    }


def _queue_labels(job: Job, task: Task) -> dict[str, str]:
    """Kueue's, for the training: it suspends the Job until there is room, and puts its flavour's selectors in."""
    queue = job.spec.queue
    if queue is None or task != TRAIN:
        return {}
    labels = {QUEUE_LABEL: queue.name}
    return labels | ({PRIORITY_LABEL: queue.priority_class} if queue.priority_class else {})


def _pod_metadata(job: Job, task: Task) -> dict[str, Any]:
    template = job.spec.pod_template
    metadata: dict[str, Any] = {"labels": {**(template.labels or {}), **labels(job, task)}}
    if template.annotations:
        metadata["annotations"] = dict(template.annotations)
    return metadata


def _pod(job: Job, task: Task, order: str, settings: Settings, endpoint: Endpoint | None) -> dict[str, Any]:
    template = job.spec.pod_template
    on_gpu = task.stage is Stage.TRAIN and job.spec.hardware.accelerator != CPU
    plan = job.status.plan if on_gpu else None
    mounts = _mounts(job, task, order, endpoint)
    if plan is not None and plan.gpus > 1:
        mounts.append((gpus.SHARED_MEMORY, {"name": gpus.SHARED_MEMORY["name"], "mountPath": "/dev/shm"}))
    environment = {**(reporting.environment(job, endpoint) if endpoint else {}), **settings.stage_env}
    pull_secrets = [*settings.image_pull_secrets, *(s.name for s in template.image_pull_secrets or ())]
    tolerations = [
        *settings.tolerations,
        *(t.to_api() for t in template.tolerations or ()),
        *(GPU_TOLERATIONS if on_gpu else ()),
    ]
    optional = {
        "affinity": gpus.affinity(plan, job, _unfit_nodes(job, task)),
        "imagePullSecrets": [{"name": secret} for secret in dict.fromkeys(pull_secrets)],
        "nodeSelector": dict(template.node_selector or {}),
        "resourceClaims": [{"name": gpus.CLAIM, "resourceClaimTemplateName": order}]
        if plan is not None and gpus.uses_dra(job)
        else None,
        "subdomain": order if plan is not None and plan.nodes > 1 else None,
        "priorityClassName": template.priority_class_name,
        "runtimeClassName": template.runtime_class_name if on_gpu else None,
        "serviceAccountName": template.service_account_name,
        "tolerations": tolerations,
    }
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": CONTAINER,
                "image": settings.image_of(job.spec, trains=task == TRAIN),
                "imagePullPolicy": settings.image_pull_policy,
                "env": [
                    *({"name": key, "value": value} for key, value in sorted(environment.items())),
                    *ranks.environment(plan, order, settings.grace_seconds),
                ],
                **({"ports": [reporting.PORT]} if task.stage is Stage.TRAIN else {}),
                "resources": _resources(job, task, settings, on_gpu=on_gpu),
                "securityContext": CONTAINER_SECURITY,
                "terminationMessagePolicy": "File",  # logs may hold data, and the status has other readers
                "volumeMounts": [mount for _, mount in mounts],
            }
        ],
        "volumes": [
            {"name": "order", "configMap": {"name": order, "items": [{"key": ORDER_KEY, "path": ORDER_KEY}]}},
            *(volume for volume, _ in mounts if volume["name"] != "order"),
        ],
        **{key: value for key, value in optional.items() if value},
    }


def _resources(job: Job, task: Task, settings: Settings, *, on_gpu: bool) -> dict[str, Any]:
    stage = settings.train_stage if task.stage is Stage.TRAIN else settings.cpu_stages
    requests, limits = dict(stage.requests), dict(stage.limits)
    plan = job.status.plan if task.stage is Stage.TRAIN else None
    if plan is not None:
        requests["memory"] = f"{-(-plan.host_memory_bytes // MIB)}Mi"
    if (factor := memory_factor(job, task)) > 1:
        for amounts in (requests, limits):
            if "memory" in amounts:
                amounts["memory"] = f"{round(amount(amounts['memory']) * factor / MIB)}Mi"
    if plan is not None and on_gpu:
        limits |= gpus.limits(plan, job)
    claims = {"claims": [{"name": gpus.CLAIM}]} if on_gpu and gpus.uses_dra(job) else {}
    return {"requests": requests, "limits": limits, **claims}


def _unfit_nodes(job: Job, task: Task) -> list[str]:
    """Nodes on which an attempt at the task has ended such that another one is to be preferred, sorted."""
    unfit = (a.node for a in ended(job.status, task) if a.outcome in ANOTHER_NODE and a.node)
    return sorted(set(unfit))


Mount = tuple[dict[str, Any], dict[str, Any]]


def _mounts(job: Job, task: Task, order: str, endpoint: Endpoint | None) -> list[Mount]:
    """Volume and mount of all that the stage reads and writes: read-only what it only reads."""
    order_dir = str(PurePosixPath(ORDER_PATH).parent)
    mounts: list[Mount] = [
        ({"name": "order"}, {"name": "order", "mountPath": order_dir, "readOnly": True}),
        (
            {"name": "scratch", "emptyDir": {"sizeLimit": SCRATCH_LIMIT}},
            {"name": "scratch", "mountPath": SCRATCH_MOUNT},
        ),
        (_work_volume(job, task), {"name": "work", "mountPath": WORK_MOUNT}),
    ]
    if endpoint is not None:
        mounts.append((reporting.volume(order), reporting.MOUNT))
    places, output = _places(job, task), job.spec.output.uri
    writes = claim_of(output)[0] if task.stage is Stage.PUBLISH and is_claim(output) else None
    for claim in sorted({claim_of(place.uri)[0] for place in places if is_claim(place.uri)}):
        read_only = claim != writes
        source = {"claimName": claim} | ({"readOnly": True} if read_only else {})
        mount = {"name": f"claim-{len(mounts)}", "mountPath": f"{CLAIMS_MOUNT}/{claim}"}
        volume = {"name": mount["name"], "persistentVolumeClaim": source}
        mounts.append((volume, mount | ({"readOnly": True} if read_only else {})))
    references = [place.credentials_secret_ref for place in places if not is_claim(place.uri)]
    if task == TRAIN and (judge := job.spec.evaluation.judge):
        references.append(judge.credentials_secret_ref)
    for secret in sorted({reference.name for reference in references if reference}):
        name = f"credentials-{len(mounts)}"
        # optional: where it is missing the stage itself says so; a pod that waits for a volume says it in an event only
        source = {"secretName": secret, "defaultMode": SECRET_MODE, "optional": True}
        mount = {"name": name, "mountPath": f"{CREDENTIALS_MOUNT}/{secret}", "readOnly": True}
        mounts.append(({"name": name, "secret": source}, mount))
    return mounts


def _work_volume(job: Job, task: Task) -> dict[str, Any]:
    """Inspect gets scratch only: the volume is claimed once its size is known, and train is its first consumer."""
    if task.stage is Stage.INSPECT:
        return {"name": "work", "emptyDir": {"sizeLimit": SCRATCH_LIMIT}}
    return {"name": "work", "persistentVolumeClaim": {"claimName": work_claim(job)}}


def _places(job: Job, task: Task) -> Sequence[spec.ModelSource | spec.DataSource | spec.Output]:
    """Where the stage reads and writes, besides the work volume."""
    of = job.spec
    held_out = (of.dataset.eval, of.evaluation.golden, of.evaluation.canary)
    data = [*of.dataset.train, *(source for source in held_out if source)]
    return {
        # inspect tries the store that publish will write to; a claim it does not need
        Stage.INSPECT: [of.model, *data, *([] if is_claim(of.output.uri) else [of.output])],
        Stage.TRAIN: [of.model, *data],
        Stage.MERGE: [of.model],
        Stage.PUBLISH: [of.output],
    }[task.stage]
