"""What an ended attempt means and what follows from it: the exit-code table's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from qlora_api.exchange import ExitCode
from qlora_api.v1alpha1 import Attempt, Retry
from qlora_operator.lifecycle.observed import Ended


class Outcome(StrEnum):
    """How an attempt ended. Recorded in `status.attempts`."""

    SUCCEEDED = "Succeeded"
    BAD_INPUT = "BadInput"
    GATE_FAILED = "GateFailed"
    DIVERGED = "Diverged"
    OUT_OF_MEMORY = "OutOfMemory"
    INTERRUPTED = "Interrupted"
    ENVIRONMENT_UNFIT = "EnvironmentUnfit"
    CRASHED = "Crashed"
    RESULT_LOST = "ResultLost"


OUTCOME_OF_EXIT: dict[int, Outcome] = {
    ExitCode.BAD_INPUT: Outcome.BAD_INPUT,
    ExitCode.GATE_FAILED: Outcome.GATE_FAILED,
    ExitCode.DIVERGED: Outcome.DIVERGED,
    ExitCode.OUT_OF_MEMORY: Outcome.OUT_OF_MEMORY,
    ExitCode.INTERRUPTED: Outcome.INTERRUPTED,
    ExitCode.ENVIRONMENT_UNFIT: Outcome.ENVIRONMENT_UNFIT,
}
FOR_GOOD = frozenset({Outcome.BAD_INPUT, Outcome.GATE_FAILED, Outcome.DIVERGED})
#: What uses up `spec.retry.maxRestarts`. An interruption is nobody's fault; out of memory ends at micro-batch 1.
COUNTED = frozenset({Outcome.CRASHED, Outcome.RESULT_LOST, Outcome.ENVIRONMENT_UNFIT})

FIRST_BACK_OFF = timedelta(seconds=10)
LONGEST_BACK_OFF = timedelta(minutes=5)
INTERRUPTED_BACK_OFF = timedelta(seconds=2)


def outcome(seen: Ended) -> Outcome:
    """The outcome of an ended attempt."""
    if seen.succeeded:
        has_result = seen.report is not None and seen.report.result is not None
        return Outcome.SUCCEEDED if has_result else Outcome.RESULT_LOST
    if seen.pod_gone:
        return Outcome.INTERRUPTED  # it was deleted; what it wrote at the end went with it
    return OUTCOME_OF_EXIT.get(seen.exit_code or 1, Outcome.CRASHED)


@dataclass(frozen=True)
class GiveUp:
    """The job fails. `reason` is the condition's."""

    reason: str
    message: str


@dataclass(frozen=True)
class Again:
    """Another attempt, not before `delay` has passed since the last one ended."""

    delay: timedelta


@dataclass(frozen=True)
class AgainWithHalfTheMicroBatch(Again):
    """Another attempt with half the micro-batch and twice the accumulation: the effective batch stays."""


def answer(attempts: Sequence[Attempt], retry: Retry, *, micro_batch_size: int | None = None) -> GiveUp | Again:
    """What follows the last of a task's ended, unsuccessful `attempts`."""
    last = attempts[-1]
    how = Outcome(last.outcome or Outcome.CRASHED)
    what = f"{last.job} {_SAYS.get(how, 'failed')}"
    message = f"{what}: {last.message}" if last.message else what
    if how in FOR_GOOD:
        return GiveUp(how, message)
    if how is Outcome.OUT_OF_MEMORY and last.change:
        return Again(timedelta())
    if how is Outcome.OUT_OF_MEMORY:
        if retry.on_out_of_memory == "fail" or micro_batch_size is None:
            return GiveUp(how, message)
        if micro_batch_size == 1:
            return GiveUp(how, f"{message}; the micro-batch is 1 already: use a larger GPU or a shorter maxLength")
        return AgainWithHalfTheMicroBatch(timedelta())
    if how is Outcome.INTERRUPTED:
        in_a_row = next((i for i, a in enumerate(reversed(attempts)) if a.outcome != how), len(attempts))
        return Again(_back_off(INTERRUPTED_BACK_OFF, in_a_row))
    restarts = sum(1 for attempt in attempts if attempt.outcome in COUNTED)
    if restarts > retry.max_restarts:
        return GiveUp("TooManyRestarts", f"{message} (restarted {retry.max_restarts} times, spec.retry.maxRestarts)")
    return Again(_back_off(FIRST_BACK_OFF, restarts))


def _back_off(first: timedelta, times: int) -> timedelta:
    doublings = min(times - 1, 10)  # far beyond the longest, and within what a timedelta holds
    return min(first * 2**doublings, LONGEST_BACK_OFF)


_SAYS = {
    Outcome.BAD_INPUT: "refused its input",
    Outcome.GATE_FAILED: "did not pass a gate",
    Outcome.DIVERGED: "diverged",
    Outcome.OUT_OF_MEMORY: "ran out of GPU memory",
    Outcome.INTERRUPTED: "was interrupted",
    Outcome.ENVIRONMENT_UNFIT: "found its node unfit",
    Outcome.CRASHED: "crashed",
    Outcome.RESULT_LOST: "finished, but its result was lost",
}
