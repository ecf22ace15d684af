"""The Events that a change of status is worth. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qlora_api.v1alpha1 import API_VERSION, KIND, Attempt, JobStatus, Metadata, Phase

COMPONENT = "qlora-operator"
MESSAGE_MAX = 1024


@dataclass(frozen=True)
class Event:
    """One line of `kubectl describe`."""

    reason: str
    message: str
    warning: bool = False


def between(before: JobStatus, after: JobStatus) -> Iterator[Event]:
    """What happened from one status to the next: attempts that ended, and a new phase."""
    for attempt in ended_between(before, after):
        said = "; ".join(part for part in (attempt.message, attempt.change) if part)
        text = f"{attempt.job}: {said}" if said else attempt.job
        yield Event(f"Attempt{attempt.outcome}", text, warning=attempt.outcome != "Succeeded")
    reason = next((c.reason for c in after.conditions if c.type == "Ready"), "")
    reason_before = next((c.reason for c in before.conditions if c.type == "Ready"), "")
    if after.phase is not before.phase or reason != reason_before:
        yield Event(reason or str(after.phase), after.message or str(after.phase), warning=after.phase is Phase.FAILED)


def ended_between(before: JobStatus, after: JobStatus) -> list[Attempt]:
    """The attempts whose end `after` records and `before` does not."""
    known = {a.job for a in before.attempts if a.outcome}
    return [a for a in after.attempts if a.outcome and a.job not in known]


def manifest(event: Event, job: Metadata, now: datetime) -> dict[str, Any]:
    """The core/v1 Event about `job`."""
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{job.name}-", "namespace": job.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
        },
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "message": event.message[:MESSAGE_MAX],
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
