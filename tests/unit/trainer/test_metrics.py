"""A training's metrics, as Prometheus reads them over HTTP."""

from __future__ import annotations

import json
import re
import shutil
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from qlora_api.exchange import DataSource
from qlora_trainer import learning, training
from qlora_trainer.environment import Pod
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.failures import Diverged, Interrupted
from qlora_trainer.metrics import Metrics
from qlora_trainer.standing import Standing
from qlora_trainer.training import train

from .conftest import Place, examples, write_jsonl
from .test_training import InterruptedAfter, losses

HOST = "127.0.0.1"
ON_EVERY_DEVICE = {
    "qlora_train_loss", "qlora_eval_loss", "qlora_learning_rate", "qlora_grad_norm", "qlora_train_step",
    "qlora_train_steps", "qlora_train_epoch", "qlora_tokens_total", "qlora_tokens_per_second",
    "qlora_padding_ratio",
}  # fmt: skip
LOOKS = {"qlora_eval_perplexity", "qlora_eval_score"}


class Scraped(Metrics):
    """Metrics whose endpoint is read over HTTP whenever something is told."""

    def __init__(self) -> None:
        super().__init__()
        self.server = self.serve(0, HOST)
        self.history: list[dict[str, float]] = []

    def scrape(self) -> str:
        assert self.server
        with urllib.request.urlopen(f"http://{HOST}:{self.server.server_port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    def read(self) -> dict[str, float]:
        """Samples of ours by name."""
        families = text_string_to_metric_families(self.scrape())
        return {s.name: s.value for family in families for s in family.samples if s.name.startswith("qlora_")}

    def see(self, standing: Standing) -> None:
        super().see(standing)
        self.history.append(self.read())


@pytest.fixture
def metrics() -> Iterator[Scraped]:
    metrics = Scraped()
    yield metrics
    assert metrics.server
    metrics.server.shutdown()
    metrics.server.server_close()


def on_a_gpu() -> Standing:
    return Standing(
        at=datetime.now(UTC), step=7, steps=9, epoch=0.5, tokens=12345, loss=0.5, eval_loss=0.6, learning_rate=1e-4,
        looks={"perplexity": 1.5, "canary.perplexity": 2.5, "tokenF1": 0.75},
        grad_norm=1.5, tokens_per_second=99.5, padding=0.02, mfu=0.41, remaining_seconds=4.0,
        gpu_memory_bytes={"allocated": 1 << 30, "reserved": 2 << 30, "reserved_peak": 3 << 30},
    )  # fmt: skip


def test_the_series_are_those_of_the_training(place: Place, metrics: Scraped, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qlora_trainer")
    order = place.train_order(place.data(eval_fraction=0.1))
    result = train(order, replace(place.pod, watchers=(metrics,)))
    by_step = {int(seen["qlora_train_step"]): seen for seen in metrics.history}
    assert sorted(by_step) == list(range(7))
    assert set(by_step[0]) == {"qlora_train_step", "qlora_train_steps", "qlora_train_epoch", "qlora_tokens_total"}
    assert [by_step[step]["qlora_train_loss"] for step in range(1, 7)] == losses(place)
    assert by_step[6]["qlora_train_loss"] < by_step[1]["qlora_train_loss"]
    assert f"step 6/6  loss {by_step[6]['qlora_train_loss']:.4f}  " in caplog.text
    assert [by_step[step]["qlora_learning_rate"] for step in (1, 6)] == [
        pytest.approx(5e-3), pytest.approx(learning.learning_rate(5, 6, order.recipe)),
    ]  # fmt: skip
    tokens = [seen["qlora_tokens_total"] for seen in metrics.history]
    assert tokens == sorted(tokens)
    assert tokens[-1] == result.tokens > tokens[0] == 0

    last = metrics.read()
    assert set(last) == ON_EVERY_DEVICE | {"qlora_eval_perplexity"}, "a CPU has no utilisation and no GPU memory"
    assert last["qlora_eval_loss"] == result.eval_loss
    assert last["qlora_train_steps"] == 6
    assert last["qlora_train_epoch"] == pytest.approx(result.epochs, abs=1e-4)
    assert last["qlora_grad_norm"] > 0 < last["qlora_tokens_per_second"]
    assert "process_resident_memory_bytes" in metrics.scrape()


def test_after_a_resume_the_count_of_tokens_goes_on(place: Place, metrics: Scraped) -> None:
    order = place.train_order()
    with pytest.raises(Interrupted):
        train(order, Pod(InterruptedAfter(3 * 3 + 1), place.pod.claims, (metrics,)))
    before = metrics.read()
    assert before["qlora_train_step"] == 3, "the last figures are gone before the process is"
    next_pod = Scraped()
    result = train(order, replace(place.pod, watchers=(next_pod,)))
    assert next_pod.history[0]["qlora_tokens_total"] == before["qlora_tokens_total"] > 0
    assert next_pod.history[0]["qlora_train_loss"] == before["qlora_train_loss"]
    assert next_pod.read()["qlora_tokens_total"] == result.tokens


def test_a_failure_leaves_the_last_figures_readable(
    place: Place, metrics: Scraped, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1000))

    def lost(model: Any, batch: Any, device: Any) -> Any:
        return summed_loss(model, batch, device) * (float("nan") if next(calls) >= 4 else 1)

    monkeypatch.setattr(learning, "summed_loss", lost)
    with pytest.raises(Diverged):
        train(place.train_order(), replace(place.pod, watchers=(metrics,)))
    assert metrics.read()["qlora_train_step"] == 4
    assert re.search(r"^qlora_train_loss NaN$", metrics.scrape(), re.MULTILINE)


def test_what_a_gpu_has_is_told_by_kind() -> None:
    metrics = Metrics()
    metrics.see(on_a_gpu())
    text = generate_latest(metrics.registry).decode()
    assert "qlora_mfu_ratio 0.41\n" in text
    memory = next(f for f in text_string_to_metric_families(text) if f.name == "qlora_gpu_memory_bytes")
    assert {sample.labels["kind"]: sample.value for sample in memory.samples} == {
        "allocated": 1 << 30, "reserved": 2 << 30, "reserved_peak": 3 << 30,
    }  # fmt: skip


def test_names_follow_prometheus_conventions() -> None:
    """https://prometheus.io/docs/practices/naming and what `promtool check metrics` looks at."""
    metrics = Metrics()
    metrics.see(on_a_gpu())
    families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    ours = [family for family in families if family.name.startswith("qlora_")]
    names = {sample.name for family in ours for sample in family.samples}
    assert names == ON_EVERY_DEVICE | LOOKS | {"qlora_mfu_ratio", "qlora_gpu_memory_bytes"}
    for family in ours:
        assert family.documentation.endswith("."), family.name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            assert set(sample.labels) <= {"kind", "set", "metric"}, "which job it is the scraper says"
    assert {family.name for family in families} - {family.name for family in ours} >= {
        "process_cpu_seconds", "process_open_fds", "process_resident_memory_bytes",
    }  # fmt: skip


def test_before_it_begins_a_training_has_no_figures() -> None:
    assert "qlora_" not in generate_latest(Metrics().registry).decode()


def test_what_is_looked_at_in_flight_is_told_and_told_again_after_a_resume(place: Place, metrics: Scraped) -> None:
    write_jsonl(place.claims / "data" / "canary.jsonl", examples()[:4])
    data = place.data(canary=DataSource(uri="pvc://data/canary.jsonl"))
    order = place.train_order(data, {"max_steps": 3, "best_metric": "tokenF1", "evals_per_epoch": 2})
    train(order, replace(place.pod, watchers=(metrics,)))
    manifest = sorted(place.work.glob("checkpoints/*/step-*"))[-1]
    looks = json.loads((manifest / "progress.json").read_text())["looks"]
    assert len(looks) > 1

    def served(of: Metrics) -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(generate_latest(of.registry).decode())
        return {(s.name, *s.labels.values()): s.value for f in families for s in f.samples if s.name in LOOKS}

    expected = {
        ("qlora_eval_perplexity", "golden"): looks[-1]["perplexity"],
        ("qlora_eval_perplexity", "canary"): looks[-1]["canary.perplexity"],
        ("qlora_eval_score", "tokenF1"): looks[-1]["tokenF1"],
    }
    assert served(metrics) == expected
    assert looks[0]["perplexity"] != looks[-1]["perplexity"]
    (place.work / "results" / "train.json").unlink()
    next_pod = Metrics()
    train(order, replace(place.pod, watchers=(next_pod,)))
    assert served(next_pod) == expected


def test_a_busy_port_is_no_reason_not_to_train(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qlora_trainer")
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        metrics = Metrics()
        assert metrics.serve(port, HOST) is None
    assert caplog.messages == [f"no metrics: port {port} cannot be listened on (Address already in use)"]
    assert train(place.train_order(recipe={"max_steps": 1}), replace(place.pod, watchers=(metrics,))).steps == 1


class Kept:
    """A watcher that keeps all it is told."""

    def __init__(self) -> None:
        self.seen: list[Standing] = []

    def see(self, standing: Standing) -> None:
        self.seen.append(standing)


def test_what_takes_long_shows_that_it_goes_on(place: Place) -> None:
    """Each batch of an evaluation is told, and of the golden set: its loss, and the answers of both models."""

    def told_at_the_end(**data: Any) -> int:
        kept = Kept()
        shutil.rmtree(place.work, ignore_errors=True)
        train(place.train_order(place.data(**data), {"max_steps": 1}), replace(place.pod, watchers=(kept,)))
        assert all(sooner.at <= later.at for sooner, later in pairwise(kept.seen))
        return sum(standing.step == 1 for standing in kept.seen)

    assert told_at_the_end(golden=None) == 1
    assert told_at_the_end() == 1 + 12 // 2 + 1 + 2
    evaluation = told_at_the_end(golden=None, eval_fraction=0.5) - 1
    assert evaluation > 1 + 1, "more than one batch, and the loss at the end"


def test_speed_is_that_of_the_last_minute(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that becomes slow shows within a minute, whatever the mean of the whole run."""
    clock = iter(range(10**6))
    monkeypatch.setattr(learning.time, "monotonic", lambda: 40.0 * next(clock))
    kept = Kept()
    train(place.train_order(checkpoint_every_seconds=10**9), replace(place.pod, watchers=(kept,)))
    last = {standing.step: standing for standing in kept.seen}
    recent = last[6].tokens - last[4].tokens  # two steps of 40 s: those of the last minute
    assert last[6].tokens_per_second == pytest.approx(recent / 80)
    assert last[6].remaining_seconds == 0 < (last[1].remaining_seconds or 0)


def test_utilisation_is_told_everywhere_where_the_peak_is_known(
    place: Place, metrics: Scraped, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qlora_trainer")
    monkeypatch.setattr(
        training, "peak_flops", lambda device, dtype: 1e11 if (device, dtype) == ("cpu", "float32") else None
    )
    result = train(place.train_order(), replace(place.pod, watchers=(metrics,)))
    assert result.mfu is not None
    assert 0 < result.mfu < 1
    told = metrics.read()["qlora_mfu_ratio"]
    assert told == pytest.approx(result.mfu, abs=1e-4), "all within the last minute"
    assert f"  MFU {told:.1%}  remaining 0m00s" in caplog.text  # the result's is rounded, and once more would be wrong
