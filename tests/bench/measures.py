"""The measurements, one function each: from a cluster to figures."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

from examples.quickstart.install import Images, install
from examples.quickstart.upload import fill_claim
from qlora_api.schema import crd
from qlora_api.v1alpha1 import GROUP, PLURAL
from qlora_operator.lifecycle.tasks import INSPECT, TRAIN
from tests.bench.figures import Figure, Measured, Target, percentile, rate
from tests.bench.host_operator import Operator
from tests.bench.load import at_once, children, connected, manifest, until
from tests.cluster import images
from tests.cluster.client import Cluster
from tests.cluster.console import step, tell
from tests.e2e.conftest import Product, quickstart

#: Longest that one load may take until all of its Jobs are there.
PATIENCE_SECONDS = 240
DELETED_WHILE_DOWN = 20
REST_SECONDS = 120

MIB = 1024**2
DEFINITION = f"{PLURAL}.{GROUP}"
PREFIX = "bench-"
INSTALLED = "app.kubernetes.io/name=qlora-operator"


def names(count: int) -> list[str]:
    return [f"load-{number:04}" for number in range(count)]


def first_child(name: str) -> str:
    return INSPECT.job_name(name, 1)


# --- rates ---


def bare(cluster: Cluster, count: int) -> float:
    """Pairs of ConfigMap and Job a second that a client creates which does nothing else."""
    with namespace(cluster, "bare") as place, tempfile.TemporaryDirectory() as directory:
        settings = Operator(cluster, place, Path(directory)).settings

        async def run() -> float:
            async with connected(cluster.kubeconfig, place) as load:
                owner = await load.apply("owner")
                load.sent.clear()
                pairs = [children(manifest(name), owner, settings) for name in names(count)]
                async with load.births() as seen:
                    await at_once(load.create_children, pairs)
                    await until(lambda: len(seen) >= count, PATIENCE_SECONDS)
                return rate(load.sent, seen)

        with step(f"bare client: {count} ConfigMaps and Jobs"):
            per_second = asyncio.run(run())
        tell(f"   {per_second:.1f} a second")
        return per_second


def burst(cluster: Cluster, count: int, *, whole: bool) -> tuple[float, list[float], Counter[str]]:
    """First children a second, seconds from apply to child, and with `whole` the requests until all have settled, when
    `count` jobs are applied at once."""
    with operated_namespace(cluster, "burst") as operator, step(f"burst: {count} QLoRAJobs"):
        operator.start()
        operator.wait_ready()
        operator.settled()
        before, cpu = requests(cluster), operator.cpu_seconds()

        async def run() -> tuple[float, list[float]]:
            async with connected(cluster.kubeconfig, operator.namespace) as load, load.births() as seen:
                await at_once(load.apply, ((name,) for name in names(count)))
                await until(lambda: len(seen) >= count, PATIENCE_SECONDS)
                return rate(load.sent, seen), [seen[first_child(name)] - sent for name, sent in load.sent.items()]

        per_second, waits = asyncio.run(run())
        tell(f"   {per_second:.1f} a second, {1000 * (operator.cpu_seconds() - cpu) / count:.1f} ms of CPU each")
        if not whole:
            return per_second, waits, Counter()
        operator.settled()
        return per_second, waits, requests(cluster) - before


def start(cluster: Cluster, count: int) -> tuple[float, float]:
    """First children a second when the operator starts with `count` jobs there, and seconds from its start to the
    first child."""
    with operated_namespace(cluster, "start") as operator, step(f"start: {count} QLoRAJobs there"):

        async def run() -> tuple[float, float]:
            async with connected(cluster.kubeconfig, operator.namespace) as load, load.births() as seen:
                await at_once(load.apply, ((name,) for name in names(count)))
                operator.start()
                await until(lambda: len(seen) >= count, PATIENCE_SECONDS)
                first = min(seen.values())
                return rate({}, seen, since=first), first - operator.started

        return asyncio.run(run())


def measure_burst(cluster: Cluster, count: int, runs: int) -> Measured:
    """The burst beside the bare client, in turns."""
    both = [(bare(cluster, count), burst(cluster, count, whole=run == 0)) for run in range(runs)]
    per_job = {name: n / count for name, n in both[0][1][2].most_common()}
    return Measured(
        (
            Figure("bare client", "jobs/s", tuple(alone for alone, _ in both)),
            Figure("operator", "jobs/s", tuple(rate for _, (rate, _, _) in both)),
            Figure("ratio", "", tuple(rate / alone for alone, (rate, _, _) in both), Target("at least", 0.25)),
            Figure("apply to child, median", "s", tuple(percentile(waits, 50) for _, (_, waits, _) in both)),
            Figure("apply to child, p99", "s", tuple(percentile(waits, 99) for _, (_, waits, _) in both)),
        ),
        {name: n for name, n in per_job.items() if n >= 0.05},
    )


def measure_start(cluster: Cluster, count: int, runs: int) -> Measured:
    """The start beside the bare client, in turns."""
    both = [(bare(cluster, count), start(cluster, count)) for _ in range(runs)]
    return Measured(
        (
            Figure("bare client", "jobs/s", tuple(alone for alone, _ in both)),
            Figure("operator", "jobs/s", tuple(rate for _, (rate, _) in both)),
            Figure("ratio", "", tuple(rate / alone for alone, (rate, _) in both), Target("at least", 0.40)),
            Figure("process start to first child", "s", tuple(first for _, (_, first) in both)),
        )
    )


# --- at rest ---


def measure_rest(cluster: Cluster, count: int) -> Measured:
    """Memory and CPU at rest, and how long a restart takes until all is as it should be."""
    waiting, finished = names(count)[: count // 2], names(count)[count // 2 :]
    with operated_namespace(cluster, "rest") as operator:

        async def fill() -> None:
            async with connected(cluster.kubeconfig, operator.namespace) as load:
                await at_once(load.apply_finished, ((name,) for name in finished))
                await at_once(load.apply, ((name,) for name in waiting))

        with step(f"rest: {count} QLoRAJobs, half of them finished") as work:
            asyncio.run(fill())
            operator.start()
            cluster.wait(
                "every pod of a waiting job is there",
                lambda: _told(work.say, len(cluster.list("pod", operator.namespace))),
                lambda pods: pods >= len(waiting),
                timeout=PATIENCE_SECONDS,
                interval=3,
            )
            operator.settled()
        with step(f"rest: {REST_SECONDS} s"):
            cpu, began = operator.cpu_seconds(), time.monotonic()
            time.sleep(REST_SECONDS)
            share = (operator.cpu_seconds() - cpu) / (time.monotonic() - began)
            resident = operator.memory_bytes() / MIB
        with step(f"rest: restart, {DELETED_WHILE_DOWN} Jobs deleted meanwhile"):
            settled = _restart(cluster, operator, waiting[:DELETED_WHILE_DOWN])
        return Measured(
            (
                Figure("memory", "MiB", (resident,), Target("at most", 200)),
                Figure("memory, peak since the restart", "MiB", (operator.memory_bytes("VmHWM") / MIB,)),
                Figure("CPU", "% of a core", (100 * share,), Target("at most", 3)),
                Figure("restart to settled", "s", (settled,), Target("at most", 10)),
            )
        )


def _restart(cluster: Cluster, operator: Operator, robbed: list[str]) -> float:
    """Seconds from the operator's start until it has settled, the Jobs of `robbed` having gone before."""
    operator.stop()
    lost = [first_child(name) for name in robbed]
    cluster.kubectl("delete", "job", "--cascade=foreground", *lost, namespace=operator.namespace)

    async def run() -> float:
        async with connected(cluster.kubeconfig, operator.namespace) as load, load.births() as seen:
            await until(lambda: len(seen) > 0, PATIENCE_SECONDS)  # those that are left
            operator.start()
            await until(lambda: all(name in seen for name in lost), PATIENCE_SECONDS)
            return max(seen[name] for name in lost)

    back = asyncio.run(run())
    return max(back, operator.settled()) - operator.started


def _told(say: Callable[[str], None], count: int) -> int:
    say(f"{count} pods")
    return count


# --- status writes ---


def measure_writes(cluster: Cluster) -> Measured:
    """Requests to the status of one job that runs from end to end, with the product as a user has it."""
    built = Images(images.ensure("operator"), images.ensure("trainer"))
    install(cluster, built, {"cpuAllowed": True, "stageEnv": {"OMP_NUM_THREADS": "1"}})
    with namespace(cluster, "writes") as place:
        fill_claim(cluster, place, built.trainer)
        product = Product(cluster, built, place)
        before = requests(cluster)
        with step("one quickstart job from apply to published"):
            job = product.wait_for(product.apply(quickstart("counted")), "Succeeded", timeout=900)
        made = requests(cluster) - before
    writes = sum(made[f"{verb} {PLURAL}/status"] for verb in ("APPLY", "PATCH", "PUT"))
    (training,) = (a for a in job["status"]["attempts"] if a["stage"] == TRAIN.stage)
    seconds = (datetime.fromisoformat(training["ended"]) - datetime.fromisoformat(training["started"])).total_seconds()
    return Measured(
        (
            Figure("status writes", "", (writes,), Target("at most", 25 + seconds // 10)),
            Figure("training", "s", (seconds,)),
        )
    )


# --- surroundings ---


def requests(cluster: Cluster) -> Counter[str]:
    """Requests that the API server has answered so far, by verb and resource; watches aside."""
    counted: Counter[str] = Counter()
    for line in cluster.kubectl("get", "--raw", "/metrics").splitlines():
        if line.startswith("apiserver_request_total{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            resource = "/".join(part for part in (labels["resource"], labels.get("subresource")) if part)
            if labels["verb"] != "WATCH" and resource not in ("", "leases", "nodes", "nodes/status"):
                counted[f"{labels['verb']} {resource}"] += int(float(line.rpartition(" ")[2]))
    return counted


@contextmanager
def operated_namespace(cluster: Cluster, purpose: str) -> Iterator[Operator]:
    """A fresh namespace and an operator for it, not started yet; both gone afterwards."""
    with namespace(cluster, purpose) as place, tempfile.TemporaryDirectory() as directory:
        operator = Operator(cluster, place, Path(directory))
        try:
            yield operator
        finally:
            operator.stop()


@contextmanager
def namespace(cluster: Cluster, purpose: str) -> Iterator[str]:
    """A fresh namespace, made once those of before are wholly gone: one load must not burden the next."""
    clear(cluster)
    name = f"{PREFIX}{purpose}-{uuid.uuid4().hex[:6]}"
    cluster.create_namespace(name)
    try:
        yield name
    finally:
        cluster.delete("namespace", name, wait=False)


def clear(cluster: Cluster) -> None:
    """Return once no namespace of a bench is left, also of one that was killed."""

    def left() -> list[str]:
        found = (namespace["metadata"]["name"] for namespace in cluster.list("namespace"))
        return [name for name in found if name.startswith(PREFIX)]

    names = left()
    for name in names:
        cluster.delete("namespace", name, wait=False)
    if names:
        with step("clearing away"):
            cluster.wait("nothing is left", left, lambda found: not found, timeout=PATIENCE_SECONDS, interval=2)


@contextmanager
def alone(cluster: Cluster) -> Iterator[None]:
    """With this version's definition of QLoRAJobs and every installed operator scaled to none; afterwards as before."""
    there = cluster.find("crd", DEFINITION)
    cluster.apply(crd())
    cluster.wait(
        "QLoRAJobs are served", lambda: cluster.kubectl("get", DEFINITION, "--all-namespaces", "--output=name"), _any
    )
    installed = [
        (found["metadata"]["namespace"], found["metadata"]["name"], found["spec"]["replicas"])
        for found in cluster.list("deployment", selector=INSTALLED)
        if found["spec"]["replicas"]
    ]
    try:
        for where, name, _ in installed:
            tell(f" - pausing the operator installed in {where}")
            cluster.kubectl("scale", "deployment", name, "--replicas=0", namespace=where)
            pods = partial(cluster.list, "pod", where, INSTALLED)
            cluster.wait("its pods are gone", pods, lambda left: not left)
        yield
    finally:
        for where, name, replicas in installed:
            cluster.kubectl("scale", "deployment", name, f"--replicas={replicas}", namespace=where)
        if there is None:
            cluster.delete("crd", DEFINITION)


def _any(_: object) -> bool:
    return True
