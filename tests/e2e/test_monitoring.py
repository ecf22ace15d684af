"""What a platform team sees of a job in Prometheus and Grafana: a real training, scraped as the chart says.

The Prometheus operator makes the configuration of the installed PodMonitors and rules; a real Prometheus discovers the
pods, and every query of the dashboard is put to it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean
from typing import Any

import pytest

from charts.monitoring import dashboard, page
from examples.quickstart.install import install
from qlora_operator.metrics import OF_A_JOB, SERIES
from tests.cluster import gpus, prometheus
from tests.cluster.client import Manifest
from tests.cluster.prometheus import Prometheus
from tests.e2e.conftest import FEW, VALUES, Product, quickstart

pytestmark = pytest.mark.e2e

NAME, BLOCKED = "watched", "blocked"
SHORT = {
    "maxSteps": 40,
    "learningRate": 2e-3,
    "effectiveBatchSize": 8,
    "gradientCheckpointing": False,
    "bestMetric": "exactMatch",
}
MONITORING = {
    "podMonitor": {"enabled": True, "interval": "1s"},
    "rules": {"enabled": True},
    "dashboard": {"enabled": True},
}
#: What only a GPU can tell.
NOT_ON_THE_CPU = {"qlora_mfu_ratio", "qlora_gpu_memory_bytes"}
#: What Grafana fills in.
FILLED_IN = {"$namespace": dashboard.ALL, "$qlorajob": dashboard.ALL, "$__rate_interval": "30s", "$__range": "15m"}


@dataclass(frozen=True)
class Watched:
    """A job that ran, and the server that scraped it from `start` to `end` (seconds since 1970)."""

    product: Product
    server: Prometheus
    job: Manifest
    start: float
    end: float

    def curve(self, series: str) -> list[float]:
        """The values of one of the job's series, in order."""
        ((_, points),) = self.server.query_range(f'{series}{{qlorajob="{NAME}"}}', self.start, self.end)
        return [value for _, value in points]


ENDED = 'qlora_attempts_total{outcome="Succeeded"}'


def total(server: Prometheus, counter: str, at: float | None = None) -> float:
    """The sum of a counter's series: of its labels, and of the operator's replicas."""
    return sum(value for _, value in server.query(counter, at))


@contextmanager
def monitored(product: Product) -> Iterator[None]:
    """The installation with all that the chart has for monitoring, and afterwards without it."""
    install(product.cluster, product.images, {**VALUES, "monitoring": MONITORING})
    try:
        yield
    finally:
        install(product.cluster, product.images, VALUES)


@pytest.fixture(scope="module")
def watched(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One job run to its end; beside it, one that the operator is kept from starting for a while."""
    cluster, namespace = product.cluster, product.namespace
    directory = tmp_path_factory.mktemp("prometheus")
    gpus.give(cluster, gpus.A2, 1)
    with prometheus.kinds(cluster), monitored(product):
        with prometheus.translated(cluster, namespace, directory) as configuration:
            made = configuration(2)
        with prometheus.serving(made, directory) as server:
            cluster.wait("the operator is scraped", lambda: server.query("qlora_leader == 1"), timeout=30)
            start = time.time()
            before = total(server, ENDED)
            somebodys = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{BLOCKED}-inspect-1"}}
            cluster.create(somebodys, namespace)
            product.apply(quickstart(BLOCKED))
            cluster.wait("it is backed off", lambda: server.query("qlora_workqueue_backing_off > 0"), timeout=30)
            cluster.delete("qlorajobs.qlora.dev", BLOCKED, namespace)
            few = {"uri": f"pvc://quickstart/{FEW}"}
            job = quickstart(
                NAME, training=SHORT, evaluation={"golden": few, "canary": few}, hardware={"accelerator": "nvidia"}
            )
            job["spec"]["output"]["formats"] = ["adapter"]
            product.apply(job)
            finished = product.wait_for(NAME, "Succeeded", timeout=500)
            cluster.wait(
                "its last attempt is scraped",
                lambda: total(server, ENDED),
                lambda now: now >= before + len(finished["status"]["attempts"]),
                timeout=30,
            )
            yield Watched(product, server, finished, start, time.time())
    gpus.take(cluster)


def test_operator_and_trainers_are_scraped_and_nothing_else(watched: Watched) -> None:
    answered = watched.server.query_range("up", watched.start, watched.end)
    assert {labels["job"] for labels, _ in answered} == {"qlora-operator", "qlora-train"}
    training = [labels for labels, _ in answered if labels["job"] == "qlora-train"]
    ours = {labels["pod"] for labels in training if labels["namespace"] == watched.product.namespace}
    assert [pod for pod in ours if pod.startswith(f"{NAME}-train-1-")]
    assert all(labels["pod"].startswith(f"{labels['qlorajob']}-train-") for labels in training)


def test_every_series_is_there_and_none_that_is_not_documented(watched: Watched) -> None:
    documented = {series.name for series in SERIES} | {
        sample.name for family in page.trainer_series() for sample in family.samples
    }
    for series in SERIES:
        if series.buckets:
            documented.remove(series.name)
            documented |= {series.name + part for part in ("_bucket", "_count", "_sum")}
    assert watched.server.names('{__name__=~"qlora_.+"}') == documented - NOT_ON_THE_CPU


def test_the_loss_falls_and_the_steps_rise(watched: Watched) -> None:
    losses = watched.curve("qlora_train_loss")
    fifth = len(losses) // 5
    assert fifth >= 2, "too few scrapes to speak of a curve"
    assert fmean(losses[-fifth:]) < 0.9 * fmean(losses[:fifth])
    steps = watched.curve("qlora_train_step")
    assert steps == sorted(steps)
    assert steps[-1] > 0.8 * SHORT["maxSteps"]
    assert set(watched.curve("qlora_train_steps")) == {SHORT["maxSteps"]}


def test_the_operators_figures_are_those_of_the_status(watched: Watched) -> None:
    status, server = watched.job["status"], watched.server
    memory = status["plan"]["memory"]
    vram = {labels["kind"]: value for labels, value in server.query(f'qlora_vram_bytes{{qlorajob="{NAME}"}}')}
    assert vram == {"predicted": memory["totalBytes"], "measured": memory["measuredBytes"]}
    progress = watched.curve("qlora_job_progress_ratio")
    assert progress == sorted(progress) and 0 < progress[-1] <= 1
    ((labels, _),) = server.query(f'qlora_job_phase{{qlorajob="{NAME}"}}')
    assert (labels["namespace"], labels["phase"]) == (watched.product.namespace, "Succeeded")
    (training,) = (a for a in status["attempts"] if a["stage"] == "train")
    ran = datetime.fromisoformat(training["ended"]) - datetime.fromisoformat(training["started"])
    held = increase(watched, f'qlora_gpu_seconds_total{{product="{gpus.A2.name}"}}')
    assert held == pytest.approx(ran.total_seconds())
    for stage in ("inspect", "train", "publish"):
        assert increase(watched, f'qlora_attempts_total{{stage="{stage}",outcome="Succeeded"}}') == 1


def increase(watched: Watched, counter: str) -> float:
    """By how much a counter has risen while it was watched; by its values, not extrapolated."""
    return total(watched.server, counter, watched.end) - total(watched.server, counter, watched.start)


def test_back_off_is_seen(watched: Watched) -> None:
    assert increase(watched, 'qlora_reconcile_errors_total{reason="409"}') >= 1
    assert increase(watched, "qlora_workqueue_retries_total") >= 1
    backing_off = watched.server.query_range("qlora_workqueue_backing_off", watched.start, watched.end)
    assert max(value for _, points in backing_off for _, value in points) >= 1


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Panel and expression, as the chart ships them."""
    for panel in json.loads(dashboard.FILE.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def filled_in(expression: str) -> str:
    for variable, value in FILLED_IN.items():
        expression = expression.replace(variable, value)
    return expression


@pytest.mark.parametrize(("panel", "expression"), list(dashboard_queries()))
def test_every_query_of_the_dashboard_returns_data(watched: Watched, panel: str, expression: str) -> None:
    found = watched.server.query_range(filled_in(expression), watched.start, watched.end)
    values = [value for _, points in found for _, value in points if not math.isnan(value)]
    if any(name in expression for name in NOT_ON_THE_CPU):
        assert not values, f"{panel} can be told on the CPU after all: expect it"
    else:
        assert values, f"{panel}: no data for {expression}"


def test_the_dashboard_and_its_variables_are_there_to_be_found(watched: Watched) -> None:
    (installed,) = watched.product.cluster.list("configmap", selector="grafana_dashboard=1")
    shipped: Any = json.loads(next(iter(installed["data"].values())))
    queries = {v["name"]: v["query"] for v in shipped["templating"]["list"] if v["type"] == "query"}
    assert set(queries) == {"namespace", "qlorajob"}
    for label, query in queries.items():
        series = filled_in(query.removeprefix("label_values(").rpartition(",")[0])
        assert {labels[label] for labels, _ in watched.server.query(series)}


def test_no_alert_of_this_job_fires_and_every_one_can_be_evaluated(watched: Watched) -> None:
    rules = watched.server.rules()
    assert rules
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] == "err"] == []
    firing = [alert["labels"] for rule in rules for alert in rule["alerts"] if alert["state"] == "firing"]
    assert [labels for labels in firing if labels.get("qlorajob", NAME) == NAME] == []  # others' may have failed


def test_series_end_with_the_training_and_with_the_job(watched: Watched) -> None:
    """The last of this file: it deletes the job."""
    cluster, server = watched.product.cluster, watched.server

    def ended(*names: str) -> None:
        query = f'{{__name__=~"{"|".join(names)}",qlorajob="{NAME}"}}'
        cluster.wait(f"{names} have ended", lambda: server.query(query), lambda series: not series, timeout=30)

    ended("qlora_train_.+", "qlora_eval_.+", "up")
    ended("qlora_job_progress_ratio")
    of_the_job = [series.name for series in SERIES if set(OF_A_JOB) <= set(series.labels)]
    assert server.query(f'{{__name__=~"{"|".join(of_the_job)}",qlorajob="{NAME}"}}')
    cluster.delete("qlorajobs.qlora.dev", NAME, watched.product.namespace)
    ended(*of_the_job)
    assert not server.query(f'{{qlorajob="{BLOCKED}"}}')
