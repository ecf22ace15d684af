"""The train stage: one adapter, learned in one loop of ours, so that nothing but the recipe decides what is learned.

Exact by construction: batches are dealt by seed and epoch, the loss of an optimizer step is the mean over all of its
tokens however they are split into micro-batches, and every step seeds its own dropout, so that a training that was
interrupted goes on bit by bit as if it had not been. (With dropout, another micro-batch size draws other masks.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from qlora_api.exchange import Recipe, Score, TrainOrder, TrainResult
from qlora_api.peaks import peak_flops
from qlora_trainer.adapter import adapter_weights, load_adapter, save_adapter, with_adapter
from qlora_trainer.artifacts import directory_bytes, directory_digest
from qlora_trainer.census import census
from qlora_trainer.checkpoint import Checkpoints, Progress
from qlora_trainer.environment import Pod, device_name, log, peak_memory_bytes, pick_device, quiet_libraries
from qlora_trainer.examination import Examiner, KnownAnswers, examine, judged
from qlora_trainer.failures import BadInput, EnvironmentUnfit, GateFailed
from qlora_trainer.fitness import (
    equipment,
    require_attention_as_asked,
    require_fit,
    require_optimizer_as_asked,
    require_rows_as_quantised,
)
from qlora_trainer.flops import Work
from qlora_trainer.fused_loss import fuse_head
from qlora_trainer.gates import failures, verdicts
from qlora_trainer.inputs import with_inputs
from qlora_trainer.judging import open_judge
from qlora_trainer.learning import Learning, learn
from qlora_trainer.model import open_base
from qlora_trainer.optimization import make_optimizer
from qlora_trainer.packing import require_apart
from qlora_trainer.prepared import open_prepared, prepare
from qlora_trainer.quantization import load_for_training
from qlora_trainer.ranks import Ranks, load_state, meeting, mesh_of, whole
from qlora_trainer.recording import Recorder
from qlora_trainer.report_page import write_report
from qlora_trainer.results import record, recorded
from qlora_trainer.scores import CANARY, schema
from qlora_trainer.selection import Selection
from qlora_trainer.sharding import load_sharded
from qlora_trainer.starts import started


def train(order: TrainOrder, pod: Pod) -> TrainResult:
    """Train, evaluate and save one adapter, together with the other ranks if there are any.

    Raises BadInput when model or data are not those inspected, Diverged, Interrupted (after a checkpoint),
    EnvironmentUnfit without the GPU that was ordered, GateFailed when the adapter is there and a gate does not hold.
    """
    with meeting() as ranks:
        return train_with(ranks, order, pod)


def train_with(ranks: Ranks, order: TrainOrder, pod: Pod) -> TrainResult:
    """The training, as each of `ranks` does it: the first one reads for all, writes for all and speaks for all."""
    work_dir, recipe = Path(order.work_dir), order.recipe
    adapter_dir = work_dir / "adapter"
    done = recorded(order, TrainResult)
    if done and adapter_dir.is_dir() and directory_digest(adapter_dir) == done.adapter_digest:
        log.info("an earlier attempt has finished this training")
        return _let_out(done)
    if ranks.size != order.ranks:
        raise EnvironmentUnfit(f"the plan is for {order.ranks} processes, and {ranks.size} are here")
    if order.evaluation.answer_schema is not None:
        schema(order.evaluation.answer_schema)
    sharded = order.sharded or recipe.offload == "parameters"
    device = pick_device(order.accelerator, cpu_allowed=order.cpu_allowed)
    quiet_libraries()
    require_fit(recipe, equipment(device))
    flat = recipe.attention.startswith("flash")

    # model and data: those that were inspected, or none
    pod = replace(pod, inputs=ranks.from_first(lambda: with_inputs(order, pod).inputs))
    base = open_base(pod.path_of(order.model_uri, "model.uri"), order.model_uri)
    if base.digest != order.model_digest:
        raise BadInput(f"model.uri: {order.model_uri} has changed since inspection: put it back, or create a new job")
    require_rows_as_quantised(recipe, base.shape, device)
    data = open_prepared(ranks.from_first(lambda: prepare(order, pod, base)))
    rows = data.train
    steps = recipe.steps(len(rows))
    log.info(
        "%d examples in %d sequences of at most %d tokens; %d steps of %d sequences, %d at a time",
        data.examples, len(rows), recipe.max_length, steps, recipe.effective_batch_size, order.micro_batch_size,
    )  # fmt: skip

    # the model: frozen base, fp32 adapter
    log.info("loading %s (%s) on %s", base.architecture, _precision(recipe), device_name(device))
    checkpoints = Checkpoints(work_dir / "checkpoints", order.bound(), order.checkpoint_keep)
    checkpoint = checkpoints.newest()
    if sharded:
        model = load_sharded(base, recipe, device, mesh_of(ranks, device), starts=checkpoint is None)
    else:
        model = with_adapter(load_for_training(base, recipe, device), recipe, base)
    census(model, base, recipe, device)
    require_attention_as_asked(model, recipe, base.architecture)
    require_apart(model, recipe, device, base.architecture, flat=flat)
    if order.fused_loss:
        fuse_head(model)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    adapter_parameters = sum(weight.numel() for weight in trained.values())
    log.info("%d weights to train", adapter_parameters)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = make_optimizer(recipe, trained.values())
    require_optimizer_as_asked(optimizer, recipe)
    # fp16 gradients of small losses vanish without a scale; bf16 and fp32 need none
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=recipe.compute_dtype == "float16")

    # where an earlier attempt left off
    progress, resumed_from = Progress(), None
    if checkpoint:
        progress, resumed_from = checkpoint.progress, checkpoint.progress.step
        load_adapter(model, checkpoint.adapter)
        load_state(optimizer, checkpoint.optimizer)
        scaler.load_state_dict(checkpoint.scaler)
        log.info("resumed from step %d", resumed_from)
    elif not sharded and (recipe.dora or recipe.init == "loftq"):
        load_adapter(model, ranks.from_first(lambda: started(model, recipe, base)))

    peak = peak_flops(device_name(device), recipe.compute_dtype)
    recorder = Recorder(
        pod.watchers,
        progress,
        steps=steps,
        steps_per_epoch=recipe.steps_per_epoch(len(rows)),
        work=Work(base.shape, adapter_parameters, peak and peak * ranks.size),
        device=device,
    )
    # what it is looked at by on its way, and at its end
    size = order.micro_batch_size
    examiner = Examiner(model, base.tokenizer, size, device, flat, recorder.alive, ranks)
    golden, canary = (
        KnownAnswers(prefix, examples, answers) if examples else None
        for prefix, examples, answers in (("", data.golden, data.golden_rows), (CANARY, data.canary, data.canary_rows))
    )
    slices = [known.slice(base.tokenizer, recipe.max_length) for known in (golden, canary) if known]
    watch = Selection(
        recipe,
        progress,
        work_dir / "best",
        binding=order.binding(),
        steps_per_epoch=recipe.steps_per_epoch(len(rows)),
        weights=lambda: {name: whole(weight) for name, weight in adapter_weights(model).items()},
        figures=(lambda: examiner.figures(slices, recipe.best_metric)) if slices else None,
        ranks=ranks,
    )
    pad = base.tokenizer.pad_token_id
    learning = Learning(
        model, optimizer, scaler, recipe, rows, data.eval, steps, device, pad, flat, watch, ranks, sharded
    )
    with pod.interruption.deferred():
        learn(learning, progress, checkpoints, order, pod.interruption, recorder)

    # what came out, and what it is worth; all ranks answer: each a part, or all with a part of the model
    selected_step = watch.put_back(model, progress)
    learned = {name: whole(weight) for name, weight in adapter_weights(model).items()}
    if ranks.first:
        save_adapter(model, learned, adapter_dir, order, base)
    asked = order.evaluation
    found = examine(examiner, golden, canary, asked)
    if asked.judge:
        judge, answered = open_judge(asked.judge, recipe.seed, pod), found
        found = ranks.from_first(lambda: judged(answered, judge, recorder.alive))
    held_out = dict(progress.eval_losses)
    eval_loss = held_out.get(progress.step if selected_step is None else selected_step)
    if eval_loss is not None and not math.isfinite(eval_loss):
        eval_loss = None
    if eval_loss is not None and any(gate.metric == "evalLoss" for gate in asked.gates):
        before = examiner.loss(data.eval, base=True)
        found.scores.append(Score(metric="evalLoss", base=before, tuned=eval_loss, examples=len(data.eval)))
    scores = ranks.from_first(lambda: found.scores)  # all ranks pass or fail by the same figures
    passed = verdicts(asked.gates, scores)

    ranks.wait()
    finite = [loss for loss in progress.losses if math.isfinite(loss)]
    tail = finite[-max(1, len(finite) // 10) :]
    result = TrainResult(
        adapter_digest=directory_digest(adapter_dir),
        adapter_bytes=directory_bytes(adapter_dir),
        steps=progress.step,
        epochs=round(progress.step / recipe.steps_per_epoch(len(rows)), 4),
        train_loss=sum(tail) / len(tail) if tail else 0.0,
        eval_loss=eval_loss,
        tokens=progress.tokens,
        padding_percent=round(100 * progress.padding, 1),
        tokens_per_second=round(progress.tokens / progress.seconds, 1) if progress.seconds else 0,
        mfu=None if recorder.mfu is None else round(recorder.mfu, 4),
        seconds=round(progress.seconds, 1),
        device=device_name(device),
        peak_memory_bytes=ranks.most(peak_memory_bytes(device)),
        resumed_from_step=resumed_from,
        scores=scores,
        gates=passed,
        selected_step=selected_step,
        stopped_early=progress.stopped_early,
    )
    if ranks.first:
        write_report(work_dir / "report", order, result, progress, found.samples)
        record(order, result)
    ranks.wait()
    return _let_out(result)


def _let_out(result: TrainResult) -> TrainResult:
    if told := failures(result.gates):
        raise GateFailed(f"{told}; nothing is published, the adapter is on the work volume", result)
    return result


def _precision(recipe: Recipe) -> str:
    if recipe.method == "lora":
        return recipe.compute_dtype
    return (
        f"{recipe.quant_type}{', double-quantised' if recipe.double_quant else ''}, computing in {recipe.compute_dtype}"
    )
