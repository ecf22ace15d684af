"""What CUDA kernels allocate where the CPU's do otherwise, or where an operation needs values.

Each stands for the code named in it; the rest of a step is the libraries' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit
from peft.tuners.lora import dora
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from qlora_trainer import experts

aten = torch.ops.aten


def _with_all(indices: Any) -> list[torch.Tensor | None]:
    """Masks as the positions that nonzero finds: all, since every token carries loss at most."""
    positions: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            positions += index.new_empty((index.numel(), index.dim()), dtype=torch.int64).unbind(1)
        else:
            positions.append(index)
    return positions


def _index(tensor: torch.Tensor, indices: Any) -> torch.Tensor:
    positions = _with_all(indices)
    shape = torch.broadcast_shapes(*(index.shape for index in positions if index is not None))
    return tensor.new_empty((*shape, *tensor.shape[len(positions) :]))


def _index_put_(
    tensor: torch.Tensor, indices: Any, values: torch.Tensor, accumulate: bool = False, unsafe: bool = False
) -> torch.Tensor:
    _with_all(indices)
    return tensor


def _softmax_backward(grad: torch.Tensor, output: torch.Tensor, dim: int, input_dtype: torch.dtype) -> torch.Tensor:
    """SoftMax.cu, softmax_backward_cuda_out: gradient times output is a tensor of its own."""
    _product = torch.empty_like(grad)
    return torch.empty_like(output, dtype=input_dtype)


def _efficient_backward(
    grad, query, key, value, bias, out, logsumexp, seed, offset, p, mask, causal=False, *, scale=None
):
    """attention_backward.cu, _efficient_attention_backward: `delta` per row, and the queries' gradients added in fp32.

    kernel_backward.h: those of keys and values stay in registers for heads of at most 128 (kOutputInRF).
    """
    batch, heads, length, width = query.shape
    _delta = query.new_empty((batch, heads, -(-length // 32) * 32), dtype=torch.float32)
    grads = [
        part.new_empty((part.shape[0], part.shape[2], part.shape[1], part.shape[3])).transpose(1, 2)
        for part in (query, key, value)
    ]
    workspace = 0
    if query.dtype != torch.float32:
        workspace += query.numel()
        if width > 128:
            workspace += key.numel() + value.numel()
    _workspace = query.new_empty((workspace,), dtype=torch.float32)
    return (*grads, None)


def _flash_backward(grad, query, key, value, out, logsumexp, cq, ck, mq, mk, p, causal, seed, offset, *, scale=None):
    """flash_api.cpp, mha_bwd: softmax_d, dq in fp32, and dk and dv for every head where several share one."""
    batch, heads, length, width = query.shape
    rounded = -(-length // 128) * 128
    grads = [
        part.new_empty((part.shape[0], part.shape[2], part.shape[1], part.shape[3])).transpose(1, 2)
        for part in (query, key, value)
    ]
    _softmax_d = query.new_empty((batch, heads, rounded), dtype=torch.float32)
    _dq = query.new_empty((batch, rounded, heads, -(-width // 32) * 32), dtype=torch.float32)
    _expanded = [torch.empty_like(query) for _ in range(2)] if key.shape[1] != heads else []
    return tuple(grads)


KERNELS = {
    torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit_default_impl,
    aten.index.Tensor: _index,
    aten._unsafe_index_put.default: _index_put_,
    aten._index_put_impl_.default: _index_put_,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
}


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention as on a GPU: FlashAttention without a mask, else the memory-efficient kernel.

    attention.cpp: a mask of booleans becomes one of numbers first, of the queries' type.
    """
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(
            attn_mask, torch.zeros((), dtype=query.dtype), torch.full((), float("-inf"), dtype=query.dtype)
        )
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Dropout.cpp: on a GPU one kernel, which keeps a byte for each value."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _dequantised(linear: Any) -> torch.Tensor:
    """PEFT's DoRA looks for Params4bit, which cannot be made of a fake tensor."""
    state = getattr(linear.weight, "quant_state", None)
    return dequantize_4bit(linear.weight, state) if state else linear.weight


def _rows_end(chosen: torch.Tensor, experts: int) -> list[int]:
    """As if tokens were spread evenly over experts: which get how many is in values, and changes no size."""
    return [chosen.numel() * (expert + 1) // experts for expert in range(experts)]


def _in_place(*_: object, **__: object) -> None:
    """TRL's Triton kernels and its product in fp32: they write where they are told to."""


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Functions that choose another way on a GPU, before autograd sees them."""
    functional = torch.nn.functional
    maps = {signed: create_dynamic_map(signed=signed) for signed in (True, False)}  # made of values, not of shapes
    with (
        patch("bitsandbytes.functional.create_dynamic_map", lambda *, signed: maps[signed]),
        patch.object(functional, "scaled_dot_product_attention", _attention),
        patch.object(functional, "dropout", _dropout),
        patch.object(dora, "dequantize_module_weight", _dequantised),
        patch.object(experts, "rows_end", _rows_end),
        patch.object(trl_utils, "_use_triton", lambda _: True),
        patch.object(chunked_logprob, "_forward_tile", _in_place),
        patch.object(chunked_logprob, "_backward_tile", _in_place),
        patch.object(chunked_logprob, "_addmm_fp32", _in_place),
    ):
        yield
