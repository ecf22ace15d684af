"""The ways in which a stage ends early, each with the exit code that the operator answers to."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import ClassVar

from qlora_api.exchange import ExitCode


class StageError(Exception):
    """A stage cannot go on. Its text is for the user: what was wrong, where, and what to do."""

    exit_code: ClassVar[int]


class BadInput(StageError):
    """Model, data or output cannot work as they are; another attempt would end the same way."""

    exit_code = ExitCode.BAD_INPUT


class Diverged(StageError):
    """Loss or gradients stopped being numbers."""

    exit_code = ExitCode.DIVERGED


class Interrupted(StageError):
    """The pod was told to stop."""

    exit_code = ExitCode.INTERRUPTED


class EnvironmentUnfit(StageError):
    """This node lacks what the order needs."""

    exit_code = ExitCode.ENVIRONMENT_UNFIT


class Unavailable(StageError):
    """Something outside is not there now and may come back: another attempt, later, can end otherwise."""

    exit_code = 1


def describe(error: BaseException) -> tuple[int, str]:
    """Exit code and message for whatever ended a stage; an error that nobody foresaw is 1, with our last frame."""
    if isinstance(error, StageError):
        return error.exit_code, str(error)
    if isinstance(error, PermissionError):
        return ExitCode.BAD_INPUT, (
            f"{error.filename}: not allowed for this pod's user ({os.getuid()}:{os.getgid()}): "
            "make it readable for all, or for a group that the pod is given (fsGroup)"
        )
    # torch says OutOfMemoryError on a GPU, and a plain RuntimeError for the CPU's allocator and for cuBLAS handles
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return ExitCode.OUT_OF_MEMORY, f"out of memory: {text.splitlines()[0] if text else 'no details'}"
    if isinstance(error, RuntimeError) and ("can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text):
        return ExitCode.OUT_OF_MEMORY, f"out of memory: {text.splitlines()[0]}"
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "qlora_trainer" in frame.filename]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name}" if ours else ""
    return 1, f"{type(error).__name__}{where}: {text or 'no message'}; the pod's log has the whole traceback"
