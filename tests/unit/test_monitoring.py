"""What people watch with: names that are served, alerts that fire when they should, a true dashboard and a true page.

Needs promtool and helm, which are compiled once.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from charts.monitoring import page
from qlora_api.exchange import METRICS_PORT
from qlora_operator.cluster import ApiError
from qlora_operator.manifests.names import JOB_LABEL
from qlora_operator.metrics import SERIES
from qlora_operator.metrics import Metrics as OperatorMetrics
from qlora_trainer.metrics import Metrics as TrainerMetrics
from tests.cluster import prometheus
from tests.cluster.settings import REPOSITORY
from tests.unit.test_chart import NAMESPACE, RELEASE, of_kind, pod, rendered, the

pytestmark = pytest.mark.cluster  # needs no cluster, but what compiles one: Go

FILES = REPOSITORY / "charts" / "qlora-operator" / "files"
RULES = FILES / "rules.yaml"
RULE_TESTS = Path(__file__).with_name("rules.yaml")
PAGE = REPOSITORY / "docs" / "metrics.md"
EVERYTHING = {kind: {"enabled": True} for kind in ("podMonitor", "rules", "dashboard")}
PARTS = ("", "_bucket", "_count", "_sum")


def promtool(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    program = prometheus.programs() / "promtool"
    return subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True)


def served() -> set[str]:
    """Every name that a query may use: of the operator, of a training, and of Prometheus itself."""
    names = {series.name + part for series in SERIES for part in PARTS}
    for family in page.trainer_series():
        names |= {sample.name for sample in family.samples}
    return names | {"up"}


def used(expression: str) -> set[str]:
    """The names of series in a PromQL expression."""
    bare = re.sub(r'"[^"]*"|\[[^]]*\]|\{\{[^}]*\}\}', "", expression)
    return set(re.findall(r"\b(?:qlora_\w+|up)\b", bare))


# --- what is served ---


def test_names_and_texts_follow_prometheus_conventions() -> None:
    """`promtool check metrics` lints names, units, types and help."""
    operator = OperatorMetrics()
    plan = {"gpus": 1, "flavour": "NVIDIA-L4", "memory": {"totalBytes": 2, "measuredBytes": 1}}
    operator.observe(("team-a", "one"), {"phase": "Training", "progress": {"percent": 1}, "plan": plan})
    operator.passed(1, ApiError("get", 409, "older"))
    trainer = TrainerMetrics()
    trainer.see(page.STANDING)
    for exposition in (operator.exposition(), generate_latest(trainer.registry)):
        result = promtool("check", "metrics", stdin=exposition.decode())
        assert result.returncode == 0, result.stdout + result.stderr


def test_a_name_against_the_conventions_would_be_seen() -> None:
    assert promtool("check", "metrics", stdin="# TYPE jobs_milliseconds counter\njobs_milliseconds 1\n").returncode


# --- alerts ---


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_every_alert_fires_and_keeps_quiet_as_it_should() -> None:
    result = promtool("test", "rules", str(RULE_TESTS))
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_alert_is_without_a_test_of_both() -> None:
    tests = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    seen = {(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]}
    assert seen == {(rule["alert"], fires) for rule in rules() for fires in (True, False)}


def test_every_alert_says_how_bad_it_is_and_what_to_do_and_asks_for_what_is_served() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert used(rule["expr"]) and not used(rule["expr"]) - served(), rule["alert"]


# --- the dashboard ---


def panels() -> list[dict[str, Any]]:
    return [p for p in json.loads((FILES / "dashboard.json").read_text())["panels"] if p["type"] != "row"]


def test_the_dashboard_asks_for_what_is_served_and_leaves_out_nothing_of_it() -> None:
    asked = {name for panel in panels() for target in panel["targets"] for name in used(target["expr"])}
    assert asked - served() == set()
    whole = {re.sub("_(bucket|count|sum)$", "", name) for name in asked}
    documented = {series.name for series in SERIES} | {
        sample.name for family in page.trainer_series() for sample in family.samples
    }
    assert documented - whole == {"qlora_job_phase"}  # the dashboard's variables


def test_panels_are_told_apart_and_none_lies_on_another() -> None:
    found = panels()
    assert len({panel["id"] for panel in found}) == len({panel["title"] for panel in found}) == len(found)
    taken: set[tuple[int, int]] = set()
    for panel in found:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


# --- the page ---


def yaml_blocks() -> list[Any]:
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)]


def test_the_pages_tables_are_current() -> None:
    assert page.page(PAGE.read_text()) == PAGE.read_text(), "run: make generate"


def test_the_pages_values_are_values_of_the_chart() -> None:
    (values,) = (block for block in yaml_blocks() if "monitoring" in block)
    kinds = {manifest["kind"] for manifest in rendered(values)}
    assert {"PodMonitor", "PrometheusRule"} <= kinds
    assert all(m["metadata"]["labels"]["release"] == "prometheus" for m in of_kind("PodMonitor", values))


def test_the_pages_scrape_configuration_is_one_and_finds_what_the_chart_and_the_operator_make(tmp_path: Path) -> None:
    (configuration,) = (block for block in yaml_blocks() if "scrape_configs" in block)
    (tmp_path / "rules.yaml").write_bytes(RULES.read_bytes())
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    result = promtool("check", "config", str(tmp_path / "prometheus.yaml"))
    assert result.returncode == 0, result.stdout + result.stderr
    kept = {
        job["job_name"]: {
            rule["source_labels"][0]: rule["regex"] for rule in job["relabel_configs"] if rule.get("action") == "keep"
        }
        for job in configuration["scrape_configs"]
    }
    label = "__meta_kubernetes_pod_labelpresent_" + re.sub(r"\W", "_", JOB_LABEL)
    port = "__meta_kubernetes_pod_container_port_name"
    name = pod()["metadata"]["labels"]["app.kubernetes.io/name"]
    (container_port,) = (p["name"] for p in pod()["spec"]["containers"][0]["ports"] if p["containerPort"] == 8080)
    assert kept == {
        "qlora-operator": {"__meta_kubernetes_pod_label_app_kubernetes_io_name": name, port: container_port},
        "qlora-train": {label: "true", port: "metrics"},
    }
    assert str(METRICS_PORT) in PAGE.read_text()


# --- the chart ---


def test_nothing_of_it_is_installed_unasked() -> None:
    assert not {"PodMonitor", "PrometheusRule"} & {manifest["kind"] for manifest in rendered()}
    assert the("ConfigMap")["metadata"]["name"] == RELEASE


@pytest.mark.parametrize(
    ("values", "names", "where"),
    [
        ({}, (RELEASE, f"{RELEASE}-train"), {"any": True}),
        ({"namespaces": ["team-a"]}, (RELEASE, f"{RELEASE}-train"), {"matchNames": ["team-a"]}),
        ({"fullnameOverride": "a" * 63}, ("a" * 63, "a" * 57 + "-train"), {"any": True}),
    ],
    ids=["everywhere", "named namespaces", "a long name"],
)
def test_what_is_scraped(values: dict[str, Any], names: tuple[str, str], where: dict[str, Any]) -> None:
    monitors = {"podMonitor": {"enabled": True, "interval": "5s", "labels": {"release": "p"}}}
    operator, train = of_kind("PodMonitor", {**values, "monitoring": monitors})
    assert (operator["metadata"]["name"], train["metadata"]["name"]) == names
    assert operator["spec"]["selector"]["matchLabels"].items() <= pod(values)["metadata"]["labels"].items()
    assert "namespaceSelector" not in operator["spec"]  # its own
    assert train["spec"]["namespaceSelector"] == where
    assert train["spec"]["selector"] == {"matchExpressions": [{"key": JOB_LABEL, "operator": "Exists"}]}
    ports = {port["name"] for port in pod()["spec"]["containers"][0]["ports"]}
    endpoints = [monitor["spec"]["podMetricsEndpoints"][0] for monitor in (operator, train)]
    assert [endpoint["port"] in ports for endpoint in endpoints] == [True, False]
    assert [endpoint.get("honorLabels", False) for endpoint in endpoints] == [True, False]
    for monitor, endpoint in zip((operator, train), endpoints, strict=True):
        assert endpoint["interval"] == "5s"
        assert monitor["metadata"]["namespace"] == NAMESPACE
        assert monitor["metadata"]["labels"]["release"] == "p"


def test_the_alerts_are_installed_as_they_are_tested() -> None:
    installed = the("PrometheusRule", {"monitoring": EVERYTHING})
    assert installed["spec"] == yaml.safe_load(RULES.read_text())


def test_the_dashboard_is_installed_as_it_is_where_the_sidecar_looks() -> None:
    values = {"monitoring": {"dashboard": {"enabled": True, "annotations": {"grafana_folder": "ML"}}}}
    (installed,) = (m for m in of_kind("ConfigMap", values) if m["metadata"]["name"] != RELEASE)
    assert installed["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert installed["metadata"]["annotations"] == {"grafana_folder": "ML"}
    assert list(installed["data"].values()) == [(FILES / "dashboard.json").read_text()]
