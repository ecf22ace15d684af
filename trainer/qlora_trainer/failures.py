"""The ways in which a stage ends early, each with the exit code that the operator answers to."""

from __future__ import annotations

import errno
import os
import shutil
import traceback
from pathlib import Path
from typing import ClassVar

from qlora_api.exchange import ExitCode, Order, Stage, TrainResult, claim_of, is_claim

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class StageError(Exception):
    """A stage cannot go on. Its text is for the user: what was wrong, where, and what to do."""

    exit_code: ClassVar[int]


class BadInput(StageError):
    """Model, data or output cannot work as they are; another attempt would end the same way."""

    exit_code = ExitCode.BAD_INPUT


class Diverged(StageError):
    """Loss or gradients stopped being numbers."""

    exit_code = ExitCode.DIVERGED


class GateFailed(StageError):
    """The tuned model is there, and a gate does not let it out."""

    exit_code = ExitCode.GATE_FAILED

    def __init__(self, message: str, result: TrainResult) -> None:
        super().__init__(message)
        self.result = result


class Interrupted(BaseException):
    """The pod was told to stop. Like KeyboardInterrupt no Exception: it is raised anywhere, and who catches whatever
    goes wrong there (logging does, in the midst of a line) would go on."""

    exit_code: ClassVar[int] = ExitCode.INTERRUPTED


class EnvironmentUnfit(StageError):
    """This node lacks what the order needs."""

    exit_code = ExitCode.ENVIRONMENT_UNFIT


class Unavailable(StageError):
    """Something outside is not there now and may come back: another attempt, later, can end otherwise.

    `after_seconds` is when it says so itself.
    """

    exit_code = 1

    def __init__(self, text: str, after_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.after_seconds = after_seconds


def describe(error: BaseException, order: Order | None = None) -> tuple[int, str]:
    """Exit code and message for whatever ended a stage; an error that nobody foresaw is 1, with our last frame."""
    if isinstance(error, StageError | Interrupted):
        return error.exit_code, str(error)
    if is_out_of_room(error):
        return ExitCode.VOLUME_FULL, _which_is_full(order)
    if isinstance(error, PermissionError):
        return ExitCode.BAD_INPUT, (
            f"{error.filename}: not allowed for this pod's user ({os.getuid()}:{os.getgid()}): "
            "make it readable for all, or for a group that the pod is given (fsGroup)"
        )
    text = str(error)
    if is_out_of_memory(error):
        return ExitCode.OUT_OF_MEMORY, f"out of memory: {text.splitlines()[0] if text else 'no details'}"
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "qlora_trainer" in frame.filename]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name}" if ours else ""
    return 1, f"{type(error).__name__}{where}: {text or 'no message'}; the pod's log has the whole traceback"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU.

    torch says OutOfMemoryError on a GPU, and a plain RuntimeError for the CPU's allocator and for cuBLAS handles.
    """
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    signs = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def is_out_of_room(error: BaseException) -> bool:
    """Whether a volume had no room left, or its quota was used up.

    torch says something of its own when the file that it writes to does, and safetensors only a text.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NO_ROOM:
            return True
        if any(f"(os error {number})" in str(seen) for number in NO_ROOM):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _which_is_full(order: Order | None) -> str:
    """The volume that a stage writes to, how large it is, and what helps."""
    if order is None or order.stage is Stage.INSPECT:
        return "the pod's scratch space has no room left: the disk of its node is full; make room there"
    if order.stage is Stage.PUBLISH and is_claim(order.output_uri):
        claim = claim_of(order.output_uri)[0]
        return (
            f"output.uri: the claim {claim} has no room left: what was made is on the work volume; make room on "
            "the claim, or enlarge it"
        )
    try:
        gib = shutil.disk_usage(order.work_dir).total / 2**30
        size = f" of {gib:.1f} GiB" if gib >= 1 else f" of {gib * 1024:.0f} MiB"
    except OSError:
        size = ""
    return f"the work volume{size} has no room left: what is on it is kept; enlarge its claim, or make room on it"
