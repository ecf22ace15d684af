"""Mixtures of experts in 4 bits: what they compute, what of them learns, what is held, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.exchange import Recipe
from qlora_operator.sizing.config import shape_of_config
from qlora_operator.sizing.training import adapted_by_default
from qlora_trainer import experts as room
from qlora_trainer.adapter import with_adapter
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.experts import PackedExperts, quantized_experts
from qlora_trainer.failures import BadInput
from qlora_trainer.inspection import inspect
from qlora_trainer.merge import merge
from qlora_trainer.model import BaseModel, open_base
from qlora_trainer.packable import EXPERT_MATRICES
from qlora_trainer.quantization import dequantised, load_for_training
from qlora_trainer.sequences import Sequence, collate
from qlora_trainer.training import train
from tests.unit.families import CONFIGS

from .conftest import Place, recipe_of
from .test_families import replace_model
from .test_training import losses

CPU = torch.device("cpu")
IDS = torch.arange(3, 63).view(2, 30)
NAMES = ["mixtral", "qwen3_moe"]


def opened(place: Place, name: str) -> BaseModel:
    return open_base(replace_model(place, CONFIGS[name]), "pvc://base/model")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def with_wide_experts(base: BaseModel, recipe: Recipe) -> Any:
    """The model whose experts transformers keeps whole, each of them what is left of it after quantisation."""
    wide = base.shape.model_copy(update={"experts_quantized": False})
    model = load_for_training(BaseModel(**{**vars(base), "shape": wide}), recipe, CPU)
    for module in model.modules():
        for name, matrices in EXPERT_MATRICES.items():
            whole = getattr(module, name, None)
            if isinstance(whole, nn.Parameter):
                for expert in whole.data:
                    for matrix in expert.chunk(matrices):
                        matrix.copy_(dequantised(matrix, recipe))
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", [{}, {"compute_dtype": "bfloat16", "quant_type": "fp4", "double_quant": False}])
def test_packed_experts_compute_what_their_dequantised_weights_do(
    place: Place, name: str, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, made = opened(place, name), recipe_of(**recipe)
    packed, wide = load_for_training(base, made, CPU), with_wide_experts(base, made)
    assert quantized_experts(packed)
    assert quantized_experts(wide) == []
    expected = logits(wide)
    assert torch.equal(logits(packed), expected)
    monkeypatch.setattr(room, "EXPERTS_AT_ONCE_BYTES", 1)  # one by one
    assert torch.equal(logits(packed), expected)
    monkeypatch.setattr(room, "_groups_products", lambda _: False)  # as on GPUs before Ampere
    assert torch.allclose(logits(packed), expected, atol=1e-5 if made.compute_dtype == "float32" else 2e-2)


def gradients(model: Any, recipe: Recipe, base: BaseModel) -> dict[str, torch.Tensor]:
    """Of an adapter whose factors are all not zero."""
    adapted = with_adapter(model, recipe, base).train()
    torch.manual_seed(1)
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        weight.data.normal_(std=0.05)
    if recipe.gradient_checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sequence = Sequence(list(range(3, 67)), list(range(3, 67)), [64])
    summed_loss(adapted, collate([sequence], pad=0), CPU).backward()
    return {name: weight.grad for name, weight in trained.items() if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_through_packed_experts_to_the_attention_below(
    place: Place, name: str, checkpointing: bool
) -> None:
    base = opened(place, name)
    targets = adapted_by_default(base.shape)
    recipe = recipe_of(target_modules=targets, gradient_checkpointing=checkpointing)
    packed = gradients(load_for_training(base, recipe, CPU), recipe, base)
    wide = gradients(with_wide_experts(base, recipe), recipe, base)
    first = {key for key in packed if ".layers.0." in key}
    assert len(first) == 2 * len(targets)
    assert all(packed[key].abs().max() > 0 for key in first)
    assert packed.keys() == wide.keys()
    for key in wide:
        assert torch.allclose(packed[key], wide[key], rtol=1e-4, atol=1e-6 * float(wide[key].abs().max())), key


def test_nothing_dequantised_is_kept_for_the_backward(place: Place) -> None:
    """Else a model of 96 % experts would be there in 16 bits after the forward, whatever it was loaded in."""
    base, recipe = opened(place, "mixtral"), recipe_of(target_modules=["o_proj"])
    batch = collate([Sequence(list(range(3, 67)), list(range(3, 67)), [64])], pad=0)
    kept: dict[str, int] = {}
    for how, loaded in (("packed", load_for_training(base, recipe, CPU)), ("wide", with_wide_experts(base, recipe))):
        saved: list[torch.Tensor] = []
        model = with_adapter(loaded, recipe, base)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            summed_loss(model, batch, CPU)
        kept[how] = sum(each.numel() for each in saved if each.dim() == 3 and each.shape[0] == 4)
    experts = sum(kind.weights for kind in base.shape.experts)
    assert kept["wide"] >= experts, "transformers' own keep them: what is looked for would be found"
    assert kept["packed"] < experts / 100


def test_what_is_held_is_what_is_counted(place: Place) -> None:
    """Half a byte for each weight, and its scales: a byte for 64 of them, four for 256 of those."""
    base = opened(place, "mixtral")
    model = load_for_training(base, recipe_of(compute_dtype="bfloat16"), CPU)
    held: list[PackedExperts] = [
        packed for module in model.modules() for packed in getattr(module, "packed_experts", {}).values()
    ]
    weights = sum(kind.weights for kind in base.shape.experts)
    assert sum(packed.packed.numel() for packed in held) == weights / 2
    matrices = sum(packed.experts * packed.parts for packed in held)
    tables = len(held) * 4 * (16 + 256)
    # of matrices as small as these the scales of scales are padded to one block
    assert sum(packed.bytes for packed in held) == weights / 2 + matrices * (256 + 4 + 4) + tables


def test_experts_are_never_there_in_sixteen_bits_together(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device: a matrix at a time goes there."""
    seen: list[int] = []
    quantise = room.bnb.quantize_4bit

    def watched(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(weight.numel())
        return quantise(weight, *args, **kwargs)

    base = opened(place, "qwen3_moe")
    monkeypatch.setattr(room.bnb, "quantize_4bit", watched)
    load_for_training(base, recipe_of(), CPU)
    matrices = sum(kind.count * kind.experts * EXPERT_MATRICES[kind.name] for kind in base.shape.experts)
    one = base.shape.hidden_size * CONFIGS["qwen3_moe"]["moe_intermediate_size"]
    assert seen.count(one) >= matrices
    assert max(seen) < sum(kind.weights // kind.count for kind in base.shape.experts)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_learns_and_its_merge_is_what_was_evaluated(place: Place, name: str) -> None:
    replace_model(place, CONFIGS[name])
    targets = adapted_by_default(shape_of_config(CONFIGS[name]))
    order = place.train_order(recipe={"target_modules": targets, "max_steps": 12, "learning_rate": 2e-2})
    result = train(order, place.pod)
    history = losses(place)
    assert sum(history[-3:]) < sum(history[:3]) - 0.3, "nothing was learned"

    base = load_for_training(open_base(place.claims / "base" / "model", "x"), order.recipe, CPU)
    expected = logits(PeftModel.from_pretrained(base, str(place.work / "adapter")))
    noise = float((expected - expected.bfloat16().float()).abs().max())
    off = {}
    for how in ("dequantized", "original"):
        merge(place.merge_order(order, result.adapter_digest, merge_base=how), place.pod)
        off[how] = float((logits(wide_model(place.work / "merged")) - expected).abs().max())
    # twice what a dense model is given: a token near the border of two experts may go to the other
    assert off["dequantized"] < 8 * noise, "more than what casting weights to bf16 costs"
    assert off["original"] > 5 * off["dequantized"], "the experts' rounding is hardly in it"


def wide_model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_experts_that_are_one_tensor_in_the_files_are_packed_and_merged_the_same(place: Place) -> None:
    """As some families publish them; Mixtral's own are written so for comparison."""
    directory = replace_model(place, CONFIGS["mixtral"])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    apart = load_for_training(open_base(directory, "x"), recipe_of(), CPU)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(directory, save_original_format=False, max_shard_size="200KB")
    base = open_base(directory, "pvc://base/model")
    stored = [name for name, entry in base.weights.tensors.items() if len(entry.shape) == 3]
    assert base.shape.experts_quantized
    assert len(stored) == 6
    order = place.train_order(recipe={"target_modules": ["o_proj"], "max_steps": 1})
    result = train(order, place.pod)
    packed = load_for_training(base, order.recipe, CPU)
    assert torch.equal(logits(packed), logits(apart))
    merge(place.merge_order(order, result.adapter_digest), place.pod)
    written = {k: v for file in base.weights.files for k, v in load_file(place.work / "merged" / file).items()}
    for name in stored:
        path, _, own = name.rpartition(".")
        experts: PackedExperts = packed.get_submodule(path).packed_experts[own]
        assert torch.equal(written[name], experts.dequantised(0, experts.experts).to(written[name].dtype))


def test_a_merge_without_the_experts_that_were_trained_on_is_refused(place: Place) -> None:
    replace_model(place, CONFIGS["mixtral"])
    order = place.train_order(recipe={"target_modules": ["o_proj"], "max_steps": 1})
    result = train(order, place.pod)
    path = place.work / "adapter" / "qlora-training.json"
    said = json.loads(path.read_text())
    assert said["quantizedExperts"][0] == "model.layers.0.block_sparse_moe.experts.*.w1.weight"
    path.write_text(json.dumps({**said, "quantizedExperts": ["model.layers.0.other.experts.*.w1.weight"]}))
    with pytest.raises(BadInput):
        merge(place.merge_order(order, result.adapter_digest), place.pod)


def test_experts_of_another_make_stay_in_sixteen_bits_and_are_counted_so(place: Place) -> None:
    """gpt-oss: transposed, gate and up interleaved, biases added."""
    config = {
        **CONFIGS["llama"], "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
        "sliding_window": 64,
    }  # fmt: skip
    replace_model(place, config)
    assert not inspect(place.inspect_order(), place.pod).shape.experts_quantized
    assert AutoConfig.for_model(**config).model_type == "gpt_oss"
