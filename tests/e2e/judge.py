"""What kstatus, the library itself, says of an object: what Flux and `helm install --wait` will make of it."""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tests.cluster import build, prerequisites, settings

MODULE = Path(__file__).resolve().parent / "kstatus"
SOURCES = (MODULE / "go.mod", MODULE / "go.sum", MODULE / "main.go")
FLAGS = ("-trimpath", "-ldflags", "-s -w")


class Status(StrEnum):
    """kstatus' own words. Unknown: it could not read the object. (Its NotFound is for who asks a server.)"""

    CURRENT = "Current"
    IN_PROGRESS = "InProgress"
    FAILED = "Failed"
    TERMINATING = "Terminating"
    UNKNOWN = "Unknown"


@dataclass(frozen=True)
class Verdict:
    status: Status
    message: str


def judge(objects: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """One verdict per object, in their order; the first call on a machine compiles the judge (two minutes).

    Raises:
        ValueError: what is no Kubernetes object, by its number from 1; it has no kind, say.
        BuildFailedError, UnfitMachineError: the judge could not be compiled.
    """
    lines = "".join(json.dumps(thing) + "\n" for thing in objects)
    result = subprocess.run([program()], input=lines, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"kstatus cannot judge {result.stderr.strip().replace('line', 'object', 1)}")
    answers = (line.partition("\t") for line in result.stdout.split("\n")[:-1])
    return [Verdict(Status(status), message) for status, _, message in answers]


def program() -> Path:
    """The compiled judge, from the cache; compiled if its sources have changed."""
    settings.cache().mkdir(parents=True, exist_ok=True)
    with (settings.cache() / "kstatus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generation = build.kept("kstatus", build.digest(" ".join(FLAGS), *SOURCES), _compile)
        build.keep_only(generation)
    return generation / "kstatus"


def _compile(target: Path) -> None:
    prerequisites.require_space(target, 1, "compiling kstatus")
    build.compile_packages(prerequisites.go(), MODULE, ".", FLAGS, target, title="kstatus")
