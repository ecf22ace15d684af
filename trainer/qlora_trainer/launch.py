"""A pod with several GPUs: one process for each, started by torchrun, and one end told for all of them."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from qlora_api.exchange import ExitCode, TrainOrder, failed
from qlora_trainer.environment import log

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


def launch(order: TrainOrder, report_path: Path) -> int:
    """Run this program once for each GPU of the pod; the exit code and report are those of the rank that ended the
    others. torchrun's own settings come from the environment (PET_…)."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="qlora-ranks-") as words:
        os.environ[WORDS_ENV] = words
        config, command, arguments = config_from_args(parse_args(["-m", "qlora_trainer"]))
        killed: dict[int, int] = {}
        told = False
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            killed = {rank: -found.exitcode for rank, found in error.failures.items() if found.exitcode < 0}
        except SignalException:
            told = True
            log.info("told to stop, and so were the ranks")
        left = words_in(Path(words))
    end = cause(left, killed, told=told)
    if end is None:
        code, message = 1, "the ranks ended without a word; the pod's log has what they wrote"
        if told:
            code, message = ExitCode.INTERRUPTED, "told to stop before there was anything to save"
        report_path.write_text(failed(order, message).fitted(), encoding="utf-8")
        return code
    report = end.report or failed(order, _was_killed(end)).fitted()
    report_path.write_text(report, encoding="utf-8")
    return end.code


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


def cause(words: Sequence[Word], killed: Mapping[int, int], *, told: bool) -> Word | None:
    """Which end explains the others. `killed` has the ranks that a signal ended, and its number; `told` says whether
    the pod was told to stop.

    A rank that knows why it ended comes first, then one that was killed. torchrun tells all to stop when one fails, and
    a rank whose neighbour is gone fails in many ways: which of these counts depends on whether the pod was told.
    """
    ended = [word for word in words if word.code != ExitCode.SUCCEEDED]
    stopped = [word for word in ended if word.code == ExitCode.INTERRUPTED]
    known = [word for word in ended if word.foreseen and word not in stopped]
    unforeseen = [word for word in ended if not word.foreseen]
    dead = [Word(rank, 128 + number, "", 0.0) for rank, number in sorted(killed.items())]
    last = (*stopped, *unforeseen) if told else (*unforeseen, *stopped)
    return next(iter((*known, *dead, *last, *(word for word in words if word.code == ExitCode.SUCCEEDED))), None)


def _was_killed(word: Word) -> str:
    name = signal.Signals(word.code - 128).name
    why = " (the node or the container's limit may have had no memory left for it)" if name == "SIGKILL" else ""
    return f"rank {word.rank} was killed by {name}{why}; the next attempt goes on from the last checkpoint"
