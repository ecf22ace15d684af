"""Conditions: who waits on one sees it move when its status does, and never otherwise."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from qlora_api.v1alpha1 import Condition, ConditionStatus, ConditionType, JobStatus, Phase
from qlora_operator.lifecycle.conditions import Situation, Stance, unreadable, with_situation
from tests.unit.operator.given import NOW
from tests.unit.operator.kstatus import kstatus

LATER = NOW + timedelta(minutes=3, microseconds=17)
RUNNING = Situation(Phase.TRAINING, "Running", "train is running")
WAITING = Situation(Phase.SCHEDULING, "Waiting", "train waits: no GPU")
SUSPENDED = Situation(Phase.SUSPENDED, "Suspended", "suspended", Stance.RESTING)
SUCCEEDED = Situation(Phase.SUCCEEDED, "Published", "published", Stance.READY)
FAILED = Situation(Phase.FAILED, "BadInput", "line 3", Stance.FAILED)
PLANNED = Situation(Phase.PLANNED, "PlanReady", "planned", Stance.READY)

INSPECTED = {ConditionType.INSPECTED: ("True", "Inspected", "llama")}


def said(
    status: JobStatus, situation: Situation, now: datetime = NOW, milestones: dict[ConditionType, Any] | None = None
) -> JobStatus:
    return with_situation(status, situation, milestones or {}, generation=1, now=now)


def conditions(status: JobStatus) -> dict[str, Condition]:
    return {condition.type: condition for condition in status.conditions}


@pytest.mark.parametrize("situation", [RUNNING, WAITING, SUSPENDED, SUCCEEDED, FAILED, PLANNED], ids=lambda s: s.reason)
def test_saying_the_same_again_changes_nothing(situation: Situation) -> None:
    """Else each pass would be a write, an event for every watcher and a drift for GitOps."""
    once = said(JobStatus(), situation, milestones=INSPECTED)
    assert said(once, situation, LATER, INSPECTED).to_api() == once.to_api()
    stored = JobStatus.model_validate(once.to_api(), by_alias=True, by_name=False)
    assert said(stored, situation, LATER, INSPECTED).to_api() == once.to_api()


def test_a_new_message_is_no_transition() -> None:
    before = conditions(said(JobStatus(), RUNNING))
    after = conditions(said(said(JobStatus(), RUNNING), WAITING, LATER))
    assert after["Ready"].message != before["Ready"].message
    assert {c.last_transition_time for c in after.values()} == {NOW}


SITUATIONS = st.sampled_from([RUNNING, WAITING, SUSPENDED, SUCCEEDED, FAILED, PLANNED])
VALUES: list[ConditionStatus] = ["True", "False", "Unknown"]
MILESTONES = st.dictionaries(
    st.sampled_from([ConditionType.INSPECTED, ConditionType.PLANNED, ConditionType.SCHEDULED, ConditionType.TRAINED]),
    st.tuples(st.sampled_from(VALUES), st.just("R"), st.text(max_size=5)),
)


@for_all(st.lists(st.tuples(SITUATIONS, MILESTONES, st.integers(1, 3600)), min_size=2, max_size=8))
def test_transition_times_move_exactly_when_the_status_does(
    story: list[tuple[Situation, dict[ConditionType, Any], int]],
) -> None:
    status, now = JobStatus(), NOW
    for situation, milestones, seconds in story:
        before, now = conditions(status), now + timedelta(seconds=seconds)
        status = said(status, situation, now, milestones)
        for kind, condition in conditions(status).items():
            old = before.get(kind)
            moved = old is None or old.status != condition.status
            assert condition.last_transition_time == (now if moved or old is None else old.last_transition_time)
        assert len(conditions(status)) == len(status.conditions), "one condition of a type"


TELLS = [
    # situation, kstatus, the conditions that are there only then
    (RUNNING, "InProgress", set()),
    (WAITING, "InProgress", set()),
    (SUSPENDED, "InProgress", {"Suspended"}),
    (PLANNED, "Current", set()),
    (SUCCEEDED, "Current", {"Complete"}),
    (FAILED, "Failed", {"Failed"}),
]


@pytest.mark.parametrize(("situation", "expected", "extra"), TELLS, ids=lambda value: getattr(value, "reason", None))
def test_what_gitops_and_batch_tools_read(situation: Situation, expected: str, extra: set[str]) -> None:
    status = said(JobStatus(), situation)
    assert kstatus({"metadata": {"generation": 1}, "status": status.to_api()}) == expected
    assert kstatus({"metadata": {"generation": 2}, "status": status.to_api()}) == "InProgress"
    assert conditions(status).keys() & {"Suspended", "Complete", "Failed"} == extra


def test_start_and_end_are_noted_once() -> None:
    status = said(JobStatus(), RUNNING)
    status = said(status, SUCCEEDED, LATER)
    assert status.start_time == NOW
    assert status.completion_time == LATER
    assert said(status, SUCCEEDED, LATER + timedelta(hours=1)).completion_time == LATER
    assert said(JobStatus(), SUSPENDED).completion_time is None


def test_a_long_message_is_cut_to_what_the_server_takes() -> None:
    status = said(JobStatus(), Situation(Phase.FAILED, "BadInput", "é" * 100_000, Stance.FAILED))
    assert max(len(condition.message) for condition in status.conditions) <= 2000


# --- a job that this version cannot read ---


def test_an_unreadable_job_is_stalled_and_keeps_all_that_is_recorded() -> None:
    status = said(JobStatus(), RUNNING).to_api() | {"attempts": [{"number": 1, "fieldOfAnotherVersion": True}]}
    after = unreadable(status, "spec.later: no such field", generation=2, now=LATER)
    assert kstatus({"metadata": {"generation": 2}, "status": after}) == "Failed"
    assert after["attempts"] == status["attempts"]
    assert "spec.later: no such field" in after["message"]
    by_type = {condition["type"]: condition for condition in after["conditions"]}
    assert by_type["Stalled"]["lastTransitionTime"] == "2026-09-01T12:03:00Z"
    assert by_type["Ready"]["lastTransitionTime"] == "2026-09-01T12:00:00Z", "it was not Ready before either"


def test_an_unreadable_job_is_said_to_be_so_once() -> None:
    after = unreadable({}, "spec: odd", generation=1, now=NOW)
    assert unreadable(after, "spec: odd", generation=1, now=LATER.astimezone(UTC)) == after
