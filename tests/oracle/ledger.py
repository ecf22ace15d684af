"""Who holds how much memory, counted while real PyTorch code runs on fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_operator.sizing.tensors import BLOCK_BYTES, Event

#: What a CUDA kernel does instead of the operation's own meaning, by operation.
Kernels = dict[Any, Callable[..., Any]]


class Ledger(TorchDispatchMode):
    """Every storage that lives, from the operation that made it to the moment when nothing refers to it.

    `kernels` replace operations whose CUDA kernel allocates otherwise than the CPU's, or that need values, which fake
    tensors do not have. Sizes are rounded as PyTorch's allocator rounds them.
    """

    NOTED = 1.01

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.held_bytes = 0
        self.peak_bytes = 0
        self.events: list[Event] = []
        #: What lived at the peak or within a percent of it, by the operation that made it.
        self.at_peak: Counter[str] = Counter()
        self._noted_bytes = 0.0
        self._live: dict[int, tuple[Any, int, int, str]] = {}
        self._allocations = 0
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Ledger:
        if self._resize is torch.UntypedStorage.resize_:
            ledger = self

            def resize_(self: torch.UntypedStorage, size: int) -> Any:
                ledger._released(self._cdata)
                result = ledger._resize(self, size)
                ledger._count(self, "resize")
                return result

            torch.UntypedStorage.resize_ = resize_  # FSDP frees and fills its gathered weights so
        return super().__enter__()

    def close(self) -> None:
        """Let PyTorch be as it was."""
        torch.UntypedStorage.resize_ = self._resize
        for reference, *_ in self._live.values():
            del reference
        self._live.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again for the shard
        if func is torch.ops.aten.add.Tensor and _gathers_gradients():
            return args[0]
        kernel = self.kernels.get(func)
        if kernel is not None:
            with self:
                return kernel(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), str(func))
        return result

    def hold(self, tensor: torch.Tensor, name: str) -> None:
        """Count a tensor that was made elsewhere."""
        self._count(tensor.untyped_storage(), name)

    def watch_from_here(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.held_bytes
        self._noted_bytes = 0.0

    def _count(self, storage: torch.UntypedStorage, name: str) -> None:
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        if not size:
            return
        self._allocations += 1
        reference = weakref.ref(storage, lambda _: self._released(key))
        self._live[key] = reference, size, self._allocations, f"{name} {size}"
        self.events.append(Event(self._allocations, size))
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        if self.held_bytes > self.NOTED * self._noted_bytes:
            self._noted_bytes = self.held_bytes
            self.at_peak.clear()
            for _, held, _, made_by in self._live.values():
                self.at_peak[made_by] += held

    def _released(self, key: int) -> None:
        if entry := self._live.pop(key, None):
            _, size, number, _ = entry
            self.events.append(Event(number, None))
            self.held_bytes -= size


def _gathers_gradients() -> bool:
    """Whether autograd adds two gradients of the same tensor, which it does in place but for subclasses of tensors.

    input_buffer.cpp, can_accumulate_inplace; a layer that is recomputed meanwhile runs with gradients enabled.
    """
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
