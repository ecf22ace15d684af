"""A base that several GPUs share: read, quantised and dealt out layer by layer, and never held whole.

The libraries' loaders put the whole quantised model on every GPU (211 GB for 405 billion weights). Here a model without
weights gets its adapter; then each layer is read from its files, put into 4 bits and given to FSDP2, which leaves every
rank its part. What is held at the most is one rank's part and one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from qlora_api.exchange import Recipe
from qlora_trainer.adapter import with_adapter
from qlora_trainer.environment import log
from qlora_trainer.experts import PACKED, PackedExperts, quantised_experts
from qlora_trainer.model import BaseModel, Stored, block_linears, stored_as
from qlora_trainer.packable import EXPERT_MATRICES, packable
from qlora_trainer.quantization import kept_in_fp32, packs_experts
from qlora_trainer.starts import factors_of, magnitudes_unset, make_good, set_magnitudes

#: What PEFT puts into the names of a base's weights.
_WRAPPER, _ADAPTED = "base_model.model.", ".base_layer."


def load_sharded(
    base: BaseModel, recipe: Recipe, device: torch.device, mesh: DeviceMesh, *, starts: bool = True
) -> Any:
    """The base with a fresh adapter, dealt out over `mesh`: what `with_adapter(load_for_training(…))` gives to one.

    With `starts`, the adapter is also what `starts.start` makes of it, while each layer's weights are whole.

    Raises BadInput for models of which several weights are one tensor in the files.
    """
    model = _without_weights(base, recipe)
    stored = stored_as(model, base.weights)
    with magnitudes_unset():
        model = with_adapter(model, recipe, base)
    reader = _Reader(base, recipe, stored, device, in_fp32=kept_in_fp32(model, recipe))
    policy = OffloadPolicy()
    if recipe.offload == "parameters":
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    units = list(units_of(model))
    for number, modules in enumerate(units):
        for module in modules:
            reader.fill(model, module)
            if starts:
                reader.start(model, module)
        fully_shard(modules if len(modules) > 1 else modules[0], mesh=mesh, offload_policy=policy)
        if number % 10 == 9:
            log.info("%d of %d parts loaded", number + 1, len(units))
    reader.fill(model, model)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    register_fsdp_forward_method(model, "generate")
    spare_the_embedding(model)
    mine, all_bytes = shares_of(model)
    log.info("this rank holds %.3f of %.3f MiB of weights", mine / 2**20, all_bytes / 2**20)
    _require_all_sharded(model)
    return model


def units_of(model: Any) -> Iterator[list[nn.Module]]:
    """What is gathered together: each layer; embedding and head, apart unless they are one weight."""
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    yield from ([layer] for layer in layers)
    if head is None or head.weight is embedding.weight:
        yield [embedding] if head is None else [embedding, head]
    else:
        yield [embedding]
        yield [head]


def spare_the_embedding(model: Any) -> None:
    """Have the first layer's backward gather nothing ahead: FSDP2 would gather the embedding, which comes before it and
    has no backward."""
    first: Any = next(units_of(model))[0]
    first.set_modules_to_backward_prefetch([first])


def _without_weights(base: BaseModel, recipe: Recipe) -> Any:
    """The model with 4-bit layers where there will be some. PEFT makes its adapter where a layer's weight lies and by
    its type: the layers have weights of one element that look large, so that the adapter is the one it always is."""
    dtype = getattr(torch, recipe.compute_dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            base.config, dtype=dtype, attn_implementation=recipe.attention, trust_remote_code=False
        )
    model.tie_weights()
    model.requires_grad_(False)
    for name, linear in block_linears(model).items():
        quantised = recipe.method == "qlora"
        if quantised:
            owner, _, own_name = name.rpartition(".")
            new = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, dtype,
                compress_statistics=recipe.double_quant, quant_type=recipe.quant_type, quant_storage=dtype,
                device="meta",
            )  # fmt: skip
            setattr(model.get_submodule(owner), own_name, new)
            linear = new
        hollow = torch.zeros(1, dtype=torch.uint8 if quantised else dtype)
        hollow = hollow.expand(linear.out_features, linear.in_features)
        linear.weight = _packed(hollow, recipe, dtype) if quantised else nn.Parameter(hollow, requires_grad=False)
    model.is_loaded_in_4bit = recipe.method == "qlora"
    if packs_experts(base, recipe):
        model.set_experts_implementation(PACKED)
    return model


def _packed(values: torch.Tensor, recipe: Recipe, storage: torch.dtype, module: Linear4bit | None = None) -> Any:
    """A 4-bit weight of `values`; moved to a device, those of a `module` are quantised there. It is kept in the type of
    all other weights, for FSDP shards no others."""
    kind: Any = Params4bit  # made in __new__, by arguments that type checkers take for __init__'s
    return kind(
        values, requires_grad=False, compress_statistics=recipe.double_quant, quant_type=recipe.quant_type,
        quant_storage=storage, module=module, bnb_quantized=module is None,
    )  # fmt: skip


class _Reader:
    """Fills modules with the weights that the files hold, in the type in which they are used."""

    def __init__(
        self,
        base: BaseModel,
        recipe: Recipe,
        stored: dict[str, Stored],
        device: torch.device,
        *,
        in_fp32: frozenset[str] = frozenset(),
    ) -> None:
        self._base, self._recipe, self._stored, self._device = base, recipe, stored, device
        self._dtype: torch.dtype = getattr(torch, recipe.compute_dtype)
        self._in_fp32 = in_fp32

    def fill(self, model: Any, part: nn.Module) -> None:
        """Give every weight and buffer of `part` that has none its values; adapters go to the device as they are."""
        paths = _paths_of(model)
        for module in part.modules():
            self._fill_buffers(model, module, paths[id(module)])
            for key, old in list(module.named_parameters(recurse=False)):
                if isinstance(old, DTensor):
                    continue
                name = f"{paths[id(module)]}.{key}"
                if old.requires_grad:
                    setattr(module, key, nn.Parameter(old.detach().to(self._device)))
                elif isinstance(module, Linear4bit) and key == "weight":
                    packed = _packed(self._read(name), self._recipe, self._dtype, module)
                    module.weight = packed.to(self._device)
                elif key in EXPERT_MATRICES and self._base.shape.experts_quantized and packable(module):
                    setattr(module, key, self._experts(module, key, name))
                elif old.is_meta or _is_hollow(old):
                    self._set(model, old, self._read(name).to(self._device))

    @torch.no_grad()
    def start(self, model: Any, part: nn.Module) -> None:
        """Set what the adapters of `part` take from its weights, which are there: the first rank makes LoftQ's factors,
        for another might come out with the opposite signs."""
        paths = _paths_of(model)
        for module in part.modules():
            if not isinstance(module, LoraLayer):
                continue
            path = paths[id(module)]
            if self._recipe.init == "loftq":
                stored = self._stored[_own_name(f"{path}.base_layer.weight")]
                if dist.get_rank() == 0:
                    make_good(module, _own_name(path), self._tensor(stored.name), self._recipe)
                for factor in factors_of(module):
                    dist.broadcast(factor, src=0)
            if self._recipe.dora:
                set_magnitudes(module)

    def _set(self, model: Any, old: nn.Parameter, value: torch.Tensor) -> None:
        """In every place where `old` is: tied weights stay one."""
        new = nn.Parameter(value, requires_grad=False)
        for module in model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is old:
                    module._parameters[key] = new

    def _fill_buffers(self, model: Any, module: nn.Module, path: str) -> None:
        """The model computes them as after any loading, before the weights, which it fills too; few are in files."""
        lacking = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in lacking:
            module._buffers[name] = torch.empty_like(module.get_buffer(name), device=self._device)
        if lacking:
            with torch.no_grad():
                model.get_base_model()._init_weights(module)
        for name in lacking:
            if _own_name(f"{path}.{name}") in self._stored:
                module._buffers[name] = self._read(f"{path}.{name}").to(self._device)

    def _experts(self, module: nn.Module, key: str, name: str) -> nn.Parameter:
        """A layer's experts, a matrix at a time: whole ones are in no host's memory.

        Their 4-bit codes are one column, so that ranks get equal parts whatever their number is, and the scales stay
        with the module.
        """
        recipe, old, parts = self._recipe, module.get_parameter(key), EXPERT_MATRICES[key]
        matrices = self._matrices(name, parts)
        if recipe.method == "lora":
            whole = torch.empty(old.shape, dtype=self._dtype, device=self._device)
            for place, matrix in zip(whole.view(old.shape[0] * parts, -1), matrices, strict=True):
                place.copy_(matrix.reshape(-1))
            return nn.Parameter(whole, requires_grad=False)
        held = quantised_experts(
            matrices, old, parts,
            double_quant=recipe.double_quant, quant_type=recipe.quant_type, device=self._device,
        )  # fmt: skip
        packed: dict[str, PackedExperts] = module.__dict__.setdefault("packed_experts", {})
        packed[key] = replace(held, packed=held.packed.new_empty(0))
        return nn.Parameter(held.packed.view(-1).view(self._dtype)[:, None], requires_grad=False)

    def _matrices(self, name: str, parts: int) -> Iterator[torch.Tensor]:
        """Of each expert its `parts` matrices, one read at a time."""
        stored = self._stored[_own_name(name)]
        if stored.rule is None:  # all experts in one tensor
            with self._opened(stored.name) as opened:
                whole = opened.get_slice(stored.name)
                for expert in range(whole.get_shape()[0]):
                    yield from whole[expert].to(self._dtype).chunk(parts)
            return
        for pieces in zip(*(stored.pieces[source] for source in stored.rule.source_patterns), strict=True):
            yield from (self._tensor(piece).to(self._dtype) for piece in pieces)

    def _read(self, name: str) -> torch.Tensor:
        """A weight as the model has it, put together where the files have it in pieces."""
        own = _own_name(name)
        stored = self._stored[own]
        dtype = torch.float32 if any(part in own for part in self._in_fp32) else self._dtype
        if stored.rule is None:
            return self._tensor(stored.name).to(dtype)
        rule = stored.rule
        pieces: Any = {
            source: [self._tensor(name).to(dtype) for name in some] for source, some in stored.pieces.items()
        }
        for operation in rule.operations:
            pieces = operation.convert(
                pieces, source_patterns=rule.source_patterns, target_patterns=rule.target_patterns,
                full_layer_name=own, config=self._base.config,
            )  # fmt: skip
        (value,) = pieces.values()
        return value

    def _tensor(self, stored: str) -> torch.Tensor:
        with self._opened(stored) as opened:
            return opened.get_tensor(stored)

    def _opened(self, stored: str) -> Any:
        return safe_open(self._base.directory / self._base.weights.tensors[stored].file, framework="pt")


def _paths_of(model: nn.Module) -> dict[int, str]:
    """Where each module stands."""
    return {id(module): path for path, module in model.named_modules()}


def _own_name(name: str) -> str:
    """What the base calls it, without PEFT's additions."""
    return name.removeprefix(_WRAPPER).replace(_ADAPTED, ".")


def _is_hollow(weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and weight.stride() == (0, 0)


def shares_of(model: Any) -> tuple[int, int]:
    """Bytes of the weights that this rank holds, and of all."""
    weights = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    return sum(weight.to_local().nbytes for weight in weights), sum(weight.nbytes for weight in weights)


def _require_all_sharded(model: Any) -> None:
    """Raises RuntimeError when a weight is whole on every rank: that would be another plan."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise RuntimeError(f"{name} is not shared between the ranks")
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise RuntimeError(f"{name} has no values")
