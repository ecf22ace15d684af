"""What a user does to a job on its way: review its plan, suspend it, resume it, delete it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.cluster import gpus, kwok
from tests.e2e.conftest import Product, condition, quickstart
from tests.e2e.judge import judge

pytestmark = pytest.mark.e2e

SHORT = {"maxSteps": 60, "learningRate": 2e-3, "effectiveBatchSize": 8}
ADAPTER_ONLY = {"formats": ["adapter"]}


def short(name: str, **spec: object) -> dict:
    """A job that trains for about a minute, is not evaluated and publishes its adapter only."""
    job = quickstart(name, training=SHORT, evaluation={}, **spec)
    job["spec"]["output"].update(ADAPTER_ONLY)
    return job


def test_plan_review_go_then_suspend_and_resume(product: Product) -> None:
    cluster, namespace = product.cluster, product.namespace
    name = product.apply(short("reviewed", planOnly=True))

    planned = product.wait_for(name, "Planned", timeout=240)
    assert judge([planned])[0].status == "Current"
    assert planned["status"]["plan"]["recipe"]["method"] == "qlora"
    assert cluster.find("persistentvolumeclaim", f"{name}-work", namespace) is None
    assert product.pods(name, "train") == []

    product.edit(name, {"planOnly": False})
    cluster.wait("it trains", lambda: product.logs(name, "train"), lambda text: "step " in text, 300, namespace, 1)
    product.edit(name, {"suspend": True})
    suspended = cluster.wait(
        "it is suspended",
        lambda: product.job(name),
        lambda job: condition(job, "Ready").get("reason") == "Suspended",
        150,
        namespace,
        1,
    )
    assert condition(suspended, "Suspended")["status"] == "True"
    assert product.pods(name, "train") == []

    product.edit(name, {"suspend": False})
    cluster.wait(
        "it goes on", lambda: product.logs(name, "train"), lambda log: "resumed from step" in log, 300, namespace, 1
    )
    done = product.wait_for(name, "Succeeded", timeout=400)
    trainings = [a for a in done["status"]["attempts"] if a["stage"] == "train"]
    assert [a["outcome"] for a in trainings] == ["Succeeded"]
    # retain OnFailure: a job that succeeded gives its work volume back
    cluster.wait(
        "the work volume is gone", lambda: cluster.find("persistentvolumeclaim", f"{name}-work", namespace), _is_none
    )

    cluster.delete("qlorajobs.qlora.dev", name, namespace)
    cluster.wait(
        "its children are gone", lambda: cluster.list("job,configmap", namespace, f"qlora.dev/job={name}"), _is_empty
    )


def test_a_job_over_its_budget_stops_with_a_checkpoint_and_is_cleaned_up_when_its_time_is_over(
    product: Product,
) -> None:
    cluster, namespace = product.cluster, product.namespace
    job = short("too-dear", budget={"maxRuntime": "40s"}, ttlSecondsAfterFinished=20)
    job["spec"]["training"]["maxSteps"] = 5000
    name = product.apply(job)
    failed = product.wait_for(name, "Failed", timeout=300)

    assert condition(failed, "Failed")["reason"] == "BudgetExceeded"
    assert "spec.budget.maxRuntime is 40s" in failed["status"]["message"]
    assert f"its checkpoint is kept on the claim {name}-work" in failed["status"]["message"]
    assert 40 <= failed["status"]["usage"]["runSeconds"] <= 100
    assert cluster.find("persistentvolumeclaim", f"{name}-work", namespace)

    cluster.wait(
        "its children are gone",
        lambda: cluster.list("job,configmap,pod,persistentvolumeclaim", namespace, f"qlora.dev/job={name}"),
        _is_empty,
        timeout=120,
        interval=1,
    )
    status = product.job(name)["status"]
    assert (status["phase"], status["workVolume"]["retained"]) == ("Failed", False)
    assert "cleanupTime" in status


def test_a_job_asks_for_the_product_that_it_names_and_says_why_it_waits(product: Product) -> None:
    """The data's volume is on the real node, the named product is not: the scheduler binds nothing, and says so."""
    cluster = product.cluster
    taints = [{"key": gpus.RESOURCE, "value": "present", "effect": "NoSchedule"}]
    nodes = []
    try:
        for prefix, flavour in (("place-l40s", gpus.L40S), ("place-h100", gpus.H100)):
            labels = gpus.labels(flavour, 8)
            nodes += kwok.create_nodes(cluster, prefix, 1, labels, {gpus.RESOURCE: "8"}, taints=taints)
        hardware = {"accelerator": "nvidia", "gpuProducts": [gpus.H100.name]}
        name = product.apply(short("placed", hardware=hardware))
        waiting = cluster.wait(
            "its training waits for a node",
            lambda: product.job(name),
            lambda job: condition(job, "Scheduled").get("status") == "False",
            timeout=240,
            namespace=product.namespace,
            interval=1,
        )
        assert waiting["status"]["plan"]["flavour"] == gpus.H100.name
        assert {"flavour": gpus.L40S.name, "reason": "not among spec.hardware.gpuProducts"} in waiting["status"][
            "plan"
        ]["rejected"]
        assert waiting["status"]["phase"] == "Scheduling"
        assert "nodes are available" in waiting["status"]["message"]
        (train,) = product.pods(name, "train")
        required = train["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (product_term, memory_term) = required["nodeSelectorTerms"][0]["matchExpressions"]
        assert product_term["values"] == [gpus.H100.name]
        assert memory_term["operator"] == "Gt"
    finally:
        cluster.delete("qlorajobs.qlora.dev", "placed", product.namespace)
        kwok.delete_nodes(cluster, nodes)


def _is_none(found: object) -> bool:
    return found is None


def _is_empty(found: Sequence[object]) -> bool:
    return not found
