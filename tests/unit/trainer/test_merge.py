from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_api.exchange import TrainOrder, TrainResult
from qlora_trainer.artifacts import directory_digest
from qlora_trainer.failures import BadInput
from qlora_trainer.merge import merge, merged_weight
from qlora_trainer.model import open_base
from qlora_trainer.quantization import dequantised, load_for_training
from qlora_trainer.training import train

from .conftest import Place, recipe_of

CPU = torch.device("cpu")
IDS = torch.arange(3, 63).view(2, 30)


def trained(place: Place, **recipe: Any) -> tuple[TrainOrder, TrainResult]:
    order = place.train_order(recipe=recipe)
    return order, train(order, place.pod)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def evaluated(place: Place, order: TrainOrder) -> torch.Tensor:
    """Logits of what training evaluated: the base as it was loaded, with the adapter."""
    base = load_for_training(open_base(place.claims / "base" / "model", "x"), order.recipe, CPU)
    return logits(PeftModel.from_pretrained(base, str(place.work / "adapter")))


def merged(place: Place) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(place.work / "merged", dtype=torch.float32))


@pytest.mark.parametrize(
    "recipe", [{}, {"rslora": True}, {"quant_type": "fp4", "double_quant": False}, {"method": "lora"}]
)
def test_the_merged_model_is_the_one_that_was_evaluated(place: Place, recipe: dict[str, Any]) -> None:
    order, result = trained(place, **recipe)
    expected = evaluated(place, order)
    base = logits(AutoModelForCausalLM.from_pretrained(place.claims / "base" / "model", dtype=torch.float32))
    done = merge(place.merge_order(order, result.adapter_digest), place.pod)
    noise = float((expected - expected.bfloat16().float()).abs().max())

    off = float((merged(place) - expected).abs().max())
    assert off < 4 * noise, "more than what casting weights to bf16 costs"
    assert off < float((base - expected).abs().max()) / 10, "the adapter is hardly in it"
    assert 0 < done.parity < 2**-8, "one cast to bf16 is all that may stand between"
    assert done.digest == directory_digest(place.work / "merged")


def test_the_original_base_is_another_model(place: Place) -> None:
    order, result = trained(place)
    expected = evaluated(place, order)
    merge(place.merge_order(order, result.adapter_digest), place.pod)
    close = float((merged(place) - expected).abs().max())
    merge(place.merge_order(order, result.adapter_digest, merge_base="original"), place.pod)
    assert float((merged(place) - expected).abs().max()) > 5 * close


@pytest.mark.parametrize("recipe", [{}, {"compute_dtype": "bfloat16", "quant_type": "fp4", "double_quant": False}])
def test_weights_come_back_from_quantisation_as_the_training_had_them(place: Place, recipe: dict[str, Any]) -> None:
    made = recipe_of(**recipe)
    base = open_base(place.claims / "base" / "model", "x")
    loaded = load_for_training(base, made, CPU)
    for file in base.weights.files:
        for name, weight in load_file(base.directory / file).items():
            if "proj" in name:
                parameter: Any = loaded.get_parameter(name)
                assert torch.equal(
                    dequantised(weight, made), dequantize_4bit(parameter.data, parameter.quant_state).float()
                )


def test_everything_but_the_adapted_weights_stays_as_it_was(place: Place) -> None:
    order, result = trained(place, target_modules=["q_proj"])
    merge(place.merge_order(order, result.adapter_digest, merge_base="original"), place.pod)
    source, target = place.claims / "base" / "model", place.work / "merged"
    assert {path.name for path in target.iterdir()} == {path.name for path in source.iterdir()}
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    changed = {
        name
        for shard in shards
        for name, weight in load_file(shard).items()
        if not torch.equal(weight, load_file(target / shard.name)[name])
    }
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert "quantization_config" not in json.loads((target / "config.json").read_text())


def test_a_finished_merge_is_not_done_again_and_a_damaged_one_is(place: Place) -> None:
    order, result = trained(place, max_steps=1)
    done = merge(place.merge_order(order, result.adapter_digest), place.pod)
    written = {path: path.stat().st_mtime_ns for path in (place.work / "merged").iterdir()}
    assert merge(place.merge_order(order, result.adapter_digest, attempt=2), place.pod) == done
    assert {path: path.stat().st_mtime_ns for path in (place.work / "merged").iterdir()} == written
    (place.work / "merged" / "config.json").write_text("{}")
    assert merge(place.merge_order(order, result.adapter_digest), place.pod) == done
    assert list(place.work.glob(".*")) == []


def test_another_adapter_or_base_is_refused(place: Place) -> None:
    order, result = trained(place, max_steps=1)
    with pytest.raises(BadInput, match="trained on another base model"):
        merge(place.merge_order(order, result.adapter_digest, model_digest="sha256:0"), place.pod)
    weights: Path = place.work / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(BadInput, match="not the one that was trained"):
        merge(place.merge_order(order, result.adapter_digest), place.pod)
    assert not (place.work / "merged").exists()


def test_the_sum_is_cast_once() -> None:
    weight, delta = torch.full((64, 64), 1.0, dtype=torch.bfloat16), torch.full((64, 64), 2**-8)
    written, error = merged_weight(weight, delta + 2**-9, None)
    assert written.dtype == torch.bfloat16
    assert float(written[0, 0]) == 1 + 2**-7
    assert error == pytest.approx(2**-9 / (1 + 2**-8 + 2**-9))
