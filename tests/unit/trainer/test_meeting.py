"""Ranks that wait for one another: told to stop they go at once, and who never comes is named."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from qlora_api.exchange import ExitCode, TrainOrder, parse_report
from qlora_trainer import interruption
from qlora_trainer.interruption import Interruption
from qlora_trainer.main import main
from qlora_trainer.ranks import PATIENCE_ENV, meeting, roll_call, said_of
from qlora_trainer.words import words_in

from .conftest import Place
from .side_by_side import begun_side_by_side, code_of, forked, needs_forks
from .test_ranks import SHARED, free_port

#: A loaded machine takes seconds to end a process; what is not at once takes the whole grace period, or 30 minutes.
AT_ONCE_SECONDS = 60


@pytest.fixture
def order(place: Place) -> TrainOrder:
    """For two pods of one rank each."""
    return place.train_order(None, SHARED | {"max_steps": 400}).model_copy(update={"nodes": 2})


def pod(place: Place, order: TrainOrder, number: int, **more: str) -> int:
    """The program of one of the two pods, with the environment that the manifests give it; nobody else is there."""
    (place.root / "order.json").write_text(order.to_json())
    environment = {
        "QLORA_ORDER": str(place.root / "order.json"),
        "QLORA_REPORT": str(place.root / "report"),
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "1",
        "PET_NODE_RANK": str(number),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(free_port()),
        **more,
    }

    def program() -> None:
        with (place.root / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            sys.stdout = log
            sys.exit(main())

    return forked(program, environment)


def told(place: Place) -> str | None:
    return parse_report((place.root / "report").read_text()).failure


@needs_forks
@pytest.mark.parametrize("number", [0, 1])
def test_a_pod_that_waits_for_the_others_leaves_at_once(place: Place, order: TrainOrder, number: int) -> None:
    program = pod(place, order, number)
    _until(lambda: f"pod {number} of 2 waits for the others" in _log(place))
    began = time.monotonic()
    os.kill(program, signal.SIGTERM)
    assert code_of(program) == ExitCode.INTERRUPTED, _log(place)
    assert time.monotonic() - began < AT_ONCE_SECONDS
    assert told(place) == "told to stop (SIGTERM)"


@needs_forks
@pytest.mark.parametrize("number", [0, 1])
def test_pods_that_never_come_are_named(place: Place, order: TrainOrder, number: int) -> None:
    assert code_of(pod(place, order, number, **{PATIENCE_ENV: "1.5"})) == 1, _log(place)
    missing = f"pod {1 - number} (rank {1 - number}) of the training's 2 pods"
    failure = told(place)
    assert failure
    assert failure.startswith(f"{missing} did not come within 0.025 minutes: no node has room")
    assert "Traceback" not in _log(place)


def _log(place: Place) -> str:
    log = place.root / "log"
    return log.read_text() if log.exists() else ""


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
    said = "told to stop (SIGTERM) while a library was at work, with nothing to save"
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
