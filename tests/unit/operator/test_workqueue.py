"""The queue: no key is worked on twice at a time, none is forgotten, and a failing one holds up nobody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import pytest

from qlora_operator.workqueue import LONGEST_BACK_OFF_SECONDS, Key, WorkQueue

A: Key = ("team-a", "one")
B: Key = ("team-a", "two")

Reconcile = Callable[[Key], Awaitable[timedelta | None]]


class Desk:
    """Where the keys arrive: each is held until it is let go, with what its pass returns or raises."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[Key] = asyncio.Queue()
        self.held: dict[Key, asyncio.Future[timedelta | None]] = {}

    async def __call__(self, key: Key) -> timedelta | None:
        assert key not in self.held, f"{key} is at work twice at a time"
        self.held[key] = asyncio.get_running_loop().create_future()
        self.arrived.put_nowait(key)
        try:
            return await self.held[key]
        finally:
            del self.held[key]

    async def next(self) -> Key:
        return await asyncio.wait_for(self.arrived.get(), timeout=10)

    def let_go(self, key: Key, again: timedelta | None = None) -> None:
        self.held[key].set_result(again)

    def fail(self, key: Key) -> None:
        self.held[key].set_exception(RuntimeError("boom"))

    async def is_quiet(self) -> bool:
        """Whether nothing more arrives without time passing."""
        for _ in range(20):
            await asyncio.sleep(0)
        return self.arrived.empty()


@contextlib.asynccontextmanager
async def working(
    workers: int = 2, delays: list[float] | None = None, clock: pytest.MonkeyPatch | None = None
) -> AsyncIterator[tuple[WorkQueue, Desk]]:
    """A queue with workers. With `clock`, its timers are noted in `delays` (seconds) and never go off."""
    queue, desk = WorkQueue(), Desk()
    loop = asyncio.get_running_loop()
    real = loop.call_later

    def noted(delay: float, callback: Callable[..., object], *arguments: object) -> asyncio.TimerHandle:
        if callback == queue.add and delays is not None:
            delays.append(delay)
            delay = 3600
        return real(delay, callback, *arguments)

    if clock is not None:
        clock.setattr(loop, "call_later", noted)
    tasks = [asyncio.create_task(queue.work(desk)) for _ in range(workers)]
    yield queue, desk
    assert not [task for task in tasks if task.done()], "a worker ended"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def told() -> None:
        await story()

    asyncio.run(told())


def test_a_key_is_queued_once_however_often_it_is_added() -> None:
    async def story() -> None:
        async with working() as (queue, desk):
            for _ in range(5):
                queue.add(A)
            assert await desk.next() == A
            desk.let_go(A)
            assert await desk.is_quiet()

    run(story)


def test_what_has_just_changed_goes_before_what_is_due_by_the_clock() -> None:
    async def story() -> None:
        async with working(workers=1) as (queue, desk):
            queue.add(("team-a", "at work"))
            await desk.next()
            queue.add_after(A, timedelta())
            await asyncio.sleep(0.01)
            queue.add(B)
            desk.let_go(("team-a", "at work"))
            assert await desk.next() == B
            desk.let_go(B)
            assert await desk.next() == A
            desk.let_go(A)
            assert await desk.is_quiet()

    run(story)


def test_news_while_at_work_is_worked_on_afterwards_and_once() -> None:
    """Else the pass that is under way, which read before the news, would be the last."""

    async def story() -> None:
        async with working() as (queue, desk):
            queue.add(A)
            await desk.next()
            for _ in range(3):
                queue.add(A)
            assert await desk.is_quiet(), "not while it is at work, though a worker is free"
            desk.let_go(A)
            assert await desk.next() == A
            desk.let_go(A)
            assert await desk.is_quiet()

    run(story)


def test_two_keys_are_worked_on_side_by_side() -> None:
    async def story() -> None:
        async with working() as (queue, desk):
            queue.add(A)
            queue.add(B)
            assert {await desk.next(), await desk.next()} == {A, B}
            desk.let_go(B)
            desk.let_go(A)

    run(story)


def test_a_failing_key_is_backed_off_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []

    async def story() -> None:
        async with working(1, delays, monkeypatch) as (queue, desk):
            for _ in range(4):
                queue.add(A)
                await desk.next()
                desk.fail(A)
                assert await desk.is_quiet()
                queue.add(B)
                assert await desk.next() == B, "B is not held up"
                desk.let_go(B)
                assert await desk.is_quiet()

    run(story)
    assert len(delays) == 4, "B is not backed off"
    for n, delay in enumerate(delays):
        assert 0.25 * 2**n <= delay <= 0.75 * 2**n


def test_after_two_thousand_failures_the_queue_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that fails for a day must not end a worker."""
    delays: list[float] = []

    async def story() -> None:
        async with working(1, delays, monkeypatch) as (queue, desk):
            for _ in range(2000):
                queue.add(A)
                await desk.next()
                desk.fail(A)
            queue.add(B)
            assert await desk.next() == B
            desk.let_go(B)

    run(story)
    assert LONGEST_BACK_OFF_SECONDS / 2 <= delays[-1] <= 1.5 * LONGEST_BACK_OFF_SECONDS


def test_a_success_ends_the_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []

    async def story() -> None:
        async with working(1, delays, monkeypatch) as (queue, desk):
            for end in (desk.fail, desk.fail, desk.fail, desk.let_go, desk.fail):
                queue.add(A)
                await desk.next()
                end(A)
                assert await desk.is_quiet()

    run(story)
    assert delays[-1] <= 0.75, "as after a first failure"
    assert delays[-2] >= 1


def test_a_key_comes_again_when_its_pass_has_asked_for_it() -> None:
    async def story() -> None:
        async with working() as (queue, desk):
            queue.add(A)
            await desk.next()
            desk.let_go(A, timedelta(milliseconds=1))
            assert await desk.next() == A
            desk.let_go(A)
            assert await desk.is_quiet()

    run(story)


def test_news_comes_before_a_timer_and_replaces_it() -> None:
    """Else each event would add a pass that looks at the same again later."""

    async def story() -> None:
        async with working() as (queue, desk):
            queue.add_after(A, timedelta(milliseconds=20))
            queue.add(A)
            assert await desk.next() == A
            desk.let_go(A)
            queue.add_after(B, timedelta(milliseconds=40))
            assert await desk.next() == B, "A's timer would have gone off before"
            desk.let_go(B)

    run(story)


def test_a_new_timer_replaces_the_old_one() -> None:
    async def story() -> None:
        async with working() as (queue, desk):
            queue.add_after(A, timedelta(hours=1))
            queue.add_after(A, timedelta(milliseconds=1))
            assert await desk.next() == A
            desk.let_go(A)
            assert await desk.is_quiet()

    run(story)


async def _runs(queue: WorkQueue, *, seconds: float) -> list[Key]:
    """The keys that are worked on within so long."""
    worked: list[Key] = []

    async def note(key: Key) -> None:
        worked.append(key)

    worker = asyncio.create_task(queue.work(note))
    await asyncio.sleep(seconds)
    worker.cancel()
    return worked


def test_of_two_times_to_look_again_the_earlier_counts() -> None:
    async def scene() -> list[Key]:
        queue = WorkQueue()
        queue.add_after(A, timedelta(seconds=0.05))
        queue.add_after(A, timedelta(minutes=1))
        queue.add_after(B, timedelta(minutes=1))
        queue.add_after(B, timedelta(seconds=0.05))
        return await _runs(queue, seconds=0.3)

    assert sorted(asyncio.run(scene())) == [A, B]


def test_at_the_end_what_is_at_work_is_finished_and_nothing_taken_up() -> None:
    async def scene() -> tuple[list[Key], list[Key]]:
        queue, begun, ended = WorkQueue(), list[Key](), list[Key]()

        async def slowly(key: Key) -> None:
            begun.append(key)
            queue.add(B)
            await asyncio.sleep(0.2)
            ended.append(key)

        worker = asyncio.create_task(queue.work(slowly))
        queue.add(A)
        await asyncio.sleep(0.05)
        await queue.drain(5)
        await asyncio.sleep(0.1)
        worker.cancel()
        return begun, ended

    assert asyncio.run(scene()) == ([A], [A])
