"""The order of each stage, from what is recorded, and the ConfigMap that carries it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from qlora_api.exchange import (
    CANARY_FIELD,
    EVAL_FIELD,
    GOLDEN_FIELD,
    ORDER_PATH,
    WORK_MOUNT,
    DataOrder,
    DataSource,
    EvaluationOrder,
    GateOrder,
    Inspection,
    InspectOrder,
    JudgeOrder,
    MergeOrder,
    Order,
    PublishOrder,
    Stage,
    TrainOrder,
    is_claim,
    train_field,
)
from qlora_api.heads import takes_loss_in_tiles
from qlora_api.v1alpha1 import Plan, duration_seconds, spec
from qlora_operator.lifecycle.observed import Job
from qlora_operator.lifecycle.results import fingerprint
from qlora_operator.lifecycle.tasks import Task
from qlora_operator.manifests.names import child_metadata
from qlora_operator.manifests.reporting import AUTHORITY_KEY, Endpoint
from qlora_operator.settings import Settings

ORDER_KEY = PurePosixPath(ORDER_PATH).name


def config_map(
    job: Job, task: Task, attempt: int, settings: Settings, endpoint: Endpoint | None = None
) -> dict[str, Any]:
    """The immutable ConfigMap with the attempt's order, and for train with whom to trust at the progress endpoint."""
    data = {ORDER_KEY: order(job, task, attempt, settings).to_json()}
    if endpoint is not None and task.stage is Stage.TRAIN:
        data[AUTHORITY_KEY] = endpoint.authority
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(job, task.job_name(job.metadata.name, attempt), task),
        "immutable": True,
        "data": data,
    }


def order(job: Job, task: Task, attempt: int, settings: Settings) -> Order:
    """The order of `task`'s attempt. Raises LookupError when what it builds on is not recorded yet."""
    envelope = {
        "namespace": job.metadata.namespace,
        "job": job.metadata.name,
        "job_uid": job.metadata.uid,
        "attempt": attempt,
        "work_dir": f"{WORK_MOUNT}/{job.metadata.name}.{job.metadata.uid[:8]}",
    }
    return _ORDERS[task.stage](job, task, settings, envelope)


def _inspect(job: Job, task: Task, settings: Settings, envelope: dict[str, Any]) -> InspectOrder:
    dataset = job.spec.dataset
    return InspectOrder(
        **envelope,
        **_model(job),
        data=_data(job),
        max_length=dataset.max_length,
        packing=dataset.packing,
        loss=dataset.loss,
        answer_schema=job.spec.evaluation.answer_schema,
        **_output_store(job),
    )


def _train(job: Job, task: Task, settings: Settings, envelope: dict[str, Any]) -> TrainOrder:
    inspection, plan = _inspection(job), _plan(job)
    return TrainOrder(
        **envelope,
        **_model(job),
        model_digest=inspection.model_digest,
        data=_data(job),
        data_digest=inspection.data_digest,
        recipe=plan.recipe,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation=plan.gradient_accumulation,
        accelerator=plan.accelerator,
        nodes=plan.nodes,
        ranks_per_node=max(1, plan.gpus_per_node),
        sharded=plan.sharded,
        fused_loss=takes_loss_in_tiles(inspection.shape),
        cpu_allowed=settings.cpu_allowed,
        checkpoint_every_seconds=duration_seconds(job.spec.checkpoint.every),
        checkpoint_keep=job.spec.checkpoint.keep,
        evaluation=_evaluation(job),
    )


def _merge(job: Job, task: Task, settings: Settings, envelope: dict[str, Any]) -> MergeOrder:
    return MergeOrder(
        **envelope,
        **_model(job),
        model_digest=_inspection(job).model_digest,
        recipe=_plan(job).recipe,
        adapter_digest=_artifact_digest(job, "adapter"),
        merge_base=job.spec.output.merge_base,
    )


def _publish(job: Job, task: Task, settings: Settings, envelope: dict[str, Any]) -> PublishOrder:
    inspection, plan = _inspection(job), _plan(job)
    if (artifact := task.artifact) is None:
        raise LookupError("publish without an artifact")
    return PublishOrder(
        **envelope,
        artifact=artifact,
        artifact_digest=_artifact_digest(job, artifact),
        output_uri=f"{job.spec.output.uri.rstrip('/')}/{artifact}",
        output_secret=_secret(job.spec.output.credentials_secret_ref),
        overwrite=job.spec.output.overwrite,
        provenance={
            "job": f"{job.metadata.namespace}/{job.metadata.name}",
            "jobUid": job.metadata.uid,
            "model": {"uri": job.spec.model.uri, "digest": inspection.model_digest}
            | ({"revision": inspection.model_revision} if inspection.model_revision else {}),
            "data": {"uris": [source.uri for source in job.spec.dataset.train], "digest": inspection.data_digest}
            | ({"revisions": inspection.data_revisions} if inspection.data_revisions else {}),
            "recipe": plan.recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
            "recipeDigest": fingerprint(plan.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)),
            "mergeBase": job.spec.output.merge_base if artifact == "merged" else None,
            "image": settings.image_of(job.spec),
        },
    )


_ORDERS: dict[Stage, Callable[[Job, Task, Settings, dict[str, Any]], Order]] = {
    Stage.INSPECT: _inspect,
    Stage.TRAIN: _train,
    Stage.MERGE: _merge,
    Stage.PUBLISH: _publish,
}


def _model(job: Job) -> dict[str, Any]:
    """Where the model is. What inspection has read is what the later stages read, wherever its branch has moved."""
    model, found = job.spec.model, job.status.inspection
    return {
        "model_uri": model.uri,
        "model_revision": (found and found.model_revision) or model.revision,
        "model_secret": _secret(model.credentials_secret_ref),
    }


def _data(job: Job) -> DataOrder:
    dataset = job.spec.dataset
    golden, canary = job.spec.evaluation.golden, job.spec.evaluation.canary
    seen = job.status.inspection.data_revisions if job.status.inspection else {}
    return DataOrder(
        train=[
            _source(source, seen.get(train_field(index))).model_copy(update={"weight": source.weight})
            for index, source in enumerate(dataset.train)
        ],
        eval=_source(dataset.eval, seen.get(EVAL_FIELD)) if dataset.eval else None,
        eval_fraction=dataset.eval_fraction,
        golden=_source(golden, seen.get(GOLDEN_FIELD)) if golden else None,
        canary=_source(canary, seen.get(CANARY_FIELD)) if canary else None,
        log_samples=dataset.log_samples,
    )


def _evaluation(job: Job) -> EvaluationOrder:
    asked = job.spec.evaluation
    judge = asked.judge and JudgeOrder(
        endpoint=asked.judge.endpoint, model=asked.judge.model, secret=_secret(asked.judge.credentials_secret_ref)
    )
    return EvaluationOrder(
        metrics=list(asked.metrics),
        answer_schema=asked.answer_schema,
        gates=[GateOrder(**gate.model_dump()) for gate in asked.gates or ()],
        judge=judge,
    )


def _source(source: spec.DataSource, commit: str | None) -> DataSource:
    return DataSource(
        uri=source.uri,
        revision=commit or source.revision,
        format=source.format,
        secret=_secret(source.credentials_secret_ref),
    )


def _secret(reference: spec.SecretRef | None) -> str | None:
    return reference.name if reference else None


def _output_store(job: Job) -> dict[str, Any]:
    """Inspect tries the store that the results go to; a claim is mounted when there is something to write."""
    output = job.spec.output
    if is_claim(output.uri):
        return {}
    return {"output_uri": output.uri, "output_secret": _secret(output.credentials_secret_ref)}


def _inspection(job: Job) -> Inspection:
    if job.status.inspection is None:
        raise LookupError("the inspection is not recorded")
    return job.status.inspection


def _plan(job: Job) -> Plan:
    if job.status.plan is None:
        raise LookupError("the plan is not recorded")
    return job.status.plan


def _artifact_digest(job: Job, name: str) -> str:
    for artifact in job.status.artifacts:
        if artifact.name == name and artifact.digest:
            return artifact.digest
    raise LookupError(f"the artifact {name} is not recorded")
