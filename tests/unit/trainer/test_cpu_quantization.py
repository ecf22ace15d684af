"""Weights quantised on the CPU are those that bitsandbytes' own code makes, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.cpu_quantization import quantised

#: What bitsandbytes runs on devices that it has no kernel for.
THEIRS = torch._C.DispatchKey.CompositeExplicitAutograd
OP: Any = torch.ops.bitsandbytes.quantize_4bit.default  # pyright: ignore[reportAttributeAccessIssue]


def theirs(weights: torch.Tensor, blocksize: int, kind: str, storage: torch.dtype) -> Any:
    return OP._op_dk(THEIRS, weights, blocksize, kind, storage)


def same(weights: torch.Tensor, blocksize: int, kind: str, storage: torch.dtype = torch.uint8) -> None:
    packed, tops = OP(weights, blocksize, kind, storage)
    expected, expected_tops = theirs(weights, blocksize, kind, storage)
    assert (packed.dtype, packed.shape) == (expected.dtype, expected.shape)
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(tops, expected_tops)


def test_it_is_what_quantises_on_the_cpu() -> None:
    weights = torch.linspace(-1, 1, 128)
    ours = quantised(weights, 64, "nf4", torch.uint8)
    with torch.profiler.profile() as profile:
        used = OP(weights, 64, "nf4", torch.uint8)
    assert all(torch.equal(a, b) for a, b in zip(ours, used, strict=True))
    assert "aten::bucketize" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_matrix_of_several_pieces(kind: str, dtype: torch.dtype, storage: torch.dtype) -> None:
    weights = (torch.randn(521, 1088) * 0.02).to(dtype)
    weights[5] = 0
    same(weights, 64, kind, storage)


@given(
    weights=st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=400),
    blocksize=st.sampled_from([32, 64, 128]),
    kind=st.sampled_from(["nf4", "fp4"]),
)
def test_any_weights(weights: list[float], blocksize: int, kind: str) -> None:
    values = torch.tensor(weights)
    values[values.abs() < 1e-30] = 0  # bitsandbytes makes the scale of a short last block of zeros 1e-38
    last = values[-(len(values) % blocksize or blocksize) :]
    if len(values) % blocksize == 0 or last.any():
        same(values, blocksize, kind)
