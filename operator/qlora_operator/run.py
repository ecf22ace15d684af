"""One replica of the operator, from its start to its end: it stands by until it leads, then watches and works."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from qlora_operator.cluster import ApiError, Cluster, connect
from qlora_operator.endpoint import Certificates, certificates, endpoint
from qlora_operator.handlers import watch
from qlora_operator.leadership import LEADER_LABEL, Replica, lead
from qlora_operator.metrics import Metrics
from qlora_operator.news import News
from qlora_operator.placement.inventory import Inventory
from qlora_operator.probes import Probes
from qlora_operator.reconcile import PROGRESS_PAUSE, Reconciler
from qlora_operator.reports import Reports
from qlora_operator.resync import resync, take_stock
from qlora_operator.settings import Settings
from qlora_operator.waiting import Waiting
from qlora_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

T = TypeVar("T")

#: For passes that are at work when the replica is told to stop.
LAST_PASSES_SECONDS = 10
RETRY_SECONDS = 2
#: How often the age of the certificate is looked at; it is renewed a month before its end.
CERTIFICATE_CHECK_SECONDS = 6 * 3600


async def run(settings: Settings) -> None:
    """Work until SIGTERM, or until the Lease is lost. Raises what kills one of the loops, for a process with one of
    them dead only looks alive."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = Metrics()
    cluster, probes, replica = await connect(), Probes(settings, metrics), Replica.of_environment()
    served = asyncio.create_task(probes.serve())
    ended = asyncio.create_task(_stand_by_and_lead(cluster, settings, probes, metrics, replica, stop))
    told_to_stop = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((served, ended, told_to_stop), return_when=asyncio.FIRST_COMPLETED)
        if told_to_stop.done():  # the leader's last passes; one that stands by has none
            await asyncio.wait((ended,), timeout=LAST_PASSES_SECONDS + RETRY_SECONDS if probes.leads else 0)
    finally:
        tasks = (served, ended, told_to_stop)
        failed = [error for task in tasks if task.done() and not task.cancelled() and (error := task.exception())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await cluster.close()
    if failed:
        raise failed[0]


async def _stand_by_and_lead(
    cluster: Cluster,
    settings: Settings,
    probes: Probes,
    metrics: Metrics,
    replica: Replica | None,
    stop: asyncio.Event,
) -> None:
    if replica is None:
        log.info("not in a pod: no Lease is taken, and trainers cannot report")
        await _work(cluster, settings, probes, metrics, None, stop)
        return
    here = replica

    async def work() -> None:
        await _patiently(lambda: cluster.label_pod(here.namespace, here.name, {LEADER_LABEL: "true"}))
        await _work(cluster, settings, probes, metrics, here, stop)

    # a container that was started anew in its pod does not lead yet
    await _patiently(lambda: cluster.label_pod(here.namespace, here.name, {LEADER_LABEL: None}))
    await lead(cluster.lease(settings.lease, here, probes.stands_by), work)


async def _work(
    cluster: Cluster,
    settings: Settings,
    probes: Probes,
    metrics: Metrics,
    replica: Replica | None,
    stop: asyncio.Event,
) -> None:
    """All that a leader does, until `stop`; then the passes at work are brought to their end."""
    probes.lead()
    metrics.set_leader(True)
    queue, news, inventory = WorkQueue(metrics), News(), Inventory()
    waiting = Waiting(queue)
    reports = Reports(cluster, lambda key: queue.add_after(key, PROGRESS_PAUSE))
    tls = None if replica is None else await _certificates(cluster, settings, replica)
    target = endpoint(settings, replica, tls.authority.certificate) if replica and tls else None
    reconcile = Reconciler(cluster, settings, inventory, waiting, reports, target, metrics)

    def listed(jobs: Sequence[Mapping[str, Any]]) -> None:
        uids = {job["metadata"]["uid"] for job in jobs}
        reports.keep_only(uids)
        reconcile.keep_only(uids)
        metrics.listed(jobs)
        probes.beat()

    # no plan is made from an inventory that is not filled
    await _patiently(lambda: take_stock(cluster, inventory, waiting))
    async with asyncio.TaskGroup() as group:
        loops = [group.create_task(queue.work(reconcile)) for _ in range(settings.workers)]
        loops.append(group.create_task(resync(cluster, queue, news, inventory, waiting, settings, listed)))
        if replica and tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            tls.load_into(context)
            loops.append(group.create_task(reports.serve(settings.report_port, context)))
            loops.append(group.create_task(_renew(cluster, settings, replica, context)))
        await watch(queue, news, inventory, waiting, settings.namespaces, stop)
        log.info("stopping")
        await queue.drain(LAST_PASSES_SECONDS)
        for loop in loops:
            loop.cancel()


async def _renew(cluster: Cluster, settings: Settings, replica: Replica, context: ssl.SSLContext) -> None:
    """Show a new certificate in time."""
    while True:
        await asyncio.sleep(CERTIFICATE_CHECK_SECONDS)
        (await _certificates(cluster, settings, replica)).load_into(context)


async def _certificates(cluster: Cluster, settings: Settings, replica: Replica) -> Certificates:
    return await _patiently(lambda: certificates(cluster, settings, replica))


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    """`call`, until the API server takes it."""
    while True:
        try:
            return await call()
        except ApiError as error:
            log.warning("%s; again in %d s", error, RETRY_SECONDS)
            await asyncio.sleep(RETRY_SECONDS)
