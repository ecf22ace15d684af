"""What an ended attempt means and what follows from it: one table, from exit codes and reasons to answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, StrEnum

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
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    INTERRUPTED = "Interrupted"
    NODE_LOST = "NodeLost"
    ENVIRONMENT_UNFIT = "EnvironmentUnfit"
    STALLED = "Stalled"
    VOLUME_FULL = "VolumeFull"
    CRASHED = "Crashed"
    RESULT_LOST = "ResultLost"


class Change(Enum):
    """What the next attempt does differently. Where it can be done no further, the job is given up with advice."""

    LESS_GPU_MEMORY = "less GPU memory"
    MORE_HOST_MEMORY = "more host memory"


FIRST_BACK_OFF = timedelta(seconds=10)
LONGEST_BACK_OFF = timedelta(minutes=5)
INTERRUPTED_BACK_OFF = timedelta(seconds=2)


@dataclass(frozen=True)
class Row:
    """The answer to an outcome.

    `seen` says by what it is recognised and `follows` what is done, both for the documentation; `says` stands in the
    job's message, after the name of the attempt. `first` is the back-off, doubled with each such end.
    """

    seen: str
    says: str
    follows: str
    for_good: bool = False
    #: Nothing is tried until a user has suspended and resumed the job: then it is tried once.
    rests: bool = False
    #: It uses up `spec.retry.maxRestarts`. An interruption is nobody's fault, and a change comes to its own end.
    counted: bool = False
    change: Change | None = None
    first: timedelta = timedelta()
    #: The next attempt rather goes to a node on which none has ended so.
    another_node: bool = False
    #: The work volume is kept whatever `spec.storage.retain` says: what it was full of is all that there is.
    keeps_volume: bool = False


_COUNTED = "at most `retry.maxRestarts` times, with back-off (10 s, doubled up to 5 min)"
_UNCOUNTED = "with back-off (2 s, doubled up to 5 min); does not count"

ANSWERS: dict[Outcome, Row] = {
    Outcome.BAD_INPUT: Row(
        "exit code 10",
        "refused its input",
        "the job fails, with the message; never tried again",
        for_good=True,
    ),
    Outcome.GATE_FAILED: Row(
        "exit code 11",
        "did not pass a gate",
        "the job fails; nothing is published",
        for_good=True,
    ),
    Outcome.DIVERGED: Row(
        "exit code 12: loss or gradients are not finite in several steps in a row",
        "diverged",
        "the job fails: the same steps would end the same way",
        for_good=True,
    ),
    Outcome.OUT_OF_MEMORY: Row(
        "exit code 13",
        "ran out of GPU memory",
        "again at once, from the checkpoint, with less: activations recomputed, where the plan had kept them; then "
        "half the micro-batch and twice the accumulation; at micro-batch 1 `training.offload: activations`, if the "
        "spec leaves it and `training.gradientCheckpointing` open; then, or with `retry.onOutOfMemory: fail`, the job "
        "fails and says what would do, and what of the spec ruled it out",
        change=Change.LESS_GPU_MEMORY,
    ),
    Outcome.HOST_OUT_OF_MEMORY: Row(
        "the container was `OOMKilled`",
        "ran out of host memory",
        "again at once, from the checkpoint, rather on another node, asking for half as much memory again; the second "
        "time, or where none of the nodes that can take it has that much (for a training those with the planned GPUs), "
        "the job fails and says what the largest has",
        change=Change.MORE_HOST_MEMORY,
        another_node=True,
    ),
    Outcome.INTERRUPTED: Row(
        "exit code 14, or the pod was deleted",
        "was interrupted",
        f"again, from the checkpoint, {_UNCOUNTED}",
        first=INTERRUPTED_BACK_OFF,
    ),
    Outcome.NODE_LOST: Row(
        "the node went down under the container (`ContainerStatusUnknown`, `NodeLost`)",
        "lost its node",
        f"again, from the checkpoint, rather on another node, {_UNCOUNTED}",
        first=INTERRUPTED_BACK_OFF,
        another_node=True,
    ),
    Outcome.ENVIRONMENT_UNFIT: Row(
        "exit code 15, or the node could not start the container (`StartError`, `UnexpectedAdmissionError`)",
        "found its node unfit",
        f"again, rather on another node, {_COUNTED}",
        counted=True,
        first=FIRST_BACK_OFF,
        another_node=True,
    ),
    Outcome.STALLED: Row(
        "exit code 16: no step was taken for many times as long as one takes",
        "came to a standstill",
        f"again, from the checkpoint, rather on another node, {_COUNTED}",
        counted=True,
        first=FIRST_BACK_OFF,
        another_node=True,
    ),
    Outcome.VOLUME_FULL: Row(
        "exit code 17: a volume has no room left",
        "found a volume full",
        "the job stands still (`Stalled`, without a GPU) and says which; make room on the volume or enlarge its claim, "
        "set `suspend` to true and back to false: again, from the checkpoint. Were it to fail after that, its work "
        "volume is kept even with `storage.retain: Delete`",
        rests=True,
        keeps_volume=True,
    ),
    Outcome.CRASHED: Row(
        "any other exit code",
        "crashed",
        f"again, from the checkpoint, {_COUNTED}",
        counted=True,
        first=FIRST_BACK_OFF,
    ),
    Outcome.RESULT_LOST: Row(
        "exit code 0 without a report",
        "finished, but its result was lost",
        f"again: the stage finds its result on the volume; {_COUNTED}",
        counted=True,
        first=FIRST_BACK_OFF,
    ),
}

OUTCOME_OF_EXIT: dict[int, Outcome] = {
    ExitCode.BAD_INPUT: Outcome.BAD_INPUT,
    ExitCode.GATE_FAILED: Outcome.GATE_FAILED,
    ExitCode.DIVERGED: Outcome.DIVERGED,
    ExitCode.OUT_OF_MEMORY: Outcome.OUT_OF_MEMORY,
    ExitCode.INTERRUPTED: Outcome.INTERRUPTED,
    ExitCode.ENVIRONMENT_UNFIT: Outcome.ENVIRONMENT_UNFIT,
    ExitCode.STALLED: Outcome.STALLED,
    ExitCode.VOLUME_FULL: Outcome.VOLUME_FULL,
}
#: What kubelet and container runtime say of a container (or, where none was started, of its pod) that says nothing
#: itself. After a reboot containerd knows of a container only that it is gone: "Unknown", the kubelet
#: "ContainerStatusUnknown".
OUTCOME_OF_REASON: dict[str, Outcome] = {
    "OOMKilled": Outcome.HOST_OUT_OF_MEMORY,
    "ContainerStatusUnknown": Outcome.NODE_LOST,
    "Unknown": Outcome.NODE_LOST,
    "NodeLost": Outcome.NODE_LOST,
    "StartError": Outcome.ENVIRONMENT_UNFIT,
    "ContainerCannotRun": Outcome.ENVIRONMENT_UNFIT,
    "UnexpectedAdmissionError": Outcome.ENVIRONMENT_UNFIT,
}
FOR_GOOD = frozenset(how for how, row in ANSWERS.items() if row.for_good)
COUNTED = frozenset(how for how, row in ANSWERS.items() if row.counted)
#: A next attempt is due at once where something was changed, by the operator or a user, and else there is none.
CHANGED = frozenset(how for how, row in ANSWERS.items() if row.change or row.rests)
ANOTHER_NODE = frozenset(how for how, row in ANSWERS.items() if row.another_node)
KEEPS_VOLUME = frozenset(how for how, row in ANSWERS.items() if row.keeps_volume)


def outcome(seen: Ended) -> Outcome:
    """The outcome of an ended attempt. What the stage says by its exit code goes before what is said of it."""
    if seen.succeeded:
        has_result = seen.report is not None and seen.report.result is not None
        return Outcome.SUCCEEDED if has_result else Outcome.RESULT_LOST
    if seen.pod_gone:
        return Outcome.INTERRUPTED  # it was deleted; what it wrote at the end went with it
    if how := OUTCOME_OF_EXIT.get(seen.exit_code or 1):
        return how
    return OUTCOME_OF_REASON.get(seen.reason, Outcome.CRASHED)


@dataclass(frozen=True)
class GiveUp:
    """The job fails. `reason` is the condition's. `change` is what could not be done any further."""

    reason: str
    message: str
    change: Change | None = None


@dataclass(frozen=True)
class Rest:
    """Nothing more is tried until the user has done what `message` says. `reason` is the condition's."""

    reason: str
    message: str


@dataclass(frozen=True)
class Again:
    """Another attempt, not before `delay` has passed since the last one ended."""

    delay: timedelta


def answer(attempts: Sequence[Attempt], retry: Retry, older: int = 0) -> GiveUp | Rest | Again:
    """What follows the last of a task's ended, unsuccessful `attempts`; of those that are not listed any more, `older`
    count as restarts.

    One whose answer is a change has it noted when it is recorded, if there is one to be made. The back-off grows with
    each end, whatever its reason, until the training has come a step further than before.
    """
    last = attempts[-1]
    how = Outcome(last.outcome or Outcome.CRASHED)
    row = ANSWERS[how]
    what = f"{last.job} {row.says}"
    message = f"{what}: {last.message}" if last.message else what
    if row.for_good:
        return GiveUp(how, message)
    if row.rests:
        return Again(timedelta()) if last.change else Rest(how, message)
    if row.change:
        return Again(timedelta()) if last.change else GiveUp(how, message, row.change)
    restarts = older + sum(1 for attempt in attempts if attempt.outcome in COUNTED)
    if row.counted and restarts > retry.max_restarts:
        return GiveUp("TooManyRestarts", f"{message} (restarted {retry.max_restarts} times, spec.retry.maxRestarts)")
    return Again(_back_off(row.first, _since_it_got_further(attempts)))


def _since_it_got_further(attempts: Sequence[Attempt]) -> int:
    """So many of the last attempts ended such that the next one waits, from the last on that did a step which none had
    done before; a change is made at once and comes to its own end."""
    ends = 0
    for before, attempt in zip((None, *attempts), attempts, strict=False):
        if (attempt.step or 0) > ((before and before.step) or 0):
            ends = 0
        ends += attempt.outcome not in CHANGED
    return ends


def _back_off(first: timedelta, times: int) -> timedelta:
    doublings = min(times - 1, 10)  # far beyond the longest, and within what a timedelta holds
    return min(first * 2**doublings, LONGEST_BACK_OFF)
