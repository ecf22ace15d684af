"""The sizes that people quote for QLoRA, beside what the plan says, in docs/sizing.md (`make generate` writes it)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from qlora_api.exchange import ModelShape, Recipe
from qlora_operator import planner
from qlora_operator.placement.choice import with_headroom
from qlora_operator.sizing.catalogue import shape_of_model
from qlora_operator.sizing.memory import (
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    our_training,
    peak_of,
    training_memory,
)
from qlora_operator.sizing.training import decoder_of
from tests.cluster.settings import REPOSITORY
from tests.unit.operator import given

PAGE = REPOSITORY / "docs" / "sizing.md"
BEGIN, END = "<!-- known sizes: written by `make generate` -->\n", "<!-- end of known sizes -->"
#: Model, GPUs, and gigabytes over all of them as they are quoted: QLoRA, rank 32, 4,096 tokens.
QUOTED: list[tuple[str, int, tuple[int, int]]] = [
    ("meta-llama/Llama-2-7b-hf", 1, (12, 15)),
    ("meta-llama/Llama-2-13b-hf", 1, (15, 20)),
    ("codellama/CodeLlama-34b-hf", 1, (28, 35)),
    ("meta-llama/Llama-3.1-70B", 1, (55, 70)),
    ("mistralai/Mixtral-8x22B-v0.1", 4, (95, 110)),
    ("meta-llama/Llama-3.1-405B", 4, (250, 280)),
    ("meta-llama/Llama-3.1-405B", 2, (250, 280)),
]
#: A GPU's memory as its driver tells it, in MiB.
H100, H200 = 81559, 143771
LONG = 131072


def recipe(shape: ModelShape, tokens: int, **edits: Any) -> Recipe:
    spec = given.job({"method": "qlora", "lora.rank": 32, **edits}).spec
    found = planner.recipes(spec, shape, max_length=tokens, loss="all")
    assert isinstance(found, list), found
    return found[0]


def gib(size: float) -> str:
    return f"{size / GIB:.0f}"


def quoted_rows() -> list[str]:
    rows = [
        "| model | GPUs | quoted, GB in all | 1×4096 a GPU | 4×4096 a GPU | in all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, gpus, (least, most) in QUOTED:
        shape = shape_of_model(name)
        one, four = (
            training_memory(shape, recipe(shape, 4096), micro_batch_size=size, gpus=gpus).total_bytes for size in (1, 4)
        )
        in_all = f"{gib(gpus * one)} to {gib(gpus * four)}"
        rows.append(f"| {name} | {gpus} | {least}–{most} | {gib(one)} | {gib(four)} | {in_all} |")
    return rows


def sum_rows() -> list[str]:
    """405B on four GPUs, item by item, as it comes and with checkpoints or weights in host memory."""
    shape = shape_of_model("meta-llama/Llama-3.1-405B")
    columns = [
        training_memory(shape, recipe(shape, 4096, **{"training.offload": offload}), micro_batch_size=1, gpus=4)
        for offload in ("none", "activations", "parameters")
    ]
    names = list(dict.fromkeys(item.name for memory in columns for item in memory.items))
    rows = ["| item | none | activations | parameters |", "|---|---:|---:|---:|"]
    for name in names:
        found = [next((item.bytes for item in memory.items if item.name == name), 0) for memory in columns]
        rows.append(f"| {name} | " + " | ".join(f"{size / GIB:.1f}" for size in found) + " |")
    rows.append("| **sum** | " + " | ".join(f"**{memory.total_bytes / GIB:.1f}**" for memory in columns) + " |")
    needed = (with_headroom(memory.total_bytes, 15) / GIB for memory in columns)
    rows.append("| with 15 % headroom | " + " | ".join(f"{size:.1f}" for size in needed) + " |")
    return rows


def long_needed(shape: ModelShape, gpus: int, *, loss: Literal["logits", "tiles"] = "tiles", offload: str) -> int:
    """Bytes with headroom at 128k tokens with an attention that writes out no scores and needs no mask."""
    long = recipe(shape, LONG, **{"training.attention": "flash_attention_2", "training.offload": offload})
    training = replace(our_training(decoder_of(shape), long, 1, gpus), loss=loss)
    return with_headroom(int(peak_of(training).bytes * (1 + FRAGMENTATION)) + CUDA_CONTEXT_BYTES, 15)


def long_rows() -> list[str]:
    rows = [
        "| model | GPUs | sdpa | flash, whole logits | flash | and activations offloaded | fits |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, gpus in (
        ("meta-llama/Llama-3.1-8B", 1),
        ("meta-llama/Llama-3.1-70B", 1),
        ("meta-llama/Llama-3.1-70B", 8),
        ("meta-llama/Llama-3.1-405B", 16),
    ):
        shape = shape_of_model(name)
        sdpa = training_memory(shape, recipe(shape, LONG), micro_batch_size=1, gpus=gpus).total_bytes
        ways = [
            long_needed(shape, gpus, loss="logits", offload="none"),
            long_needed(shape, gpus, offload="none"),
            long_needed(shape, gpus, offload="activations"),
        ]
        limits = {"H100": H100 * 1024**2, "H200": H200 * 1024**2}
        fits = [f"{card}: {_first(ways[1:], limit)}" for card, limit in limits.items()]
        figures = " | ".join(gib(size) for size in (with_headroom(sdpa, 15), *ways))
        rows.append(f"| {name} | {gpus} | {figures} | {', '.join(fits)} |")
    return rows


def _first(ways: list[int], limit: int) -> str:
    names = ("flash", "with offloading, too")
    return next((name for name, size in zip(names, ways, strict=True) if size <= limit), "no")


def section() -> str:
    parts = ("\n".join(rows) for rows in (quoted_rows(), sum_rows(), long_rows()))
    quoted, summed, long = parts
    return (
        f"{quoted}\n\nLlama 3.1 405B on four GPUs at 1×4096, GiB a GPU, by `training.offload`:\n\n{summed}\n\n"
        f"With 131,072 tokens, GiB a GPU that are needed with 15 % headroom:\n\n{long}\n"
    )


def page() -> str:
    head, rest = PAGE.read_text().split(BEGIN)
    return f"{head}{BEGIN}{section()}{rest[rest.index(END) :]}"


def test_the_page_has_the_sizes_as_they_are() -> None:
    assert PAGE.read_text() == page(), "run: make generate"


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-2-13b-hf", "codellama/CodeLlama-34b-hf", "meta-llama/Llama-3.1-70B"]
)
def test_what_is_quoted_for_dense_models_lies_within_what_micro_batches_make_of_it(name: str) -> None:
    shape = shape_of_model(name)
    [(least, most)] = [quoted for model, _, quoted in QUOTED if model == name]
    one, eight = (
        training_memory(shape, recipe(shape, 4096), micro_batch_size=size).total_bytes / 1e9 for size in (1, 8)
    )
    assert one <= most
    assert eight >= least


if __name__ == "__main__":
    PAGE.write_text(page())
