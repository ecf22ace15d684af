"""The jobs that wait for GPUs: they are looked at again when what jobs can get has changed, and not before."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from qlora_api.v1alpha1 import JobStatus, Phase
from qlora_operator.workqueue import Key, WorkQueue

#: A node comes with dozens of changes, and nodes come by the hundred: one look after the first of them will do, and
#: another one after those that follow.
NODES_SETTLE = timedelta(seconds=1)


def waits_for_gpus(status: JobStatus) -> bool:
    """Whether other nodes may be what the job needs: it has no plan that holds, or its pods are not placed."""
    return status.phase in (Phase.SCHEDULING, Phase.PLANNING)


class Waiting:
    """Keys of those jobs. Lives only in memory: every job is looked at once after a start."""

    def __init__(self, queue: WorkQueue) -> None:
        self._queue = queue
        self._keys: set[Key] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: Key) -> None:
        """From now on a change of nodes queues `key`. To be called before the nodes are looked at."""
        self._keys.add(key)

    def discard(self, key: Key) -> None:
        """The job does not wait."""
        self._keys.discard(key)

    def nodes_have_changed(self) -> None:
        """Queue every job that waits, once however often this is called within `NODES_SETTLE`."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(NODES_SETTLE.total_seconds(), self._wake)

    def _wake(self) -> None:
        self._timer = None
        for key in self._keys:
            self._queue.add_after(key, timedelta())
