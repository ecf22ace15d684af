"""Why a stage's pod does not run yet: the fixed list of reasons, and the scheduler's verdict read into it. Pure."""

from __future__ import annotations

import re
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
