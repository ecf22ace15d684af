"""docs/cli.md: its commands run, and what they print is what the page shows. `make generate` writes it anew."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from qlora_operator.cli import main
from qlora_operator.commands.estimate import Knobs
from qlora_operator.commands.sweep import as_document, curves, parse
from tests.cluster.settings import REPOSITORY
from tests.unit.operator.jobs_in_cluster import FILES, qlora_and_lora, ran_out_of_memory_and_waits
from tests.unit.operator.test_estimate import described
from tests.unit.operator.test_watch import Kubectl

PAGE = REPOSITORY / "docs" / "cli.md"
PICTURE = REPOSITORY / "docs" / "sweep.png"
BLOCK = re.compile(r"```console\n\$ (?P<command>kubectl qlora [^\n]+)\n(?P<output>.*?)```\n", re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """The commands of the page, and what it says that they print."""
    return [(match["command"], match["output"]) for match in BLOCK.finditer(PAGE.read_text())]


def output_of(command: str, directory: Path) -> str:
    """What a command prints in a shell, where kubectl has the plugin and the cluster has the job of the page."""
    kubectl = Kubectl(directory / "bin")
    kubectl.play(json.dumps(qlora_and_lora() if " compare " in command else ran_out_of_memory_and_waits()))
    for file in FILES.iterdir():
        shutil.copy(file, directory)
    plugin = directory / "bin" / "kubectl-qlora"
    plugin.write_text(f'#!/bin/sh\nexec {sys.executable} -m qlora_operator.cli "$@"\n')
    plugin.chmod(0o755)
    ended = subprocess.run(
        ["bash", "-c", command.replace("kubectl qlora", "kubectl-qlora")],
        cwd=directory,
        env=kubectl.environment() | {"PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # a line that ends in blanks is shown without them: editors take them away
    return "".join(f"{line.rstrip()}\n" for line in ended.stdout.splitlines())


def test_every_command_has_its_place_on_the_page():
    assert {command.split()[2] for command, _ in blocks()} == {"plan", "explain", "compare", "estimate"}


def test_the_page_has_the_exit_codes_that_help_tells(capsys: pytest.CaptureFixture[str]):
    header, *rows = re.findall(r"^\| (exit code .*|[0-9]+ \|.*) \|$", PAGE.read_text(), re.MULTILINE)
    for column, command in enumerate(header.split(" | ")[1:], start=1):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = re.findall(r"^  ([0-9]+) +\S", capsys.readouterr().out, re.MULTILINE)
        assert told == [row.split("|")[0].strip() for row in rows if row.split("|")[column].strip()]


@pytest.mark.parametrize(("command", "shown"), blocks())
def test_the_page_shows_what_the_command_prints(command: str, shown: str, tmp_path: Path):
    assert output_of(command, tmp_path) == shown, "run: make generate"


def test_the_picture_has_the_figures_as_they_are():
    (command,) = (command for command, _ in blocks() if "--plot" in command)
    words = command.split()
    models = words[words.index("estimate") + 1 : words.index("--sweep")]
    sweep, given = parse(words[words.index("--sweep") + 1]), Knobs()
    picture = PICTURE.read_bytes()
    found: dict[str, Any] = as_document(curves(models, sweep, given), sweep, given)
    assert described(picture) == found, "run: make generate"
    assert len(picture) < 100_000


def write() -> None:
    """The page with its commands' output as it is now, and the picture that one of them draws."""

    def renewed(match: re.Match[str]) -> str:
        with tempfile.TemporaryDirectory() as directory:
            output = output_of(match["command"], Path(directory))
            if "--plot" in match["command"]:
                shutil.copy(Path(directory) / PICTURE.name, PICTURE)
        return f"```console\n$ {match['command']}\n{output}```\n"

    PAGE.write_text(BLOCK.sub(renewed, PAGE.read_text()))


if __name__ == "__main__":
    write()
