"""Which GPU a job gets, and why not the others: what a user reads in `status.plan`, and what the scheduler is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from qlora_api.exchange import Inspection
from qlora_api.v1alpha1 import Plan
from qlora_operator import planner
from qlora_operator.placement.choice import TOKENS_PER_MICRO_BATCH, micro_batches, with_headroom
from qlora_operator.placement.inventory import Inventory
from qlora_operator.planner import Installation, Unfit
from tests.unit.operator import given
from tests.unit.operator.given import A10, A100_40, A100_80, GIB, H100, L40S, MIB, gpu_node
from tests.unit.operator.test_sizing import SHAPES

Raw = dict[str, Any]

SHARED = {"nvidia.com/gpu.sharing-strategy": "time-slicing", "nvidia.com/gpu.replicas": "4"}
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
TEAM_TAINT = {"key": "team", "value": "vision", "effect": "NoSchedule"}
CORDON = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
SLICE = "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb"

MIXED: list[Raw] = [
    gpu_node("a10-1", *A10),
    gpu_node("l40s-1", *L40S, gpus=4),
    gpu_node("l40s-2", *L40S, gpus=4, taints=[TEAM_TAINT]),
    gpu_node("a100-1", *A100_40, gpus=8, taints=[GPU_TAINT]),
    gpu_node("a100-2", *A100_80, gpus=8, taints=[GPU_TAINT]),
    gpu_node("h100-1", *H100, gpus=8, labels={"zone": "b"}),
    gpu_node("t4-1", "Tesla-T4-SHARED", 15360, gpus=4, labels=SHARED),
    gpu_node("v100-1", "Tesla-V100-SXM2-32GB", 32768, taints=[CORDON]),
    gpu_node("rtx-1", "NVIDIA-RTX-X7000", None),
    gpu_node("l4-1", "NVIDIA-L4", 23034, ready=False),
    gpu_node("h200-1", "NVIDIA-H200", 143771, gpus=0),
    gpu_node("mig-1", SLICE, 9728, gpus=7),
    gpu_node("b200-1", "NVIDIA-B200", 183359, taints=[TEAM_TAINT]),
    {"metadata": {"name": "cpu-1", "labels": {}}, "status": {"allocatable": {"cpu": "8"}}},
]


def inspection(model: str, *, max_length: int = 1024, sequences: int = 1000) -> Inspection:
    return given.inspection(SHAPES[model], max_length=max_length, sequences=sequences)


SEVEN = inspection("meta-llama/Llama-2-7b-hf")
SMALL = inspection("HuggingFaceTB/SmolLM2-135M")


def planned(edits: Mapping[str, Any] | None, found: Inspection, nodes: Sequence[Raw] = MIXED, **more: Any) -> Plan:
    made = planner.plan(given.job(edits).spec, found, Inventory.of(nodes), **more)
    assert isinstance(made, Plan), made
    return made


def unfit(edits: Mapping[str, Any] | None, found: Inspection, nodes: Sequence[Raw] = MIXED) -> Unfit:
    made = planner.plan(given.job(edits).spec, found, Inventory.of(nodes))
    assert isinstance(made, Unfit), made
    return made


REFUSED = {
    "Tesla-T4-SHARED": "its GPUs are shared (time-slicing): another tenant may take the memory that was planned; "
    "turn sharing off for node t4-1 in the configuration of NVIDIA's device plugin",
    "Tesla-V100-SXM2-32GB": "node v100-1 is cordoned",
    "NVIDIA-RTX-X7000": "node rtx-1 has no label nvidia.com/gpu.memory in MiB, and NVIDIA-RTX-X7000 is no GPU whose "
    "memory is known by its name: run NVIDIA's GPU feature discovery, or kubectl label node rtx-1 "
    "nvidia.com/gpu.memory=MIB",
    "NVIDIA-L4": "node l4-1 is not ready",
    "NVIDIA-H200": "node h200-1 has no nvidia.com/gpu to allocate: see the pod of NVIDIA's device plugin there",
    "NVIDIA-B200": "taint team=vision:NoSchedule is not in spec.podTemplate.tolerations",
}

DEMANDS: list[Any] = [
    # what the job demands, the flavours it may then get, and of another one why not
    pytest.param(
        {"hardware.gpuProducts": [L40S[0]]}, {L40S[0]}, A10[0], "not among spec.hardware.gpuProducts", id="products"
    ),
    pytest.param(
        {"podTemplate.nodeSelector": {"zone": "b"}},
        {H100[0]},
        A10[0],
        "spec.podTemplate.nodeSelector asks for zone=b",
        id="node selector",
    ),
    pytest.param(
        {"podTemplate.tolerations": [{"key": "team", "value": "nlp"}]},
        {SLICE},
        "NVIDIA-B200",
        "taint team=vision:NoSchedule is not in spec.podTemplate.tolerations",
        id="a toleration of another value",
    ),
    pytest.param(
        {"podTemplate.tolerations": [{"operator": "Exists"}]},
        {SLICE},
        "NVIDIA-L4",
        "node l4-1 is not ready",
        id="a toleration of everything makes no node ready",
    ),
]


@pytest.mark.parametrize(("edits", "only", "product", "reason"), DEMANDS)
def test_what_a_job_demands_decides_and_is_said(edits: Raw, only: set[str], product: str, reason: str) -> None:
    plan = planned(edits, SMALL)
    rejected = {entry.flavour: entry.reason for entry in plan.rejected}
    assert rejected[product] == reason
    assert plan.flavour in only


def test_a_toleration_opens_tainted_nodes() -> None:
    edits = {"hardware.gpuProducts": ["NVIDIA-B200"]}
    assert "taint team=vision" in unfit(edits, SEVEN).message
    own = {"podTemplate.tolerations": [{"key": "team", "value": "vision", "effect": "NoSchedule"}]}
    assert planned(edits | own, SEVEN).flavour == "NVIDIA-B200"
    installed = [{"key": "team", "operator": "Exists"}]
    assert planned(edits, SEVEN, installation=Installation(tolerations=installed)).flavour == "NVIDIA-B200"


# --- the choice ---

ROOMY = {"hardware.headroomPercent": 40}
LONG = inspection("meta-llama/Llama-2-7b-hf", max_length=32768)
SHORT = inspection("meta-llama/Llama-2-7b-hf", max_length=512)
CHOICES: list[Any] = [
    # model, edits → product, method, micro-batch
    pytest.param(SMALL, {}, (SLICE, "lora", 4), id="a small model: the smallest GPU, with 4k tokens at a time"),
    pytest.param(SEVEN, {}, (A10[0], "lora", 4), id="7B in 16 bit fits 24 GB"),
    pytest.param(SEVEN, ROOMY, (A100_40[0], "lora", 4), id="LoRA on a larger GPU goes before QLoRA on a smaller one"),
    pytest.param(SEVEN, ROOMY | {"method": "qlora"}, (A10[0], "qlora", 4), id="asked for QLoRA: the smaller one"),
    pytest.param(
        SEVEN,
        ROOMY | {"hardware.gpuProducts": [A10[0]]},
        (A10[0], "lora", 1),
        id="LoRA with less at a time goes before QLoRA",
    ),
    pytest.param(SEVEN, {"training.microBatchSize": 16}, (A100_40[0], "lora", 16), id="the user's micro-batch is kept"),
    pytest.param(LONG, {"method": "qlora"}, (A100_40[0], "qlora", 1), id="long sequences take a larger GPU"),
    pytest.param(
        SHORT,
        {"hardware.gpuProducts": [SLICE]},
        (SLICE, "qlora", 8),
        id="QLoRA where LoRA fits nowhere",
    ),
]


@pytest.mark.parametrize(("found", "edits", "expected"), CHOICES)
def test_the_choice(found: Inspection, edits: Raw, expected: tuple[str, str, int]) -> None:
    plan = planned(edits, found)
    assert (plan.flavour, plan.recipe.method, plan.micro_batch_size) == expected
    assert plan.memory.gpu_bytes is not None
    assert with_headroom(plan.memory.total_bytes, 15) <= plan.memory.gpu_bytes
    assert plan.micro_batch_size * plan.gradient_accumulation == 32


def test_every_other_flavour_is_listed_with_why_not() -> None:
    plan = planned(ROOMY, SEVEN)
    rejected = {entry.flavour: entry.reason for entry in plan.rejected}
    products = {node["metadata"]["labels"].get("nvidia.com/gpu.product") for node in MIXED} - {None}
    assert rejected.keys() == products - {plan.flavour}
    assert {product: rejected[product] for product in REFUSED} == REFUSED
    assert rejected[H100[0]] == "would do; NVIDIA-A100-SXM4-40GB is smaller and fits"
    assert rejected[A10[0]] == "fits 1024 tokens at a time only; NVIDIA-A100-SXM4-40GB fits 4096"
    lora = {entry.flavour: entry.reason for entry in planned({"method": "lora"}, SEVEN).rejected}
    assert lora[SLICE].startswith("9.5 GiB ×1: lora at micro-batch 1 × 1024 tokens needs ")


def test_what_fits_nowhere_says_by_how_much_on_each() -> None:
    nodes = [gpu_node("a10-1", *A10), gpu_node("t4-1", "Tesla-T4-SHARED", 15360, labels=SHARED)]
    refusal = unfit({"method": "lora", "hardware.headroomPercent": 70}, SEVEN, nodes)
    assert (refusal.reason, refusal.final) == ("NoFlavourFits", False)
    assert "NVIDIA-A10: 22.5 GiB ×1: lora at micro-batch 1 × 1024 tokens needs" in refusal.message
    assert "fits with method qlora" in refusal.message
    assert "Tesla-T4-SHARED: its GPUs are shared" in refusal.message


def test_the_installed_order_of_nodes_decides_nothing() -> None:
    assert planned({}, SEVEN, MIXED[::-1]) == planned({}, SEVEN, MIXED)


TOO_LONG = inspection("HuggingFaceTB/SmolLM2-135M", max_length=200_000)
FINAL = [
    ({"lora.targetModules": ["q_proj", "w1"]}, SMALL, "UnknownTargetModules", "no linear layer w1; it has q_proj"),
    (
        {},
        inspection("HuggingFaceTB/SmolLM2-135M", max_length=200_000),
        "SequenceTooLong",
        "200000 tokens, the model takes 131072",
    ),
]


@pytest.mark.parametrize(("edits", "found", "reason", "says"), FINAL)
def test_what_no_node_can_cure_is_final(edits: Raw, found: Inspection, reason: str, says: str) -> None:
    refusal = unfit(edits, found)
    assert (refusal.reason, refusal.final) == (reason, True)
    assert says in refusal.message
    assert refusal.message.startswith("spec.")


# --- on the CPU ---

CPU = {"hardware.accelerator": "cpu"}


def cpu_node(memory: str, **more: Any) -> Raw:
    node = gpu_node("cpu-1", "none", None, gpus=0, **more)
    node["status"]["allocatable"] = {"cpu": "4", "memory": memory}
    node["metadata"]["labels"] = {}
    return node


@pytest.mark.parametrize(
    "memory", ["64Gi", "65536Mi", "67108864Ki", "68719476736", "68719476736000m", "69e9", "68.719G"]
)
def test_memory_is_read_in_every_way_that_nodes_write_it(memory: str) -> None:
    plan = planned(CPU, SMALL, [cpu_node(memory)])
    assert plan.memory.gpu_bytes == pytest.approx(64 * GIB, rel=0.01)


def test_a_cpu_plan_takes_no_gpu_and_asks_for_the_memory_it_needs() -> None:
    plan = planned(CPU, SMALL, [cpu_node("64Gi")])
    assert (plan.flavour, plan.gpus, plan.recipe.compute_dtype) == ("cpu", 0, "float32")
    assert plan.host_memory_bytes >= plan.memory.total_bytes


CLOSED = [
    ({"taints": [TEAM_TAINT]}, {}),
    ({"ready": False}, {}),
    ({}, {"podTemplate.nodeSelector": {"zone": "b"}}),
]


@pytest.mark.parametrize(("node", "edits"), CLOSED)
def test_a_node_that_the_job_cannot_use_lends_its_memory_to_no_plan(node: Raw, edits: Raw) -> None:
    nodes = [cpu_node("64Gi", **node), cpu_node("1Gi")]
    refusal = unfit(CPU | edits, SMALL, nodes[:1] if edits else nodes)
    assert refusal.reason == "NoNodeFits"
    assert "GiB needed, the largest has" in refusal.message


# --- the recipe ---


def test_what_the_user_says_is_in_the_recipe_and_the_rest_is_decided() -> None:
    edits = {"training": {"maxSteps": 7, "learningRate": 1e-3, "effectiveBatchSize": 8}, "lora": {"rank": 4}}
    recipe = planned(edits, SMALL).recipe
    assert (recipe.max_steps, recipe.epochs, recipe.learning_rate) == (7, None, 1e-3)
    assert (recipe.rank, recipe.alpha, recipe.effective_batch_size) == (4, 8, 8)
    assert (recipe.loss, recipe.max_length) == (SMALL.loss, SMALL.max_length)
    default = planned({}, SMALL)
    assert (default.recipe.epochs, default.recipe.compute_dtype, default.recipe.attention) == (3.0, "bfloat16", "sdpa")
    assert default.recipe.target_modules == sorted(m.name for m in SMALL.shape.linear)
    assert default.steps == 3 * 32  # 1000 sequences in batches of 32


def test_the_work_volume_holds_what_will_lie_on_it() -> None:
    adapter = planned({}, SEVEN)
    merged = planned({"output.formats": given.BOTH}, SEVEN)
    assert merged.disk_bytes - adapter.disk_bytes == 2 * SEVEN.shape.parameters
    more = planned({"checkpoint.keep": 10}, SEVEN)
    assert more.disk_bytes > adapter.disk_bytes > GIB
    from_store = SEVEN.model_copy(update={"download_bytes": 15 * GIB})
    assert planned({}, from_store).disk_bytes - adapter.disk_bytes == 15 * GIB


# --- properties ---

EFFECTIVE = st.integers(1, 2000)
LENGTH = st.sampled_from([16, 64, 500, 2048, 8192])


@for_all(EFFECTIVE, LENGTH)
def test_micro_batches_divide_the_batch_and_end_at_one(effective: int, length: int) -> None:
    """Else the last batch of each step would differ, or nothing would be left to try on a small GPU."""
    sizes = micro_batches(given.recipe(effective_batch_size=effective, max_length=length), None)
    assert all(effective % size == 0 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert sizes[0] * length >= TOKENS_PER_MICRO_BATCH or sizes[0] == effective
    assert all(size * length < TOKENS_PER_MICRO_BATCH for size in sizes[1:])


PRODUCTS = st.sampled_from([A10, L40S, A100_40, A100_80, H100, (SLICE, 9728)])
MODELS = st.sampled_from(sorted(SHAPES))
#: Effective batch, and micro-batch where the user names one.
BATCHES = st.sampled_from([(1, None), (12, None), (32, None), (100, None), (1, 1), (12, 4), (32, 1), (100, 4)])
EDITS = st.builds(
    lambda batch, edits: edits | {"training": {"effectiveBatchSize": batch[0], "microBatchSize": batch[1]}},
    BATCHES,
    st.fixed_dictionaries(
        {"hardware.headroomPercent": st.sampled_from([0, 15, 50]), "lora.rank": st.sampled_from([4, 64, 256])},
        optional={"method": st.sampled_from(["lora", "qlora"])},
    ),
)


def cluster(products: Sequence[tuple[str, int]], extra_mib: int = 0) -> Inventory:
    return Inventory.of(gpu_node(f"node-{n}", product, mib + extra_mib) for n, (product, mib) in enumerate(products))


def preference(plan: Plan) -> tuple[int, int, int]:
    """What is preferred before anything else: fewer nodes, fewer GPUs, LoRA."""
    return plan.nodes, plan.gpus, ["lora", "qlora"].index(plan.recipe.method)


@for_all(MODELS, LENGTH, EDITS, st.lists(PRODUCTS, min_size=1, max_size=4), st.integers(1, 60_000))
def test_a_plan_fits_and_more_memory_never_takes_it_away(
    model: str, length: int, edits: Raw, products: list[tuple[str, int]], extra: int
) -> None:
    spec, found = given.job(edits).spec, inspection(model, max_length=length)
    made = planner.plan(spec, found, cluster(products))
    if isinstance(made, Unfit):
        assert all(f"{product}: " in made.message for product, _ in products)
        return
    assert made.memory.gpu_bytes == dict(products)[made.flavour] * MIB
    need = with_headroom(made.memory.total_bytes, spec.hardware.headroom_percent)
    assert need <= dict(products)[made.flavour] * MIB
    assert made.micro_batch_size * made.gradient_accumulation * made.gpus == spec.training.effective_batch_size
    assert spec.training.micro_batch_size in (None, made.micro_batch_size)
    assert {entry.flavour for entry in made.rejected} == {product for product, _ in products} - {made.flavour}
    larger = planner.plan(spec, found, cluster(products, extra))
    assert isinstance(larger, Plan)
    assert preference(larger) <= preference(made)
    assert made.memory.total_bytes == sum(item.bytes for item in made.memory.items)
    more = planner.plan(spec, found, cluster([*products, H100]))
    assert isinstance(more, Plan)
    assert preference(more) <= preference(made)
