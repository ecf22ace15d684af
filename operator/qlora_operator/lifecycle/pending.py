"""Why a stage's pod does not run yet: the fixed list of reasons, and the scheduler's verdict read into it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Wait(StrEnum):
    """What a pod waits for: the reasons of `Scheduled=False`."""

    QUEUE = "Queued"
    GPUS = "InsufficientGPUs"
    HOST_MEMORY = "InsufficientHostMemory"
    CPU = "InsufficientCPU"
    NODES = "NoMatchingNode"
    NODE = "NodeLost"
    VOLUME = "VolumeUnavailable"
    CLAIM = "ClaimMissing"
    IMAGE = "ImageNotPulled"
    SCHEDULER = "Unschedulable"
    CONTAINER = "Waiting"


@dataclass(frozen=True)
class Row:
    """A wait, for the documentation: by what it is recognised, and when it ends."""

    seen: str
    ends: str


_HARDWARE = "or `spec.hardware` is changed as the message advises, while suspended"
WAITS: dict[Wait, Row] = {
    Wait.QUEUE: Row("its Job is suspended, by Kueue or by somebody", "Kueue admits it, or they resume it"),
    Wait.GPUS: Row("the scheduler: `Insufficient nvidia.com/gpu`", f"GPUs are free again or a node comes, {_HARDWARE}"),
    Wait.HOST_MEMORY: Row(
        "the scheduler: `Insufficient memory`",
        "memory is free again; where no node has as much, the message says how much that is and what the largest has: "
        f"a larger one comes, {_HARDWARE}",
    ),
    Wait.CPU: Row("the scheduler: `Insufficient cpu`", f"CPUs are free again, {_HARDWARE}"),
    Wait.NODES: Row(
        "the scheduler: no node matches, or is not cordoned or tainted", f"such a node is there or back, {_HARDWARE}"
    ),
    Wait.NODE: Row(
        "its pod is to leave a node that has stopped answering, and has not ended there",
        "the node is back, is deleted, or is tainted `node.kubernetes.io/out-of-service`: before that another pod "
        "might write to the same volume beside it. Then the pod is replaced, within the attempt",
    ),
    Wait.VOLUME: Row(
        "the scheduler: a volume is not bound, or not where the GPUs are; or the plan is on several nodes, and the "
        "claim for one",
        "it can be bound there; the message says what of the spec helps",
    ),
    Wait.CLAIM: Row("a claim that the spec names is not there", "it is created; the message names the field"),
    Wait.IMAGE: Row(
        "the kubelet: `ErrImagePull`, `ImagePullBackOff`, `InvalidImageName`, `ErrImageNeverPull`",
        "the kubelet, which goes on trying, gets it; or `podTemplate.image` is corrected, while suspended",
    ),
    Wait.SCHEDULER: Row("another word of the scheduler's", "as it says"),
    Wait.CONTAINER: Row(
        "the container is being created, or cannot be", "the kubelet has done so; it says what it lacks"
    ),
}

#: Of these a change of `spec.hardware` can make an end.
FOR_HARDWARE = frozenset({Wait.GPUS, Wait.NODES, Wait.HOST_MEMORY, Wait.CPU})

#: What the scheduler says of nodes, the most telling first: a node that lacks GPUs alone is one that would do.
_SAID: tuple[tuple[re.Pattern[str], Wait], ...] = (
    (re.compile(r"Insufficient (?:nvidia|amd)\.com/|cannot allocate all claims"), Wait.GPUS),
    (re.compile(r"Insufficient memory"), Wait.HOST_MEMORY),
    (re.compile(r"Insufficient cpu"), Wait.CPU),
    (
        re.compile(r"unbound immediate PersistentVolumeClaims|volume node affinity conflict|persistent volumes"),
        Wait.VOLUME,
    ),
    (re.compile(r"didn't match|untolerated taint|unschedulable|no nodes available"), Wait.NODES),
)


def wait_of(verdict: str) -> Wait:
    """What the scheduler's message `verdict` says that the pod waits for."""
    return next((wait for pattern, wait in _SAID if pattern.search(verdict)), Wait.SCHEDULER)
