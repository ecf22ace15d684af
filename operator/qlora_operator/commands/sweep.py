"""`kubectl qlora estimate --sweep`: memory against one knob, as a table, a document or a chart."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_operator.commands.documents import as_text
from qlora_operator.commands.estimate import Estimate, Knobs, estimates
from qlora_operator.commands.nodes import NVIDIA_NAMES
from qlora_operator.commands.numbers import whole
from qlora_operator.commands.refusals import BadInput
from qlora_operator.commands.shown import WIDTH, say
from qlora_operator.placement.products import products
from qlora_operator.sizing.catalogue import shape_of_model
from qlora_operator.sizing.memory import GIB

MIB = 1024**2
#: What can be swept, as the spec names it, and the knob.
SWEPT = {"seqLen": "max_length", "rank": "rank", "microBatch": "micro_batch_size"}
#: What they count, on the chart's axis.
AXES = {"seqLen": "tokens per sequence", "rank": "rank of the adapter", "microBatch": "sequences per micro-batch"}
#: One card of each common size, by the size that it is sold as.
CARDS = {"L4": 24, "L40S": 48, "H100-80": 80, "H200": 141}


@dataclass(frozen=True)
class Sweep:
    """One knob and the values it takes."""

    knob: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Curve:
    """One model by one method: an estimate for each value."""

    model: str
    method: str
    points: tuple[Estimate, ...]


def parse(text: str) -> Sweep:
    """The sweep in `seqLen=2k,4k`. Raises BadInput saying what to write."""
    knob, _, values = text.partition("=")
    if knob not in SWEPT:
        raise BadInput(f"--sweep: {knob!r} is none of {', '.join(SWEPT)}; write for example seqLen=2k,4k,8k")
    try:
        found = tuple(whole(value.strip()) for value in values.split(","))
    except argparse.ArgumentTypeError as error:
        raise BadInput(f"--sweep: {error}; write for example {knob}=2,4,8") from error
    if len(set(found)) < len(found):
        raise BadInput(f"--sweep: {values} names a value twice")
    return Sweep(knob, found)


def curves(models: list[str], sweep: Sweep, given: Knobs) -> list[Curve]:
    """Each model by each method over the sweep. Raises ValueError for a model or a value that will not do."""
    found = []
    for model in models:
        shape = shape_of_model(model)
        steps = [estimates(shape, replace(given, **{SWEPT[sweep.knob]: value})) for value in sweep.values]
        found += [Curve(model, points[0].recipe.method, points) for points in zip(*steps, strict=True)]
    return found


def run(chosen: argparse.Namespace, given: Knobs) -> None:
    """Go through the values; draw them if asked to."""
    sweep = parse(chosen.sweep)
    found = curves(chosen.model, sweep, given)
    if chosen.plot:
        draw(found, sweep, given, chosen.plot)
    if chosen.output:
        sys.stdout.write(as_text(as_document(found, sweep, given), chosen.output))
    else:
        _show(found, sweep, given, Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))


def smallest_card(needed_bytes: int) -> str | None:
    """The first of `CARDS` that has the memory."""
    return next((card for card in CARDS if _card_bytes(card) >= needed_bytes), None)


def _card_bytes(card: str) -> int:
    return products()[NVIDIA_NAMES[card]].memory_mib * MIB


def _show(found: list[Curve], sweep: Sweep, given: Knobs, console: Console) -> None:
    for number, model in enumerate(dict.fromkeys(curve.model for curve in found)):
        if number:
            console.print()
        say(console, model, "bold")
        ours = [curve for curve in found if curve.model == model]
        table = Table(box=None, pad_edge=False, header_style="", padding=(0, 3, 0, 0))
        table.add_column(sweep.knob, justify="right", no_wrap=True)
        for curve in ours:
            table.add_column(f"{curve.method} GiB", justify="right", no_wrap=True)
            table.add_column("smallest card", no_wrap=True)
        for row, value in enumerate(sweep.values):
            cells = [f"{value:,}"]
            for curve in ours:
                point = curve.points[row]
                card = smallest_card(point.needed_bytes)
                cells += [f"{point.memory.total_bytes / GIB:.1f}", card or "none"]
            table.add_row(*cells)
        console.print(table)
    headroom = found[0].points[0].memory.headroom_percent
    cards = ", ".join(f"{card} ({size} GB)" for card, size in CARDS.items())
    gpus = "" if given.gpus == 1 else f", on each of {given.gpus} GPUs"
    console.print()
    say(console, f"GiB predicted{gpus}; the smallest of {cards} with {headroom} % headroom")


def as_document(found: list[Curve], sweep: Sweep, given: Knobs) -> dict[str, Any]:
    """For machines; bytes of one GPU."""
    return {
        "knob": sweep.knob,
        "values": list(sweep.values),
        "gpus": given.gpus,
        "curves": [
            {
                "model": curve.model,
                "method": curve.method,
                "totalBytes": [point.memory.total_bytes for point in curve.points],
                "neededBytes": [point.needed_bytes for point in curve.points],
            }
            for curve in found
        ],
    }


def draw(found: list[Curve], sweep: Sweep, given: Knobs, path: Path) -> None:
    """The curves over what GPUs have, as a picture. Raises BadInput when it cannot be drawn or written."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  # an extra: plot
        from matplotlib.ticker import FuncFormatter  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadInput("--plot needs matplotlib: pip install 'qlora-operator[plot]'") from error
    # The version of matplotlib is left out: a picture changes when its figures do, and they are in it to be compared.
    said = {"Software": None, "Description": json.dumps(as_document(found, sweep, given))}
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    models = list(dict.fromkeys(curve.model for curve in found))
    for curve in found:
        # A colour for each model, a line style for each method: told apart in grey as well.
        axes.plot(
            sweep.values,
            [point.needed_bytes / GIB for point in curve.points],
            color=f"C{models.index(curve.model)}",
            linestyle="--" if curve.method == "lora" else "-",
            marker="o",
            markersize=4,
            label=f"{curve.model.rsplit('/', 1)[-1]}, {curve.method}",
        )
    for card, size in CARDS.items():
        axes.axhline(_card_bytes(card) / GIB, color="0.55", linewidth=0.8)
        axes.annotate(
            f"{card}, {size} GB",
            (1, _card_bytes(card) / GIB),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    headroom = found[0].points[0].memory.headroom_percent
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sweep.values, [f"{value:,}" for value in sweep.values], minor=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(AXES[sweep.knob])
    axes.set_ylabel(f"GiB that a GPU must have, {headroom} % headroom included")
    gpus = "one GPU" if given.gpus == 1 else f"each of {given.gpus} GPUs"
    fixed = [
        "" if sweep.knob == "seqLen" else f"{given.max_length:,} tokens",
        "" if sweep.knob == "microBatch" else f"micro-batch {given.micro_batch_size}",
        "" if sweep.knob == "rank" else f"rank {given.rank}",
    ]
    axes.set_title(f"Memory on {gpus}: {', '.join(part for part in fixed if part)}", fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.legend(fontsize=8, frameon=False)
    try:
        figure.savefig(path, metadata=said if path.suffix == ".png" else None)
    except (OSError, ValueError) as error:
        raise BadInput(f"--plot {path}: {error}") from error
