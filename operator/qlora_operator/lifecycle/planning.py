"""Policies for the plan: what this version can do at all, where it is to run, and the rest at it."""

from __future__ import annotations

from datetime import datetime

from qlora_api.support import unsupported
from qlora_api.v1alpha1 import JobStatus, Phase, Plan, Progress
from qlora_operator import planner
from qlora_operator.lifecycle import results
from qlora_operator.lifecycle.answers import Outcome
from qlora_operator.lifecycle.beginnings import begun
from qlora_operator.lifecycle.conditions import Situation, Stance
from qlora_operator.lifecycle.milestones import in_brief
from qlora_operator.lifecycle.observed import Active, Job, Observed
from qlora_operator.lifecycle.progress import percent
from qlora_operator.lifecycle.standing import FINISHED, NOW, SOON, fail, in_state, say
from qlora_operator.lifecycle.step import Step, Stop
from qlora_operator.lifecycle.tasks import TRAIN, is_done


def spec_asks_for_what_is_not_built(job: Job, seen: Observed, now: datetime) -> Step | None:
    """A field that this version would ignore is refused instead."""
    if not (sentences := unsupported(job.spec)):
        return None
    if job.status.attempts:  # edited on its way: nothing is lost, it goes on when the edit is taken back
        situation = Situation(job.status.phase or Phase.PENDING, "NotSupported", "; ".join(sentences), Stance.FAILED)
        stopped = [Stop(task, n) for task, n, _ in in_state(job, seen, Active) if job.spec.suspend]
        return say(job, seen, now, situation, actions=tuple(stopped))
    return fail(job, seen, now, "NotSupported", "; ".join(sentences))


def is_to_be_planned(job: Job) -> bool:
    """Whether the cluster's nodes are to be looked at for a plan, the first or another."""
    plan = job.status.plan
    if job.status.inspection is None or job.status.phase in FINISHED or is_done(job.status, TRAIN):
        return False
    return plan is None or plan.planned_for != planned_for(job)


def plan_is_missing(job: Job, seen: Observed, now: datetime) -> Step | None:
    """Size and place; anew when hardware or pod template were edited while suspended."""
    inspection = job.status.inspection
    if inspection is None or not is_to_be_planned(job):
        return None
    if running := [(task, n) for task, n, _ in in_state(job, seen, Active) if task == TRAIN]:
        situation = Situation(Phase.PLANNING, "Replanning", "stopping train, with a checkpoint, to plan it anew")
        return say(job, seen, now, situation, actions=tuple(Stop(*attempt) for attempt in running), after=SOON)
    made = planner.plan(job.spec, inspection, seen.inventory, seen.installation, keep=begun(job))
    if isinstance(made, Plan):
        made = _not_larger_than_what_fitted(made, job.status)
        planned = job.status.model_copy(
            update={
                "plan": made.model_copy(update={"planned_for": planned_for(job)}),
                "progress": Progress(percent=percent(job.spec, job.status), steps=made.steps),
            }
        )
        message = f"planned: {in_brief(made)}, micro-batch {made.micro_batch_size}"
        situation = Situation(Phase.PLANNING, "Planned", message)
        return say(Job(job.metadata, job.spec, planned), seen, now, situation, after=NOW)
    if made.final and job.status.plan is None:
        return fail(job, seen, now, made.reason, made.message)
    # no time to look again: it is queued when nodes change, or when the edit that left it without a plan is taken back
    return say(job, seen, now, Situation(Phase.PLANNING, made.reason, made.message))


def _not_larger_than_what_fitted(made: Plan, status: JobStatus) -> Plan:
    """On GPUs that a training ran out of memory on, it takes no more than it was brought down to, and than `made`."""
    old = status.plan
    ran_out = any(attempt.outcome == Outcome.OUT_OF_MEMORY for attempt in status.attempts)
    if old is None or not ran_out or made.micro_batch_size < old.micro_batch_size:
        return made
    if (old.flavour, old.gpus) != (made.flavour, made.gpus) or status.inspection is None:
        return made
    alike = made.model_copy(update={"sharded": old.sharded})
    brought_down = planner.resized(alike, status.inspection, old.recipe, old.micro_batch_size)
    return min(brought_down, made, key=lambda plan: plan.memory.total_bytes)


def planned_for(job: Job) -> str:
    """Fingerprint of the parts of the spec that a plan depends on and that may change."""
    parts = (job.spec.hardware, job.spec.pod_template)
    return results.fingerprint(*(part.model_dump(mode="json", exclude_defaults=True) for part in parts))


def rests_at_its_plan(job: Job, seen: Observed, now: datetime) -> Step | None:
    """`planOnly`: the plan is what was asked for."""
    if not job.spec.plan_only:
        return None
    message = "planned; set spec.planOnly to false to go on"
    return say(job, seen, now, Situation(Phase.PLANNED, "PlanReady", message, Stance.READY))
