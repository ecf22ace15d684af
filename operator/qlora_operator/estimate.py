"""`kubectl qlora estimate`: predicted memory, shown to people and to machines."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from qlora_operator.sizing.cases import Compared, median_abs_error, worst_abs_error
from qlora_operator.sizing.memory import GIB

#: Columns of the table where there is no terminal to ask.
WIDTH = 140


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
