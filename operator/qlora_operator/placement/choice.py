"""The choice: which flavour, which method, which micro-batch. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_api.exchange import ModelShape, Recipe
from qlora_operator.placement.flavours import Flavour, Refused
from qlora_operator.sizing.memory import GIB, Memory, training_memory

#: Below this a step is bound by dequantising weights, not by arithmetic (training.md: three dequantisations a step).
TOKENS_PER_MICRO_BATCH = 4096


@dataclass(frozen=True)
class Placed:
    """A recipe on a flavour that has the memory for it."""

    flavour: Flavour
    recipe: Recipe
    micro_batch_size: int
    memory: Memory
    rejected: tuple[Refused, ...]


@dataclass(frozen=True)
class Infeasible:
    """No GPU of the cluster can hold the training, and why each cannot."""

    rejected: tuple[Refused, ...]

    @property
    def message(self) -> str:
        if not self.rejected:
            return "the cluster has no node with GPUs"
        return "; ".join(f"{r.product}: {r.reason}" for r in self.rejected)


def micro_batches(recipe: Recipe, wanted: int | None) -> list[int]:
    """Micro-batch sizes to try, the best first: `wanted` alone, or every divisor of the effective batch that is not
    larger than needed for `TOKENS_PER_MICRO_BATCH`, from the largest."""
    if wanted is not None:
        return [wanted]
    divisors = [n for n in range(1, recipe.effective_batch_size + 1) if recipe.effective_batch_size % n == 0]
    enough = next((n for n in divisors if n * recipe.max_length >= TOKENS_PER_MICRO_BATCH), divisors[-1])
    return [n for n in reversed(divisors) if n <= enough]


def largest_fitting(
    shape: ModelShape,
    recipe: Recipe,
    sizes: Sequence[int],
    *,
    device_bytes: int,
    headroom_percent: int,
    gpu: bool = True,
) -> tuple[int, Memory] | None:
    """The first of `sizes` (sequences per micro-batch) whose memory and headroom fit `device_bytes`, or None."""
    for size in sizes:
        memory = training_memory(shape, recipe, micro_batch_size=size, gpu=gpu)
        if with_headroom(memory.total_bytes, headroom_percent) <= device_bytes:
            return size, memory
    return None


def with_headroom(memory_bytes: int, headroom_percent: int) -> int:
    """Bytes that a device must have for a training that takes `memory_bytes`."""
    return memory_bytes * (100 + headroom_percent) // 100


def choose(
    shape: ModelShape,
    recipes: Sequence[Recipe],
    flavours: Sequence[Flavour],
    refused: Sequence[Refused] = (),
    *,
    micro_batch_size: int | None,
    headroom_percent: int,
) -> Placed | Infeasible:
    """The flavour to train on with one GPU.

    `recipes` in order of preference (LoRA before QLoRA). Preferred, in this order: the recipe that comes first, at
    least `TOKENS_PER_MICRO_BATCH` tokens per micro-batch, the smallest GPU, the largest micro-batch, the name.
    """
    candidates = []
    rejected = list(refused)
    for flavour in flavours:
        fits = [
            (rank, recipe, *found)
            for rank, recipe in enumerate(recipes)
            if (
                found := largest_fitting(
                    shape,
                    recipe,
                    micro_batches(recipe, micro_batch_size),
                    device_bytes=flavour.memory_bytes,
                    headroom_percent=headroom_percent,
                )
            )
        ]
        if not fits:
            rejected.append(
                Refused(flavour.product, _too_small(shape, recipes[-1], flavour, micro_batch_size, headroom_percent))
            )
        for rank, recipe, size, memory in fits:
            few_tokens = micro_batch_size is None and size < micro_batches(recipe, None)[0]
            key = (rank, few_tokens, flavour.memory_bytes, -size, flavour.product)
            candidates.append((key, Placed(flavour, recipe, size, memory, ())))
    if not candidates:
        return Infeasible(tuple(rejected))
    _, best = min(candidates, key=lambda candidate: candidate[0])
    others = {
        f.product: Refused(f.product, _not_needed(f, best)) for f in flavours if f.product != best.flavour.product
    }
    rejected_products = {r.product for r in rejected}
    rejected += [refusal for product, refusal in others.items() if product not in rejected_products]
    return Placed(best.flavour, best.recipe, best.micro_batch_size, best.memory, tuple(rejected))


def _too_small(shape: ModelShape, recipe: Recipe, flavour: Flavour, wanted: int | None, headroom_percent: int) -> str:
    smallest = micro_batches(recipe, wanted)[-1]
    memory = training_memory(shape, recipe, micro_batch_size=smallest)
    need = with_headroom(memory.total_bytes, headroom_percent) / GIB
    return (
        f"has {flavour.memory_bytes / GIB:.1f} GiB, {recipe.method} at micro-batch {smallest} × {recipe.max_length} "
        f"tokens needs {need:.1f} GiB with {headroom_percent} % headroom"
    )


def _not_needed(flavour: Flavour, best: Placed) -> str:
    if flavour.memory_bytes >= best.flavour.memory_bytes:
        return f"would do; {best.flavour.product} is smaller and fits"
    return f"fits only with less than {best.recipe.method} at micro-batch {best.micro_batch_size}"
