"""Which GPUs the cluster has for whom, read from nodes as their labels describe them, and why not the others."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from qlora_operator.placement.flavours import Demands, Flavour, Offers, tolerates
from qlora_operator.placement.inventory import Inventory
from qlora_operator.placement.products import products
from tests.cluster import gpus
from tests.unit.operator.given import A10, A100_40, A100_80, GIB, H100, L40S, MIB, gpu_node

Raw = dict[str, Any]

AMD = Demands(accelerator="amd")
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
TEAM_TAINT = {"key": "team", "value": "vision", "effect": "NoSchedule"}
CORDON = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
SLICE = "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb"


def node(
    name: str, labels: Mapping[str, str], allocatable: Mapping[str, int | str], *, gone: str = "", **spec: Any
) -> Raw:
    """A node that is ready, with whatever labels and resources."""
    return {
        "metadata": {"name": name, "labels": dict(labels)} | ({"deletionTimestamp": gone} if gone else {}),
        "spec": spec,
        "status": {
            "allocatable": {"memory": "64Gi"} | {resource: str(count) for resource, count in allocatable.items()},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def offers(*nodes: Raw, demands: Demands | None = None) -> Offers:
    return Inventory.of(nodes).offers(demands or Demands())


def refusals(*nodes: Raw, demands: Demands | None = None) -> dict[str, str]:
    return {refusal.product: refusal.reason for refusal in offers(*nodes, demands=demands).refused}


# --- what is offered ---


def nvidia(product: str, mib: int | None, gpus: int = 1, nodes: int = 1, **more: Any) -> Flavour:
    """Whole GPUs as feature discovery describes them."""
    fields: dict[str, Any] = {
        "labels": (("nvidia.com/gpu.product", product),),
        "memory_label": "nvidia.com/gpu.memory",
    }
    return Flavour("nvidia.com/gpu", product, (mib or 0) * MIB, gpus, nodes, **(fields | more))


def sliced(profile: str, mib: int, count: int, of: str = H100[0]) -> dict[str, str]:
    """The labels of one profile under MIG's mixed strategy."""
    resource = f"nvidia.com/mig-{profile}"
    return {
        f"{resource}.product": f"{of}-MIG-{profile}",
        f"{resource}.memory": str(mib),
        f"{resource}.count": str(count),
        f"{resource}.replicas": "1",
        f"{resource}.sharing-strategy": "none",
    }


def mig(profile: str, mib: int, count: int, **more: Any) -> Flavour:
    resource, product = f"nvidia.com/mig-{profile}", f"{H100[0]}-MIG-{profile}"
    return Flavour(
        resource,
        product,
        mib * MIB,
        count,
        1,
        labels=((f"{resource}.product", product),),
        memory_label=f"{resource}.memory",
        partition=True,
        **more,
    )


COMPUTE = {"nvidia.com/gpu.compute.major": "9", "nvidia.com/gpu.compute.minor": "0"}
MIXED_STRATEGY = {
    "nvidia.com/gpu.product": H100[0],
    "nvidia.com/gpu.memory": str(H100[1]),
    "nvidia.com/mig.strategy": "mixed",
    "nvidia.com/mig.config.state": "success",
    **COMPUTE,
    **sliced("3g.40gb", 40448, 2),
    **sliced("1g.10gb", 9728, 7),
}
MI210 = {"amd.com/gpu.vram": "64G", "amd.com/gpu.product-name": "Instinct_MI210"}

OFFERED: list[Any] = [
    pytest.param([gpu_node("a", *L40S, gpus=4)], [nvidia(*L40S, 4, compute=(8, 9))], id="as labelled"),
    pytest.param(
        [gpu_node("a", "NVIDIA-X1", 5000, labels=COMPUTE)],
        [nvidia("NVIDIA-X1", 5000, compute=(9, 0))],
        id="an unknown product with all its labels",
    ),
    pytest.param(
        [gpu_node("a", "NVIDIA-X1", 5000)], [nvidia("NVIDIA-X1", 5000)], id="compute capability that nothing tells"
    ),
    pytest.param(
        [gpu_node("a", "NVIDIA-GeForce-RTX-4090", None)],
        [nvidia("NVIDIA-GeForce-RTX-4090", 24564, compute=(8, 9), memory_label=None)],
        id="memory by the product, where no label tells it",
    ),
    pytest.param(
        [gpu_node("a", "NVIDIA-A100-SXM4-40GB", 42505273344)],
        [Flavour("nvidia.com/gpu", A100_40[0], 42505273344, 1, 1, (8, 0), (("nvidia.com/gpu.product", A100_40[0]),))],
        id="memory in bytes, as early versions write it",
    ),
    pytest.param(
        [gpu_node("a", *L40S, gpus=3, labels={"nvidia.com/gpu.count": "4"})],
        [nvidia(*L40S, 3, compute=(8, 9))],
        id="a GPU that is out of order",
    ),
    pytest.param(
        [gpu_node("a", *L40S), gpu_node("b", *L40S), gpu_node("c", *L40S, gpus=8)],
        [nvidia(*L40S, 1, nodes=2, compute=(8, 9)), nvidia(*L40S, 8, compute=(8, 9))],
        id="nodes of other sizes are another flavour",
    ),
    pytest.param(
        [gpu_node("a", *L40S), gpu_node("b", *L40S, taints=[{"key": "x", "effect": "PreferNoSchedule"}])],
        [nvidia(*L40S, nodes=2, compute=(8, 9))],
        id="a soft taint keeps nobody away",
    ),
    pytest.param(
        [gpu_node("down", *L40S, ready=False), gpu_node("up", *L40S)],
        [nvidia(*L40S, compute=(8, 9))],
        id="one good node makes a product usable, and is the only one that counts",
    ),
    pytest.param(
        [gpu_node("a", SLICE, 9728, gpus=7)],
        [nvidia(SLICE, 9728, 7, compute=(8, 0), partition=True)],
        id="MIG single: the memory of the label, not of the name",
    ),
    pytest.param(
        [node("a", MIXED_STRATEGY, {"nvidia.com/mig-3g.40gb": 2, "nvidia.com/mig-1g.10gb": 7, "nvidia.com/gpu": 4})],
        [
            nvidia(*H100, 4, compute=(9, 0)),
            mig("1g.10gb", 9728, 7, compute=(9, 0)),
            mig("3g.40gb", 40448, 2, compute=(9, 0)),
        ],
        id="MIG mixed: slices, and GPUs that are whole",
    ),
    pytest.param(
        [gpu_node("a", *A10, labels={"nvidia.com/gpu.replicas": "1", "nvidia.com/gpu.sharing-strategy": "none"})],
        [nvidia(*A10, compute=(8, 6))],
        id="shared with nobody",
    ),
]


@pytest.mark.parametrize(("nodes", "expected"), OFFERED)
def test_what_is_offered(nodes: list[Raw], expected: list[Flavour]) -> None:
    assert offers(*nodes) == Offers(tuple(expected), ())


AMD_OFFERED: list[Any] = [
    pytest.param(MI210, "Instinct_MI210", 64, tuple(sorted(MI210.items(), reverse=False)), id="as labelled"),
    pytest.param(
        {"beta.amd.com/gpu.vram.64G": "8", "beta.amd.com/gpu.product-name.Instinct_MI210": "8"},
        "Instinct_MI210",
        64,
        (("beta.amd.com/gpu.product-name.Instinct_MI210", "8"), ("beta.amd.com/gpu.vram.64G", "8")),
        id="an old labeller: under its beta prefix, and counted",
    ),
    pytest.param(
        {"amd.com/gpu.vram.64G": "2", "amd.com/gpu.vram.128G": "6"},
        "AMD GPU",
        64,
        (("amd.com/gpu.vram.128G", "6"), ("amd.com/gpu.vram.64G", "2")),
        id="unlike GPUs in one node: the smallest, for a pod may get that one",
    ),
    pytest.param(
        MI210 | {"amd.com/gpu.compute-memory-partition": "spx_nps1"},
        "Instinct_MI210",
        64,
        tuple(sorted(MI210.items())),
        id="not partitioned",
    ),
    pytest.param(
        MI210 | {f"beta.{label}": value for label, value in MI210.items()},
        "Instinct_MI210",
        64,
        tuple(sorted(MI210.items())),
        id="both prefixes",
    ),
]


@pytest.mark.parametrize(("labels", "product", "gib", "affinity"), AMD_OFFERED)
def test_what_is_offered_of_amd(
    labels: dict[str, str], product: str, gib: int, affinity: tuple[tuple[str, str], ...]
) -> None:
    """The label is rounded to a GiB: half of one is taken off, for no training may be planned to fill it."""
    [flavour] = offers(node("a", labels, {"amd.com/gpu": 8}), demands=AMD).flavours
    assert flavour == Flavour("amd.com/gpu", product, gib * GIB - GIB // 2, 8, 1, None, affinity, None, False)
    assert (flavour.accelerator, flavour.memory_label) == ("amd", None)


# --- what is refused ---

SHARED = (
    "{}: another tenant may take the memory that was planned; "
    "turn sharing off for node a in the configuration of NVIDIA's device plugin"
)
NO_PLUGIN = "node a has no {} to allocate: see the pod of {}'s device plugin there"
STATE = "nvidia.com/mig.config.state"
UNKNOWN = (
    "node a has no label nvidia.com/gpu.memory in MiB, and {0} is no GPU whose memory is known by its name: "
    "run NVIDIA's GPU feature discovery, or kubectl label node a nvidia.com/gpu.memory=MIB"
)

REFUSED: list[Any] = [
    pytest.param(
        node("a", {}, {"nvidia.com/gpu": 2}),
        {"unlabelled GPU": "node a has no label nvidia.com/gpu.product: run NVIDIA's GPU feature discovery"},
        id="no labels",
    ),
    pytest.param(gpu_node("a", "NVIDIA-X1", None), {"NVIDIA-X1": UNKNOWN.format("NVIDIA-X1")}, id="no memory"),
    pytest.param(gpu_node("a", "NVIDIA-X1", 0), {"NVIDIA-X1": UNKNOWN.format("NVIDIA-X1")}, id="memory of nothing"),
    pytest.param(
        gpu_node("a", SLICE, None), {SLICE: UNKNOWN.format(SLICE)}, id="a slice's memory is not told by its name"
    ),
    pytest.param(
        gpu_node("a", *A10, gpus=0), {A10[0]: NO_PLUGIN.format("nvidia.com/gpu", "NVIDIA")}, id="none in order"
    ),
    pytest.param(
        gpu_node("a", *A10, labels={"nvidia.com/gpu.sharing-strategy": "time-slicing"}),
        {A10[0]: SHARED.format("its GPUs are shared (time-slicing)")},
        id="time-slicing",
    ),
    pytest.param(
        gpu_node("a", *A10, labels={"nvidia.com/gpu.sharing-strategy": "mps"}),
        {A10[0]: SHARED.format("its GPUs are shared (mps)")},
        id="MPS",
    ),
    pytest.param(
        gpu_node("a", "NVIDIA-A10-SHARED", A10[1]),
        {"NVIDIA-A10-SHARED": SHARED.format("its GPUs are shared (time-slicing)")},
        id="time-slicing that only the product tells",
    ),
    pytest.param(
        gpu_node("a", *A10, labels={"nvidia.com/gpu.replicas": "4"}),
        {A10[0]: SHARED.format("its GPUs are shared (time-slicing)")},
        id="time-slicing that only the replicas tell",
    ),
    pytest.param(
        node(
            "a",
            {"nvidia.com/gpu.product": A10[0], "nvidia.com/gpu.memory": "23028"},
            {"nvidia.com/gpu.shared": 4, "nvidia.com/gpu": 0},
        ),
        {A10[0]: SHARED.format("its GPUs are shared (time-slicing)")},
        id="time-slicing under another resource",
    ),
    pytest.param(
        node("a", sliced("1g.10gb", 9728, 7) | {"nvidia.com/mig-1g.10gb.sharing-strategy": "time-slicing"},
             {"nvidia.com/mig-1g.10gb": 14}),
        {f"{H100[0]}-MIG-1g.10gb": SHARED.format("its GPUs are shared (time-slicing)")},
        id="slices that are shared",
    ),
    pytest.param(
        node("a", sliced("1g.10gb", 9728, 7), {"nvidia.com/mig-1g.10gb.shared": 14, "nvidia.com/mig-1g.10gb": 0}),
        {f"{H100[0]}-MIG-1g.10gb": SHARED.format("its GPUs are shared (time-slicing)")},
        id="slices that are shared under another resource",
    ),
    pytest.param(
        gpu_node("a", f"{A100_80[0]}-MIG-INVALID", 0, gpus=0),
        {
            f"{A100_80[0]}-MIG-INVALID": "the GPUs of node a are not all cut alike, as MIG's single strategy needs: "
            "set nvidia.com/mig.config"
        },
        id="MIG single with unlike GPUs",
    ),
    pytest.param(
        gpu_node("a", *A100_80, labels={STATE: "pending"}),
        {A100_80[0]: f"the GPUs of node a are being cut ({STATE} is pending): wait until it says success"},
        id="MIG under way",
    ),
    pytest.param(
        gpu_node("a", *A100_80, labels={STATE: "failed", "nvidia.com/mig.config": "all-1g.5gb"}),
        {
            A100_80[0]: f"the GPUs of node a could not be cut as all-1g.5gb ({STATE} is failed): "
            "see the log of NVIDIA's MIG manager there"
        },
        id="MIG failed",
    ),
    pytest.param(
        node("a", MIXED_STRATEGY | {STATE: "rebooting"}, {"nvidia.com/mig-3g.40gb": 2, "nvidia.com/gpu": 1}),
        dict.fromkeys(
            (H100[0], f"{H100[0]}-MIG-3g.40gb", f"{H100[0]}-MIG-1g.10gb"),
            f"the GPUs of node a are being cut ({STATE} is rebooting): wait until it says success",
        ),
        id="MIG mixed under way",
    ),
    pytest.param(
        node("a", {"nvidia.com/gpu.product": H100[0]} | sliced("1g.10gb", 9728, 0),
             {"nvidia.com/gpu": 0, "nvidia.com/mig-1g.10gb": 0}),
        {
            H100[0]: NO_PLUGIN.format("nvidia.com/gpu", "NVIDIA"),
            f"{H100[0]}-MIG-1g.10gb": NO_PLUGIN.format("nvidia.com/mig-1g.10gb", "NVIDIA"),
        },
        id="slices of which none is left",
    ),
    pytest.param(
        node("a", {}, {"nvidia.com/mig-1g.10gb": 7}),
        {
            "nvidia.com/mig-1g.10gb": "node a has no label nvidia.com/mig-1g.10gb.product: "
            "run NVIDIA's GPU feature discovery"
        },
        id="slices without labels",
    ),
    pytest.param(gpu_node("a", *A10, ready=False), {A10[0]: "node a is not ready"}, id="not ready"),
    pytest.param(gpu_node("a", *A10, taints=[CORDON]), {A10[0]: "node a is cordoned"}, id="cordoned"),
    pytest.param(
        gpu_node("a", *A10) | {"spec": {"unschedulable": True}}, {A10[0]: "node a is cordoned"}, id="cordoned just now"
    ),
    pytest.param(
        gpu_node("a", *A10, taints=[TEAM_TAINT]),
        {A10[0]: "taint team=vision:NoSchedule is not in spec.podTemplate.tolerations"},
        id="tainted",
    ),
    pytest.param(
        gpu_node("a", *A10, labels={"kubernetes.io/os": "windows"}),
        {A10[0]: "node a runs windows; training needs linux"},
        id="another system",
    ),
    pytest.param(
        node("a", {"nvidia.com/gpu.product": A10[0]}, {"nvidia.com/gpu": 1}, gone="2026-09-01T12:00:00Z"),
        {A10[0]: "node a is being deleted"},
        id="being deleted",
    ),
    pytest.param(
        node("a", MI210, {"amd.com/gpu": 8}),
        {"Instinct_MI210": "spec.hardware.accelerator is nvidia, and it is AMD's"},
        id="the other vendor's",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("only", "expected"), REFUSED)
def test_what_is_refused_and_why(only: Raw, expected: dict[str, str]) -> None:
    found = offers(only)
    assert {refusal.product: refusal.reason for refusal in found.refused} == expected
    assert found.flavours == ()


def test_whole_gpus_that_are_all_cut_into_slices_say_so_beside_the_slices() -> None:
    found = offers(node("a", MIXED_STRATEGY, {"nvidia.com/mig-3g.40gb": 2, "nvidia.com/mig-1g.10gb": 7}))
    assert [flavour.resource for flavour in found.flavours] == ["nvidia.com/mig-1g.10gb", "nvidia.com/mig-3g.40gb"]
    [refusal] = found.refused
    assert refusal.reason == "node a has no whole GPU to allocate: all are cut into MIG slices"


AMD_REFUSED: list[Any] = [
    pytest.param(MI210, 0, NO_PLUGIN.format("amd.com/gpu", "AMD"), id="none in order"),
    pytest.param(
        MI210 | {"amd.com/gpu.compute-memory-partition": "cpx_nps4"},
        64,
        "the GPUs of node a are partitioned (cpx_nps4), which is not supported: set them to SPX and NPS1",
        id="partitioned",
    ),
    pytest.param(
        {"amd.com/gpu.product-name": "Instinct_MI210"},
        1,
        "node a has no label amd.com/gpu.vram that tells its memory: run AMD's node labeller with -vram",
        id="no memory",
    ),
    pytest.param(
        MI210 | {"amd.com/gpu.vram": "0G"},
        1,
        "node a has no label amd.com/gpu.vram that tells its memory: run AMD's node labeller with -vram",
        id="memory of nothing",
    ),
]


@pytest.mark.parametrize(("labels", "count", "reason"), AMD_REFUSED)
def test_what_is_refused_of_amd(labels: dict[str, str], count: int, reason: str) -> None:
    assert refusals(node("a", labels, {"amd.com/gpu": count}), demands=AMD) == {"Instinct_MI210": reason}


def test_the_accelerator_decides_whose_are_offered() -> None:
    both = [gpu_node("a", *A10), node("b", MI210, {"amd.com/gpu": 8})]
    for demands, product, other, whose in (
        (Demands(), A10[0], "Instinct_MI210", "AMD's"),
        (AMD, "Instinct_MI210", A10[0], "NVIDIA's"),
    ):
        found = offers(*both, demands=demands)
        assert [flavour.product for flavour in found.flavours] == [product]
        [refusal] = found.refused
        assert refusal.product == other
        assert refusal.reason == f"spec.hardware.accelerator is {demands.accelerator}, and it is {whose}"


def test_of_several_nodes_that_do_not_serve_the_first_one_by_name_is_told_of() -> None:
    nodes = [gpu_node("b", *A10, ready=False), gpu_node("a", *A10, taints=[TEAM_TAINT])]
    reason = "taint team=vision:NoSchedule is not in spec.podTemplate.tolerations"
    assert refusals(*nodes) == refusals(*nodes[::-1]) == {A10[0]: reason}


def test_the_nodes_that_end_to_end_tests_make_are_read_as_what_they_play() -> None:
    """GPUs that are not there, for a cluster whose nodes are played."""
    played = {
        "single": (gpus.mig_single(gpus.H100, gpus.SEVENTH), [("nvidia.com/gpu", 7, 9728)]),
        "mixed": (
            gpus.mig_mixed(gpus.H100, [gpus.HALF, gpus.SEVENTH], whole=2),
            [("nvidia.com/gpu", 2, 81559), ("nvidia.com/mig-1g.10gb", 7, 9728), ("nvidia.com/mig-3g.40gb", 2, 40448)],
        ),
        "shared": (gpus.shared(gpus.T4, 1), []),
        "amd": (gpus.amd("Instinct_MI210", 64, 8), [("amd.com/gpu", 8, 64 * 1024 - 512)]),
        "consumer": ((gpus.labels(gpus.RTX_4090, 4), {"nvidia.com/gpu": "4"}), [("nvidia.com/gpu", 4, 24564)]),
        "old": ((gpus.labels(gpus.V100, 8), {"nvidia.com/gpu": "8"}), [("nvidia.com/gpu", 8, 32768)]),
    }
    for name, ((labels, amounts), expected) in played.items():
        found = offers(node(name, labels, amounts), demands=AMD if name == "amd" else None).flavours
        assert [(f.resource, f.gpus_per_node, f.memory_bytes // MIB) for f in found] == expected, name


def test_a_sentence_names_a_node_that_is_there() -> None:
    inventory = Inventory.of(gpu_node(name, *A10, ready=False) for name in "cab")
    for left in "abc":
        assert [refusal.reason for refusal in inventory.offers(Demands()).refused] == [f"node {left} is not ready"]
        inventory.remove(left)
    inventory.replace([gpu_node("b", *A10, ready=False)])
    assert inventory.offers(Demands()).refused[0].reason == "node b is not ready"
    inventory.put(gpu_node("a", *A10, ready=False))
    assert inventory.offers(Demands()).refused[0].reason == "node a is not ready"


# --- what jobs demand ---


def test_products_are_matched_and_the_others_refused() -> None:
    demands = Demands(products=(L40S[0],))
    nodes = [gpu_node("a", *A10), gpu_node("b", *L40S), node("c", {}, {"nvidia.com/gpu": 1})]
    assert [flavour.product for flavour in offers(*nodes, demands=demands).flavours] == [L40S[0]]
    said = refusals(*nodes, demands=demands)
    assert said[A10[0]] == "not among spec.hardware.gpuProducts"
    assert said["unlabelled GPU"].endswith("run NVIDIA's GPU feature discovery"), "it might be what is asked for"
    assert refusals(nodes[0], demands=demands)[L40S[0]] == "no node of the cluster has it"


def test_a_node_selector_counts_the_nodes_that_have_the_labels() -> None:
    nodes = [gpu_node(f"l40s-{zone}", *L40S, labels={"zone": zone}) for zone in "aab"]
    nodes += [gpu_node(f"l40s-{n}", *L40S, labels={"zone": "b"}) for n in range(3)]
    in_b = Demands(node_selector={"zone": "b"})
    [flavour] = offers(*nodes, gpu_node("a10", *A10), demands=in_b).flavours
    assert flavour.nodes == 4
    assert refusals(gpu_node("a10", *A10), demands=in_b) == {A10[0]: "spec.podTemplate.nodeSelector asks for zone=b"}


def test_tolerations_open_nodes_for_whom_they_are_meant() -> None:
    nodes = [gpu_node("a", *A10), gpu_node("b", *A10, taints=[TEAM_TAINT, GPU_TAINT])]
    for tolerations, count in (
        ((), 1),
        (({"key": "team", "operator": "Exists"},), 1),
        (({"key": "team", "operator": "Exists"}, {"key": "nvidia.com/gpu", "operator": "Exists"}), 2),
        (({"operator": "Exists"},), 2),
    ):
        [flavour] = offers(*nodes, demands=Demands(tolerations=tolerations)).flavours
        assert flavour.nodes == count


def test_the_memory_of_the_largest_node_that_is_open() -> None:
    inventory = Inventory.of(
        [
            node("a", {"zone": "a"}, {"memory": "64Gi"}),
            node("b", {"zone": "b"}, {"memory": "128Gi"}, taints=[TEAM_TAINT]),
            node("c", {"zone": "c"}, {"memory": "32Gi"}),
        ]
    )
    for demands, gib in (
        (Demands("cpu"), 64),
        (Demands("cpu", tolerations=({"operator": "Exists"},)), 128),
        (Demands("cpu", node_selector={"zone": "c"}), 32),
        (Demands("cpu", node_selector={"zone": "d"}), 0),
    ):
        assert inventory.largest_memory_bytes(demands) == gib * GIB
    assert Inventory().largest_memory_bytes(Demands("cpu")) == 0


@pytest.mark.parametrize(
    "memory", ["64Gi", "65536Mi", "67108864Ki", "68719476736", "68719476736000m", "68.719476736e9"]
)
def test_memory_is_read_in_every_way_that_nodes_write_it(memory: str) -> None:
    assert Inventory.of([node("a", {}, {"memory": memory})]).largest_memory_bytes(Demands("cpu")) == 64 * GIB


TOLERATES = [
    # toleration, taint, whether
    ({"key": "a", "operator": "Exists"}, {"key": "a", "value": "x", "effect": "NoSchedule"}, True),
    ({"key": "a", "value": "x"}, {"key": "a", "value": "x", "effect": "NoExecute"}, True),
    ({"key": "a", "value": "x"}, {"key": "a", "value": "y", "effect": "NoExecute"}, False),
    ({"key": "a"}, {"key": "a", "effect": "NoSchedule"}, True),
    ({"key": "a"}, {"key": "a", "value": "x", "effect": "NoSchedule"}, False),
    ({"operator": "Exists"}, {"key": "b", "effect": "NoSchedule"}, True),
    ({"operator": "Exists", "effect": "NoExecute"}, {"key": "b", "effect": "NoSchedule"}, False),
    ({"key": "b", "operator": "Exists"}, {"key": "a", "effect": "NoSchedule"}, False),
]


@pytest.mark.parametrize(("toleration", "taint", "expected"), TOLERATES)
def test_tolerations_as_kubernetes_reads_them(toleration: Raw, taint: Raw, expected: bool) -> None:
    assert tolerates(toleration, taint) == expected


# --- the table of products ---


def test_the_table_has_what_is_in_use_and_no_figure_above_the_name() -> None:
    """A product says what it was sold as; what the driver reports is never more than that in GiB."""
    known = products()
    assert len(known) >= 25
    wanted = [A10, L40S, A100_40, A100_80, H100, ("Tesla-T4", 15360), ("NVIDIA-H200", 143771)]
    assert {name: known[name].memory_mib for name, _ in wanted} == dict(wanted)
    for name, product in known.items():
        for part in name.split("-"):
            # the memory of a Grace Hopper is told by its CPU's
            if part.endswith("GB") and "GH200" not in name:
                assert 0.9 * 1024 < product.memory_mib / int(part[:-2]) <= 1024, name
        assert (5, 0) <= product.compute < (13, 0)
        assert product.source


# --- events ---


def heartbeat(of: Raw) -> Raw:
    """The same node a little later."""
    status: Raw = {**of["status"], "images": [{"names": ["x"]}]}
    status["conditions"] = [{**c, "lastHeartbeatTime": "later"} for c in of["status"]["conditions"]]
    return {**of, "metadata": of["metadata"] | {"resourceVersion": "2"}, "status": status}


def test_what_is_news() -> None:
    inventory, a10 = Inventory(), gpu_node("a", *A10)
    assert inventory.put(a10)
    assert not inventory.put(heartbeat(a10)), "a heartbeat"
    assert inventory.put(gpu_node("a", *A10, ready=False))
    assert inventory.put(a10)
    assert inventory.put(gpu_node("a", *A10, gpus=2))
    assert inventory.put(gpu_node("a", *A10, gpus=2, taints=[TEAM_TAINT]))
    assert inventory.put(gpu_node("a", *A10, gpus=2, labels={"zone": "b"}))
    assert inventory.put(node("b", {}, {"memory": "64Gi"})), "a training on CPUs may wait for it"
    assert inventory.names == {"a", "b"}
    assert inventory.remove("a")
    assert not inventory.remove("a")
    assert inventory.offers(Demands()) == Offers((), ())
    assert inventory.replace([a10])
    assert not inventory.replace([heartbeat(a10)])
    assert inventory.replace([])
    assert inventory.names == frozenset()


# --- properties ---

PRODUCTS = [
    A10,
    L40S,
    (SLICE, 9728),
    ("NVIDIA-GeForce-RTX-4090", None),
    ("NVIDIA-X1", None),
    ("Tesla-T4-SHARED", 15360),
]
TAINTS = [[], [TEAM_TAINT], [GPU_TAINT], [CORDON]]


@st.composite
def a_node(draw: st.DrawFn) -> Raw:
    name = draw(st.sampled_from("abcdefgh"))
    zone = {"zone": draw(st.sampled_from("ab"))}
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return node(name, zone | MI210, {"amd.com/gpu": draw(st.integers(0, 2))})
    if kind == 1:
        counts = {"nvidia.com/mig-3g.40gb": draw(st.integers(0, 1)), "nvidia.com/gpu": draw(st.integers(0, 2))}
        return node(name, zone | MIXED_STRATEGY, counts, taints=draw(st.sampled_from(TAINTS)))
    product, mib = draw(st.sampled_from(PRODUCTS))
    return gpu_node(
        name,
        product,
        mib,
        gpus=draw(st.integers(0, 2)),
        labels=zone,
        taints=draw(st.sampled_from(TAINTS)),
        ready=draw(st.integers(0, 4)) > 0,
    )


DEMANDS = st.builds(
    Demands,
    st.sampled_from(["nvidia", "amd"]),
    st.sampled_from([(), (A10[0],), (L40S[0], "Instinct_MI210")]),
    st.sampled_from([None, {}, {"zone": "b"}, {"zone": "c"}]),
    st.sampled_from([(), ({"key": "team", "operator": "Exists"},), ({"operator": "Exists"},)]),
)


def last_of_each(nodes: Iterable[Raw]) -> list[Raw]:
    return list({one["metadata"]["name"]: one for one in nodes}.values())


@for_all(st.lists(a_node() | st.sampled_from("abcdefgh"), max_size=30), DEMANDS, st.randoms(use_true_random=False))
def test_the_way_there_does_not_matter(events: list[Raw | str], demands: Demands, chance: random.Random) -> None:
    """Any order of nodes that come, change and go ends as a list of those that are left."""
    inventory, left = Inventory(), dict[str, Raw]()
    for event in events:
        if isinstance(event, str):
            assert inventory.remove(event) == (left.pop(event, None) is not None)
        else:
            name = event["metadata"]["name"]
            before, same = inventory.offers(demands), left.get(name) == event
            news = inventory.put(event)
            assert not (same and news)
            assert news or inventory.offers(demands) == before
            left[name] = event
    nodes = list(left.values())
    chance.shuffle(nodes)
    fresh = Inventory.of(nodes)
    assert inventory.names == fresh.names == left.keys()
    assert inventory.offers(demands) == fresh.offers(demands)
    assert inventory.largest_memory_bytes(demands) == fresh.largest_memory_bytes(demands)
    assert not inventory.replace(nodes)


def may_use(demands: Demands, one: Raw) -> bool:
    """Whether pods of the job may run on a node, said anew from core/v1."""
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in one["status"]["conditions"])
    selector = demands.node_selector or {}
    tainted = [t for t in one["spec"].get("taints", ()) if not any(tolerates(x, t) for x in demands.tolerations)]
    return ready and not tainted and selector.items() <= one["metadata"]["labels"].items()


@for_all(st.lists(a_node(), max_size=20).map(last_of_each), DEMANDS)
def test_offers_are_of_nodes_that_the_job_may_use(nodes: list[Raw], demands: Demands) -> None:
    found = Inventory.of(nodes).offers(demands)
    offered = [flavour.product for flavour in found.flavours]
    refused = [refusal.product for refusal in found.refused]
    assert not set(offered) & set(refused)
    assert len(set(refused)) == len(refused)
    assert all(refusal.reason and "{" not in refusal.reason for refusal in found.refused)
    for flavour in found.flavours:
        able = [
            one
            for one in nodes
            if may_use(demands, one)
            and one["status"]["allocatable"].get(flavour.resource) == str(flavour.gpus_per_node)
            and dict(flavour.labels).items() <= one["metadata"]["labels"].items()
        ]
        assert flavour.nodes == len(able) > 0
        assert flavour.gpus_per_node > 0 < flavour.memory_bytes
        assert flavour.accelerator == demands.accelerator
        assert not demands.products or flavour.product in demands.products
        if flavour.memory_label:
            assert {int(one["metadata"]["labels"][flavour.memory_label]) * MIB for one in able} == {
                flavour.memory_bytes
            }
    lone = [refusal.product for one in nodes for refusal in offers(one, demands=demands).refused]
    single = [flavour.product for one in nodes for flavour in offers(one, demands=demands).flavours]
    assert {*offered} == {*single}
    assert {*refused} == {*lone, *demands.products} - {*single}, "what is named is offered, or refused"
