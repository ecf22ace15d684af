"""Where a job stands, in a sentence, and the step that says so."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TypeVar

from qlora_api.exchange import Stage
from qlora_api.v1alpha1 import JobStatus, Phase
from qlora_operator import planner
from qlora_operator.lifecycle import results
from qlora_operator.lifecycle.beginnings import begun
from qlora_operator.lifecycle.claims import fields_on
from qlora_operator.lifecycle.conditions import Situation, Stance, with_situation
from qlora_operator.lifecycle.milestones import milestones
from qlora_operator.lifecycle.observed import Absent, Active, Ended, Job, Observed, Stopping
from qlora_operator.lifecycle.pending import FOR_HARDWARE, Wait
from qlora_operator.lifecycle.progress import progress
from qlora_operator.lifecycle.step import Action, Step
from qlora_operator.lifecycle.tasks import TRAIN, Task, current

S = TypeVar("S", Absent, Stopping, Active, Ended)

NOW = timedelta()
SOON = timedelta(seconds=2)
WHEN_CLAIMS_CHANGE = timedelta(seconds=30)

FINISHED = (Phase.SUCCEEDED, Phase.FAILED)
PHASE_OF = {
    Stage.INSPECT: Phase.INSPECTING,
    Stage.TRAIN: Phase.TRAINING,
    Stage.MERGE: Phase.MERGING,
    Stage.PUBLISH: Phase.PUBLISHING,
}


def in_state(job: Job, seen: Observed, kind: type[S]) -> Iterator[tuple[Task, int, S]]:
    for task, n in current(job.spec, job.status):
        state = seen.attempts.get(task.job_name(job.metadata.name, n), Absent())
        if isinstance(state, kind):
            yield task, n, state


def held(job: Job, seen: Observed) -> str:
    """Which tasks are told to stop and cannot, and why; empty where none is."""
    return "; ".join(
        f"{task.name} waits: {state.held}" for task, _, state in in_state(job, seen, Stopping) if state.held
    )


def underway(job: Job, seen: Observed) -> Situation:
    """The phase is that of the earliest task under way; the message says what each does, or why it waits."""
    at_work = [(task, state) for task, _, state in in_state(job, seen, Active)]
    todo = current(job.spec, job.status)
    if job.status.inspection is not None and job.status.plan is None:
        return Situation(Phase.PLANNING, "Inspected", "inspected; planning")
    if not at_work and (why := held(job, seen)):
        stuck = PHASE_OF[next(in_state(job, seen, Stopping))[0].stage]
        return Situation(Phase.SCHEDULING if stuck is Phase.TRAINING else stuck, Wait.NODE, why)
    if not at_work:
        first = todo[0][0] if todo else None
        phase = PHASE_OF[first.stage] if first else Phase.PUBLISHING
        return Situation(phase, "Starting", f"starting {', '.join(task.name for task, _ in todo)}" if todo else "done")
    phase = PHASE_OF[at_work[0][0].stage]
    message = "; ".join(f"{task.name} {_doing(job, seen, task, state)}" for task, state in at_work)
    if not all(state.waiting for _, state in at_work):
        return Situation(phase, "Running", message)
    return Situation(Phase.SCHEDULING if phase is Phase.TRAINING else phase, at_work[0][1].reason, message)


def _doing(job: Job, seen: Observed, task: Task, state: Active) -> str:
    inspection, plan = job.status.inspection, job.status.plan
    if state.waiting and state.asked_bytes and (said := _too_large(job, seen, task, state.asked_bytes)):
        return f"waits: {state.waiting.rstrip('. ')}; {said}"
    if task == TRAIN and state.waiting and state.reason in FOR_HARDWARE and inspection and plan and plan.gpus:
        cure = planner.advice(job.spec, inspection, plan, seen.inventory, seen.installation, keep=begun(job))
        return f"waits: {state.waiting.rstrip('. ')}; {cure}"
    if state.missing_claim and (fields := fields_on(job.spec, state.missing_claim)):
        return f"waits: {', '.join(fields)}: {state.waiting}"
    return f"waits: {state.waiting}" if state.waiting else "is running"


def _too_large(job: Job, seen: Observed, task: Task, asked_bytes: int) -> str:
    """What helps a pod that asks for more memory than any node has that it may run on; empty where one has it."""
    plan = job.status.plan if task == TRAIN else None
    host = planner.largest_host(job.spec, plan, seen.inventory, seen.installation)
    if not (said := planner.too_large(asked_bytes, plan, host)):
        return ""
    if task != TRAIN:
        return f"{said}: add a larger one, or lower the chart's cpuStages"
    return f"{said}: add a larger one, or suspend the job, change spec.hardware and resume"


def fail(job: Job, seen: Observed, now: datetime, reason: str, message: str, *, at: Task | None = None) -> Step:
    situation = Situation(Phase.FAILED, reason, message, Stance.FAILED)
    return say(job, seen, now, situation, after=NOW, failed_at=at)


def say(
    job: Job,
    seen: Observed,
    now: datetime,
    situation: Situation,
    *,
    actions: tuple[Action, ...] = (),
    after: timedelta | None = None,
    failed_at: Task | None = None,
) -> Step:
    """The step that writes `situation` over what is recorded in `job.status`."""
    status = results.with_live_attempts(job, seen, now)
    status = with_situation(
        status.model_copy(update={"progress": progress(job, seen)}),
        situation,
        milestones(job, seen, situation, failed_at),
        generation=job.metadata.generation,
        now=now,
    )
    return Step(status, actions, after)


def call_refused(job: Job, reason: str, message: str, now: datetime) -> JobStatus:
    """The status of a job with which the API server did not let the operator do what it decided."""
    return say(job, Observed(), now, Situation(underway(job, Observed()).phase, reason, message)).status
