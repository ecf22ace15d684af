"""Ranks that wait for one another: told to stop they go at once, and who never comes is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import HashStore

from qlora_api.exchange import ExitCode, TrainOrder, parse_report
from qlora_trainer import interruption
from qlora_trainer.interruption import Interruption
from qlora_trainer.main import main
from qlora_trainer.ranks import PATIENCE_ENV, meeting, roll_call, said_of
from qlora_trainer.words import words_in

from .conftest import Place
from .side_by_side import begun_side_by_side, code_of, needs_forks
from .test_ranks import SHARED, free_port, started, up_to

#: A loaded machine takes seconds to end a process; what is not at once takes the whole grace period, or 30 minutes.
AT_ONCE_SECONDS, GRACE_SECONDS = 60, 240


@pytest.fixture
def order(place: Place) -> TrainOrder:
    """For two pods of one rank each."""
    return place.train_order(None, SHARED | {"max_steps": 400}).model_copy(update={"nodes": 2})


def pod(place: Place, order: TrainOrder, number: int, port: int, **more: str) -> subprocess.Popen[str]:
    where = {"PET_NNODES": "2", "PET_NODE_RANK": str(number), "PET_MASTER_ADDR": "127.0.0.1"}
    report = {"QLORA_REPORT": str(place.root / f"report-{number}")}
    grace = {"PET_SHUTDOWN_TIMEOUT": str(GRACE_SECONDS)}
    return started(place, order, {**where, **report, **grace, "PET_MASTER_PORT": str(port), **more})


def told(place: Place, number: int) -> str | None:
    return parse_report((place.root / f"report-{number}").read_text()).failure


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_pod_that_waits_for_the_others_leaves_at_once(place: Place, order: TrainOrder, number: int) -> None:
    program = pod(place, order, number, free_port())
    up_to(program, f"pod {number} of 2 waits for the others")
    began = time.monotonic()
    program.send_signal(signal.SIGTERM)
    output, _ = program.communicate(timeout=300)
    assert program.returncode == ExitCode.INTERRUPTED, output
    assert time.monotonic() - began < AT_ONCE_SECONDS
    assert told(place, number) == "told to stop (SIGTERM)"


@pytest.mark.soak
@pytest.mark.parametrize("number", [0, 1])
def test_pods_that_never_come_are_named(place: Place, order: TrainOrder, number: int) -> None:
    program = pod(place, order, number, free_port(), **{PATIENCE_ENV: "3"})
    output, _ = program.communicate(timeout=300)
    assert program.returncode == 1, output
    failure = told(place, number)
    assert failure
    missing = f"pod {1 - number} (rank {1 - number}) of the training's 2 pods"
    assert failure.startswith(f"{missing} did not come within 0.05 minutes: no node has room")
    assert "Traceback" not in output


@needs_forks
def test_a_rank_that_another_one_keeps_waiting_leaves_at_once(
    place: Place, order: TrainOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank prepares the data, which takes long, and only the second one's node is drained."""
    (place.root / "order.json").write_text(order.to_json())
    for name, value in {"QLORA_ORDER": place.root / "order.json", "QLORA_CLAIMS": place.claims}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("QLORA_WORDS", str(tmp := place.root / "words"))
    tmp.mkdir()

    def waits_or_keeps_waiting(rank: int) -> None:
        if rank == 1:
            sys.exit(main())
        with meeting():
            (place.root / "met").touch()
            time.sleep(600)

    first, second = begun_side_by_side(2, waits_or_keeps_waiting)
    _until(lambda: (place.root / "met").exists())
    _until_at_rest(second)
    began = time.monotonic()
    os.kill(second, signal.SIGTERM)
    assert code_of(second) == ExitCode.INTERRUPTED
    assert time.monotonic() - began < AT_ONCE_SECONDS
    os.kill(first, signal.SIGKILL)
    assert code_of(first) == -signal.SIGKILL
    (word,) = words_in(tmp)
    assert (word.rank, word.code, word.foreseen) == (1, ExitCode.INTERRUPTED, True)
    said = "told to stop (SIGTERM) while waiting for the other ranks, with nothing to save"
    assert parse_report(word.report).failure == said


def test_what_is_to_be_saved_first_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A main thread that is deaf while work is at stake keeps its grace period."""
    monkeypatch.setattr(interruption, "HEARING_SECONDS", 0.01)
    left: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    told = Interruption()
    told.install()
    told.leave_when_deaf(lambda: left.append(1))
    monkeypatch.setattr(told._heard, "wait", lambda _seconds: False)
    try:
        with told.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            _until(lambda: told.requested)
            time.sleep(0.2)
            assert not left
        os.kill(os.getpid(), signal.SIGTERM)
        _until(lambda: left == [1])
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before)


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _until_at_rest(pid: int) -> None:
    """Until the process has done nothing for some seconds: it waits, and not in Python, which looks every tenth."""
    used, since = -1, time.monotonic()

    def rests() -> bool:
        nonlocal used, since
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        if (now := int(fields[11]) + int(fields[12])) != used:
            used, since = now, time.monotonic()
        return time.monotonic() - since > 2

    _until(rests)


def test_who_is_missing_is_known_at_the_deadline() -> None:
    store = HashStore()
    for here in (0, 2):
        store.set(f"rank/{here}", "here")
    assert roll_call(store, "rank", 4, 6, time.monotonic() + 0.3) == [1, 3, 5]
    for here in (1, 3):
        store.set(f"rank/{here}", "here")
    assert roll_call(store, "rank", 5, 6, time.monotonic() + 30) == []


@pytest.mark.parametrize(
    ("numbers", "said"),
    [([3], "rank 3"), ([0, 2], "ranks 0, 2"), ([8, 9, 10], "ranks 8 to 10"), ([1, 2, 5], "ranks 1, 2, 5")],
)
def test_ranks_in_words(numbers: list[int], said: str) -> None:
    assert said_of("rank", numbers) == said
