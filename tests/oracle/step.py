"""One training step of this project's trainer on fake tensors: the model as transformers, PEFT and bitsandbytes build it."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.exchange import Recipe
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.model import block_linears
from qlora_trainer.optimization import make_optimizer
from qlora_trainer.sequences import Batch
from qlora_trainer.training import with_adapter
from tests.oracle.kernels import KERNELS, as_on_a_gpu
from tests.oracle.ledger import Ledger
from tests.oracle.sharding import STORAGE, mesh_of, sharded

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


def packed(linear: Linear4bit) -> nn.Parameter:
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
    weight = nn.Parameter(torch.empty((count // 2 // storage.itemsize, 1), dtype=storage), requires_grad=False)
    weight.quant_state = linear.quant_state = state  # as Params4bit has it, which cannot be made of a fake tensor
    return weight


def built(config: dict[str, Any], recipe: Recipe, storage: torch.dtype = torch.uint8) -> nn.Module:
    """The model with its adapter; call under FakeTensorMode."""
    dtype = getattr(torch, recipe.compute_dtype)
    settings = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=recipe.attention)
    model.tie_weights()
    model.requires_grad_(False)
    if recipe.method == "qlora":
        for name, linear in block_linears(model).items():
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], quantised(linear, recipe, storage))
        model.is_loaded_in_4bit = True
    with torch.device("meta"):
        adapted = with_adapter(model, recipe, SimpleNamespace(uri=""))
    return adapted


def materialised(model: nn.Module) -> None:
    """Give everything on meta memory to count, tied weights once; call under FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    old: list[nn.Parameter] = []  # kept, so that no id is used twice
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                old.append(parameter)
                if isinstance(module, Linear4bit) and key == "weight":
                    new = packed(module)
                else:
                    new = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                made[id(parameter)] = new
            module._parameters[key] = made[id(parameter)]
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


def measured(config, recipe: Recipe, micro_batch_size: int, gpus: int = 1, steps: int = 1) -> Ledger:
    ledger = Ledger(KERNELS)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    gc.disable()
    try:
        storage = torch.uint8 if gpus == 1 else STORAGE
        model = built(config, recipe, storage)
        with mesh_of(gpus) as mesh, as_on_a_gpu(), fake, ledger:
            materialised(model)
            if mesh:
                sharded(model, mesh)
            if recipe.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            # what the optimizer touches: the shards, without DTensor's bookkeeping around each
            own = [nn.Parameter(weight.to_local()) for weight in trained] if mesh else trained
            optimizer = make_optimizer(recipe, own)
            for weight in own:
                weight.grad = torch.empty_like(weight)
            optimizer.step()  # makes the optimizer's state
            if recipe.effective_batch_size == micro_batch_size * gpus:
                optimizer.zero_grad()
            elif mesh:
                for weight, shard in zip(trained, own, strict=True):
                    weight.grad = DTensor.from_local(
                        shard.grad, mesh, weight.placements, shape=weight.shape, stride=weight.stride()
                    )
            gc.collect()
            ledger.watch_from_here()
            for _ in range(steps):
                shape = (micro_batch_size, recipe.max_length)
                batch = Batch(
                    *(torch.empty(shape, dtype=torch.int64) for _ in range(3)), micro_batch_size * recipe.max_length
                )
                part = summed_loss(model, batch, CPU) / batch.tokens
                part.backward()
                del part
                if mesh:
                    for weight, shard in zip(trained, own, strict=True):
                        shard.grad = weight.grad.to_local()
                        weight.grad = None
                torch.nn.utils.clip_grad_norm_(own, recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        gc.enable()
        ledger.close()
    return ledger
