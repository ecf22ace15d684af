"""The base model: whether its directory can be trained on, and what shape it has. Reads no weights."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qlora_api.exchange import ExpertWeights, LinearModule, ModelShape
from qlora_trainer.failures import BadInput
from qlora_trainer.packable import packable_experts
from qlora_trainer.weights import TensorEntry, Weights, model_digest, read_weights


@dataclass(frozen=True)
class BaseModel:
    """A model directory that was looked at and found whole; no weight is read."""

    directory: Path
    uri: str
    config: Any
    tokenizer: Any
    weights: Weights
    digest: str
    shape: ModelShape
    architecture: str


def open_base(directory: Path, uri: str) -> BaseModel:
    """Check the model in `directory` as far as that goes without reading weights.

    Raises BadInput, saying what is wrong with it and what would cure it.
    """
    config = _open_config(directory, uri)
    weights = read_weights(directory, uri)
    tokenizer = _open_tokenizer(directory, uri)
    model = empty_model(config)
    _compare(model, weights, uri)
    if len(tokenizer) > config.vocab_size:
        raise BadInput(
            f"model.uri: the tokenizer in {uri} has {len(tokenizer)} tokens and the model {config.vocab_size} "
            "embeddings: they do not belong together"
        )
    return BaseModel(
        directory=directory,
        uri=uri,
        config=config,
        tokenizer=tokenizer,
        weights=weights,
        digest=model_digest(directory, weights),
        shape=shape_of(model, weights, tokenizer),
        architecture=type(model).__name__,
    )


def _open_config(directory: Path, uri: str) -> Any:
    if not directory.is_dir():
        raise BadInput(f"model.uri: {uri} is no directory{_neighbours(directory)}")
    path = directory / "config.json"
    if not path.is_file():
        raise BadInput(f"model.uri: {uri} has no config.json: it must be a model as save_pretrained writes it")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model_type = raw.get("model_type")
    except (ValueError, AttributeError) as error:
        raise BadInput(f"model.uri: {uri}/config.json is not a JSON object ({error})") from error
    if "quantization_config" in raw:
        kind = raw["quantization_config"].get("quant_method", "unknown")
        raise BadInput(
            f"model.uri: {uri} is already quantised ({kind}): give the model as it was before; "
            "the training quantises it as the plan says"
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        own_code = " (its code comes along with it, and is not run)" if "auto_map" in raw else ""
        raise BadInput(
            f"model.uri: {uri} is of type {model_type!r}, which this image's transformers does not know{own_code}: "
            "use a model of a known architecture, or a newer image"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BadInput(
            f"model.uri: {uri} is a {model_type!r} model, not a causal language model: "
            "use a decoder-only one, such as Llama, Qwen or Mistral"
        )
    if config.get_text_config() is not config:
        raise BadInput(
            f"model.uri: {uri} is a {model_type!r} model, which sees or hears beside its text: "
            f"save its text model ({config.get_text_config().model_type}) by itself and give that"
        )
    return config


def _neighbours(path: Path) -> str:
    """What lies where `path` should: the quickest way to a typing error."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    found = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))[:8]
    return f"; beside it: {', '.join(found)}" if found else "; there is nothing beside it"


def _open_tokenizer(directory: Path, uri: str) -> Any:
    vocabularies = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((directory / name).is_file() for name in vocabularies):
        raise BadInput(f"model.uri: {uri} has no tokenizer (tokenizer.json or tokenizer.model)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise BadInput(f"model.uri: the tokenizer in {uri} cannot be read: {error}") from error
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model.uri: the tokenizer in {uri} has no end-of-sequence token: set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def empty_model(config: Any) -> Any:
    """The model's modules with shapes and no weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model


def _compare(model: Any, weights: Weights, uri: str) -> None:
    """The files must hold every weight of the model: in its shape, or in the parts that transformers joins to it."""
    files = _files_of(model, weights)
    for name, parameter in model.named_parameters():  # tied ones once, under one of their names
        entries = next((files[twin] for twin in (name, *_twins(model, name)) if twin in files), [])
        if not entries:
            raise BadInput(f"model.uri: {uri} has no weights for {name}, which its config.json asks for")
        whole = len(entries) == 1
        found = list(entries[0].shape) if whole else f"{sum(entry.elements for entry in entries)} values"
        wanted = list(parameter.shape) if whole else f"{parameter.numel()} values"
        if found != wanted:
            raise BadInput(
                f"model.uri: {uri}: {name} is {found} in {entries[0].file} and {wanted} by config.json: "
                "they do not belong together"
            )


def _files_of(model: Any, weights: Weights) -> dict[str, list[TensorEntry]]:
    """What the files hold of each parameter, by transformers' own rules for names that have changed since.

    The experts of a mixture are a tensor each in the files and one tensor for all in the model.
    """
    return {name: [weights.tensors[stored] for stored in parts] for name, parts in stored_parts(model, weights).items()}


def stored_parts(model: Any, weights: Weights) -> dict[str, list[str]]:
    """By what the model calls a parameter, the names of what the files hold of it."""
    renamings, joined = _rules_of(model)
    names: dict[str, list[str]] = {}
    for stored in weights.tensors:
        name, _ = rename_source_key(stored, renamings, joined)
        names.setdefault(name, []).append(stored)
    return names


def _rules_of(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """transformers' rules for names that have changed since, and for weights that are put together from several."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


@dataclass(frozen=True)
class Stored:
    """How the files hold one weight: as it is, or in pieces that a rule of transformers' puts together.

    `pieces` has the tensors' names by what of the rule's source they match, in the order in which they are joined.
    """

    pieces: dict[str, list[str]]
    rule: WeightConverter | None = None

    @property
    def name(self) -> str:
        """Of the first tensor; the only one, where there is no rule."""
        return next(iter(self.pieces.values()))[0]


def stored_as(model: Any, weights: Weights) -> dict[str, Stored]:
    """By the name of each of the model's weights, and of buffers that are stored, how the files hold it.

    Raises BadInput when several weights are one tensor in the files.
    """
    renamings, joined = _rules_of(model)
    by_source = {source: rule for rule in joined for source in rule.source_patterns}
    found: dict[str, Stored] = {}
    for stored in sorted(weights.tensors, key=dot_natural_key):
        name, source = rename_source_key(stored, renamings, joined)
        rule = by_source[source] if source is not None else None
        if rule and len(rule.target_patterns) > 1:
            raise BadInput(
                f"model.uri: the model's {name} and other weights are one tensor of its files, and such a model "
                "cannot be shared between GPUs by this version: set hardware.gpus: 1"
            )
        found.setdefault(name, Stored({}, rule)).pieces.setdefault(source or "", []).append(stored)
    for name, _ in model.named_parameters():
        if name not in found and (twin := next((twin for twin in _twins(model, name) if twin in found), None)):
            found[name] = found[twin]
    return found


def _twins(model: Any, name: str) -> list[str]:
    """Other names of the same parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [other for other, parameter in parameters.items() if parameter is parameters[name] and other != name]


def block_linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers by name, the output head not among them: what is quantised and what LoRA attaches to."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def shape_of(model: Any, weights: Weights, tokenizer: Any) -> ModelShape:
    """What sizing needs to know. Raises BadInput when the model has no linear layers or no longest sequence."""
    config = model.config
    kinds = Counter(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in block_linears(model).items()
    )
    if not kinds:
        raise BadInput(f"model.uri: {type(model).__name__} has no linear layers that LoRA could attach to")
    heads = config.num_attention_heads
    max_position = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if max_position > 1 << 30:  # transformers' word for "not known"
        raise BadInput("model.uri: neither config.json nor the tokenizer says how long a sequence may be")
    # where keys and values come from latents, head_dim is the turned part of a head only
    head_dim = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    experts = expert_weights(model)
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim or config.hidden_size // heads,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocab_size=config.vocab_size,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        max_position=max_position,
        dtype=weights.dtype,
        bytes_on_disk=weights.bytes_on_disk,
        linear=[
            LinearModule(name=name, in_features=inner, out_features=outer, count=count)
            for (name, inner, outer), count in sorted(kinds.items())
        ],
        family=config.model_type,
        sliding_window=_window(config),
        experts=experts,
        experts_per_token=_experts_per_token(config, experts),
        experts_quantized=bool(experts) and packable_experts(model),
    )


def expert_weights(model: Any) -> list[ExpertWeights]:
    """The parameters that hold all experts of a layer: 4-bit loading and LoRA know linear layers only."""
    kinds: Counter[tuple[str, int, int, int]] = Counter()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
                number, outer, inner = parameter.shape
                if getattr(module, "is_transposed", False):
                    outer, inner = inner, outer
                kinds[name, number, inner, outer] += 1
    return [
        ExpertWeights(name=name, experts=number, in_features=inner, out_features=outer, count=count)
        for (name, number, inner, outer), count in sorted(kinds.items())
    ]


def _experts_per_token(config: Any, experts: list[ExpertWeights]) -> int:
    """As config.json says; all, where it does not."""
    known = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
    said = next((getattr(config, key) for key in known if getattr(config, key, None)), None)
    return (said or experts[0].experts) if experts else 0


def _window(config: Any) -> int | None:
    """Tokens that layers look back, where some do not look back to the start."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in kind for kind in kinds):
        return None
    return getattr(config, "sliding_window", None)
