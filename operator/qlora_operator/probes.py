"""/healthz, /readyz and /metrics: alive while the loop goes round, ready after its first round.

The leader's loop is the resync; that of a replica that stands by is its look at the Lease.
"""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from qlora_operator.metrics import CONTENT_TYPE, Metrics
from qlora_operator.settings import Settings

#: Rounds that may fail (the API server may be away for a while) before the process is taken for dead.
MISSED_ROUNDS = 5


class Probes:
    """The age of the last round, over HTTP, and the metrics beside it."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._started = time.monotonic()
        self._last_beat: float | None = None
        self.leads = False

    def lead(self) -> None:
        """From now on this replica leads, and only `beat` counts."""
        self.leads = True

    def stands_by(self) -> None:
        """The Lease was looked at, and is another's."""
        if not self.leads:
            self.beat()

    def beat(self) -> None:
        """A round of the loop is done."""
        self._last_beat = time.monotonic()

    async def serve(self) -> None:
        """Serve until cancelled."""
        app = web.Application()
        routes = {"/healthz": self._healthz, "/readyz": self._readyz, "/metrics": self._scrape}
        app.add_routes([web.get(path, answer) for path, answer in routes.items()])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, port=self._settings.probe_port).start()
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        age = time.monotonic() - (self._last_beat or self._started)
        alive = age < MISSED_ROUNDS * self._settings.resync_seconds
        return web.Response(status=200 if alive else 503, text=f"last round {age:.0f} s ago\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        if self._last_beat is None:
            return web.Response(status=503, text="the first list is not done\n")
        return web.Response(text="ready\n")

    async def _scrape(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})
