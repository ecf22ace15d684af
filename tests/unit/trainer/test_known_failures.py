"""Failures that fine-tuning is known for: each is caught, and what a user is told of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes import cextension
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations import flex_attention as flex_integration

from qlora_api.exchange import ExitCode
from qlora_trainer import fitness
from qlora_trainer.census import Expected, Held, census, compare
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.failures import BadInput, EnvironmentUnfit, describe
from qlora_trainer.fitness import (
    Equipment,
    bitsandbytes_fault,
    equipment,
    reads_rows_right,
    require_fit,
    require_optimizer_as_asked,
    require_rows_as_quantised,
)
from qlora_trainer.model import open_base
from qlora_trainer.optimization import make_optimizer
from qlora_trainer.packing import require_apart
from qlora_trainer.quantization import load_for_training
from qlora_trainer.sequences import Sequence, collate
from qlora_trainer.training import train

from .conftest import Place, recipe_of

CPU = torch.device("cpu")
H100 = Equipment("cuda", "NVIDIA H100", True, None, frozenset({"flash_attn", "flash_attn_interface"}), True)
BF16 = {"compute_dtype": "bfloat16"}

UNFIT: list[Any] = [
    pytest.param(
        {}, replace(H100, bitsandbytes_fault="CUDA binary not found: libbitsandbytes_cuda128.so"), EnvironmentUnfit,
        "bitsandbytes has no library that works with torch's .* here (.*libbitsandbytes_cuda128.so): use the trainer",
        id="bitsandbytes for another CUDA",
    ),
    pytest.param(
        BF16, replace(H100, name="Tesla T4", bfloat16=False), EnvironmentUnfit,
        "computes in bfloat16 and Tesla T4 has none: leave quantization.computeDtype out, or set it to float16",
        id="a card without bfloat16",
    ),
    pytest.param(
        {"attention": "flash_attention_2", **BF16}, replace(H100, packages=frozenset()), BadInput,
        "training.attention: flash_attention_2 needs the package flash_attn, which this image does not have: build",
        id="FlashAttention that is not there",
    ),
    pytest.param(
        {"quant_type": "hqq"}, H100, BadInput,
        "quantization.type: hqq needs the package hqq, which this image does not have: build the trainer image",
        id="HQQ that is not there",
    ),
    pytest.param(
        {"attention": "flash_attention_3", **BF16}, replace(H100, packages=frozenset({"flash_attn"})), BadInput,
        "needs the package flash_attn_interface", id="the other FlashAttention",
    ),
    pytest.param(
        {"attention": "flash_attention_2", "compute_dtype": "float32"}, H100, BadInput,
        "flash_attention_2 computes in 16 bits only", id="FlashAttention in fp32",
    ),
    pytest.param(
        {"attention": "flex_attention"}, replace(H100, compiler=False), BadInput,
        "flex_attention is compiled where it runs and this image has no C compiler", id="flex without a compiler",
    ),
    pytest.param(
        {"attention": "flex_attention"}, equipment(CPU), BadInput, "flex_attention cannot train on a CPU: leave",
        id="flex on a CPU",
    ),
    pytest.param(
        {"attention": "flash_attention_2"}, equipment(CPU), BadInput, "cannot train on a CPU", id="flash on a CPU"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "pod", "error", "says"), UNFIT)
def test_what_equipment_cannot_do_is_said_before_anything_is_loaded(
    recipe: dict[str, Any], pod: Equipment, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says.replace("(", r"\(").replace(")", r"\)")):
        require_fit(recipe_of(**recipe), pod)


@pytest.mark.parametrize("width", [16, 33, 48, 64, 80, 96, 100, 128, 160, 192, 200, 224, 320])
def test_bitsandbytes_takes_wrong_scales_for_rows_that_end_within_a_block(width: int) -> None:
    """With AVX-512, where rows are a multiple of 16 and not of 64. Once this fails, a version is here that is right."""
    wrong = torch.backends.cpu.get_cpu_capability() == "AVX512" and width % 16 == 0 and width % 64 != 0
    assert reads_rows_right(width) != wrong


def test_a_base_whose_rows_are_read_wrongly_is_refused_on_the_cpu(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = open_base(place.claims / "base" / "model", "pvc://base/model").shape
    require_rows_as_quantised(recipe_of(), shape, CPU)
    monkeypatch.setattr(fitness, "reads_rows_right", lambda width: width != 128)  # as other CPUs may, with other models
    says = r"model\.uri: down_proj takes 128 inputs, .* on this CPU: train on a GPU, or set method: lora"
    with pytest.raises(BadInput, match=says):
        train(place.train_order(), place.pod)
    require_rows_as_quantised(recipe_of(method="lora"), shape, CPU)
    require_rows_as_quantised(recipe_of(), shape, torch.device("cuda"))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"])
def test_a_pod_with_everything_is_fit(attention: str) -> None:
    require_fit(recipe_of(attention=attention, compute_dtype="bfloat16"), H100)
    without = replace(H100, bitsandbytes_fault="none")
    require_fit(recipe_of(method="lora", optimizer="adamw_torch", compute_dtype="bfloat16"), without)
    with pytest.raises(EnvironmentUnfit):
        require_fit(recipe_of(method="lora", optimizer="paged_adamw_8bit", compute_dtype="bfloat16"), without)


def test_bitsandbytes_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = cextension.ErrorHandlerMockBNBNativeLibrary("CUDA binary not found: libbitsandbytes_cuda999.so\nmore")
    monkeypatch.setattr(cextension, "lib", broken)
    assert bitsandbytes_fault() == "CUDA binary not found: libbitsandbytes_cuda999.so"
    monkeypatch.setattr(broken, "compiled_with_cuda", True)
    assert bitsandbytes_fault() is None


def test_an_attention_that_the_image_lacks_ends_the_stage(place: Place) -> None:
    order = place.train_order(recipe={"attention": "flash_attention_2"})
    with pytest.raises(BadInput, match=r"training\.attention") as raised:
        train(order, place.pod)
    assert describe(raised.value)[0] == ExitCode.BAD_INPUT


def test_attention_that_falls_back_is_caught(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes eager for sdpa where a model cannot do it, and goes on."""
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *of, **more: real(*of, **more | {"attn_implementation": "eager"}),
    )
    with pytest.raises(BadInput, match="LlamaForCausalLM came up with eager and the plan has sdpa"):
        train(place.train_order(), place.pod)


@pytest.mark.parametrize("asked", ["adamw_8bit", "adamw_torch", "paged_adamw_32bit"])
def test_another_optimizer_than_was_asked_for_is_caught(asked: str) -> None:
    weights = [nn.Parameter(torch.zeros(4))]
    got = make_optimizer(recipe_of(optimizer="paged_adamw_8bit"), weights)
    with pytest.raises(EnvironmentUnfit, match=f"asked for {asked} and got PagedAdamW8bit with 8-bit state in pages"):
        require_optimizer_as_asked(got, recipe_of(optimizer=asked))
    require_optimizer_as_asked(make_optimizer(recipe_of(optimizer=asked), weights), recipe_of(optimizer=asked))


# --- the census ---

AS_SIZED = [
    Held("embed.weight", "bfloat16", "cuda", 1000, 2000),
    Held("layers.0.q_proj.weight", "uint8", "cuda", 500, 500),
    Held("layers.0.norm.weight", "bfloat16", "cuda", 10, 20),
    Held("layers.0.gate.bias", "float32", "cuda", 4, 16),
]
SIZED = Expected(
    {"embed.weight": 1000, "layers.0.q_proj.weight": 1000, "layers.0.norm.weight": 10, "layers.0.gate.bias": 4},
    frozenset({"layers.0.q_proj.weight"}),
    "bfloat16",
    "cuda",
    frozenset({"gate.bias"}),
)


def test_a_model_as_it_was_sized_passes() -> None:
    compare(AS_SIZED, SIZED, "hf://a/b")
    packed = Held("layers.0.q_proj.weight", "bfloat16", "cuda", 250, 500)  # as FSDP wants it
    compare([packed if held.name == packed.name else held for held in AS_SIZED], SIZED, "hf://a/b")


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (Held("layers.0.q_proj.weight", "bfloat16", "cuda", 1000, 2000),
         r"layers\.0\.q_proj\.weight takes 2000 bytes as bfloat16 and was sized in 4 bits \(500 bytes\)"),
        (Held("layers.0.norm.weight", "float32", "cuda", 10, 40),
         r"norm\.weight is 10 values of float32 and was sized as 10 of bfloat16"),
        (Held("embed.weight", "bfloat16", "cpu", 1000, 2000), r"embed\.weight was loaded on cpu and sized for cuda"),
        (Held("embed.weight", "bfloat16", "cuda", 999, 1998), "is 999 values of bfloat16 and was sized as 1000"),
        (Held("layers.0.gate.bias", "float16", "cuda", 4, 8), r"of float16 and was sized as 4 of bfloat16 or float32"),
        (Held("mtp.weight", "bfloat16", "cuda", 1, 2), r"mtp\.weight was loaded and is not in config\.json's model"),
    ],
)  # fmt: skip
def test_the_first_weight_that_is_not_as_sized_is_named(odd: Held, says: str) -> None:
    found = [odd if held.name == odd.name else held for held in AS_SIZED]
    with pytest.raises(BadInput, match=f"model.uri: hf://a/b: .*{says}"):
        compare(found if odd in found else [*found, odd], SIZED, "hf://a/b")


def test_a_weight_that_was_not_loaded_is_missed() -> None:
    with pytest.raises(BadInput, match=r"layers\.0\.gate\.bias was sized and not loaded"):
        compare(AS_SIZED[:-1], SIZED, "hf://a/b")


def test_a_base_that_was_left_in_16_bits_is_not_trained_on(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    base = open_base(place.claims / "base" / "model", "pvc://base/model")
    recipe = recipe_of(**BF16)
    census(load_for_training(base, recipe, CPU), base, recipe, CPU)
    assert "GiB in 4 bits on cpu" in caplog.text
    whole = load_for_training(base, recipe_of(method="lora", **BF16), CPU)
    with pytest.raises(BadInput, match=r"_proj\.weight takes [0-9]+ bytes as bfloat16 and was sized in 4 bits"):
        census(whole, base, recipe, CPU)


# --- packing ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_examples_of_a_row_do_not_see_one_another(place: Place, attention: str) -> None:
    base = open_base(place.claims / "base" / "model", "pvc://base/model")
    for more in ({}, BF16, {"method": "lora", **BF16}):
        recipe = recipe_of(attention=attention, **more)
        require_apart(load_for_training(base, recipe, CPU), recipe, CPU, base.architecture, flat=False)


def test_a_model_that_mixes_the_examples_of_a_row_is_not_packed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As layers with a state do, and attention that does not read positions."""
    real: Any = LlamaForCausalLM.forward

    def deaf(self: Any, *of: Any, position_ids: torch.Tensor, **more: Any) -> Any:
        return real(self, *of, position_ids=torch.arange(position_ids.shape[1])[None], **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", deaf)
    with pytest.raises(BadInput, match=r"dataset\.packing: LlamaForCausalLM with sdpa attention does not keep"):
        train(place.train_order(), place.pod)
    train(place.train_order(recipe={"packing": False, "max_steps": 1}), place.pod)


@pytest.mark.soak
def test_flex_attention_keeps_examples_apart_as_sdpa_does(model_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, without compiling: a CPU has no backward of it. A minute, for each score is worked out in Python."""
    monkeypatch.setattr(flex_integration.WrappedFlexAttention, "__call__", lambda _: flex_attention)
    base = open_base(model_dir, "pvc://base/model")
    ids = list(range(5, 65))
    batch = collate([Sequence(ids, ids, [20, 30, 10]), Sequence(ids[:40], ids[:40], [15, 25])], pad=0)
    found = []
    for attention in ("sdpa", "flex_attention"):
        model = load_for_training(base, recipe_of(attention=attention), CPU).eval()
        with torch.no_grad():
            found.append(float(summed_loss(model, batch, CPU)))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
