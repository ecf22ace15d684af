"""The memory plan: near what was measured, monotone in what users turn, and the sum of its lines."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from qlora_api.exchange import LinearModule, ModelShape, Recipe
from qlora_operator.sizing.memory import (
    CUDA_CONTEXT_BYTES,
    DTYPE_BYTES,
    absmax_bytes,
    linear_parameters,
    lora_parameters,
    training_memory,
)
from tests.unit.operator import given
from tests.unit.operator.given import GIB

MEASURED = Path(__file__).parent / "measured"
#: Predicted over measured, at the least and at the most, for each method and attention kernel. Below 1 is what hurts: a
#: GPU that is too small. The default headroom of 15 % covers a prediction of 0.87.
BOUNDS = {
    # T4, fp16, attention projections only; the least are long sequences or large micro-batches (12 × 1024)
    ("qlora", "sdpa"): (0.84, 1.15),
    # as above; the least is 4096 tokens, whose scores take more than the 12 bytes each that are counted
    ("qlora", "eager"): (0.85, 1.20),
    # A100, all linear layers; printed in whole GB, and FlashAttention with a fused loss is below what is counted
    ("qlora", "flash"): (1.00, 1.25),
    # T4, attention projections only: always too much, by most (38 %) where the model is smallest; why is not known
    ("lora", "sdpa"): (1.00, 1.40),
    ("lora", "eager"): (1.00, 1.40),
}


@dataclass(frozen=True)
class Measured:
    """One training that somebody measured, and what is predicted for it (GiB)."""

    model: str
    method: str
    attention: str
    max_length: int
    micro_batch_size: int
    measured: float
    predicted: float

    def line(self) -> str:
        tokens = f"{self.micro_batch_size} × {self.max_length}"
        ratio = self.predicted / self.measured
        return (
            f"{self.model:42} {self.method:6}{self.attention:6}{tokens:>10}{self.measured:8.2f}{self.predicted:8.2f}"
            f"{ratio:7.2f}"
        )


def model_shape(config: dict[str, Any]) -> ModelShape:
    """The shape of a Llama-like decoder from its config.json."""
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    linear = [
        LinearModule(name=name, in_features=i, out_features=o, count=layers)
        for name, i, o in (
            ("q_proj", hidden, q),
            ("k_proj", hidden, kv),
            ("v_proj", hidden, kv),
            ("o_proj", q, hidden),
            ("gate_proj", hidden, inner),
            ("up_proj", hidden, inner),
            ("down_proj", inner, hidden),
        )
    ]
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    parameters = sum(m.in_features * m.out_features * m.count for m in linear) + embeddings + (2 * layers + 1) * hidden
    return ModelShape(
        parameters=parameters,
        hidden_size=hidden,
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=inner,
        vocab_size=config["vocab_size"],
        tied_embeddings=config["tie_word_embeddings"],
        max_position=131072,
        dtype="bfloat16",
        bytes_on_disk=2 * parameters,
        linear=linear,
    )


def config_of(model: str) -> dict[str, Any]:
    return json.loads((MEASURED / "models" / f"{model.replace('/', '--')}.json").read_text())


def compared(row: dict[str, str]) -> Measured:
    """A line of cases.csv beside the prediction, on equal terms.

    The measured trainings kept norms and embeddings in fp32 (peft's preparation for k-bit training), ours keeps them in
    the compute type: the difference is added. `reserved` leaves out the driver's context.
    """
    shape = model_shape(config_of(row["model"]))
    attention_only = ["q_proj", "k_proj", "v_proj", "o_proj"]
    recipe = given.recipe(
        method=row["method"],
        double_quant=row["double_quant"] == "true",
        compute_dtype=row["compute_dtype"],
        rank=int(row["rank"]),
        target_modules=attention_only if row["targets"] == "attention" else [m.name for m in shape.linear],
        max_length=int(row["seq_len"]),
        optimizer="adamw_torch",
        gradient_checkpointing=row["gradient_checkpointing"] == "true",
        attention=row["attention"],
    )
    predicted = training_memory(shape, recipe, micro_batch_size=int(row["micro_batch"])).total_bytes
    if row["norm_embed_fp32"] == "true":
        other = shape.parameters - linear_parameters(shape)
        predicted += (DTYPE_BYTES["float32"] - DTYPE_BYTES[row["compute_dtype"]]) * other
    if row["measure"] == "reserved":
        predicted -= CUDA_CONTEXT_BYTES
    return Measured(
        model=row["model"],
        method=row["method"],
        attention=row["attention"],
        max_length=int(row["seq_len"]),
        micro_batch_size=int(row["micro_batch"]),
        measured=float(row["measured_gib"]),
        predicted=predicted / GIB,
    )


def cases() -> list[Measured]:
    with (MEASURED / "cases.csv").open() as file:
        return [compared(row) for row in csv.DictReader(file)]


@pytest.mark.parametrize(("method", "attention"), BOUNDS)
def test_the_prediction_is_near_what_was_measured(method: str, attention: str) -> None:
    low, high = BOUNDS[method, attention]
    rows = [case for case in cases() if (case.method, case.attention) == (method, attention)]
    assert rows
    outside = [case for case in rows if not low <= case.predicted / case.measured <= high]
    table = "\n".join(("*" if case in outside else " ") + case.line() for case in rows)
    assert not outside, f"* outside {low} to {high}; tokens, measured, predicted (GiB), ratio:\n{table}"


def test_with_the_default_headroom_nearly_nothing_measured_would_run_out_of_memory() -> None:
    """What is predicted plus 15 % is what a GPU must have: for how many measured trainings would that be too little?"""
    short = [case for case in cases() if case.predicted * 1.15 < case.measured]
    assert len(short) <= len(cases()) // 25, "\n".join(case.line() for case in short)


def test_every_measured_case_is_compared() -> None:
    assert {(case.method, case.attention) for case in cases()} == set(BOUNDS)


# --- properties ---

MODELS = sorted(path.stem.replace("--", "/") for path in (MEASURED / "models").glob("*.json"))
SHAPES = {model: model_shape(config_of(model)) for model in MODELS}
RECIPES = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["qlora", "lora"]),
        "double_quant": st.booleans(),
        "compute_dtype": st.sampled_from(["bfloat16", "float32"]),
        "rank": st.sampled_from([1, 8, 16, 64, 512]),
        "max_length": st.sampled_from([16, 512, 2048, 8192]),
        "optimizer": st.sampled_from(["paged_adamw_8bit", "adamw_torch"]),
        "gradient_checkpointing": st.booleans(),
        "attention": st.sampled_from(["sdpa", "eager"]),
    }
)
SHAPE = st.sampled_from(sorted(SHAPES.values(), key=lambda shape: shape.parameters))


def total(shape: ModelShape, recipe: Recipe, size: int, *, gpu: bool = True) -> int:
    return training_memory(shape, recipe, micro_batch_size=size, gpu=gpu).total_bytes


@for_all(SHAPE, RECIPES, st.integers(1, 64), st.booleans())
def test_the_items_add_up_and_none_is_negative(shape: ModelShape, fields: dict[str, Any], size: int, gpu: bool) -> None:
    memory = training_memory(shape, given.recipe(**fields), micro_batch_size=size, gpu=gpu)
    assert memory.total_bytes == sum(item.bytes for item in memory.items)
    assert all(item.bytes > 0 for item in memory.items), "an item of nothing is not listed"
    assert len({item.name for item in memory.items}) == len(memory.items)


@for_all(SHAPE, RECIPES, st.integers(1, 64), st.integers(2, 4))
def test_more_of_anything_takes_more_memory(shape: ModelShape, fields: dict[str, Any], size: int, times: int) -> None:
    recipe = given.recipe(**fields)
    base = total(shape, recipe, size)
    assert total(shape, recipe, size * times) > base
    assert total(shape, recipe.model_copy(update={"rank": recipe.rank * times}), size) > base
    assert total(shape, recipe.model_copy(update={"max_length": recipe.max_length * times}), size) > base


@for_all(SHAPE, RECIPES, st.integers(1, 16))
def test_what_saves_memory_saves_it(shape: ModelShape, fields: dict[str, Any], size: int) -> None:
    def but(**changes: Any) -> int:
        return total(shape, given.recipe(**fields | changes), size)

    assert but(gradient_checkpointing=True) <= but(gradient_checkpointing=False)
    assert but(optimizer="paged_adamw_8bit") < but(optimizer="adamw_torch")
    assert but(compute_dtype="bfloat16") < but(compute_dtype="float32")
    assert but(method="qlora", double_quant=True) < but(method="qlora", double_quant=False)
    assert but(attention="sdpa") < but(attention="eager")
    fewer = total(shape, given.recipe(**fields | {"target_modules": ["q_proj", "v_proj"]}), size)
    assert fewer < but()


@pytest.mark.parametrize("model", [name for name in MODELS if SHAPES[name].parameters > 3e9])
def test_four_bits_save_at_least_half_of_a_large_base(model: str) -> None:
    lora = training_memory(SHAPES[model], given.recipe(method="lora"), micro_batch_size=1)
    qlora = training_memory(SHAPES[model], given.recipe(method="qlora"), micro_batch_size=1)
    assert qlora.total_bytes < 0.6 * lora.total_bytes


# --- against the papers' arithmetic ---


def test_scale_factors_cost_what_the_paper_says() -> None:
    """QLoRA, section 3: 0.5 bit per parameter, 0.127 with double quantisation."""
    n = 64 * 256 * 1000
    assert absmax_bytes(n, double_quant=False) * 8 / n == 0.5
    assert absmax_bytes(n, double_quant=True) * 8 / n == pytest.approx(0.127, abs=0.001)


def test_adapter_weights_of_llama_2_7b() -> None:
    """4·4096·2·r per attention block and 3·(4096 + 11008)·r per MLP, 32 layers: 40.0 million at rank 16."""
    shape = SHAPES["meta-llama/Llama-2-7b-hf"]
    every = [m.name for m in shape.linear]
    assert lora_parameters(shape, rank=16, target_modules=every) == 39_976_960
    assert shape.parameters == 6_738_415_616
    assert lora_parameters(shape, rank=16, target_modules=["q_proj", "v_proj"]) == 8_388_608
