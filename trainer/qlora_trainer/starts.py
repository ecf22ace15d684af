"""How an adapter starts where the base's weights decide that: LoftQ's factors and DoRA's magnitudes.

PEFT's own LoftQ works on CUDA alone, leaves out the adapter's scale, and a DoRA on a 16-bit base has its magnitudes
rounded to that type; so both are done here, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open

from qlora_api.exchange import Recipe
from qlora_trainer.adapter import adapter_weights
from qlora_trainer.failures import BadInput
from qlora_trainer.model import BaseModel
from qlora_trainer.quantization import dequantised

#: PEFT's name for the one adapter that there is.
ADAPTER = "default"
#: Halko, Martinsson and Tropp 2011, section 4.4 and 4.5: a few directions more than are wanted, and powers of the
#: matrix, for what 4 bits round away is noise whose singular values fall slowly.
OVERSAMPLING, POWERS = 16, 6


def started(model: Any, recipe: Recipe, base: BaseModel) -> dict[str, torch.Tensor]:
    """The adapter's weights after `start`, on the host, for ranks that are to begin alike."""
    start(model, recipe, base)
    return {name: weight.detach().cpu() for name, weight in adapter_weights(model).items()}


@torch.no_grad()
def start(model: Any, recipe: Recipe, base: BaseModel) -> None:
    """Set what a fresh adapter takes from the base; nothing for a plain LoRA. The same seed gives the same start.

    Raises BadInput where the files have no weight by the name of a layer that LoftQ is to start from.
    """
    if recipe.init == "loftq":
        for name, layer, weight in _with_weights(model, base):
            make_good(layer, name, weight, recipe)
    if recipe.dora:
        for layer in _layers(model).values():
            set_magnitudes(layer)


@torch.no_grad()
def make_good(layer: Any, name: str, weight: torch.Tensor, recipe: Recipe) -> None:
    """LoftQ's factors for one layer, whose `weight` the files have: in whatever order layers come, always the same."""
    torch.manual_seed(recipe.seed ^ crc32(name.encode()))
    factors = factors_of(layer)
    residual = _residual(weight.to(factors[0].device), recipe)
    for factor, value in zip(factors, _halves(residual, recipe.rank, layer.scaling[ADAPTER]), strict=True):
        factor.zero_()  # a rank above the matrix' own leaves rows without a part
        factor[: value.shape[0], : value.shape[1]].copy_(value)


@torch.no_grad()
def set_magnitudes(layer: Any) -> None:
    """DoRA's, for one layer, whose weight is there."""
    layer.lora_magnitude_vector[ADAPTER].weight.copy_(_row_norms(layer))


@contextmanager
def magnitudes_unset() -> Iterator[None]:
    """Adapters get magnitudes without values meanwhile: PEFT reads a layer's weight for them, which is yet to come."""

    def unset(self: DoraLinearLayer, **given: Any) -> None:
        self.weight = torch.nn.Parameter(given["lora_B"].new_zeros(given["lora_B"].shape[0]))

    usual, DoraLinearLayer.update_layer = DoraLinearLayer.update_layer, unset
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = usual


def factors_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one layer, the model's own tensors."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _layers(model: Any) -> dict[str, Any]:
    """The layers with an adapter, by their names in the base."""
    inner = model.get_base_model()
    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}


def _with_weights(model: Any, base: BaseModel) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Each layer with an adapter by its name, and its weight as the files have it, file after file."""
    layers = _layers(model)
    for name in layers:
        if f"{name}.weight" not in base.weights.tensors:
            raise BadInput(
                f"lora.init: loftq reads the base's own weights, and {base.uri} has none by the name {name}.weight: "
                "leave init out"
            )
    for file in base.weights.files:
        with safe_open(base.directory / file, framework="pt") as tensors:
            for name, layer in layers.items():
                if base.weights.tensors[f"{name}.weight"].file == file:
                    yield name, layer, tensors.get_tensor(f"{name}.weight")


def _residual(weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """What quantisation takes away from `weight`."""
    return weight.float() - dequantised(weight, recipe)


def _halves(residual: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with scale · B · A as near to `residual` as `rank` allows.

    LoftQ, Li et al. 2023, algorithm 1 with one alternation: the base stays as it was quantised, so that every adapter
    of a model has the same one.
    """
    rank = min(rank, *residual.shape)
    u, values, v = torch.svd_lowrank(residual, q=min(rank + OVERSAMPLING, *residual.shape), niter=POWERS)
    roots = (values[:rank] / scale).sqrt()
    return roots[:, None] * v[:, :rank].T, u[:, :rank] * roots


def _row_norms(layer: Any) -> torch.Tensor:
    """‖W + ΔW‖ of each output: with these magnitudes a DoRA begins as the LoRA would (Liu et al. 2024, section 4.1)."""
    weight = dequantize_module_weight(layer.get_base_layer()).float()
    delta = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight
    return torch.linalg.norm(weight + layer.scaling[ADAPTER] * delta, dim=1)
