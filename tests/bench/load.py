"""The load: QLoRAJobs by the hundred, what a bare client does instead of the operator, and when Jobs come to exist."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kubernetes.aio import client, config

from qlora_api.v1alpha1 import API_VERSION, GROUP, KIND, PLURAL, VERSION, QLoRAJob
from qlora_operator.lifecycle.observed import Job, Observed
from qlora_operator.lifecycle.policies import next_step
from qlora_operator.lifecycle.tasks import INSPECT, MERGE, TRAIN
from qlora_operator.manifests.jobs import stage_job
from qlora_operator.manifests.names import JOB_LABEL
from qlora_operator.manifests.orders import config_map
from qlora_operator.settings import Settings
from tests.cluster import kwok
from tests.unit.operator import given

#: Requests under way at a time: of the bare client, and of the user who applies the jobs.
CONCURRENCY = 32

Raw = dict[str, Any]


def manifest(name: str) -> Raw:
    """A QLoRAJob whose pods can only run on fake nodes, and wait there: its data's claim does not exist.

    They must not run: kwok ends every pod of a Job at once, without the result that a stage reports.
    """
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "pvc://models/base"},
            "dataset": {"train": [{"uri": "pvc://data/train.jsonl"}]},
            "output": {"uri": f"pvc://results/{name}", "formats": ["adapter", "merged"]},
            "podTemplate": {"nodeSelector": {"type": "kwok"}, "tolerations": [kwok.TOLERATION]},
        },
    }


def children(raw: Raw, owner: Raw, settings: Settings) -> tuple[Raw, Raw]:
    """The order and the Job that the operator makes first for a QLoRAJob, owned by `owner` (an object that exists:
    the garbage collector would set about children of one that does not)."""
    job = QLoRAJob.read(raw | {"metadata": owner["metadata"] | raw["metadata"]})
    made = Job(job.metadata, job.spec, job.status)
    both = config_map(made, INSPECT, 1, settings), stage_job(made, INSPECT, 1, settings)
    for child in both:
        child["metadata"]["ownerReferences"][0]["name"] = owner["metadata"]["name"]
    return both


def finished_status(raw: Raw) -> Raw:
    """What the operator has written of the stored QLoRAJob `raw` once it has succeeded and its volume is given back."""
    read = QLoRAJob.read(raw)
    fresh = Job(read.metadata, read.spec, read.status)
    job = given.history(fresh, INSPECT, TRAIN, MERGE, given.PUBLISH_ADAPTER, given.PUBLISH_MERGED)
    for _ in ("published", "volume given back"):
        job = Job(job.metadata, job.spec, next_step(job, Observed(), datetime.now(UTC)).status)
    return {key: value for key, value in job.status.to_api().items() if value != []}


class Load:
    """A client of the API server, in one namespace."""

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._namespace = namespace
        self._batch = client.BatchV1Api(api)
        self._core = client.CoreV1Api(api)
        self._custom = client.CustomObjectsApi(api)
        self.sent: dict[str, float] = {}

    async def apply(self, name: str) -> Raw:
        """Create the QLoRAJob `name`; `sent` has when."""
        self.sent[name] = time.monotonic()
        create: Any = self._custom.create_namespaced_custom_object_without_preload_content
        return await _done(create(GROUP, VERSION, self._namespace, PLURAL, manifest(name)))

    async def apply_finished(self, name: str) -> None:
        """Create the QLoRAJob `name` with the status of one that has succeeded."""
        stored = await self.apply(name)
        patch: Any = self._custom.patch_namespaced_custom_object_status_without_preload_content
        status = {"status": finished_status(stored)}
        merge = "application/merge-patch+json"
        await _done(patch(GROUP, VERSION, self._namespace, PLURAL, name, status, _content_type=merge))

    async def create_children(self, order: Raw, job: Raw) -> None:
        """Create both, one after the other, as the operator does."""
        self.sent[job["metadata"]["name"]] = time.monotonic()
        create_order: Any = self._core.create_namespaced_config_map_without_preload_content
        create_job: Any = self._batch.create_namespaced_job_without_preload_content
        await _done(create_order(self._namespace, order))
        await _done(create_job(self._namespace, job))

    async def jobs(self) -> list[Raw]:
        """The QLoRAJobs of the namespace."""
        call: Any = self._custom.list_namespaced_custom_object_without_preload_content
        return (await _done(call(GROUP, VERSION, self._namespace, PLURAL)))["items"]

    @asynccontextmanager
    async def births(self) -> AsyncIterator[dict[str, float]]:
        """While inside: when each batch/v1 Job was first heard of, by name."""
        seen: dict[str, float] = {}
        call: Any = self._batch.list_namespaced_job_without_preload_content
        stream = await call(self._namespace, watch=True, label_selector=JOB_LABEL, timeout_seconds=3600)

        async def listen() -> None:
            while line := await stream.content.readline():
                now = time.monotonic()
                seen.setdefault(json.loads(line)["object"]["metadata"]["name"], now)

        listener = asyncio.create_task(listen())
        try:
            yield seen
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
            stream.close()


@asynccontextmanager
async def connected(kubeconfig: Path, namespace: str) -> AsyncIterator[Load]:
    """A client with a connection pool of its own."""
    async with await config.new_client_from_config(config_file=str(kubeconfig)) as api:
        yield Load(api, namespace)


async def at_once(call: Callable[..., Awaitable[Any]], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Call with each of `arguments`, `CONCURRENCY` at a time."""
    left = iter(arguments)

    async def work() -> None:
        for one in left:
            await call(*one)

    async with asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(work())


async def until(holds: Callable[[], bool], seconds: float) -> None:
    """Return once it holds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.02)


async def _done(call: Awaitable[Any]) -> Raw:
    response = await call
    body = await response.read()
    if response.status >= 300:
        raise RuntimeError(f"{response.status}: {body.decode(errors='replace')[:500]}")
    return json.loads(body)
