"""What a job has used up, and whether its budget allows more. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from qlora_api.exchange import Stage
from qlora_api.v1alpha1 import Attempt, Plan, Usage, duration_seconds
from qlora_operator.lifecycle.observed import Active, Job, Observed
from qlora_operator.lifecycle.tasks import TRAIN, Task, current, is_done

SECONDS_PER_HOUR = 3600


def with_run(usage: Usage | None, run: Attempt, end: datetime | None, plan: Plan | None) -> Usage:
    """`usage` and a run that ended at `end`. GPUs count while a training runs."""
    usage = usage or Usage()
    if run.started is None or end is None:
        return usage
    seconds = max(0, round((end - run.started).total_seconds()))
    gpus = plan.gpus if plan and run.stage == Stage.TRAIN else 0
    return Usage(run_seconds=usage.run_seconds + seconds, gpu_seconds=usage.gpu_seconds + gpus * seconds)


def used(job: Job, seen: Observed, now: datetime) -> Usage:
    """What is recorded, and what runs now."""
    usage = job.status.usage or Usage()
    for task, started in _running(job, seen):
        usage = with_run(usage, _run(job, task, started), now, job.status.plan)
    return usage


def exceeded(job: Job, seen: Observed, now: datetime) -> str | None:
    """What the job has used of which limit, when that is all of it."""
    limits, usage = job.spec.budget, used(job, seen, now)
    if limits is None:
        return None
    hours = usage.gpu_seconds / SECONDS_PER_HOUR
    if limits.max_gpu_hours is not None and hours >= limits.max_gpu_hours and not is_done(job.status, TRAIN):
        return f"used {hours:.4g} GPU-hours, spec.budget.maxGPUHours is {limits.max_gpu_hours:g}"
    if limits.max_runtime is not None and usage.run_seconds >= duration_seconds(limits.max_runtime):
        ran = timedelta(seconds=usage.run_seconds)
        return f"ran for {ran}, spec.budget.maxRuntime is {limits.max_runtime}"
    return None


def time_left(job: Job, seen: Observed, now: datetime) -> timedelta | None:
    """Until the budget is used up, if all goes on as it does now; None where nothing runs, limits it, or is left."""
    limits, usage, running = job.spec.budget, used(job, seen, now), _running(job, seen)
    left: list[float] = []
    if limits is None or not running:
        return None
    gpus = job.status.plan.gpus if job.status.plan and any(task == TRAIN for task, _ in running) else 0
    if limits.max_gpu_hours is not None and gpus:
        left.append((limits.max_gpu_hours * SECONDS_PER_HOUR - usage.gpu_seconds) / gpus)
    if limits.max_runtime is not None:
        left.append((duration_seconds(limits.max_runtime) - usage.run_seconds) / len(running))
    return timedelta(seconds=min(left)) if left and min(left) > 0 else None


def _running(job: Job, seen: Observed) -> list[tuple[Task, datetime]]:
    states = (
        (task, seen.attempts.get(task.job_name(job.metadata.name, n))) for task, n in current(job.spec, job.status)
    )
    return [(task, state.started) for task, state in states if isinstance(state, Active) and state.started]


def _run(job: Job, task: Task, started: datetime) -> Attempt:
    return Attempt(number=1, stage=task.stage, artifact=task.artifact, job=job.metadata.name, started=started)
