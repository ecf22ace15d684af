"""Policies for the end of a job, and for what is left of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from qlora_api.exchange import Stage
from qlora_api.v1alpha1 import JobStatus, Phase
from qlora_operator.lifecycle import budget
from qlora_operator.lifecycle.answers import KEEPS_VOLUME
from qlora_operator.lifecycle.conditions import Situation, Stance
from qlora_operator.lifecycle.observed import Active, Job, Observed, Stopping
from qlora_operator.lifecycle.standing import FINISHED, NOW, SOON, fail, held, in_state, say, underway
from qlora_operator.lifecycle.step import Action, DeleteWorkVolume, Remove, Step, Stop
from qlora_operator.lifecycle.tasks import TRAIN, current, is_done, tasks


def job_is_over(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Stop what a failed job still runs, and give the work volume back unless it is to be kept. Nothing else, ever."""
    if job.status.phase not in FINISHED:
        return None
    actions: list[Action] = [Stop(task, n) for task, n, _ in in_state(job, seen, Active)]
    status = job.status.model_copy(update={"attempts": tuple(a for a in job.status.attempts if a.outcome)})
    volume = status.work_volume
    if volume and volume.retained and not _is_kept(job):
        # a claim stays in use for as long as a pod that mounted it exists, be it finished
        mounted = [a for a in status.attempts if a.stage != Stage.INSPECT]
        actions += [Stop(task, a.number) for a in mounted for task in tasks(job.spec) if task.is_of(a)]
        actions.append(DeleteWorkVolume())
        left = tuple(artifact for artifact in status.artifacts if artifact.state == "Published")
        gone = volume.model_copy(update={"retained": False})
        status = status.model_copy(update={"work_volume": gone, "artifacts": left})
    # suspend may still be edited, to no effect
    status = status.model_copy(update={"observed_generation": job.metadata.generation})
    left = _until_cleanup(job, now)
    if left is not None and left <= NOW:
        return Step(*_cleaned_up(job, status, now))
    return Step(status, tuple(actions), left)


def _until_cleanup(job: Job, now: datetime) -> timedelta | None:
    """Until what is left of a finished job is to be deleted; None where nothing is, or where it is done."""
    ttl, end = job.spec.ttl_seconds_after_finished, job.status.completion_time
    if ttl is None or end is None or job.status.cleanup_time is not None:
        return None
    return end + timedelta(seconds=ttl) - now


def _cleaned_up(job: Job, status: JobStatus, now: datetime) -> tuple[JobStatus, tuple[Action, ...]]:
    """Everything that was made for the job goes, but for what is published, and a volume that is to be kept."""
    actions: list[Action] = [
        Remove(task, a.number) for a in status.attempts for task in tasks(job.spec) if task.is_of(a)
    ]
    actions += [Remove(task, n) for task, n in current(job.spec, status)]  # one that was stopped has left its order
    update: dict[str, Any] = {"cleanup_time": now.replace(microsecond=0)}
    volume, storage = job.status.work_volume, job.spec.storage
    if volume and storage.claim_name is None and storage.retain != "Keep":
        actions.append(DeleteWorkVolume())
        update["work_volume"] = volume.model_copy(update={"retained": False})
        update["artifacts"] = tuple(artifact for artifact in status.artifacts if artifact.state == "Published")
    return status.model_copy(update=update), tuple(actions)


def everything_is_published(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Done: every task has succeeded."""
    if not all(is_done(job.status, task) for task in tasks(job.spec)):
        return None
    where = ", ".join(f"{artifact.name} at {artifact.uri}" for artifact in job.status.artifacts if artifact.uri)
    return say(job, seen, now, Situation(Phase.SUCCEEDED, "Published", f"published {where}", Stance.READY), after=NOW)


def budget_is_used_up(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Stop what runs, with a checkpoint; then the job has failed. (A suspended job's budget may still be edited.)"""
    used_up = None if job.spec.suspend else budget.exceeded(job, seen, now)
    if used_up is None:
        return None
    running = [(task, n) for task, n, _ in in_state(job, seen, Active)]
    if running or any(in_state(job, seen, Stopping)):
        message = "; ".join(filter(None, (f"{used_up}; stopping, with a checkpoint", held(job, seen))))
        situation = Situation(underway(job, seen).phase, "BudgetExceeded", message)
        return say(job, seen, now, situation, actions=tuple(Stop(*attempt) for attempt in running), after=SOON)
    return fail(job, seen, now, "BudgetExceeded", f"{used_up}{_where_the_checkpoint_is(job)}")


def _where_the_checkpoint_is(job: Job) -> str:
    progress, volume = job.status.progress, job.status.work_volume
    if is_done(job.status, TRAIN) or volume is None or progress is None or not progress.step:
        return ""
    kept = "is kept on" if _keeps_after_failure(job) else "goes with"
    at = f"step {progress.step} of {progress.steps}"
    return f"; training was at {at}, its checkpoint {kept} the claim {volume.claim_name}"


def in_time_for_the_budget(step: Step, job: Job, seen: Observed, now: datetime) -> Step:
    """`step`, looking again when the budget will be used up at the latest."""
    left = budget.time_left(job, seen, now)
    if left is None or step.status.phase in FINISHED:
        return step
    return replace(step, after=left if step.after is None else min(left, step.after))


def _is_kept(job: Job) -> bool:
    return _keeps_after_failure(job) if job.status.phase is Phase.FAILED else _keeps_after_success(job)


def _keeps_after_success(job: Job) -> bool:
    return job.spec.storage.claim_name is not None or job.spec.storage.retain == "Keep"


def _keeps_after_failure(job: Job) -> bool:
    full = any(attempt.outcome in KEEPS_VOLUME for attempt in job.status.attempts)
    return _keeps_after_success(job) or job.spec.storage.retain == "OnFailure" or full
