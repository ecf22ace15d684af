"""What was loaded, weight by weight, against what was sized: a model that is not what the plan counted ends here.

Libraries leave alone what they do not know (experts that are one tensor stay in 16 bits, for one), and say nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_api.exchange import Recipe
from qlora_trainer.environment import log
from qlora_trainer.failures import BadInput
from qlora_trainer.model import BaseModel, block_linears, empty_model
from qlora_trainer.quantization import kept_in_fp32, packs_experts

GIB = 1024**3


@dataclass(frozen=True)
class Held:
    """One parameter: how many values of which type it has, and where it lies."""

    name: str
    dtype: str
    device: str
    values: int
    bytes: int


@dataclass(frozen=True)
class Expected:
    """What the sizing took for granted: weights by name, those of 4 bits among them, and the type of the others."""

    weights: dict[str, int]
    in_4_bits: frozenset[str]
    dtype: str
    device: str
    #: Parts of names of what the model's own code may keep in fp32, whatever the others are.
    in_fp32: frozenset[str] = frozenset()


def census(model: Any, base: BaseModel, recipe: Recipe, device: torch.device) -> None:
    """Compare a loaded base with what was sized, and log it by type; its adapter is left out.

    Of a base that is shared, all parts are counted. Raises BadInput as `compare` does.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    shapes = empty_model(base.config)
    four = recipe.method == "qlora"
    in_4_bits = {f"{name}.weight" for name in block_linears(shapes)} if four else set()
    weights = {name: parameter.numel() for name, parameter in shapes.named_parameters()}
    if packs_experts(base, recipe):
        experts = {weights.name for weights in base.shape.experts}
        in_4_bits |= {name for name in weights if name.rpartition(".")[2] in experts}
    found = [
        Held(
            _name_in_the_base(name),
            str(parameter.dtype).removeprefix("torch."),
            parameter.device.type,
            parameter.numel(),
            parameter.numel() * parameter.dtype.itemsize,
        )
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
    ]
    place = "cpu" if recipe.offload == "parameters" else device.type
    compare(
        found,
        Expected(weights, frozenset(in_4_bits), recipe.compute_dtype, place, kept_in_fp32(model, recipe)),
        base.uri,
    )
    log.info("loaded %s", described(found, in_4_bits))


def _name_in_the_base(name: str) -> str:
    """As config.json's model has it: PEFT wraps the layers that it adapts, and HQQ's call their weight otherwise."""
    owner, _, own_name = name.replace(".base_layer.", ".").rpartition(".")
    return f"{owner}.weight" if own_name == "W_q" else f"{owner}.{own_name}"


def compare(found: Iterable[Held], expected: Expected, uri: str) -> None:
    """Raises BadInput, naming the first weight that is not as it was sized."""
    left = dict(expected.weights)
    for held in found:
        values = left.pop(held.name, None)
        if values is None:
            raise BadInput(f"model.uri: {uri}: {held.name} was loaded and is not in config.json's model: {_CURE}")
        if held.device != expected.device:
            raise BadInput(
                f"model.uri: {uri}: {held.name} was loaded on {held.device} and sized for {expected.device}: {_CURE}"
            )
        if held.name in expected.in_4_bits:
            if held.bytes != -(-values // 2):
                raise BadInput(
                    f"model.uri: {uri}: {held.name} takes {held.bytes} bytes as {held.dtype} and was sized in 4 bits "
                    f"({-(-values // 2)} bytes): {_CURE}, or this one with method lora"
                )
        elif held.values != values or held.dtype not in _types(held.name, expected):
            raise BadInput(
                f"model.uri: {uri}: {held.name} is {held.values} values of {held.dtype} and was sized as {values} of "
                f"{' or '.join(_types(held.name, expected))}: {_CURE}"
            )
    if left:
        raise BadInput(f"model.uri: {uri}: {min(left)} was sized and not loaded: {_CURE}")


_CURE = "what was planned is not what would run; train another model"


def _types(name: str, expected: Expected) -> tuple[str, ...]:
    return (expected.dtype, "float32") if any(part in name for part in expected.in_fp32) else (expected.dtype,)


def described(found: Iterable[Held], in_4_bits: Iterable[str]) -> str:
    """The weights by type and device, in bytes, the largest part first."""
    four = set(in_4_bits)
    sizes: Counter[str] = Counter()
    for held in found:
        sizes[f"{'4 bits' if held.name in four else held.dtype} on {held.device}"] += held.bytes
    return ", ".join(f"{size / GIB:.2f} GiB in {kind}" for kind, size in sizes.most_common())
