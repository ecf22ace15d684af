"""A model's shape from its directory: config.json and the headers of its safetensors files. Reads no weights."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qlora_api.exchange import ExpertWeights, LinearModule, ModelShape
from qlora_operator.sizing.config import shape_of_config
from qlora_operator.sizing.families import FAMILIES

#: Names of element types in safetensors headers, and torch's for those that a base model may be stored in.
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
#: Far above any real header; the format's own parser refuses more than 100 MB.
_HEADER_MAX_BYTES = 100 << 20
#: What families call the same setting.
_SYNONYMS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
}
_BLOCK = re.compile(r"^(.*?)(?:layers|h|blocks)\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(\w+)\.weight$")


class Stored(NamedTuple):
    """A tensor of a file: its type's name in the header, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_directory(directory: Path) -> ModelShape:
    """The shape of the model in `directory`. Raises OSError, or ValueError naming the file that will not do."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    files = sorted(directory.glob("*.safetensors"))
    tensors: dict[str, Stored] = {}
    for file in files:
        tensors |= _read_header(file)
    try:
        shape = shape_of_tensors(tensors, config) if tensors else shape_of_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return shape.model_copy(update={"bytes_on_disk": sum(file.stat().st_size for file in files)}) if files else shape


def _read_header(path: Path) -> dict[str, Stored]:
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_MAX_BYTES + 1
        header = file.read(length) if length <= _HEADER_MAX_BYTES else b""
    try:
        entries = json.loads(header)
        return {
            name: Stored(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is not a safetensors file, or damaged: copy it anew") from error


def shape_of_tensors(tensors: Mapping[str, Stored], config: object) -> ModelShape:
    """The shape of the model whose files hold `tensors`, by name.

    Of a known family it is what config.json promises, of which the files must hold all; of another it is read from the
    tensors: those of two dimensions in its blocks are linear layers, those of `experts` are experts. Raises ValueError
    when config.json lacks what tensors do not tell, or asks for more weights than there are.
    """
    if not isinstance(config, Mapping):
        raise ValueError("is no object of settings, as config.json has them")
    stored: Counter[str] = Counter()
    for tensor in tensors.values():
        stored[tensor.dtype] += math.prod(tensor.shape)
    dtype = stored.most_common(1)[0][0]
    if dtype not in _TORCH_NAMES:
        raise ValueError(f"the weights are stored as {dtype}: give the model as it was before it was quantised")
    if config.get("model_type") in (*FAMILIES, "gemma3"):
        shape = shape_of_config(config)
        if stored.total() < shape.parameters:
            raise ValueError(f"asks for {shape.parameters} weights, and the files hold {stored.total()}")
    else:
        shape = _unknown(tensors, config)
    size = sum(count * _ITEM_BYTES.get(kind, 2) for kind, count in stored.items())
    return shape.model_copy(update={"dtype": _TORCH_NAMES[dtype], "bytes_on_disk": size})


def _unknown(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> ModelShape:
    """A model of a family that sizing does not know, from its tensors."""
    config = {**config, **(config.get("text_config") or {})}
    hidden, layers, heads = (_setting(config, key) for key in _SYNONYMS)
    blocks = _of_the_decoder(tensors, layers)
    kinds: Counter[tuple[str, int, int]] = Counter()
    experts: defaultdict[tuple[str, str], list[Stored]] = defaultdict(list)
    for name, tensor in blocks.items():
        if expert := _EXPERT.match(name):
            experts[expert[1], expert[3]].append(tensor)
        elif (
            len(tensor.shape) == 2 and name.endswith(".weight") and not name.endswith((".gate.weight", "router.weight"))
        ):
            outer, inner = tensor.shape
            kinds[name.split(".")[-2], inner, outer] += 1
    fused = _joined(experts, hidden) + [
        _fused(name.removesuffix(".weight").rpartition(".")[2], tensor.shape, hidden)
        for name, tensor in blocks.items()
        if len(tensor.shape) == 3 and "experts" in name
    ]
    head = any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in tensors)
    tied = bool(config.get("tie_word_embeddings", not head))
    vocabulary = _setting(config, "vocab_size")
    total = sum(math.prod(tensor.shape) for tensor in tensors.values()) - (vocabulary * hidden if tied and head else 0)
    return ModelShape(
        parameters=total,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate_size=config.get("intermediate_size") or 4 * hidden,
        vocab_size=vocabulary,
        tied_embeddings=tied,
        max_position=config.get("max_position_embeddings") or config.get("n_positions") or 131072,
        dtype="bfloat16",
        bytes_on_disk=0,
        linear=[
            LinearModule(name=name, in_features=inner, out_features=outer, count=count)
            for (name, inner, outer), count in sorted(kinds.items())
        ],
        family=str(config.get("model_type") or ""),
        sliding_window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
        experts=[
            ExpertWeights(name=name, experts=number, in_features=inner, out_features=outer, count=count)
            for (name, number, inner, outer), count in sorted(Counter(fused).items())
        ],
        experts_per_token=(config.get("num_experts_per_tok") or fused[0][1]) if fused else 0,
        experts_quantized=_packable(fused, blocks, hidden),
    )


def _setting(config: Mapping[str, Any], key: str) -> int:
    value = next((config[name] for name in _SYNONYMS.get(key, (key,)) if config.get(name) is not None), None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key}: {value!r} is no whole number from 1")
    return value


def _of_the_decoder(tensors: Mapping[str, Stored], layers: int) -> dict[str, Stored]:
    """The tensors of the blocks that generate text: of several stacks, the heaviest with as many blocks."""
    stacks: defaultdict[str, dict[str, Stored]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if (match := _BLOCK.match(name)) and int(match[2]) < layers:
            stacks[match[1]][name] = tensor
    if not stacks:
        raise ValueError("no tensor of the files belongs to a numbered layer: their names are not known")
    return max(stacks.values(), key=lambda stack: sum(math.prod(tensor.shape) for tensor in stack.values()))


def _joined(experts: Mapping[tuple[str, str], list[Stored]], hidden: int) -> list[tuple[str, int, int, int]]:
    """Experts that are a tensor each, as transformers joins them: gate and up in one, down in another."""
    layers: defaultdict[str, list[tuple[str, list[Stored]]]] = defaultdict(list)
    for (layer, name), found in experts.items():
        layers[layer].append((name, found))
    kinds = []
    for parts in layers.values():
        leaving = [(name, found) for name, found in parts if found[0].shape[1] == hidden != found[0].shape[0]]
        coming = [(name, found) for name, found in parts if (name, found) not in leaving]
        if leaving:
            name = "gate_up_proj" if len(leaving) > 1 else leaving[0][0]
            outer = sum(found[0].shape[0] for _, found in leaving)
            kinds.append((name, len(leaving[0][1]), hidden, outer))
        kinds += [("down_proj", len(found), found[0].shape[1], found[0].shape[0]) for _, found in coming]
    return kinds


def _packable(fused: list[tuple[str, int, int, int]], blocks: Mapping[str, Stored], hidden: int) -> bool:
    """Whether the trainer holds such experts in 4 bits: with a gate, without biases, and no tensor turned round."""
    plain = all(
        len(tensor.shape) == 3 and tensor.shape[1 if "down" in name else 2] == hidden
        for name, tensor in blocks.items()
        if "experts." in name and not _EXPERT.match(name)
    )
    return plain and {name for name, *_ in fused} == {"gate_up_proj", "down_proj"}


def _fused(name: str, shape: tuple[int, ...], hidden: int) -> tuple[str, int, int, int]:
    """Experts that are one tensor already; some families keep it the other way round."""
    number, outer, inner = shape
    if (outer if "down" in name else inner) != hidden:
        outer, inner = inner, outer
    return name, number, inner, outer
