"""HQQ: what is said where the package is missing, and, where it is there, a training that is what was planned."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qlora_operator.sizing.catalogue import shape_of_model
from qlora_operator.sizing.memory import our_training, walked
from qlora_operator.sizing.step import Rank
from qlora_operator.sizing.tensors import Trace
from qlora_operator.sizing.training import decoder_of
from qlora_trainer import half_quadratic
from qlora_trainer.environment import Pod
from qlora_trainer.failures import BadInput, Interrupted
from qlora_trainer.half_quadratic import library, quantised, round_trip
from qlora_trainer.merge import merge
from qlora_trainer.model import open_base
from qlora_trainer.quantization import dequantised, load_for_training, quantized_modules
from qlora_trainer.training import train
from tests.oracle.cases import HALF_QUADRATIC, Case, compared
from tests.oracle.ledger import Ledger

from .conftest import Place, recipe_of
from .test_merge import evaluated, logits, merged
from .test_training import InterruptedAfter, afresh, losses

CPU = torch.device("cpu")
HQQ: dict[str, Any] = {"quant_type": "hqq", "double_quant": False}

needs_hqq = pytest.mark.skipif(find_spec("hqq") is None, reason="the package hqq is not installed")


@pytest.fixture
def without_hqq(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image that was not built with it."""
    library.cache_clear()
    for name in ("hqq", "hqq.core", "hqq.core.quantize", "hqq.core.optimize"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_hqq")
def test_a_merge_in_an_image_without_the_package_says_so() -> None:
    with pytest.raises(BadInput, match=r"quantization\.type: hqq needs the package hqq, which this image"):
        dequantised(torch.ones(2, 64), recipe_of(**HQQ))


@needs_hqq
@pytest.mark.soak
def test_it_learns_resumes_bit_by_bit_and_is_merged_as_it_was_evaluated(place: Place) -> None:
    order = place.train_order(recipe={"dropout": 0.05, **HQQ})
    whole = train(order, place.pod)
    history = losses(place)
    assert min(history[-2:]) < history[0]
    expected = evaluated(place, order)
    base = logits(AutoModelForCausalLM.from_pretrained(place.claims / "base" / "model", dtype=torch.float32))
    merge(place.merge_order(order, whole.adapter_digest), place.pod)
    noise = float((expected - expected.bfloat16().float()).abs().max())
    off = float((merged(place) - expected).abs().max())
    assert off < 4 * noise
    assert off < float((base - expected).abs().max()) / 10, "the adapter is hardly in it"

    afresh(place)
    with pytest.raises(Interrupted, match="at step 3 of 6"):
        train(order, Pod(InterruptedAfter(3 * 3 + 1), place.pod.claims))
    resumed = train(order.model_copy(update={"attempt": 2}), place.pod)
    assert losses(place) == history
    assert resumed.adapter_digest == whole.adapter_digest


@needs_hqq
@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merge_finds_the_weights_of_the_training(place: Place, dtype: str) -> None:
    recipe = recipe_of(compute_dtype=dtype, **HQQ)
    base = open_base(place.claims / "base" / "model", "x")
    model = load_for_training(base, recipe, CPU)
    names = quantized_modules(model)
    assert len(names) == 14
    stored = {name: weight for file in base.weights.files for name, weight in load_file(base.directory / file).items()}
    for name in names:
        layer: Any = model.get_submodule(name)
        assert torch.equal(dequantised(stored[f"{name}.weight"], recipe), layer.dequantize().float())
        left = (layer.dequantize().float() - stored[f"{name}.weight"].float()).norm()
        assert left < 0.1 * stored[f"{name}.weight"].float().norm(), name
    assert model.get_output_embeddings().weight.dtype == getattr(torch, dtype)


@needs_hqq
@pytest.mark.soak
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_are_solved_alike_few_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of widths, too, that are no multiple of a group."""
    monkeypatch.setattr(half_quadratic, "AT_ONCE", 6)
    weight = (0.02 * torch.randn(256, 100)).to(dtype)
    assert torch.equal(round_trip(weight), quantised(weight).dequantize())


@needs_hqq
@pytest.mark.soak
def test_biases_stay_as_they_are(place: Place) -> None:
    directory = place.claims / "base" / "model"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    plain: Any = Qwen2ForCausalLM(config)
    for layer in plain.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    plain.save_pretrained(directory)
    model = load_for_training(open_base(directory, "x"), recipe_of(**HQQ), CPU)
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        assert torch.equal(layer.self_attn.q_proj.bias, other.self_attn.q_proj.bias)
    noise = float((logits(model) - logits(plain)).abs().max())
    assert 0 < noise < 0.3 * float(logits(plain).abs().max())


@needs_hqq
@pytest.mark.soak
@pytest.mark.parametrize("case", HALF_QUADRATIC, ids=lambda case: f"{case.model}, {case.words}")
def test_the_plan_is_what_its_layers_hold(case: Case) -> None:
    assert abs(compared(case).error) < 0.01


@needs_hqq
@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plan_knows_what_quantising_takes(dtype: str) -> None:
    shape = shape_of_model("HuggingFaceTB/SmolLM2-135M")
    training = our_training(decoder_of(shape), recipe_of(compute_dtype=dtype, **HQQ), 1)
    largest = max(training.decoder.linears, key=lambda linear: linear.weights)
    weight = torch.randn(largest.outputs, largest.inputs, dtype=getattr(torch, dtype))
    ledger = Ledger({})
    try:
        with ledger:
            layer = quantised(weight)
    finally:
        ledger.close()
    planned = walked(training)["quantisation"].items["loading"]
    assert ledger.peak_bytes == pytest.approx(planned, rel=0.02)
    held = sum(tensor.nbytes for tensor in (layer.W_q, layer.meta["scale"], layer.meta["zero"]))
    assert held == largest.weights // 2 + sum(Rank(training, Trace()).scale_bytes(largest))
