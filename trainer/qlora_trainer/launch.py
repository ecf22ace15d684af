"""A pod with several GPUs: one process for each, started by torchrun, and one end told for all of them."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.run import config_from_args, parse_args

from qlora_api.exchange import ExitCode, TrainOrder, failed
from qlora_trainer.environment import log
from qlora_trainer.failures import Unavailable
from qlora_trainer.ranks import patience_of, roll_call, said_of
from qlora_trainer.words import WORDS_ENV, Word, words_in

#: So long pods wait for one another: some start when a node has been made for them and several GB of image are pulled.
PATIENCE = timedelta(minutes=30)


def launch(order: TrainOrder, report_path: Path) -> int:
    """Run this program once for each GPU of the pod; the exit code and report are those of the rank that ended the
    others. torchrun's own settings come from the environment (PET_…).

    Raises Unavailable when the training's other pods do not come, or go before all are there.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="qlora-ranks-") as words:
        os.environ[WORDS_ENV] = words
        config, command, arguments = config_from_args(parse_args(["-m", "qlora_trainer"]))
        store = _gathered(config, order)
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
        del store  # its server is torchrun's too: the first pod's, and for as long as ranks may ask it
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


def _gathered(config: LaunchConfig, order: TrainOrder) -> TCPStore | None:
    """Wait until all pods of the training are there, with the store of the first of them; None where there is one pod.

    torchrun would wait too, but in C++, where no signal is heard, and without a word of who is missing.
    """
    if order.nodes == 1:
        return None
    me, patience = int(config.rdzv_configs["rank"]), patience_of(os.environ, PATIENCE)
    deadline = time.monotonic() + patience.total_seconds()
    host, port = parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=29500)

    def ranks_of(pods: Sequence[int]) -> str:
        each = order.ranks_per_node
        ranks = [rank for pod in pods for rank in range(pod * each, (pod + 1) * each)]
        return f"{said_of('pod', pods)} ({said_of('rank', ranks)})"

    log.info("pod %d of %d waits for the others", me, order.nodes)
    try:
        while me and not _answers(host, port):
            if time.monotonic() >= deadline:
                raise Unavailable(_never_came(ranks_of([0]), order.nodes, patience))
            time.sleep(0.5)
        store = TCPStore(host, port, is_master=me == 0, wait_for_workers=False, multi_tenant=True)
        if missing := roll_call(store, "pod", me, order.nodes, deadline):
            raise Unavailable(_never_came(ranks_of(missing), order.nodes, patience))
    except DistError as error:
        raise Unavailable(
            f"{ranks_of([0])} of the training's {order.nodes} pods has gone while the others were awaited; the next "
            "attempt begins anew"
        ) from error
    return store


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:  # its name is not known before the pod is
        return False
    return True


def _never_came(who: str, pods: int, patience: timedelta) -> str:
    return (
        f"{who} of the training's {pods} pods did not come within {patience.total_seconds() / 60:g} minutes: no node "
        "has room, its image is not pulled, or the network between the pods is closed (kubectl describe pod says "
        "which); the next attempt waits anew"
    )


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
