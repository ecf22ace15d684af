"""SIGTERM: ends a stage at once, or, where work must first be saved, at the next convenient point."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_trainer.failures import Interrupted


class Interruption:
    """Whether the pod was told to stop; while deferred it is only noted, otherwise `Interrupted` is raised."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False

    def install(self) -> None:
        """Take over SIGTERM. A container's first process has no default handler and would ignore it."""
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if first and not self._deferred:
            raise Interrupted("told to stop (SIGTERM)")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it, look at `requested` and stop in order."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
