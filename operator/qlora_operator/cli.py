"""`kubectl qlora`: what people type. Works with the base install; asks a cluster by `kubectl`, if at all."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from qlora_operator.commands.refusals import Refusal

#: Each a module of `qlora_operator.commands`, of which only the chosen one is loaded: the models of the contract take a
#: quarter of a second.
COMMANDS = {
    "plan": "what the operator would decide for a job, before it is applied",
    "explain": "why a job stands where it stands, and what to do",
    "watch": "follow a job until it has ended",
    "compare": "set two jobs side by side: recipe, cost and scores",
    "estimate": "predict GPU memory",
}


class Command(Protocol):
    """What a command's module has."""

    @staticmethod
    def declare(parser: argparse.ArgumentParser) -> None:
        """Add its arguments and its description."""
        ...

    @staticmethod
    def run(chosen: argparse.Namespace) -> int:
        """Do it; the exit code."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="kubectl qlora", description="Commands for QLoRA fine-tune jobs (qlorajobs.qlora.dev)."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    for name, summary in COMMANDS.items():
        added = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if given[:1] == [name]:
            _command(name).declare(added)
    chosen = parser.parse_args(given)
    try:
        return _command(chosen.command).run(chosen)
    except Refusal as refusal:
        sys.stderr.write(f"{refusal}\n")
        return refusal.exit_code


def _command(name: str) -> Command:
    return cast("Command", import_module(f"qlora_operator.commands.{name}"))


if __name__ == "__main__":
    sys.exit(main())
