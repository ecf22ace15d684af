"""What ends a training that hangs: nothing else would."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest

from qlora_trainer.standing import Standing
from qlora_trainer.watchdog import Patience, Watchdog


def at(step: int) -> Standing:
    return Standing(at=datetime.now(UTC), step=step, steps=9, epoch=0.1, tokens=1)


def test_a_training_without_steps_is_given_up_with_the_reason(capfd: pytest.CaptureFixture[str]) -> None:
    reasons: list[str] = []
    given_up = threading.Event()

    def give_up(reason: str) -> None:
        reasons.append(reason)
        given_up.set()

    watchdog = Watchdog(give_up, Patience(first_step=60.0, steps=2.0, least=0.2))
    for step in range(3):
        watchdog.see(at(step))
    assert given_up.wait(20), "nobody noticed"
    watchdog.close()
    assert "after step 2, and a step usually takes 0.0 s" in reasons[0]
    assert 'File "' in capfd.readouterr().err, "the log says where each thread stood"


def test_before_the_first_step_it_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("qlora_trainer.watchdog.time.monotonic", lambda: now[0])
    watchdog = Watchdog(lambda _: None, Patience(first_step=3600.0, steps=20.0, least=900.0))
    watchdog.see(at(7))
    assert watchdog.limit_seconds == 3600
    now[0] = 110.0
    watchdog.see(at(8))
    assert watchdog.limit_seconds == 900
    now[0] = 310.0
    watchdog.see(at(9))
    assert watchdog.limit_seconds == 20 * (10 + 200) / 2
    watchdog.see(at(9))
    assert watchdog.limit_seconds == 20 * (10 + 200) / 2, "a sign of life is no step"
    watchdog.close()
