"""A training that hangs ends itself: a GPU that waits for a lost neighbour waits for good, and is paid for as well."""

from __future__ import annotations

import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from qlora_trainer.standing import Standing


@dataclass(frozen=True)
class Patience:
    """How long nothing may happen, in seconds."""

    #: Before the first step is done: kernels are compiled and chosen in it.
    first_step: float = 3600.0
    #: Later: so many times the usual step, and no less than what the slowest checkpoint or answer takes.
    steps: float = 20.0
    least: float = 900.0
    #: Steps that the usual one is the median of.
    remembered: int = 50


class Watchdog:
    """Watches a training's steps; `give_up` is called, from a thread of its own, with the reason when none comes."""

    def __init__(self, give_up: Callable[[str], object], patience: Patience | None = None) -> None:
        self._give_up = give_up
        self._patience = patience or Patience()
        self._durations: deque[float] = deque(maxlen=self._patience.remembered)
        self._step: int | None = None
        self._stepped_at = 0.0
        self._seen_at: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def see(self, standing: Standing) -> None:
        """A sign of life; where the step has changed, also how long it took."""
        now = time.monotonic()
        if self._step is not None and standing.step > self._step:
            self._durations.append((now - self._stepped_at) / (standing.step - self._step))
        if standing.step != self._step:
            self._step, self._stepped_at = standing.step, now
        self._seen_at = now

    @property
    def limit_seconds(self) -> float:
        """How long nothing may happen now."""
        if not self._durations:
            return self._patience.first_step
        return max(self._patience.least, self._patience.steps * statistics.median(self._durations))

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(min(5.0, self._patience.least / 4)):
            if self._seen_at is None:
                continue
            silent, limit = time.monotonic() - self._seen_at, self.limit_seconds
            if silent > limit:
                faulthandler.dump_traceback(sys.stderr)
                self._give_up(self._reason(silent))
                return

    def _reason(self, silent: float) -> str:
        usual = f", and a step usually takes {statistics.median(self._durations):.1f} s" if self._durations else ""
        return (
            f"nothing has happened for {silent:.0f} s after step {self._step}{usual}: a GPU, the link between GPUs or "
            "the work volume hangs; the pod's log says where each thread stood"
        )
