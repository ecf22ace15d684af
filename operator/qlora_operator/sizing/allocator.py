"""PyTorch's caching allocator for GPU memory, as arithmetic: what is reserved for a given order of allocations.

The rules are those of c10/cuda/CUDACachingAllocator (PyTorch 2.x): small requests are served from
segments of 2 MiB, others from segments of 20 MiB or of their own size; a request takes the smallest free block that is
large enough and leaves the rest as a block of its own; neighbours that are free become one. Memory goes back to the
driver when the program says so (torch.cuda.empty_cache), and when it has run out, which is not modelled: a plan must
fit without that.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from qlora_operator.sizing.tensors import BLOCK_BYTES, CACHE_RELEASED, Event

MIB = 1024**2
#: kSmallSize, kSmallBuffer, kMinLargeAlloc, kLargeBuffer and kRoundLarge of the allocator.
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_REQUEST = 10 * MIB
LARGE_SEGMENT = 20 * MIB
SEGMENT_ROUNDING = 2 * MIB


class _Block:
    """A piece of a segment: free or not, with its neighbours in the same segment."""

    __slots__ = ("address", "after", "before", "free", "size")

    def __init__(self, address: int, size: int, before: _Block | None = None, after: _Block | None = None) -> None:
        self.address, self.size, self.before, self.after, self.free = address, size, before, after, False


class _Pool:
    """The free blocks of one kind, the smallest first; among equals the one at the lowest address."""

    def __init__(self) -> None:
        self._free: list[tuple[int, int, _Block]] = []
        self.last: _Block | None = None

    def put(self, block: _Block) -> None:
        block.free = True
        insort(self._free, (block.size, block.address, block))

    def take(self, block: _Block) -> None:
        self._free.pop(bisect_left(self._free, (block.size, block.address)))
        block.free = False

    def given_back(self) -> int:
        """Bytes of the segments that nothing is in, which are no more."""
        empty = [block for _, _, block in self._free if block.before is None and block.after is None]
        for block in empty:
            self.take(block)
        if self.last in empty:
            self.last = None
        return sum(block.size for block in empty)

    def best(self, size: int) -> _Block | None:
        index = bisect_left(self._free, (size,))
        return self._free[index][2] if index < len(self._free) else None


def peak_reserved_bytes(events: Iterable[Event], *, expandable: bool = False) -> int:
    """Bytes that the allocator has reserved after `events`: the most since it last gave some back.

    Each stream has memory of its own.

    `expandable`: one segment per pool that grows at its end (`PYTORCH_ALLOC_CONF=expandable_segments:True`).
    """
    pools: dict[tuple[int, bool], _Pool] = {}
    held: dict[int, tuple[_Block, _Pool]] = {}
    reserved = addresses = 0
    for event in events:
        number, size, stream = event
        if event == CACHE_RELEASED:
            reserved -= sum(pool.given_back() for pool in pools.values())
            continue
        if size is None:
            block, pool = held.pop(number)
            _release(block, pool)
            continue
        small = size <= SMALL_REQUEST
        pool = pools.setdefault((stream, small), _Pool())
        block = pool.best(size)
        if block is not None:
            pool.take(block)
        else:
            block, grown = _grown(pool, size, addresses, expandable=expandable)
            reserved, addresses = reserved + grown, addresses + grown
        _split(block, size, pool, at_least=BLOCK_BYTES if small or expandable else SMALL_REQUEST + 1)
        held[number] = block, pool
    return reserved


def _segment_bytes(size: int) -> int:
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < LARGE_REQUEST:
        return LARGE_SEGMENT
    return -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING


def _grown(pool: _Pool, size: int, address: int, *, expandable: bool) -> tuple[_Block, int]:
    """A block for `size` from new memory, and how much of that there is."""
    if not expandable:
        segment = _segment_bytes(size)
        return _Block(address, segment), segment
    unit = SMALL_SEGMENT if size <= SMALL_REQUEST else LARGE_SEGMENT
    last = pool.last
    if last is not None and last.free:
        more = -(-(size - last.size) // unit) * unit
        pool.take(last)
        last.size += more
        return last, more
    more = -(-size // unit) * unit
    block = _Block(0 if last is None else last.address + last.size, more, before=last)
    if last is not None:
        last.after = block
    pool.last = block
    return block, more


def _split(block: _Block, size: int, pool: _Pool, *, at_least: int) -> None:
    """Cut `block` to `size`, if what is left is worth a block."""
    if block.size - size < at_least:
        return
    rest = _Block(block.address + size, block.size - size, before=block, after=block.after)
    if block.after:
        block.after.before = rest
    block.after, block.size = rest, size
    if pool.last is block:
        pool.last = rest
    pool.put(rest)


def _release(block: _Block, pool: _Pool) -> None:
    """Give `block` back, joined with the neighbours that are free."""
    after, before = block.after, block.before
    if after is not None and after.free:
        pool.take(after)
        _join(block, after, pool)
    if before is not None and before.free:
        pool.take(before)
        _join(before, block, pool)
        block = before
    pool.put(block)


def _join(first: _Block, second: _Block, pool: _Pool) -> None:
    first.size += second.size
    first.after = second.after
    if second.after:
        second.after.before = first
    if pool.last is second:
        pool.last = first
