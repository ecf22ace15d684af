"""Several processes train one adapter on the real node: two in a pod, and two pods that meet by a headless Service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.cluster import gpus, kwok, settings
from tests.cluster.client import KubectlError, Manifest
from tests.e2e.conftest import GPU_TAINT, Product, tiny
from tests.e2e.processes import kill

pytestmark = pytest.mark.e2e

IN_ONE_POD, IN_TWO_PODS = "two-ranks", "two-pods"


@pytest.fixture(scope="module")
def applied(product: Product) -> Iterator[None]:
    """Both jobs, at the same time. The second is planned on two nodes; one of them is real, the other takes no pods."""
    cluster = product.cluster
    gpus.give(cluster, gpus.A2, 8)
    labels, room = gpus.labels(gpus.A2, 8), {gpus.RESOURCE: "8", "pods": "0"}
    full = kwok.create_nodes(cluster, "gpu-full", 1, labels, room, taints=[GPU_TAINT])
    try:
        apply_both(product)
        yield
    finally:
        kwok.delete_nodes(cluster, full)
        gpus.give(cluster, gpus.A2, 1)


def apply_both(product: Product) -> None:
    nvidia = {"accelerator": "nvidia"}
    product.apply(tiny(IN_ONE_POD, 6, hardware={**nvidia, "gpus": 2}))
    sharded = tiny(IN_TWO_PODS, 60, hardware={**nvidia, "gpus": 2, "nodes": 2}, checkpoint={"every": "3s"})
    sharded["spec"]["storage"] = {"retain": "Keep"}  # and the finished pods with it, whose logs are read
    sharded["spec"]["training"]["offload"] = "parameters"
    product.apply(sharded)


def bind_those_that_wait(product: Product) -> None:
    """Put ranks on the one real node that the scheduler will not put there: it keeps those of a training apart."""
    for pod in product.pods(IN_TWO_PODS, "train"):
        if pod["status"]["phase"] != "Pending" or pod["spec"].get("nodeName"):
            continue
        name = pod["metadata"]["name"]
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": settings.NODE},
        }
        place = f"/api/v1/namespaces/{product.namespace}/pods/{name}/binding"
        with suppress(KubectlError):  # the scheduler was quicker, or the volume is not bound yet
            product.cluster.kubectl("create", "--raw", place, "--filename=-", stdin=json.dumps(binding))


def test_a_rank_that_is_killed_costs_an_attempt_and_the_job_goes_on(product: Product, applied: None) -> None:
    """FSDP2 over two pods: when one dies the other is stopped, and both go on from the last checkpoint."""
    cluster, namespace = product.cluster, product.namespace

    def ranks() -> list[Manifest]:
        bind_those_that_wait(product)
        return sorted(
            (pod for pod in product.pods(IN_TWO_PODS, "train") if pod["status"]["phase"] == "Running"),
            key=lambda pod: pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"],
        )

    def job() -> Manifest:
        bind_those_that_wait(product)
        return product.job(IN_TWO_PODS)

    cluster.wait("both pods run", ranks, lambda pods: len(pods) == 2, 400, namespace, 1)
    cluster.wait(
        "it has a checkpoint",
        lambda: product.logs(IN_TWO_PODS, "train"),
        lambda text: "checkpoint at step" in text and "this rank holds" in text,
        300,
        namespace,
        0.5,
    )
    kill(ranks()[1], "qlora_trainer")

    def over(job: Manifest) -> bool:
        assert job["status"]["phase"] != "Failed", job["status"]["message"]
        return job["status"]["phase"] == "Succeeded"

    done = cluster.wait("it succeeds", job, over, 600, namespace, 1)
    assert (done["status"]["plan"]["sharded"], done["status"]["plan"]["nodes"]) == (True, 2)
    trainings = [attempt for attempt in done["status"]["attempts"] if attempt["stage"] == "train"]
    assert [attempt["outcome"] for attempt in trainings][-1] == "Succeeded"
    assert len(trainings) == 2, trainings
    assert "killed" in trainings[0]["message"]
    assert "resumed from step" in product.logs(IN_TWO_PODS, "train")


def test_two_ranks_in_a_pod_each_have_the_model(product: Product, applied: None) -> None:
    done = product.wait_for(IN_ONE_POD, "Succeeded", timeout=600)
    plan = done["status"]["plan"]
    assert (plan["gpus"], plan["nodes"], plan["sharded"]) == (2, 1, False)
    assert plan["microBatchSize"] * plan["gradientAccumulation"] * 2 == plan["recipe"]["effectiveBatchSize"]
    assert [attempt["outcome"] for attempt in done["status"]["attempts"]] == ["Succeeded"] * 3, done["status"][
        "attempts"
    ]
