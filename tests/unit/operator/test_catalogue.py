"""The catalogue of well-known models, and what `kubectl qlora estimate MODEL` says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_operator.cli import main
from qlora_operator.sizing.catalogue import catalogue, shape_of_model
from qlora_operator.sizing.families import FAMILIES
from tests.unit.operator.test_sizing import MODELS, SHAPES


def test_there_are_enough_models():
    assert len(catalogue()) >= 48
    assert {model.shape.family for model in catalogue().values()} == set(FAMILIES)


def test_each_says_where_its_config_was_read():
    assert all(len(model.source) > 20 for model in catalogue().values())


@pytest.mark.parametrize("repository", catalogue())
def test_a_shape_gives_exactly_the_published_number_of_parameters(repository: str):
    model = catalogue()[repository]
    assert model.shape.parameters == model.parameters


def test_shapes_agree_with_the_config_of_the_repository():
    both = set(MODELS) & set(catalogue())
    assert len(both) >= 10
    for repository in both:
        known, read = catalogue()[repository].shape, SHAPES[repository]
        assert known.linear == read.linear
        assert (known.parameters, known.heads, known.head_dim) == (read.parameters, read.heads, read.head_dim)


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "llama-3.1-8b", "hf://meta-llama/Llama-3.1-8B"])
def test_a_model_is_found_by_its_name(name: str):
    assert shape_of_model(name).parameters == 8_030_261_248


@pytest.mark.parametrize("inside", ["", "config.json"])
def test_a_model_is_found_by_its_config(tmp_path: Path, inside: str):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of_model(str(tmp_path / inside))
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (2, 4, 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is no object of settings"),
        ("{", "config.json: "),
        ('{"model_type": "mamba"}', "model_type: 'mamba' is none of llama, mistral, qwen2, qwen3, gemma2"),
        ('{"model_type": "llama", "hidden_size": 64}', "num_hidden_layers: None is no whole number from 1"),
    ],
)
def test_a_config_that_will_not_do_is_named_with_its_key(tmp_path: Path, text: str, said: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config") as refusal:
        shape_of_model(str(tmp_path))
    assert said in str(refusal.value)


def test_the_command_prints_every_item_and_what_a_gpu_must_have(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "Qwen2.5-7B-Instruct", "--seq-len", "2048"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.endswith(" on one GPU")] == ["lora", "qlora"]
    assert "quantisation scales" in said
    assert said.count("with 15 % headroom") == 2


def test_the_command_gives_bytes_to_machines(capsys: pytest.CaptureFixture[str]):
    assert main(["estimate", "Qwen2.5-7B-Instruct", "--method", "qlora", "--rank", "32", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["rank"], document["maxLength"], document["parameters"]) == (32, 4096, 7_615_616_512)
    (method,) = document["methods"]
    assert method["totalBytes"] == sum(item["bytes"] for item in method["items"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lama-3.1-8b"], "(near: meta-llama/Llama-3.1-8B): give the path of its config.json or directory"),
        (["Llama-2-7b-hf", "--seq-len", "8192"], "8192 tokens, the model takes 4096"),
        (["nowhere/config.json"], "No such file"),
    ],
)
def test_the_command_says_what_to_give(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str):
    assert main(["estimate", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["llama-3.1-8b", "--cases", "x.csv"], ["--cases", "x.csv"]])
def test_arguments_that_contradict_one_another_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    assert main(["estimate", *arguments]) == 2
    assert capsys.readouterr().err == "give either MODEL, or --cases with --models\n"
