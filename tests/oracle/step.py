"""One training step of this project's trainer on fake tensors, with models as the libraries build them.

The trainer's own functions attach the adapter, compute the loss and make the optimizer.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import dora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from qlora_api.exchange import Recipe
from qlora_trainer.adapter import with_adapter
from qlora_trainer.environment import quiet_libraries
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.experts import PACKED, PackedExperts
from qlora_trainer.fused_loss import fuse_head
from qlora_trainer.model import block_linears
from qlora_trainer.optimization import make_optimizer
from qlora_trainer.packable import EXPERT_MATRICES, packable
from qlora_trainer.sequences import Batch
from tests.oracle.half_quadratic import fill, hollow
from tests.oracle.kernels import KERNELS, as_on_a_gpu
from tests.oracle.ledger import Ledger
from tests.oracle.sharding import STORAGE, like, mesh_of, sharded

Loss = Literal["logits", "tiles", "trl"]
CPU = torch.device("cpu")


def quantised(linear: nn.Linear, recipe: Recipe, storage: torch.dtype) -> Linear4bit:
    """`linear` as transformers replaces it: a 4-bit layer whose weights are not there yet."""
    return Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        getattr(torch, recipe.compute_dtype),
        compress_statistics=recipe.double_quant,
        quant_type=recipe.quant_type,
        quant_storage=storage,
        device="meta",
    )


def packed(linear: Any) -> Any:
    """The weight as bitsandbytes quantises it: two values to a byte, and a scale for every 64 of them."""
    count = linear.in_features * linear.out_features
    blocks = -(-count // 64)
    nested: dict[str, Any] = {}
    absmax = torch.empty(blocks)
    if linear.weight.compress_statistics:
        absmax = torch.empty(blocks, dtype=torch.uint8)
        scales = torch.empty(-(-blocks // 256))
        nested["state2"] = QuantState(absmax=scales, blocksize=256, code=torch.empty(256), dtype=torch.float32)
        nested["offset"] = torch.empty(())
    state = QuantState(
        absmax=absmax,
        shape=torch.Size((linear.out_features, linear.in_features)),
        blocksize=64,
        code=torch.empty(16),
        quant_type=linear.weight.quant_type,
        dtype=linear.compute_dtype,
        **nested,
    )
    storage = linear.quant_storage
    weight: Any = nn.Parameter(torch.empty((count // 2 // storage.itemsize, 1), dtype=storage), requires_grad=False)
    weight.quant_state = linear.quant_state = state  # as Params4bit has it, which cannot be made of a fake tensor
    return weight


def built(config: Mapping[str, Any], recipe: Recipe, *, storage: torch.dtype, loss: Loss) -> Any:
    """The model with its adapter, on meta."""
    settings = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            settings, dtype=getattr(torch, recipe.compute_dtype), attn_implementation=recipe.attention
        )
    model.tie_weights()
    model.requires_grad_(False)
    if recipe.method == "qlora":
        for name, linear in block_linears(model).items():
            owner, _, own_name = name.rpartition(".")
            half_quadratic = recipe.quant_type == "hqq"
            layer = hollow(linear, recipe) if half_quadratic else quantised(linear, recipe, storage)
            setattr(model.get_submodule(owner), own_name, layer)
        model.is_loaded_in_4bit = True
        if any(packable(module) for module in model.modules()):
            model.set_experts_implementation(PACKED)
    if loss == "trl":
        add_fused_lm_head(model)
    with torch.device("meta"), patch.object(dora, "dequantize_module_weight", _unpacked):
        adapted = with_adapter(model, recipe, SimpleNamespace(uri=""))  # pyright: ignore[reportArgumentType]  reads no more
    if loss == "tiles":
        fuse_head(adapted)
    return adapted


def packed_experts(module: Any, name: str, recipe: Recipe, storage: torch.dtype) -> nn.Parameter:
    """The codes of a layer's experts as the trainer holds them; the scales, padded to whole blocks, are beside them."""
    number, outputs, inputs = getattr(module, name).shape
    parts = EXPERT_MATRICES[name]
    blocks = outputs * inputs // parts // 64
    tops = -(-blocks // 256)
    held = PackedExperts(
        packed=torch.empty(0, dtype=torch.uint8),
        scales=torch.empty(number, parts, tops * 256, dtype=torch.uint8),
        scales_of_scales=torch.empty(number, parts, tops),
        offsets=torch.empty(number, parts),
        scales_code=torch.empty(256),
        code=torch.empty(16),
        outputs=outputs,
        inputs=inputs,
        parts=parts,
        quant_type=recipe.quant_type,
        dtype=getattr(torch, recipe.compute_dtype),
    )
    module.__dict__.setdefault("packed_experts", {})[name] = held
    codes = torch.empty(number * outputs * inputs // 2 // storage.itemsize, 1, dtype=storage)
    return nn.Parameter(codes, requires_grad=False)


def _unpacked(linear: Any) -> torch.Tensor:
    """For the magnitudes, of which only the number counts here."""
    return torch.empty(linear.out_features, linear.in_features)


def materialised(model: nn.Module, recipe: Recipe, storage: torch.dtype) -> None:
    """Give everything on meta memory to count, tied weights once; call under FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    old: list[nn.Parameter] = []  # kept, so that no id is used twice
    for module in model.modules():
        fill(module)
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                old.append(parameter)
                if isinstance(module, Linear4bit) and key == "weight":
                    new = packed(module)
                elif recipe.method == "qlora" and key in EXPERT_MATRICES and packable(module):
                    new = packed_experts(module, key, recipe, storage)
                else:
                    new = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                made[id(parameter)] = new
            module._parameters[key] = made[id(parameter)]
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


def step_of(
    config: Mapping[str, Any],
    recipe: Recipe,
    *,
    micro_batch_size: int,
    gpus: int = 1,
    loss: Loss = "logits",
    steps: int = 1,
) -> Ledger:
    """What one GPU holds while it takes `steps` optimizer steps, each with its last micro-batch only.

    As in the trainer's loop: the optimizer's state is there, and so are the gradients of earlier micro-batches where
    there are any. Paged optimizers are counted as if their pages were on the GPU, where a step needs them.
    """
    quiet_libraries()
    ledger = Ledger(KERNELS)
    storage = torch.uint8 if gpus == 1 else STORAGE
    model = built(config, recipe, storage=storage, loss=loss)
    tokens = micro_batch_size * recipe.max_length
    accumulates = recipe.effective_batch_size > micro_batch_size * gpus
    gc.collect()
    gc.disable()  # what waits for a collection would be counted or not, by chance
    try:
        with mesh_of(gpus) as mesh, as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True), ledger:
            materialised(model, recipe, storage)
            if mesh:
                sharded(model, mesh)
            if recipe.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
            trained: list[Any] = [weight for weight in model.parameters() if weight.requires_grad]
            # what the optimizer works on: the shards, without DTensor's bookkeeping around each
            own: list[Any] = [nn.Parameter(weight.to_local()) for weight in trained] if mesh else trained
            optimizer = make_optimizer(recipe, own)
            for weight in own:
                weight.grad = torch.empty_like(weight)
            optimizer.step()
            if not accumulates:
                optimizer.zero_grad()
            elif mesh:
                for weight, shard in zip(trained, own, strict=True):
                    weight.grad = like(weight, shard.grad)
            ledger.watch_from_here()
            for _ in range(steps):
                shape = (micro_batch_size, recipe.max_length)
                ids, positions, labels = (torch.empty(shape, dtype=torch.int64) for _ in range(3))
                batch = Batch(ids, positions, labels, tokens)
                del ids, positions, labels
                if loss == "trl":
                    part = model(
                        input_ids=batch.ids, position_ids=batch.positions, labels=batch.labels, fused_lm_head=True
                    ).loss
                else:
                    part = summed_loss(model, batch, CPU) / tokens
                part.backward()
                del part
                for weight, shard in zip(trained, own, strict=True):
                    if mesh:
                        shard.grad, weight.grad = weight.grad.to_local(), None
                torch.nn.utils.clip_grad_norm_(own, recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        gc.enable()
        ledger.close()
    return ledger
