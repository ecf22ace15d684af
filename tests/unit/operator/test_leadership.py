"""One leads; when it is gone, or cannot renew, another. The Lease is in memory, the election is the real one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord

from qlora_operator import leadership
from qlora_operator.leadership import PatientLease, Replica, lead


class Shared:
    """What the API server keeps."""

    def __init__(self) -> None:
        self.record: LeaderElectionRecord | None = None
        self.away_for: set[str] = set()


class MemoryLease(PatientLease):
    """A candidate's view of the shared Lease."""

    def __init__(self, shared: Shared, name: str) -> None:
        super().__init__("lease", Replica(name, "here"), None, lambda: None)  # type: ignore[arg-type]
        self.shared = shared

    async def get(self, name: str, namespace: str) -> Any:
        if self.identity in self.shared.away_for:
            return False, ApiException(status=0, reason="connection refused")
        if self.shared.record is None:
            missing = ApiException(status=404)
            missing.body = '{"code": 404}'
            return False, missing
        return True, self.shared.record

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        return await self.update(name, namespace, election_record)

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        self.shared.record = updated_record
        return True

    async def release(self) -> None:
        if self.shared.record is not None and self.shared.record.holder_identity == self.identity:
            self.shared.record = LeaderElectionRecord(None, None, None, None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE_SECONDS", 3), ("RENEW_SECONDS", 2), ("RETRY_SECONDS", 1)):
        monkeypatch.setattr(leadership, name, seconds)


def test_the_second_takes_over_at_once_when_the_first_is_done() -> None:
    async def scene() -> list[str]:
        shared, said, finish = Shared(), list[str](), asyncio.Event()

        async def first() -> None:
            said.append("first begins")
            await finish.wait()
            said.append("first ends")

        async def second() -> None:
            said.append("second begins")

        one = asyncio.create_task(lead(MemoryLease(shared, "one"), first))
        await asyncio.sleep(0.1)
        two = asyncio.create_task(lead(MemoryLease(shared, "two"), second))
        await asyncio.sleep(1.5)
        assert said == ["first begins"], "one at a time"
        finish.set()
        await asyncio.wait_for(asyncio.gather(one, two), timeout=leadership.LEASE_SECONDS)
        return said

    assert asyncio.run(scene()) == ["first begins", "first ends", "second begins"]


def test_who_cannot_renew_stops_before_another_begins() -> None:
    async def scene() -> list[str]:
        shared, said = Shared(), list[str]()

        async def first() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                said.append("first stopped")

        async def second() -> None:
            said.append("second begins")

        one = asyncio.create_task(lead(MemoryLease(shared, "one"), first))
        await asyncio.sleep(0.1)
        two = asyncio.create_task(lead(MemoryLease(shared, "two"), second))
        shared.away_for.add("one")
        await asyncio.wait_for(asyncio.gather(one, two), timeout=15)
        return said

    assert asyncio.run(scene()) == ["first stopped", "second begins"]


def test_what_the_work_raises_is_raised() -> None:
    async def work() -> None:
        raise RuntimeError("a loop died")

    with pytest.raises(RuntimeError, match="a loop died"):
        asyncio.run(lead(MemoryLease(Shared(), "one"), work))


def test_an_api_server_that_is_away_is_a_try_that_failed() -> None:
    class Away:
        async def read_namespaced_lease(self, *_: Any) -> Any:
            raise ConnectionRefusedError("connection refused")

        async def create_namespaced_lease(self, *_: Any, **__: Any) -> Any:
            raise TimeoutError

    async def scene() -> None:
        answers: list[None] = []
        lease = PatientLease("lease", Replica("one", "here"), None, lambda: answers.append(None))  # type: ignore[arg-type]
        lease.api_instance = Away()  # type: ignore[assignment]
        found, error = await lease.get("lease", "here")
        assert (found, error.reason) == (False, "connection refused")
        assert not await lease.create("lease", "here", LeaderElectionRecord("one", "15", "x", "x"))
        assert answers == [], "no answer is none"

    asyncio.run(scene())
