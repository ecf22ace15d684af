"""What trainers report, and how it is shown."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from qlora_api.exchange import ProgressDocument, ProgressName
from qlora_api.v1alpha1 import Progress
from qlora_operator.lifecycle.observed import Active, Observed, Reported
from qlora_operator.lifecycle.policies import next_step
from qlora_operator.lifecycle.progress import in_short, percent, progress
from qlora_operator.reconcile import progress_alone
from tests.unit.operator import given
from tests.unit.operator.given import INSPECT, MERGE, NOW, PUBLISH_ADAPTER, TRAIN

RUNNING = Active(node="node-1", started=NOW - timedelta(minutes=3))
NUMBERS = {
    ProgressName.STEP: 6.0, ProgressName.STEPS: 12.0, ProgressName.EPOCH: 1.5049, ProgressName.LOSS: 0.123456,
    ProgressName.EVAL_LOSS: 0.2, ProgressName.TOKENS_PER_SECOND: 1234.6, ProgressName.MFU: 0.41234,
}  # fmt: skip


def said(attempt: str = "support-bot-train-1", *, percent: int | None = None, **numbers: float) -> Reported:
    known = NUMBERS | {ProgressName(name): value for name, value in numbers.items()}
    return Reported(attempt, NOW, percent, 754, {} if percent is not None else known)


def seen(reported: Reported | None, name: str = "train-1") -> Observed:
    of = given.history(given.job(), INSPECT)
    around = given.seen(of, {name: RUNNING}, claim=True)
    return Observed(around.attempts, around.claims, reported=reported)


def test_a_report_reaches_the_status_rounded() -> None:
    status = next_step(given.history(given.job(), INSPECT), seen(said()), NOW).status
    assert status.progress is not None
    assert status.progress.to_api() == {
        "percent": 50, "step": 6, "steps": 12, "epoch": 1.5, "loss": 0.1235, "evalLoss": 0.2, "tokensPerSecond": 1235,
        "mfu": 0.412, "remaining": "12m", "lastReportTime": "2026-09-01T12:00:00Z",
    }  # fmt: skip


def test_a_report_of_an_earlier_attempt_is_not_taken_for_this_one() -> None:
    of = given.history(given.job(), INSPECT, before=[given.attempt(TRAIN, 1, "Crashed")])
    around = Observed({"support-bot-train-2": RUNNING}, {"support-bot-work": True}, reported=said())
    assert progress(of, around).step is None
    assert progress(of, Observed(around.attempts, around.claims, reported=said("support-bot-train-2"))).step == 6


def test_what_is_known_stays_when_nothing_is_reported() -> None:
    of = given.history(given.job(), INSPECT)
    first = next_step(of, seen(said()), NOW).status
    second = next_step(type(of)(of.metadata, of.spec, first), seen(None), NOW).status
    assert second.progress == first.progress


def test_a_foreign_trainer_is_taken_by_its_percentage() -> None:
    of = given.history(given.job(), INSPECT, progress=Progress(steps=12))
    known = progress(of, seen(said(percent=25)))
    assert (known.step, known.steps, known.percent) == (3, 12, 27)


def test_percent_grows_with_what_is_done() -> None:
    edits = {"output.formats": given.BOTH}
    way = (INSPECT, TRAIN, MERGE, PUBLISH_ADAPTER)
    histories = [given.history(given.job(edits), *way[:n]) for n in range(len(way) + 1)]
    shares = [percent(of.spec, of.status) for of in histories]
    assert shares == [0, 4, 80, 90, 95]
    trained_half = percent(given.job(edits).spec, given.history(given.job(edits), INSPECT).status, 0.5)
    assert trained_half == 42


def test_only_progress_is_written_rarely() -> None:
    of = given.history(given.job(), INSPECT)
    first = next_step(of, seen(said()), NOW).status
    later = next_step(type(of)(of.metadata, of.spec, first), seen(said(step=7.0)), NOW).status
    assert progress_alone(first, later)
    assert not progress_alone(first, first)
    assert not progress_alone(of.status, first), "a new phase is a step of the lifecycle"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m00s"), (599, "9m59s"), (754, "12m"), (11_100, "3h05m"), (200_000, "2d07h")],
)
def test_a_span_of_time_in_short(seconds: int, text: str) -> None:
    assert in_short(seconds) == text


def document(**metrics: Any) -> ProgressDocument:
    listed = [{"name": name, "value": value} for name, value in metrics.items()]
    status = {"metrics": listed, "lastUpdatedTime": "2026-09-01T12:00:00Z"}
    return ProgressDocument.model_validate_json(json.dumps({"trainerStatus": status}))


def test_metrics_that_are_not_known_are_left_alone() -> None:
    assert document(loss="0.5", nonsense="x").numbers() == {ProgressName.LOSS: 0.5}


@pytest.mark.parametrize("value", ["much", "nan", "inf", ""])
def test_a_metric_that_is_no_number_is_named(value: str) -> None:
    with pytest.raises(ValueError, match="metric loss"):
        document(loss=value).numbers()
