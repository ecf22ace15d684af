"""A way to the API server that can be made bad: slow, refusing, away, its watches cut or answered 410. Nobody else
notices: only who is given this proxy's kubeconfig goes through it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import random
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from tests.cluster.client import Cluster

HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive", "host"}
GONE = {
    "kind": "Status",
    "apiVersion": "v1",
    "status": "Failure",
    "reason": "Expired",
    "code": 410,
    "message": "too old",
}


class TroubledApi:
    """The proxy. Its troubles are attributes, set at any time; `calls` counts what came, by method."""

    def __init__(self, cluster: Cluster) -> None:
        self.refuse: tuple[int, ...] = ()  # answers to `refused_share` of the calls but watches; 409 to writes alone
        self.refused_share = 0.0
        self.delay_seconds = 0.0
        self.away = False  # every connection is cut, the open ones too
        self.watches = True  # False: cut, and not to be had
        self.watches_expired = False  # every watch is answered 410
        self.refusals = 0
        self._cluster = cluster
        self._loop = asyncio.new_event_loop()
        self._watching: set[asyncio.Task[Any]] = set()
        self._port = 0

    @contextmanager
    def serving(self) -> Iterator[Path]:
        """Serve on this machine alone; the kubeconfig of this way to the cluster."""
        started = threading.Event()
        thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        thread.start()
        assert started.wait(30), "the proxy did not start"
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "kubeconfig")
            context = {"name": "troubled", "context": {"cluster": "troubled", "user": "nobody"}}
            server = {"name": "troubled", "cluster": {"server": f"http://127.0.0.1:{self._port}"}}
            document = {"apiVersion": "v1", "kind": "Config", "current-context": "troubled"}
            document |= {"clusters": [server], "contexts": [context], "users": [{"name": "nobody", "user": {}}]}
            config.write_text(yaml.safe_dump(document))
            try:
                yield config
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                thread.join(10)

    def cut_watches(self) -> None:
        """Cut the open ones."""
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._watching])

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        session = self._loop.run_until_complete(self._start())
        started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(session.close())

    async def _start(self) -> aiohttp.ClientSession:
        config = yaml.safe_load(self._cluster.kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        trust = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        connector = aiohttp.TCPConnector(ssl=trust, limit=0)
        headers = {"Authorization": f"Bearer {user['token']}"}
        session = aiohttp.ClientSession(cluster["server"], connector=connector, headers=headers, auto_decompress=False)

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._handle(request, session)

        app = web.Application(client_max_size=16 << 20)
        app.router.add_route("*", "/{path:.*}", handle)
        silent = logging.getLogger("troubled-api")
        silent.disabled = True  # of the connections that it is told to cut it says that they were cut
        runner = web.AppRunner(app, access_log=None, logger=silent)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        return session

    async def _handle(self, request: web.Request, session: aiohttp.ClientSession) -> web.StreamResponse:
        watch = request.query.get("watch") in ("true", "1")
        if self.away or (watch and not self.watches):
            raise _cut(request)
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        if watch and self.watches_expired:
            return web.Response(
                text=json.dumps({"type": "ERROR", "object": GONE}) + "\n", content_type="application/json"
            )
        if self.refuse and not watch and random.random() < self.refused_share:
            self.refusals += 1
            return _status(random.choice([code for code in self.refuse if code != 409 or request.method != "GET"]))
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP}
        task = asyncio.current_task()
        if watch and task:
            self._watching.add(task)
            task.add_done_callback(self._watching.discard)
        body = await request.read()
        timeout = aiohttp.ClientTimeout(total=None)
        async with session.request(
            request.method, request.raw_path, data=body or None, headers=headers, timeout=timeout
        ) as answer:
            response = web.StreamResponse(status=answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in HOP_BY_HOP - {"content-encoding"}:
                    response.headers[name] = value
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                if self.away or (watch and not self.watches):
                    raise _cut(request)
                await response.write(chunk)
            await response.write_eof()
            return response


def _cut(request: web.Request) -> ConnectionResetError:
    """End the connection without an answer."""
    if request.transport:
        request.transport.abort()
    return ConnectionResetError("cut by the proxy")


def _status(code: int) -> web.Response:
    text = json.dumps({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "trouble"})
    headers = {"Retry-After": "1"} if code == 429 else {}
    return web.Response(status=code, text=text, content_type="application/json", headers=headers)
