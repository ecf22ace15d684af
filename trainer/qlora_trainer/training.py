"""The train stage: one adapter, learned in one loop of ours, so that nothing but the recipe decides what is learned.

Exact by construction: batches are dealt by seed and epoch, the loss of an optimizer step is the mean over all of its
tokens however they are split into micro-batches, and every step seeds its own dropout, so that a training that was
interrupted goes on bit by bit as if it had not been. (With dropout, another micro-batch size draws other masks.)
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from qlora_api.exchange import Recipe, Score, TrainOrder, TrainResult
from qlora_api.peaks import peak_flops
from qlora_trainer.artifacts import directory_bytes, directory_digest, whole_directory
from qlora_trainer.checkpoint import Checkpoint, Checkpoints, Progress
from qlora_trainer.data import read_corpus
from qlora_trainer.environment import Pod, device_name, log, peak_memory_bytes, pick_device, quiet_libraries
from qlora_trainer.evaluation import METRIC, exact_match, mean_loss, micro_batches, summed_loss
from qlora_trainer.failures import BadInput, Diverged, Interrupted
from qlora_trainer.flops import Work
from qlora_trainer.inputs import with_inputs
from qlora_trainer.interruption import Interruption
from qlora_trainer.model import BaseModel, open_base
from qlora_trainer.optimization import learning_rate, make_optimizer
from qlora_trainer.quantization import load_for_training, quantized_modules
from qlora_trainer.recording import Recorder
from qlora_trainer.results import record, recorded
from qlora_trainer.sequences import Sequence, Tokenisation, batches, cut, log_samples, pack

#: Beside the adapter: what it was trained on, for the merge and for whoever finds the adapter later.
TRAINING_NAME = "qlora-training.json"
#: So many steps in a row without a finite loss and gradient, and the training is given up.
DIVERGED_AFTER = 3
SECONDS_BETWEEN_LINES = 5.0


def _require_what_is_built(order: TrainOrder) -> None:
    """Raises BadInput for a plan that this image cannot run yet, before anything is loaded."""
    ranks = order.nodes * order.ranks_per_node
    if ranks > 1:
        raise BadInput(
            f"the plan shares the model between {ranks} GPUs and this image trains on one: set hardware.gpus: 1"
        )
    if order.recipe.offload != "none":
        raise BadInput(f"training.offload: this image moves no {order.recipe.offload} to the host: leave it out")


def train(order: TrainOrder, pod: Pod) -> TrainResult:
    """Train, evaluate and save one adapter.

    Raises BadInput when model or data are not those inspected, Diverged, Interrupted (after a checkpoint),
    EnvironmentUnfit without the GPU that was ordered.
    """
    work_dir, recipe = Path(order.work_dir), order.recipe
    adapter_dir = work_dir / "adapter"
    done = recorded(order, TrainResult)
    if done and adapter_dir.is_dir() and directory_digest(adapter_dir) == done.adapter_digest:
        log.info("an earlier attempt has finished this training")
        return done
    _require_what_is_built(order)
    device = pick_device(order.accelerator, cpu_allowed=order.cpu_allowed)
    quiet_libraries()
    flat = recipe.attention.startswith("flash")

    # model and data: those that were inspected, or none
    pod = with_inputs(order, pod)
    base = open_base(pod.path_of(order.model_uri, "model.uri"), order.model_uri)
    if base.digest != order.model_digest:
        raise BadInput(f"model.uri: {order.model_uri} has changed since inspection: put it back, or create a new job")
    corpus = read_corpus(order.data, pod)
    if corpus.digest != order.data_digest:
        raise BadInput("dataset: the data has changed since inspection: put it back, or create a new job")
    tokenise = Tokenisation(base.tokenizer, corpus.format, recipe.loss)

    def rows_of(tokenised: list[Sequence]) -> list[Sequence]:
        kept = cut(tokenised, recipe.max_length)
        return pack(kept, recipe.max_length, seed=recipe.seed) if recipe.packing and kept else kept

    tokenised = [tokenise(example) for example in corpus.train]
    if order.data.log_samples:
        log_samples(tokenised, corpus, base.tokenizer)
    rows, eval_rows = rows_of(tokenised), rows_of([tokenise(example) for example in corpus.eval])
    if not rows:
        raise BadInput("dataset: no token carries loss: there is nothing to learn")
    steps = recipe.steps(len(rows))
    log.info(
        "%d examples in %d sequences of at most %d tokens; %d steps of %d sequences, %d at a time",
        len(corpus.train), len(rows), recipe.max_length, steps, recipe.effective_batch_size, order.micro_batch_size,
    )  # fmt: skip

    # the model: frozen base, fp32 adapter
    log.info("loading %s (%s) on %s", base.architecture, _precision(recipe), device_name(device))
    model = with_adapter(load_for_training(base, recipe, device), recipe, base)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    adapter_parameters = sum(weight.numel() for weight in trained.values())
    log.info("%d weights to train", adapter_parameters)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = make_optimizer(recipe, trained.values())
    # fp16 gradients of small losses vanish without a scale; bf16 and fp32 need none
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=recipe.compute_dtype == "float16")

    # where an earlier attempt left off
    checkpoints = Checkpoints(work_dir / "checkpoints", order.binding(), order.checkpoint_keep)
    progress, resumed_from = Progress(), None
    if checkpoint := checkpoints.newest():
        progress, resumed_from = checkpoint.progress, checkpoint.progress.step
        set_peft_model_state_dict(model, checkpoint.adapter)
        optimizer.load_state_dict(checkpoint.optimizer)
        scaler.load_state_dict(checkpoint.scaler)
        log.info("resumed from step %d", resumed_from)

    learning = Learning(
        model, optimizer, scaler, recipe, rows, eval_rows, steps, device, base.tokenizer.pad_token_id, flat
    )
    recorder = Recorder(
        pod.watchers,
        progress,
        steps=steps,
        steps_per_epoch=recipe.steps_per_epoch(len(rows)),
        work=Work(base.shape, adapter_parameters, peak_flops(device_name(device), recipe.compute_dtype)),
        device=device,
    )
    with pod.interruption.deferred():
        learn(learning, progress, checkpoints, order, pod.interruption, recorder)

    # what came out
    save_adapter(model, adapter_dir, order)
    scores: list[Score] = []
    if corpus.golden:
        model.eval()
        with model.disable_adapter():
            before = exact_match(model, base.tokenizer, corpus.golden, "golden set, base", recorder.alive)
        after = exact_match(model, base.tokenizer, corpus.golden, "golden set, tuned", recorder.alive)
        scores = [Score(metric=METRIC, base=before, tuned=after, examples=len(corpus.golden))]
        log.info("golden set of %d: exact match %.3f before, %.3f after", len(corpus.golden), before, after)

    tail = [loss for loss in progress.losses[-max(1, len(progress.losses) // 10) :] if math.isfinite(loss)]
    result = TrainResult(
        adapter_digest=directory_digest(adapter_dir),
        adapter_bytes=directory_bytes(adapter_dir),
        steps=progress.step,
        epochs=round(progress.step / recipe.steps_per_epoch(len(rows)), 4),
        train_loss=sum(tail) / len(tail) if tail else progress.losses[0],
        eval_loss=progress.eval_losses[-1][1] if progress.eval_losses else None,
        tokens=progress.tokens,
        tokens_per_second=round(progress.tokens / progress.seconds, 1) if progress.seconds else 0,
        mfu=None if recorder.mfu is None else round(recorder.mfu, 4),
        seconds=round(progress.seconds, 1),
        device=device_name(device),
        peak_memory_bytes=peak_memory_bytes(device),
        resumed_from_step=resumed_from,
        scores=scores,
    )
    record(order, result)
    return result


def with_adapter(model: Any, recipe: Recipe, base: BaseModel) -> Any:
    """The model with a fresh LoRA adapter in fp32; the same seed gives the same adapter."""
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules),
        use_rslora=recipe.rslora,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    adapted.peft_config["default"].base_model_name_or_path = base.uri  # PEFT puts the pod's own path there
    return adapted


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


def _precision(recipe: Recipe) -> str:
    if recipe.method == "lora":
        return recipe.compute_dtype
    return (
        f"{recipe.quant_type}{', double-quantised' if recipe.double_quant else ''}, computing in {recipe.compute_dtype}"
    )


def save_adapter(model: Any, directory: Path, order: TrainOrder) -> None:
    """Write a PEFT directory, and beside it what the adapter was trained on."""
    with whole_directory(directory) as partial:
        model.save_pretrained(partial, save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form that nobody has filled in
        config_path = partial / "adapter_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])  # a set: its order differs from process to process
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        trained_on = {
            "model": order.model_uri,
            "modelDigest": order.model_digest,
            "dataDigest": order.data_digest,
            "recipe": order.recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
            "quantizedModules": quantized_modules(model.get_base_model()),
        }
        (partial / TRAINING_NAME).write_text(json.dumps(trained_on, indent=2, sort_keys=True) + "\n", encoding="utf-8")
