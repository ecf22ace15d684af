"""Bad input and faults: nothing is lost, doubled or stuck, and the status says what is wrong and what helps.

What goes wrong, and what is said then, stands in troubleshooting.py, from which docs/troubleshooting.md is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from tests.cluster import gpus, kwok, settings
from tests.cluster.client import KubectlError, Manifest
from tests.e2e import invariants
from tests.e2e.conftest import GPU_TAINT, Product, condition, quickstart, tiny
from tests.e2e.judge import judge
from tests.e2e.processes import kill, kill_operator, operator_away
from tests.e2e.troubleshooting import (
    DRAINED,
    EDITED,
    INVALID,
    KILLED,
    REFUSED,
    TAKEN,
    TINY,
    WAITING,
    Trouble,
)

pytestmark = pytest.mark.e2e

JOBS = "qlorajobs.qlora.dev"
SMALL_GPU = gpus.Product(TINY, 512, "tiny", (7, 5))
#: Of `WAITING`, those that are through with their inspection and wait for a claim.
NO_CLAIM_TO_WRITE = ("no-work-claim", "no-output-claim")
RIVALS = ("rival-a", "rival-b")
#: What pods get to stop in, by the chart's default.
GRACE_SECONDS = 120
#: Enough that the training is not over before everything has been done to it.
STEPS = 120


def reason(job: Manifest) -> str:
    return condition(job, "Ready").get("reason", "")


@pytest.fixture(scope="module")
def all_at_once(product: Product) -> Iterator[None]:
    """Every bad job, and two good ones that want the same place for their results, applied at the same time."""
    fake = kwok.create_nodes(
        product.cluster, "tiny-gpu", 1, gpus.labels(SMALL_GPU, 8), {gpus.RESOURCE: "8"}, taints=[GPU_TAINT]
    )
    try:
        for trouble in (*REFUSED, *WAITING):
            product.apply(tiny(trouble.name, 1, **{"planOnly": True, **trouble.spec}))
        for name in RIVALS:
            rival = tiny(name, 2)
            rival["spec"]["output"]["uri"] = "pvc://quickstart/models/the-same"
            product.apply(rival)
        yield
    finally:
        kwok.delete_nodes(product.cluster, fake)


# --- faults in the middle ---

SURVIVOR, DOOMED, GHOST = "survivor", "doomed", "ghost"


@dataclass
class Story:
    """What was seen while everything was done to the job `SURVIVOR`, and two others were deleted."""

    done: Manifest = field(default_factory=dict)
    refused: str = ""
    generation_applied_again: int = 0
    jobs_applied_again: list[str] = field(default_factory=list)
    seconds_until_doomed_was_gone: float = 0.0
    after_kill: Manifest = field(default_factory=dict)
    while_drained: Manifest = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(product: Product, all_at_once: None) -> Story:
    """Three jobs, beside all the bad ones; of each fault in turn it is waited only until the training goes on."""
    cluster, namespace, told = product.cluster, product.namespace, Story()
    often = {"checkpoint": {"every": "2s"}}
    survivor = tiny(SURVIVOR, STEPS, "adapter", "merged", **often)
    for job in (survivor, tiny(DOOMED, 4000, **often), tiny(GHOST, 1, planOnly=True)):
        product.apply(job)

    product.running(SURVIVOR, "inspect")
    kill_operator(cluster)

    # a job deleted while it trains
    training(product, DOOMED)
    began = time.monotonic()
    cluster.delete(JOBS, DOOMED, namespace)
    gone(product, DOOMED)
    told.seconds_until_doomed_was_gone = time.monotonic() - began

    # the same manifest again, and another one under its name
    training(product, SURVIVOR)
    product.apply(survivor)
    told.generation_applied_again = product.job(SURVIVOR)["metadata"]["generation"]
    told.jobs_applied_again = [j["metadata"]["name"] for j in cluster.list("job", namespace, _of(SURVIVOR))]
    with pytest.raises(KubectlError) as refused:
        product.apply(tiny(SURVIVOR, STEPS + 1, "adapter", "merged", **often))
    told.refused = str(refused.value)

    # things that go while nobody looks: a job with all its children, and a child alone
    product.wait_for(GHOST, "Planned", timeout=300)
    with operator_away(cluster):
        cluster.delete("job", f"{SURVIVOR}-train-1", namespace)
        cluster.delete(JOBS, GHOST, namespace)
        gone(product, GHOST)
    told.logs["job deleted"] = resumed(product, SURVIVOR)

    kill(product.running(SURVIVOR, "train"), "qlora_trainer")
    told.after_kill = said(product, SURVIVOR, KILLED)
    told.logs["killed"] = resumed(product, SURVIVOR)

    with drained(product, SURVIVOR):
        told.while_drained = said(product, SURVIVOR, DRAINED)
    told.logs["drained"] = resumed(product, SURVIVOR)

    kill_operator(cluster)
    cluster.delete("pod", product.running(SURVIVOR, "train")["metadata"]["name"], namespace)
    told.logs["pod deleted"] = resumed(product, SURVIVOR)

    product.running(SURVIVOR, "merge")
    kill_operator(cluster)
    # a publication of so little is over before one sees it run
    merged = f"{_of(SURVIVOR)},qlora.dev/artifact=merged"
    cluster.wait("the merged model is to be published", lambda: cluster.list("job", namespace, merged), timeout=120)
    kill_operator(cluster)
    told.done = product.wait_for(SURVIVOR, "Succeeded", timeout=300)
    return told


def _of(name: str) -> str:
    return f"qlora.dev/job={name}"


def training(product: Product, name: str) -> str:
    """The log of the pod that trains, once it has taken a step and has a checkpoint to go on from."""

    def log() -> str:
        pod = product.running(name, "train")
        return product.cluster.logs(pod["metadata"]["name"], product.namespace)

    def goes_on(text: str) -> bool:
        return " loss " in text and ("checkpoint at step" in text or "resumed from step" in text)

    return product.cluster.wait(f"{name} trains", log, goes_on, 300, product.namespace, interval=0.5)


def resumed(product: Product, name: str) -> str:
    """The log of the pod that trains, once it has taken up where the one before left off."""
    text = training(product, name)
    assert "resumed from step" in text, text
    return text


def said(product: Product, name: str, trouble: Trouble) -> Manifest:
    """The job, once it says what the table promises."""

    def there(job: Manifest) -> bool:
        return reason(job) == trouble.reason and trouble.is_said_in(job["status"]["message"])

    expected = f"{name} says: {trouble.says}"
    return product.cluster.wait(expected, lambda: product.job(name), there, 120, product.namespace)


def gone(product: Product, name: str) -> None:
    """Returns once nothing is left of a job that was deleted."""
    cluster, namespace = product.cluster, product.namespace
    cluster.wait(
        f"nothing is left of {name}",
        lambda: invariants.left_of(cluster, name, namespace),
        lambda left: not left,
        GRACE_SECONDS,
        namespace,
    )


@contextmanager
def drained(product: Product, name: str) -> Iterator[None]:
    """The node drained of one job's pods, and open again afterwards."""
    flags = [f"--pod-selector={_of(name)}", "--delete-emptydir-data", f"--timeout={GRACE_SECONDS}s"]
    try:
        product.cluster.kubectl("drain", settings.NODE, *flags)
        yield
    finally:
        product.cluster.kubectl("uncordon", settings.NODE)


def test_whatever_is_done_to_it_a_training_ends_well(product: Product, story: Story) -> None:
    attempts = [(a["stage"], a["number"], a["outcome"]) for a in story.done["status"]["attempts"]]
    assert [a for a in attempts if a[0] == "train"] == [
        ("train", 1, "Crashed"),
        ("train", 2, "Interrupted"),
        ("train", 3, "Succeeded"),
    ]
    assert sorted(a for a in attempts if a[0] != "train") == [
        ("inspect", 1, "Succeeded"),
        ("merge", 1, "Succeeded"),
        ("publish", 1, "Succeeded"),
        ("publish", 1, "Succeeded"),
    ]
    assert {a["name"]: a["state"] for a in story.done["status"]["artifacts"]} == {
        "adapter": "Published",
        "merged": "Published",
    }
    invariants.check(product.cluster, story.done)


def test_a_killed_training_is_told_of_and_goes_on_from_its_checkpoint(story: Story) -> None:
    (crashed,) = (a for a in story.done["status"]["attempts"] if a["outcome"] == "Crashed")
    assert crashed["exitCode"] == 137
    assert judge([story.after_kill])[0].status == "InProgress"
    plan = story.done["status"]["plan"]
    assert plan["microBatchSize"] * plan["gradientAccumulation"] == story.done["spec"]["training"]["effectiveBatchSize"]
    assert plan["recipe"] == story.after_kill["status"]["plan"]["recipe"]
    steps = [_resumed_from(text) for text in story.logs.values()]
    assert steps[0] > 0 and steps == sorted(steps), story.logs.keys()


def _resumed_from(log: str) -> int:
    return int(log.partition("resumed from step ")[2].split()[0])


def test_a_drained_node_costs_no_attempt(story: Story) -> None:
    """The Job's next pod goes on where the evicted one left off."""
    before = [a["job"] for a in story.while_drained["status"]["attempts"] if a.get("outcome")]
    assert before[-1] == f"{SURVIVOR}-train-1"
    assert judge([story.while_drained])[0].status == "InProgress"
    (second,) = (a for a in story.done["status"]["attempts"] if a["job"] == f"{SURVIVOR}-train-2")
    assert second["outcome"] == "Interrupted"  # by the pod's deletion, later on


def test_the_same_job_applied_twice_is_one_job(story: Story) -> None:
    assert story.generation_applied_again == 1
    assert sorted(story.jobs_applied_again) == [f"{SURVIVOR}-inspect-1", f"{SURVIVOR}-train-1"]


def test_an_edit_is_refused_with_the_reason(story: Story) -> None:
    assert EDITED.is_said_in(story.refused), story.refused
    assert story.done["spec"]["training"]["maxSteps"] == STEPS


def test_a_job_deleted_while_it_trains_leaves_nothing(product: Product, story: Story) -> None:
    assert story.seconds_until_doomed_was_gone < GRACE_SECONDS
    assert invariants.left_of(product.cluster, DOOMED, product.namespace) == []


def test_a_job_deleted_while_no_operator_ran_does_not_come_back(product: Product, story: Story) -> None:
    """The operator has been at work again since, through several passes over all jobs."""
    assert invariants.left_of(product.cluster, GHOST, product.namespace) == []


# --- bad input, all of it at the same time ---


def as_expected(product: Product, trouble: Trouble) -> Manifest:
    """The job, once it says what the table promises. One that has ended otherwise is an error at once."""

    def there(job: Manifest) -> bool:
        return reason(job) == trouble.reason or job.get("status", {}).get("phase") in invariants.FINAL

    expected = f"{trouble.name} is {trouble.phase}, {trouble.reason}"
    job = product.cluster.wait(expected, lambda: product.job(trouble.name), there, 300, product.namespace, interval=0.5)
    assert (job["status"]["phase"], reason(job)) == (trouble.phase, trouble.reason), job["status"]["message"]
    assert trouble.is_said_in(job["status"]["message"]), job["status"]["message"]
    return job


@pytest.mark.parametrize("trouble", REFUSED, ids=[trouble.name for trouble in REFUSED])
def test_what_cannot_work_is_refused_on_a_cpu_pod(product: Product, all_at_once: None, trouble: Trouble) -> None:
    job = as_expected(product, trouble)
    assert judge([job])[0].status == "Failed"
    assert condition(job, "Failed")["message"] == job["status"]["message"]
    assert {a["stage"] for a in job["status"].get("attempts", ())} <= {"inspect"}
    assert len(job["status"].get("attempts", ())) <= 1, "tried again"
    assert product.pods(trouble.name, "train") == []
    invariants.check(product.cluster, job)


@pytest.mark.parametrize("trouble", WAITING, ids=[trouble.name for trouble in WAITING])
def test_what_may_come_is_waited_for(product: Product, all_at_once: None, trouble: Trouble) -> None:
    job = as_expected(product, trouble)
    assert judge([job])[0].status == "InProgress"
    assert condition(job, "Failed") == {}
    invariants.check(product.cluster, job)


def test_what_waits_goes_on_when_its_cause_is_gone(product: Product, all_at_once: None) -> None:
    cluster, namespace = product.cluster, product.namespace
    for claim in ("tickets", "models", "scratch", "results"):
        cluster.create(_claim(claim), namespace)
    product.edit("no-image", {"suspend": True})
    product.edit("no-image", {"podTemplate": {"image": product.images.trainer}})
    product.edit("no-image", {"suspend": False})
    larger = kwok.create_nodes(
        cluster, "larger-gpu", 1, gpus.labels(gpus.L4, 8), {gpus.RESOURCE: "8"}, taints=[GPU_TAINT]
    )
    try:
        # the claims are new and empty: that is the next thing to be said
        for name, says in (("no-data-claim", "pvc://tickets/train.jsonl"), ("no-model-claim", "pvc://models/base")):
            failed = product.wait_for(name, "Failed", timeout=240)
            assert (reason(failed), says in failed["status"]["message"]) == ("BadInput", True)
            invariants.check(cluster, failed)
        planned = product.wait_for("gpu-too-small", "Planned", timeout=120)
        assert planned["status"]["plan"]["flavour"] == gpus.L4.name
        assert TINY in {r["flavour"] for r in planned["status"]["plan"]["rejected"]}
        healed = product.wait_for("no-image", "Planned", timeout=240)
        assert [a["number"] for a in healed["status"]["attempts"]] == [1]
        for job in (planned, healed, *(product.wait_for(n, "Succeeded", timeout=240) for n in NO_CLAIM_TO_WRITE)):
            invariants.check(cluster, job)
        cluster.delete(JOBS, "no-work-claim", namespace)
        assert cluster.find("persistentvolumeclaim", "scratch", namespace), "it is the user's"
    finally:
        kwok.delete_nodes(cluster, larger)


def _claim(name: str) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }


def test_of_two_jobs_with_one_place_for_their_results_one_is_published(product: Product, all_at_once: None) -> None:
    first, second = (product.wait_for(name, *invariants.FINAL, timeout=300) for name in RIVALS)
    won, lost = (first, second) if first["status"]["phase"] == "Succeeded" else (second, first)
    assert (won["status"]["phase"], lost["status"]["phase"], reason(lost)) == ("Succeeded", TAKEN.phase, TAKEN.reason)
    assert TAKEN.is_said_in(lost["status"]["message"]), lost["status"]["message"]
    assert [a["state"] for a in lost["status"]["artifacts"]] == ["Made"]
    assert lost["status"]["workVolume"]["retained"], "its adapter is not lost"
    for job in (won, lost):
        invariants.check(product.cluster, job)


def test_a_manifest_that_contradicts_itself_is_refused_by_the_server(product: Product) -> None:
    with pytest.raises(KubectlError) as refused:
        product.apply(quickstart(INVALID.name, **INVALID.spec))
    assert INVALID.is_said_in(str(refused.value))
    assert product.cluster.find(JOBS, INVALID.name, product.namespace) is None
