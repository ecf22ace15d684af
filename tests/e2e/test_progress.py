"""Progress reports on the real cluster: whom the operator believes, and what happens when the leader goes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from examples.quickstart.install import NAMESPACE as OPERATOR_NAMESPACE
from qlora_api.exchange import PROGRESS_AUDIENCE, PROGRESS_URL_ENV
from tests.cluster import pods
from tests.e2e.conftest import WHOLE_WAY, Product
from tests.e2e.processes import leader
from tests.e2e.versions import Versions

pytestmark = pytest.mark.e2e

#: Posts a report with the token at argv[3] to argv[1], trusting the PEM in argv[2] alone; prints status and answer.
POST = """
import http.client, json, ssl, sys, urllib.parse
url, pem, token = urllib.parse.urlsplit(sys.argv[1]), sys.argv[2], open(sys.argv[3]).read()
context = ssl.create_default_context(cadata=pem)
connection = http.client.HTTPSConnection(url.hostname, url.port, context=context, timeout=20)
metrics = [{"name": "loss", "value": "666"}]
report = {"trainerStatus": {"progressPercentage": 99, "metrics": metrics, "lastUpdatedTime": "2026-01-01T00:00:00Z"}}
connection.request("POST", url.path, json.dumps(report), {"Authorization": f"Bearer {token}"})
answer = connection.getresponse()
print(json.dumps([answer.status, answer.read().decode()]))
"""


@dataclass(frozen=True)
class Training:
    """A job that trains while the tests look at it."""

    product: Product
    url: str
    authority: str

    def progress(self) -> dict[str, Any]:
        return self.product.job(WHOLE_WAY)["status"].get("progress", {})

    def wait_for_step(self, after: int, timeout: float) -> int:
        """The step that the status shows, once it is beyond `after`."""
        shown = self.product.cluster.wait(
            f"step {after} is passed",
            self.progress,
            lambda progress: progress.get("step", 0) > after,
            timeout,
            self.product.namespace,
            interval=1,
        )
        return shown["step"]


@pytest.fixture(scope="module")
def training(product: Product, whole_way: Versions) -> Training:
    (pod,) = product.pods(WHOLE_WAY, "train")
    environment = {entry["name"]: entry.get("value") for entry in pod["spec"]["containers"][0]["env"]}
    order = product.cluster.get("configmap", f"{WHOLE_WAY}-train-1", product.namespace)
    return Training(product, environment[PROGRESS_URL_ENV], order["data"]["ca.crt"])


def test_only_the_jobs_own_train_pod_is_believed(training: Training) -> None:
    product, cluster, namespace = training.product, training.product.cluster, training.product.namespace
    training.wait_for_step(0, timeout=240)
    tokens = [
        {"serviceAccountToken": {"audience": PROGRESS_AUDIENCE, "path": "right"}},
        {"serviceAccountToken": {"audience": "another", "path": "wrong"}},
    ]
    stranger = pods.restricted("stranger", ["sleep", "600"], image=product.images.trainer)
    stranger["metadata"]["labels"] |= {"qlora.dev/job": WHOLE_WAY, "qlora.dev/stage": "train"}
    stranger["spec"]["volumes"] = [{"name": "tokens", "projected": {"sources": tokens}}]
    (container,) = stranger["spec"]["containers"]
    container["volumeMounts"] = [{"name": "tokens", "mountPath": "/tokens", "readOnly": True}]
    cluster.create(stranger, namespace)
    try:
        cluster.kubectl("wait", "pod/stranger", "--for=condition=Ready", "--timeout=120s", namespace=namespace)

        def post(token: str, job: str = WHOLE_WAY) -> tuple[int, str]:
            url = training.url.replace(f"/qlorajobs/{WHOLE_WAY}/", f"/qlorajobs/{job}/")
            command = ["exec", "stranger", "--", "python", "-c", POST, url, training.authority, f"/tokens/{token}"]
            status, said = json.loads(cluster.kubectl(*command, namespace=namespace))
            return status, said

        assert post("right") == (403, f"the pod stranger does not train {WHOLE_WAY}\n"), "its labels are forged"
        assert post("right", job="no-such-job")[0] == 403
        status, said = post("wrong")
        assert (status, PROGRESS_AUDIENCE in said) == (401, True)
    finally:
        cluster.delete("pod", "stranger", namespace, wait=False)
    assert training.progress()["loss"] != 666
    assert "stranger" in cluster.logs(leader(cluster)["metadata"]["name"], OPERATOR_NAMESPACE)


def test_when_the_leader_goes_the_other_replica_hears_the_reports(training: Training) -> None:
    product, cluster = training.product, training.product.cluster
    first = leader(cluster)["metadata"]["name"]
    cluster.delete("pod", first, OPERATOR_NAMESPACE, wait=False)
    cluster.wait(
        "another leads",
        lambda: leader(cluster)["metadata"]["name"],
        lambda name: name != first,
        timeout=60,
        namespace=OPERATOR_NAMESPACE,
        interval=0.5,
    )
    before = training.progress()["step"]
    training.wait_for_step(before + 1, timeout=90)
    status = product.job(WHOLE_WAY)["status"]
    assert [(a["stage"], a["number"]) for a in status["attempts"]] == [("inspect", 1), ("train", 1)]
    assert len(product.pods(WHOLE_WAY, "train")) == 1
