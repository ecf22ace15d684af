"""Every family is sized by what is particular to it, and more of anything never takes less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from qlora_api.exchange import ModelShape, Recipe
from qlora_api.heads import takes_loss_in_tiles, tile_rows
from qlora_operator.placement.choice import Infeasible, Placed, Wishes, choose
from qlora_operator.placement.flavours import Flavour
from qlora_operator.planner import Unfit, recipes
from qlora_operator.sizing.catalogue import catalogue
from qlora_operator.sizing.config import shape_of_config
from qlora_operator.sizing.families import FAMILIES
from qlora_operator.sizing.memory import lora_parameters, our_training, peak_of, training_memory, walked
from qlora_operator.sizing.step import Rank
from qlora_operator.sizing.tensors import Event, Trace
from qlora_operator.sizing.training import Training, adapted_by_default, decoder_of
from tests.unit.families import CONFIGS
from tests.unit.operator import given

RECIPES = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["qlora", "lora"]),
        "compute_dtype": st.sampled_from(["bfloat16", "float32"]),
        "rank": st.sampled_from([1, 8, 64]),
        "max_length": st.sampled_from([16, 64, 512, 2048]),
        "optimizer": st.sampled_from(["paged_adamw_8bit", "adamw_torch"]),
        "gradient_checkpointing": st.booleans(),
        "attention": st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
        "packing": st.booleans(),
    }
)
#: One well-known model of each family, the largest.
LARGEST = {
    model.shape.family: repository
    for repository, model in sorted(catalogue().items(), key=lambda item: item[1].parameters)
}


def every_linear(shape: ModelShape) -> list[str]:
    return sorted({module.name for module in shape.linear})


def total(shape: ModelShape, recipe: Recipe, size: int = 1) -> int:
    return training_memory(shape, recipe, micro_batch_size=size).total_bytes


def items(shape: ModelShape, recipe: Recipe, size: int = 1) -> dict[str, int]:
    return {item.name: item.bytes for item in training_memory(shape, recipe, micro_batch_size=size).items}


def recipe_for(shape: ModelShape, **fields: Any) -> Recipe:
    return given.recipe(target_modules=every_linear(shape), effective_batch_size=1024, **fields)


@settings(max_examples=60)
@for_all(st.sampled_from(sorted(CONFIGS)), RECIPES, st.integers(1, 8), st.integers(2, 4))
def test_more_tokens_sequences_or_rank_never_take_less(name: str, fields: dict[str, Any], size: int, times: int):
    shape = shape_of_config(CONFIGS[name])
    recipe = recipe_for(shape, **fields)
    base = total(shape, recipe, size)
    assert total(shape, recipe, size * times) >= base
    assert total(shape, recipe.model_copy(update={"rank": recipe.rank * times}), size) >= base
    assert total(shape, recipe.model_copy(update={"max_length": recipe.max_length * times}), size) >= base


@settings(max_examples=60)
@for_all(st.sampled_from(sorted(CONFIGS)), RECIPES, st.integers(1, 8), st.data())
def test_a_larger_model_never_takes_less(name: str, fields: dict[str, Any], size: int, data: st.DataObject):
    config = CONFIGS[name]
    key = data.draw(st.sampled_from([key for key in GROWING if key in config]))
    larger = {**config, key: config[key] * data.draw(st.integers(2, 4))}
    small, large = shape_of_config(config), shape_of_config(larger)
    assert large.parameters > small.parameters
    assert total(large, recipe_for(large, **fields), size) >= total(small, recipe_for(small, **fields), size)


#: Settings of a config.json that make a model larger.
GROWING = (
    "num_hidden_layers",
    "intermediate_size",
    "moe_intermediate_size",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "n_shared_experts",
    "kv_lora_rank",
    "v_head_dim",
    "vocab_size",
    "head_dim",
)


@settings(max_examples=40)
@for_all(st.sampled_from(sorted(CONFIGS)), RECIPES, st.integers(1, 8))
def test_the_items_add_up_for_every_family(name: str, fields: dict[str, Any], size: int):
    shape = shape_of_config(CONFIGS[name])
    memory = training_memory(shape, recipe_for(shape, **fields), micro_batch_size=size)
    assert memory.total_bytes == sum(item.bytes for item in memory.items)
    assert all(item.bytes > 0 for item in memory.items)


def test_every_family_has_a_well_known_model():
    assert set(LARGEST) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_weights_in_memory_are_the_weights_of_the_model(family: str, method: str):
    """Nothing of the base is forgotten and nothing counted twice, whatever its layers are called."""
    shape = catalogue()[LARGEST[family]].shape
    found = items(shape, given.recipe(method=method, target_modules=["o_proj", "dense"]))
    linear = sum(module.in_features * module.out_features * module.count for module in shape.linear)
    linear += sum(kind.weights for kind in shape.experts)
    expected = 2 * (shape.parameters - linear) + (linear / 2 if method == "qlora" else 2 * linear)
    held = sum(found.get(name, 0) for name in ("base weights", "experts, not in 4 bits", "embeddings, head and norms"))
    assert held == pytest.approx(expected, rel=1e-4)


# --- what is particular ---


def test_a_cap_on_the_logits_costs_one_more_copy_of_them():
    """Of a tile: tanh's own output, in the compute type, until its backward."""
    capped = catalogue()["google/gemma-2-2b"].shape
    plain = capped.model_copy(update={"family": "gemma3_text"})
    recipe = given.recipe(method="lora", target_modules=["o_proj"], max_length=2048)
    more = items(capped, recipe)["logits and loss"] - items(plain, recipe)["logits and loss"]
    assert more == tile_rows(capped.vocab_size) * capped.vocab_size * 2 < 2048 * capped.vocab_size


def test_a_cap_on_the_scores_costs_one_more_score_per_head_and_pair():
    capped = catalogue()["google/gemma-2-2b"].shape.model_copy(update={"vocab_size": 1000})  # else logits are the peak
    plain = capped.model_copy(update={"family": "gemma3_text"})
    recipe = given.recipe(method="lora", target_modules=["o_proj"], max_length=8192, attention="eager")
    more = items(capped, recipe)["attention"] - items(plain, recipe)["attention"]
    assert more == pytest.approx(2 * capped.heads * 8192**2, rel=0.02)


def test_a_window_needs_a_mask_with_sdpa_and_none_with_flash():
    whole = catalogue()["microsoft/phi-4"].shape
    window = whole.model_copy(update={"sliding_window": 1024})
    for attention, mask_bytes in (("sdpa", 1), ("flash_attention_2", 0)):
        recipe = recipe_for(whole, max_length=4096, packing=False, attention=attention)
        training = our_training(decoder_of(window), recipe, 1)
        assert training.masked == bool(mask_bytes)
        assert (total(window, recipe) > total(whole, recipe)) == bool(mask_bytes)
    short = recipe_for(whole, max_length=1024, packing=False)
    assert total(window, short) == total(whole, short), "nothing lies beyond the window"


def test_layers_that_alternate_have_two_masks():
    shape = catalogue()["google/gemma-3-12b-it"].shape
    recipe = recipe_for(shape, max_length=4096, packing=True)
    one = shape.model_copy(update={"family": "qwen3"})
    assert our_training(decoder_of(shape), recipe, 1).masks == 2
    assert our_training(decoder_of(one), recipe, 1).masks == 1


def test_norms_of_heads_and_behind_the_layers_are_counted_while_a_layer_is_recomputed():
    plain = catalogue()["Qwen/Qwen3-8B"].shape.model_copy(update={"family": "llama"})
    recipe = given.recipe(method="lora", target_modules=["o_proj"], max_length=4096, gradient_checkpointing=False)
    norms = {
        family: items(plain.model_copy(update={"family": family}), recipe)["norms and residuals"]
        for family in ("llama", "qwen3", "gemma3_text")
    }
    tokens, layers = 4096, plain.layers
    heads = tokens * layers * (plain.heads + plain.kv_heads) * plain.head_dim
    behind = tokens * layers * 2 * plain.hidden_size
    # each keeps its input in fp32; the norms of heads make theirs from a product that nothing else keeps
    assert norms["qwen3"] - norms["llama"] == pytest.approx(4 * heads, rel=0.02)
    assert norms["gemma3_text"] - norms["qwen3"] == pytest.approx(4 * behind, rel=0.02)


def test_attention_and_mlp_side_by_side_need_one_norm():
    shape = catalogue()["microsoft/phi-2"].shape
    recipe = given.recipe(method="lora", target_modules=["dense"], max_length=2048, gradient_checkpointing=False)
    in_turn = shape.model_copy(update={"family": "llama"})
    assert items(shape, recipe)["norms and residuals"] < 0.4 * items(in_turn, recipe)["norms and residuals"]


MIXTURES = [repository for repository, model in catalogue().items() if model.shape.experts]


@pytest.mark.parametrize("repository", MIXTURES)
def test_experts_stay_in_sixteen_bits_unless_loading_reaches_them(repository: str):
    shape = catalogue()[repository].shape
    weights = sum(kind.weights for kind in shape.experts)
    assert weights > 0.9 * shape.parameters
    recipe = given.recipe(target_modules=["o_proj"])
    packed, wide = items(shape, recipe), items(shape.model_copy(update={"experts_quantized": False}), recipe)
    assert wide["experts, not in 4 bits"] == 2 * weights
    assert "experts, not in 4 bits" not in packed
    assert packed["base weights"] - wide["base weights"] == pytest.approx(weights / 2)
    assert packed["quantisation scales"] - wide["quantisation scales"] == pytest.approx(weights / 64, rel=0.03)
    assert "experts, not in 4 bits" not in items(shape, given.recipe(method="lora", target_modules=["o_proj"]))


@pytest.mark.parametrize("repository", MIXTURES)
def test_experts_in_four_bits_are_unpacked_some_at_a_time(repository: str):
    """Not a whole layer's: half a GiB, or one that is larger, and their scales in fp32."""
    shape = catalogue()[repository].shape.model_copy(update={"vocab_size": 1000})  # else logits are the peak
    held = items(shape, given.recipe(target_modules=["o_proj"], max_length=1))["MLP"]
    one = 2 * max(kind.weights // kind.experts // kind.count for kind in shape.experts)
    whole = 2 * max(kind.weights // kind.count for kind in shape.experts)
    assert one < held < min(whole, 512 << 20) * (1 + 1 / 32) + 2**20


@pytest.mark.parametrize("repository", MIXTURES)
def test_more_experts_at_work_on_a_token_take_more(repository: str):
    shape = catalogue()[repository].shape.model_copy(update={"vocab_size": 1000})  # else logits are the peak
    recipe = given.recipe(target_modules=["o_proj"], max_length=4096, gradient_checkpointing=False)
    more = shape.model_copy(update={"experts_per_token": 2 * shape.experts_per_token})
    assert items(more, recipe)["MLP"] > 1.5 * items(shape, recipe)["MLP"]


@pytest.mark.parametrize("repository", MIXTURES)
def test_adapters_of_a_mixture_are_on_its_attention_unless_asked_for(repository: str):
    shape = catalogue()[repository].shape
    targets = adapted_by_default(shape)
    assert "o_proj" in targets
    assert not {"gate_proj", "up_proj", "down_proj"} & set(targets)
    dense = catalogue()["Qwen/Qwen3-8B"].shape
    assert adapted_by_default(dense) == every_linear(dense)


def planned(repository: str, edits: dict[str, Any] | None = None) -> list[Recipe] | Unfit:
    return recipes(given.job(edits).spec, catalogue()[repository].shape, max_length=512, loss="all")


def test_the_plan_adapts_a_mixtures_attention_and_what_is_asked_for():
    for edits, targets in (
        ({}, ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]),
        ({"lora.targetModules": ["o_proj"]}, ["o_proj"]),
    ):
        found = planned("deepseek-ai/DeepSeek-V3", edits)
        assert not isinstance(found, Unfit)
        assert [recipe.target_modules for recipe in found] == [targets, targets]


@pytest.mark.parametrize(
    ("repository", "targets", "taken", "others"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", ["gate_up_proj", "q_proj"], "gate_up_proj", "k_proj, o_proj, q_proj, v_proj"),
        (
            "deepseek-ai/DeepSeek-V3", ["down_proj", "o_proj"], "down_proj",
            "kv_a_proj_with_mqa, kv_b_proj, o_proj, q_a_proj, q_b_proj",
        ),
    ],
    ids=["their own name", "a name that PEFT takes for them, though dense layers have it"],
)  # fmt: skip
def test_experts_as_targets_are_refused_with_what_to_name_instead(
    repository: str, targets: list[str], taken: str, others: str
):
    refused = planned(repository, {"lora.targetModules": targets})
    assert isinstance(refused, Unfit)
    assert refused.final
    assert f"{taken} are, in a mixture, the weights of all experts of a layer together" in refused.message
    assert refused.message.endswith(f"name other linear layers, it has {others}")


def test_a_mixture_that_no_gpu_holds_is_shared_by_several():
    shape, made = catalogue()["Qwen/Qwen3-235B-A22B"].shape, given.recipe(target_modules=["o_proj"])
    pool = [Flavour("nvidia.com/gpu", "NVIDIA-H100-80GB-HBM3", 80 * 2**30, gpus_per_node=8, nodes=2)]
    refused = choose(shape, lambda _: [made], pool, wishes=Wishes(gpus=1))
    assert isinstance(refused, Infeasible)
    assert "fits with training.offload parameters or on 4 GPUs" in refused.message
    fixed = choose(shape, lambda gpus: [made] if gpus == 1 else [], pool, wishes=Wishes(gpus=1))
    assert isinstance(fixed, Infeasible)
    assert fixed.message.endswith("fits with training.offload parameters and training.optimizer adamw_torch_fused")
    chosen = choose(shape, lambda _: [made], pool, wishes=Wishes())
    assert isinstance(chosen, Placed)
    assert (chosen.sharded, chosen.layout.gpus) == (True, 4)


def test_each_gpu_has_its_part_of_the_experts_and_all_of_their_scales():
    """And whole those of the layer at work and of the one that comes next."""
    shape, made = catalogue()["mistralai/Mixtral-8x22B-v0.1"].shape, given.recipe(target_modules=["o_proj"])
    experts = sum(weights.weights for weights in shape.experts)
    for gpus in (2, 8, 16):
        items = {x.name: x.bytes for x in training_memory(shape, made, micro_batch_size=1, gpus=gpus).items}
        others = sum(m.in_features * m.out_features * m.count for m in shape.linear)
        assert items["base weights"] == pytest.approx((experts + others) / 2 / gpus, rel=0.001)
        assert items["gathered weights"] == pytest.approx(2 * (experts + others) / 2 / shape.layers, rel=0.01)
        assert items["quantisation scales"] == pytest.approx((experts + others) * (1 + 4 / 256) / 64, rel=0.001)


def test_a_model_that_caps_scores_is_trained_with_written_out_attention():
    found = planned("google/gemma-2-9b")
    assert not isinstance(found, Unfit)
    assert {recipe.attention for recipe in found} == {"eager"}
    refused = planned("google/gemma-2-9b", {"training.attention": "sdpa"})
    assert isinstance(refused, Unfit)
    assert refused.final
    assert "sdpa cannot cap scores, as gemma2 does" in refused.message
    other = planned("google/gemma-3-12b-it")
    assert not isinstance(other, Unfit)
    assert {recipe.attention for recipe in other} == {"sdpa"}


def test_the_plan_says_what_four_bits_do_not_reach():
    known = catalogue()["mistralai/Mixtral-8x22B-v0.1"].shape
    shape = known.model_copy(update={"experts_quantized": False})
    (note,) = training_memory(shape, given.recipe(target_modules=["o_proj"]), micro_batch_size=1).notes
    assert note == "4 bits do not reach the experts, 96 % of the weights: they stay in bfloat16"
    for quiet in (
        training_memory(shape, given.recipe(method="lora", target_modules=["o_proj"]), micro_batch_size=1),
        training_memory(known, given.recipe(target_modules=["o_proj"]), micro_batch_size=1),
        training_memory(catalogue()["Qwen/Qwen3-8B"].shape, given.recipe(), micro_batch_size=1),
    ):
        assert quiet.notes == ()


def test_a_family_that_is_not_known_is_sized_from_its_tensors_and_the_plan_says_so():
    known = catalogue()["Qwen/Qwen3-8B"].shape
    recipe = given.recipe()
    (note,) = training_memory(known.model_copy(update={"family": "granite"}), recipe, micro_batch_size=1).notes
    assert "its family (granite) is not known: its layers are taken to work as Llama's do" in note
    renamed = [module.model_copy(update={"name": f"x_{module.name}"}) for module in known.linear]
    other = known.model_copy(update={"family": "novel", "linear": renamed})
    (note,) = training_memory(other, recipe, micro_batch_size=1).notes
    assert "(novel) is not known: what its layers do is not known" in note


@pytest.mark.parametrize("name", [name for name in CONFIGS if "num_experts_per_tok" in CONFIGS[name]])
@pytest.mark.parametrize("targets", [["o_proj"], ["o_proj", "gate_proj", "up_proj", "down_proj"]])
def test_adapters_are_on_every_layer_that_has_the_name(name: str, targets: list[str]):
    """Also on those of the blocks without experts, and on what the experts share."""
    shape = shape_of_config(CONFIGS[name])
    recipe = given.recipe(rank=512, target_modules=targets)
    weights = lora_parameters(shape, rank=512, target_modules=targets)
    assert items(shape, recipe)["adapter weights"] == pytest.approx(4 * weights, rel=0.01)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "num_experts_per_tok" in CONFIGS[name]])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_few_layers_of_a_mixture_tell_what_all_of_them_take(name: str, checkpointing: bool):
    shape = shape_of_config({**CONFIGS[name], "num_hidden_layers": 7})
    training = our_training(decoder_of(shape), recipe_for(shape, gradient_checkpointing=checkpointing), 2)
    assert peak_of(training).bytes == max(peak.bytes for peak in walked(training).values())


@pytest.mark.parametrize("repository", ["Qwen/Qwen3-32B", "deepseek-ai/DeepSeek-V3", "google/gemma-2-27b"])
def test_planning_a_large_model_takes_milliseconds(repository: str):
    shape = catalogue()[repository].shape
    training = our_training(decoder_of(shape), recipe_for(shape, max_length=2048), 1)
    few = sum(len(_events_of(replace(training, decoder=replace(training.decoder, layers=n)))) for n in (2, 3))
    assert few < 8000, "two and three layers are walked, whatever the model has"


def _events_of(training: Training) -> list[Event]:
    trace = Trace()
    Rank(training, trace).step()
    return trace.events


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_is_left_of_a_step_of_any_family(name: str, attention: str):
    """A tensor that is never let go of would be held when the next step begins."""
    shape = shape_of_config(CONFIGS[name])
    trace = Trace()
    rank = Rank(our_training(decoder_of(shape), recipe_for(shape, attention=attention, max_length=64), 2), trace)
    rank.step()
    after_one = dict(trace.held)
    rank.step()
    assert dict(trace.held) == after_one
    assert not any(after_one[name] for name in ("MLP", "attention", "norms and residuals", "activation checkpoints"))


def test_a_family_whose_head_is_not_known_has_whole_logits_in_plan_and_order() -> None:
    known = catalogue()["meta-llama/Llama-3.1-8B"].shape
    unknown = known.model_copy(update={"family": "from_tomorrow"})
    recipe = given.recipe(max_length=4096)
    assert (takes_loss_in_tiles(known), takes_loss_in_tiles(unknown)) == (True, False)
    tiles, whole = (our_training(decoder_of(shape), recipe, 1) for shape in (known, unknown))
    assert whole == replace(tiles, loss="logits", decoder=whole.decoder)
    logits = 4096 * known.vocab_size
    assert peak_of(tiles).items["logits and loss"] < 2 * logits < 12 * logits <= peak_of(whole).items["logits and loss"]
