"""What was last heard of each object: tells news from the echoes of our own writes and from heartbeats.

Watches and the resync's lists both ask here, so that a list queues what a watch has missed, and nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_api.v1alpha1 import KIND
from qlora_operator.lifecycle.standing import FINISHED
from qlora_operator.manifests.names import JOB_LABEL
from qlora_operator.workqueue import Key

Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of object that jobs are made of. `mark` is the part of it that a decision may depend on; an object that
    was not heard of before and `rests` is no news."""

    job: Callable[[Raw], str]
    mark: Callable[[Raw], Any]
    rests: Callable[[Raw], bool]


def _is_over_and_cleaned_up(job: Raw) -> bool:
    """Whether nothing is left to do for a job; of the thousands that a cluster keeps, most are such."""
    status = job.get("status", {})
    return (
        status.get("phase") in FINISHED
        and status.get("observedGeneration") == job["metadata"].get("generation")
        and "deletionTimestamp" not in job["metadata"]
        and not status.get("workVolume", {}).get("retained")
        and ("cleanupTime" in status or job["spec"].get("ttlSecondsAfterFinished") is None)
    )


def _verdicts(stage_job: Raw) -> list[str]:
    return [c["type"] for c in stage_job.get("status", {}).get("conditions", ()) if c["status"] == "True"]


def _waits(pod: Raw) -> list[Any]:
    """Where a pod is and why it waits, as far as a user wants to know."""
    status = pod.get("status", {})
    unscheduled = [c.get("message", "") for c in status.get("conditions", ()) if c["type"] == "PodScheduled"]
    states = [next(iter(s.get("state") or {"": 0})) for s in status.get("containerStatuses", ())]
    reasons = [
        s["state"]["waiting"].get("reason", "")
        for s in status.get("containerStatuses", ())
        if "waiting" in (s.get("state") or {})
    ]
    return [pod.get("spec", {}).get("nodeName"), status.get("phase", ""), *unscheduled, *states, *reasons]


def _labelled(child: Raw) -> str:
    return child["metadata"]["labels"][JOB_LABEL]


KINDS: dict[str, Kind] = {
    KIND: Kind(
        job=lambda job: job["metadata"]["name"],
        mark=lambda job: (job["metadata"].get("generation"), job["metadata"].get("deletionTimestamp")),
        rests=_is_over_and_cleaned_up,
    ),
    # a Job without a verdict: the echo of its creation
    "Job": Kind(job=_labelled, mark=_verdicts, rests=lambda stage_job: not _verdicts(stage_job)),
    "Pod": Kind(job=_labelled, mark=_waits, rests=lambda _: False),
}


class News:
    """By kind and uid: the key of the job concerned, and the mark."""

    def __init__(self) -> None:
        self._heard: dict[str, dict[str, tuple[Key, Any]]] = {kind: {} for kind in KINDS}

    def hear(self, kind: str, thing: Raw) -> Key | None:
        """The key of the job concerned, if `thing` says something new."""
        what, uid = KINDS[kind], thing["metadata"]["uid"]
        key, mark = (thing["metadata"]["namespace"], what.job(thing)), what.mark(thing)
        before = self._heard[kind].get(uid)
        self._heard[kind][uid] = key, mark
        is_old = what.rests(thing) if before is None else before[1] == mark
        return None if is_old else key

    def hear_the_end(self, kind: str, thing: Raw) -> Key:
        """`thing` is gone: the key of the job concerned."""
        self._heard[kind].pop(thing["metadata"]["uid"], None)
        return thing["metadata"]["namespace"], KINDS[kind].job(thing)

    async def hear_all(self, kind: str, listed: AsyncIterable[Raw], concerned: set[Key]) -> None:
        """Add to `concerned` the keys of the jobs of what is new, and of what is gone, in a list of all there is.

        Where the list breaks off in the middle, what was heard until then is in it.
        """
        missing = set(self._heard[kind])
        async for thing in listed:
            missing.discard(thing["metadata"]["uid"])
            if key := self.hear(kind, thing):
                concerned.add(key)
        for uid in missing:
            if gone := self._heard[kind].pop(uid, None):
                concerned.add(gone[0])
