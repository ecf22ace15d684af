"""The decisions: one policy per situation, asked in order; the first that applies answers.

Each takes the job as recorded, what the cluster has of it and the time, and returns a `Step` or None. They lie by what
they are about: attempting.py, planning.py, volumes.py, ending.py; standing.py has the words.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from qlora_operator.lifecycle.attempting import (
    a_task_is_given_up,
    a_volume_is_full,
    attempts_have_ended,
    inspection_is_missing,
    is_suspended,
    pod_template_was_edited,
    tasks_are_to_run,
)
from qlora_operator.lifecycle.ending import (
    budget_is_used_up,
    everything_is_published,
    in_time_for_the_budget,
    job_is_over,
)
from qlora_operator.lifecycle.observed import Job, Observed
from qlora_operator.lifecycle.planning import plan_is_missing, rests_at_its_plan, spec_asks_for_what_is_not_built
from qlora_operator.lifecycle.step import Step
from qlora_operator.lifecycle.volumes import (
    output_claim_is_missing,
    work_volume_is_missing,
    work_volume_is_not_shared,
)


def next_step(job: Job, seen: Observed, now: datetime) -> Step:
    """What to do for `job`, given what exists in the cluster. Pure."""
    for policy in POLICIES:
        if step := policy(job, seen, now):
            return in_time_for_the_budget(step, job, seen, now)
    raise AssertionError("the last policy applies always")


POLICIES: tuple[Callable[[Job, Observed, datetime], Step | None], ...] = (
    job_is_over,
    attempts_have_ended,
    spec_asks_for_what_is_not_built,
    a_task_is_given_up,
    everything_is_published,
    budget_is_used_up,
    pod_template_was_edited,
    a_volume_is_full,
    inspection_is_missing,
    plan_is_missing,
    rests_at_its_plan,
    is_suspended,
    output_claim_is_missing,
    work_volume_is_missing,
    work_volume_is_not_shared,
    tasks_are_to_run,
)
