"""The loop: from one optimizer step to the next, until the last one, or until something ends it."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any

import torch

from qlora_api.exchange import Recipe, TrainOrder
from qlora_trainer.adapter import adapter_weights
from qlora_trainer.checkpoint import Checkpoint, Checkpoints, Progress
from qlora_trainer.environment import log
from qlora_trainer.evaluation import mean_loss, micro_batches, summed_loss
from qlora_trainer.failures import Interrupted, is_out_of_memory
from qlora_trainer.health import Health
from qlora_trainer.interruption import Interruption
from qlora_trainer.offloading import activations_offloaded
from qlora_trainer.optimization import learning_rate
from qlora_trainer.ranks import ALONE, Ranks, whole, whole_state
from qlora_trainer.recording import Recorder
from qlora_trainer.selection import Selection
from qlora_trainer.sequences import Sequence, batches

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Learning:
    """What the loop works on."""

    model: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    recipe: Recipe
    rows: Several[Sequence]
    eval_rows: Several[Sequence]
    steps: int
    device: torch.device
    pad: int
    flat: bool
    watch: Selection
    ranks: Ranks = ALONE
    sharded: bool = False

    @property
    def eval_steps(self) -> frozenset[int]:
        """After which steps what is held out is looked at: evenly over each epoch, and at the end."""
        if not self.eval_rows and not self.watch.measures:
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
    """Go from `progress.step` to the last step. Raises Interrupted or out of memory with a checkpoint, or Diverged.

    All ranks go through it side by side: each learns from its part of every batch, and all take the same decisions.

    What ends a step before its weights are moved leaves the last finished one whole in every rank that has all of the
    model, and such a rank saves it alone: the one that is out of memory, and those that lose a neighbour. Of a model
    that ranks share each has a part, and the parts cannot be brought together when one fails: the others are in a
    collective of the failed step, which ends with the process that they wait for. There the steps since the last
    timed checkpoint are taken again.
    """
    model, optimizer, scaler, recipe = learning.model, learning.optimizer, learning.scaler, learning.recipe
    ranks = learning.ranks
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # FSDP2 leaves the mean of all ranks' gradients, and the step's is their sum
    averaged_over = ranks.size if learning.sharded else 1
    eval_steps = learning.eval_steps
    saved_step, saved_at, said_at = progress.step, time.monotonic(), -math.inf
    health = Health(recipe.learning_rate, model.config.vocab_size)

    def reached() -> Checkpoint:
        return Checkpoint(
            progress,
            {name: whole(weight) for name, weight in adapter_weights(model).items()},
            whole_state(optimizer.state_dict()),
            scaler.state_dict(),
        )

    def checkpoint() -> None:
        found = reached()
        if ranks.first:
            checkpoints.save(found)
            log.info("checkpoint at step %d", progress.step)
        ranks.wait()

    def rescue() -> None:
        optimizer.zero_grad()
        try:
            if checkpoints.save_alone(reached()):
                log.warning("checkpoint at step %d before the process ends", progress.step)
        except Exception as error:  # noqa: BLE001  what ended the step is what is to be told
            log.warning("no checkpoint at step %d: %s: %s", progress.step, type(error).__name__, error)

    model.train()
    stop = progress.step if progress.stopped_early else learning.steps
    dealt = batches(len(learning.rows), recipe.effective_batch_size, recipe.seed, start=progress.step, stop=stop)
    for step, chosen in enumerate(dealt, start=progress.step):
        started = time.monotonic()
        sequences = [learning.rows[number] for number in chosen]
        loss_tokens = sum(sequence.loss_tokens for sequence in sequences)
        torch.manual_seed((recipe.seed * 1_000_003 + step + 1 + ranks.rank * 1_000_000_007) % 2**63)
        rate = learning_rate(step, learning.steps, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate

        part_of_loss = torch.zeros((), device=learning.device)
        pads, all_pads, loss, norm, stopping = 0, 0.0, math.nan, math.nan, False
        try:
            for batch in micro_batches(
                sequences, order.micro_batch_size, pad=learning.pad, flat=learning.flat, ranks=ranks
            ):
                if stopping := ranks.any(interruption.requested):
                    break
                with activations_offloaded(recipe, model.config.hidden_size, learning.device):
                    part = summed_loss(model, batch, learning.device) / loss_tokens
                scaler.scale(part * averaged_over).backward()
                part_of_loss += part.detach()
                pads += batch.pads
            if not (stopping := stopping or ranks.any(interruption.requested)):
                if not learning.sharded:
                    ranks.sum_gradients(weights)  # before they are unscaled, so that all ranks see the same infinities
                scaler.unscale_(optimizer)
                norm = float(whole(torch.nn.utils.clip_grad_norm_(weights, recipe.max_grad_norm)))
                loss, all_pads = ranks.total(float(part_of_loss), pads)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold what the step has computed so far
            # of several a neighbour may be gone, for which each library has words of its own
            explained = is_out_of_memory(error) if ranks.size == 1 else not learning.sharded
            if explained and progress.step > saved_step:
                rescue()
            raise
        if stopping:  # the step is not taken; the next attempt takes it whole
            if progress.step > saved_step:
                checkpoint()
            raise Interrupted(
                f"told to stop at step {progress.step} of {learning.steps}; the next attempt goes on there"
            )

        if health.allows(step + 1, loss, norm):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        progress.step = step + 1
        progress.tokens += sum(len(sequence.ids) for sequence in sequences)
        progress.pads += int(all_pads)
        progress.losses.append(loss)
        progress.seconds += time.monotonic() - started
        standing = recorder.stepped(progress, sequences, rate, norm)
        if progress.step in eval_steps:
            value = None
            if learning.eval_rows:
                value = mean_loss(
                    model, learning.eval_rows, order.micro_batch_size, learning.device,
                    pad=learning.pad, flat=learning.flat, alive=recorder.alive, ranks=ranks,
                )  # fmt: skip
                progress.eval_losses.append((progress.step, value))
                recorder.evaluated(progress)
            told = learning.watch.looked(progress, value)
            recorder.evaluated(progress)
            progress.stopped_early = told == "stop" and progress.step < learning.steps
        last = progress.step == learning.steps or progress.stopped_early
        if time.monotonic() - said_at >= SECONDS_BETWEEN_LINES or last:
            said_at = time.monotonic()
            log.info("%s", standing.line())
        if ranks.any(time.monotonic() - saved_at >= order.checkpoint_every_seconds) or last:
            checkpoint()
            saved_step, saved_at = progress.step, time.monotonic()
        if progress.stopped_early:
            break
