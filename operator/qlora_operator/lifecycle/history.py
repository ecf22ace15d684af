"""Which ended attempts stay in `status.attempts`, and which are only counted: a status must not grow for ever."""

from __future__ import annotations

from qlora_api.v1alpha1 import Attempt, JobStatus, OlderAttempts

#: So many of a task's ended attempts are listed, the newest, besides its first and those that something was changed
#: after. Enough for every decision: the back-off is at its longest before so many ends.
NEWEST = 10


def condensed(status: JobStatus) -> tuple[JobStatus, tuple[Attempt, ...]]:
    """`status` with no more attempts than are to be listed, the others counted; and those others."""
    tasks: dict[tuple[str, str | None], list[Attempt]] = {}
    for attempt in status.attempts:
        if attempt.outcome:
            tasks.setdefault((attempt.stage, attempt.artifact), []).append(attempt)
    older = tuple(a for of_task in tasks.values() for a in [a for a in of_task[1:] if not a.change][:-NEWEST])
    if not older:
        return status, ()
    counts = {_kind(known): known for known in status.older_attempts}
    for attempt in older:
        kind = _kind(attempt)
        known = counts.get(kind) or OlderAttempts(stage=attempt.stage, artifact=attempt.artifact, outcome=kind[-1])
        more = {"count": known.count + 1, "seconds": known.seconds + _seconds(attempt)}
        counts[kind] = known.model_copy(update=more)
    gone = {attempt.job for attempt in older}
    listed = tuple(attempt for attempt in status.attempts if attempt.job not in gone)
    return status.model_copy(update={"attempts": listed, "older_attempts": tuple(counts.values())}), older


def _kind(ends: Attempt | OlderAttempts) -> tuple[str, str | None, str]:
    return ends.stage, ends.artifact, ends.outcome or ""


def _seconds(attempt: Attempt) -> int:
    if attempt.started is None or attempt.ended is None:
        return 0
    return max(0, round((attempt.ended - attempt.started).total_seconds()))
