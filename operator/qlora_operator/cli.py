"""`kubectl qlora`: what people type. Works with the base install and `kubectl`; asks no cluster by itself."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from qlora_operator import estimate
from qlora_operator.sizing.cases import compare
from qlora_operator.sizing.catalogue import shape_of_model
from qlora_operator.watch import LOST, watch

WATCH = """\
Follow a job until it has ended: its phase, how far the training is, loss, speed and the time left.
On a terminal this is a picture that moves; anywhere else it is a line for each change.

exit codes:
  0    the job has succeeded, or rests at its plan (planOnly)
  1    the job has failed; its message and the attempts that failed are printed
  2    it could not be watched to its end: no such job, deleted, cluster out of reach
  130  stopped by Ctrl-C; the job goes on
"""

ESTIMATE = """\
Predict GPU memory, with no cluster and no network.

With MODEL, what the default recipe takes on one GPU, item by item, for LoRA and for QLoRA. MODEL is one of the
catalogue (meta-llama/Llama-3.1-8B) or the path of a config.json.
With --cases, the prediction beside trainings that were measured: one line each, then the median and the worst error.
The columns of that table: docs/sizing.md.

exit codes:
  0    predicted
  2    the model is not known, or the table cannot be read; the message says what to give
"""
BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="kubectl qlora", description="Commands for QLoRA fine-tune jobs (qlorajobs.qlora.dev)."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    watcher = commands.add_parser(
        "watch",
        help="follow a job until it has ended",
        description=WATCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    watcher.add_argument("name", metavar="NAME", help="name of the QLoRAJob")
    watcher.add_argument("-n", "--namespace", help="its namespace (default: that of kubectl's context)")
    watcher.add_argument("--context", help="the context to use, as with kubectl")
    watcher.add_argument("--kubeconfig", metavar="FILE", help="the kubeconfig file to use, as with kubectl")
    estimator = commands.add_parser(
        "estimate",
        help="predict GPU memory",
        description=ESTIMATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    estimator.add_argument("model", metavar="MODEL", nargs="?", help="a model of the catalogue, or a config.json")
    estimator.add_argument("--seq-len", type=_count, default=4096, help="tokens per sequence (default: 4096)")
    estimator.add_argument("--micro-batch", type=_count, default=1, help="sequences at a time (default: 1)")
    estimator.add_argument("--rank", type=_count, default=16, help="of the adapter (default: 16)")
    estimator.add_argument("--method", choices=["lora", "qlora"], help="one of both alone")
    estimator.add_argument("--cases", metavar="FILE.csv", type=Path, help="trainings that were measured")
    estimator.add_argument("--models", metavar="DIR", type=Path, help="with --cases: their config.json, by name")
    estimator.add_argument("-o", "--output", choices=["json"], help="for machines, instead of a table")
    chosen = parser.parse_args(arguments)

    if chosen.command == "estimate":
        if bool(chosen.model) == bool(chosen.cases) or bool(chosen.cases) != bool(chosen.models):
            estimator.error("give either MODEL, or --cases with --models")
        return _estimate(chosen)
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        sys.stderr.write("kubectl is not on the PATH: install it, https://kubernetes.io/docs/tasks/tools\n")
        return LOST
    options = ("namespace", "context", "kubeconfig")
    passed_on = [f"--{option}={value}" for option in options if (value := getattr(chosen, option))]
    return watch([kubectl, *passed_on], chosen.name, Console(highlight=False))


def _estimate(chosen: argparse.Namespace) -> int:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else estimate.WIDTH)
    for_machines = chosen.output == "json"
    try:
        if chosen.cases:
            compared = compare(chosen.cases, chosen.models)
            if for_machines:
                sys.stdout.write(estimate.as_json(compared) + "\n")
            else:
                estimate.show(compared, console)
            return 0
        shape = shape_of_model(chosen.model)
        size = chosen.micro_batch
        found = estimate.estimates(
            shape, max_length=chosen.seq_len, micro_batch_size=size, rank=chosen.rank, method=chosen.method
        )
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_INPUT
    if for_machines:
        sys.stdout.write(estimate.estimates_as_json(chosen.model, shape, found, size) + "\n")
    else:
        estimate.show_estimates(found, console)
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
