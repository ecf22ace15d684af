"""The adapter: the part of the model that learns, fresh, saved and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from qlora_api.exchange import Recipe, TrainOrder, hub_repo_of, is_hub
from qlora_trainer.artifacts import copy_file, whole_directory
from qlora_trainer.experts import quantized_experts
from qlora_trainer.model import BaseModel, empty_model, stored_parts
from qlora_trainer.quantization import quantized_modules, stored_pattern
from qlora_trainer.ranks import like
from qlora_trainer.weights import TOKENIZER_FILES

#: Beside the adapter: what it was trained on, for the merge and for whoever finds the adapter later.
TRAINING_NAME = "qlora-training.json"


def with_adapter(model: Any, recipe: Recipe, base: BaseModel) -> Any:
    """The model with a fresh LoRA adapter in fp32; the same seed gives the same adapter."""
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules),
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        init_lora_weights="gaussian" if recipe.init == "gaussian" else True,  # loftq: see starts.py
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    adapted.peft_config["default"].base_model_name_or_path = loadable_name(base.uri)  # PEFT puts the pod's path there
    return adapted


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights, the model's own tensors, by the names that they have in files."""
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False)


def load_adapter(model: Any, values: dict[str, torch.Tensor]) -> None:
    """Set the adapter's weights, each rank its part of those that are shared."""
    with torch.no_grad():
        for name, weight in adapter_weights(model).items():
            weight.copy_(like(weight, values[name]))


def save_adapter(
    model: Any, values: dict[str, torch.Tensor], directory: Path, order: TrainOrder, base: BaseModel
) -> None:
    """Write a PEFT directory of the weights `values`, with the base's own tokenizer and chat template, and what the
    adapter was trained on."""
    with whole_directory(directory) as partial:
        # PEFT picks the adapter out of a whole model's weights by their names there
        renamed = {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
        state = {renamed[weight]: values[name] for name, weight in adapter_weights(model).items()}
        model.save_pretrained(partial, state_dict=state, save_embedding_layers=False)
        for name in TOKENIZER_FILES:
            if (base.directory / name).is_file():
                copy_file(base.directory / name, partial / name)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form that nobody has filled in
        config_path = partial / "adapter_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        config["target_modules"] = sorted(config["target_modules"])  # a set: its order differs from process to process
        config["revision"] = order.model_revision  # with which AutoPeftModel loads the base
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        trained_on = {
            "model": order.model_uri,
            "modelDigest": order.model_digest,
            "dataDigest": order.data_digest,
            "recipe": order.recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
            "quantizedModules": quantized_modules(model.get_base_model()),
            "quantizedExperts": _stored_experts(model.get_base_model(), base),
        }
        (partial / TRAINING_NAME).write_text(json.dumps(trained_on, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def loadable_name(uri: str) -> str:
    """What PEFT and transformers load the base by: its name on the hub; for what is elsewhere its `uri`, for people."""
    if not is_hub(uri):
        return uri
    name, path = hub_repo_of(uri, "model")
    return uri if path else name


def _stored_experts(model: Any, base: BaseModel) -> list[str]:
    """What the files call the experts that are held in 4 bits: those of a layer by one name."""
    experts = quantized_experts(model)
    stored = stored_parts(empty_model(base.config), base.weights) if experts else {}
    return sorted({stored_pattern(name) for parameter in experts for name in stored[parameter]})
