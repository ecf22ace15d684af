from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_api.exchange import DataSource, succeeded
from qlora_trainer.failures import BadInput
from qlora_trainer.inspection import inspect

from .conftest import Place, chat, examples, write_jsonl


def test_the_facts_are_those_of_the_model_and_the_data(place: Place) -> None:
    seen = inspect(place.inspect_order(place.data(eval_fraction=0.1)), place.pod)
    model = AutoModelForCausalLM.from_pretrained(place.claims / "base" / "model")
    assert seen.architecture == "LlamaForCausalLM"
    assert seen.shape.parameters == model.num_parameters()
    assert seen.shape.tied_embeddings
    assert seen.shape.dtype == "bfloat16"
    assert {module.name: (module.in_features, module.out_features, module.count) for module in seen.shape.linear} == {
        "q_proj": (64, 64, 2), "k_proj": (64, 32, 2), "v_proj": (64, 32, 2), "o_proj": (64, 64, 2),
        "gate_proj": (64, 128, 2), "up_proj": (64, 128, 2), "down_proj": (128, 64, 2),
    }  # fmt: skip
    assert seen.examples + seen.eval_examples == 48
    assert seen.golden_examples == 12
    assert seen.max_length == 64
    assert seen.sequences < seen.examples
    assert seen.truncated_percent == 0
    assert 5 < seen.loss_token_percent < 40
    assert seen.loss == "assistant"
    succeeded(place.inspect_order(), seen).fitted()


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_a_share_of_the_mixture_is_asked_for_by_weight_and_reported(place: Place, share: float) -> None:
    """As docs/data.md says: share ÷ (1 - share) × the others' examples ÷ the source's."""
    general = [chat(f"How much is {n} and {n}, and then what is twice that?", str(4 * n)) for n in range(100)]
    write_jsonl(place.claims / "data" / "general.jsonl", general)
    weight = share / (1 - share) * len(examples()) / len(general)
    sources = [DataSource(uri="pvc://data/train.jsonl"), DataSource(uri="pvc://data/general.jsonl", weight=weight)]
    seen = inspect(place.inspect_order(place.data(train=sources)), place.pod)
    examples_of = [source.examples_percent for source in seen.sources]
    tokens_of = [source.tokens_percent for source in seen.sources]
    assert examples_of == pytest.approx([100 - 100 * share, 100 * share], abs=1)
    assert sum(examples_of) == pytest.approx(100, abs=0.02) == sum(tokens_of)
    assert tokens_of[1] > examples_of[1] + 2, "its examples are longer"
    assert not inspect(place.inspect_order(), place.pod).sources, "one source gives all"


def test_shares_are_of_what_is_learned(place: Place) -> None:
    """A source is cut to maxLength, what has no answer within it does not count, and what counts twice does."""
    write_jsonl(place.claims / "data" / "long.jsonl", [chat("a?", "b " * 200), chat("sparrow " * 60, "bird")])
    write_jsonl(place.claims / "data" / "short.jsonl", [chat("c?", "d")])
    sources = [DataSource(uri="pvc://data/long.jsonl"), DataSource(uri="pvc://data/short.jsonl", weight=2)]
    seen = inspect(place.inspect_order(place.data(train=sources), max_length=64), place.pod)
    assert [share.examples_percent for share in seen.sources] == [33.33, 66.67]
    short = seen.tokens.p50
    assert seen.sources[0].tokens_percent == pytest.approx(100 * 64 / (64 + 2 * short), abs=0.01)


def test_a_long_example_does_not_set_the_length_for_all(place: Place) -> None:
    rows = [chat(f"{number}?", "bird") for number in range(400)]
    write_jsonl(place.claims / "data" / "train.jsonl", [*rows, chat("sparrow " * 60, "bird")])
    seen = inspect(place.inspect_order(packing=False), place.pod)
    assert seen.max_length == 64
    assert seen.tokens.max > 64
    assert seen.truncated_percent == pytest.approx(100 / 401, abs=0.01)
    assert seen.sequences == 400  # the long one's answer lies behind the cut: nothing in it could be learned


def test_the_length_is_never_more_than_the_model_was_built_for(place: Place) -> None:
    write_jsonl(place.claims / "data" / "train.jsonl", [chat("sparrow " * 300, "bird"), *examples()])
    assert inspect(place.inspect_order(), place.pod).max_length == 256
    with pytest.raises(BadInput, match="maxLength: 512 is more than the 256 tokens"):
        inspect(place.inspect_order(max_length=512), place.pod)


def test_nothing_to_learn_is_bad_input(place: Place) -> None:
    with pytest.raises(BadInput, match="nothing to learn"):
        inspect(place.inspect_order(max_length=5), place.pod)


def test_samples_are_logged_only_when_asked_for(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    inspect(place.inspect_order(), place.pod)
    assert "sparrow" not in caplog.text
    inspect(place.inspect_order(place.data(log_samples=True)), place.pod)
    assert "⟦bird<|end|>⟧" in caplog.text
    assert "golden 0 expects: bird" in caplog.text


def edit_config(model: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))


def shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[0]


def cut_short(model: Path) -> None:
    shard(model).write_bytes(shard(model).read_bytes()[:-10])


def damage_header(model: Path) -> None:
    content = bytearray(shard(model).read_bytes())
    content[8:12] = b"????"
    shard(model).write_bytes(content)


def only_pickles(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
        (lambda model: (model / "config.json").write_text("{"), "not a JSON object"),
        (lambda model: edit_config(model, lambda c: c.update(model_type="gpt99")), "'gpt99', which this image's"),
        (lambda model: edit_config(model, lambda c: c.update(model_type="vit")), "not a causal language model"),
        (lambda model: edit_config(model, lambda c: c.update(hidden_size=128)), "do not belong together"),
        (lambda model: edit_config(model, lambda c: c.update(num_hidden_layers=3)), "no weights for model.layers.2"),
        (lambda model: edit_config(model, lambda c: c.update(quantization_config={"quant_method": "gptq"})), "gptq"),
        (lambda model: shard(model).unlink(), "weight files named in model.safetensors.index.json, the first is"),
        (cut_short, "its header promises"),
        (damage_header, "is damaged"),
        (only_pickles, "only pickled weights (pytorch_model.bin)"),
        (lambda model: [path.unlink() for path in model.glob("*.safetensors*")], "has no weights"),
        (lambda model: [path.unlink() for path in model.glob("tokenizer*")], "has no tokenizer"),
        (lambda model: (model / "chat_template.jinja").unlink(), "need a chat template"),
        (lambda model: model.rename(model.with_name("moved")), "beside it: moved"),
    ],
)
def test_a_model_that_cannot_work_is_refused_with_its_cure(
    place: Place, spoil: Callable[[Path], object], told: str
) -> None:
    spoil(place.claims / "base" / "model")
    with pytest.raises(BadInput) as raised:
        inspect(place.inspect_order(), place.pod)
    assert told in str(raised.value)


def test_the_model_digest_follows_what_decides(place: Place) -> None:
    before = inspect(place.inspect_order(), place.pod)
    assert inspect(place.inspect_order(), place.pod) == before
    edit_config(place.claims / "base" / "model", lambda config: config.update(rms_norm_eps=1e-3))
    after = inspect(place.inspect_order(), place.pod)
    assert after.model_digest != before.model_digest
    assert after.data_digest == before.data_digest
