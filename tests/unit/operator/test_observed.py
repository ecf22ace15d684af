"""What is read from a Job and its pods: what the kubelet and the Job controller really write, and what it means."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_api.exchange import ExitCode
from qlora_operator.lifecycle.observed import TEMPLATE, Absent, Active, Ended, Seen, Stopping, see
from qlora_operator.lifecycle.pending import Wait
from tests.unit.operator import given
from tests.unit.operator.given import TRAIN

Raw = dict[str, Any]

STARTED, FINISHED, OVER = "2026-09-01T12:00:00Z", "2026-09-01T12:30:00Z", "2026-09-01T12:30:07Z"
AT_START, AT_FINISH, AT_END = (datetime.fromisoformat(text) for text in (STARTED, FINISHED, OVER))


def stage_job(*conditions: str, deleted: bool = False, annotations: Raw | None = None, **status: Any) -> Raw:
    """The Job of an attempt, with `conditions` that are True."""
    said = [{"type": kind, "status": "True", "lastTransitionTime": OVER, "message": "m"} for kind in conditions]
    metadata = {"name": "support-bot-train-1", "uid": "job-1"} | ({"deletionTimestamp": OVER} if deleted else {})
    metadata |= {"annotations": annotations} if annotations else {}
    return {"metadata": metadata, "status": {"startTime": STARTED, "conditions": said} | status}


def pod(
    state: Raw | None = None,
    *,
    created: str = STARTED,
    owner: str = "job-1",
    node: str | None = "node-1",
    **status: Any,
) -> Raw:
    """A pod of the Job, whose stage container is in `state`."""
    containers = [] if state is None else [{"name": "stage", "image": "trainer:2", "state": state}]
    return {
        "metadata": {"creationTimestamp": created, "ownerReferences": [{"uid": owner}]},
        "spec": {"nodeName": node} if node else {},
        "status": {"phase": "Running", "startTime": STARTED, "containerStatuses": containers} | status,
    }


def unscheduled(message: str) -> Raw:
    return pod(
        node=None,
        phase="Pending",
        conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}],
    )


def asking(*memory: str, overhead: str = "0") -> Raw:
    """A pod whose containers ask for so much memory, which no node has free."""
    waits = unscheduled(NO_MEMORY)
    containers = [{"name": "stage", "resources": {"requests": {"memory": amount}}} for amount in memory]
    return waits | {"spec": {"containers": containers, "overhead": {"memory": overhead}}}


def waiting(reason: str, message: str = "") -> Raw:
    return pod({"waiting": {"reason": reason} | ({"message": message} if message else {})}, phase="Pending")


def terminated(code: int, message: str | None = None, *, created: str = STARTED, **more: Any) -> Raw:
    said = {"message": message} if message is not None else {}
    end = {"exitCode": code, "startedAt": STARTED, "finishedAt": FINISHED} | said | more
    return pod({"terminated": end}, created=created, phase="Succeeded" if code == 0 else "Failed")


def lost_node(*, deleted: bool = True) -> Raw:
    """A pod whose node has stopped answering, five minutes later."""
    taken = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    left = pod(RUNNING, conditions=[taken])
    return left | {"metadata": left["metadata"] | ({"deletionTimestamp": OVER} if deleted else {})}


def no_image(why: str) -> str:
    return (
        f"its image trainer:2 cannot be pulled ({why}); if spec.podTemplate.image is wrong, suspend the job, "
        "correct it and resume"
    )


LOST = (
    "its node node-1 was lost or is tainted, and the pod has not ended there; if the node does not come back, delete "
    "it, or taint it node.kubernetes.io/out-of-service"
)
NO_MEMORY = "0/2 nodes are available: 1 Insufficient memory, 1 node(s) had untolerated taint(s)."
FULL_NODES = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
RUNNING = {"running": {"startedAt": STARTED}}
GONE = "The container could not be located when the pod was terminated"
REPORT = given.report(TRAIN)
FAILURE = given.report(TRAIN, failure="line 3: no role")
SIDECAR = {"name": "istio-proxy", "state": {"running": {"startedAt": STARTED}}}

CASES: list[Any] = [
    pytest.param(None, [], Absent(), id="nothing there"),
    pytest.param(None, [terminated(0)], Absent(), id="the Job deleted, its pod finished"),
    pytest.param(None, [pod(RUNNING)], Stopping(), id="the Job gone before its pod, which may still write"),
    pytest.param(stage_job(deleted=True), [pod(RUNNING)], Stopping(), id="being deleted"),
    pytest.param(stage_job("Failed", deleted=True), [terminated(14)], Stopping(), id="being deleted, though over"),
    pytest.param(stage_job(deleted=True), [lost_node()], Stopping(LOST), id="stopped, on a node that does not answer"),
    pytest.param(None, [lost_node()], Stopping(LOST), id="its Job is gone before it"),
    pytest.param(stage_job(), [pod(RUNNING)], Active("node-1", AT_START), id="running"),
    pytest.param(
        stage_job(), [pod(RUNNING, owner="an earlier Job")],
        Active(waiting="its pod is not there yet; if that lasts: kubectl describe job support-bot-train-1"),
        id="the pod of an earlier Job of that name is not its own",
    ),
    pytest.param(
        stage_job(), [unscheduled(f"{FULL_NODES} preemption: 0/3 nodes are available: 3 Preemption is not helpful.")],
        Active(waiting=f"not scheduled: {FULL_NODES}", reason=Wait.GPUS), id="unschedulable",
    ),
    pytest.param(
        stage_job(), [unscheduled('0/1 nodes are available: persistentvolumeclaim "data" not found. preemption: …')],
        Active(waiting="there is no PersistentVolumeClaim data in this namespace; create it", reason=Wait.CLAIM,
               missing_claim="data"), id="a claim that is not there",
    ),
    pytest.param(
        stage_job(), [asking("2Gi", "512Mi", overhead="128Mi")],
        Active(waiting=f"not scheduled: {NO_MEMORY}", reason=Wait.HOST_MEMORY, asked_bytes=2688 * given.MIB),
        id="more memory than a node has free, sidecar and runtime with it",
    ),
    pytest.param(
        stage_job(), [waiting("InvalidImageName")],
        Active("node-1", AT_START, no_image("InvalidImageName"), reason=Wait.IMAGE),
        id="not the name of an image",
    ),
    pytest.param(
        stage_job(annotations={TEMPLATE: "sha256:t"}), [pod(RUNNING)], Active("node-1", AT_START, template="sha256:t"),
        id="which pod template it was made from",
    ),
    pytest.param(
        stage_job(), [waiting("CreateContainerConfigError")],
        Active("node-1", AT_START, "CreateContainerConfigError"), id="a reason without a message",
    ),
    pytest.param(
        stage_job(), [waiting("ContainerCreating")], Active("node-1", AT_START, "the container is being created"),
        id="pulling or mounting",
    ),
    pytest.param(
        stage_job(), [pod(phase="Pending")], Active("node-1", AT_START, "the container is being created"),
        id="bound, not seen by the kubelet yet",
    ),
    pytest.param(
        stage_job(), [terminated(0, REPORT.to_json())], Active("node-1", AT_START), id="over, the Job has not said so"
    ),
    pytest.param(
        stage_job("FailureTarget"), [terminated(1)], Active("node-1", AT_START), id="failing, its pods not over yet"
    ),
    pytest.param(
        stage_job(), [pod(RUNNING, created="2026-09-01T12:10:00Z", node="node-2"), terminated(143)],
        Active("node-2", AT_START), id="replaced after a disruption: the newest counts",
    ),
    pytest.param(
        stage_job("Complete", completionTime=OVER), [terminated(0, REPORT.to_json())],
        Ended(True, exit_code=0, report=REPORT, node="node-1", started=AT_START, ended=AT_FINISH), id="succeeded",
    ),
    pytest.param(
        stage_job("Complete", completionTime=OVER), [terminated(0)],
        Ended(True, exit_code=0, node="node-1", started=AT_START, ended=AT_FINISH), id="succeeded without a report",
    ),
    pytest.param(
        stage_job("Complete", completionTime=OVER), [],
        Ended(True, pod_gone=True, detail="its pod was deleted", started=AT_START, ended=AT_END),
        id="succeeded, pod gone",
    ),
    pytest.param(
        stage_job("Failed"), [terminated(10, FAILURE.to_json())],
        Ended(False, exit_code=10, report=FAILURE, node="node-1", started=AT_START, ended=AT_FINISH), id="refused",
    ),
    pytest.param(
        stage_job("Failed"), [terminated(137, reason="OOMKilled")],
        Ended(False, exit_code=137, reason="OOMKilled", node="node-1", started=AT_START, ended=AT_FINISH,
              detail="OOMKilled: the node or the container's limit had no memory left for it"),
        id="killed by the kernel: no report",
    ),
    pytest.param(
        stage_job("Failed"), [terminated(137, reason="Error")],
        Ended(False, exit_code=137, reason="Error", detail="killed from outside (SIGKILL)", node="node-1",
              started=AT_START, ended=AT_FINISH),
        id="killed by somebody: no report",
    ),
    pytest.param(
        stage_job("Failed"), [terminated(137, GONE, reason="ContainerStatusUnknown")],
        Ended(False, exit_code=137, reason="ContainerStatusUnknown", detail=f"ContainerStatusUnknown: {GONE}",
              node="node-1", started=AT_START, ended=AT_FINISH),
        id="its node went down",
    ),
    pytest.param(
        stage_job("Failed"), [pod(phase="Failed", reason="UnexpectedAdmissionError", message="no healthy devices")],
        Ended(False, reason="UnexpectedAdmissionError", detail="no healthy devices", node="node-1", started=AT_START,
              ended=AT_END),
        id="the node did not take it",
    ),
    pytest.param(
        stage_job(), [lost_node()],
        Active("node-1", AT_START, LOST, reason=Wait.NODE),
        id="its node does not answer: no other pod can be made",
    ),
    pytest.param(
        stage_job(), [lost_node(deleted=False)], Active("node-1", AT_START),
        id="told to leave its node, and not deleted"
    ),
    pytest.param(
        stage_job("Failed"), [terminated(1, '{"version":"v9"}', reason="Error")],
        Ended(False, exit_code=1, reason="Error", detail="Error", node="node-1", started=AT_START, ended=AT_FINISH),
        id="a termination message that is no report",
    ),
    pytest.param(
        stage_job("Failed"), [pod(phase="Failed", message="The node was low on resource: memory.")],
        Ended(False, detail="The node was low on resource: memory.", node="node-1", started=AT_START, ended=AT_END),
        id="evicted before its container ended",
    ),
    pytest.param(
        stage_job("Failed"), [],
        Ended(False, pod_gone=True, detail="its pod was deleted", started=AT_START, ended=AT_END),
        id="failed, pod gone",
    ),
    pytest.param(
        stage_job("Failed"), [terminated(10, FAILURE.to_json(), created="2026-09-01T12:10:00Z"), terminated(143)],
        Ended(False, exit_code=10, report=FAILURE, node="node-1", started=AT_START, ended=AT_FINISH),
        id="of two pods, the newest tells",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("job", "pods", "expected"), CASES)
def test_what_became_of_an_attempt(job: Raw | None, pods: list[Raw], expected: Seen) -> None:
    assert see(job, pods) == expected
    assert see(job, pods[::-1]) == expected, "the order in which the server lists them says nothing"


def test_an_image_is_missed_in_the_same_words_between_two_tries_as_after_one() -> None:
    """The kubelet goes back and forth between the two states: each change of the status would be a write."""
    why = 'failed to resolve reference "trainer:2": not found'
    tried = waiting("ErrImagePull", why)
    waits = waiting("ImagePullBackOff", f'Back-off pulling image "trainer:2": ErrImagePull: {why}')
    expected = Active("node-1", AT_START, no_image(why), reason=Wait.IMAGE)
    assert see(stage_job(), [tried]) == see(stage_job(), [waits]) == expected


def test_a_sidecar_is_not_the_stage() -> None:
    """Service meshes put containers of their own into pods; they run on and end as they like."""
    running = pod({"terminated": {"exitCode": 0}})
    running["status"]["containerStatuses"].insert(0, SIDECAR)
    assert see(stage_job(), [running]) == Active("node-1", AT_START)
    over = terminated(10, FAILURE.to_json())
    sidecar = {"name": "istio-proxy", "state": {"terminated": {"exitCode": 0, "message": REPORT.to_json()}}}
    over["status"]["containerStatuses"].insert(0, sidecar)
    ended = see(stage_job("Failed"), [over])
    assert isinstance(ended, Ended)
    assert (ended.exit_code, ended.report) == (10, FAILURE)


def test_a_result_of_another_shape_is_no_result() -> None:
    """An image of another release must end in a status that says so, not in an operator that raises for ever."""
    odd = REPORT.model_copy(update={"result": {"loss": 0.1}})
    ended = see(stage_job("Complete"), [terminated(0, odd.to_json(), reason="Completed")])
    assert isinstance(ended, Ended)
    assert ended.report is None


@pytest.mark.parametrize("missing", ["startTime", "containerStatuses", "phase"])
def test_a_young_pod_lacks_fields(missing: str) -> None:
    young = waiting("ContainerCreating")
    del young["status"][missing]
    assert isinstance(see(stage_job(), [young]), Active)


def test_every_exit_code_is_read_as_it_is() -> None:
    for code in ExitCode:
        verdict = "Failed" if code else "Complete"
        ended = see(stage_job(verdict), [terminated(code)])
        assert isinstance(ended, Ended)
        assert ended.exit_code == code


def test_moments_are_in_utc() -> None:
    for state in (see(stage_job(), [pod(RUNNING)]), see(stage_job("Complete"), [terminated(0)])):
        moments = [value for value in dataclasses.astuple(state) if isinstance(value, datetime)]
        assert moments
        assert all(value.tzinfo is not None and value.utcoffset() == UTC.utcoffset(None) for value in moments)
