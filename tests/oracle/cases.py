"""What the memory plan is compared on: models of all sizes, this project's recipes, one GPU to sixteen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal

from qlora_api.exchange import Recipe
from qlora_operator.sizing.config import shape_of_config
from qlora_operator.sizing.memory import our_training, peak_of
from qlora_operator.sizing.step import WORKSPACE
from qlora_operator.sizing.training import adapted_by_default, attention_by_default, decoder_of
from tests.oracle.step import step_of

#: The plan may be so far from the oracle.
TOLERANCE = 0.05
#: In the plan and out of the oracle's sight: cuBLAS allocates its workspaces inside kernels.
UNSEEN = (WORKSPACE,)


@dataclass(frozen=True)
class Case:
    """A training to compare: a model of the catalogue by the default recipe, but for what is said."""

    model: str
    method: Literal["qlora", "lora"]
    gpus: int
    micro_batch_size: int
    max_length: int
    gradient_checkpointing: bool = True
    loss: Literal["logits", "tiles", "trl"] = "tiles"
    dora: bool = False
    quant_type: Literal["nf4", "hqq"] = "nf4"
    dropout: float = 0.05
    #: So many of its layers only.
    layers: int | None = None

    @property
    def config(self) -> Mapping[str, Any]:
        entries = json.loads(files("qlora_operator.sizing").joinpath("catalogue.json").read_text(encoding="utf-8"))
        found = next(entry["config"] for entry in entries if entry["repository"] == self.model)
        config = {key: value for key, value in found.items() if key != "torch_dtype"}
        return config | ({"num_hidden_layers": self.layers} if self.layers else {})

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            method=self.method,
            rank=16,
            alpha=32,
            dropout=self.dropout,
            dora=self.dora,
            quant_type=self.quant_type,
            target_modules=adapted_by_default(shape_of_config(self.config)),
            max_length=self.max_length,
            packing=True,
            loss="assistant",
            epochs=3,
            learning_rate=2e-4,
            schedule="cosine",
            warmup_fraction=0.03,
            effective_batch_size=32,
            optimizer="paged_adamw_8bit" if self.gpus == 1 else "adamw_torch_fused",
            seed=42,
            gradient_checkpointing=self.gradient_checkpointing,
            attention=attention_by_default(shape_of_config(self.config)),
            max_grad_norm=1.0,
        )

    @property
    def words(self) -> str:
        """The recipe, for people."""
        parts = [self.method, f"{self.micro_batch_size}×{self.max_length}"]
        if not self.gradient_checkpointing:
            parts.append("no checkpointing")
        if self.quant_type != "nf4":
            parts.append(self.quant_type)
        if self.loss != "tiles":
            parts.append({"logits": "whole logits", "trl": "TRL's fused loss"}[self.loss])
        if self.dora:
            parts.append("DoRA" if self.dropout else "DoRA without dropout")
        return ", ".join(parts)


@dataclass(frozen=True)
class Compared:
    """The peak of what PyTorch has allocated on one GPU, by the plan and by the oracle."""

    case: Case
    planned_bytes: int
    counted_bytes: int

    @property
    def error(self) -> float:
        return self.planned_bytes / self.counted_bytes - 1


def compared(case: Case) -> Compared:
    """Plan `case`, and run it on fake tensors."""
    training = our_training(decoder_of(shape_of_config(case.config)), case.recipe, case.micro_batch_size, case.gpus)
    items = peak_of(replace(training, loss=case.loss)).items
    ledger = step_of(
        case.config,
        case.recipe,
        micro_batch_size=case.micro_batch_size,
        gpus=case.gpus,
        loss=case.loss,
    )
    planned = sum(size for name, size in items.items() if name not in UNSEEN)
    return Compared(case, planned, ledger.peak_bytes)


CASES = (
    Case("meta-llama/Llama-2-7b-hf", "qlora", 1, 4, 2048),
    Case("meta-llama/Llama-2-7b-hf", "lora", 1, 2, 2048, gradient_checkpointing=False),
    Case("meta-llama/Llama-3.1-8B", "qlora", 1, 2, 2048, gradient_checkpointing=False),
    Case("meta-llama/Llama-3.1-8B", "qlora", 1, 1, 4096),
    Case("meta-llama/Llama-3.1-8B", "qlora", 1, 1, 4096, loss="logits"),
    Case("meta-llama/Llama-3.1-8B", "qlora", 1, 2, 4096),
    Case("meta-llama/Llama-3.1-8B", "lora", 2, 2, 2048),
    Case("Qwen/Qwen2.5-7B-Instruct", "qlora", 4, 4, 1024),
    Case("meta-llama/Llama-2-13b-hf", "lora", 1, 4, 1024),
    Case("meta-llama/Llama-2-13b-hf", "qlora", 2, 1, 4096),
    Case("meta-llama/Llama-2-13b-hf", "qlora", 2, 1, 4096, loss="logits"),
    Case("01-ai/Yi-34B", "qlora", 1, 1, 4096, loss="trl"),
    Case("01-ai/Yi-34B", "lora", 4, 1, 4096),
    Case("meta-llama/Llama-3.1-70B", "qlora", 1, 1, 2048),
    Case("meta-llama/Llama-2-70b-hf", "lora", 8, 2, 2048),
    Case("meta-llama/Llama-3.1-70B", "qlora", 8, 1, 8192),
    Case("meta-llama/Llama-3.1-405B", "qlora", 16, 1, 4096),
    Case("mistralai/Mixtral-8x22B-v0.1", "qlora", 8, 1, 4096),
    Case("Qwen/Qwen3-235B-A22B", "qlora", 8, 1, 4096),
    Case("mistralai/Mixtral-8x7B-v0.1", "lora", 16, 1, 2048),
    Case("meta-llama/Llama-3.1-8B", "qlora", 2, 1, 2048, dora=True),
)
#: Where the package hqq is installed.
HALF_QUADRATIC = (
    Case("HuggingFaceTB/SmolLM2-135M", "qlora", 1, 2, 1024, quant_type="hqq", layers=5),
    Case("HuggingFaceTB/SmolLM2-135M", "qlora", 1, 1, 256, quant_type="hqq", gradient_checkpointing=False, layers=5),
    Case("meta-llama/Llama-3.1-8B", "qlora", 1, 1, 2048, quant_type="hqq", layers=3),
    Case("Qwen/Qwen2.5-7B-Instruct", "qlora", 1, 2, 1024, quant_type="hqq", layers=3),
)
#: Seconds, not minutes: for every run of the tests.
SMALL = (
    Case("HuggingFaceTB/SmolLM2-135M", "qlora", 1, 2, 1024, layers=5),
    Case("HuggingFaceTB/SmolLM2-135M", "lora", 1, 1, 512, gradient_checkpointing=False, layers=5),
    Case("HuggingFaceTB/SmolLM2-135M", "qlora", 1, 8, 1024, layers=5),
    Case("HuggingFaceTB/SmolLM2-135M", "qlora", 1, 8, 1024, loss="trl", layers=5),
    Case("google/gemma-2-2b", "qlora", 1, 1, 1024, layers=5),
    Case("HuggingFaceTB/SmolLM2-135M", "qlora", 2, 1, 2048, layers=5),
    Case("HuggingFaceTB/SmolLM2-135M", "qlora", 2, 1, 2048, loss="logits", layers=5),
    Case("meta-llama/Llama-2-7b-hf", "qlora", 2, 1, 2048, layers=5),
    Case("meta-llama/Llama-3.1-8B", "qlora", 1, 1, 128, dora=True, layers=3),
    Case("HuggingFaceTB/SmolLM2-135M", "qlora", 2, 1, 1024, dora=True, layers=3),
    Case("mistralai/Mixtral-8x7B-v0.1", "qlora", 2, 1, 512, layers=3),
    Case("mistralai/Mixtral-8x7B-v0.1", "lora", 16, 1, 512, layers=3),
    Case(
        "HuggingFaceTB/SmolLM2-135M", "lora", 1, 1, 256, dora=True, dropout=0.0, gradient_checkpointing=False, layers=5
    ),
)
