"""A small config.json of every family that sizing knows, each with what is particular to it."""

from __future__ import annotations

from typing import Any

_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _config(family: str, **particular: Any) -> dict[str, Any]:
    return {"model_type": family, **_SMALL, **particular}


#: By name; several of one family where its settings change its layers.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _config("llama"),
    "llama, biases and tied": _config("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": _config("mistral", head_dim=32, sliding_window=64),
    "qwen2": _config("qwen2"),
    "qwen3": _config("qwen3", head_dim=32),
    "qwen3, biases and tied": _config("qwen3", head_dim=32, attention_bias=True, tie_word_embeddings=True),
    "gemma2": _config("gemma2", head_dim=32, sliding_window=64, tie_word_embeddings=True),
    "gemma3": _config("gemma3_text", head_dim=32, sliding_window=64, tie_word_embeddings=True),
    "phi3": _config("phi3", sliding_window=64),
    "phi": _config("phi"),
    "phi, normed heads": _config("phi", qk_layernorm=True),
}
