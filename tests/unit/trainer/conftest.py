"""A model directory of 200 thousand weights with a tokenizer trained on the spot, data for it, and orders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_api.exchange import DataOrder, DataSource, InspectOrder, MergeOrder, Recipe, TrainOrder
from qlora_api.heads import takes_loss_in_tiles
from qlora_trainer.environment import Pod, quiet_libraries
from qlora_trainer.inspection import inspect
from qlora_trainer.interruption import Interruption

TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
THINGS = [
    "sparrow",
    "salmon",
    "granite",
    "oak",
    "tulip",
    "basalt",
    "trout",
    "robin",
    "maple",
    "marble",
    "heron",
    "carp",
]
KIND = {
    "sparrow": "bird", "robin": "bird", "heron": "bird", "salmon": "fish", "trout": "fish", "carp": "fish",
    "granite": "rock", "basalt": "rock", "marble": "rock", "oak": "tree", "maple": "tree", "tulip": "flower",
}  # fmt: skip


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def examples() -> list[dict[str, Any]]:
    """48 chats of different lengths about what things are."""
    asked = ("What is a {}?", "Tell me, please: of which kind is a {}?", "{}?", "I saw a {} on my way. What was it?")
    return [chat(form.format(thing), KIND[thing]) for form in asked for thing in THINGS]


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread() -> None:
    torch.set_num_threads(1)
    quiet_libraries()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model as a hub has it: bf16, in several shards, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([json.dumps(example) for example in examples()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.08,
            bos_token_id=None, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    # untrained embeddings are short, and with a frozen head logits cannot grow beyond |norm| · |embedding|: LoRA could
    # then hardly learn anything
    model.model.norm.weight.data.mul_(4)
    directory = tmp_path_factory.mktemp("base")
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="100KB")
    tokenizer.save_pretrained(directory)
    return directory


@dataclass
class Place:
    """Claims and a work directory, and the orders for them."""

    root: Path
    pod: Pod

    @property
    def claims(self) -> Path:
        return self.root / "claims"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def data(self, **changes: Any) -> DataOrder:
        return DataOrder(
            **{
                "train": [DataSource(uri="pvc://data/train.jsonl")],
                "golden": DataSource(uri="pvc://data/golden.jsonl"),
                **changes,
            }
        )

    def envelope(self) -> dict[str, Any]:
        return {"namespace": "team", "job": "tune", "job_uid": "u-1", "attempt": 1, "work_dir": str(self.work)}

    def inspect_order(self, data: DataOrder | None = None, **changes: Any) -> InspectOrder:
        return InspectOrder(
            **{**self.envelope(), "model_uri": "pvc://base/model", "data": data or self.data(), **changes}
        )

    def train_order(
        self, data: DataOrder | None = None, recipe: dict[str, Any] | None = None, **changes: Any
    ) -> TrainOrder:
        data = data or self.data()
        seen = inspect(self.inspect_order(data), self.pod)
        return TrainOrder(
            **{
                **self.envelope(),
                "model_uri": "pvc://base/model",
                "model_digest": seen.model_digest,
                "data": data,
                "data_digest": seen.data_digest,
                "recipe": recipe_of(**(recipe or {})),
                "micro_batch_size": 2,
                "gradient_accumulation": 2,
                "accelerator": "cpu",
                "fused_loss": takes_loss_in_tiles(seen.shape),
                "checkpoint_every_seconds": 3600,
                "checkpoint_keep": 2,
                **changes,
            }
        )

    def merge_order(self, order: TrainOrder, adapter_digest: str, **changes: Any) -> MergeOrder:
        return MergeOrder(
            **{
                **self.envelope(),
                "model_uri": order.model_uri,
                "model_digest": order.model_digest,
                "recipe": order.recipe,
                "adapter_digest": adapter_digest,
                **changes,
            }
        )


def recipe_of(**changes: Any) -> Recipe:
    """A short NF4 recipe in fp32, where comparisons can be strict."""
    return Recipe(
        **{
            "method": "qlora", "compute_dtype": "float32", "rank": 8, "alpha": 16, "dropout": 0.0,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "max_length": 128, "packing": True, "loss": "assistant", "max_steps": 6, "learning_rate": 5e-3,
            "schedule": "cosine", "warmup_fraction": 0.1, "effective_batch_size": 4, "optimizer": "adamw_torch",
            "seed": 7, "gradient_checkpointing": False, "attention": "sdpa", "max_grad_norm": 1.0,
            **changes,
        }
    )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, model_dir: Path) -> Place:
    """Base model, 48 training examples and 12 golden ones, each in its claim."""
    place = Place(tmp_path, Pod(Interruption(), str(tmp_path / "claims")))
    shutil.copytree(model_dir, place.claims / "base" / "model")
    write_jsonl(place.claims / "data" / "train.jsonl", examples())
    golden = [chat(f"And a {thing}, what is that?", KIND[thing]) for thing in THINGS]
    write_jsonl(place.claims / "data" / "golden.jsonl", golden)
    return place


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes bytes to a file."""

    def write(content: bytes) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        return path

    return write
