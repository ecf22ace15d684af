"""Ranks for tests: forks of this process that meet over gloo as those in a pod do, and need load no libraries."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Mapping

import pytest
import torch

from qlora_trainer.failures import describe

needs_forks = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has seen a GPU cannot fork")


def side_by_side(ranks: int, work: Callable[[int], object]) -> list[int]:
    """The exit codes of `ranks` processes that each do `work` with their number; what they said is in the output."""
    return [code_of(child) for child in begun_side_by_side(ranks, work)]


def begun_side_by_side(ranks: int, work: Callable[[int], object]) -> list[int]:
    """The processes themselves, while they work."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    where = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        forked(lambda rank=rank: work(rank), where | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def code_of(child: int) -> int:
    """How the process ends."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work: Callable[[], object], environment: Mapping[str, str]) -> int:
    """A process that does `work`, with `environment` beside this one's."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.environ.update(environment)
        torch.set_num_threads(1)  # makes a forked thread pool good, which two threads at once would find half made
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:  # noqa: BLE001  nothing of the tests' own process may go on in the fork
        code, _ = describe(error)
        traceback.print_exc()
    finally:
        os._exit(code)
