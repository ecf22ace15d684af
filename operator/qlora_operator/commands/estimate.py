"""`kubectl qlora estimate`: predicted memory of a model's training, with no cluster and no job."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from qlora_api.exchange import ModelShape, Recipe
from qlora_api.v1alpha1 import JobSpec, MemoryPlan, Method
from qlora_api.v1alpha1.fields import Attention, Offload, Optimizer
from qlora_operator.commands.documents import as_text
from qlora_operator.commands.numbers import whole
from qlora_operator.commands.refusals import BadInput
from qlora_operator.commands.shown import WIDTH, memory_plan, needed_bytes, say, show_memory
from qlora_operator.planner import Unfit, recipes, sharded
from qlora_operator.sizing.cases import Compared, compare, median_abs_error, worst_abs_error
from qlora_operator.sizing.catalogue import shape_of_model
from qlora_operator.sizing.memory import GIB, training_memory

#: Columns of the table of measured trainings where there is no terminal to ask.
CASES_WIDTH = 140
HELP = """\
Predict GPU memory, with no cluster and no network.

With MODEL, what the default recipe takes on each GPU, item by item, for LoRA and for QLoRA. MODEL is one of the
catalogue (meta-llama/Llama-3.1-8B), or the path of a config.json or of its directory. Several may be given.
With --sweep, the totals for each of several values: seqLen=2k,4k,8k, rank=8,64 or microBatch=1,2,4.
With --cases, the prediction beside trainings that were measured: one line each, then the median and the worst error.
The columns of that table: docs/sizing.md. Numbers may be written with k: 4k is 4096.

exit codes:
  0    predicted
  2    the model is not known, or the table cannot be read; the message says what to give
"""


@dataclass(frozen=True)
class Knobs:
    """What can be turned; all else is the default recipe."""

    max_length: int = 4096
    micro_batch_size: int = 1
    rank: int = 16
    gpus: int = 1
    method: Method | None = None
    attention: str | None = None
    optimizer: str | None = None
    offload: str = "none"


@dataclass(frozen=True)
class Estimate:
    """What one method of training takes on each GPU."""

    recipe: Recipe
    memory: MemoryPlan
    notes: tuple[str, ...] = ()

    @property
    def needed_bytes(self) -> int:
        """What a GPU must have for it."""
        return needed_bytes(self.memory)


def declare(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.description = HELP
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="*", help="a model of the catalogue, a config.json or its directory")
    add("--seq-len", type=whole, default=Knobs.max_length, help="tokens per sequence (default: 4096)")
    add("--micro-batch", type=whole, default=Knobs.micro_batch_size, help="sequences at a time (default: 1)")
    add("--rank", type=whole, default=Knobs.rank, help="of the adapter (default: 16)")
    add("--gpus", type=whole, default=Knobs.gpus, metavar="N", help="sharded over so many GPUs (default: 1)")
    add("--method", choices=["lora", "qlora"], help="one of both alone")
    add("--attention", choices=get_args(Attention), help="the attention kernel (default: sdpa)")
    add("--optimizer", choices=get_args(Optimizer), help="default: paged_adamw_8bit; sharded, adamw_torch_fused")
    add("--offload", choices=get_args(Offload), default=Knobs.offload, help="to host memory (default: none)")
    add("--sweep", metavar="KNOB=VALUES", help="totals for several values: seqLen=2k,4k,8k, rank=… or microBatch=…")
    add("--plot", metavar="FILE.png", type=Path, help="with --sweep: draw them, beside what GPUs have")
    add("--cases", metavar="FILE.csv", type=Path, help="trainings that were measured")
    add("--models", metavar="DIR", type=Path, help="with --cases: their config.json, by name")
    add("-o", "--output", choices=["json", "yaml"], help="for machines, instead of a table")


def run(chosen: argparse.Namespace) -> int:
    """Predict, and show it."""
    if bool(chosen.model) == bool(chosen.cases) or bool(chosen.cases) != bool(chosen.models):
        raise BadInput("give either MODEL, or --cases with --models")
    if chosen.plot and not chosen.sweep:
        raise BadInput("--plot draws what --sweep goes through: give --sweep too, such as seqLen=2k,4k,8k")
    try:
        if chosen.cases:
            _cases(chosen)
        elif chosen.sweep:
            from qlora_operator.commands import sweep

            sweep.run(chosen, knobs(chosen))
        else:
            _models(chosen)
    except ValueError as error:
        raise BadInput(str(error)) from error
    return 0


def knobs(chosen: argparse.Namespace) -> Knobs:
    """The knobs as they were given."""
    return Knobs(
        max_length=chosen.seq_len,
        micro_batch_size=chosen.micro_batch,
        rank=chosen.rank,
        gpus=chosen.gpus,
        method=chosen.method,
        attention=chosen.attention,
        optimizer=chosen.optimizer,
        offload=chosen.offload,
    )


def estimates(shape: ModelShape, given: Knobs) -> list[Estimate]:
    """The recipe's memory with each method, or with the one that is asked for.

    Raises ValueError for a sequence that is longer than the model takes.
    """
    spec = JobSpec.model_validate(
        {
            "model": {"uri": "hf://owner/name"},
            "dataset": {"train": [{"uri": "hf://owner/name"}]},
            "output": {"uri": "pvc://claim/path"},
            "lora": {"rank": given.rank},
            "training": {"attention": given.attention, "optimizer": given.optimizer, "offload": given.offload},
            "method": given.method,
        }
    )
    found = recipes(spec, shape, max_length=given.max_length, loss="all")
    if isinstance(found, Unfit):
        raise ValueError(found.message)
    if given.gpus > 1:
        found = sharded(found, given.optimizer)
    if not found:
        raise ValueError(f"--optimizer {given.optimizer} cannot step weights that --gpus {given.gpus} share")
    headroom = spec.hardware.headroom_percent
    return [
        Estimate(
            recipe,
            memory_plan([(item.name, item.bytes) for item in memory.items], headroom_percent=headroom),
            memory.notes,
        )
        for recipe in found
        for memory in [training_memory(shape, recipe, micro_batch_size=given.micro_batch_size, gpus=given.gpus)]
    ]


def _models(chosen: argparse.Namespace) -> None:
    given = knobs(chosen)
    shapes = {model: shape_of_model(model) for model in chosen.model}
    found = {model: estimates(shape, given) for model, shape in shapes.items()}
    if chosen.output:
        documents = [_as_document(model, shapes[model], each, given) for model, each in found.items()]
        sys.stdout.write(as_text(documents[0] if len(documents) == 1 else documents, chosen.output))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    for number, (model, each) in enumerate((model, each) for model, every in found.items() for each in every):
        if number:
            console.print()
        gpus = "one GPU" if given.gpus == 1 else f"each of {given.gpus} GPUs"
        say(console, f"{model}: {each.recipe.method} on {gpus}", "bold")
        show_memory(each.memory, console, of=gpus)
        for note in each.notes:
            say(console, f"note: {note}")


def _as_document(model: str, shape: ModelShape, found: list[Estimate], given: Knobs) -> dict[str, Any]:
    """For machines; bytes of one GPU."""
    return {
        "model": model,
        "parameters": shape.parameters,
        "maxLength": given.max_length,
        "microBatchSize": given.micro_batch_size,
        "rank": given.rank,
        "gpus": given.gpus,
        "methods": [
            {
                "method": each.recipe.method,
                "neededBytes": each.needed_bytes,
                **each.memory.to_api(),
                "notes": list(each.notes),
            }
            for each in found
        ],
    }


def _cases(chosen: argparse.Namespace) -> None:
    compared = compare(chosen.cases, chosen.models)
    if chosen.output:
        document = {
            "rows": [row.as_json() for row in compared],
            "medianAbsError": round(median_abs_error(compared), 4),
            "worstAbsError": round(worst_abs_error(compared), 4),
        }
        sys.stdout.write(as_text(document, chosen.output))
    else:
        show_cases(compared, Console(highlight=False, width=None if sys.stdout.isatty() else CASES_WIDTH))


def show_cases(compared: list[Compared], console: Console) -> None:
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
