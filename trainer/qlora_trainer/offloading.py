"""Activation checkpoints in host memory: what `training.offload: activations` moves, and what it leaves where it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from qlora_api.exchange import Recipe


@dataclass(frozen=True)
class Waiting:
    """A tensor that waits in host memory, and where it is to be again."""

    host: torch.Tensor
    device: torch.device


class CheckpointsOnTheHost(saved_tensors_hooks):
    """While it is entered, what is kept of the residual stream for a backward is kept in host memory.

    With activation checkpointing that is the input of each layer: what a layer keeps inside is recomputed and comes by
    hooks of its own. The logits stay where they are: they are used at once, and are larger than all checkpoints.
    Copies go by a stream of their own while the next layer is at work. With `saved_tensors_hooks` as torch has them,
    `save_on_cpu` would move everything, logits and all, and wait for each.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self.moved_bytes = 0
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        if tensor.dim() != 3 or tensor.shape[-1] != self.width or isinstance(tensor, torch.nn.Parameter):
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._copies is not None)
        self.moved_bytes += host.numel() * host.itemsize
        if self._copies is None:
            host.copy_(tensor)
        else:
            self._copies.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self._copies):
                host.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._copies)  # its memory is not given away before it is copied
        return Waiting(host, tensor.device)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, Waiting):
            return packed
        if self._copies is not None:
            torch.cuda.current_stream(packed.device).wait_stream(self._copies)
        return packed.host.to(packed.device, non_blocking=True, copy=True)


def activations_offloaded(recipe: Recipe, width: int, device: torch.device) -> AbstractContextManager[object]:
    """For the forward pass of one micro-batch of a model of so many hidden values; nothing unless the recipe asks.

    On a CPU there is nowhere to move to.
    """
    if recipe.offload != "activations" or device.type == "cpu":
        return nullcontext()
    return CheckpointsOnTheHost(width, device)
