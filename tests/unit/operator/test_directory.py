"""A model's directory on a laptop: its shape from config.json and the headers of its files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from qlora_operator.cli import main
from qlora_operator.sizing.catalogue import shape_of_model
from qlora_operator.sizing.config import shape_of_config
from tests.unit.families import CONFIGS

LAYERS = 3


def write_model(directory: Path, config: dict[str, Any], tensors: dict[str, tuple[int, ...]], dtype: str = "F16"):
    """config.json, and a header without the weights that it promises: nothing reads them."""
    (directory / "config.json").write_text(json.dumps(config))
    entries = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def llama_tensors(prefix: str = "model.") -> dict[str, tuple[int, ...]]:
    hidden, inner, kv, vocabulary = 64, 192, 32, 512
    of_a_layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    tensors: dict[str, tuple[int, ...]] = {
        f"{prefix}layers.{number}.{name}.weight": shape
        for number in range(LAYERS)
        for name, shape in of_a_layer.items()
    }
    ends = {f"{prefix}embed_tokens.weight": (vocabulary, hidden), f"{prefix}norm.weight": (hidden,)}
    return {**tensors, **ends, "lm_head.weight": (vocabulary, hidden)}


def test_a_known_family_is_what_its_config_promises_as_it_is_stored(tmp_path: Path):
    write_model(tmp_path, CONFIGS["llama"], llama_tensors())
    shape, promised = shape_of_model(str(tmp_path)), shape_of_config(CONFIGS["llama"])
    assert (shape.parameters, shape.linear) == (promised.parameters, promised.linear)
    assert shape.dtype == "float16"
    assert shape.bytes_on_disk == (tmp_path / "model.safetensors").stat().st_size


def test_an_unknown_family_is_sized_as_the_same_tensors_of_a_known_one(tmp_path: Path):
    write_model(tmp_path, {**CONFIGS["llama"], "model_type": "novel"}, llama_tensors())
    shape, promised = shape_of_model(str(tmp_path)), shape_of_config(CONFIGS["llama"])
    assert shape.family == "novel"
    assert shape.parameters == promised.parameters
    by_name = {module.name: module for module in promised.linear}
    assert {module.name: module for module in shape.linear} == by_name


def test_only_the_stack_that_generates_text_counts_as_blocks(tmp_path: Path):
    tower = {f"vision_tower.layers.{n}.mlp.fc1.weight": (128, 32) for n in range(LAYERS)}
    config = {"model_type": "novel_vision", "text_config": {**CONFIGS["llama"], "model_type": "novel"}}
    write_model(tmp_path, config, {**llama_tensors("language_model.model."), **tower})
    shape = shape_of_model(str(tmp_path))
    assert "fc1" not in {module.name for module in shape.linear}
    assert shape.parameters == shape_of_config(CONFIGS["llama"]).parameters + LAYERS * 128 * 32


def mixture_tensors(*, fused: bool, turned: bool = False) -> dict[str, tuple[int, ...]]:
    """Four experts a layer, in one tensor each or in one for all; `turned`, inputs come before outputs."""
    tensors = {name: shape for name, shape in llama_tensors().items() if ".mlp." not in name}
    for number in range(LAYERS):
        experts = f"model.layers.{number}.mlp.experts"
        if fused:
            up, down = ((64, 384), (192, 64)) if turned else ((384, 64), (64, 192))
            tensors |= {f"{experts}.gate_up_proj": (4, *up), f"{experts}.down_proj": (4, *down)}
        else:
            tensors |= {
                f"{experts}.{expert}.{name}.weight": (64, 192) if name == "down_proj" else (192, 64)
                for expert in range(4)
                for name in ("gate_proj", "up_proj", "down_proj")
            }
        tensors[f"model.layers.{number}.mlp.gate.weight"] = (4, 64)
    return tensors


MIXTURE = {**CONFIGS["llama"], "model_type": "novel_moe", "num_experts_per_tok": 2}


@pytest.mark.parametrize("fused", [True, False])
def test_experts_are_found_whether_they_are_one_tensor_or_many(tmp_path: Path, fused: bool):
    write_model(tmp_path, MIXTURE, mixture_tensors(fused=fused))
    shape, promised = shape_of_model(str(tmp_path)), shape_of_config(CONFIGS["mixtral"])
    assert sorted(shape.experts, key=lambda kind: kind.name) == sorted(promised.experts, key=lambda kind: kind.name)
    assert shape.experts_per_token == 2
    assert shape.experts_quantized
    assert shape.parameters == promised.parameters


def test_experts_that_lie_the_other_way_round_are_counted_in_sixteen_bits(tmp_path: Path):
    write_model(tmp_path, MIXTURE, mixture_tensors(fused=True, turned=True))
    shape, promised = shape_of_model(str(tmp_path)), shape_of_config(CONFIGS["mixtral"])
    assert sorted(shape.experts, key=lambda kind: kind.name) == sorted(promised.experts, key=lambda kind: kind.name)
    assert not shape.experts_quantized


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 4}, "config.json: asks for"),
        ({"model_type": "novel", "hidden_size": None}, "config.json: hidden_size: None is no whole number from 1"),
        ({"model_type": "novel", "vocab_size": "many"}, "config.json: vocab_size: 'many' is no whole number from 1"),
    ],
)
def test_a_config_that_the_files_do_not_fit_is_named(tmp_path: Path, change: dict[str, Any], said: str):
    write_model(tmp_path, {**CONFIGS["llama"], **change}, llama_tensors())
    with pytest.raises(ValueError, match="config") as refusal:
        shape_of_model(str(tmp_path))
    assert said in str(refusal.value)


def test_files_that_tell_nothing_are_named(tmp_path: Path):
    config = {**CONFIGS["llama"], "model_type": "novel"}
    write_model(tmp_path, config, {"weight": (64, 64)})
    with pytest.raises(ValueError, match="no tensor of the files belongs to a numbered layer"):
        shape_of_model(str(tmp_path))
    write_model(tmp_path, config, llama_tensors(), dtype="F8_E4M3")
    with pytest.raises(ValueError, match="stored as F8_E4M3: give the model as it was before"):
        shape_of_model(str(tmp_path))
    for content in (b"", b"\xff" * 16, struct.pack("<Q", 9) + b'{"a": {}}'):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors: is not a safetensors file, or damaged"):
            shape_of_model(str(tmp_path))


def test_an_unknown_family_by_its_config_alone_is_refused_with_its_cure(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["llama"], "model_type": "novel"}))
    with pytest.raises(ValueError, match="give the model's directory with its safetensors files"):
        shape_of_model(str(tmp_path))


def test_the_command_says_that_it_went_by_the_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path, {**CONFIGS["llama"], "model_type": "novel"}, llama_tensors())
    assert main(["estimate", str(tmp_path), "--seq-len", "128", "--method", "qlora"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: sized from its tensors, for its family (novel) is not known" in said
    assert main(["estimate", str(tmp_path), "--seq-len", "128", "--method", "qlora", "-o", "json"]) == 0
    (method,) = json.loads(capsys.readouterr().out)["methods"]
    assert method["notes"][0] in said
