"""What the cluster has of one job, read from raw objects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from qlora_api.exchange import ExitCode, ProgressName, Report, parse_report
from qlora_api.v1alpha1 import JobSpec, JobStatus, Metadata
from qlora_operator.lifecycle.pending import Wait, wait_of
from qlora_operator.placement.inventory import Inventory
from qlora_operator.placement.nodes import amount
from qlora_operator.planner import Installation

Raw = Mapping[str, Any]

#: Name of the container that runs the stage.
CONTAINER = "stage"
#: Exit code of a container that was ended by SIGKILL.
KILLED = 137
#: Annotation of a stage's Job: the fingerprint of the pod template that it was made from.
TEMPLATE = "qlora.dev/pod-template"
#: Annotation of a pod of an Indexed Job: which of its pods it is.
INDEX = "batch.kubernetes.io/job-completion-index"
#: Label of a Job that Kueue admits.
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
#: Why a pod is deleted whose node has stopped answering, by the condition `DisruptionTarget`.
LOST_NODE = "DeletionByTaintManager"
#: Phases of a pod that writes no more.
OVER = ("Succeeded", "Failed")
#: The kubelet's reasons for a container without an image. It goes back and forth between the first two.
NO_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")


@dataclass(frozen=True)
class Job:
    """A QLoRAJob: what it asks for, and what the operator has recorded of it."""

    metadata: Metadata
    spec: JobSpec
    status: JobStatus


@dataclass(frozen=True)
class Absent:
    """The attempt's Job is not there: never created, or deleted."""


@dataclass(frozen=True)
class Stopping:
    """The attempt's Job is being deleted, or is gone before its pod: that may still be writing.

    `held` says why a pod does not end, where its node has stopped answering.
    """

    held: str | None = None


@dataclass(frozen=True)
class Active:
    """The attempt's Job is not over.

    `waiting` says why no container runs, where that is known, and `reason` the same for programs; `missing_claim` is
    the claim that it waits for and that is not there, `asked_bytes` what its pod asks for of a node's memory where that
    is what it waits for. `template` is the annotation `TEMPLATE`.
    """

    node: str | None = None
    started: datetime | None = None
    waiting: str | None = None
    reason: Wait = Wait.CONTAINER
    missing_claim: str | None = None
    asked_bytes: int | None = None
    template: str | None = None


@dataclass(frozen=True)
class Ended:
    """The attempt's Job is over. Without a `report` the container wrote none: it was killed, or its pod is gone.

    `reason` is the kubelet's word for the end, of the container or, where none was started, of the pod.
    """

    succeeded: bool
    pod_gone: bool = False
    exit_code: int | None = None
    reason: str = ""
    report: Report | None = None
    detail: str = ""
    node: str | None = None
    started: datetime | None = None
    ended: datetime | None = None


Seen = Absent | Stopping | Active | Ended


@dataclass(frozen=True)
class Reported:
    """What the trainer of an attempt said last of its progress. `attempt` is the name of the attempt's Job."""

    attempt: str
    received: datetime
    percent: int | None
    remaining_seconds: int | None
    numbers: Mapping[ProgressName, float]


@dataclass(frozen=True)
class Observed:
    """Everything that a decision about one job looks at. `reported` is None until a trainer has reported to this
    replica."""

    attempts: Mapping[str, Seen] = field(default_factory=dict)
    claims: Mapping[str, bool] = field(default_factory=dict)
    inventory: Inventory = field(default_factory=Inventory)
    installation: Installation = field(default_factory=Installation)
    reported: Reported | None = None
    #: Those of the claims that pods on several nodes can write to.
    shared_claims: Set[str] = frozenset()


def moment(text: str | None) -> datetime | None:
    """A Kubernetes timestamp."""
    return datetime.fromisoformat(text) if text else None


def see(job: Raw | None, pods: Sequence[Raw]) -> Seen:
    """What became of an attempt, from its Job and the pods of Jobs of that name."""
    if job is None:
        return _stopping(pods) if any(p.get("status", {}).get("phase") not in OVER for p in pods) else Absent()
    if job["metadata"].get("deletionTimestamp"):
        return _stopping(pods)
    verdict = {c["type"] for c in job.get("status", {}).get("conditions", ()) if c["status"] == "True"}
    uid = job["metadata"]["uid"]
    ranks = _newest_of_each_rank(
        pod for pod in pods if uid in {o["uid"] for o in pod["metadata"].get("ownerReferences", ())}
    )
    if not verdict & {"Complete", "Failed"}:
        template = job["metadata"].get("annotations", {}).get(TEMPLATE)
        return replace(_active(job, ranks), template=template)
    succeeded = "Complete" in verdict
    return _ended(job, ranks[0] if succeeded and ranks else _first_failed(ranks), succeeded=succeeded)


def _stopping(pods: Sequence[Raw]) -> Stopping:
    return Stopping(next((held for pod in pods if (held := _leaves_its_node(pod))), None))


def _newest_of_each_rank(pods: Iterable[Raw]) -> list[Raw]:
    """The pods of a Job by their index, of those with the same one the newest; one without counts as the first."""
    newest: dict[int, Raw] = {}
    for pod in sorted(pods, key=lambda p: p["metadata"]["creationTimestamp"]):
        newest[int(pod["metadata"].get("annotations", {}).get(INDEX, 0))] = pod
    return [pod for _, pod in sorted(newest.items())]


def _first_failed(ranks: Sequence[Raw]) -> Raw | None:
    """Whose end ended the others: of the pods that failed, the first that did, those last that were only told to stop
    or met something unforeseen, as ranks do whose neighbour is gone; where none says so, the first rank."""

    def end_of(pod: Raw) -> tuple[bool, str] | None:
        ends = (c.get("state", {}).get("terminated") for c in _stage_containers(pod))
        end = next((end for end in ends if end and end.get("exitCode")), None)
        return end and (end["exitCode"] in (1, ExitCode.INTERRUPTED), end.get("finishedAt", ""))

    failed = [(end, number, pod) for number, pod in enumerate(ranks) if (end := end_of(pod))]
    return min(failed)[2] if failed else next(iter(ranks), None)


def _active(job: Raw, ranks: Sequence[Raw]) -> Active:
    """The first rank, or of several that are not all at work the first that waits."""
    if job.get("spec", {}).get("suspend"):
        queue = job["metadata"].get("labels", {}).get(QUEUE_LABEL)
        if queue:
            return Active(waiting=f"the queue {queue} has not admitted it yet", reason=Wait.QUEUE)
        return Active(waiting="its Job is suspended, and not by this operator", reason=Wait.QUEUE)
    if not ranks:
        return _of_pod(job["metadata"]["name"], None)
    seen = [_of_pod(job["metadata"]["name"], pod) for pod in ranks]
    return next((state for state in seen if state.waiting), seen[0])


def _of_pod(name: str, pod: Raw | None) -> Active:
    if pod is None:
        return Active(waiting=f"its pod is not there yet; if that lasts: kubectl describe job {name}")
    status = pod.get("status", {})
    node = pod.get("spec", {}).get("nodeName")
    started = moment(status.get("startTime"))
    if left := _leaves_its_node(pod):
        return Active(node, started, left, reason=Wait.NODE)
    for container in _stage_containers(pod):
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") in NO_IMAGE:
            return Active(node, started, _no_image(container.get("image", ""), waiting), reason=Wait.IMAGE)
        if waiting and waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return Active(node, started, f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": "))
        if container.get("state", {}).keys() & {"running", "terminated"}:  # the Job's own verdict comes a little later
            return Active(node, started)
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _unscheduled(pod, condition.get("message", ""))
    return Active(node, started, "the container is being created")


def _leaves_its_node(pod: Raw) -> str | None:
    """Why a pod that is to leave its node is still there: that it ended only the kubelet can say, which may be gone."""
    conditions = pod.get("status", {}).get("conditions", ())
    taken = any(c["type"] == "DisruptionTarget" and c.get("reason") == LOST_NODE for c in conditions)
    if not taken or "deletionTimestamp" not in pod["metadata"]:
        return None
    return (
        f"its node {pod['spec']['nodeName']} was lost or is tainted, and the pod has not ended there; if the node does "
        "not come back, delete it, or taint it node.kubernetes.io/out-of-service"
    )


def _no_image(image: str, waiting: Raw) -> str:
    """The same sentence whether the kubelet has just tried or waits to try again: its message repeats the reason."""
    why = waiting.get("message", "").rpartition("ErrImagePull: ")[2] or waiting["reason"]
    return (
        f"its image {image} cannot be pulled ({why}); if spec.podTemplate.image is wrong, suspend the job, "
        "correct it and resume"
    )


def _unscheduled(pod: Raw, message: str) -> Active:
    """The scheduler's message up to what it says of preemption, which is about other pods."""
    node = pod.get("spec", {}).get("nodeName")
    if found := re.search(r'persistentvolumeclaim "([^"]+)" not found', message):
        claim = found[1]
        text = f"there is no PersistentVolumeClaim {claim} in this namespace; create it"
        return Active(node, None, text, reason=Wait.CLAIM, missing_claim=claim)
    what = message.partition(" preemption: ")[0]
    why = wait_of(what)
    asked = _asked_bytes(pod) if why is Wait.HOST_MEMORY else None
    return Active(node, None, f"not scheduled: {what}".rstrip(": "), reason=why, asked_bytes=asked)


def _asked_bytes(pod: Raw) -> int:
    """What the scheduler must find of a node's memory for `pod`: what its containers ask for, and its runtime."""
    spec = pod.get("spec", {})
    asked = [container.get("resources", {}).get("requests", {}) for container in spec.get("containers", ())]
    return sum(amount(resources.get("memory", "0")) for resources in (*asked, spec.get("overhead", {})))


def _stage_containers(pod: Raw) -> list[Raw]:
    """The stage's own container, not what others have put beside it."""
    return [c for c in pod.get("status", {}).get("containerStatuses", ()) if c["name"] == CONTAINER]


def _ended(job: Raw, pod: Raw | None, *, succeeded: bool) -> Ended:
    status = job.get("status", {})
    verdict = next(c for c in status["conditions"] if c["type"] in ("Complete", "Failed") and c["status"] == "True")
    over = moment(status.get("completionTime") or verdict.get("lastTransitionTime"))
    started = moment(status.get("startTime"))
    if pod is None:
        return Ended(succeeded, pod_gone=True, detail="its pod was deleted", started=started, ended=over)
    node = pod.get("spec", {}).get("nodeName")
    terminated = next(
        (c["state"]["terminated"] for c in _stage_containers(pod) if "terminated" in c.get("state", {})), None
    )
    if terminated is None:
        reason = pod.get("status", {}).get("reason", "")
        detail = pod.get("status", {}).get("message") or verdict.get("message", "")
        return Ended(succeeded, reason=reason, detail=detail, node=node, started=started, ended=over)
    text = terminated.get("message", "")
    try:
        report, detail = parse_report(text), ""
    except ValueError:
        report, detail = None, _without_a_word(terminated)
    return Ended(
        succeeded,
        exit_code=terminated.get("exitCode"),
        reason=terminated.get("reason", ""),
        report=report,
        detail=detail,
        node=node,
        started=moment(terminated.get("startedAt")) or started,
        ended=moment(terminated.get("finishedAt")) or over,
    )


def _without_a_word(terminated: Raw) -> str:
    """Why a container ended that wrote no report."""
    reason, code = terminated.get("reason", ""), terminated.get("exitCode")
    if reason == "OOMKilled":
        return "OOMKilled: the node or the container's limit had no memory left for it"
    if reason not in ("", "Error", "Completed"):  # then the message is the kubelet's or the runtime's
        return f"{reason}: {terminated.get('message', '')}".rstrip(": ")
    if code == KILLED:
        return "killed from outside (SIGKILL)"
    return reason
