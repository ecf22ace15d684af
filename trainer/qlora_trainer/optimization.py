"""How weights are moved: optimizers by name, and the learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from torch.optim import Optimizer

from qlora_api.exchange import Recipe

#: By transformers' names. LoRA is trained without weight decay (QLoRA, Dettmers et al. 2023, appendix B).
_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw_torch": lambda weights, lr: torch.optim.AdamW(weights, lr=lr, weight_decay=0.0),
    "adamw_torch_fused": lambda weights, lr: torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=True),
    "adamw_8bit": lambda weights, lr: AdamW8bit(weights, lr=lr, weight_decay=0.0),
    "adamw_bnb_8bit": lambda weights, lr: AdamW8bit(weights, lr=lr, weight_decay=0.0),
    "paged_adamw_8bit": lambda weights, lr: PagedAdamW8bit(weights, lr=lr, weight_decay=0.0),
    "paged_adamw_32bit": lambda weights, lr: PagedAdamW32bit(weights, lr=lr, weight_decay=0.0),
}


def make_optimizer(recipe: Recipe, weights: Iterable[torch.nn.Parameter]) -> Optimizer:
    """The recipe's optimizer over `weights`. Raises ValueError for a name that is not in the table."""
    if recipe.optimizer not in _OPTIMIZERS:
        raise ValueError(f"optimizer {recipe.optimizer!r} is not one of {', '.join(_OPTIMIZERS)}")
    return _OPTIMIZERS[recipe.optimizer](list(weights), recipe.learning_rate)


def learning_rate(step: int, total: int, recipe: Recipe) -> float:
    """Learning rate of `step` (from 0) of `total`: up in a line, then by the schedule down to the least."""
    warmup = math.ceil(recipe.warmup_fraction * total)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - warmup) / max(1, total - warmup)
    left = 1 - done if recipe.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return recipe.min_learning_rate + (recipe.learning_rate - recipe.min_learning_rate) * left
