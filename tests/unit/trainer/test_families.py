"""Every family that is sized from its config.json alone, beside what transformers builds from the same config."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.exchange import ModelShape
from qlora_operator.sizing.config import shape_of_config
from qlora_operator.sizing.directory import read_directory
from qlora_operator.sizing.families import FAMILIES
from qlora_operator.sizing.memory import training_memory
from qlora_operator.sizing.training import adapted_by_default
from qlora_trainer.adapter import with_adapter
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.experts import quantized_experts
from qlora_trainer.failures import BadInput
from qlora_trainer.flops import Work
from qlora_trainer.inspection import inspect
from qlora_trainer.merge import merge
from qlora_trainer.model import block_linears, empty_model, open_base
from qlora_trainer.quantization import load_for_training, quantized_modules
from qlora_trainer.sequences import Sequence, collate
from qlora_trainer.training import train
from tests.unit.families import CONFIGS

from .conftest import Place, recipe_of


def built(config: dict[str, Any]) -> Any:
    return empty_model(AutoConfig.for_model(**config))


def test_every_family_is_compared():
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_alone_gives_every_weight_and_every_linear_layer(name: str) -> None:
    model, shape = built(CONFIGS[name]), shape_of_config(CONFIGS[name])
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    linears = Counter(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in block_linears(model).items()
    )
    found: Counter[tuple[str, int, int]] = Counter()
    for module in shape.linear:
        found[module.name, module.in_features, module.out_features] += module.count
    assert found == linears
    fused = Counter(
        (name.rpartition(".")[2], *parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
    )
    assert fused == {(w.name, w.experts, w.out_features, w.in_features): w.count for w in shape.experts}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_as_transformers_writes_it_says_the_same(name: str) -> None:
    """What it leaves out because it is the default, and what it adds, change nothing."""
    written = AutoConfig.for_model(**CONFIGS[name]).to_diff_dict()
    assert shape_of_config(written).linear == shape_of_config(CONFIGS[name]).linear
    assert shape_of_config(written).parameters == shape_of_config(CONFIGS[name]).parameters


def replace_model(place: Place, config: dict[str, Any]) -> Path:
    """Put a small model of `config` where the place has its own; the tokenizer stays."""
    directory = place.claims / "base" / "model"
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="100KB")
    return directory


def sorted_linears(shape: ModelShape) -> list[tuple[str, int, int, int]]:
    return sorted((m.name, m.in_features, m.out_features, m.count) for m in shape.linear)


@pytest.mark.parametrize("name", CONFIGS)
def test_inspection_finds_what_the_config_promises(place: Place, name: str) -> None:
    replace_model(place, CONFIGS[name])
    seen, promised = inspect(place.inspect_order(), place.pod).shape, shape_of_config(CONFIGS[name])
    assert sorted_linears(seen) == sorted_linears(promised)
    assert sorted(seen.experts, key=lambda kind: kind.name) == sorted(promised.experts, key=lambda kind: kind.name)
    own = {"linear", "experts", "bytes_on_disk", "dtype"}
    assert seen.model_dump(exclude=own) == promised.model_dump(exclude=own)
    assert seen.dtype == "bfloat16"
    assert seen.bytes_on_disk >= 2 * seen.parameters


MIXTURES = ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_loaded_as_it_is_sized(place: Place, name: str) -> None:
    """4 bits reach every linear layer and every expert that is counted as such."""
    base = open_base(replace_model(place, CONFIGS[name]), "pvc://base/model")
    assert base.shape.experts_quantized
    model = load_for_training(base, recipe_of(compute_dtype="bfloat16"), torch.device("cpu"))
    assert len(quantized_modules(model)) == sum(module.count for module in base.shape.linear)
    assert len(quantized_experts(model)) == sum(kind.count for kind in base.shape.experts)
    packed = [model.get_parameter(key) for key in quantized_experts(model)]
    assert {weight.dtype for weight in packed} == {torch.uint8}
    assert sum(weight.numel() for weight in packed) == sum(kind.weights for kind in base.shape.experts) / 2


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_mixture_goes_all_the_way(place: Place, name: str) -> None:
    replace_model(place, CONFIGS[name])
    targets = adapted_by_default(shape_of_config(CONFIGS[name]))
    order = place.train_order(recipe={"target_modules": targets, "max_steps": 2, "rank": 4})
    result = train(order, place.pod)
    assert result.steps == 2
    merged = merge(place.merge_order(order, result.adapter_digest), place.pod)
    assert merged.parity < 0.01
    assert open_base(place.work / "merged", "merged").shape.parameters == shape_of_config(CONFIGS[name]).parameters


def test_experts_of_another_size_are_noticed(place: Place) -> None:
    directory = replace_model(place, CONFIGS["mixtral"])
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 192', '"intermediate_size": 193'))
    with pytest.raises(BadInput, match=r"values in .* and .* values by config.json: they do not belong together"):
        inspect(place.inspect_order(), place.pod)


def test_a_model_that_sees_is_refused_with_its_cure(place: Place) -> None:
    text = {key: value for key, value in CONFIGS["gemma3"].items() if key != "model_type"}
    config = AutoConfig.for_model("gemma3", text_config=text)
    config.save_pretrained(place.claims / "base" / "model")
    with pytest.raises(BadInput, match=r"save its text model \(gemma3_text\) by itself"):
        inspect(place.inspect_order(), place.pod)
    assert shape_of_config(config.to_dict()).parameters == shape_of_config(CONFIGS["gemma3"]).parameters


#: Families that sizing does not know: with Llama's names, with names of their own, mixtures of each kind.
UNKNOWN: dict[str, dict[str, Any]] = {
    "granite": {},
    "olmo2": {},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {},
    "gpt_neox": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 64},
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_a_family_that_sizing_does_not_know_is_sized_from_its_tensors(place: Place, family: str) -> None:
    config = {**CONFIGS["llama"], "model_type": family, **UNKNOWN[family]}
    directory = replace_model(place, config)
    seen = inspect(place.inspect_order(), place.pod).shape
    assert seen.family == family not in FAMILIES
    assert seen.parameters == sum(parameter.numel() for parameter in built(config).parameters())
    if "num_experts_per_tok" in config:
        assert seen.experts_per_token == 2
        assert len(seen.experts) >= 2
    recipe = recipe_of(target_modules=adapted_by_default(seen), compute_dtype="bfloat16")
    memory = training_memory(seen, recipe, micro_batch_size=1)
    assert "sized from its tensors" in memory.notes[-1]
    # the same without torch, as on a laptop
    read = read_directory(directory)
    assert sorted_linears(read) == sorted_linears(seen)
    assert {(e.name, e.weights) for e in read.experts} == {(e.name, e.weights) for e in seen.experts}
    assert training_memory(read, recipe, micro_batch_size=1).total_bytes == memory.total_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_says_without_torch_what_inspection_finds(place: Place, name: str) -> None:
    directory = replace_model(place, CONFIGS[name])
    seen, read = inspect(place.inspect_order(), place.pod).shape, read_directory(directory)
    assert sorted_linears(read) == sorted_linears(seen)
    assert {(e.name, e.weights) for e in read.experts} == {(e.name, e.weights) for e in seen.experts}
    assert read.model_dump(exclude={"linear", "experts"}) == seen.model_dump(exclude={"linear", "experts"})


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_the_work_of_a_mixture_is_that_of_the_experts_at_work(place: Place, name: str) -> None:
    """As torch counts what it multiplies, beside a model of the same layers whose tokens have one expert each."""
    flops = {}
    for experts in (1, 3):
        config = {**CONFIGS[name], "num_experts_per_tok": experts}
        base = open_base(replace_model(place, config), "pvc://base/model")
        recipe = recipe_of(method="lora", attention="eager", target_modules=["o_proj"])
        model = load_for_training(base, recipe, torch.device("cpu"))
        model.set_experts_implementation("eager")  # loops over experts: products that torch counts
        sequence = Sequence(list(range(3, 67)), list(range(3, 67)), [64])
        with_adapter(model, recipe, base)
        with FlopCounterMode(display=False) as counter:
            summed_loss(model, collate([sequence], pad=0), torch.device("cpu")).backward()
        flops[experts] = counter.get_total_flops(), Work(base.shape, 0).flops([sequence])
    counted, predicted = (flops[3][which] - flops[1][which] for which in (0, 1))
    assert counted == pytest.approx(predicted, rel=1e-3)
