"""`python -m tests.bench`: measure the operator, on the embedded cluster and alone, and write docs/benchmarks."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from tests.bench import figures, measures, placement
from tests.bench.figures import Measured
from tests.cluster.client import Cluster
from tests.cluster.lifecycle import ensure_up
from tests.cluster.settings import REPOSITORY

PLACE = REPOSITORY / "docs" / "benchmarks"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("measures", nargs="*", choices=[*MEASURES, *ALONE, "all"], default="all", metavar="MEASURE")
    parser.add_argument("--jobs", type=int, default=500, help="of the burst and the start")
    parser.add_argument("--resting", type=int, default=1000, help="jobs at rest")
    parser.add_argument("--runs", type=int, default=3, help="of the burst and the start")
    parser.add_argument("--shared", action="store_true", help="say that other work ran on the machine meanwhile")
    parser.add_argument("--dry", action="store_true", help="print only, write nothing to docs/benchmarks")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was made is removed
    wanted = [*MEASURES, *ALONE] if "all" in arguments.measures else arguments.measures
    cluster = ensure_up() if set(wanted) - ALONE.keys() else None
    kept = PLACE / "operator.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() and not arguments.dry else {}
    for measure in wanted:
        setting = figures.setting(
            command(measure, arguments), *([version_of(cluster)] if cluster else []), is_shared=arguments.shared
        )
        measured = MEASURES[measure](cluster, arguments) if cluster and measure in MEASURES else ALONE[measure]()
        results[measure] = figures.result(measured, setting)
        print(figures.table({measure: results[measure]}), flush=True)
        for name, count in measured.requests_per_job.items():
            print(f"  {figures.told(count):>6} × {name}")
        if not arguments.dry:
            PLACE.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(results, indent=2) + "\n")
            (PLACE / "operator.md").write_text(figures.page(results))
    if cluster:
        measures.clear(cluster)
    return 0


def command(measure: str, arguments: argparse.Namespace) -> str:
    """What takes the measure as it was taken."""
    sizes = {
        "burst": ("--jobs", "--runs"),
        "start": ("--jobs", "--runs"),
        "rest": ("--resting",),
    }.get(measure, ())
    return " ".join(["python -m tests.bench", measure, *(f"{o} {getattr(arguments, o[2:])}" for o in sizes)])


def version_of(cluster: Cluster) -> str:
    """Of the API server."""
    return f"Kubernetes {json.loads(cluster.kubectl('version', '--output=json'))['serverVersion']['gitVersion']}"


def _alone(measure: Callable[..., Measured], *sizes: str) -> Callable[[Cluster, argparse.Namespace], Measured]:
    """`measure` with those arguments of the command line, while no other operator works."""

    def run(cluster: Cluster, arguments: argparse.Namespace) -> Measured:
        with measures.alone(cluster):
            return measure(cluster, *(getattr(arguments, size) for size in sizes))

    return run


MEASURES: dict[str, Callable[[Cluster, argparse.Namespace], Measured]] = {
    "burst": _alone(measures.measure_burst, "jobs", "runs"),
    "start": _alone(measures.measure_start, "jobs", "runs"),
    "rest": _alone(measures.measure_rest, "resting"),
    "writes": lambda cluster, _: measures.measure_writes(cluster),
}

#: Without a cluster.
ALONE: dict[str, Callable[[], Measured]] = {"placement": placement.measure}

if __name__ == "__main__":
    sys.exit(main())
