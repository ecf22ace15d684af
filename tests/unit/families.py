"""A small config.json of every family that sizing knows, each with what is particular to it."""

from __future__ import annotations

from typing import Any

_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _config(family: str, **particular: Any) -> dict[str, Any]:
    return {"model_type": family, **_SMALL, **particular}


_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}

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
    "mixtral": _config("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _config(
        "qwen3_moe", head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, mlp_only_layers=[1]
    ),
    "deepseek_v2": _config("deepseek_v2", **_LATENT, q_lora_rank=None, n_shared_experts=2),
    "deepseek_v3": _config("deepseek_v3", **_LATENT, q_lora_rank=24, n_shared_experts=1, n_group=2, topk_group=1),
    "deepseek_v3, biases": _config(
        "deepseek_v3", **_LATENT, q_lora_rank=24, n_shared_experts=1, n_group=2, topk_group=1, attention_bias=True
    ),
}
