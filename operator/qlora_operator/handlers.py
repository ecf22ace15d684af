"""The watches. The only module that imports kopf, and all it does is queue the key of the job concerned,
and keep the inventory of nodes.

A watch is a hint: what is true is read anew in each pass, and `resync` lists everything once in a while.
No change-detecting handlers, no finalizers: kopf writes nothing on our objects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import kopf

from qlora_api.v1alpha1 import GROUP, KIND, PLURAL, VERSION
from qlora_operator.cluster import PAGE
from qlora_operator.manifests.names import JOB_LABEL
from qlora_operator.news import News
from qlora_operator.placement.inventory import Inventory
from qlora_operator.waiting import Waiting
from qlora_operator.workqueue import Key, WorkQueue

Raw = Mapping[str, Any]

#: A pod that starts goes through several states at once: one look at the last of them will do.
POD_SETTLES = timedelta(seconds=1)


def registry(queue: WorkQueue, news: News, inventory: Inventory, waiting: Waiting) -> kopf.OperatorRegistry:
    """The handlers that fill `queue`, and keep `inventory`."""
    handlers = kopf.OperatorRegistry()

    def concerned(kind: str, event: Raw) -> Key | None:
        """The key of the job to look at, if the event says something new."""
        thing = event["object"]
        return news.hear_the_end(kind, thing) if event["type"] == "DELETED" else news.hear(kind, thing)

    @kopf.on.login(registry=handlers)
    def login(**kwargs: Any) -> Any:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.startup(registry=handlers)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        tune(settings)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=handlers)
    async def job_changed(event: Raw, **_: Any) -> None:
        if key := concerned(KIND, event):
            queue.add(key)

    @kopf.on.event("batch", "v1", "jobs", labels={JOB_LABEL: kopf.PRESENT}, registry=handlers)
    async def stage_job_changed(event: Raw, **_: Any) -> None:
        if key := concerned("Job", event):
            queue.add(key)

    @kopf.on.event("pods", labels={JOB_LABEL: kopf.PRESENT}, registry=handlers)
    async def pod_changed(event: Raw, **_: Any) -> None:
        if key := concerned("Pod", event):
            queue.add_after(key, POD_SETTLES)

    @kopf.on.event("", "v1", "nodes", registry=handlers)
    async def node_changed(event: Raw, **_: Any) -> None:
        node = event["object"]
        gone = event["type"] == "DELETED"
        if inventory.remove(node["metadata"]["name"]) if gone else inventory.put(node):
            waiting.nodes_have_changed()

    return handlers


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
    settings.watching.chunk_size = PAGE  # thousands of nodes at once would be hundreds of MiB
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = 70
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10


async def watch(
    queue: WorkQueue,
    news: News,
    inventory: Inventory,
    waiting: Waiting,
    namespaces: Sequence[str],
    stop: asyncio.Event,
) -> None:
    """Fill `queue`, and keep `inventory`, until `stop`, or a signal to the process. No namespaces: all."""
    await kopf.operator(
        registry=registry(queue, news, inventory, waiting),
        memo=kopf.Memo(),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
        stop_flag=stop,
    )
