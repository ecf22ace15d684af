"""The watches. The only module that imports kopf, and all it does is queue the key of the job concerned.

A watch is a hint: what is true is read anew in each pass, and `resync` lists everything once in a while.
No change-detecting handlers, no finalizers: kopf writes nothing on our objects.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Mapping
from typing import Any

import kopf

from qlora_api.v1alpha1 import GROUP, PLURAL, VERSION
from qlora_operator.cluster import ApiError, Cluster, connect
from qlora_operator.lifecycle.policies import FINISHED
from qlora_operator.manifests.names import JOB_LABEL
from qlora_operator.probes import Probes
from qlora_operator.reconcile import Reconciler
from qlora_operator.settings import Settings
from qlora_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

Raw = Mapping[str, Any]

#: Until the next try where the list failed: the API server is starting, or away.
RETRY_SECONDS = 3


def registry(installation: Settings) -> kopf.OperatorRegistry:
    """All handlers of an operator of `installation`."""
    handlers = kopf.OperatorRegistry()
    queue = WorkQueue()
    heard: dict[tuple[str, str], Any] = {}
    tasks: list[asyncio.Task[None]] = []
    probes = Probes(installation)

    def news(kind: str, event: Raw, mark: Any) -> bool:
        """Whether an event says something new: not the echo of our own writes, nor a heartbeat."""
        key = (kind, event["object"]["metadata"]["uid"])
        if event["type"] == "DELETED":
            heard.pop(key, None)
            return True
        fresh = heard.get(key) != mark
        heard[key] = mark
        return fresh

    @kopf.on.login(registry=handlers)
    def login(**kwargs: Any) -> Any:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.startup(registry=handlers)
    async def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
        tune(settings)
        memo.cluster = cluster = await connect()
        reconcile = Reconciler(cluster, installation)
        workers = [queue.work(reconcile) for _ in range(installation.workers)]
        for work in (probes.serve(), resync(cluster, queue, installation, probes), *workers):
            tasks.append(task := asyncio.create_task(work))
            task.add_done_callback(end_process_if_failed)

    @kopf.on.cleanup(registry=handlers)
    async def stop(memo: kopf.Memo, **_: Any) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await memo.cluster.close()

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=handlers)
    async def job_changed(event: Raw, name: str, meta: Raw, **_: Any) -> None:
        if news("job", event, (meta.get("generation"), meta.get("deletionTimestamp"))):
            queue.add((meta["namespace"], name))

    @kopf.on.event("batch", "v1", "jobs", labels={JOB_LABEL: kopf.PRESENT}, registry=handlers)
    async def stage_job_changed(event: Raw, meta: Raw, labels: Raw, status: Raw, **_: Any) -> None:
        verdicts = [c["type"] for c in status.get("conditions", ()) if c["status"] == "True"]
        if news("stage job", event, verdicts):
            queue.add((meta["namespace"], labels[JOB_LABEL]))

    @kopf.on.event("pods", labels={JOB_LABEL: kopf.PRESENT}, registry=handlers)
    async def pod_changed(event: Raw, meta: Raw, labels: Raw, spec: Raw, status: Raw, **_: Any) -> None:
        if news("pod", event, (spec.get("nodeName"), *_waits(status))):
            queue.add((meta["namespace"], labels[JOB_LABEL]))

    return handlers


def _waits(status: Raw) -> list[str]:
    """Why a pod waits, as far as a user wants to know."""
    unscheduled = [c.get("message", "") for c in status.get("conditions", ()) if c["type"] == "PodScheduled"]
    states = [next(iter(s.get("state") or {"": 0})) for s in status.get("containerStatuses", ())]
    reasons = [
        s["state"]["waiting"].get("reason", "")
        for s in status.get("containerStatuses", ())
        if "waiting" in (s.get("state") or {})
    ]
    return [status.get("phase", ""), *unscheduled, *states, *reasons]


def tune(settings: kopf.OperatorSettings) -> None:
    """kopf's settings: narrow rights, watches that end and are renewed, no events of kopf's own."""
    settings.scanning.disabled = True
    settings.posting.enabled = False
    # filtered by the server: of a large cluster's pods and Jobs, only ours are sent
    settings.watching.label_selectors["pods"] = JOB_LABEL
    settings.watching.label_selectors["batch", "jobs"] = JOB_LABEL
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 70
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10


def end_process_if_failed(task: asyncio.Task[None]) -> None:
    """None of the loops ends by itself: with one of them dead the operator only looks alive, so it is started anew."""
    if not task.cancelled() and (error := task.exception()):
        log.critical("a loop died; the process ends", exc_info=error)
        signal.raise_signal(signal.SIGTERM)


async def resync(cluster: Cluster, queue: WorkQueue, settings: Settings, probes: Probes) -> None:
    """List all jobs once in a while and queue those that are not over: the answer to missed events."""
    while True:
        try:
            for namespace in settings.namespaces or [None]:
                for job in await cluster.jobs(namespace):
                    status = job.get("status", {})
                    seen = status.get("observedGeneration") == job["metadata"]["generation"]
                    if status.get("phase") not in FINISHED or not seen:
                        queue.add((job["metadata"]["namespace"], job["metadata"]["name"]))
            probes.beat()
            pause = settings.resync_seconds
        except (ApiError, OSError) as error:
            log.warning("resync: %s", error)
            pause = RETRY_SECONDS
        await asyncio.sleep(pause)


async def run(settings: Settings) -> None:
    """Watch and work until stopped."""
    memo = kopf.Memo()
    namespaces = settings.namespaces
    await kopf.operator(
        registry=registry(settings), memo=memo, standalone=True, clusterwide=not namespaces, namespaces=namespaces
    )
