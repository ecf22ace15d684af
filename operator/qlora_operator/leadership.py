"""One replica at a time decides: a Lease says which, and a label on its pod leads the trainers' reports there.

The election itself is the Kubernetes client's. Two replicas that both believe to lead for a moment do no harm: names of
children are fixed, and a status is only written over the version that was read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient, V1Lease, V1ObjectMeta
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

log = logging.getLogger(__name__)

#: A leader that is not heard of for so long is replaced; it gives up before, and tries to renew this often.
LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15, 10, 2
#: Set on the leader's pod; the Service of the progress endpoint selects it.
LEADER_LABEL = "qlora.dev/leader"
NO_ANSWER = (TimeoutError, OSError, aiohttp.ClientError)


@dataclass(frozen=True)
class Replica:
    """The pod that this process runs in."""

    name: str
    namespace: str

    @classmethod
    def of_environment(cls) -> Replica | None:
        """From the variables that the chart sets; None outside of a pod, where there is nobody to share with."""
        name, namespace = os.environ.get("POD_NAME"), os.environ.get("POD_NAMESPACE")
        return cls(name, namespace) if name and namespace else None


class PatientLease(LeaseLock):
    """The client's Lease, for an API server that may be away: a call that fails or hangs is a try that failed.

    (As it comes, the election dies of a refused connection, and waits for ever for an answer.) `answered` is called
    whenever the API server has said whose it is.
    """

    def __init__(self, name: str, replica: Replica, api: ApiClient, answered: Callable[[], None]) -> None:
        super().__init__(name, replica.namespace, replica.name, api)
        self._answered = answered

    async def get(self, name: str, namespace: str) -> Any:
        try:
            async with asyncio.timeout(RETRY_SECONDS * 2):
                answer = await super().get(name, namespace)
            self._answered()
            return answer
        except NO_ANSWER as error:
            return False, ApiException(status=0, reason=str(error) or "no answer")

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        """(The client's own passes a boolean where its API takes text, and so never creates one.)"""
        lease = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        return await _tried(self.api_instance.create_namespaced_lease(namespace, lease))

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        return await _tried(super().update(name, namespace, updated_record))

    async def release(self) -> None:
        """Hand over at once, instead of letting the others wait until the Lease is over."""
        with contextlib.suppress(ApiException, *NO_ANSWER):
            async with asyncio.timeout(RETRY_SECONDS):
                lease = await self.api_instance.read_namespaced_lease(self.name, self.namespace)
                if lease.spec and lease.spec.holder_identity == self.identity:
                    lease.spec.holder_identity = ""
                    await self.api_instance.replace_namespaced_lease(self.name, self.namespace, lease)


async def _tried(call: Awaitable[Any]) -> bool:
    try:
        async with asyncio.timeout(RETRY_SECONDS * 2):
            return (await call) is not False
    except (ApiException, *NO_ANSWER) as error:
        log.warning("Lease: %s", getattr(error, "reason", None) or error or "no answer")
        return False


async def lead(lock: PatientLease, work: Callable[[], Awaitable[None]]) -> None:
    """Wait for the Lease, then do `work` for as long as it is held; returns when `work` is done, or the Lease lost.

    Raises what `work` raises.
    """
    working: list[asyncio.Task[None]] = []
    begun = asyncio.Event()

    async def leading() -> None:
        log.info("leading, as %s", lock.identity)
        working.append(asyncio.ensure_future(work()))
        begun.set()

    async def lost() -> None:
        log.warning("the Lease is lost; another replica leads")

    log.info("standing by for the Lease %s/%s", lock.namespace, lock.name)
    election = LeaderElection(Config(lock, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, leading, lost))
    running = asyncio.create_task(election.run())
    try:
        begins = asyncio.create_task(begun.wait())
        await asyncio.wait((running, begins), return_when=asyncio.FIRST_COMPLETED)
        begins.cancel()
        if working:
            await asyncio.wait((running, *working), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()  # an error of the election is ours
        elif working:
            working[0].result()
    finally:
        for task in (running, *working):
            task.cancel()
        await asyncio.gather(running, *working, return_exceptions=True)
        await lock.release()
