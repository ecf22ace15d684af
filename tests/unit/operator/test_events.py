"""Events: each thing that happened is told once, in the words of the status."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from qlora_api.v1alpha1 import JobStatus
from qlora_operator.events import Event, between, manifest
from qlora_operator.lifecycle.observed import Active, Job
from qlora_operator.lifecycle.policies import next_step
from qlora_operator.lifecycle.tasks import INSPECT, TRAIN
from tests.unit.operator import given
from tests.unit.operator.given import NOW, PUBLISH_ADAPTER

START = given.job()
TRAINABLE = given.history(START, INSPECT)
RUNNING = Active(node="node-1", started=NOW)
WAITING = Active(waiting="not scheduled: no GPU")


def decided(of: Job, seconds: int = 0, **attempts: Any) -> JobStatus:
    seen = given.seen(of, {name.replace("_", "-"): state for name, state in attempts.items()})
    return next_step(of, seen, NOW + timedelta(seconds=seconds)).status


def told(before: JobStatus, after: JobStatus) -> list[tuple[str, bool]]:
    return [(event.reason, event.warning) for event in between(before, after)]


STORIES: list[Any] = [
    # from, to, the events
    pytest.param(JobStatus(), decided(START), [("Starting", False)], id="taken up"),
    pytest.param(decided(TRAINABLE), decided(TRAINABLE, train_1=WAITING), [("Waiting", False)], id="waits for a GPU"),
    pytest.param(
        decided(TRAINABLE, train_1=WAITING), decided(TRAINABLE, train_1=RUNNING), [("Running", False)], id="it got one"
    ),
    pytest.param(
        decided(TRAINABLE, train_1=RUNNING), decided(TRAINABLE, 9, train_1=RUNNING), [], id="nothing new: nothing told"
    ),
    pytest.param(
        decided(TRAINABLE, train_1=RUNNING),
        decided(TRAINABLE, train_1=given.succeeded(TRAIN)),
        [("AttemptSucceeded", False), ("Starting", False)],
        id="trained",
    ),
    pytest.param(
        decided(TRAINABLE, train_1=RUNNING),
        decided(TRAINABLE, train_1=given.exited(1)),
        [("AttemptCrashed", True), ("Starting", False)],
        id="crashed",
    ),
    pytest.param(
        START.status.model_copy(update={"attempts": (given.attempt(INSPECT, 1, "BadInput", message="line 3"),)}),
        decided(given.job(status=JobStatus(attempts=(given.attempt(INSPECT, 1, "BadInput", message="line 3"),)))),
        [("BadInput", True)],
        id="failed: a warning, and the attempt is not told again",
    ),
    pytest.param(
        given.history(START, INSPECT, TRAIN, PUBLISH_ADAPTER).status,
        decided(given.history(START, INSPECT, TRAIN, PUBLISH_ADAPTER)),
        [("Published", False)],
        id="published",
    ),
]


@pytest.mark.parametrize(("before", "after", "expected"), STORIES)
def test_what_is_told(before: JobStatus, after: JobStatus, expected: list[tuple[str, bool]]) -> None:
    assert told(before, after) == expected


def test_the_same_status_tells_nothing() -> None:
    status = decided(TRAINABLE, train_1=given.exited(1))
    assert told(status, status) == []
    assert told(status, JobStatus.model_validate(status.to_api())) == [], "nor when read back from the server"


def test_out_of_memory_says_what_is_done_about_it() -> None:
    after = decided(TRAINABLE, train_1=given.exited(13, says="needed 2 GiB more"))
    event = next(between(decided(TRAINABLE), after))
    assert event.reason == "AttemptOutOfMemory"
    assert event.message == "support-bot-train-1: needed 2 GiB more; micro-batch 8 → 4, accumulation 4 → 8"


def test_an_event_is_one_that_the_server_takes() -> None:
    sent = manifest(Event("BadInput", "é" * 5000, warning=True), START.metadata, NOW)
    assert sent["type"] == "Warning"
    assert len(sent["message"]) <= 1024, "the API server refuses longer ones"
    assert sent["involvedObject"]["uid"] == given.UID
    assert sent["metadata"] == {"generateName": "support-bot-", "namespace": "team-a"}
    assert sent["firstTimestamp"] == sent["lastTimestamp"] == "2026-09-01T12:00:00Z"
