"""`kubectl qlora estimate`: predicted memory, shown to people and to machines."""

from __future__ import annotations

import json
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from qlora_api.exchange import ModelShape, Recipe
from qlora_api.v1alpha1 import JobSpec, Method
from qlora_operator.placement.choice import with_headroom
from qlora_operator.planner import Unfit, recipes
from qlora_operator.sizing.cases import Compared, median_abs_error, worst_abs_error
from qlora_operator.sizing.memory import GIB, Memory, training_memory

#: Columns of the table where there is no terminal to ask.
WIDTH = 140
#: Characters of a bar that stands for all of the memory.
BAR = 60


@dataclass(frozen=True)
class Estimate:
    """What one method of training takes on one GPU."""

    recipe: Recipe
    memory: Memory
    headroom_percent: int

    @property
    def needed_bytes(self) -> int:
        """What a GPU must have for it."""
        return with_headroom(self.memory.total_bytes, self.headroom_percent)


def estimates(
    shape: ModelShape, *, max_length: int, micro_batch_size: int, rank: int, method: Method | None
) -> list[Estimate]:
    """The default recipe's memory with each method, or with the one that is asked for.

    Raises ValueError for a sequence that is longer than the model takes.
    """
    spec = JobSpec.model_validate(
        {
            "model": {"uri": "hf://owner/name"},
            "dataset": {"train": [{"uri": "hf://owner/name"}]},
            "output": {"uri": "pvc://claim/path"},
            "lora": {"rank": rank},
            **({"method": method} if method else {}),
        }
    )
    found = recipes(spec, shape, max_length=max_length, loss="all")
    if isinstance(found, Unfit):
        raise ValueError(found.message)
    headroom = spec.hardware.headroom_percent
    return [
        Estimate(recipe, training_memory(shape, recipe, micro_batch_size=micro_batch_size), headroom)
        for recipe in found
    ]


def show_estimates(found: list[Estimate], console: Console) -> None:
    """What fills the memory, item by item with a bar, and what a GPU must have."""
    for estimate in found:
        total = estimate.memory.total_bytes
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        for item in sorted(estimate.memory.items, key=lambda item: -item.bytes):
            table.add_row(item.name, f"{item.bytes / GIB:.2f}", "█" * round(BAR * item.bytes / total))
        console.print(f"{estimate.recipe.method}: {total / GIB:.1f} GiB on one GPU")
        console.print(table)
        for note in estimate.memory.notes:
            console.print(f"note: {note}")
        need = estimate.needed_bytes / GIB
        console.print(f"needs a GPU of {need:.1f} GiB with {estimate.headroom_percent} % headroom\n")


def estimates_as_json(model: str, shape: ModelShape, found: list[Estimate], micro_batch_size: int) -> str:
    """The same for machines; bytes."""
    document = {
        "model": model,
        "parameters": shape.parameters,
        "maxLength": found[0].recipe.max_length,
        "microBatchSize": micro_batch_size,
        "rank": found[0].recipe.rank,
        "methods": [
            {
                "method": estimate.recipe.method,
                "totalBytes": estimate.memory.total_bytes,
                "items": [{"name": item.name, "bytes": item.bytes} for item in estimate.memory.items],
                "notes": list(estimate.memory.notes),
            }
            for estimate in found
        ],
    }
    return json.dumps(document, indent=2)


def as_json(compared: list[Compared]) -> str:
    """The comparison for machines; errors are fractions."""
    document = {
        "rows": [row.as_json() for row in compared],
        "medianAbsError": round(median_abs_error(compared), 4),
        "worstAbsError": round(worst_abs_error(compared), 4),
    }
    return json.dumps(document, indent=2)


def show(compared: list[Compared], console: Console) -> None:
    """The comparison for people: a line per case, then the median and the worst error."""
    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("MODEL", "METHOD", "ATTENTION"):
        table.add_column(column, no_wrap=True)
    for column in ("GPUS", "TOKENS", "PREDICTED", "MEASURED", "ERROR"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("MEASURE", no_wrap=True)
    for row in compared:
        case = row.case
        table.add_row(
            case.model,
            case.method,
            case.attention,
            str(case.gpus),
            f"{case.micro_batch}×{case.seq_len}",
            f"{row.predicted_bytes / GIB:.2f}",
            f"{case.measured_gib:.2f}",
            f"{row.error:+.1%}",
            case.measure,
        )
    console.print(table)
    console.print(f"median error {median_abs_error(compared):.1%}, worst {worst_abs_error(compared):.1%}; GiB per GPU")
