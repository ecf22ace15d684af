"""When a training has stopped gaining. Pure: from its evaluations to a decision."""

from __future__ import annotations

import math


def is_gain(value: float, best: float | None, *, higher_is_better: bool) -> bool:
    """Whether `value` beats the best so far. What is not a number never does; of equals the first stays."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value > best if higher_is_better else value < best


def has_stopped_gaining(step: int, best_step: int | None, *, patience_epochs: int | None, steps_per_epoch: int) -> bool:
    """Whether so many epochs have passed since the best evaluation, or since the beginning where there was none."""
    if patience_epochs is None:
        return False
    return step - (best_step or 0) >= patience_epochs * steps_per_epoch
