"""Several GPUs and nodes, and the user's wishes: which layout a job gets, and what is said of all that it does not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from qlora_api.exchange import LinearModule, Recipe
from qlora_api.v1alpha1 import Plan
from qlora_operator import planner
from qlora_operator.placement.choice import Layout, Wishes, layouts, micro_batches, with_headroom
from qlora_operator.placement.flavours import MIB, Flavour
from qlora_operator.placement.inventory import Inventory
from qlora_operator.planner import Installation, Unfit
from qlora_operator.sizing.catalogue import shape_of_model
from tests.unit.operator import given
from tests.unit.operator.given import A10, A100_40, A100_80, H100, L40S, gpu_node

Raw = dict[str, Any]

H200 = ("NVIDIA-H200", 143771)
RTX_4090 = ("NVIDIA-GeForce-RTX-4090", 24564)
V100 = ("Tesla-V100-SXM2-32GB", 32768)
VOLTA = {"nvidia.com/gpu.compute.major": "7", "nvidia.com/gpu.compute.minor": "0"}


def nodes(product: tuple[str, int], count: int, gpus: int, **more: Any) -> list[Raw]:
    return [gpu_node(f"{product[0].lower()}-{n}", *product, gpus=gpus, **more) for n in range(count)]


CLUSTER = [
    *nodes(RTX_4090, 4, 2),
    *nodes(L40S, 3, 4),
    *nodes(A100_80, 2, 8),
    *nodes(H100, 2, 8),
]
WITH_H200 = [*CLUSTER, *nodes(H200, 1, 4)]


def made(model: str, length: int, edits: Raw, cluster: list[Raw], **more: Any) -> Plan | Unfit:
    found = given.inspection(shape_of_model(model), max_length=length, sequences=1000)
    return planner.plan(given.job(edits).spec, found, Inventory.of(cluster), **more)


def planned(model: str, length: int, edits: Raw, cluster: list[Raw], **more: Any) -> Plan:
    plan = made(model, length, edits, cluster, **more)
    assert isinstance(plan, Plan), plan
    return plan


# --- layouts ---

EIGHTS = Flavour("nvidia.com/gpu", H100[0], H100[1] * MIB, gpus_per_node=8, nodes=4)
SIXES = Flavour("nvidia.com/gpu", H100[0], H100[1] * MIB, gpus_per_node=6, nodes=4)
SLICES = Flavour("nvidia.com/mig-1g.10gb", "slice", 9728 * MIB, gpus_per_node=7, nodes=4, partition=True)
LAYOUTS: list[Any] = [
    pytest.param(EIGHTS, {}, [(1, 1), (1, 2), (1, 4), (1, 8)], id="by default at most 8, in one node"),
    pytest.param(
        EIGHTS, {"max_gpus": 32}, [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8)], id="then whole nodes, 2, 4, 8 …"
    ),
    pytest.param(SIXES, {"max_gpus": 8}, [(1, 1), (1, 2), (1, 4), (2, 4)], id="nodes of six give four"),
    pytest.param(EIGHTS, {"max_gpus": 2}, [(1, 1), (1, 2)], id="no more than the user allows"),
    pytest.param(EIGHTS, {"gpus": 6}, [(1, 6), (2, 3), (3, 2)], id="as many as asked for, on the fewest nodes"),
    pytest.param(EIGHTS, {"gpus": 4, "nodes": 2}, [(2, 2)], id="gpus and nodes as asked for"),
    pytest.param(EIGHTS, {"nodes": 2}, [(2, 1), (2, 2), (2, 4)], id="nodes as asked for"),
    pytest.param(EIGHTS, {"nodes": 5, "max_gpus": 64}, [], id="more nodes than there are"),
    pytest.param(SLICES, {}, [(1, 1)], id="slices of a GPU work alone"),
    pytest.param(SLICES, {"gpus": 2}, [], id="two slices cannot work together"),
]


@pytest.mark.parametrize(("flavour", "wishes", "expected"), LAYOUTS)
def test_how_gpus_can_be_put_together(flavour: Flavour, wishes: Raw, expected: list[tuple[int, int]]) -> None:
    assert layouts(flavour, Wishes(**wishes)) == [Layout(*pair) for pair in expected]


@for_all(st.integers(1, 500), st.sampled_from([1, 2, 3, 8, 16]), st.sampled_from([None, 1, 4]))
def test_micro_batches_share_the_effective_batch_evenly_or_not_at_all(
    effective: int, gpus: int, wanted: int | None
) -> None:
    recipe = given.recipe(effective_batch_size=effective, max_length=512)
    sizes = micro_batches(recipe, wanted, gpus)
    assert all(effective % (size * gpus) == 0 for size in sizes)
    assert bool(sizes) == (effective % (gpus * (wanted or 1)) == 0)


# --- the choice ---

CHOICES: list[Any] = [
    # model, tokens, edits → product, GPUs, nodes, method, optimizer
    pytest.param("llama-3.1-8b", 4096, {}, (L40S[0], 1, 1, "lora", "paged_adamw_8bit"), id="8B: one GPU, LoRA"),
    pytest.param(
        "llama-3.1-70b", 4096, {}, (A100_80[0], 1, 1, "qlora", "paged_adamw_8bit"),
        id="70B: one GPU with QLoRA before two with LoRA",
    ),
    pytest.param(
        "llama-3.1-70b", 4096, {"method": "lora"}, (A100_80[0], 4, 1, "lora", "adamw_torch_fused"),
        id="70B in 16 bit: four GPUs, and an optimizer that can be sharded",
    ),
    pytest.param(
        "llama-3.1-70b", 4096, {"hardware.gpuProducts": [L40S[0]]}, (L40S[0], 2, 1, "qlora", "adamw_torch_fused"),
        id="70B on the product that is asked for",
    ),
    pytest.param(
        "llama-3.1-405b", 5120, {"hardware.maxGPUs": 16}, (A100_80[0], 16, 2, "qlora", "adamw_torch_fused"),
        id="405B: two nodes of eight",
    ),
    pytest.param(
        "llama-3.1-8b", 4096, {"hardware.gpus": 4, "hardware.nodes": 2, "method": "qlora"},
        (RTX_4090[0], 4, 2, "qlora", "paged_adamw_8bit"), id="the user's count over the user's nodes",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "length", "edits", "expected"), CHOICES)
def test_the_choice(model: str, length: int, edits: Raw, expected: tuple[str, int, int, str, str]) -> None:
    plan = planned(model, length, edits, CLUSTER)
    assert (plan.flavour, plan.gpus, plan.nodes, plan.recipe.method, plan.recipe.optimizer) == expected
    assert plan.gpus == plan.gpus_per_node * plan.nodes
    assert plan.memory.gpu_bytes is not None
    assert with_headroom(plan.memory.total_bytes, 15) <= plan.memory.gpu_bytes
    assert plan.micro_batch_size * plan.gradient_accumulation * plan.gpus == 32


def test_fewer_nodes_go_before_fewer_or_smaller_gpus() -> None:
    plan = planned("llama-3.1-405b", 5120, {"hardware.maxGPUs": 16}, WITH_H200)
    assert (plan.flavour, plan.gpus, plan.nodes) == (H200[0], 4, 1)
    rejected = {entry.flavour: entry.reason for entry in plan.rejected}
    assert rejected[H100[0]] == "would do on 16 GPUs on 2 nodes; NVIDIA-H200 does on 4 GPUs"


def test_a_price_decides_between_gpus_that_are_as_good() -> None:
    cluster = [*nodes(H100, 1, 1), *nodes(("NVIDIA-H100-PCIe", H100[1]), 1, 1)]
    assert planned("llama-3.1-8b", 1024, {}, cluster).flavour == H100[0]
    dear = Installation(prices={H100[0]: 4.0, "NVIDIA-H100-PCIe": 3.0})
    plan = planned("llama-3.1-8b", 1024, {}, cluster, installation=dear)
    assert plan.flavour == "NVIDIA-H100-PCIe"
    assert plan.rejected[0].reason == "would do; NVIDIA-H100-PCIe costs less"


def test_the_card_decides_the_compute_type_unless_the_user_has() -> None:
    volta = nodes(V100, 1, 1, labels=VOLTA)
    assert planned("qwen2.5-0.5b-instruct", 1024, {}, volta).recipe.compute_dtype == "float16"
    assert planned("qwen2.5-0.5b-instruct", 1024, {}, nodes(L40S, 1, 1)).recipe.compute_dtype == "bfloat16"
    asked: Raw = {"quantization.computeDtype": "bfloat16"}
    refusal = made("qwen2.5-0.5b-instruct", 1024, asked, volta)
    assert isinstance(refusal, Unfit)
    assert (
        "Tesla-V100-SXM2-32GB: has no bfloat16 (compute capability 7.0); leave out quantization.computeDtype"
        in refusal.message
    )
    assert planned("qwen2.5-0.5b-instruct", 1024, asked, [*volta, *nodes(L40S, 1, 1)]).flavour == L40S[0]


def test_a_training_that_has_begun_keeps_its_recipe_wherever_it_goes() -> None:
    keep = planned("llama-3.1-8b", 1024, {"method": "qlora"}, nodes(L40S, 1, 1)).recipe
    again = planned("llama-3.1-8b", 1024, {"method": "qlora"}, nodes(RTX_4090, 1, 1), keep=keep)
    assert again.recipe == keep
    both = planned("llama-3.1-8b", 1024, {"hardware.gpus": 2}, nodes(RTX_4090, 1, 2), keep=keep)
    assert (both.recipe, both.sharded) == (keep, False)
    large = made("llama-3.1-70b", 4096, {"hardware.gpus": 2}, nodes(RTX_4090, 1, 2), keep=keep)
    assert isinstance(large, Unfit), "its 8-bit optimizer cannot be sharded"
    assert "weights that GPUs share the optimizer paged_adamw_8bit cannot step" in large.message


def test_gpus_that_each_have_room_for_the_model_do_not_share_it() -> None:
    """Sharing costs a gather for each layer and step; it is for models that one GPU cannot hold."""
    asked: Raw = {"hardware.gpus": 2, "method": "qlora"}
    whole = planned("llama-3.1-8b", 1024, asked, nodes(L40S, 1, 2))
    assert (whole.gpus, whole.sharded, whole.sharing, whole.recipe.optimizer) == (2, False, 1, "paged_adamw_8bit")
    alone = planned("llama-3.1-8b", 1024, asked | {"hardware.gpus": 1}, nodes(L40S, 1, 2))
    assert whole.memory.total_bytes == alone.memory.total_bytes
    assert whole.gradient_accumulation * whole.micro_batch_size * 2 == 32
    shared = planned("llama-3.1-70b", 1024, asked, nodes(L40S, 1, 2))
    assert (shared.gpus, shared.sharded, shared.sharing, shared.recipe.optimizer) == (2, True, 2, "adamw_torch_fused")


def test_gpus_share_where_the_offloaded_model_is_asked_for() -> None:
    asked: Raw = {"hardware.gpus": 2, "method": "qlora", "training.offload": "parameters"}
    assert planned("llama-3.1-8b", 1024, asked, nodes(L40S, 1, 2)).sharded


# --- what is said ---

SENTENCES: list[Any] = [
    pytest.param(
        "llama-3.1-405b", 5120, {}, H100[0],
        r"79\.6 GiB ×8: qlora at micro-batch 1 × 5120 tokens needs \d+\.\d GiB, short by \d+\.\d GiB; fits with "
        r"dataset\.maxLength ≤ \d+ or .*on 16 GPUs on 2 nodes \(hardware\.maxGPUs\)",
        id="what is short, and every change that would do",
    ),
    pytest.param(
        "llama-3.1-70b", 4096, {"hardware.maxGPUs": 1}, L40S[0],
        r"45\.0 GiB ×1: qlora at micro-batch 1 × 4096 tokens needs .* on 2 GPUs \(hardware\.maxGPUs\)",
        id="more GPUs, had the user not forbidden them",
    ),
    pytest.param(
        "llama-3.1-8b", 4096, {"hardware.gpus": 16, "hardware.maxGPUs": 16}, RTX_4090[0],
        r"has 4 nodes of 2 GPUs, too few for hardware\.gpus 16$", id="unless it has as many as asked for",
    ),
    pytest.param(
        "llama-3.1-8b", 4096, {"method": "lora", "training.microBatchSize": 8}, RTX_4090[0],
        r"fits with training\.microBatchSize 1 or with dataset\.maxLength ≤ \d+$",
        id="the user's micro-batch is kept, and said",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "length", "edits", "product", "says"), SENTENCES)
def test_why_not_is_said_in_numbers(model: str, length: int, edits: Raw, product: str, says: str) -> None:
    plan = made(model, length, edits, CLUSTER)
    if isinstance(plan, Plan):
        said = {entry.flavour: entry.reason for entry in plan.rejected}[product]
    else:
        said = next(part for part in plan.message.split(f"{product}: ")[1:])
    assert re.search(says, said), said


def test_every_change_that_is_advised_does_help() -> None:
    """A user who follows the sentence gets a plan on that product."""
    only: Raw = {"hardware.gpuProducts": [H100[0]]}
    refusal = made("llama-3.1-405b", 5120, only, CLUSTER)
    assert isinstance(refusal, Unfit)
    length = int(refusal.message.split("maxLength ≤ ")[1].split()[0])
    assert isinstance(made("llama-3.1-405b", length, only, CLUSTER), Plan)
    assert isinstance(made("llama-3.1-405b", 5120, only | {"hardware.maxGPUs": 16}, CLUSTER), Plan)
    offloaded = made("llama-3.1-405b", 5120, only | {"training.offload": "activations"}, CLUSTER)
    assert isinstance(offloaded, Plan) == ("training.offload activations" in refusal.message)


CONTRADICTIONS: list[Any] = [
    (
        {"training.offload": "activations", "training.gradientCheckpointing": False}, "NothingToOffload",
        "spec.training.offload: activations moves what gradientCheckpointing keeps; leave gradientCheckpointing out, "
        "or offload",
    ),
    (
        {"hardware.accelerator": "cpu", "training.attention": "flex_attention"}, "AttentionCannotWork",
        "spec.training.attention: flex_attention cannot train on a CPU: leave the field out, or give sdpa",
    ),
    (
        {"hardware.gpus": 3}, "BatchNotDivisible",
        "spec.training.effectiveBatchSize: 32 sequences cannot be shared by 3 GPUs in micro-batches of 1; make it a "
        "multiple of 3",
    ),
    (
        {"offline": True, "model": {"uri": "hf://meta-llama/Llama-3.1-8B"}}, "NoMirror",
        "spec.offline: hf://meta-llama/Llama-3.1-8B is to come from Hugging Face's hub, and this installation names no "
        "mirror of it: set HF_ENDPOINT in the chart's stageEnv, or give the place of a copy (pvc://, s3://)",
    ),
    (
        {"offline": True, "evaluation.golden": {"uri": "pvc://data/golden.jsonl"},
         "evaluation.judge": {"endpoint": "https://api.example.com/v1", "model": "m"}}, "JudgeOutside",
        "spec.evaluation.judge.endpoint: https://api.example.com/v1 is not a Service of this cluster "
        "(http://name.namespace.svc/v1), and spec.offline lets nothing out: name one that is, or leave judge out",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "reason", "message"), CONTRADICTIONS)
def test_settings_that_contradict_one_another_are_refused_for_good(edits: Raw, reason: str, message: str) -> None:
    assert made("llama-3.1-8b", 1024, edits, CLUSTER) == Unfit(reason, message, final=True)


HQQ: Raw = {"quantization.type": "hqq", "method": "qlora"}
WITH_HQQ = Installation(back_ends=frozenset({"hqq"}))


def test_hqq_is_refused_where_the_image_is_not_said_to_have_it() -> None:
    refusal = Unfit(
        "NotInTheImage",
        "spec.quantization.type: hqq needs a trainer image that was built with it (--build-arg HQQ=hqq==…) and is said "
        "to be (the chart's value trainer.backEnds); use nf4, or name such an image in spec.podTemplate.image",
        final=True,
    )
    assert made("llama-3.1-8b", 1024, HQQ, CLUSTER) == refusal
    assert made("llama-3.1-8b", 1024, HQQ | {"hardware.accelerator": "cpu"}, CLUSTER) == refusal
    assert planned("llama-3.1-8b", 1024, HQQ, CLUSTER, installation=WITH_HQQ).recipe.half_quadratic
    assert planned("llama-3.1-8b", 1024, HQQ | {"podTemplate.image": "r/own:1"}, CLUSTER).recipe.half_quadratic
    assert not planned("llama-3.1-8b", 1024, HQQ | {"method": "lora"}, CLUSTER).recipe.half_quadratic


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"lora.dora": True}, "does not go together with lora.dora; use nf4, or leave that out"),
        ({"lora.init": "loftq"}, "does not go together with lora.init: loftq; use nf4, or leave that out"),
        ({"training.offload": "parameters"}, "does not go together with training.offload: parameters; use nf4, or"),
    ],
)
def test_hqq_is_for_plain_lora(edits: Raw, says: str) -> None:
    refusal = made("llama-3.1-8b", 1024, HQQ | edits, CLUSTER, installation=WITH_HQQ)
    assert isinstance(refusal, Unfit)
    assert (refusal.reason, refusal.final) == ("NotWithHqq", True)
    assert refusal.message.startswith(f"spec.quantization.type: hqq {says}")


def test_hqq_is_refused_for_weights_that_it_cannot_hold() -> None:
    refusal = made("mixtral-8x7b-v0.1", 1024, HQQ, CLUSTER, installation=WITH_HQQ)
    assert refusal == Unfit(
        "NotWithHqq",
        "spec.quantization.type: hqq cannot hold routed experts, which are one tensor for all of a layer; use nf4",
        final=True,
    )
    known = shape_of_model("llama-3.1-8b")
    odd = known.model_copy(
        update={"linear": [*known.linear, LinearModule(name="odd", in_features=65, out_features=64, count=1)]}
    )
    refusal = planner.recipes(given.job(HQQ).spec, odd, max_length=512, loss="assistant")
    assert isinstance(refusal, Unfit)
    assert refusal.message.startswith("spec.quantization.type: hqq cannot hold odd (65 × 64 weights), which is no mul")


def test_gpus_do_not_share_a_base_in_hqq() -> None:
    """Each may have it whole."""
    alone = planned("llama-3.1-8b", 1024, HQQ | {"hardware.gpus": 2}, CLUSTER, installation=WITH_HQQ)
    assert (alone.gpus, alone.sharded) == (2, False)
    refusal = made("llama-3.1-405b", 1024, HQQ | {"hardware.maxGPUs": 16}, CLUSTER, installation=WITH_HQQ)
    assert isinstance(refusal, Unfit)
    asked = made("llama-3.1-405b", 1024, HQQ | {"hardware.gpus": 8}, CLUSTER, installation=WITH_HQQ)
    assert isinstance(asked, Unfit)
    assert "with quantization.type hqq GPUs do not share the model" in asked.message
    assert "training.optimizer" not in asked.message
    asked = made("llama-3.1-70b", 1024, HQQ | {"hardware.gpus": 4, "hardware.gpuProducts": ["NVIDIA-L40S"]}, CLUSTER,
                 installation=WITH_HQQ)  # fmt: skip
    assert isinstance(asked, Unfit)
    assert "fits with quantization.type nf4" in asked.message.replace("fits with dataset.maxLength", "")


def test_offline_with_a_judge_in_the_cluster_is_no_contradiction() -> None:
    judge = {"endpoint": "http://judge.models.svc/v1", "model": "m"}
    edits: Raw = {"offline": True, "evaluation": {"golden": {"uri": "pvc://data/golden.jsonl"}, "judge": judge}}
    assert isinstance(made("llama-3.1-8b", 1024, edits, CLUSTER), Plan)


HELD_OUT: Raw = {"dataset.evalFraction": 0.1}
GOLDEN: Raw = {"evaluation.golden": {"uri": "pvc://data/golden.jsonl"}}


@pytest.mark.parametrize(
    ("edits", "best", "patience"),
    [
        ({}, None, None),
        (HELD_OUT, "evalLoss", 2),
        ({"dataset.eval": {"uri": "pvc://data/eval.jsonl"}}, "evalLoss", 2),
        (HELD_OUT | {"training.earlyStoppingEpochs": 0}, "evalLoss", None),
        (GOLDEN, None, None),
        (GOLDEN | {"training.bestMetric": "rougeL", "training.earlyStoppingEpochs": 1}, "rougeL", 1),
    ],
)
def test_the_best_adapter_is_chosen_where_there_is_something_to_choose_by(
    edits: Raw, best: str | None, patience: int | None
) -> None:
    plan = planned("llama-3.1-8b", 1024, edits, CLUSTER)
    assert (plan.recipe.best_metric, plan.recipe.early_stopping_epochs) == (best, patience)
    assert ("best adapter" in [item.name for item in plan.disk_items]) == (best is not None)


def test_offline_with_a_mirror_is_no_contradiction() -> None:
    edits: Raw = {"offline": True, "model": {"uri": "hf://meta-llama/Llama-3.1-8B"}}
    assert isinstance(made("llama-3.1-8b", 1024, edits, CLUSTER, installation=Installation(mirror=True)), Plan)


def test_loftq_makes_good_a_base_of_4_bits() -> None:
    """Where 16 bits would fit, too: there is nothing to make good then."""
    assert planned("llama-3.1-8b", 1024, {}, CLUSTER).recipe.method == "lora"
    plan = planned("llama-3.1-8b", 1024, {"lora.init": "loftq"}, CLUSTER)
    assert (plan.recipe.method, plan.recipe.init) == ("qlora", "loftq")


def test_activations_are_kept_where_there_is_room() -> None:
    """The micro-batch, the GPU and what is learned stay; a third of the time is spared."""
    edits: Raw = {"method": "qlora", "hardware.gpuProducts": ["NVIDIA-H100-80GB-HBM3"]}
    kept = planned("llama-3.1-8b", 2048, edits, CLUSTER)
    again = planned("llama-3.1-8b", 2048, edits | {"training.gradientCheckpointing": True}, CLUSTER)
    assert not kept.recipe.gradient_checkpointing and again.recipe.gradient_checkpointing
    assert kept.micro_batch_size == again.micro_batch_size
    assert again.memory.total_bytes < kept.memory.total_bytes
    assert with_headroom(kept.memory.total_bytes, 15) <= H100[1] * MIB
    assert kept.estimated_seconds and again.estimated_seconds
    assert kept.estimated_seconds == pytest.approx(again.estimated_seconds * 4 / 6, abs=1)


@pytest.mark.parametrize(
    ("model", "edits"),
    [
        pytest.param("llama-3.1-70b", {"method": "qlora"}, id="no room"),
        pytest.param("llama-3.1-8b", {"training.offload": "activations"}, id="those that wait in host memory"),
        pytest.param("llama-3.1-70b", {"hardware.gpus": 8}, id="GPUs share the model"),
    ],
)
def test_activations_are_recomputed_where_there_is_none(model: str, edits: Raw) -> None:
    edits = {"hardware.gpuProducts": ["NVIDIA-H100-80GB-HBM3"]} | edits
    assert planned(model, 4096, edits, CLUSTER).recipe.gradient_checkpointing


def test_what_has_run_out_of_memory_goes_on_recomputing() -> None:
    edits: Raw = {"method": "qlora", "hardware.gpuProducts": ["NVIDIA-H100-80GB-HBM3"]}
    begun = planned("llama-3.1-8b", 2048, edits, CLUSTER).recipe
    assert planned("llama-3.1-8b", 2048, edits, CLUSTER, keep=begun).recipe == begun
    after = begun.model_copy(update={"gradient_checkpointing": True})
    assert planned("llama-3.1-8b", 2048, edits, CLUSTER, keep=after).recipe == after


@pytest.mark.parametrize("edits", [{"lora.dora": True}, {"lora.init": "loftq"}], ids=str)
def test_what_starts_from_whole_weights_is_shared_as_a_plain_adapter_is(edits: Raw) -> None:
    at_most: Raw = {"hardware.maxGPUs": 16, "training.offload": "activations"}
    plain, plan = (planned("llama-3.1-405b", 1024, at_most | more, CLUSTER) for more in ({}, edits))
    assert plan.sharded
    assert plan.gpus >= plain.gpus > 1
    alone = planned("llama-3.1-8b", 1024, edits | {"training.offload": "parameters"}, CLUSTER)
    assert alone.recipe.offload == "parameters"


def test_offloaded_parameters_are_stepped_by_what_can_step_them() -> None:
    """Of one GPU too they are FSDP2's, and bitsandbytes' optimizers fail on them at the first step."""
    edits: Raw = {"training.offload": "parameters", "hardware.gpus": 1}
    assert planned("llama-3.1-8b", 1024, edits, CLUSTER).recipe.optimizer == "adamw_torch_fused"
    refusal = made("llama-3.1-8b", 1024, edits | {"training.optimizer": "paged_adamw_8bit"}, CLUSTER)
    assert isinstance(refusal, Unfit)
    assert (refusal.reason, refusal.final) == ("OptimizerCannotStep", True)
    assert "leave the optimizer out, or give adamw_torch_fused" in refusal.message
    assert planned("llama-3.1-8b", 1024, {"hardware.gpus": 1}, CLUSTER).recipe.optimizer == "paged_adamw_8bit"


def test_a_dora_takes_more_than_a_lora() -> None:
    """Its magnitudes, a unit matrix and each weight in the adapter's type while its layer is at work."""
    edits: Raw = {"method": "qlora", "training.microBatchSize": 1, "training.gradientCheckpointing": True}
    plain, dora = (planned("llama-3.1-8b", 512, edits | more, CLUSTER) for more in ({}, {"lora.dora": True}))
    assert dora.recipe.dora
    unit = 4 * 14336**2
    assert dora.memory.total_bytes > plain.memory.total_bytes + unit


def test_amd_gpus_are_sized_and_placed_and_refused_without_an_image() -> None:
    labels = {"amd.com/gpu.vram": "192G", "amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM"}
    node = gpu_node("amd-1", "none", None, gpus=0)
    node["metadata"]["labels"] = labels
    node["status"]["allocatable"] = {"amd.com/gpu": "8", "memory": "512Gi"}
    edits: Raw = {"hardware.accelerator": "amd"}
    plan = planned("llama-3.1-70b", 4096, edits, [node])
    assert (plan.flavour, plan.resource, plan.gpus) == ("AMD_Instinct_MI300X_OAM", "amd.com/gpu", 1)
    refusal = made("llama-3.1-70b", 4096, edits, [node], installation=Installation(amd_image=False))
    assert isinstance(refusal, Unfit)
    assert refusal.message == (
        "it fits 1 × AMD_Instinct_MI300X_OAM, and this installation names no trainer image for AMD GPUs: set the "
        "chart's value trainer.amdImage, or spec.podTemplate.image"
    )
    own: Raw = edits | {"podTemplate.image": "registry.example.com/rocm:1"}
    assert isinstance(made("llama-3.1-70b", 4096, own, [node], installation=Installation(amd_image=False)), Plan)


def test_what_the_job_excludes_itself_is_said_last_and_each_reason_once() -> None:
    instinct = gpu_node("mi", "any", 0)
    instinct["metadata"]["labels"] = {"amd.com/gpu.product-name": "Instinct_MI210", "amd.com/gpu.vram": "64G"}
    instinct["status"]["allocatable"] = {"amd.com/gpu": "1"}
    cluster = [*nodes(A10, 1, 1), *nodes(L40S, 1, 1), *nodes(H100, 1, 1), instinct]
    refusal = made("llama-3.1-70b", 2048, {"hardware.gpuProducts": ["Gaudi-3", A10[0]]}, cluster)
    assert isinstance(refusal, Unfit)
    first, second, *rest = refusal.message.removeprefix("no GPU can take this training: ").split("; ")
    assert first == "Gaudi-3: no node of the cluster has it"
    assert second.startswith(f"{A10[0]}: 22.")
    assert "; ".join(rest[-2:]).partition(". ")[0] == (
        "Instinct_MI210: spec.hardware.accelerator is nvidia, and it is AMD's; "
        f"{H100[0]}, {L40S[0]}: not among spec.hardware.gpuProducts"
    )


# --- waiting ---


def test_a_training_that_waits_is_told_what_else_would_do() -> None:
    inventory = Inventory.of(WITH_H200)
    found = given.inspection(shape_of_model("llama-3.1-70b"), max_length=4096, sequences=1000)
    spec = given.job({"hardware.gpuProducts": [H100[0]]}).spec
    plan = planner.plan(spec, found, inventory)
    assert isinstance(plan, Plan)
    said = planner.advice(spec, found, plan, inventory, Installation())
    assert said == (
        "the cluster has 2 nodes with 1 × NVIDIA-H100-80GB-HBM3 or more, none of them free for it; not to wait: "
        "suspend the job, set spec.hardware.gpuProducts to [NVIDIA-A100-SXM4-80GB] (qlora, 1 GPU) or [NVIDIA-H200] "
        "(qlora, 1 GPU) or [NVIDIA-L40S] (qlora, 2 GPUs), and resume"
    )
    gone = planner.advice(spec, found, plan, Inventory.of(nodes(A100_40, 1, 1)), Installation())
    assert gone == (
        "the cluster has no node with 1 × NVIDIA-H100-80GB-HBM3 that it may use; no other GPU here can take the "
        "training, see status.plan.rejected"
    )


# --- properties ---

PRODUCTS = st.sampled_from([RTX_4090, L40S, A100_40, A100_80, H100, H200])
CLUSTERS = st.lists(st.tuples(PRODUCTS, st.integers(1, 4), st.sampled_from([1, 2, 4, 6, 8])), min_size=1, max_size=4)
EDITS = st.fixed_dictionaries(
    {"training.effectiveBatchSize": st.sampled_from([1, 12, 32, 64])},
    optional={
        "hardware.gpus": st.sampled_from([1, 2, 4, 8]),
        "hardware.nodes": st.sampled_from([1, 2]),
        "method": st.sampled_from(["lora", "qlora"]),
    },
)


@for_all(
    st.sampled_from(["qwen2.5-0.5b-instruct", "llama-3.1-8b", "llama-3.1-70b"]),
    st.sampled_from([512, 4096]),
    EDITS,
    CLUSTERS,
)
def test_a_plan_is_what_it_claims(model: str, length: int, edits: Raw, cluster: list[Any]) -> None:
    asked = {key: value for key, value in edits.items() if "hardware" in key}
    if asked.get("hardware.gpus", 2) % asked.get("hardware.nodes", 1):
        return
    raw = [node for n, (product, count, gpus) in enumerate(cluster) for node in nodes(product, count, gpus)]
    for number, node in enumerate(raw):
        node["metadata"]["name"] = f"node-{number}"
    plan = made(model, length, edits, raw)
    products = {product[0] for product, _, _ in cluster}
    if isinstance(plan, Unfit):
        assert plan.final or all(product in plan.message for product in products)
        return
    there = [
        (count, gpus) for product, count, gpus in cluster if product[0] == plan.flavour and gpus >= plan.gpus_per_node
    ]
    assert sum(count for count, _ in there) >= plan.nodes
    assert plan.gpus == plan.nodes * plan.gpus_per_node == asked.get("hardware.gpus", plan.gpus)
    assert plan.nodes == asked.get("hardware.nodes", plan.nodes)
    assert with_headroom(plan.memory.total_bytes, 15) <= (plan.memory.gpu_bytes or 0)
    assert plan.memory.total_bytes == sum(item.bytes for item in plan.memory.items)
    assert plan.micro_batch_size * plan.gradient_accumulation * plan.gpus == edits["training.effectiveBatchSize"]
    assert {entry.flavour for entry in plan.rejected} == products - {plan.flavour}
    assert plan.recipe.method == edits.get("method", plan.recipe.method)
    assert isinstance(plan.recipe, Recipe)
