"""A model's shape from its config.json alone, for the families whose layers follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from qlora_api.exchange import LinearModule, ModelShape

#: Families with q, k, v, o and gate, up, down projections, and whether q, k and v have biases.
_LLAMA_LIKE = {"llama": False, "mistral": False, "qwen2": True}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


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


def shape_of_config(config: object) -> ModelShape:
    """The shape of a dense decoder whose `config` is that of transformers.

    Raises ValueError, naming the key, when it is of another family or lacks what the shape follows from.
    """
    if not isinstance(config, Mapping):
        raise ValueError("is no object of settings, as config.json has them")
    family = config.get("model_type")
    if family not in _LLAMA_LIKE:
        raise ValueError(f"model_type: {family!r} is none of {', '.join(_LLAMA_LIKE)}: give one of these")
    optional = [key for key in ("head_dim", "num_key_value_heads") if config.get(key) is not None]
    if bad := [key for key in (*_NEEDED, *optional) if not isinstance(config.get(key), int) or config[key] < 1]:
        raise ValueError(f"{bad[0]}: {config.get(bad[0])!r} is no whole number from 1")
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    inner, vocabulary = config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    tied = bool(config.get("tie_word_embeddings", False))
    q, kv = heads * head_dim, kv_heads * head_dim
    sizes = {
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (q, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    linear = [
        LinearModule(name=name, in_features=inputs, out_features=outputs, count=layers)
        for name, (inputs, outputs) in sizes.items()
    ]
    biases = q + 2 * kv if config.get("attention_bias", _LLAMA_LIKE[family]) else 0
    parameters = (
        layers * (sum(inputs * outputs for inputs, outputs in sizes.values()) + 2 * hidden + biases)
        + vocabulary * hidden * (1 if tied else 2)
        + hidden
    )
    dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
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
        max_position=config.get("max_position_embeddings") or 131072,
        dtype=dtype,
        bytes_on_disk=parameters * (4 if dtype == "float32" else 2),
        linear=linear,
    )
