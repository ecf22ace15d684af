"""The conditions Inspected, Planned, Scheduled, Trained and Published, from what is recorded and seen."""

from __future__ import annotations

from qlora_api.exchange import Stage
from qlora_api.v1alpha1 import ConditionStatus, ConditionType, Phase, Plan
from qlora_operator.lifecycle.conditions import Situation, Stance
from qlora_operator.lifecycle.observed import Active, Job, Observed
from qlora_operator.lifecycle.pending import Wait
from qlora_operator.lifecycle.tasks import TRAIN, Task, is_done, next_number, tasks

Said = tuple[ConditionStatus, str, str]

REACHED_BY = {
    Stage.INSPECT: ConditionType.INSPECTED,
    Stage.TRAIN: ConditionType.TRAINED,
    Stage.MERGE: ConditionType.PUBLISHED,
    Stage.PUBLISH: ConditionType.PUBLISHED,
}


def in_brief(plan: Plan) -> str:
    """The plan in a few words, for people."""
    return f"{plan.recipe.method} on {f'{plan.gpus} × {plan.flavour}' if plan.gpus else 'CPU'}"


def milestones(job: Job, seen: Observed, situation: Situation, failed_at: Task | None) -> dict[ConditionType, Said]:
    """Those that are reached (True) or refused (False, with the reason); the others are left out."""
    status = job.status
    said: dict[ConditionType, Said] = {}
    if found := status.inspection:
        text = f"{found.architecture}, {found.shape.parameters:,} parameters, {found.examples:,} examples"
        if found.findings:
            text += f"; to look at: {', '.join(f'{finding.code} {finding.count:,}' for finding in found.findings)}"
        said[ConditionType.INSPECTED] = ("True", "Inspected", text)
    outdated = situation.phase is Phase.PLANNING and situation.reason != "Planned"
    if (plan := status.plan) and not outdated:
        said[ConditionType.PLANNED] = ("True", "Planned", in_brief(plan))
    elif situation.phase is Phase.PLANNING or (situation.stance is Stance.FAILED and failed_at is None):
        said[ConditionType.PLANNED] = ("False", situation.reason, situation.message)
    training = seen.attempts.get(TRAIN.job_name(job.metadata.name, next_number(status, TRAIN)))
    if is_done(status, TRAIN):
        said[ConditionType.SCHEDULED] = ("True", "Scheduled", "")
        loss = f"loss {status.progress.loss:.3f}" if status.progress and status.progress.loss is not None else ""
        said[ConditionType.TRAINED] = ("True", "Trained", loss)
    elif isinstance(training, Active):
        if training.waiting:
            why = situation.message if situation.phase is Phase.SCHEDULING else training.waiting
            said[ConditionType.SCHEDULED] = ("False", training.reason, why)
        elif training.node:
            said[ConditionType.SCHEDULED] = ("True", "Scheduled", f"on node {training.node}")
    elif situation.phase is Phase.SCHEDULING and situation.reason in set(Wait):
        said[ConditionType.SCHEDULED] = ("False", situation.reason, situation.message)
    if all(is_done(status, task) for task in tasks(job.spec)):
        said[ConditionType.PUBLISHED] = ("True", "Published", "")
    if failed_at is not None:
        said[REACHED_BY[failed_at.stage]] = ("False", situation.reason, situation.message)
    return said
