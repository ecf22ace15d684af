"""Prometheus as users run it: the real server, with discovery in the cluster and queries over HTTP; and the Prometheus
operator, which makes the server's configuration from PodMonitors and PrometheusRules, as it does for users."""

import base64
import fcntl
import gzip
import json
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import build, prerequisites, settings
from tests.cluster.client import Cluster, Manifest
from tests.cluster.controlplane import answers
from tests.cluster.process import Server, launch, stop, wait_ready

SERVER = settings.GO_MODULE / "prometheus"
# Of the ways to discover targets, Kubernetes': the others' clients are large, and not all of them are to be had.
SERVER_FLAGS = ("-trimpath", "-ldflags", "-s -w", "-tags", "remove_all_sd,enable_kubernetes_sd")
OPERATOR = settings.GO_MODULE / "prometheus-operator"
OPERATOR_FLAGS = ("-trimpath", "-ldflags", "-s -w")
CRDS = "crds"  # beside the operator's program
GROUP = "monitoring.coreos.com"
NAME = "harness"

Labels = dict[str, str]
Point = tuple[float, float]  # seconds since 1970, value


# --- programs ---


def programs() -> Path:
    """Directory of `prometheus` and `promtool`, from the cache; compiled if it lacks them (four minutes)."""
    return _kept("prometheus", SERVER, SERVER_FLAGS, _compile_server)


def operator_programs() -> Path:
    """Directory of the Prometheus operator (`operator`) and its CRDs, from the cache or compiled (four minutes)."""
    return _kept("prometheus-operator", OPERATOR, OPERATOR_FLAGS, _compile_operator)


def _kept(kind: str, module: Path, flags: tuple[str, ...], make: Callable[[Path], None]) -> Path:
    settings.cache().mkdir(parents=True, exist_ok=True)
    with (settings.cache() / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generation = build.kept(kind, build.digest(" ".join(flags), module / "go.mod", module / "go.sum"), make)
        build.keep_only(generation)
    return generation


def _compile_server(target: Path) -> None:
    prerequisites.require_space(target, 3, "compiling Prometheus")
    build.compile_packages(prerequisites.go(), SERVER, "tool", SERVER_FLAGS, target, title="Prometheus")


def _compile_operator(target: Path) -> None:
    prerequisites.require_space(target, 3, "compiling the Prometheus operator")
    go = prerequisites.go()
    build.compile_packages(go, OPERATOR, "tool", OPERATOR_FLAGS, target, title="the Prometheus operator")
    sources = build.source(go, OPERATOR, "github.com/prometheus-operator/prometheus-operator")
    (target / CRDS).mkdir()
    for crd in (sources / "example" / "prometheus-operator-crd").glob("*.yaml"):
        shutil.copyfile(crd, target / CRDS / crd.name)


# --- the server ---


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def query(self, expr: str, at: float | None = None) -> list[tuple[Labels, float]]:
        """The value of each series of an instant query, now or at a time."""
        parameters = {"query": expr} | ({} if at is None else {"time": f"{at:.3f}"})
        result = self._get("query", parameters)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def query_range(self, expr: str, start: float, end: float, step: float = 1) -> list[tuple[Labels, list[Point]]]:
        """The points of each series of a range query."""
        parameters = {"query": expr, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": str(step)}
        result = self._get("query_range", parameters)["result"]
        return [(series["metric"], [(t, float(v)) for t, v in series["values"]]) for series in result]

    def names(self, matching: str) -> set[str]:
        """Names of the metrics that were ever scraped and match a selector."""
        return set(self._get("label/__name__/values", {"match[]": matching}))

    def targets(self) -> list[Manifest]:
        """The targets that are scraped now, each with `labels`, `health` and `lastError`."""
        return self._get("targets", {"state": "active"})["activeTargets"]

    def rules(self) -> list[Manifest]:
        """The alerting rules, each with `health`, `state` and `alerts`."""
        return [rule for group in self._get("rules", {"type": "alert"})["groups"] for rule in group["rules"]]

    def _get(self, what: str, parameters: dict[str, str]) -> Any:
        address = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, timeout=30) as answer:
            return json.load(answer)["data"]


@contextmanager
def serving(configuration: Manifest, directory: Path) -> Iterator[Prometheus]:
    """A server with `configuration`, on an address that only this machine reaches; its data lie in `directory`.

    Raises:
        ServerFailedError: it did not become ready; says why.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "prometheus.yaml"
    file.write_text(yaml.safe_dump(configuration))
    address = _free_address()
    command = [
        f"{programs()}/prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={address}",
    ]
    server = Server("prometheus", command, lambda: answers(f"http://{address}/-/ready"))
    running = launch(server, directory, directory)
    try:
        wait_ready(server, running, directory)
        yield Prometheus(f"http://{address}")
    finally:
        stop(running, server.stop_signal)


def _free_address() -> str:
    with socket.create_server((settings.LOOPBACK, 0)) as listener:
        return f"{settings.LOOPBACK}:{listener.getsockname()[1]}"


# --- the Prometheus operator ---


def crds() -> list[Path]:
    """The files of the Prometheus operator's CRDs."""
    return sorted((operator_programs() / CRDS).glob("*.yaml"))


@contextmanager
def kinds(cluster: Cluster) -> Iterator[None]:
    """The API server knows the Prometheus operator's kinds; those that it did not know before are removed after."""
    before = {crd["metadata"]["name"] for crd in cluster.list("customresourcedefinitions")}
    made = []
    try:
        for file in crds():
            name = ".".join(reversed(file.stem.split("_")))  # a file is named group_plural.yaml, its CRD plural.group
            if name not in before:
                cluster.kubectl("create", f"--filename={file}")
                made.append(name)
        if made:
            cluster.kubectl("wait", "--for=condition=Established", *(f"crd/{name}" for name in made))
        yield
    finally:
        if made:
            cluster.kubectl("delete", "customresourcedefinitions", *made)


@contextmanager
def translated(cluster: Cluster, namespace: str, directory: Path) -> Iterator[Callable[[int], Manifest]]:
    """The Prometheus operator at work, on a Prometheus without pods in `namespace` that takes every PodMonitor and
    PrometheusRule of the cluster.

    Gives a function that waits until the operator has made so many scrape jobs and returns the configuration with them,
    for a server on this machine: with the cluster's credentials for discovery, and the rules' files beside it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    address = _free_address()
    command = [f"{operator_programs()}/operator", f"--web.listen-address={address}", "--log-level=warn"]
    environment = {"KUBECONFIG": str(cluster.kubeconfig)}
    server = Server(
        "prometheus-operator", command, lambda: answers(f"http://{address}/healthz"), environment=environment
    )
    everything: Manifest = {
        "podMonitorSelector": {},
        "podMonitorNamespaceSelector": {},
        "ruleSelector": {},
        "ruleNamespaceSelector": {},
    }
    cluster.apply(
        {
            "apiVersion": f"{GROUP}/v1",
            "kind": "Prometheus",
            "metadata": {"name": NAME, "namespace": namespace},
            "spec": {"replicas": 0, "serviceAccountName": "default", **everything},
        }
    )
    running = launch(server, directory, directory)

    def made() -> Manifest:
        secret = cluster.get("secret", f"prometheus-{NAME}", namespace)
        text = gzip.decompress(base64.b64decode(secret["data"]["prometheus.yaml.gz"])).decode()
        return yaml.safe_load(text.replace("$(SHARD)", "0"))  # what the reloader beside a Prometheus fills in

    def configuration(scrape_jobs: int) -> Manifest:
        found = cluster.wait(
            f"the Prometheus operator makes {scrape_jobs} scrape jobs",
            made,
            lambda config: len(config.get("scrape_configs") or ()) == scrape_jobs,
            namespace=namespace,
        )
        for job in found["scrape_configs"]:
            for discovery in job["kubernetes_sd_configs"]:
                discovery["kubeconfig_file"] = str(cluster.kubeconfig)
        rules = cluster.get("configmap", f"prometheus-{NAME}-rulefiles-0", namespace)
        for name, text in (rules.get("data") or {}).items():
            (directory / name).write_text(text)
        return found | {"rule_files": [str(directory / name) for name in rules.get("data") or {}]}

    try:
        wait_ready(server, running, directory)
        yield configuration
    finally:
        stop(running, server.stop_signal)
        cluster.delete(f"prometheuses.{GROUP}", NAME, namespace)  # what it owns goes with it
