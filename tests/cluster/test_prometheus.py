"""Prometheus finds in the cluster what the chart's PodMonitors name, and calls it as the alerts and the dashboard do.

The PodMonitors go the way they go at users': the Prometheus operator makes the configuration of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_api.exchange import METRICS_PORT
from tests.cluster import images, prometheus
from tests.cluster.client import Cluster
from tests.cluster.prometheus import Prometheus
from tests.unit.test_chart import rendered

pytestmark = pytest.mark.cluster

#: What a trainer serves, of one series, by the library that it uses; from an image that is small.
TRAINER = f"""
import time, prometheus_client as p
p.Gauge("qlora_train_loss", "Loss.").set(1.5)
p.start_http_server({METRICS_PORT})
time.sleep(600)
"""


def trainer(name: str, namespace: str, image: str, *, job: str | None, port: str) -> dict[str, Any]:
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"qlora.dev/job": job} if job else {}},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "stage",
                    "image": image,
                    "command": ["python", "-c", TRAINER],
                    "ports": [{"name": port, "containerPort": METRICS_PORT}],
                    "securityContext": security,
                }
            ],
        },
    }


@pytest.fixture
def scraping(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[Prometheus]:
    """A server that scrapes as the chart says, once a second."""
    values = {"monitoring": {"podMonitor": {"enabled": True, "interval": "1s"}, "rules": {"enabled": True}}}
    ours = [m for m in rendered(values) if m["apiVersion"].startswith(prometheus.GROUP)]
    for manifest in ours:
        manifest["metadata"]["namespace"] = namespace
    with prometheus.kinds(cluster):
        cluster.apply(*ours)
        with prometheus.translated(cluster, namespace, tmp_path) as configuration:
            made = configuration(2)
        with prometheus.serving(made, tmp_path) as server:
            yield server


def test_a_train_pod_is_scraped_under_its_jobs_name_for_as_long_as_it_is_there(
    cluster: Cluster, namespace: str, scraping: Prometheus
) -> None:
    image = images.ensure("operator")
    pods = [
        trainer("tuned-train-1", namespace, image, job="tuned", port="metrics"),
        trainer("another", namespace, image, job=None, port="metrics"),
        trainer("another-port", namespace, image, job="tuned", port="debug"),
    ]
    cluster.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(pods))
    loss = f'qlora_train_loss{{namespace="{namespace}"}}'
    found = cluster.wait("the train pod's loss", lambda: scraping.query(loss), timeout=90, namespace=namespace)
    for pod in pods:
        cluster.wait_pod(pod["metadata"]["name"], namespace, "Running")
    ((labels, value),) = found
    assert value == 1.5
    said = {name: labels[name] for name in ("job", "namespace", "qlorajob", "pod")}
    assert said == {"job": "qlora-train", "namespace": namespace, "qlorajob": "tuned", "pod": "tuned-train-1"}
    assert {target["labels"]["pod"] for target in scraping.targets()} == {"tuned-train-1"}

    cluster.delete("pod", "tuned-train-1", namespace)
    cluster.wait("its series have ended", lambda: scraping.query(loss), lambda series: not series, timeout=30)


def test_the_alerts_are_loaded(scraping: Prometheus) -> None:
    """That each can be evaluated there; when they fire is tested by promtool."""
    rules = scraping.rules()
    assert {rule["name"] for rule in rules} >= {"QLoRAJobStalled", "QLoRAOperatorDown", "QLoRAQueueTooLong"}
    assert not [rule for rule in rules if rule["health"] == "err"]
