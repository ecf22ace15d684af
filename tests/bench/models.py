"""The models that the trainer is measured with, and the recipe: made on the spot, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_api.exchange import Recipe

STEPS = 5
MICRO, ACCUMULATION = 2, 2

LLAMA: Mapping[str, Any] = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LOADED = {**LLAMA, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
#: By name: a dense model, and one of which 95 % are experts.
LOADED: Mapping[str, Mapping[str, Any]] = {
    "dense": {**_LOADED, "intermediate_size": 4096},
    "mixture": {
        **_LOADED, "model_type": "mixtral", "intermediate_size": 1536, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip


#: More of the dense one's layers: what is loaded layer by layer holds few of them at a time.
DEEP: Mapping[str, Any] = {**LOADED["dense"], "num_hidden_layers": 16}


def tiny(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model of the same kind that is nothing to load."""
    return {**config, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 64}


def quantised(**changes: Any) -> Recipe:
    """The usual recipe, on the CPU."""
    return Recipe(
        **{
            "method": "qlora", "compute_dtype": "float32", "rank": 16, "alpha": 32, "dropout": 0.05,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "max_length": 128, "packing": False, "loss": "all", "max_steps": STEPS, "learning_rate": 2e-4,
            "schedule": "cosine", "warmup_fraction": 0.03, "effective_batch_size": MICRO * ACCUMULATION,
            "optimizer": "paged_adamw_8bit", "seed": 7, "gradient_checkpointing": True, "attention": "sdpa",
            "max_grad_norm": 1.0, **changes,
        }
    )  # fmt: skip


def written(directory: Path, config: Mapping[str, Any]) -> None:
    """A model with random weights in bf16, and a tokenizer of numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.to(torch.bfloat16).save_pretrained(directory)
    words = {"<pad>": 0, "<unk>": 1, "<end>": 2} | {str(number): number for number in range(3, 1024)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(directory)


def quantised_weights(config: Mapping[str, Any]) -> int:
    """Weights that our loading puts into 4 bits: linear layers but the head, and experts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.lm_head
    )
    return linear + sum(weight.numel() for weight in model.parameters() if weight.dim() == 3)


#: With which models are loaded.
RECIPE = quantised(compute_dtype="bfloat16")
