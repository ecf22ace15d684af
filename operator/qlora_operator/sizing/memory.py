"""Memory of one training process on one GPU, item by item, at the moment when it takes the most.

Nothing here is fitted but `FRAGMENTATION`: a step of the training is walked through allocation by allocation
(`step.py`), and what is held at its peak is counted by what it is for. docs/sizing.md compares that with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from qlora_api.exchange import ModelShape, Recipe
from qlora_operator.sizing.allocator import peak_reserved_bytes
from qlora_operator.sizing.families import FAMILIES
from qlora_operator.sizing.step import Peak, Rank
from qlora_operator.sizing.tensors import Trace
from qlora_operator.sizing.training import DTYPE_BYTES, Decoder, Training, decoder_of, with_layers

GIB = 1024**3

#: Bytes of optimizer state per trained weight: two moments, in fp32 or in 8 bit with their scales.
OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "paged_adamw_32bit": 8.0,
    "adamw_8bit": 2.03,
    "adamw_bnb_8bit": 2.03,
    "paged_adamw_8bit": 2.03,
}
CONTEXT = "CUDA context"
#: The driver's context and the loaded kernels, outside the allocator: 0.14 GiB on a T4 (fitcheck-llm 0.3.1), up to 0.6
#: on Hopper.
CUDA_CONTEXT_BYTES = int(0.6 * GIB)
#: Reserved by the allocator and held by nothing, as a share of what is held. The trainer sets expandable segments, for
#: which the simulated allocator (`allocator.py`) gives 1 to 18 % over our own recipes, most under 12, and 28 % for a
#: model of 1 billion on 8192 tokens; before it fails, the real one gives free pages back.
FRAGMENTATION = 0.12
#: The recipe's names for attention kernels, by what they hold.
_KERNELS: dict[str, Literal["eager", "sdpa", "flash"]] = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "flex_attention": "flash",
}
#: torch, transformers and the rest, in the memory of a process that trains on a CPU.
PYTHON_BYTES = GIB


@dataclass(frozen=True)
class Item:
    """One line of the memory plan."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """What is held when the most is held, what the allocator needs beside, and what the process costs by itself."""

    items: tuple[Item, ...]
    #: What somebody who reads them should know of how they came about.
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def lora_parameters(shape: ModelShape, *, rank: int, target_modules: list[str], dora: bool = False) -> int:
    """Weights of the adapter: r·(in + out) per adapted linear layer. LoRA, Hu et al. 2021, section 4.1.

    A DoRA has `out` magnitudes beside them.
    """
    adapted = [module for module in shape.linear if module.name in target_modules]
    return sum((rank * (m.in_features + m.out_features) + dora * m.out_features) * m.count for m in adapted)


def training_memory(
    shape: ModelShape, recipe: Recipe, *, micro_batch_size: int, gpus: int = 1, gpu: bool = True
) -> Memory:
    """Peak memory of one of `gpus` that train `shape` by `recipe`, `micro_batch_size` sequences at a time, in bytes.

    Several share the weights by FSDP2. `gpu=False` gives the process' resident memory on a CPU: no context, and Python
    itself instead.
    """
    decoder = decoder_of(shape)
    peak = peak_of(our_training(decoder, recipe, micro_batch_size, gpus))
    items = [Item(name, size) for name, size in peak.items.items() if size]
    items.append(Item("fragmentation", int(FRAGMENTATION * sum(item.bytes for item in items))))
    items.append(Item(CONTEXT, CUDA_CONTEXT_BYTES) if gpu else Item("Python and libraries", PYTHON_BYTES))
    return Memory(tuple(items), _notes(shape, decoder, recipe))


def _notes(shape: ModelShape, decoder: Decoder, recipe: Recipe) -> tuple[str, ...]:
    notes = []
    experts = sum(weights.weights for weights in shape.experts)
    if experts and recipe.method == "qlora" and not shape.experts_quantized:
        notes.append(
            f"4 bits do not reach the experts, {100 * experts / shape.parameters:.0f} % of the weights: they stay in "
            f"{recipe.compute_dtype}"
        )
    if shape.family not in FAMILIES:
        roles = decoder.attention_in and decoder.attention_out and (decoder.mlp_out or decoder.experts)
        how = "its layers are taken to work as Llama's do" if roles else "what its layers do is not known"
        notes.append(f"sized from its tensors, for its family ({shape.family or 'not said'}) is not known: {how}")
    return tuple(notes)


def our_training(decoder: Decoder, recipe: Recipe, micro_batch_size: int, gpus: int = 1) -> Training:
    """`recipe` as this project's trainer runs it: adapters in fp32, no autocast, the base in the compute type.

    bitsandbytes' optimizers cannot step on shards: several GPUs have torch's, in fp32.
    """
    apart = recipe.packing or micro_batch_size > 1
    window_ends = decoder.sliding_window is not None and decoder.sliding_window < recipe.max_length
    masked = recipe.attention == "sdpa" and (apart or window_ends)
    return Training(
        decoder=decoder,
        method=recipe.method,
        double_quant=recipe.double_quant,
        compute_bytes=DTYPE_BYTES[recipe.compute_dtype],
        rank=recipe.rank,
        adapted=frozenset(recipe.target_modules),
        dropout=recipe.dropout > 0,
        dora=recipe.dora,
        half_quadratic=recipe.half_quadratic,
        makes_good=recipe.init == "loftq",
        max_length=recipe.max_length,
        micro_batch_size=micro_batch_size,
        gradient_checkpointing=recipe.gradient_checkpointing,
        attention=_KERNELS[recipe.attention],
        state_bytes=OPTIMIZER_BYTES.get(recipe.optimizer, 8.0) if gpus == 1 else OPTIMIZER_BYTES["adamw_torch_fused"],
        update_bytes=4.0 if recipe.optimizer == "adamw_torch" else 0.0,
        loss="tiles" if decoder.loss_in_tiles else "logits",
        masked=masked,
        masks=2 if decoder.family.alternates and (apart or recipe.attention == "eager") else 1,
        accumulates=recipe.effective_batch_size > micro_batch_size * gpus,
        expands_heads=masked,
        gpus=gpus,
        offload=recipe.offload,
    )


@lru_cache(maxsize=4096)
def peak_of(training: Training) -> Peak:
    """The most that a step holds, and what it is.

    Walked with few layers and with one more, and carried on to all: each layer adds the same to each part of the step.
    """
    layers = training.decoder.layers
    few = 3 if training.offload == "activations" else 2  # from the third on, no more checkpoints are on the GPU
    if layers <= few + 1:
        return max(walked(training).values(), key=lambda peak: peak.bytes)
    less, more = (walked(with_layers(training, count)) for count in (few, few + 1))
    return max((_carried_on(less[part], more[part], layers - few) for part in less), key=lambda peak: peak.bytes)


def walked(training: Training) -> dict[str, Peak]:
    """The peak of each part of a step that finds the optimizer's state made."""
    rank = Rank(training, Trace())
    peaks: dict[str, Peak] = {}
    if training.makes_good:
        peaks["adapter's start"] = rank.start()
    if training.half_quadratic:
        peaks["quantisation"] = rank.solve()
    rank.make_optimizer_state()
    rank.step(peaks)
    return peaks


@lru_cache(maxsize=1024)
def reserved_bytes(training: Training, *, expandable: bool = False) -> int:
    """What PyTorch's allocator has reserved after two steps; all layers are walked, for where blocks land decides.

    `expandable`: with expandable segments, as our trainer has it; else the allocator as it comes.
    """
    trace = Trace()
    rank = Rank(training, trace)
    rank.step()  # the optimizer's state is made at its end, among the blocks that are there by then
    rank.step()
    return peak_reserved_bytes(trace.events, expandable=expandable)


def _carried_on(less: Peak, more: Peak, layers: int) -> Peak:
    """`less` with so many layers added to it, of which `more` has one."""
    names = dict.fromkeys((*less.items, *more.items))
    first, second = ({name: peak.items.get(name, 0) for name in names} for peak in (less, more))
    items = {name: first[name] + layers * (second[name] - first[name]) for name in names}
    return Peak(less.bytes + layers * (more.bytes - less.bytes), items)
