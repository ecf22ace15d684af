"""The operator, run from its source on this machine, on a bad way to the API server: nothing is lost or doubled.

The jobs here may run on no node, so that each comes to rest with one order and one Job.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from examples.quickstart.install import NAMESPACE as OPERATOR_NAMESPACE
from tests.cluster.client import Cluster, NotInTimeError
from tests.cluster.troubled_api import TroubledApi
from tests.e2e.conftest import Product, quickstart

pytestmark = pytest.mark.e2e

RESYNC_SECONDS = 5
SETTLED_SECONDS = 90
DEPLOYMENT = "deployment/qlora-operator"


@dataclass
class Scene:
    """A namespace of its own, and the operator that serves it through the proxy."""

    cluster: Cluster
    api: TroubledApi
    namespace: str
    process: subprocess.Popen[bytes]
    log: Path

    def apply(self, prefix: str, count: int) -> list[str]:
        """Apply so many jobs, past the proxy."""
        names = [f"{prefix}-{number}" for number in range(count)]
        template = {"nodeSelector": {"there-is": "no-such-node"}}
        jobs = [quickstart(name, podTemplate=template) for name in names]
        documents = yaml.safe_dump_all(jobs)
        self.cluster.kubectl("apply", "--server-side", "--filename=-", namespace=self.namespace, stdin=documents)
        return names

    def children(self, kind: str) -> Counter[str]:
        """How many of a kind each job has."""
        found = self.cluster.list(kind, self.namespace, "qlora.dev/job")
        return Counter(child["metadata"]["labels"]["qlora.dev/job"] for child in found)

    def settled(self, names: list[str]) -> bool:
        """Whether each job has one order and one Job, and a status that says what it waits for."""
        jobs = {job["metadata"]["name"]: job for job in self.cluster.list("qlorajobs.qlora.dev", self.namespace)}
        waits = all("waits" in jobs[name].get("status", {}).get("message", "") for name in names)
        expected = Counter(names)
        return waits and self.children("job") == expected and self.children("configmap") == expected

    def settle(self, names: list[str], seconds: float = SETTLED_SECONDS) -> None:
        try:
            self.cluster.wait(
                f"each of {len(names)} jobs has one Job, and says what it waits for",
                lambda: self.settled(names),
                timeout=seconds,
                namespace=self.namespace,
                interval=1,
            )
        except NotInTimeError as error:
            pytest.fail(f"{error}\nThe operator's log:\n{self.log.read_text()[-5000:]}")
        assert self.process.poll() is None, f"the operator ended; its log:\n{self.log.read_text()[-3000:]}"


@pytest.fixture(scope="module")
def operator_stands_aside(product: Product) -> Iterator[None]:
    """The installed operator serves all namespaces; with it there would be two."""
    cluster = product.cluster
    cluster.kubectl("scale", DEPLOYMENT, "--replicas=0", namespace=OPERATOR_NAMESPACE)
    selector = "app.kubernetes.io/name=qlora-operator"
    cluster.wait("it is gone", lambda: not cluster.list("pod", OPERATOR_NAMESPACE, selector), timeout=90)
    yield
    cluster.kubectl("scale", DEPLOYMENT, "--replicas=2", namespace=OPERATOR_NAMESPACE)
    cluster.kubectl("rollout", "status", DEPLOYMENT, "--timeout=120s", namespace=OPERATOR_NAMESPACE)


@pytest.fixture
def scene(product: Product, operator_stands_aside: None, tmp_path: Path) -> Iterator[Scene]:
    cluster, api = product.cluster, TroubledApi(product.cluster)
    namespace = f"trouble-{uuid.uuid4().hex[:6]}"
    cluster.create_namespace(namespace)
    config = tmp_path / "config.yaml"
    settings = {
        "trainerImage": product.images.trainer,
        "namespaces": [namespace],
        "resyncSeconds": RESYNC_SECONDS,
        "probePort": 18080,
    }
    config.write_text(yaml.safe_dump(settings))
    log = tmp_path / "operator.log"
    with api.serving() as kubeconfig, log.open("wb") as output:
        environment = os.environ | {"QLORA_CONFIG": str(config), "KUBECONFIG": str(kubeconfig)}
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_operator"], env=environment, stdout=output, stderr=output
        )
        try:
            yield Scene(cluster, api, namespace, process, log)
        finally:
            process.terminate()
            process.wait(30)
    cluster.delete("namespace", namespace, wait=False)


def test_an_api_server_that_refuses_one_call_in_three(scene: Scene) -> None:
    scene.api.refuse, scene.api.refused_share, scene.api.delay_seconds = (409, 429, 500, 503), 0.33, 0.1
    names = scene.apply("refused", 8)
    time.sleep(10)
    assert scene.api.refusals > 10
    scene.api.refused_share, scene.api.delay_seconds = 0.0, 0.0
    scene.settle(names)
    assert "again in" in scene.log.read_text(), "it backed off"


@pytest.mark.soak
@pytest.mark.parametrize("seconds", [15, 60])
def test_an_api_server_that_is_away(scene: Scene, seconds: int) -> None:
    before = scene.apply(f"before-{seconds}", 2)
    scene.settle(before)
    scene.api.away = True
    meanwhile = scene.apply(f"meanwhile-{seconds}", 3)
    time.sleep(seconds)
    scene.api.away = False
    scene.settle(before + meanwhile)


def test_watches_that_are_cut_and_not_to_be_had(scene: Scene) -> None:
    """The list of everything alone brings what was missed."""
    scene.settle(scene.apply("watched", 1))
    scene.api.watches = False
    scene.api.cut_watches()
    scene.settle(["watched-0", *scene.apply("unseen", 3)])


@pytest.mark.soak
def test_watches_that_are_expired(scene: Scene) -> None:
    """410 Gone: what changed since is never told. A job deleted meanwhile leaves no ghost."""
    names = scene.apply("expired", 3)
    scene.settle(names)
    scene.api.watches_expired = True
    scene.api.cut_watches()
    scene.cluster.delete("qlorajobs.qlora.dev", "expired-0", scene.namespace)
    scene.cluster.delete("job", "expired-1-inspect-1", scene.namespace)
    time.sleep(2 * RESYNC_SECONDS)
    scene.api.watches_expired = False
    scene.settle(["expired-1", "expired-2", *scene.apply("after", 1)])
