"""Bases in 4 bits by HQQ, half-quadratic quantisation (Badri and Shaji 2023), where the image has the package `hqq`.

64 weights share a scale and a zero point in the compute type: 4.5 bits a weight in all where that has 16. transformers
5.23 has HQQ's settings and no operation that quantises by them (loading raises NotImplementedError), so each layer is
made here, on the device, as soon as its weight is read.
"""

from __future__ import annotations

from functools import lru_cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_trainer.fitness import lacks
from qlora_trainer.model import block_linears

#: The package, and the name of the quantizer in transformers' table.
PACKAGE, QUANTIZER = "hqq", "qlora_hqq"
#: Weights that share a scale: transformers' default, and NF4's.
GROUP_SIZE = 64
#: Groups that the merge solves together, of 34 bytes a weight: 144 MB. Pairs of them share bytes.
AT_ONCE = 1 << 16
#: The library's own solver computes in fp16 on GPUs and in fp32 on CPUs, and stops by its mean error: the merge would
#: come to other weights than the training had. So many rounds in fp32 end at the same error (1.486e-3 as the library's
#: 20 at most, on normal weights of 0.02; five end at 1.497e-3).
SOLVER = {
    "lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "iters": 10, "tol": 0.0, "early_stop": False,
    "scale_gridsearch": False,
}  # fmt: skip


@lru_cache(maxsize=1)
def library() -> ModuleType:
    """The package's layers, set to find the same weights on every device.

    Raises BadInput where the image does not have the package.
    """
    try:
        layers, solvers = (import_module(f"hqq.core.{name}") for name in ("quantize", "optimize"))
    except ModuleNotFoundError as error:
        raise lacks(PACKAGE) from error
    solve = partial(solvers.optimize_weights_proximal_v2, dtype=torch.float32, opt_params=SOLVER)
    layers.Quantizer.optimize_weights = solve
    return layers


@torch.no_grad()
def quantised(weight: torch.Tensor) -> Any:
    """A layer with `weight` in 4 bits, where it lies, that computes in its type; it has no bias yet."""
    hqq = library()
    settings: dict[str, Any] = hqq.BaseQuantizeConfig(nbits=4, group_size=GROUP_SIZE, axis=1)
    layer = hqq.HQQLinear(None, dict(settings), compute_dtype=weight.dtype, device=str(weight.device))
    settings.pop("offload_meta")
    layer.quantize(weight, **settings)
    return layer


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    """What is left of `weight` in `quantised(weight)`, at a fraction of the memory: each group is solved by itself."""
    left = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for groups, place in zip(*(of.reshape(-1, GROUP_SIZE).split(AT_ONCE) for of in (weight, left)), strict=True):
        place.copy_(quantised(groups).dequantize())
    return left


def by_hqq() -> QuantizationConfigMixin:
    """What `from_pretrained` takes for it."""
    library()
    return QuantizationConfigMixin(quant_method=QUANTIZER)  # pyright: ignore[reportArgumentType]  a name it registered


class _Quantise(ConversionOps):
    """A layer's weight becomes its codes; the layer that knows how to read them waits beside it."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        parameter: str = kwargs["full_layer_name"]
        module: Any = kwargs["model"].get_submodule(parameter.rpartition(".")[0])
        (value,) = input_dict.values()
        layer = quantised(value[0] if isinstance(value, list) else value)
        module.__dict__["half_quadratic"] = layer
        module._is_hf_initialized = True
        return {parameter: layer.W_q}


class _HalfQuadraticQuantizer(HfQuantizer):
    """Linear layers in 4 bits, but for the output head; after loading each is replaced by the library's."""

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> None:
        self._weights = {f"{name}.weight" for name in block_linears(model)}

    def param_needs_quantization(self, model: Any, param_name: str, **given: Any) -> bool:
        return param_name in self._weights

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise()

    @property
    def quantized_element_size(self) -> float:
        """By this transformers reserves memory before it reads weights."""
        return 0.5

    def _process_model_after_weight_loading(self, model: Any, **given: Any) -> Any:
        for name, linear in block_linears(model).items():
            owner, _, own_name = name.rpartition(".")
            layer = linear.__dict__.pop("half_quadratic")
            if linear.bias is not None:
                layer.bias = linear.bias
            setattr(model.get_submodule(owner), own_name, layer)
        return model

    def is_serializable(self, **given: Any) -> Any:
        return False

    @property
    def is_trainable(self) -> Any:
        return True


register_quantizer(QUANTIZER)(_HalfQuadraticQuantizer)
