"""Processes that outlive us are found again, and only they are stopped."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.process import Running, Server, ServerFailedError, launch, stop, wait_ready

SLEEP = Server("sleeper", ["sleep", "600"], lambda: True)


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Running]:
    running = launch(SLEEP, tmp_path, tmp_path)
    yield running
    stop(running, signal.SIGKILL)


def test_a_started_server_is_alive_until_stopped(sleeper: Running) -> None:
    assert sleeper.alive
    stop(sleeper, signal.SIGTERM)
    assert not sleeper.alive


def test_it_leads_a_session_of_its_own_so_that_ctrl_c_passes_it_by(sleeper: Running) -> None:
    assert os.getsid(sleeper.pid) == sleeper.pid != os.getsid(0)


@pytest.mark.parametrize("change", [{"started": 1}, {"boot": "another"}])
def test_a_later_process_with_the_same_pid_is_never_stopped(sleeper: Running, change: dict[str, object]) -> None:
    recorded = dataclasses.replace(sleeper, **change)
    assert not recorded.alive
    stop(recorded, signal.SIGKILL)
    assert sleeper.alive


def test_one_that_ignores_its_stop_signal_is_killed(tmp_path: Path) -> None:
    marker = tmp_path / "ready"
    script = f"import signal, time; signal.signal(15, signal.SIG_IGN); open('{marker}', 'w'); time.sleep(600)"
    stubborn = Server("stubborn", ["python3", "-c", script], marker.exists)
    running = launch(stubborn, tmp_path, tmp_path)
    wait_ready(stubborn, running, tmp_path)
    stop(running, signal.SIGTERM, grace_seconds=0.2)
    assert not running.alive


def test_one_that_ends_early_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    broken = Server("broken", ["sh", "-c", "echo no such flag; exit 2"], lambda: False)
    running = launch(broken, tmp_path, tmp_path)
    with pytest.raises(ServerFailedError, match=r"broken ended before it was ready(.|\n)*no such flag"):
        wait_ready(broken, running, tmp_path)


def test_one_that_never_gets_ready_is_reported_too(tmp_path: Path) -> None:
    slow = dataclasses.replace(SLEEP, ready=lambda: False, ready_within_seconds=0.3)
    running = launch(slow, tmp_path, tmp_path)
    try:
        with pytest.raises(ServerFailedError, match="not ready after 0 s"):
            wait_ready(slow, running, tmp_path)
    finally:
        stop(running, signal.SIGKILL)
