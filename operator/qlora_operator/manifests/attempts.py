"""Everything that an attempt at a task is made of, in the order in which it is created."""

from __future__ import annotations

from typing import Any

from qlora_operator.lifecycle.observed import Job
from qlora_operator.lifecycle.tasks import TRAIN, Task
from qlora_operator.manifests import gpus, ranks
from qlora_operator.manifests.jobs import stage_job
from qlora_operator.manifests.orders import config_map
from qlora_operator.manifests.reporting import Endpoint
from qlora_operator.settings import Settings


def manifests(
    job: Job, task: Task, attempt: int, settings: Settings, endpoint: Endpoint | None = None
) -> list[dict[str, Any]]:
    """Its order, what its pods ask for and meet by, and last the Job.

    Raises LookupError when what the order builds on is not recorded yet.
    """
    name = task.job_name(job.metadata.name, attempt)
    beside = (ranks.meeting_point(job, task, name), gpus.claim_template(job, task, name))
    order = config_map(job, task, attempt, settings, endpoint)
    return [order, *(found for found in beside if found), stage_job(job, task, attempt, settings, endpoint)]


def names(job: Job, task: Task, attempt: int) -> list[tuple[str, str]]:
    """Kind and name of all that an attempt may have left; the Job first, so that nothing runs without the rest."""
    name = task.job_name(job.metadata.name, attempt)
    found = [("Job", name), ("ConfigMap", name)]
    if task == TRAIN:  # an earlier plan may have had them
        found += [("Service", name), ("ResourceClaimTemplate", name)]
    return found
