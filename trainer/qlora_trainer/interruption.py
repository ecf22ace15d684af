"""SIGTERM: ends a stage at once, or, where work must first be saved, at the next convenient point."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_trainer.failures import Interrupted

#: So long the main thread has, in seconds, to hear of a signal by itself: it does between any two lines of Python.
HEARING_SECONDS = 1.0


class Interruption:
    """Whether the pod was told to stop; while deferred it is only noted, otherwise `Interrupted` is raised."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        self._heard = threading.Event()

    def install(self) -> None:
        """Take over SIGTERM. A container's first process has no default handler and would ignore it."""
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, _signal: int, _frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        self._heard.set()
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

    def leave_when_deaf(self, leave: Callable[[], object]) -> None:
        """From now on call `leave`, in a thread of its own, when SIGTERM finds the main thread waiting in a library.

        Python hands a signal to the main thread between two lines: one that waits for other ranks, in a rendezvous or
        a collective, hears of it when they answer, or never. What is deferred is left alone, for work would be lost.
        """
        listening, told = socket.socketpair()
        told.setblocking(False)
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)

        def listen() -> None:
            while told.fileno() >= 0:  # and is kept open by this
                if signal.SIGTERM not in listening.recv(64):
                    continue
                ours = signal.getsignal(signal.SIGTERM) == self._on_sigterm  # torchrun has its own while ranks run
                if ours and not self._heard.wait(HEARING_SECONDS) and not self._deferred:
                    leave()

        threading.Thread(target=listen, name="interruption", daemon=True).start()
