"""The safety net under the watches: everything is listed once in a while, and queued where it differs from what was
heard."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from qlora_api.v1alpha1 import KIND
from qlora_operator.cluster import ApiError, Cluster
from qlora_operator.lifecycle.observed import moment
from qlora_operator.lifecycle.standing import FINISHED
from qlora_operator.news import KINDS, News
from qlora_operator.placement.inventory import Inventory
from qlora_operator.settings import Settings
from qlora_operator.waiting import Waiting
from qlora_operator.workqueue import Key, WorkQueue

log = logging.getLogger(__name__)

Raw = Mapping[str, Any]

#: Until the next try where the list failed: the API server is starting, or away.
RETRY_SECONDS = 3
#: In every so many rounds all jobs that are not over are looked at, for what nobody watches.
SWEEP_ROUNDS = 10


async def resync(
    cluster: Cluster,
    queue: WorkQueue,
    news: News,
    inventory: Inventory,
    waiting: Waiting,
    settings: Settings,
    listed: Callable[[Sequence[Raw]], None],
) -> None:
    """List everything, for ever, and queue the jobs that need a look: the answer to events that were missed.

    `listed` is told of all jobs of every list that came, in brief. The nodes were listed before this is called.
    """
    for rounds in itertools.count():
        keys = set[Key]()
        try:
            listed(await a_round(cluster, news, settings.namespaces, keys, all_unfinished=rounds % SWEEP_ROUNDS == 0))
            if rounds:
                await take_stock(cluster, inventory, waiting)
            pause = settings.resync_seconds
        except (ApiError, OSError) as error:
            log.warning("resync: %s", error)
            pause = RETRY_SECONDS
        for key in keys:  # also of a round that broke off: what was heard is not heard again
            queue.add(key)
        await asyncio.sleep(pause)


async def a_round(
    cluster: Cluster, news: News, namespaces: Sequence[str], keys: set[Key], *, all_unfinished: bool
) -> list[Raw]:
    """All jobs in brief; adds to `keys` those of the jobs that need a look."""
    brief, now = list[Raw](), datetime.now(UTC)

    async def jobs() -> AsyncIterator[Raw]:
        async for job in cluster.everything(KIND, namespaces):
            brief.append(in_brief(job))
            if needs_a_look(job, now) or (all_unfinished and job.get("status", {}).get("phase") not in FINISHED):
                keys.add((job["metadata"]["namespace"], job["metadata"]["name"]))
            yield job

    for kind in KINDS:
        await news.hear_all(kind, jobs() if kind == KIND else cluster.everything(kind, namespaces), keys)
    return brief


async def take_stock(cluster: Cluster, inventory: Inventory, waiting: Waiting) -> None:
    """List all nodes. Where the list breaks off in the middle, the nodes that it had are taken up."""
    missing = set(inventory.names)  # not those that come meanwhile, and are told of by the watch
    async for node in cluster.everything("Node", ()):
        missing.discard(node["metadata"]["name"])
        if inventory.put(node):
            waiting.nodes_have_changed()
    for name in missing:
        if inventory.remove(name):
            waiting.nodes_have_changed()


def in_brief(job: Raw) -> Raw:
    """What is said of a job to all who ask: a thousand whole ones would take 50 MiB."""
    metadata = {name: value for name, value in job["metadata"].items() if name != "managedFields"}
    status = {name: value for name, value in job.get("status", {}).items() if name in ("phase", "progress", "plan")}
    return {"metadata": metadata, "status": status}


def needs_a_look(job: Raw, now: datetime) -> bool:
    """Whether the job itself says that something is left to do: it was edited, or is over and to be cleaned up."""
    status = job.get("status", {})
    if status.get("observedGeneration") != job["metadata"]["generation"]:
        return True
    ttl, end = job["spec"].get("ttlSecondsAfterFinished"), moment(status.get("completionTime"))
    return ttl is not None and end is not None and "cleanupTime" not in status and end + timedelta(seconds=ttl) <= now
