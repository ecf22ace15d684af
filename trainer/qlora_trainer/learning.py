"""The loop: from one optimizer step to the next, until the last one, or until something ends it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model_state_dict

from qlora_api.exchange import Recipe, TrainOrder
from qlora_trainer.checkpoint import Checkpoint, Checkpoints, Progress
from qlora_trainer.environment import log
from qlora_trainer.evaluation import mean_loss, micro_batches, summed_loss
from qlora_trainer.failures import Diverged, Interrupted
from qlora_trainer.interruption import Interruption
from qlora_trainer.optimization import learning_rate
from qlora_trainer.recording import Recorder
from qlora_trainer.sequences import Sequence, batches

#: So many steps in a row without a finite loss and gradient, and the training is given up.
DIVERGED_AFTER = 3
SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Learning:
    """What the loop works on."""

    model: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    recipe: Recipe
    rows: list[Sequence]
    eval_rows: list[Sequence]
    steps: int
    device: torch.device
    pad: int
    flat: bool

    @property
    def eval_steps(self) -> frozenset[int]:
        """After which steps the evaluation set is looked at: evenly over each epoch, and at the end."""
        if not self.eval_rows:
            return frozenset()
        per_epoch, times = self.recipe.steps_per_epoch(len(self.rows)), self.recipe.evals_per_epoch
        epochs = -(-self.steps // per_epoch)
        due = {round(per_epoch * number / times) for number in range(1, epochs * times + 1)} if times else set()
        return frozenset(step for step in due if 0 < step <= self.steps) | {self.steps}


def learn(
    learning: Learning,
    progress: Progress,
    checkpoints: Checkpoints,
    order: TrainOrder,
    interruption: Interruption,
    recorder: Recorder,
) -> None:
    """Go from `progress.step` to the last step. Raises Interrupted or out of memory with a checkpoint, or Diverged."""
    model, optimizer, scaler, recipe = learning.model, learning.optimizer, learning.scaler, learning.recipe
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    eval_steps = learning.eval_steps
    saved_step, saved_at, said_at, not_finite = progress.step, time.monotonic(), -math.inf, 0

    def checkpoint() -> None:
        checkpoints.save(
            Checkpoint(
                progress,
                get_peft_model_state_dict(model, save_embedding_layers=False),
                optimizer.state_dict(),
                scaler.state_dict(),
            )
        )
        log.info("checkpoint at step %d", progress.step)

    model.train()
    dealt = batches(
        len(learning.rows), recipe.effective_batch_size, recipe.seed, start=progress.step, stop=learning.steps
    )
    for step, chosen in enumerate(dealt, start=progress.step):
        started = time.monotonic()
        sequences = [learning.rows[number] for number in chosen]
        loss_tokens = sum(sequence.loss_tokens for sequence in sequences)
        torch.manual_seed((recipe.seed * 1_000_003 + step + 1) % 2**63)
        rate = learning_rate(step, learning.steps, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate

        loss = torch.zeros((), device=learning.device)
        tokens = 0
        try:
            for batch in micro_batches(sequences, order.micro_batch_size, pad=learning.pad, flat=learning.flat):
                if interruption.requested:
                    break
                part = summed_loss(model, batch, learning.device) / loss_tokens
                scaler.scale(part).backward()
                loss += part.detach()
                tokens += batch.tokens
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            if progress.step > saved_step:
                checkpoint()
            raise
        if interruption.requested:  # the step that was begun is not taken; the next attempt takes it whole
            if progress.step > saved_step:
                checkpoint()
            raise Interrupted(
                f"told to stop at step {progress.step} of {learning.steps}; the next attempt goes on there"
            )

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)
        if math.isfinite(float(loss)) and math.isfinite(float(norm)):
            scaler.step(optimizer)
            not_finite = 0
        else:  # the step is left out: one infinite gradient would make every weight infinite
            not_finite += 1
            log.info("step %d: loss %s, gradient norm %s; not taken", step + 1, float(loss), float(norm))
            if not_finite == DIVERGED_AFTER:
                raise Diverged(
                    f"loss or gradients were not finite in {DIVERGED_AFTER} steps in a row, up to step {step + 1}: "
                    f"lower training.learningRate ({recipe.learning_rate:g}), compute in bfloat16, or look at the data"
                )
        scaler.update()
        optimizer.zero_grad()

        progress.step = step + 1
        progress.tokens += tokens
        progress.losses.append(float(loss))
        progress.seconds += time.monotonic() - started
        standing = recorder.stepped(progress, sequences, rate, float(norm))
        if progress.step in eval_steps:
            value = mean_loss(
                model, learning.eval_rows, order.micro_batch_size, learning.device,
                pad=learning.pad, flat=learning.flat, alive=recorder.alive,
            )  # fmt: skip
            progress.eval_losses.append((progress.step, value))
            recorder.evaluated(progress)
            log.info("step %d: eval loss %.4f", progress.step, value)
        last = progress.step == learning.steps
        if time.monotonic() - said_at >= SECONDS_BETWEEN_LINES or last:
            said_at = time.monotonic()
            log.info("%s", standing.line())
        if time.monotonic() - saved_at >= order.checkpoint_every_seconds or last:
            checkpoint()
            saved_step, saved_at = progress.step, time.monotonic()
