"""Every family is sized by what is particular to it, and more of anything never takes less."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from qlora_api.exchange import ModelShape, Recipe
from qlora_operator.sizing.catalogue import catalogue
from qlora_operator.sizing.config import shape_of_config
from qlora_operator.sizing.families import FAMILIES
from qlora_operator.sizing.memory import our_training, training_memory
from qlora_operator.sizing.step import Rank
from qlora_operator.sizing.tensors import Trace
from qlora_operator.sizing.training import decoder_of
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
GROWING = ("num_hidden_layers", "intermediate_size", "vocab_size", "head_dim")


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
    expected = 2 * (shape.parameters - linear) + (linear / 2 if method == "qlora" else 2 * linear)
    assert found["base weights"] + found["embeddings, head and norms"] == pytest.approx(expected, rel=1e-4)


# --- what is particular ---


def test_a_cap_on_the_logits_costs_one_more_copy_of_them():
    """tanh keeps its own output, in the compute type, until its backward."""
    capped = catalogue()["google/gemma-2-2b"].shape
    plain = capped.model_copy(update={"family": "gemma3_text"})
    recipe = given.recipe(method="lora", target_modules=["o_proj"], max_length=2048)
    more = items(capped, recipe)["logits and loss"] - items(plain, recipe)["logits and loss"]
    assert more == 2048 * capped.vocab_size * 2


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
