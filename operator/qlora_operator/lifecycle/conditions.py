"""The status' conditions and phase, as a function of what is recorded and of where the job stands.

kstatus (Flux, Argo CD, helm --wait) reads Reconciling, Stalled and Ready; a job is `Failed` for it only when Stalled.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from qlora_api.v1alpha1 import Condition, ConditionType, JobStatus, Phase, Severity

MESSAGE_MAX = 2000


class Stance(Enum):
    """What the operator is about with a job."""

    WORKING = "working"  # something is under way or waited for
    RESTING = "resting"  # asked to rest: suspended
    READY = "ready"  # what was asked for is there
    FAILED = "failed"  # given up


@dataclass(frozen=True)
class Situation:
    """Where a job stands: the phase for people, reason and message for the conditions."""

    phase: Phase
    reason: str
    message: str
    stance: Stance = Stance.WORKING


#: Ready, Reconciling and Stalled for each stance.
_KSTATUS: dict[Stance, tuple[Severity, Severity, Severity]] = {
    Stance.WORKING: ("False", "True", "False"),
    Stance.RESTING: ("False", "False", "False"),
    Stance.READY: ("True", "False", "False"),
    Stance.FAILED: ("False", "False", "True"),
}
_MILESTONES = (
    ConditionType.INSPECTED,
    ConditionType.PLANNED,
    ConditionType.SCHEDULED,
    ConditionType.TRAINED,
    ConditionType.PUBLISHED,
)


def with_situation(
    status: JobStatus,
    situation: Situation,
    milestones: dict[ConditionType, tuple[Severity, str, str]],
    *,
    generation: int,
    now: datetime,
) -> JobStatus:
    """`status` saying `situation`; a condition's transition time moves only when its status does.

    `milestones` gives (status, reason, message) of those that are reached or refused; the others are Unknown.
    """
    message = situation.message[:MESSAGE_MAX]
    ready, reconciling, stalled = _KSTATUS[situation.stance]
    said: dict[ConditionType, tuple[Severity, str, str]] = {
        ConditionType.READY: (ready, situation.reason, message),
        ConditionType.RECONCILING: (reconciling, situation.reason, message if reconciling == "True" else ""),
        ConditionType.STALLED: (stalled, situation.reason, message if stalled == "True" else ""),
    }
    for milestone in _MILESTONES:
        said[milestone] = milestones.get(milestone, ("Unknown", "NotYet", ""))
    if situation.phase is Phase.SUSPENDED:
        said[ConditionType.SUSPENDED] = ("True", situation.reason, message)
    if situation.phase is Phase.SUCCEEDED:
        said[ConditionType.COMPLETE] = ("True", situation.reason, message)
    if situation.phase is Phase.FAILED:
        said[ConditionType.FAILED] = ("True", situation.reason, message)
    before = {condition.type: condition for condition in status.conditions}
    conditions = tuple(
        _condition(before.get(kind), kind, *values, generation=generation, now=now) for kind, values in said.items()
    )
    return status.model_copy(
        update={
            "observed_generation": generation,
            "phase": situation.phase,
            "message": message,
            "conditions": conditions,
            "start_time": status.start_time or now,
            "completion_time": status.completion_time
            or (now if situation.phase in (Phase.SUCCEEDED, Phase.FAILED) else None),
        }
    )


def _condition(
    before: Condition | None,
    kind: ConditionType,
    value: Severity,
    reason: str,
    message: str,
    *,
    generation: int,
    now: datetime,
) -> Condition:
    unchanged = before is not None and before.status == value
    return Condition(
        type=kind,
        status=value,
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before and unchanged else now.replace(microsecond=0),
        reason=reason,
        message=message[:MESSAGE_MAX],
    )
