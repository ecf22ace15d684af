"""What a list of all jobs queues."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from qlora_operator.resync import needs_a_look
from tests.unit.operator.given import NOW

LONG_AGO, JUST_NOW = ("2026-09-01T11:00:00Z", "2026-09-01T11:59:50Z")


def raw(generation: int = 2, ttl: int | None = None, **status: Any) -> dict[str, Any]:
    spec = {} if ttl is None else {"ttlSecondsAfterFinished": ttl}
    return {"metadata": {"generation": generation}, "spec": spec, "status": {"observedGeneration": 2} | status}


@pytest.mark.parametrize(
    ("job", "needed"),
    [
        ({"metadata": {"generation": 1}, "spec": {}}, True),
        (raw(phase="Training"), False),  # its pods are watched
        (raw(phase="Suspended"), False),
        (raw(phase="Succeeded", completionTime=LONG_AGO), False),
        (raw(phase="Failed", completionTime=LONG_AGO), False),
        (raw(3, phase="Failed", completionTime=LONG_AGO), True),
        (raw(ttl=60, phase="Failed", completionTime=LONG_AGO), True),
        (raw(ttl=60, phase="Failed", completionTime=JUST_NOW), False),
        (raw(ttl=60, phase="Failed", completionTime=LONG_AGO, cleanupTime=LONG_AGO), False),
    ],
)
def test_what_is_left_to_do_is_queued(job: dict[str, Any], needed: bool) -> None:
    assert needs_a_look(job, NOW) is needed


def test_a_time_to_live_ends_at_its_second() -> None:
    job = raw(ttl=10, phase="Succeeded", completionTime=JUST_NOW)
    assert needs_a_look(job, NOW)
    assert not needs_a_look(job, NOW - timedelta(seconds=1))
