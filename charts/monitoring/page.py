"""The tables of docs/metrics.md, made from what is served and from the alerts.

`python -m charts.monitoring.page` writes them, `--check` says whether the page is current.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import yaml
from prometheus_client import Metric

from qlora_api.schema import write_or_check
from qlora_operator.metrics import SERIES
from qlora_trainer.metrics import Metrics
from qlora_trainer.standing import Standing

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "metrics.md"
#: A training of which everything is known.
STANDING = Standing(
    at=datetime(2026, 1, 1, tzinfo=UTC),
    step=1,
    steps=2,
    epoch=0.5,
    tokens=100,
    padding=0.02,
    loss=1.0,
    eval_loss=1.0,
    looks={"perplexity": 2.0, "canary.perplexity": 2.0, "exactMatch": 0.5},
    learning_rate=1e-4,
    grad_norm=1.0,
    tokens_per_second=10.0,
    mfu=0.1,
    remaining_seconds=60.0,
    gpu_memory_bytes={"allocated": 1, "reserved": 1, "reserved_peak": 1},
)
RULES = REPOSITORY / "charts" / "qlora-operator" / "files" / "rules.yaml"


def page(text: str) -> str:
    """The page with its tables made anew."""
    tables = {"operator": of_operator(), "trainer": of_trainer(), "alerts": of_alerts()}
    for name, table in tables.items():
        head, rest = re.split(rf"(?<=<!-- {name}: )", text, maxsplit=1)
        marker, rest = rest.split("\n", 1)
        text = f"{head}{marker}\n{table}\n{rest[rest.index('<!-- end -->') :]}"
    return text


def of_operator() -> str:
    rows = ((series.name, series.kind.__name__.lower(), series.labels, series.help) for series in SERIES)
    return of_series(rows)


def trainer_series() -> list[Metric]:
    """What a trainer serves of a training, each with its samples."""
    metrics = Metrics()
    metrics.see(STANDING)
    return list(metrics.collect())


def of_trainer() -> str:
    return of_series(
        (
            family.name + ("_total" if family.type == "counter" else ""),
            family.type,
            sorted({label for sample in family.samples for label in sample.labels}),
            family.documentation,
        )
        for family in trainer_series()
    )


def of_series(rows: Iterable[tuple[str, str, Sequence[str], str]]) -> str:
    """Name, type, labels and help of each series, as a table."""
    lines = (f"| `{name}` | {kind} | {', '.join(labels)} | {said} |" for name, kind, labels, said in rows)
    return "\n".join(["| series | type | labels | what it says |", "|---|---|---|---|", *lines])


def of_alerts() -> str:
    """Each alert, after how long, and what to do; the labels in its texts by their names."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    lines = (
        f"| `{rule['alert']}` | {rule['labels']['severity']} | {rule.get('for', 'at once')} "
        f"| {_plain(rule['annotations']['summary'])} | {_plain(rule['annotations']['description'])} |"
        for rule in rules
    )
    return "\n".join(["| alert | severity | after | says | what to do |", "|---|---|---|---|---|", *lines])


def _plain(template: str) -> str:
    """A text of an alert with what Prometheus fills in named in angles; parts that are not always there left out."""
    text = re.sub(r"\{\{ with .*?\{\{ end \}\}", "", template)
    text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"*\1*", text)
    return re.sub(r"\{\{ \$value.*?\}\}", "*n*", text).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page(PAGE.read_text()), command="python -m charts.monitoring.page"))
