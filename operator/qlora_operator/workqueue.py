"""A keyed work queue: a key is queued once, is never at work twice at a time, and is backed off alone.

What has just changed goes before what is due by the clock: of hundreds of jobs that come at once each is taken up
before any is looked at again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Protocol

log = logging.getLogger(__name__)

FIRST_BACK_OFF_SECONDS = 0.5
LONGEST_BACK_OFF_SECONDS = 60.0

Key = tuple[str, str]  # namespace, name

CHANGED, DUE = range(2)


class Observer(Protocol):
    """Is told what the queue does."""

    def queue(self, waiting: int, backing_off: int) -> None:
        """Keys that wait for a worker, and keys whose last pass failed."""
        ...

    def passed(self, seconds: float, error: Exception | None) -> None:
        """A pass over a key is over."""
        ...


class WorkQueue:
    """Keys to work on. `add` may be called at any time, also while the key is at work: it is then worked on again."""

    def __init__(self, observer: Observer | None = None) -> None:
        self._observer = observer
        self._ready: asyncio.PriorityQueue[tuple[int, int, Key]] = asyncio.PriorityQueue()
        self._turns = itertools.count()
        self._queued: set[Key] = set()
        self._at_work: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._closed = False
        self._timers: dict[Key, asyncio.TimerHandle] = {}

    def add(self, key: Key, rank: int = CHANGED) -> None:
        """Queue `key`, at once, after those of its rank."""
        self._drop_timer(key)
        if key not in self._queued:
            self._queued.add(key)
            if key not in self._at_work:
                self._ready.put_nowait((rank, next(self._turns), key))
                self._tell()

    def add_after(self, key: Key, delay: timedelta) -> None:
        """Queue `key` after `delay`, unless it is queued before."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if key in self._queued or (timer and timer.when() <= loop.time() + delay.total_seconds()):
            return
        self._drop_timer(key)
        self._timers[key] = loop.call_later(delay.total_seconds(), self.add, key, DUE)

    async def drain(self, seconds: float) -> None:
        """Take up no more keys, and wait for the passes at work, at most so long."""
        self._closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._at_work:
                    await asyncio.sleep(0.05)

    async def work(self, reconcile: Callable[[Key], Awaitable[timedelta | None]]) -> None:
        """Call `reconcile` for keys as they come, for ever. It returns when to look at the key again, or None.

        A key whose `reconcile` raises is tried again with a growing back-off; the others are not held up.
        """
        while True:
            _, _, key = await self._ready.get()
            if self._closed:
                continue
            self._queued.discard(key)
            self._at_work.add(key)
            self._tell()
            again: timedelta | None = None
            failure: Exception | None = None
            started = time.monotonic()
            try:
                again = await reconcile(key)
                self._failures.pop(key, None)
            except Exception as error:
                failure = error
                again = self._back_off(key)
                log.warning(
                    "%s/%s: %s; again in %.1f s", *key, error, again.total_seconds(), exc_info=_unexpected(error)
                )
            finally:
                self._at_work.discard(key)
                if key in self._queued:
                    self._ready.put_nowait((CHANGED, next(self._turns), key))
            if self._observer:
                self._observer.passed(time.monotonic() - started, failure)
            self._tell()
            if again is not None:
                self.add_after(key, again)

    def _tell(self) -> None:
        if self._observer:
            self._observer.queue(self._ready.qsize(), len(self._failures))

    def _back_off(self, key: Key) -> timedelta:
        n = self._failures[key] = self._failures.get(key, 0) + 1
        doublings = min(n - 1, 10)  # far beyond the longest, and within what a float holds
        seconds = min(FIRST_BACK_OFF_SECONDS * 2**doublings, LONGEST_BACK_OFF_SECONDS)
        return timedelta(seconds=seconds * random.uniform(0.5, 1.5))

    def _drop_timer(self, key: Key) -> None:
        if timer := self._timers.pop(key, None):
            timer.cancel()


def _unexpected(error: Exception) -> bool:
    """Whether a traceback helps: for the API server's refusals the message is enough."""
    return type(error).__name__ != "ApiError"
