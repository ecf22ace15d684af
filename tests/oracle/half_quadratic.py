"""The package hqq's layers without weights, for steps on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_api.exchange import Recipe
from qlora_trainer.half_quadratic import GROUP_SIZE, library


def hollow(linear: nn.Linear, recipe: Recipe) -> Any:
    """`linear` as the trainer replaces it, on meta: two codes in a byte, a scale and a zero point for every 64."""
    hqq, dtype = library(), getattr(torch, recipe.compute_dtype)
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=GROUP_SIZE, axis=1)
    layer: Any = hqq.HQQLinear(None, settings, compute_dtype=dtype, device="cpu")
    groups = linear.in_features * linear.out_features // GROUP_SIZE
    codes = torch.empty((groups // 2, GROUP_SIZE), dtype=torch.uint8, device="meta")
    layer.W_q = nn.Parameter(codes, requires_grad=False)
    layer.meta = {
        "scale": torch.empty((groups, 1), dtype=dtype, device="meta"),
        "zero": torch.empty((groups, 1), dtype=dtype, device="meta"),
        "shape": (linear.out_features, linear.in_features),
        "nbits": 4, "group_size": GROUP_SIZE, "axis": 1, "packing": "4bit_u8", "view_as_float": False,
        "compute_dtype": dtype, "quant_scale": False, "quant_zero": False,
    }  # fmt: skip
    layer.in_features, layer.out_features, layer.bias = linear.in_features, linear.out_features, linear.bias
    layer.ready = True
    return layer


def fill(module: nn.Module) -> None:
    """Give a layer's scales and zero points memory to count."""
    meta = getattr(module, "meta", None)
    if isinstance(meta, dict):
        for key in ("scale", "zero"):
            meta[key] = torch.empty(meta[key].shape, dtype=meta[key].dtype)
