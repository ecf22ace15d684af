"""Figures, what is asked of them, and how they are told: a table, JSON and the page in docs/benchmarks."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal


@dataclass(frozen=True)
class Target:
    """What is asked of a figure's median."""

    bound: Literal["at least", "at most"]
    value: float

    def met(self, value: float) -> bool:
        return value >= self.value if self.bound == "at least" else value <= self.value


@dataclass(frozen=True)
class Figure:
    """One thing measured, run by run."""

    name: str
    unit: str
    runs: tuple[float, ...]
    target: Target | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def verdict(self) -> str:
        """met, missed, or nothing where nothing is asked."""
        if self.target is None:
            return ""
        return "met" if self.target.met(self.median) else "missed"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all values do not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


def rate(sent: Mapping[str, float], seen: Mapping[str, float], *, since: float | None = None) -> float:
    """Objects a second, from the first that was sent (or from `since`) to the last that was seen."""
    return len(seen) / (max(seen.values()) - (min(sent.values()) if since is None else since))


@dataclass(frozen=True)
class Measured:
    """What one measure came to: its figures, and where they were counted the requests to the API server per job."""

    figures: tuple[Figure, ...]
    requests_per_job: Mapping[str, float] = field(default_factory=dict)


HEAD = ("figure", "median", "runs", "target", "")

Results = Mapping[str, Mapping[str, Any]]
"""By measure: when and under what load it was taken, and what it came to. As in the JSON document."""


def result(measured: Measured, setting: Mapping[str, Any]) -> dict[str, Any]:
    """One measure's part of `Results`."""
    figures = [
        {"name": figure.name, "unit": figure.unit, "median": figure.median, "runs": list(figure.runs)}
        | (
            {"target": f"{figure.target.bound} {told(figure.target.value)}", "verdict": figure.verdict}
            if figure.target
            else {}
        )
        for figure in measured.figures
    ]
    counted = {"requestsPerJob": dict(measured.requests_per_job)} if measured.requests_per_job else {}
    return {**setting, "figures": figures, **counted}


def rows(results: Results, meaning: Mapping[str, str] | None = None) -> list[tuple[str, ...]]:
    """Name, median with unit, every run, target, verdict."""
    return [
        (
            f"{measure}: {figure['name']}",
            f"{told(figure['median'])} {figure['unit']}".strip(),
            ", ".join(told(value) for value in figure["runs"]) if len(figure["runs"]) > 1 else "",
            figure.get("target", ""),
            figure.get("verdict", ""),
        )
        for measure in meaning or MEANING
        if measure in results
        for figure in results[measure]["figures"]
    ]


def table(results: Results, meaning: Mapping[str, str] | None = None) -> str:
    """Plain columns."""
    lines = [HEAD, *rows(results, meaning)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def setting(command: str, *others: str, is_shared: bool = False) -> dict[str, str]:
    """By which command, when and on what figures are taken; `others` are versions that they depend on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    python = f"Python {platform.python_version()}"
    shared = ["shared with other work"] if is_shared else []
    return {
        "command": command,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": ", ".join([f"{os.cpu_count()} cores", f"{memory:.0f} GiB", system, *others, python, *shared]),
        "load": " ".join(f"{value:.1f}" for value in os.getloadavg()[:2]),
    }


def tables(results: Results, meaning: Mapping[str, str]) -> list[str]:
    """The figures, how each was taken and what it means, in Markdown."""
    taken = [
        (measure, one["command"], one["date"], one["machine"], one["load"])
        for measure in meaning
        if (one := results.get(measure))
    ]
    return [
        *markdown(HEAD, rows(results, meaning)),
        "",
        *markdown(("measure", "command", "taken", "machine", "load average before"), taken),
        "",
        "## What is measured",
        "",
        *(f"- **{name}**: {text}" for name, text in meaning.items()),
    ]


def page(results: Results) -> str:
    """The page for people, in Markdown."""
    counted = results.get("burst", {}).get("requestsPerJob", {})
    lines = [
        "# What the operator costs, and how fast it is",
        "",
        "Written by `make bench` (one measure: `python -m tests.bench burst`); `operator.json` beside it has the same",
        "for programs. Rates are compared with a bare client's in the same run: the machine's speed is nobody's merit.",
        "Each figure is the median of its runs.",
        "",
        *tables(results, MEANING),
        "",
        "## Requests to the API server per job of the burst",
        "",
        "From the API server's own counters, until the operator had settled. The Job controller, the scheduler and the",
        "garbage collector are in it too.",
        "",
        *markdown(("request", "per job"), [(name, told(value)) for name, value in counted.items()]),
    ]
    return "\n".join(lines) + "\n"


#: How each measure goes about it.
MEANING = {
    "burst": "500 QLoRAJobs are created at concurrency 32 while the operator is at rest. The rate is 500 over the time "
    "from the first request to the last first child, an inspect Job, being told of by a watch. The bare client "
    "creates 500 times the order (ConfigMap) and the Job that the operator makes, with the same client library, "
    "concurrency and watch. The jobs' pods wait for fake nodes and a claim that is not there: the load is that of "
    "the control plane alone, in both runs.",
    "start": "500 QLoRAJobs are there before the operator starts. The rate is over the time from the first child to "
    "the last; how long the process takes until then is a figure of its own.",
    "rest": "500 jobs that wait, each with its Job and pod, and 500 that have succeeded, each with a whole status. CPU "
    "is taken over two minutes and so over two rounds of the resync. For the restart, Jobs of 20 of those that wait "
    "are deleted while no operator runs: settled is when each is there again and the process takes less than a tenth "
    "of a core.",
    "writes": "One quickstart job from apply to published, with the product installed by its chart. Counted are the "
    "requests to the status, refused ones too; the target is 25 and one per 10 s of training.",
    "placement": "Without a cluster, in a process of its own. Times are of the CPU: nothing waits. Nodes are as the "
    "API server sends them, with some 65 labels each, in 50 flavours (eight products in nodes with one to sixteen of "
    "them). A run is the median of 200 calls (of a plan, of 20). Memory is what tracemalloc counts for the index once "
    "the nodes are forgotten. The plan is the default recipe for Llama 3.1 8B at 2048 tokens.",
}


def told(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table, with its head."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]
