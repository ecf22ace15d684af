"""A new node starts the jobs that wait for one: at once, each once, and no others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

import kopf
import pytest

from qlora_api.v1alpha1 import JobStatus, Phase
from qlora_operator import waiting as waiting_module
from qlora_operator.cluster import PAGE, ApiError, Cluster
from qlora_operator.handlers import registry, tune
from qlora_operator.lifecycle.tasks import INSPECT
from qlora_operator.metrics import Metrics
from qlora_operator.news import News
from qlora_operator.placement.inventory import Inventory
from qlora_operator.reconcile import Reconciler
from qlora_operator.resync import take_stock
from qlora_operator.waiting import Waiting, waits_for_gpus
from qlora_operator.workqueue import Key, WorkQueue
from tests.unit.operator import given
from tests.unit.operator.given import A10, L40S, gpu_node
from tests.unit.operator.test_simulation import SETTINGS, World

Raw = dict[str, Any]

KEY: Key = ("team-a", given.NAME)
SETTLE_SECONDS = 0.02


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_module, "NODES_SETTLE", timedelta(seconds=SETTLE_SECONDS))


class Operator:
    """The queue and a worker, which notes what it works on; or a whole pass over each key. To be entered in a loop."""

    def __init__(self) -> None:
        self.queue = WorkQueue()
        self.waiting = Waiting(self.queue)
        self.reconcile: Reconciler | None = None
        self.worked_on: list[Key] = []

    async def _work(self, key: Key) -> timedelta | None:
        self.worked_on.append(key)
        return await self.reconcile(key) if self.reconcile else None

    async def __aenter__(self) -> Operator:
        self._worker = asyncio.create_task(self.queue.work(self._work))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._worker.cancel()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Work until that, and then as long as a change takes to be acted on."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)
        await asyncio.sleep(3 * SETTLE_SECONDS)


@pytest.mark.parametrize(
    ("phase", "planned", "waits"),
    [
        (Phase.PLANNING, False, True),
        (Phase.PLANNING, True, True),
        (Phase.SCHEDULING, True, True),
        (Phase.INSPECTING, False, False),
        (Phase.TRAINING, True, False),
        (Phase.PLANNED, True, False),
        (Phase.SUSPENDED, False, False),
        (Phase.SUCCEEDED, True, False),
        (Phase.FAILED, False, False),
    ],
)
def test_who_waits_for_gpus(phase: Phase, planned: bool, waits: bool) -> None:
    plan = given.plan(given.job()) if planned else None
    assert waits_for_gpus(JobStatus(phase=phase, plan=plan)) is waits


def test_a_thousand_nodes_at_once_queue_each_job_that_waits_once() -> None:
    keys = {("team-a", f"job-{n}") for n in range(50)}

    async def story() -> None:
        async with Operator() as operator:
            for key in keys:
                operator.waiting.add(key)
            operator.waiting.add(KEY)
            operator.waiting.discard(KEY)
            for _ in range(1000):
                operator.waiting.nodes_have_changed()
            await operator.until(lambda: len(operator.worked_on) >= len(keys))
            assert sorted(operator.worked_on) == sorted(keys)
            operator.waiting.nodes_have_changed()
            await operator.until(lambda: len(operator.worked_on) >= 2 * len(keys))

    asyncio.run(story())


def test_nodes_that_keep_coming_queue_a_job_once_in_a_while() -> None:
    async def story() -> None:
        async with Operator() as operator:
            operator.waiting.add(KEY)
            began = time.monotonic()
            for _ in range(100):
                operator.waiting.nodes_have_changed()
                await asyncio.sleep(SETTLE_SECONDS / 20)
            passes = len(operator.worked_on)
            assert 1 <= passes <= (time.monotonic() - began) / SETTLE_SECONDS

    asyncio.run(story())


def test_a_new_node_starts_a_job_that_waits_and_a_heartbeat_does_not() -> None:
    world = World(given.document({"retry.maxRestarts": 3, "training.effectiveBatchSize": 32}))
    claim: Raw = {"kind": "PersistentVolumeClaim", "metadata": {"name": "results", "uid": "theirs"}}
    world.children["PersistentVolumeClaim", "results"] = claim
    world.object["status"] = given.history(given.job(), INSPECT, planned=False).status.to_api()
    small = gpu_node("small", *A10, ready=False)
    inventory = Inventory.of([small])

    async def story() -> None:
        async with Operator() as operator:
            operator.reconcile = Reconciler(world, SETTINGS, inventory, operator.waiting, metrics=Metrics())
            changed = event_handler(inventory, operator.waiting)
            operator.queue.add(KEY)
            await operator.until(lambda: world.status.phase == Phase.PLANNING)
            assert world.status.plan is None
            assert "node small is not ready" in (world.status.message or "")
            assert operator.worked_on == [KEY], "no time is set to look again"

            await changed("MODIFIED", small)
            await changed(None, small)
            await operator.until(lambda: True)
            assert operator.worked_on == [KEY]

            await changed("ADDED", gpu_node("new", *L40S))
            await operator.until(lambda: world.status.plan is not None)
            assert world.status.plan is not None
            assert world.status.plan.flavour == L40S[0]
            await changed("DELETED", small)
            assert inventory.names == {"new"}

    asyncio.run(story())


def event_handler(inventory: Inventory, waiting: Waiting) -> Callable[[str | None, Raw], Awaitable[None]]:
    """What kopf calls for an event of a node."""
    handlers = registry(WorkQueue(), News(), inventory, waiting)
    nodes = kopf.Resource(group="", version="v1", plural="nodes", kind="Node", namespaced=False)
    [handler] = [h for h in handlers._watching.get_all_handlers() if h.selector and h.selector.check(nodes)]
    function: Any = handler.fn

    async def changed(kind: str | None, node: Raw) -> None:
        await function(event={"type": kind, "object": node})

    return changed


def test_what_is_watched_is_listed_page_by_page() -> None:
    settings = kopf.OperatorSettings()
    tune(settings)
    assert settings.watching.chunk_size == PAGE


class Listed(Cluster):
    """A cluster that lists these nodes; after some of them the list breaks off."""

    def __init__(self, nodes: Sequence[Raw], *, breaks_after: int | None = None) -> None:
        self.nodes = nodes
        self.breaks_after = breaks_after

    async def everything(self, kind: str, namespaces: Sequence[str]) -> AsyncIterator[Raw]:
        assert (kind, list(namespaces)) == ("Node", [])
        for n, node in enumerate(self.nodes):
            if n == self.breaks_after:
                raise ApiError("list Nodes", 500, "not now")
            yield node


def took_stock(inventory: Inventory, listed: Listed) -> bool:
    """Whether the list made the jobs that wait be looked at."""

    async def take_it() -> bool:
        async with Operator() as operator:
            operator.waiting.add(KEY)
            try:
                await take_stock(listed, inventory, operator.waiting)
            except ApiError:
                assert listed.breaks_after is not None
            await operator.until(lambda: True)
            return bool(operator.worked_on)

    return asyncio.run(take_it())


def test_a_list_of_nodes_tells_what_the_watch_has_missed_and_nothing_else() -> None:
    inventory = Inventory()
    a, b = gpu_node("a", *A10), gpu_node("b", *L40S)
    assert took_stock(inventory, Listed([a, b]))
    assert not took_stock(inventory, Listed([a, b]))
    assert took_stock(inventory, Listed([a]))
    assert inventory.names == {"a"}
    assert took_stock(inventory, Listed([b, gpu_node("a", *A10, ready=False)]))
    assert inventory.names == {"a", "b"}


def test_a_list_of_nodes_that_breaks_off_takes_nothing_for_gone() -> None:
    a, b = gpu_node("a", *A10), gpu_node("b", *L40S)
    inventory = Inventory.of([a])
    assert took_stock(inventory, Listed([b, a], breaks_after=1)), "what it had is news all the same"
    assert inventory.names == {"a", "b"}
    assert not took_stock(inventory, Listed([a, b], breaks_after=0))
    assert inventory.names == {"a", "b"}
