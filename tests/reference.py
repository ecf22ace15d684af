"""TRL's SFTTrainer on the very batches that our loop learns from: what its losses and its speed are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qlora_api.exchange import Recipe, TrainOrder
from qlora_trainer.environment import Pod
from qlora_trainer.model import BaseModel
from qlora_trainer.optimization import learning_rate, make_optimizer
from qlora_trainer.prepared import open_prepared, prepare
from qlora_trainer.sequences import Sequence, batches


def rows_of(order: TrainOrder, pod: Pod, base: BaseModel) -> list[Sequence]:
    """What a training learns from, as its loop has it."""
    rows = open_prepared(prepare(order, pod, base)).train
    return [rows[number] for number in range(len(rows))]


class Reference(SFTTrainer):
    """Takes the examples as they come, and writes the loss of each micro-batch down, not rounded."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        examples: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(examples)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.of_micro_batches = [*getattr(self, "of_micro_batches", []), float(loss)]
        return loss


def reference(
    model: Any,
    tokenizer: Any,
    rows: list[Sequence],
    recipe: Recipe,
    directory: Path,
    *,
    steps: int,
    micro_batch_size: int,
    callbacks: list[TrainerCallback] | None = None,
) -> Reference:
    """A trainer that has the model with its adapter, our optimizer and learning rates, and our order of `rows`."""
    dealt = batches(len(rows), recipe.effective_batch_size, recipe.seed, start=0, stop=steps)
    ordered = [rows[number] for chosen in dealt for number in chosen]
    initial = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    settings = SFTConfig(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=recipe.effective_batch_size // micro_batch_size,
        max_grad_norm=recipe.max_grad_norm,
        max_length=recipe.max_length,
        gradient_checkpointing=recipe.gradient_checkpointing,
        packing=False,
        bf16=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    trainer = Reference(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([{"input_ids": row.ids, "labels": row.labels} for row in ordered]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    # TRL casts the adapter of a 4-bit model to bf16: ours learns in fp32
    for name, weight in model.named_parameters():
        if name in initial:
            weight.data = initial[name]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    trainer.optimizer = make_optimizer(recipe, weights)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: learning_rate(min(step, steps - 1), steps, recipe) / recipe.learning_rate
    )
    return trainer


def losses_of(trainer: Reference, micro_batches: int) -> list[float]:
    """Loss of each optimizer step of so many micro-batches."""
    found = trainer.of_micro_batches
    return [sum(found[start : start + micro_batches]) for start in range(0, len(found), micro_batches)]
