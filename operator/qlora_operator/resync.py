"""The safety net under the watches: everything is listed once in a while, and what is not over is queued."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from qlora_operator.cluster import ApiError, Cluster
from qlora_operator.lifecycle.observed import moment
from qlora_operator.lifecycle.policies import FINISHED
from qlora_operator.settings import Settings
from qlora_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

Raw = Mapping[str, Any]

#: Until the next try where the list failed: the API server is starting, or away.
RETRY_SECONDS = 3


async def resync(
    cluster: Cluster, queue: WorkQueue, settings: Settings, listed: Callable[[Sequence[Raw]], None]
) -> None:
    """List all jobs, for ever, and queue those that need a look: the answer to events that were missed.

    `listed` is told of every list that came.
    """
    while True:
        try:
            jobs = [job for namespace in settings.namespaces or [None] for job in await cluster.jobs(namespace)]
            now = datetime.now(UTC)
            for job in jobs:
                if needs_a_look(job, now):
                    queue.add((job["metadata"]["namespace"], job["metadata"]["name"]))
            listed(jobs)
            pause = settings.resync_seconds
        except (ApiError, OSError) as error:
            log.warning("resync: %s", error)
            pause = RETRY_SECONDS
        await asyncio.sleep(pause)


def needs_a_look(job: Raw, now: datetime) -> bool:
    """Whether something may be left to do: the job is not over, was edited, or what is left of it is to be deleted."""
    status = job.get("status", {})
    if status.get("phase") not in FINISHED or status.get("observedGeneration") != job["metadata"]["generation"]:
        return True
    ttl, end = job["spec"].get("ttlSecondsAfterFinished"), moment(status.get("completionTime"))
    return ttl is not None and end is not None and "cleanupTime" not in status and end + timedelta(seconds=ttl) <= now
