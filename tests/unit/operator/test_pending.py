"""Why a stage's pod waits: the scheduler's messages as they come, Kueue's suspension, and the pods of several nodes."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_operator.lifecycle.observed import NO_IMAGE, Active, Ended, see
from qlora_operator.lifecycle.pending import FOR_HARDWARE, WAITS, Wait, wait_of

Raw = dict[str, Any]

VERDICTS = [
    # as kube-scheduler 1.37 words them
    ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", Wait.GPUS),
    ("0/9 nodes are available: 2 Insufficient nvidia.com/mig-3g.40gb, 7 node(s) didn't match Pod's node "
     "affinity/selector.", Wait.GPUS),
    ("0/9 nodes are available: 1 Insufficient amd.com/gpu, 8 node(s) had untolerated taint(s).", Wait.GPUS),
    ("0/2 nodes are available: 2 cannot allocate all claims.", Wait.GPUS),
    ("0/2 nodes are available: 1 Insufficient memory, 1 node(s) didn't match Pod's node affinity/selector.",
     Wait.HOST_MEMORY),
    ("0/2 nodes are available: 2 Insufficient cpu.", Wait.CPU),
    ("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.", Wait.NODES),
    ("0/1 nodes are available: 1 node(s) were unschedulable.", Wait.NODES),
    ("0/1 nodes are available: 1 node(s) had volume node affinity conflict.", Wait.VOLUME),
    ("0/1 nodes are available: 1 node(s) didn't find available persistent volumes to bind.", Wait.VOLUME),
    ("no nodes available to schedule pods", Wait.NODES),
    ("a word that nobody has heard before", Wait.SCHEDULER),
]  # fmt: skip


@pytest.mark.parametrize(("verdict", "wait"), VERDICTS)
def test_what_the_scheduler_says_becomes_one_of_the_fixed_reasons(verdict: str, wait: Wait) -> None:
    assert wait_of(verdict) is wait


def test_only_what_hardware_can_cure_is_given_advice_on_hardware() -> None:
    assert {Wait.VOLUME, Wait.QUEUE, Wait.IMAGE, Wait.CLAIM}.isdisjoint(FOR_HARDWARE)


# --- Jobs that are not the operator's alone, and of several pods ---


def stage_job(verdict: str = "", **more: Any) -> Raw:
    conditions = [{"type": verdict, "status": "True"}] if verdict else []
    job: Raw = {"metadata": {"name": "large-train-1", "uid": "job"}, "spec": {}, "status": {"conditions": conditions}}
    return {**job, **more}


def pod(rank: int, state: Raw | None, *, created: str = "2026-09-01T12:00:00Z", message: str = "") -> Raw:
    conditions = [{"type": "PodScheduled", "status": "False", "message": message}] if message else []
    status: Raw = {"phase": "Pending" if message else "Running", "conditions": conditions}
    if state:
        status["containerStatuses"] = [{"name": "stage", "state": state}]
    return {
        "metadata": {
            "creationTimestamp": created,
            "annotations": {"batch.kubernetes.io/job-completion-index": str(rank)},
            "ownerReferences": [{"uid": "job"}],
        },
        "spec": {} if message else {"nodeName": f"node-{rank}"},
        "status": status,
    }


def over(code: int, at: str) -> Raw:
    return {"terminated": {"exitCode": code, "finishedAt": at}}


RUNNING: Raw = {"running": {}}
FULL = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."


def unwilling(reason: str) -> Raw:
    return pod(0, {"waiting": {"reason": reason}})


def lost() -> Raw:
    taken = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    left = pod(0, RUNNING)
    left["status"]["conditions"].append(taken)
    left["metadata"]["deletionTimestamp"] = "2026-09-01T12:10:00Z"
    return left


#: Each wait, by a Job and its pod as the cluster has them.
WAITING: list[tuple[Raw, list[Raw], Wait]] = [
    (stage_job(spec={"suspend": True}), [], Wait.QUEUE),
    *((stage_job(), [pod(0, None, message=verdict)], wait) for verdict, wait in VERDICTS),
    (stage_job(), [pod(0, None, message='persistentvolumeclaim "data" not found')], Wait.CLAIM),
    *((stage_job(), [unwilling(reason)], Wait.IMAGE) for reason in NO_IMAGE),
    (stage_job(), [unwilling("CreateContainerConfigError")], Wait.CONTAINER),
    (stage_job(), [lost()], Wait.NODE),
]


@pytest.mark.parametrize(("job", "pods", "wait"), WAITING)
def test_a_pod_that_waits_is_no_attempt_that_has_ended(job: Raw, pods: list[Raw], wait: Wait) -> None:
    seen = see(job, pods)
    assert isinstance(seen, Active)
    assert seen.reason is wait
    assert seen.waiting, "what a user reads"


def test_a_wait_ends_with_its_cause() -> None:
    for before in ([unwilling("ImagePullBackOff")], [pod(0, None, message=FULL)], [lost()]):
        replacing = pod(0, RUNNING, created="2026-09-01T13:00:00Z")
        ended = {**before[0], "status": {"phase": "Failed"}}
        assert see(stage_job(), [ended, replacing]) == Active("node-0")
    assert see(stage_job(), [pod(0, RUNNING)]) == Active("node-0"), "or the same pod runs"


def test_each_row_of_the_table_of_waits_is_tested() -> None:
    assert {wait for *_, wait in WAITING} == set(WAITS) == set(Wait)


def test_a_job_that_kueue_holds_back_is_queued() -> None:
    held = stage_job(spec={"suspend": True})
    held["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
    assert see(held, []) == Active(waiting="the queue gpus has not admitted it yet", reason=Wait.QUEUE)


def test_a_job_that_somebody_else_suspended_says_so() -> None:
    assert see(stage_job(spec={"suspend": True}), []) == Active(
        waiting="its Job is suspended, and not by this operator", reason=Wait.QUEUE
    )


def test_several_pods_wait_as_long_as_one_of_them_does() -> None:
    seen = see(stage_job(), [pod(0, RUNNING), pod(1, None, message=FULL)])
    assert seen == Active(waiting=f"not scheduled: {FULL}", reason=Wait.GPUS)
    assert see(stage_job(), [pod(1, RUNNING), pod(0, RUNNING)]) == Active("node-0")


def test_of_several_pods_the_first_that_failed_is_whose_end_is_told() -> None:
    early, late = "2026-09-01T13:00:00Z", "2026-09-01T13:00:09Z"
    failed = stage_job("Failed")
    seen = see(failed, [pod(0, over(1, late)), pod(1, over(13, early))])
    assert isinstance(seen, Ended)
    assert (seen.exit_code, seen.node) == (13, "node-1"), "the others fail because it did"


@pytest.mark.parametrize(("first", "second", "told"), [(1, 13, 13), (14, 137, 137), (1, 137, 137), (13, 12, 13)])
def test_a_rank_that_knows_why_it_ended_is_told_of_before_one_whose_neighbour_was_gone(
    first: int, second: int, told: int
) -> None:
    """The kubelet writes the ends of pods on several nodes down within the same seconds, in any order."""
    early, late = "2026-09-01T13:00:00Z", "2026-09-01T13:00:01Z"
    seen = see(stage_job("Failed"), [pod(0, over(first, early)), pod(1, over(second, late))])
    assert isinstance(seen, Ended)
    assert seen.exit_code == told


def test_of_several_pods_the_first_ranks_result_counts() -> None:
    seen = see(
        stage_job("Complete"), [pod(1, over(0, "2026-09-01T13:00:00Z")), pod(0, over(0, "2026-09-01T13:00:09Z"))]
    )
    assert isinstance(seen, Ended)
    assert seen.node == "node-0"


def test_a_rank_that_was_replaced_counts_by_its_newest_pod() -> None:
    old = pod(1, over(14, "2026-09-01T12:30:00Z"))
    new = pod(1, RUNNING, created="2026-09-01T12:31:00Z")
    assert see(stage_job(), [new, pod(0, RUNNING), old]) == Active("node-0")
