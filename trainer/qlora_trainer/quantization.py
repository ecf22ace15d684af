"""4-bit bases: how a model is loaded in NF4, FP4 or HQQ, and what is left of a weight after that."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import modules as bnb_modules

import qlora_trainer.cpu_quantization  # noqa: F401  takes bitsandbytes' place on the CPU
from qlora_api.exchange import Recipe
from qlora_trainer.failures import BadInput
from qlora_trainer.packable import BLOCK_SIZE

if TYPE_CHECKING:
    from qlora_trainer.model import BaseModel

# On CPUs with AVX512-BF16, an evaluating Linear4bit repacks its weights in place (with loss) into a form whose product
# has no gradient: training after the first evaluation then learns from nothing. 50 steps ended at 3.07 instead of 2.74.
bnb_modules.has_avx512bf16 = lambda: False  # pyright: ignore[reportPrivateImportUsage]


def load_for_training(base: BaseModel, recipe: Recipe, device: torch.device) -> Any:
    """The base on `device`: in 4 bits for qlora, in the compute type for lora; frozen.

    Raises BadInput where the model's code has no such attention kernel.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # the merge does without transformers

    from qlora_trainer.experts import PACKED, PackedExpertsConfig
    from qlora_trainer.half_quadratic import by_hqq

    dtype = getattr(torch, recipe.compute_dtype)
    packs = packs_experts(base, recipe)
    quantization = None
    if recipe.half_quadratic:
        quantization = by_hqq()
    elif recipe.method == "qlora":
        quantization = (PackedExpertsConfig if packs else BitsAndBytesConfig)(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quant_type,
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base.directory,
            dtype=dtype,
            quantization_config=quantization,
            attn_implementation=recipe.attention,
            device_map={"": device},
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except ValueError as error:
        if "attention implementation" in str(error) or "Flash Attention" in str(error):
            raise BadInput(
                f"training.attention: {base.architecture} cannot do {recipe.attention}: leave the field out, or give "
                "eager"
            ) from error
        raise
    if packs:
        model.set_experts_implementation(PACKED)
    model.requires_grad_(False)
    return model


def packs_experts(base: BaseModel, recipe: Recipe) -> bool:
    """Whether routed experts are held in 4 bits."""
    return recipe.method == "qlora" and base.shape.experts_quantized


def kept_in_fp32(model: Any, recipe: Recipe) -> frozenset[str]:
    """Parts of names of what the model's own code wants in fp32, some of it beside float16 only."""
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    if recipe.compute_dtype == "float16":
        kept |= {*(model._keep_in_fp32_modules or ())}
    return frozenset(kept)


def quantized_modules(model: Any) -> list[str]:
    """Names of the layers that are held in 4 bits, as the base has them (PEFT wraps those that it adapts)."""
    found = (name for name, module in model.named_modules() if _is_in_4_bits(module))
    return sorted(name.removesuffix(".base_layer") for name in found)


def _is_in_4_bits(module: torch.nn.Module) -> bool:
    half_quadratic = type(module).__module__ == "hqq.core.quantize"  # asked without the package
    return half_quadratic or isinstance(module, bnb_modules.Linear4bit)


def stored_pattern(name: str) -> str:
    """The name of a tensor in the files, with `*` for the number of an expert."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def dequantised(weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """What is left of `weight` after the quantisation it was trained under, in fp32.

    The training loads weights in the compute type and quantises those; so does this.
    """
    loaded = weight.to(getattr(torch, recipe.compute_dtype))
    if recipe.half_quadratic:
        from qlora_trainer.half_quadratic import round_trip

        return round_trip(loaded).float()
    # bitsandbytes 0.50.2 takes wrong scales on the CPU where blocks do not end with rows (by up to 9 times the error of
    # NF4 itself, measured), but not on GPUs: a row per block gives what a GPU trained on
    rows = loaded.reshape(-1, BLOCK_SIZE) if loaded.numel() % BLOCK_SIZE == 0 else loaded
    packed, state = bnb.quantize_4bit(
        rows, blocksize=BLOCK_SIZE, compress_statistics=recipe.double_quant, quant_type=recipe.quant_type
    )
    return bnb.dequantize_4bit(packed, state).float().reshape(weight.shape)
