"""Tensors that have a size and a lifetime, and nothing else: enough to know what a program holds at any moment.

A program written with them reads like the PyTorch it stands for, and Python's reference counts free them where PyTorch
frees the real ones. `Trace` writes down each allocation and each release; `Tape` does what autograd does to memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

#: PyTorch hands out memory in multiples of this (kMinBlockSize, c10/cuda/CUDACachingAllocator).
BLOCK_BYTES = 512


class Event(NamedTuple):
    """An allocation of so many bytes on a stream of the GPU, or the release of an earlier one (bytes None)."""

    number: int
    bytes: int | None
    stream: int = 0


#: torch.cuda.empty_cache(): memory that nothing is in goes back to the driver.
CACHE_RELEASED = Event(0, None)


class Trace:
    """What is allocated now, by what it is for, and every allocation and release so far, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.held: Counter[str] = Counter()
        self.held_bytes = 0
        self.peak_bytes = 0
        #: What was held, by purpose, when the most was.
        self.at_peak: dict[str, int] = {}
        self._allocations = 0

    def watch_from_here(self) -> None:
        """Forget the peak so far, as torch.cuda.reset_peak_memory_stats does."""
        self.peak_bytes, self.at_peak = self.held_bytes, dict(self.held)

    def release_cache(self) -> None:
        """As torch.cuda.empty_cache."""
        self.events.append(CACHE_RELEASED)

    def new(self, size_bytes: int, purpose: str, *, stream: int = 0) -> Storage:
        """Memory for `size_bytes` bytes; released when nothing refers to it any more."""
        return Storage(self, size_bytes, purpose, stream)

    def _allocate(self, size_bytes: int, purpose: str, stream: int) -> int:
        self._allocations += 1
        self.events.append(Event(self._allocations, size_bytes, stream))
        self.held_bytes += size_bytes
        self.held[purpose] += size_bytes
        if self.held_bytes > self.peak_bytes:
            self.watch_from_here()
        return self._allocations

    def _release(self, storage: Storage) -> None:
        self.events.append(Event(storage.number, None))
        self.held_bytes -= storage.bytes
        self.held[storage.purpose] -= storage.bytes


class Storage:
    """A piece of memory, for as long as something refers to it."""

    __slots__ = ("bytes", "number", "purpose", "trace")

    def __init__(self, trace: Trace, size_bytes: int, purpose: str, stream: int) -> None:
        self.trace, self.purpose = trace, purpose
        self.bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self.number = trace._allocate(self.bytes, purpose, stream)

    def hold_as(self, purpose: str) -> None:
        """Keep it for another purpose than it was made for."""
        self.trace.held[self.purpose] -= self.bytes
        self.trace.held[purpose] += self.bytes
        self.purpose = purpose

    def __del__(self) -> None:
        self.trace._release(self)


@dataclass(slots=True)
class Tensor:
    """`elements` values of `itemsize` bytes; `key` is how gradients find it."""

    storage: Storage
    elements: int
    itemsize: int
    key: int


@dataclass(frozen=True, slots=True)
class Into:
    """Where the gradient of an operation goes.

    `size_bytes` None: the incoming gradient is handed on as it is. `scratch` are bytes used meanwhile, one by one.
    """

    key: int
    size_bytes: int | None
    scratch: tuple[int, ...] = ()


class _Recomputed(Exception):
    """All that backward needs is there: the rest of a checkpointed layer is not run again."""


@dataclass(slots=True)
class _Node:
    out: tuple[int, ...]
    purpose: str
    into: Sequence[Into]
    #: How many tensors it keeps, and those that are there: none before a checkpointed layer is run again.
    saves: int
    saved: list[Storage]
    weights: Sequence[int]


@dataclass(slots=True)
class Tape:
    """Operations on tensors, and what their backward holds and needs.

    The tape of a `checkpointed` layer keeps no tensors. When the first of them is needed, `again` runs the layer once
    more, up to the last that it keeps (torch.utils.checkpoint with use_reentrant=False, which stops early).
    `gradients` are those of the weights, which stay until the optimizer has used them.
    """

    trace: Trace
    checkpointed: bool = False
    gradients: list[Storage] = field(default_factory=list)
    again: Callable[[Tape], object] | None = None
    _nodes: list[_Node] = field(default_factory=list)
    _keys: int = 0
    _filling: list[_Node] | None = None
    _kept: int = 0

    def tensor(self, storage: Storage, elements: int, itemsize: int) -> Tensor:
        """A tensor that lives in `storage`."""
        self._keys += 1
        return Tensor(storage, elements, itemsize, self._keys)

    def op(
        self,
        purpose: str,
        elements: int,
        itemsize: int,
        into: Sequence[Into],
        *,
        saves: Sequence[Tensor] = (),
        saves_output: bool = False,
        scratch: int = 0,
        weights: Sequence[int] = (),
    ) -> Tensor:
        """The output of an operation that takes `scratch` bytes while it runs and keeps `saves` for its backward.

        `weights` are the bytes of the gradients of the weights that it trains.
        """
        saved = self._record(purpose, into, len(saves) + saves_output, weights)
        self._keep(saved, [tensor.storage for tensor in saves])
        used = self.trace.new(scratch, purpose) if scratch else None
        out = self.tensor(self.trace.new(elements * itemsize, purpose), elements, itemsize)
        del used
        if saves_output:
            self._keep(saved, [out.storage])
        return out

    def _record(
        self, purpose: str, into: Sequence[Into], saves: int, weights: Sequence[int], outputs: int = 1
    ) -> list[Storage]:
        """Write an operation down whose outputs come next; where to put what it keeps."""
        if self._filling is not None:
            return self._filling.pop().saved
        keys = tuple(range(self._keys + 1, self._keys + 1 + outputs))
        self._nodes.append(_Node(keys, purpose, into, saves, [], weights))
        return self._nodes[-1].saved

    def _keep(self, saved: list[Storage], storages: Sequence[Storage]) -> None:
        if self.checkpointed:
            return
        saved += storages
        self._kept -= len(storages)
        if storages and self._filling is not None and not self._kept:
            raise _Recomputed

    def split(self, purpose: str, whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Views of `whole` with so many elements each; backward puts their gradients together again."""
        into = [Into(whole.key, whole.elements * whole.itemsize)]
        self._record(purpose, into, 0, (), outputs=len(sizes))
        return [self.tensor(whole.storage, size, whole.itemsize) for size in sizes]

    def _fill(self, nodes: list[_Node], again: Callable[[Tape], object]) -> None:
        """Make what the operations of a checkpointed layer keep."""
        second = Tape(self.trace, _filling=nodes[::-1], _kept=sum(node.saves for node in nodes))
        with suppress(_Recomputed):
            again(second)

    def backward(self, gradients: dict[int, Storage]) -> None:
        """Run the recorded operations backwards from `gradients`, by the key of what they are of.

        Each is used up; what is left in it then are the gradients that reached no operation.
        """
        recomputed = False
        while self._nodes:
            node = self._nodes.pop()
            incoming = [gradients.pop(key) for key in node.out if key in gradients]
            if not incoming:
                continue
            if node.saves and self.again and not recomputed:
                self._fill([*self._nodes, node], self.again)
                recomputed = True
            for size in node.weights:
                self.gradients.append(self.trace.new(size, "adapter gradients"))
            pieces = []
            for into in node.into:
                scratch = [self.trace.new(size, node.purpose) for size in into.scratch]
                size = into.size_bytes
                pieces.append(incoming[0] if size is None else self.trace.new(size, node.purpose))
                scratch.clear()
            if self.again:  # handed out once: whoever asked for it has the last reference
                node.saved.clear()
            incoming.clear()
            node.saved.clear()
            for into in reversed(node.into):
                gradients.setdefault(into.key, pieces.pop())  # a second gradient is added in place
