"""What a method promises of its numbers: where an adapter starts, what it is scaled by, and what is left after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_api.exchange import Recipe
from qlora_trainer.adapter import with_adapter
from qlora_trainer.environment import Pod
from qlora_trainer.failures import BadInput, Interrupted
from qlora_trainer.merge import merge
from qlora_trainer.model import BaseModel, open_base
from qlora_trainer.quantization import dequantised, load_for_training
from qlora_trainer.starts import start
from qlora_trainer.training import train

from .conftest import Place, recipe_of
from .test_merge import evaluated, merged
from .test_training import InterruptedAfter, afresh, losses

CPU = torch.device("cpu")
IDS = torch.arange(3, 63).view(2, 30)


@pytest.fixture(scope="module")
def base(model_dir: Any) -> BaseModel:
    return open_base(model_dir, "pvc://base/model")


def started(base: BaseModel, recipe: Recipe) -> Any:
    model = with_adapter(load_for_training(base, recipe, CPU), recipe, base)
    start(model, recipe, base)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits.float()


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """ΔW of each adapted layer, by the weight's name in the base."""
    return {
        f"{name}.weight": module.get_delta_weight("default").detach()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }


def stored(base: BaseModel) -> dict[str, torch.Tensor]:
    return {name: weight for file in base.weights.files for name, weight in load_file(base.directory / file).items()}


IN_16_BITS = {"method": "lora", "compute_dtype": "bfloat16"}


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"dora": True},
        {"dora": True, "method": "lora"},
        {"dora": True, **IN_16_BITS},
        {"init": "gaussian"},
        {"rslora": True},
    ],
    ids=str,
)
def test_an_adapter_starts_as_no_change(base: BaseModel, recipe: dict[str, Any]) -> None:
    """A DoRA too: its magnitudes are those of the base, not those rounded to 16 bits."""
    model = started(base, recipe_of(**recipe))
    with model.disable_adapter():
        plain = logits(model)
    exact = recipe_of(**recipe).compute_dtype == "float32"
    # in bfloat16 each layer's output is rounded once more where a DoRA adds nothing to it
    assert float((logits(model) - plain).abs().max()) <= (1e-5 if exact else 2**-6) * float(plain.abs().max())
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.dtype == torch.float32, name


def test_magnitudes_are_exact_on_a_base_of_16_bits(base: BaseModel) -> None:
    model = started(base, recipe_of(dora=True, **IN_16_BITS))
    weights = stored(base)
    for name, parameter in model.get_base_model().named_parameters():
        if "magnitude" in name:
            weight = weights[name.replace(".lora_magnitude_vector.default", "")].float()
            assert torch.equal(parameter, torch.linalg.norm(weight, dim=1))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 8), (True, 16 / math.sqrt(8))])
def test_the_product_is_scaled_by_alpha_over_the_rank_or_its_root(
    base: BaseModel, *, rslora: bool, scale: float
) -> None:
    model = started(base, recipe_of(rslora=rslora, init="loftq"))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(layer.get_delta_weight("default"), scale * product)


@pytest.mark.parametrize("recipe", [{}, {"rslora": True}, {"quant_type": "fp4", "double_quant": False}], ids=str)
def test_loftq_makes_good_what_the_rank_allows(base: BaseModel, recipe: dict[str, Any]) -> None:
    made = recipe_of(init="loftq", **recipe)
    weights = stored(base)
    found = deltas(started(base, made))
    assert len(found) == 14
    for name, delta in found.items():
        residual = weights[name].float() - dequantised(weights[name], made)
        best = torch.linalg.svdvals(residual)[made.rank :].norm()  # Eckart and Young 1936
        left = (residual - delta).norm()
        assert best <= left * (1 + 1e-5), name
        assert left < 1.02 * best < residual.norm(), name


def test_loftq_begins_nearer_to_the_base_than_nf4(base: BaseModel) -> None:
    full = logits(load_for_training(base, recipe_of(method="lora"), CPU).eval())
    model = started(base, recipe_of(init="loftq", rank=32))
    with model.disable_adapter():
        plain = float((logits(model) - full).norm())
    assert float((logits(model) - full).norm()) < 0.7 * plain


def test_the_same_seed_gives_the_same_start(base: BaseModel) -> None:
    first, again = (deltas(started(base, recipe_of(init="loftq"))) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_rank_above_the_matrix_leaves_the_rest_empty(base: BaseModel) -> None:
    recipe = recipe_of(init="loftq", rank=100, target_modules=["k_proj"])  # 32 × 64
    weights = stored(base)
    for name, delta in deltas(started(base, recipe)).items():
        assert torch.allclose(dequantised(weights[name], recipe) + delta, weights[name].float(), atol=1e-5)


def test_loftq_needs_the_base_by_name(base: BaseModel) -> None:
    recipe = recipe_of(init="loftq", target_modules=["q_proj"])
    model = with_adapter(load_for_training(base, recipe, CPU), recipe, base)
    base.weights.tensors["renamed"] = base.weights.tensors.pop("model.layers.1.self_attn.q_proj.weight")
    try:
        with pytest.raises(BadInput, match=r"lora\.init: loftq .* has none by the name model\.layers\.1"):
            start(model, recipe, base)
    finally:
        base.weights.tensors["model.layers.1.self_attn.q_proj.weight"] = base.weights.tensors.pop("renamed")


@pytest.mark.parametrize(
    "recipe",
    [
        {"dora": True},
        {"dora": True, "method": "lora", "rslora": True},
        {"init": "loftq"},
        {"dora": True, "init": "loftq"},
    ],
    ids=str,
)
def test_what_was_learned_is_what_is_merged(place: Place, recipe: dict[str, Any]) -> None:
    order = place.train_order(recipe={"dropout": 0.05, **recipe})
    result = train(order, place.pod)
    assert losses(place)[-1] < losses(place)[0]
    expected = evaluated(place, order)
    done = merge(place.merge_order(order, result.adapter_digest), place.pod)
    noise = float((expected - expected.bfloat16().float()).abs().max())
    assert float((merged(place) - expected).abs().max()) < 4 * noise
    assert 0 < done.parity < 2**-8


#: Each method and each optimizer once; test_matrix.py has them together.
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("adamw_torch", {}),
    "fp4": ("adamw_bnb_8bit", {"quant_type": "fp4", "double_quant": False}),
    "16 bits": ("adamw_torch_fused", {**IN_16_BITS, "packing": True}),
    "DoRA": ("adamw_8bit", {"dora": True}),
    "LoftQ": ("paged_adamw_32bit", {"init": "loftq", "packing": True}),
    "rsLoRA": ("paged_adamw_8bit", {"rslora": True, "init": "gaussian"}),
}


@pytest.mark.parametrize("method", RESUMED)
def test_every_method_and_optimizer_resumes_bit_by_bit(place: Place, method: str) -> None:
    """With dropout, whose masks an interrupted training has to draw again."""
    optimizer, changes = RESUMED[method]
    recipe = {"optimizer": optimizer, "packing": False, "dropout": 0.1, **changes}
    order = place.train_order(place.data(golden=None), recipe)
    whole = train(order, place.pod)
    history = losses(place)
    assert min(history[-2:]) < history[0]
    afresh(place)
    with pytest.raises(Interrupted, match="at step 3 of 6"):
        train(order, Pod(InterruptedAfter(3 * 3 + 1), place.pod.claims))
    resumed = train(order.model_copy(update={"attempt": 2}), place.pod)
    assert resumed.resumed_from_step == 3
    assert losses(place) == history
    assert resumed.adapter_digest == whole.adapter_digest


def test_the_adapter_brings_the_tokenizer_of_its_base(place: Place) -> None:
    train(place.train_order(recipe={"max_steps": 1}), place.pod)
    source, target = place.claims / "base" / "model", place.work / "adapter"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    afresh(place)
