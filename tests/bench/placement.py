"""What planning costs without a cluster: the index of nodes, its memory, offers, and a whole plan."""

from __future__ import annotations

import gc
import itertools
import json
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

from qlora_api.v1alpha1 import Plan
from qlora_operator import planner
from qlora_operator.placement.flavours import Demands
from qlora_operator.placement.inventory import Inventory
from qlora_operator.sizing.catalogue import catalogue
from tests.bench.figures import Figure, Measured, Target
from tests.cluster import gpus
from tests.unit.operator import given

Raw = dict[str, Any]

MIB = 1024**2
SIZES = (50, 500, 5000, 20_000)
#: Of the figures that name no other number.
NODES, FLAVOURS = 5000, 50
RUNS = 5
#: Calls whose median is one run: a hundred microseconds are too few for a clock that others share.
CALLS = 200
MODEL = "meta-llama/Llama-3.1-8B"

PRODUCTS = (gpus.T4, gpus.L4, gpus.L40S, gpus.A100_40GB, gpus.A100_80GB, gpus.H100, gpus.H200, gpus.RTX_4090)
#: A node carries some sixty labels besides those of its GPUs: of its cloud, its CPU and its kernel.
OTHERS = {f"feature.node.kubernetes.io/cpu-cpuid.FEATURE{n}": "true" for n in range(52)}


def nodes(count: int) -> Iterator[Raw]:
    """Nodes as the API server sends them, in `FLAVOURS` flavours: products in nodes with one to sixteen of them."""
    kinds = list(itertools.islice(itertools.product((1, 2, 4, 8, 16, 3, 6), PRODUCTS), FLAVOURS))
    for n in range(count):
        each, product = kinds[n % len(kinds)]
        name = f"gpu-{n}.cluster.example"
        place = {
            "kubernetes.io/hostname": name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            "topology.kubernetes.io/zone": f"zone-{n % 3}",
            "node.kubernetes.io/instance-type": f"type-{n % len(kinds)}",
        }
        node: Raw = {
            "metadata": {"name": name, "labels": OTHERS | place | gpus.labels(product, each)},
            "spec": {"taints": [{"key": gpus.RESOURCE, "value": "present", "effect": "NoSchedule"}]},
            "status": {
                "allocatable": {"cpu": "64", "memory": "527977204Ki", gpus.RESOURCE: str(each)},
                "conditions": [
                    {"type": kind, "status": "True" if kind == "Ready" else "False", "lastHeartbeatTime": f"{n}"}
                    for kind in ("MemoryPressure", "DiskPressure", "PIDPressure", "Ready")
                ],
                "images": [{"names": [f"registry.example/image-{i}"], "sizeBytes": i} for i in range(50)],
            },
        }
        yield json.loads(json.dumps(node))  # no two share a text, as when they come from the API server


def changed(node: Raw) -> Raw:
    """The same with one GPU out of order."""
    status = node["status"]
    left = str(int(status["allocatable"][gpus.RESOURCE]) - 1)
    return node | {"status": status | {"allocatable": status["allocatable"] | {gpus.RESOURCE: left}}}


def each_microseconds(calls: list[Callable[[], object]]) -> float:
    """The median over `calls`, in microseconds of this thread's CPU time: others' work on the machine counts less."""
    taken = []
    for call in calls:
        before = time.thread_time()
        call()
        taken.append(time.thread_time() - before)
    return 1e6 * statistics.median(taken)


def measure() -> Measured:
    """Figures of a process of its own, without a cluster."""
    demands = Demands(tolerations=planner.GPU_TOLERATIONS)
    figures = [
        figure for count in SIZES for figure in _events(count, Target("at most", 50) if count <= NODES else None)
    ]
    figures.append(Figure(f"memory of the index, {NODES} nodes", "MiB", (_memory_mib(),), Target("at most", 20)))
    inventory = Inventory.of(nodes(NODES))
    assert len(inventory.offers(demands).flavours) == FLAVOURS
    zoned = Demands(node_selector={"topology.kubernetes.io/zone": "zone-1"}, tolerations=demands.tolerations)
    spec = given.job({"model.uri": f"hf://{MODEL}"}).spec
    found = given.inspection(catalogue()[MODEL].shape, max_length=2048)
    assert isinstance(planner.plan(spec, found, inventory), Plan)
    of = f"{NODES} nodes in {FLAVOURS} flavours"
    figures += [
        Figure(f"offers, {of}", "µs", _runs(lambda: inventory.offers(demands)), Target("at most", 1000)),
        Figure(f"offers with a node selector, {of}", "µs", _runs(lambda: inventory.offers(zoned))),
        Figure(
            f"a whole plan, {of}",
            "ms",
            tuple(run / 1000 for run in _runs(lambda: planner.plan(spec, found, inventory), calls=20)),
            Target("at most", 5),
        ),
    ]
    return Measured(tuple(figures))


def _runs(call: Callable[[], object], calls: int = CALLS) -> tuple[float, ...]:
    call()  # what is kept from one call to the next is kept in the operator too
    return tuple(each_microseconds([call] * calls) for _ in range(RUNS))


def _events(count: int, target: Target | None) -> Iterator[Figure]:
    """An event that changes a node, and one that does not, in an index of `count` nodes."""
    inventory, chance = Inventory.of(nodes(count)), random.Random(1)
    some = [node for n, node in enumerate(nodes(count)) if n % max(1, count // CALLS) == 0][:CALLS]
    runs, idle = [], []
    for n in range(RUNS):
        chance.shuffle(some)
        news = [changed(node) if n % 2 == 0 else node for node in some]
        runs.append(each_microseconds([lambda node=node: inventory.put(node) for node in news]))
        idle.append(each_microseconds([lambda node=node: inventory.put(node) for node in news]))
    yield Figure(f"event that changes a node, {count} nodes", "µs", tuple(runs), target)
    yield Figure(f"heartbeat, {count} nodes", "µs", tuple(idle), target)


def _memory_mib() -> float:
    """What the index of `NODES` nodes holds, once the nodes themselves are forgotten."""
    Inventory.of(nodes(FLAVOURS))  # the table of products is read once, whatever the number of nodes
    gc.collect()
    tracemalloc.start()
    inventory = Inventory.of(nodes(NODES))
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(inventory.names) == NODES
    return held / MIB
