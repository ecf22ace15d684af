"""Progress reports: they arrive, they outlive a change of token and of leader, and they never hold up a training."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from qlora_api.exchange import PROGRESS_MAX_BYTES, PROGRESS_URL_ENV, ProgressDocument, ProgressName
from qlora_trainer.environment import Pod
from qlora_trainer.reporting import Pace, Reporter, Server, document
from qlora_trainer.standing import Standing
from qlora_trainer.training import train

from .conftest import Place
from .progress_server import Endpoint, make_certificate, until

QUICK = Pace(interval=0.01, first_retry=0.01, longest_retry=0.05, refused=0.05, at_the_end=5)
AT = datetime(2026, 11, 23, 7, 25, 26, 999999, tzinfo=UTC)
Start = Callable[..., Reporter]


def at_step(step: int, **changes: float | None) -> Standing:
    return replace(Standing(at=AT, step=step, steps=300, epoch=step / 100, tokens=1000 * step), **changes)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    endpoint = Endpoint(tmp_path / "endpoint")
    with endpoint.running():
        yield endpoint


@pytest.fixture
def start(caplog: pytest.LogCaptureFixture) -> Iterator[Start]:
    """Starts reporters, and closes them."""
    caplog.set_level("INFO", "qlora_trainer")
    reporters: list[Reporter] = []

    def begin(server: Server, pace: Pace = QUICK) -> Reporter:
        reporters.append(Reporter(server, pace))
        return reporters[-1]

    yield begin
    for reporter in reporters:
        reporter.close()
    until(lambda: not any(thread.name == "progress-reports" for thread in threading.enumerate()))


def test_the_document_is_kubeflows() -> None:
    standing = at_step(
        150, loss=0.00001234567, eval_loss=1.5, tokens_per_second=1234.5678, mfu=0.41, remaining_seconds=61.6
    )
    standing = replace(standing, gpu_memory_bytes={"allocated": 1, "reserved": 2, "reserved_peak": 24_000_000_000})
    assert json.loads(document(standing).to_json()) == {
        "trainerStatus": {
            "progressPercentage": 50,
            "estimatedRemainingSeconds": 62,
            "lastUpdatedTime": "2026-11-23T07:25:26Z",
            "metrics": [
                {"name": "step", "value": "150"},
                {"name": "steps", "value": "300"},
                {"name": "epoch", "value": "1.5"},
                {"name": "loss", "value": "0.000012"},
                {"name": "eval_loss", "value": "1.5"},
                {"name": "tokens_per_second", "value": "1234.5678"},
                {"name": "mfu", "value": "0.41"},
                {"name": "memory_bytes", "value": "24000000000"},
            ],
        }
    }
    assert len(document(standing).to_json()) < PROGRESS_MAX_BYTES
    told = ProgressDocument.model_validate_json(document(standing).to_json()).numbers()
    assert told[ProgressName.LOSS] == pytest.approx(1.2e-5)
    assert set(told) == set(ProgressName), "the operator reads other names"


def test_what_is_no_number_is_not_reported() -> None:
    names = {m.name for m in document(at_step(1, loss=float("nan"))).trainer_status.metrics}
    assert names == {"step", "steps", "epoch"}


def test_a_training_is_reported_to_its_end(place: Place, endpoint: Endpoint, start: Start) -> None:
    reporter = start(endpoint.server)
    result = train(place.train_order(place.data(eval_fraction=0.1)), replace(place.pod, watchers=(reporter,)))
    reporter.close()
    assert {post.token for post in endpoint.posts} == {"first"}
    assert {post.path for post in endpoint.posts} == {"/apis/progress?job=tune"}
    steps = [int(step) for step in endpoint.steps()]
    assert steps == sorted(steps)
    assert 0 in steps, "that it has begun was not reported"
    last = endpoint.posts[-1].document.trainer_status
    assert (last.progress_percentage, last.estimated_remaining_seconds) == (100, 0)
    metrics = {metric.name: float(metric.value) for metric in last.metrics}
    assert metrics["step"] == metrics["steps"] == result.steps == 6
    assert metrics["eval_loss"] == pytest.approx(result.eval_loss, abs=1e-6)
    assert metrics["tokens_per_second"] > 0


def test_only_the_newest_is_sent_and_not_before_its_time(endpoint: Endpoint, start: Start) -> None:
    reporter = start(endpoint.server, replace(QUICK, interval=60))
    reporter.see(at_step(1))
    until(lambda: endpoint.posts)
    for step in range(2, 100):
        reporter.see(at_step(step))
    reporter.close()
    assert endpoint.steps() == ["1", "99"]
    reporter.close()
    assert endpoint.steps() == ["1", "99"], "what had been sent was sent again"


def test_however_fast_the_steps_reports_keep_their_pace(endpoint: Endpoint, start: Start) -> None:
    reporter = start(endpoint.server, replace(QUICK, interval=0.3))
    steps = iter(range(10**9))
    until(lambda: reporter.see(at_step(next(steps))) or len(endpoint.posts) == 3)
    times = [post.received for post in endpoint.posts]
    assert min(later - sooner for sooner, later in pairwise(times)) >= 0.3


def test_the_last_report_is_tried_again_as_long_as_the_end_may_wait(endpoint: Endpoint, start: Start) -> None:
    endpoint.answers += [200, 503, 503]
    reporter = start(endpoint.server, replace(QUICK, interval=60))
    reporter.see(at_step(1))
    until(lambda: endpoint.posts)
    reporter.see(at_step(2))
    reporter.close()
    assert endpoint.steps() == ["1", "2", "2", "2"]


def test_a_new_token_is_used_at_once(endpoint: Endpoint, start: Start) -> None:
    reporter = start(endpoint.server)
    reporter.see(at_step(1))
    until(lambda: endpoint.posts)
    endpoint.token.write_text("second")
    reporter.see(at_step(2))
    until(lambda: len(endpoint.posts) == 2)
    assert [post.token for post in endpoint.posts] == ["first", "second"]


@pytest.mark.parametrize("trouble", [429, 500, 503])
def test_while_the_leader_changes_it_tries_again(
    endpoint: Endpoint, start: Start, caplog: pytest.LogCaptureFixture, trouble: int
) -> None:
    endpoint.answers += [trouble] * 3
    reporter = start(endpoint.server)
    reporter.see(at_step(1))
    until(lambda: "arrive again" in caplog.text)
    assert endpoint.steps() == ["1"] * 4
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"progress reports do not arrive ({trouble} ")
    assert second == "progress reports arrive again"


def test_retries_become_rarer() -> None:
    assert [Pace().after_failures(n) for n in (1, 2, 3, 6, 10**6)] == [1, 2, 4, 30, 30]


def test_after_a_failure_the_newest_is_sent_and_not_what_failed(endpoint: Endpoint, start: Start) -> None:
    endpoint.answers += [503]
    reporter = start(endpoint.server, replace(QUICK, first_retry=0.3))
    reporter.see(at_step(1))
    until(lambda: endpoint.posts)
    reporter.see(at_step(2))
    until(lambda: len(endpoint.posts) == 2)
    assert endpoint.steps() == ["1", "2"]


@pytest.mark.parametrize("status", [401, 403, 404, 307])
def test_refused_is_said_once_and_tried_now_and_then(
    endpoint: Endpoint, start: Start, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    endpoint.answers += [status] * 3
    reporter = start(endpoint.server)
    reporter.see(at_step(1))
    until(lambda: "arrive again" in caplog.text)
    assert len(endpoint.posts) == 4
    assert all(post.path.startswith("/apis/progress") for post in endpoint.posts), "it followed a redirect"
    (first, _) = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"progress reports are refused ({status} ")


def test_a_refusal_does_not_hold_up_the_end(endpoint: Endpoint, start: Start) -> None:
    endpoint.answers += [403] * 100
    reporter = start(endpoint.server, replace(QUICK, at_the_end=30))
    reporter.see(at_step(1))
    started = time.monotonic()
    reporter.close()
    assert time.monotonic() - started < 10
    assert endpoint.steps()[-1] == "1"


def test_a_server_that_hangs_holds_up_nothing(place: Place, endpoint: Endpoint, start: Start) -> None:
    endpoint.hang.clear()
    reporter = start(endpoint.server, replace(QUICK, at_the_end=0.2))
    result = train(place.train_order(), replace(place.pod, watchers=(reporter,)))
    assert result.steps == 6
    assert endpoint.steps() == ["0"], "the training has not waited for the first report to be answered"
    started = time.monotonic()
    reporter.close()
    assert time.monotonic() - started < 5
    endpoint.hang.set()


def test_nobody_listens_and_then_somebody_does(tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    endpoint = Endpoint(tmp_path / "endpoint")
    with endpoint.running():
        pass
    reporter = start(endpoint.server)
    reporter.see(at_step(1))
    until(lambda: "do not arrive (ConnectionRefusedError" in caplog.text)
    with endpoint.running():
        until(lambda: "arrive again" in caplog.text)
    assert endpoint.steps() == ["1"]
    assert len(caplog.records) == 2


def test_a_token_that_is_not_there_yet_is_waited_for(
    endpoint: Endpoint, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.token.unlink()
    reporter = start(endpoint.server)
    reporter.see(at_step(1))
    until(lambda: "do not arrive (FileNotFoundError" in caplog.text)
    endpoint.token.write_text("late")
    until(lambda: endpoint.posts)
    assert endpoint.posts[0].token == "late"


def test_no_other_authority_is_believed(
    tmp_path: Path, endpoint: Endpoint, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    other, _ = make_certificate(tmp_path / "other")
    reporter = start(Server(endpoint.url, other, endpoint.token))
    reporter.see(at_step(1))
    until(lambda: "certificate verify failed" in caplog.text)
    assert not endpoint.posts, "the token was shown to a stranger"


def test_proxies_are_not_asked(endpoint: Endpoint, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    reporter = start(endpoint.server)
    reporter.see(at_step(1))
    until(lambda: endpoint.posts)


def test_without_kubeflows_environment_there_are_no_reports(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qlora_trainer")
    assert Server.from_environment(endpoint.environment) == endpoint.server
    for missing in endpoint.environment:
        assert Server.from_environment({k: v for k, v in endpoint.environment.items() if k != missing}) is None
    assert not caplog.text
    plain = endpoint.environment | {PROGRESS_URL_ENV: "http://operator/progress"}
    assert Server.from_environment(plain) is None
    assert "not an https address" in caplog.text


def test_a_pod_that_nobody_watches_trains(place: Place) -> None:
    assert train(place.train_order(recipe={"max_steps": 1}), Pod(place.pod.interruption, place.pod.claims)).steps == 1
