"""The status' conditions and phase, as a function of what is recorded and of where the job stands.

kstatus (Flux, Argo CD, helm --wait) reads Reconciling, Stalled and Ready; a job is `Failed` for it only when Stalled.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from qlora_api.v1alpha1 import Condition, ConditionStatus, ConditionType, JobStatus, Phase

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
_KSTATUS: dict[Stance, tuple[ConditionStatus, ConditionStatus, ConditionStatus]] = {
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
    milestones: dict[ConditionType, tuple[ConditionStatus, str, str]],
    *,
    generation: int,
    now: datetime,
) -> JobStatus:
    """`status` saying `situation`; a condition's transition time moves only when its status does.

    `milestones` gives (status, reason, message) of those that are reached or refused; the others are Unknown.
    """
    message = situation.message[:MESSAGE_MAX]
    ready, reconciling, stalled = _KSTATUS[situation.stance]
    said: dict[ConditionType, tuple[ConditionStatus, str, str]] = {
        ConditionType.READY: (ready, situation.reason, message),
        ConditionType.RECONCILING: (reconciling, situation.reason, message if reconciling == "True" else ""),
        ConditionType.STALLED: (stalled, situation.reason, message if stalled == "True" else ""),
    }
    for milestone in _MILESTONES:
        said[milestone] = milestones.get(milestone, ("Unknown", "NotYet", ""))
    if situation.stance is Stance.RESTING:
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
    value: ConditionStatus,
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


def unreadable(status: dict[str, Any], message: str, *, generation: int, now: datetime) -> dict[str, Any]:
    """A status that the models cannot read, saying so: stalled until an operator can read it, otherwise as it was."""
    said = {"Ready": "False", "Reconciling": "False", "Stalled": "True"}
    before = {condition["type"]: condition for condition in status.get("conditions", ())}
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    text = f"this version of the operator cannot read the job: {message}"[:MESSAGE_MAX]
    for kind, value in said.items():
        old = before.get(kind, {})
        before[kind] = {
            "type": kind,
            "status": value,
            "observedGeneration": generation,
            "lastTransitionTime": old["lastTransitionTime"] if old.get("status") == value else stamp,
            "reason": "Unreadable",
            "message": text if value == "True" or kind == "Ready" else "",
        }
    return {**status, "observedGeneration": generation, "message": text, "conditions": list(before.values())}
