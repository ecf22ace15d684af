"""The watches. The only module that imports kopf, and all it does is queue the key of the job concerned.

A watch is a hint: what is true is read anew in each pass, and `resync` lists everything once in a while.
No change-detecting handlers, no finalizers: kopf writes nothing on our objects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import kopf

from qlora_api.v1alpha1 import GROUP, PLURAL, VERSION
from qlora_operator.manifests.names import JOB_LABEL
from qlora_operator.workqueue import WorkQueue

Raw = Mapping[str, Any]

#: A pod that starts goes through several states at once: one look at the last of them will do.
POD_SETTLES = timedelta(seconds=1)


def registry(queue: WorkQueue) -> kopf.OperatorRegistry:
    """The handlers that fill `queue`."""
    handlers = kopf.OperatorRegistry()
    heard: dict[tuple[str, str], Any] = {}

    def news(kind: str, event: Raw, mark: Any, usual: Any = None) -> bool:
        """Whether an event says something new: not the echo of our own writes, nor a heartbeat. An object that was
        not heard of before is no news where its mark is as `usual`."""
        key = (kind, event["object"]["metadata"]["uid"])
        if event["type"] == "DELETED":
            heard.pop(key, None)
            return True
        fresh = heard.get(key, usual) != mark
        heard[key] = mark
        return fresh

    @kopf.on.login(registry=handlers)
    def login(**kwargs: Any) -> Any:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.startup(registry=handlers)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        tune(settings)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=handlers)
    async def job_changed(event: Raw, name: str, meta: Raw, **_: Any) -> None:
        if news("job", event, (meta.get("generation"), meta.get("deletionTimestamp"))):
            queue.add((meta["namespace"], name))

    @kopf.on.event("batch", "v1", "jobs", labels={JOB_LABEL: kopf.PRESENT}, registry=handlers)
    async def stage_job_changed(event: Raw, meta: Raw, labels: Raw, status: Raw, **_: Any) -> None:
        verdicts = [c["type"] for c in status.get("conditions", ()) if c["status"] == "True"]
        if news("stage job", event, verdicts, usual=[]):
            queue.add((meta["namespace"], labels[JOB_LABEL]))

    @kopf.on.event("pods", labels={JOB_LABEL: kopf.PRESENT}, registry=handlers)
    async def pod_changed(event: Raw, meta: Raw, labels: Raw, spec: Raw, status: Raw, **_: Any) -> None:
        if news("pod", event, (spec.get("nodeName"), *_waits(status))):
            queue.add_after((meta["namespace"], labels[JOB_LABEL]), POD_SETTLES)

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


class NoMemory(kopf.DiffBaseStorage):
    """Instead of what kopf keeps to tell what has changed in an object since it was handled.

    No handler here asks; and to find out kopf copies each object of each event, deeply: a quarter of a burst's CPU.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return cast(kopf.BodyEssence, {})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


def tune(settings: kopf.OperatorSettings) -> None:
    """kopf's settings: narrow rights, watches that end and are renewed, no events of kopf's own."""
    settings.persistence.diffbase_storage = NoMemory()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    # filtered by the server: of a large cluster's pods and Jobs, only ours are sent
    settings.watching.label_selectors["pods"] = JOB_LABEL
    settings.watching.label_selectors["batch", "jobs"] = JOB_LABEL
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 70
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10


async def watch(queue: WorkQueue, namespaces: Sequence[str], stop: asyncio.Event) -> None:
    """Fill `queue` until `stop`, or a signal to the process. No namespaces: all."""
    await kopf.operator(
        registry=registry(queue),
        memo=kopf.Memo(),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
        stop_flag=stop,
    )
