"""A model's shape from its config.json alone, for the families whose layers follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_api.exchange import ExpertWeights, LinearModule, ModelShape
from qlora_operator.sizing.families import FAMILIES

#: What transformers takes where config.json leaves a key out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": 4096},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
    },
    "qwen3": {"head_dim": 128},
}
#: Families whose queries, keys and values come from latents, and whose experts share an MLP.
_LATENT = ("deepseek_v2", "deepseek_v3")
#: Families that look back a window only where `use_sliding_window` says so.
_WINDOW_ON_REQUEST = ("qwen2", "qwen3", "qwen3_moe")


def read_shape(path: Path) -> ModelShape:
    """The shape of the model whose config.json is at `path`.

    Raises OSError when it cannot be read, ValueError, naming it, when it is not JSON or no such model's.
    """
    try:
        return shape_of_config(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Settings:
    """A config.json with what its family leaves out."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.given = {**_DEFAULTS.get(family, {}), **{k: v for k, v in config.items() if v is not None}}

    def number(self, *keys: str) -> int:
        """A whole number from 1 under the first of `keys` that is there. Raises ValueError naming it."""
        key = next((key for key in keys if key in self.given), keys[0])
        value = self.given.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key}: {value!r} is no whole number from 1")
        return value

    def number_or(self, default: int, key: str) -> int:
        return self.number(key) if key in self.given else default

    def flag(self, key: str) -> bool:
        return bool(self.given.get(key, False))


def shape_of_config(config: object) -> ModelShape:
    """The shape of a decoder whose `config` is that of transformers; of a multimodal Gemma 3, its text model's.

    Raises ValueError, naming the key, when it is of another family or lacks what the shape follows from.
    """
    if not isinstance(config, Mapping):
        raise ValueError("is no object of settings, as config.json has them")
    stored = config.get("torch_dtype") or config.get("dtype")
    if config.get("model_type") == "gemma3":
        config = {"model_type": "gemma3_text", **(config.get("text_config") or {})}
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model_type: {family!r} is none of {', '.join(FAMILIES)}, whose layers follow from config.json: "
            "give the model's directory with its safetensors files"
        )
    given = _Settings(config, family)
    hidden, layers, heads = (given.number(f"{key}") for key in ("hidden_size", "num_hidden_layers", _HEADS))
    inner, vocabulary = given.number("intermediate_size"), given.number("vocab_size")
    kv_heads = given.number_or(heads, "num_key_value_heads")
    head_dim = given.number_or(hidden // heads, "head_dim")
    if family in _LATENT:
        head_dim = given.number("qk_nope_head_dim") + given.number("qk_rope_head_dim")
        attention, attention_others = _latent_attention(given, hidden, heads, head_dim)
    else:
        attention, attention_others = _attention(given, family, hidden, heads, kv_heads, head_dim)
    mlp, mlp_others = _mlp(given, family, hidden, inner)
    sparse = _mixed_layers(given, family, layers)
    experts = _experts(given, family, hidden, inner, sparse) if sparse else []
    sizes = [(name, inputs, outputs, layers) for name, inputs, outputs in attention]
    sizes += [(name, inputs, outputs, layers - sparse) for name, inputs, outputs in mlp if sparse < layers]
    if sparse and family in _LATENT:
        shared = given.number("moe_intermediate_size") * given.number("n_shared_experts")
        sizes += [(name, inputs, outputs, sparse) for name, inputs, outputs in _mlp(given, family, hidden, shared)[0]]
    norm = 2 * hidden if FAMILIES[family].layer_norms else hidden
    norms = 1 if FAMILIES[family].parallel else 4 if FAMILIES[family].post_norms else 2
    tied = given.flag("tie_word_embeddings")
    parameters = (
        sum(inputs * outputs * count for _, inputs, outputs, count in sizes)
        + layers * (norms * norm + attention_others)
        + (layers - sparse) * mlp_others
        + sum(weights.weights for weights in experts)
        + (sparse * experts[0].experts * hidden if experts else 0)  # routers
        + vocabulary * hidden * (1 if tied else 2)
        + (vocabulary if family == "phi" else 0)  # Phi's head has a bias
        + norm
    )
    dtype = str(stored or given.given.get("torch_dtype") or given.given.get("dtype") or "bfloat16")
    return ModelShape(
        parameters=parameters,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tied_embeddings=tied,
        max_position=given.number_or(131072, "max_position_embeddings"),
        dtype=dtype,
        bytes_on_disk=parameters * (4 if dtype == "float32" else 2),
        linear=[
            LinearModule(name=name, in_features=inputs, out_features=outputs, count=count)
            for name, inputs, outputs, count in sizes
        ],
        family=family,
        sliding_window=_window(given, family),
        experts=experts,
        experts_per_token=given.number("num_experts_per_tok") if experts else 0,
        experts_quantized=bool(experts),
    )


_HEADS = "num_attention_heads"
#: Linear layers by name, input and output; and weights of biases and of the norms of heads.
_Part = tuple[list[tuple[str, int, int]], int]


def _attention(given: _Settings, family: str, hidden: int, heads: int, kv_heads: int, head_dim: int) -> _Part:
    q, kv = heads * head_dim, kv_heads * head_dim
    if family == "phi3":
        return [("qkv_proj", hidden, q + 2 * kv), ("o_proj", q, hidden)], 0
    out = "dense" if family == "phi" else "o_proj"
    linears = [("q_proj", hidden, q), ("k_proj", hidden, kv), ("v_proj", hidden, kv), (out, q, hidden)]
    others = 2 * head_dim if FAMILIES[family].head_norms else 0
    if family == "qwen2":
        others += q + 2 * kv
    elif family == "phi" or (family not in ("mistral", "mixtral") and given.flag("attention_bias")):
        others += q + 2 * kv + hidden
    if family == "phi" and given.flag("qk_layernorm"):
        others += 4 * head_dim
    return linears, others


def _latent_attention(given: _Settings, hidden: int, heads: int, head_dim: int) -> _Part:
    """Queries, keys and values by way of latents; queries directly where `q_lora_rank` is null."""
    rank, rope, value = (given.number(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim"))
    linears, others = [("q_proj", hidden, heads * head_dim)], rank
    if "q_lora_rank" in given.given:
        latent = given.number("q_lora_rank")
        linears = [("q_a_proj", hidden, latent), ("q_b_proj", latent, heads * head_dim)]
        others += latent
    linears += [
        ("kv_a_proj_with_mqa", hidden, rank + rope),
        ("kv_b_proj", rank, heads * (head_dim - rope + value)),
        ("o_proj", heads * value, hidden),
    ]
    if given.flag("attention_bias"):
        others += rank + rope + hidden + (linears[0][2] if "q_lora_rank" in given.given else 0)
    return linears, others


def _mixed_layers(given: _Settings, family: str, layers: int) -> int:
    """Layers with routed experts."""
    if family == "mixtral":
        return layers
    if family == "qwen3_moe":
        dense = given.given.get("mlp_only_layers") or []
        step = given.number_or(1, "decoder_sparse_step")
        return sum(1 for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    if family in _LATENT:
        return layers - min(layers, int(given.given.get("first_k_dense_replace", 0)))
    return 0


def _experts(given: _Settings, family: str, hidden: int, inner: int, layers: int) -> list[ExpertWeights]:
    """Gate and up, and down, of all experts of a layer, as transformers keeps them."""
    number = given.number("num_local_experts", "num_experts", "n_routed_experts")
    inner = inner if family == "mixtral" else given.number("moe_intermediate_size")
    sizes = (("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden))
    return [
        ExpertWeights(name=name, experts=number, in_features=inputs, out_features=outputs, count=layers)
        for name, inputs, outputs in sizes
    ]


def _mlp(given: _Settings, family: str, hidden: int, inner: int) -> _Part:
    if family == "phi":
        return [("fc1", hidden, inner), ("fc2", inner, hidden)], inner + hidden
    if family == "phi3":
        return [("gate_up_proj", hidden, 2 * inner), ("down_proj", inner, hidden)], 0
    linears = [("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)]
    return linears, 2 * inner + hidden if family == "llama" and given.flag("mlp_bias") else 0


def _window(given: _Settings, family: str) -> int | None:
    """Tokens that layers look back, where some do not look back to the start."""
    if family in _WINDOW_ON_REQUEST and not given.flag("use_sliding_window"):
        return None
    if family in ("llama", "phi", *_LATENT) or not given.given.get("sliding_window"):
        return None
    return given.number("sliding_window")
