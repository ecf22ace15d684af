"""How an attempt's end changes what is recorded: the attempt itself, and the result that it brought."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any

from qlora_api.exchange import RESULT_OF, Inspection, MergeResult, PublishResult, TrainResult
from qlora_api.v1alpha1 import Artifact, Attempt, EvaluationResult, JobStatus, Progress
from qlora_operator.lifecycle import budget
from qlora_operator.lifecycle.answers import Outcome, outcome
from qlora_operator.lifecycle.observed import Active, Ended, Job, Observed
from qlora_operator.lifecycle.tasks import Task, current

MESSAGE_MAX = 1000


def fingerprint(*parts: Any) -> str:
    """`sha256:…` of JSON values."""
    return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"


def recorded(status: JobStatus, job: str, task: Task, n: int, seen: Ended, step: int | None = None) -> JobStatus:
    """`status` with the ended attempt `n` of `task`, at whose end the training had come to `step`, and with its result
    if it has one."""
    how = outcome(seen)
    failure = seen.report.failure if seen.report and seen.report.failure else seen.detail
    attempt = Attempt(
        number=n,
        stage=task.stage,
        artifact=task.artifact,
        job=task.job_name(job, n),
        node=seen.node,
        started=seen.started,
        ended=seen.ended,
        outcome=how,
        exit_code=seen.exit_code,
        message=None if how is Outcome.SUCCEEDED else (failure or None) and failure[:MESSAGE_MAX],
        step=step,
    )
    others = tuple(a for a in status.attempts if a.job != attempt.job)
    usage = budget.with_run(status.usage, attempt, attempt.ended, status.plan)
    status = status.model_copy(update={"attempts": (*others, attempt), "usage": usage})
    if how not in (Outcome.SUCCEEDED, Outcome.GATE_FAILED) or seen.report is None or seen.report.result is None:
        return status
    result = RESULT_OF[task.stage].model_validate(seen.report.result)
    return _with_result(status, task, result)


def _with_result(
    status: JobStatus, task: Task, result: Inspection | TrainResult | MergeResult | PublishResult
) -> JobStatus:
    match result:
        case Inspection():
            return status.model_copy(update={"inspection": result})
        case TrainResult():
            return _trained(status, result)
        case MergeResult():
            merged = Artifact(
                name="merged", state="Made", digest=result.digest, bytes=result.bytes, parity=result.parity
            )
            return _with_artifact(status, merged)
        case PublishResult():
            made = next(a for a in status.artifacts if a.name == task.artifact)
            return _with_artifact(status, made.model_copy(update={"state": "Published", "uri": result.uri}))


def _trained(status: JobStatus, result: TrainResult) -> JobStatus:
    progress = Progress(
        step=result.steps,
        steps=result.steps,
        epoch=round(result.epochs, 2),
        loss=round(result.train_loss, 4),
        eval_loss=None if result.eval_loss is None else round(result.eval_loss, 4),
        tokens_per_second=round(result.tokens_per_second),
        mfu=None if result.mfu is None else round(result.mfu, 3),
        remaining="0s",
    )
    update: dict[str, Any] = {"progress": progress}
    if result.scores or result.selected_step is not None or result.stopped_early:
        update["evaluation"] = EvaluationResult(
            scores=tuple(result.scores),
            gates=tuple(result.gates),
            selected_step=result.selected_step,
            stopped_early=result.stopped_early,
        )
    if status.plan is not None:
        memory = status.plan.memory.model_copy(update={"measured_bytes": result.peak_memory_bytes})
        update["plan"] = status.plan.model_copy(update={"memory": memory})
    status = status.model_copy(update=update)
    adapter = Artifact(name="adapter", state="Made", digest=result.adapter_digest, bytes=result.adapter_bytes)
    return _with_artifact(status, adapter)


def _with_artifact(status: JobStatus, artifact: Artifact) -> JobStatus:
    artifacts = {a.name: a for a in status.artifacts} | {artifact.name: artifact}
    return status.model_copy(update={"artifacts": tuple(artifacts.values())})


def with_live_attempts(job: Job, seen: Observed, now: datetime) -> JobStatus:
    """The recorded attempts, and after them those that are at work on a node.

    A run that was at work and is not any more, without having ended (suspended, or its pod replaced), is counted here.
    """
    over = tuple(a for a in job.status.attempts if a.outcome)
    live: list[Attempt] = []
    for task, n in current(job.spec, job.status):
        name = task.job_name(job.metadata.name, n)
        state = seen.attempts.get(name)
        if isinstance(state, Active) and state.node:
            live.append(
                Attempt(
                    number=n, stage=task.stage, artifact=task.artifact, job=name, node=state.node, started=state.started
                )
            )
    running = {(attempt.job, attempt.started) for attempt in live}
    usage = job.status.usage
    for attempt in job.status.attempts:
        if not attempt.outcome and (attempt.job, attempt.started) not in running:
            usage = budget.with_run(usage, attempt, now, job.status.plan)
    return job.status.model_copy(update={"attempts": (*over, *live), "usage": usage})
