"""Numbers as people write them on the command line."""

from __future__ import annotations

import argparse
import re


def whole(text: str) -> int:
    """A whole number from 1, of which k stands for 1024: 4k is 4096. Raises ArgumentTypeError saying what to write."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})([kK]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1, such as 4096 or 4k")
    return int(match[1]) * (1024 if match[2] else 1)
