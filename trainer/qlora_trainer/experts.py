"""Routed experts in 4 bits: quantised as they are read, and multiplied with a few at a time.

transformers keeps all experts of a layer in one tensor of three dimensions, which `load_in_4bit` leaves in 16 bits
(bitsandbytes#1849): 96 % of a Mixtral. Here each matrix as the files have it is quantised by itself, on the device, as
soon as it is read, so that no layer's experts are there in 16 bits together and the merge can do the same again.
A product dequantises so many experts at a time as `EXPERTS_AT_ONCE_BYTES` hold, forwards and once more backwards:
nothing dequantised is kept for the backward, with gradient checkpointing or without.

Experts are not adapted: PEFT's `target_parameters` finds no weight that is packed, and attaches nothing without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_api.exchange import EXPERTS_AT_ONCE_BYTES
from qlora_trainer.packable import BLOCK_SIZE, EXPERT_MATRICES, joins_experts, packable

#: Name of the quantizer and of the experts' forward in transformers' tables.
PACKED = "qlora_packed"
#: Scales that share one in turn, under double quantisation (QLoRA, section 3).
SCALES_BLOCK_SIZE = 256


@dataclass(frozen=True)
class PackedExperts:
    """The weights of one product of all experts of a layer, `parts` matrices each, one below the other.

    `packed` has two weights in a byte, and is empty where ranks share it (see `at_hand`); `scales` one per 64 weights
    in fp32, or in 8 bits, and then `scales_of_scales` and `offsets`, as bitsandbytes' double quantisation has them.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    scales_of_scales: torch.Tensor | None
    offsets: torch.Tensor | None
    scales_code: torch.Tensor | None
    code: torch.Tensor
    outputs: int
    inputs: int
    parts: int
    quant_type: str
    dtype: torch.dtype

    @property
    def experts(self) -> int:
        return self.scales.shape[0]

    @property
    def bytes(self) -> int:
        """Of everything that is held."""
        tensors = (self.packed, self.scales, self.scales_of_scales, self.offsets, self.scales_code, self.code)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def groups(self) -> Iterator[tuple[int, int]]:
        """First expert and the one behind the last, of as many as are dequantised together."""
        at_once = max(1, EXPERTS_AT_ONCE_BYTES // (self.outputs * self.inputs * self.dtype.itemsize))
        for first in range(0, self.experts, at_once):
            yield first, min(first + at_once, self.experts)

    def dequantised(self, first: int, last: int) -> torch.Tensor:
        """The weights of the experts from `first` to before `last`: [experts, outputs, inputs]."""
        number = last - first
        blocks = self.outputs * self.inputs // self.parts // BLOCK_SIZE
        scales = self.scales[first:last]
        if self.scales_of_scales is not None and self.scales_code is not None and self.offsets is not None:
            scales = bnb.dequantize_blockwise(
                scales.reshape(-1),
                absmax=self.scales_of_scales[first:last].reshape(-1),
                code=self.scales_code,
                blocksize=SCALES_BLOCK_SIZE,
            ).view(scales.shape)[..., :blocks]
            scales += self.offsets[first:last, :, None]
        state = bnb.QuantState(
            absmax=scales.reshape(-1),
            shape=torch.Size((self.packed[first:last].numel() * 2 // BLOCK_SIZE, BLOCK_SIZE)),  # see `dequantised`
            code=self.code,
            blocksize=BLOCK_SIZE,
            quant_type=self.quant_type,
            dtype=self.dtype,
        )
        return bnb.dequantize_4bit(self.packed[first:last].reshape(-1, 1), state).view(
            number, self.outputs, self.inputs
        )


def quantized_experts(model: nn.Module) -> list[str]:
    """Names of the parameters that hold routed experts in 4 bits."""
    return sorted(
        f"{name}.{parameter}".removeprefix(".")
        for name, module in model.named_modules()
        for parameter in getattr(module, "packed_experts", {})
    )


# --- loading ---


class PackedExpertsConfig(BitsAndBytesConfig):
    """transformers' 4-bit loading, and experts with it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method: Any = PACKED


class _AsStored(ConversionOps):
    """Hands the matrices on as they are in the files, in place of one tensor for all."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return {pattern: input_dict[pattern] for pattern in source_patterns}


class _PackOrQuantise(ConversionOps):
    """For each parameter what its module wants: experts are packed, linear layers quantised as ever."""

    def __init__(self, quantizer: _PackingQuantizer, quantise: ConversionOps) -> None:
        self.packing, self.quantise = quantizer, quantise

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        parameter: str = kwargs["full_layer_name"]
        path, _, name = parameter.rpartition(".")
        module: Any = kwargs["model"].get_submodule(path)
        if not packable(module):
            given = {"source_patterns": source_patterns, "target_patterns": target_patterns, **kwargs}
            return self.quantise.convert(input_dict, **given)
        experts = self.packing.pack(getattr(module, name), list(input_dict.values()), EXPERT_MATRICES[name])
        input_dict.clear()
        module.__dict__.setdefault("packed_experts", {})[name] = experts
        module._is_hf_initialized = True
        return {parameter: nn.Parameter(experts.packed, requires_grad=False)}


class _PackingQuantizer(Bnb4BitHfQuantizer):
    """transformers' own, which also reaches experts.

    They are read to the host, which then holds one product's of one layer in 16 bits, and go to the device a matrix at
    a time; those that the files keep as one tensor go there whole.
    """

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **given: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **given)
        self.device = torch.device(device_map[""])

    def param_needs_quantization(self, model: Any, param_name: str, **given: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        if name in EXPERT_MATRICES and packable(model.get_submodule(path)):
            return True
        return super().param_needs_quantization(model, param_name, **given)

    def get_quantize_ops(self) -> Any:
        return _PackOrQuantise(self, super().get_quantize_ops())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        converted = super().update_weight_conversions(weight_conversions, model)
        for rule in converted:
            if isinstance(rule, WeightConverter) and joins_experts(rule):
                as_stored: list[ConversionOps] = [_AsStored()]
                rule.operations, rule.force_cpu = as_stored, True
        return converted

    def pack(self, whole: torch.Tensor, stored: list[Any], parts: int) -> PackedExperts:
        """`stored`: for each part the matrices of all experts, or one tensor with all of them and all parts."""
        matrices: list[torch.Tensor]
        if len(stored) == 1 and (isinstance(stored[0], torch.Tensor) or stored[0][0].dim() == 3):
            (one,) = (stored[0],) if isinstance(stored[0], torch.Tensor) else stored[0]
            matrices = [matrix for expert in one for matrix in expert.chunk(parts)]
        else:
            matrices = [stored[part][expert] for expert in range(whole.shape[0]) for part in range(parts)]
        config: Any = self.quantization_config
        return quantised_experts(
            matrices, whole, parts,
            double_quant=config.bnb_4bit_use_double_quant, quant_type=config.bnb_4bit_quant_type, device=self.device,
        )  # fmt: skip


def quantised_experts(
    matrices: Iterable[torch.Tensor],
    whole: torch.Tensor,
    parts: int,
    *,
    double_quant: bool,
    quant_type: str,
    device: torch.device,
) -> PackedExperts:
    """The experts that `whole` has room for, of `matrices` as they come: of each expert its parts, one by one.

    Raises ValueError when they are not of the sizes that make up `whole`, or not of whole blocks.
    """
    number, outputs, inputs = whole.shape
    size = outputs * inputs // parts
    if size % BLOCK_SIZE:
        raise ValueError(f"experts of {outputs // parts} x {inputs} weights cannot be quantised in blocks of 64")
    blocks = size // BLOCK_SIZE
    padded = -(-blocks // SCALES_BLOCK_SIZE) * SCALES_BLOCK_SIZE if double_quant else blocks
    rows, kind = number * parts, torch.uint8 if double_quant else torch.float32
    packed = torch.empty(rows, size // 2, dtype=torch.uint8, device=device)
    scales = torch.zeros(rows, padded, dtype=kind, device=device)
    tops = torch.empty(rows, padded // SCALES_BLOCK_SIZE, device=device) if double_quant else None
    offsets = torch.empty(rows, device=device) if double_quant else None
    state: Any = None
    for index, matrix in zip(range(rows), matrices, strict=True):
        if matrix.numel() != size:
            raise ValueError(f"an expert of {list(matrix.shape)} weights stands where {size} are wanted")
        values, state = bnb.quantize_4bit(
            matrix.to(device).contiguous(),
            blocksize=BLOCK_SIZE,
            compress_statistics=double_quant,
            quant_type=quant_type,
        )
        packed[index] = values.view(-1)
        scales[index, :blocks] = state.absmax
        if tops is not None and offsets is not None:
            tops[index], offsets[index] = state.state2.absmax, state.offset
    return PackedExperts(
        packed=packed.view(number, -1),
        scales=scales.view(number, parts, padded),
        scales_of_scales=None if tops is None else tops.view(number, parts, -1),
        offsets=None if offsets is None else offsets.view(number, parts),
        scales_code=state.state2.code if double_quant else None,
        code=state.code,
        outputs=outputs,
        inputs=inputs,
        parts=parts,
        quant_type=quant_type,
        dtype=state.dtype,
    )


register_quantizer(PACKED)(_PackingQuantizer)


# --- at work ---


class _Product(torch.autograd.Function):
    """Rows sorted by expert, each times its expert's weights; the gradient is that of the rows only."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, experts: PackedExperts, ends: list[int]) -> torch.Tensor:
        ctx.experts, ctx.ends = experts, ends
        return _multiplied(rows, experts, ends, transposed=True)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _multiplied(gradients[0], ctx.experts, ctx.ends, transposed=False), None, None


def _multiplied(rows: torch.Tensor, experts: PackedExperts, ends: list[int], *, transposed: bool) -> torch.Tensor:
    """Each row times its expert's weights, or their transposes; `ends` are the rows behind each expert's."""
    out = rows.new_empty(rows.shape[0], experts.outputs if transposed else experts.inputs)
    for first, last in experts.groups():
        start, stop = ends[first - 1] if first else 0, ends[last - 1]
        if start == stop:
            continue
        weights = experts.dequantised(first, last)
        of_each = weights.transpose(1, 2) if transposed else weights
        some = rows[start:stop].to(weights.dtype)
        if _groups_products(rows.device):
            behind = torch.tensor([end - start for end in ends[first:last]], dtype=torch.int32, device=rows.device)
            out[start:stop] = nn.functional.grouped_mm(some, of_each, offs=behind)
        else:
            for expert, end in enumerate(ends[first:last]):
                begin = (ends[first + expert - 1] if first + expert else 0) - start
                out[start + begin : end] = some[begin : end - start] @ of_each[expert]
        del weights, of_each
    return out


def _groups_products(device: torch.device) -> bool:
    """Whether torch multiplies groups of rows in one kernel there: on the CPU, and on GPUs from Ampere on."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)


def packed_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What a layer's experts make of each token, [tokens, hidden]: transformers' `grouped_mm` with packed weights."""
    tokens, per_token = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    _, order = torch.sort(chosen)
    ends = rows_end(chosen, module.num_experts)
    rows = hidden_states[order // per_token]
    rows = _product(rows, at_hand(module, "gate_up_proj"), ends)
    rows = module._apply_gate(rows)
    rows = _product(rows, at_hand(module, "down_proj"), ends)
    rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    total = rows[back].view(tokens, per_token, -1).sum(dim=1)
    return total.to(hidden_states.dtype)


def at_hand(module: Any, name: str) -> PackedExperts:
    """The experts with the codes that the parameter `name` has now: whole ones come and go where ranks share them."""
    held: PackedExperts = module.packed_experts[name]
    return replace(held, packed=getattr(module, name).view(torch.uint8).view(held.experts, -1))


def rows_end(chosen: torch.Tensor, experts: int) -> list[int]:
    """Where each expert's rows end, once they are sorted by expert: on the host, which waits for the GPU here."""
    return torch.bincount(chosen, minlength=experts).cumsum(0).tolist()


def _product(rows: torch.Tensor, experts: PackedExperts, ends: list[int]) -> torch.Tensor:
    return _Product.apply(rows, experts, ends)  # pyright: ignore[reportReturnType]


ALL_EXPERTS_FUNCTIONS.register(PACKED, packed_forward)
