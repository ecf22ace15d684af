"""What a training loop tells about itself, once per step, to all who watch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Several
from dataclasses import replace
from datetime import UTC, datetime

import torch

from qlora_trainer.checkpoint import Progress
from qlora_trainer.environment import gpu_memory_bytes
from qlora_trainer.flops import Work
from qlora_trainer.sequences import Sequence
from qlora_trainer.standing import Standing, Watcher

#: Speed is that of the steps of so many seconds: steady enough to read, new enough to show a slow node.
WINDOW_SECONDS = 60.0


class Recorder:
    """Turns steps into figures and hands them to the watchers."""

    def __init__(
        self,
        watchers: Several[Watcher],
        progress: Progress,
        *,
        steps: int,
        steps_per_epoch: int,
        work: Work,
        device: torch.device,
    ) -> None:
        self._watchers = watchers
        self._work = work
        self._device = device
        self._steps_per_epoch = steps_per_epoch
        self._began, self._first_step = time.monotonic(), progress.step
        self._before = progress.seconds, progress.tokens
        # seconds, tokens and FLOPs since this attempt began (another may have had another device), after each step
        self._marks: deque[tuple[float, int, float]] = deque([(0.0, 0, 0.0)])
        self._standing = Standing(
            at=datetime.now(UTC),
            step=progress.step,
            steps=steps,
            epoch=progress.step / steps_per_epoch,
            tokens=progress.tokens,
            loss=progress.losses[-1] if progress.losses else None,
            eval_loss=_last_eval(progress),
            looks=_last_look(progress),
        )
        self._tell(self._standing)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation over all steps of this attempt."""
        seconds, _, flops = self._marks[-1]
        return self._work.mfu(flops, seconds)

    def stepped(self, progress: Progress, sequences: list[Sequence], rate: float, norm: float) -> Standing:
        """Note the step that `progress` has just counted, and what it has learned from."""
        now = (
            progress.seconds - self._before[0],
            progress.tokens - self._before[1],
            self._marks[-1][2] + self._work.flops(sequences),
        )
        self._marks.append(now)
        while now[0] - self._marks[1][0] >= WINDOW_SECONDS:
            self._marks.popleft()
        seconds, tokens, flops = (new - old for new, old in zip(now, self._marks[0], strict=True))
        # evaluations and checkpoints take their time too: by the clock on the wall
        per_step = (time.monotonic() - self._began) / (progress.step - self._first_step)
        return self._tell(
            replace(
                self._standing,
                step=progress.step,
                epoch=progress.step / self._steps_per_epoch,
                tokens=progress.tokens,
                padding=progress.padding,
                loss=progress.losses[-1],
                learning_rate=rate,
                grad_norm=norm,
                tokens_per_second=tokens / seconds if seconds else None,
                mfu=self._work.mfu(flops, seconds),
                remaining_seconds=(self._standing.steps - progress.step) * per_step,
            )
        )

    def evaluated(self, progress: Progress) -> Standing:
        """Note what the newest evaluation has found so far: its loss, then what else is looked at."""
        return self._tell(replace(self._standing, eval_loss=_last_eval(progress), looks=_last_look(progress)))

    def alive(self) -> None:
        """Say once more where the training stands: what is being done takes long and is no step."""
        self._tell(self._standing)

    def _tell(self, standing: Standing) -> Standing:
        self._standing = replace(standing, at=datetime.now(UTC), gpu_memory_bytes=gpu_memory_bytes(self._device))
        for watcher in self._watchers:
            watcher.see(self._standing)
        return self._standing


def _last_eval(progress: Progress) -> float | None:
    return progress.eval_losses[-1][1] if progress.eval_losses else None


def _last_look(progress: Progress) -> dict[str, float]:
    found = progress.looks[-1] if progress.looks else {}
    return {name: value for name, value in found.items() if name not in ("step", "evalLoss")}
