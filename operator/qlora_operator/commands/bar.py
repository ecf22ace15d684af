"""GPU memory as one bar: each use a stretch of its own letter, then the headroom, then what stays free."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from string import ascii_uppercase

from rich.table import Table
from rich.text import Text

from qlora_api.v1alpha1 import MemoryItem

GIB = 1024**3
#: Characters of a whole bar.
WIDTH = 72
HEADROOM, FREE, MEASURED = "░", "·", "▒"
#: Neighbours differ in lightness too, for those who see few colours; the letters say the same without any.
COLOURS = (
    "black on #4e9bd6",
    "black on #f2c14e",
    "black on #6cbf84",
    "black on #f78154",
    "white on #5b507a",
    "black on #d4a5c9",
    "white on #33658a",
    "black on #c5d86d",
    "white on #8a3033",
    "black on #9fd8df",
    "white on #555555",
    "black on #cfcfcf",
)


def largest_first(items: Sequence[MemoryItem]) -> list[MemoryItem]:
    """The order of bar and legend."""
    return sorted(items, key=lambda item: -item.bytes)


def bar(items: Sequence[MemoryItem], *, whole_bytes: int, headroom_bytes: int = 0) -> Text:
    """`WIDTH` characters that stand for `whole_bytes`. What is more than fits is cut off."""
    parts = [(_letter(n), _colour(n), item.bytes) for n, item in enumerate(largest_first(items))]
    parts.append((HEADROOM, "", headroom_bytes))
    ends = [min(WIDTH, round(WIDTH * end / whole_bytes)) for end in accumulate(size for _, _, size in parts)]
    text, start = Text("", no_wrap=True), 0
    for (character, colour, _), end in zip(parts, ends, strict=True):
        text.append(character * (end - start), colour)
        start = end
    return text.append(FREE * (WIDTH - start), "dim")


def measured_bar(measured_bytes: int, *, whole_bytes: int) -> Text:
    """The same length for what was measured, which has no items."""
    end = min(WIDTH, round(WIDTH * measured_bytes / whole_bytes))
    return Text(MEASURED * end, no_wrap=True).append(FREE * (WIDTH - end), "dim")


def legend(items: Sequence[MemoryItem], *, headroom_bytes: int = 0, free_bytes: int = 0) -> Table:
    """Letter, use, GiB and share of the sum, the largest first; then headroom and what stays free."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    total = sum(item.bytes for item in items)
    for number, item in enumerate(largest_first(items)):
        share = f"{100 * item.bytes / total:.0f} %"
        table.add_row(Text(_letter(number), _colour(number)), item.name, f"{item.bytes / GIB:.2f}", share)
    if headroom_bytes:
        table.add_row(HEADROOM, "headroom", f"{headroom_bytes / GIB:.2f}", "")
    if free_bytes > 0:
        table.add_row(FREE, "free", f"{free_bytes / GIB:.2f}", "")
    return table


def _letter(number: int) -> str:
    return ascii_uppercase[number % len(ascii_uppercase)]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
