"""Where a training stands: the one set of figures that the log, Prometheus and the operator are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True)
class Standing:
    """A training at one moment. What is not known (yet, or on this device) is None."""

    at: datetime
    step: int
    steps: int
    epoch: float
    tokens: int  # over all attempts, padding not counted
    padding: float | None = None  # share of pad tokens in what went through the model, over all attempts
    loss: float | None = None
    eval_loss: float | None = None
    looks: Mapping[str, float] = field(default_factory=dict)  # what the last evaluation found besides, by metric
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    remaining_seconds: float | None = None
    gpu_memory_bytes: Mapping[str, int] = field(default_factory=dict)  # by kind; empty on the CPU

    @property
    def percent(self) -> int:
        """Share of the steps done."""
        return min(100, 100 * self.step // self.steps) if self.steps else 100

    def line(self) -> str:
        """For the log: figures that are not known are left out."""
        left = None if self.remaining_seconds is None else int(self.remaining_seconds)
        parts = [
            f"step {self.step}/{self.steps}",
            None if self.loss is None else f"loss {self.loss:.4f}",
            None if self.learning_rate is None else f"lr {self.learning_rate:.2e}",
            None if self.grad_norm is None else f"grad {self.grad_norm:.2f}",
            None if self.tokens_per_second is None else f"{self.tokens_per_second:.0f} tokens/s",
            None if self.mfu is None else f"MFU {self.mfu:.1%}",
            None if left is None else f"remaining {left // 60}m{left % 60:02d}s",
        ]
        return "  ".join(part for part in parts if part)


class Watcher(Protocol):
    """Whoever wants to know where a training stands. Must return at once and never raise."""

    def see(self, standing: Standing) -> None:
        """Take note of the newest figures."""
        ...
