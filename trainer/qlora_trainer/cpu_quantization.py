"""bitsandbytes' 4-bit quantisation on the CPU, bit by bit and three times as fast.

Its own looks each weight up in a list of bounds (`torch.bucketize`), which takes four fifths of 26 ns a weight. Here a
weight is compared with all 15 bounds, which processors do for many weights at once: 9 ns (measured on one thread). What
is loaded on the CPU goes through it, and every quantised weight that is merged.
"""

from __future__ import annotations

import torch
from bitsandbytes.backends.default.ops import (
    _get_4bit_quantize_bounds,  # pyright: ignore[reportPrivateUsage]  the midpoints between codes, and their order
)

#: Weights at a time: what is made of them stays in a processor's cache, and calls do not cost more than work.
_AT_ONCE = 1 << 18


def quantised(
    weights: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two in a byte, and the largest magnitude of each block; a last block may be shorter."""
    bounds, order = _get_4bit_quantize_bounds(quant_type, weights.device)
    flat = weights.reshape(-1)
    odd = -flat.numel() % blocksize
    whole = torch.nn.functional.pad(flat, (0, odd)) if odd else flat
    packed = torch.empty(whole.numel() // 2, dtype=torch.uint8, device=weights.device)
    tops = torch.empty(whole.numel() // blocksize, device=weights.device)
    step = max(1, _AT_ONCE // blocksize) * blocksize
    for start in range(0, whole.numel(), step):
        part = whole[start : start + step].float().view(-1, blocksize)
        top = part.abs().amax(dim=1)
        scaled = (part * (1.0 / top.clamp(min=1e-38))[:, None]).view(-1)
        codes = torch.zeros(scaled.numel(), dtype=torch.uint8, device=weights.device)
        above = torch.empty(scaled.numel(), dtype=torch.bool, device=weights.device)
        for bound in bounds.tolist():
            torch.gt(scaled, bound, out=above)
            codes += above.view(torch.uint8)
        if quant_type != "nf4":  # whose codes are not in the order of their values
            codes = order.to(torch.uint8)[codes.int()]
        packed[start // 2 : (start + step) // 2] = (codes[::2] << 4) | codes[1::2]
        tops[start // blocksize : (start + step) // blocksize] = top
    packed = packed[: (flat.numel() + 1) // 2]
    return packed.view(quant_storage).unsqueeze(1), tops


torch.library.register_kernel("bitsandbytes::quantize_4bit", "cpu", quantised)
