"""NVIDIA's GPUs by the name that their label has: `products.json`, for nodes that have no label with the memory.

Memory is in MiB as drivers since R525 report it, which is what the label would have: less than the name says where ECC
keeps a part of it (a card of 48 GB has 46068), never more. `source` names where the figure was seen.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Product:
    """A GPU as a whole. `compute` is CUDA's compute capability."""

    memory_mib: int
    compute: tuple[int, int]
    source: str


@cache
def products() -> dict[str, Product]:
    """Every known product, by the value of its label nvidia.com/gpu.product."""
    document = json.loads(files("qlora_operator.placement").joinpath("products.json").read_text(encoding="utf-8"))
    return {
        entry["product"]: Product(
            entry["memoryMiB"], (entry["compute"][0], entry["compute"][1]), document["sources"][entry["source"]]
        )
        for entry in document["products"]
    }
