"""The report of a training on the work volume: everything measured, as JSON, and as a page for people.

The page is one file without scripts that asks no network. It shows examples of the data: it is for those who may read
the work volume.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from itertools import pairwise
from pathlib import Path

from qlora_api.exchange import TrainOrder, TrainResult
from qlora_trainer.artifacts import write_file
from qlora_trainer.checkpoint import Progress
from qlora_trainer.examination import Sample

JSON_NAME, PAGE_NAME = "evaluation.json", "evaluation.html"
#: So many answers of each set are shown on the page; the JSON has all.
SHOWN = 50
WIDTH, HEIGHT, MARGIN = 720, 260, 48
#: More points than this a line of such a width cannot show.
POINTS = 600
COLOURS = ("#1f5fa8", "#c2571a", "#2f7d4f", "#7a4fa3", "#8a7a1f")
STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}
td{vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere}
figure{margin:1rem 0}svg{max-width:100%;height:auto}"""

Points = Sequence[tuple[float, float]]


def write_report(
    directory: Path, order: TrainOrder, result: TrainResult, progress: Progress, samples: Sequence[Sample]
) -> None:
    """Write both files into `directory`, each whole."""
    document = {
        "job": f"{order.namespace}/{order.job}",
        "model": {"uri": order.model_uri, "digest": order.model_digest},
        "dataDigest": order.data_digest,
        "recipe": order.recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
        "result": result.model_dump(mode="json", by_alias=True, exclude_none=True),
        "losses": [_finite(loss) for loss in progress.losses],
        "evaluations": [{name: _finite(value) for name, value in look.items()} for look in progress.looks],
        "samples": [asdict(sample) for sample in samples],
    }
    write_file(directory / JSON_NAME, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(directory / PAGE_NAME, page(order, result, progress, samples))


def page(order: TrainOrder, result: TrainResult, progress: Progress, samples: Sequence[Sample]) -> str:
    """The report as XHTML."""
    title = f"{order.namespace}/{order.job}: evaluation"
    parts = [
        f"<h1>{text(title)}</h1>",
        f"<p>{text(_in_short(order, result))}</p>",
        "<h2>Scores</h2>",
        table(
            ("metric", "base", "tuned", "examples"),
            [(s.metric, f"{s.base:.4g}", f"{s.tuned:.4g}", str(s.examples)) for s in result.scores],
        ),
    ]
    if result.gates:
        rows = [(verdict.sentence(), "holds" if verdict.passed else "does not hold") for verdict in result.gates]
        parts += ["<h2>Gates</h2>", table(("gate", "verdict"), rows)]
    parts += ["<h2>Loss</h2>", figure(curves(progress), "step", "loss")]
    for name in sorted({name for look in progress.looks for name in look} - {"step", "evalLoss"}):
        points = [(look["step"], look[name]) for look in progress.looks if name in look]
        parts += [f"<h2>{text(name)}</h2>", figure({name: points}, "step", name)]
    for kind in dict.fromkeys(sample.set for sample in samples):
        of_kind = [sample for sample in samples if sample.set == kind]
        rows = [(sample.prompt, sample.expected, sample.base, sample.tuned) for sample in of_kind[:SHOWN]]
        parts += [
            f"<h2>Answers to the {text(kind)} set</h2>",
            f"<p>{len(rows)} of {len(of_kind)}; all are in {JSON_NAME}.</p>",
            table(("prompt", "expected", "base", "tuned"), rows),
        ]
    recipe = order.recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    parts += ["<h2>Recipe</h2>", table(("field", "value"), [(name, str(recipe[name])) for name in sorted(recipe)])]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def curves(progress: Progress) -> dict[str, Points]:
    """Training loss by step, and the held-out loss where there is one."""
    found: dict[str, Points] = {"training loss": list(enumerate(progress.losses, start=1))}
    if progress.eval_losses:
        found["held-out loss"] = progress.eval_losses
    return found


def figure(lines: Mapping[str, Points], across: str, upwards: str) -> str:
    """Lines over one pair of axes, as SVG; points that are not numbers are left out."""
    drawn = {name: _thinned([point for point in points if math.isfinite(point[1])]) for name, points in lines.items()}
    everything = [point for points in drawn.values() for point in points]
    if not everything:
        return "<p>nothing was measured</p>"
    left, right = _span([x for x, _ in everything])
    low, high = _span([y for _, y in everything])

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = MARGIN + (point[0] - left) / (right - left) * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (point[1] - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="12">',
        f"<title>{text(upwards)} by {text(across)}</title>",
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>',
    ]
    for value in (low, high):
        _, y = at((left, value))
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{value:.4g}</text>')
    for value in (left, right):
        x, _ = at((value, low))
        parts.append(f'<text x="{x}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{value:.4g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">{text(across)}</text>')
    for number, (name, points) in enumerate(drawn.items()):
        colour = COLOURS[number % len(COLOURS)]
        if len(points) == 1:
            x, y = at(points[0])
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        elif points:
            corners = " ".join(f"{x},{y}" for x, y in map(at, points))
            parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{MARGIN + 12 + 160 * number}" y="{MARGIN - 16}" fill="{colour}">{text(name)}</text>')
    return f"<figure>{''.join(parts)}</svg></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, or a word where there is nothing to show."""
    if not rows:
        return "<p>none</p>"
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def text(value: str) -> str:
    """`value` as it may stand in XML: escaped, and without what no document may hold."""
    return escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", value))


def _in_short(order: TrainOrder, result: TrainResult) -> str:
    said = [
        f"{order.model_uri}, {order.recipe.method}, rank {order.recipe.rank}",
        f"{result.steps:,} steps ({result.epochs:g} epochs) in {result.seconds:,.0f} s on {result.device}",
    ]
    if result.stopped_early:
        said.append("stopped early, for want of gain")
    if result.selected_step is not None:
        said.append(f"the adapter of step {result.selected_step:,} is the one that leaves")
    return "; ".join(said) + "."


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Least and largest, never the same."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _thinned(points: Points) -> Points:
    """At most so many points as can be seen: each the mean of its neighbours."""
    if len(points) <= POINTS:
        return points
    edges = [round(number * len(points) / POINTS) for number in range(POINTS + 1)]
    groups = [points[start:end] for start, end in pairwise(edges)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
