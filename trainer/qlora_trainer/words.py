"""What each process of a pod leaves about how it ended: the pod has one termination message, and several processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: Where a rank leaves word of how it ended: it has no termination message of its own.
WORDS_ENV = "QLORA_WORDS"


@dataclass(frozen=True)
class Word:
    """How one rank ended, `report` as the pod's own would be."""

    rank: int
    code: int
    report: str
    at: float
    #: Whether it ended for a reason that the trainer knows, and not for an error that nobody foresaw.
    foreseen: bool = True


def leave_word(environment: Mapping[str, str], code: int, report: str, *, foreseen: bool) -> None:
    """Say how this rank ended, whole or not at all."""
    path = Path(environment[WORDS_ENV]) / environment["RANK"]
    path.with_suffix(".partial").write_text(
        json.dumps({"code": code, "report": report, "foreseen": foreseen}), encoding="utf-8"
    )
    path.with_suffix(".partial").replace(path)


def words_in(directory: Path) -> list[Word]:
    """What the ranks of this pod have left, the first that ended first."""
    found = [
        Word(int(path.name), at=path.stat().st_mtime, **json.loads(path.read_text(encoding="utf-8")))
        for path in directory.iterdir()
        if not path.suffix
    ]
    return sorted(found, key=lambda word: (word.at, word.rank))
