"""Whether this pod can do what the recipe asks, before anything large is loaded; each lack with its own sentence."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import bitsandbytes.functional as bnb
import torch

from qlora_api.exchange import ModelShape, Recipe
from qlora_trainer.failures import BadInput, EnvironmentUnfit
from qlora_trainer.packable import BLOCK_SIZE

#: Attention kernels that are packages of their own.
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
#: 4-bit types that are packages of their own, of the same names.
BACK_ENDS = ("hqq",)
#: Kernels that write their own code, for which Triton wants a C compiler.
COMPILED = ("flex_attention",)


@dataclass(frozen=True)
class Equipment:
    """What this pod has."""

    device: str
    name: str
    bfloat16: bool
    #: Why bitsandbytes cannot work on this device; None where it can.
    bitsandbytes_fault: str | None
    packages: frozenset[str]
    compiler: bool


def equipment(device: torch.device) -> Equipment:
    """The facts about `device` and this image."""
    gpu = device.type == "cuda"
    return Equipment(
        device=device.type,
        name=torch.cuda.get_device_name(device) if gpu else "the CPU",
        bfloat16=not gpu or torch.cuda.is_bf16_supported(including_emulation=False),
        bitsandbytes_fault=bitsandbytes_fault() if gpu else None,
        packages=frozenset(package for package in (*PACKAGES.values(), *BACK_ENDS) if find_spec(package)),
        compiler=any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))),
    )


def bitsandbytes_fault() -> str | None:
    """Why bitsandbytes has no kernels for this torch's CUDA, in its own words' first line; None where it has some."""
    from bitsandbytes.cextension import lib

    if getattr(lib, "compiled_with_cuda", False):
        return None
    said = getattr(lib, "error_msg", "") or "it is built for the CPU only"
    return str(said).strip().splitlines()[0]


def require_fit(recipe: Recipe, has: Equipment) -> None:
    """Raises EnvironmentUnfit where another node may do, BadInput where none with this image can."""
    _require_attention(recipe, has)
    if recipe.half_quadratic and recipe.quant_type not in has.packages:
        raise lacks(recipe.quant_type)
    four_bits = recipe.method == "qlora" and not recipe.half_quadratic
    bitsandbytes = four_bits or "8bit" in recipe.optimizer or recipe.optimizer.startswith("paged")
    if bitsandbytes and has.bitsandbytes_fault:
        toolkit = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        raise EnvironmentUnfit(
            f"bitsandbytes has no library that works with torch's {toolkit} here ({has.bitsandbytes_fault}): use the "
            "trainer image of this release, and set neither BNB_CUDA_VERSION nor LD_LIBRARY_PATH in stageEnv"
        )
    if recipe.compute_dtype == "bfloat16" and not has.bfloat16:
        raise EnvironmentUnfit(
            f"the recipe computes in bfloat16 and {has.name} has none: leave quantization.computeDtype out, "
            "or set it to float16"
        )


def lacks(package: str) -> BadInput:
    """That this image has not the `package` that a base is held by."""
    return BadInput(
        f"quantization.type: {package} needs the package {package}, which this image does not have: build the trainer "
        f"image with --build-arg {package.upper()}=…, or use nf4"
    )


def _require_attention(recipe: Recipe, has: Equipment) -> None:
    attention = recipe.attention
    instead = "leave training.attention out"
    if (attention in PACKAGES or attention in COMPILED) and has.device == "cpu":
        raise BadInput(f"training.attention: {attention} cannot train on a CPU: {instead}")
    package = PACKAGES.get(attention)
    if package and package not in has.packages:
        raise BadInput(
            f"training.attention: {attention} needs the package {package}, which this image does not have: "
            f"build the trainer image with --build-arg FLASH_ATTENTION=…, or {instead}"
        )
    if package and recipe.compute_dtype == "float32":
        raise BadInput(
            f"training.attention: {attention} computes in 16 bits only, and quantization.computeDtype is float32: "
            f"{instead}"
        )
    if attention in COMPILED and not has.compiler:
        raise BadInput(
            f"training.attention: {attention} is compiled where it runs and this image has no C compiler: build the "
            f"trainer image with --build-arg COMPILER=gcc, or {instead}"
        )


def require_rows_as_quantised(recipe: Recipe, shape: ModelShape, device: torch.device) -> None:
    """Raises BadInput where bitsandbytes would multiply with other weights than it has quantised.

    Only CPUs are looked at: for a GPU bitsandbytes hands its kernel the number of weights and no rows (read in its
    code, not verified on a GPU). Routed experts are never affected: theirs are dequantised a row per block.
    """
    if recipe.method != "qlora" or recipe.half_quadratic or device.type != "cpu":
        return
    for module in shape.linear:
        if not reads_rows_right(module.in_features):
            raise BadInput(
                f"model.uri: {module.name} takes {module.in_features} inputs, and for rows that are no multiple of "
                f"{BLOCK_SIZE} bitsandbytes takes wrong scales on this CPU: train on a GPU, or set method: lora"
            )


def reads_rows_right(width: int) -> bool:
    """Whether bitsandbytes on this CPU dequantises rows of `width` weights as it has quantised them.

    With AVX-512, version 0.50.2 steps by `width // 64` scales a row where `width` is a multiple of 16: right only if
    it is one of 64, too.
    """
    weights = torch.linspace(1, 2, BLOCK_SIZE * width)  # no two blocks have one scale
    packed, state = bnb.quantize_4bit(weights.view(-1, width), blocksize=BLOCK_SIZE, quant_type="nf4")
    by_row = bnb.dequantize_4bit(packed, state)
    state.shape = torch.Size((width, BLOCK_SIZE))  # a row per block
    return torch.equal(by_row.view(-1), bnb.dequantize_4bit(packed, state).view(-1))


def require_attention_as_asked(model: Any, recipe: Recipe, architecture: str) -> None:
    """Raises BadInput when the model fell back to another attention kernel than the plan has."""
    found = model.config._attn_implementation
    if found != recipe.attention:
        raise BadInput(
            f"training.attention: {architecture} came up with {found} and the plan has {recipe.attention}: "
            f"set training.attention to {found}"
        )


def require_optimizer_as_asked(optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    """Raises EnvironmentUnfit when the optimizer keeps its state in another way than was sized."""
    arguments = getattr(optimizer, "args", None)
    bits = getattr(arguments, "optim_bits", 32)
    paged = getattr(optimizer, "is_paged", False)
    wanted_bits, wanted_paged = 8 if recipe.optimizer.endswith("8bit") else 32, recipe.optimizer.startswith("paged")
    if (bits, paged) != (wanted_bits, wanted_paged):
        raise EnvironmentUnfit(
            f"training.optimizer: asked for {recipe.optimizer} and got {type(optimizer).__name__} with {bits}-bit state"
            f"{' in pages' if paged else ''}: use the trainer image of this release"
        )
