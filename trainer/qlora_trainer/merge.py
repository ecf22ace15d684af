"""The merge stage: base + ΔW as an ordinary model directory, written tensor by tensor, one shard in memory.

What was trained and evaluated is the *quantised* base with the adapter. So each weight that was quantised is
quantised and dequantised again with the same settings before ΔW = scale · B · A is added in fp32 and the sum is cast
to the stored type once. Added to the original weights instead, the adapter corrects rounding errors that are not
there (logits differ by up to 1.13 instead of 0.06 on a 2.6M model; measured against 4-bit base + adapter).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_api.exchange import MergeOrder, MergeResult, Recipe
from qlora_trainer.artifacts import directory_bytes, directory_digest, whole_directory
from qlora_trainer.environment import Pod, log
from qlora_trainer.failures import BadInput
from qlora_trainer.inputs import with_inputs
from qlora_trainer.packable import EXPERT_MATRICES
from qlora_trainer.quantization import dequantised, stored_pattern
from qlora_trainer.results import record, recorded
from qlora_trainer.weights import INDEX_NAME, WEIGHT_SUFFIXES, Weights, read_weights

#: What PEFT adds to a layer's name for a DoRA's magnitudes.
_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter by the names of the base's weights, and which of those were quantised under it."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float
    quantized: frozenset[str]
    #: Of a DoRA: the length of each row of base + ΔW.
    magnitudes: dict[str, torch.Tensor]
    #: Routed experts that were, with `*` for their numbers.
    experts: frozenset[str]

    def delta(self, weight: str) -> torch.Tensor | None:
        """ΔW of the base's `weight`, in fp32."""
        if weight not in self.factors:
            return None
        lora_a, lora_b = self.factors[weight]
        return self.scale * (lora_b.float() @ lora_a.float())


def merge(order: MergeOrder, pod: Pod) -> MergeResult:
    """Write `<work_dir>/merged`. Raises BadInput when base or adapter are not those that were trained."""
    work_dir = Path(order.work_dir)
    target = work_dir / "merged"
    done = recorded(order, MergeResult)
    if done and target.is_dir() and directory_digest(target) == done.digest:
        log.info("an earlier attempt has finished this merge")
        return done

    adapter_dir = work_dir / "adapter"
    if not adapter_dir.is_dir() or directory_digest(adapter_dir) != order.adapter_digest:
        raise BadInput(
            f"the adapter in {adapter_dir} is not the one that was trained: it was changed or removed; train anew"
        )
    adapter = read_adapter(adapter_dir, order.model_digest)
    source = with_inputs(order, pod).path_of(order.model_uri, "model.uri")
    weights = read_weights(source, order.model_uri)
    experts = {name for name in weights.tensors if stored_pattern(name) in adapter.experts}
    missing = sorted((set(adapter.factors) | adapter.quantized) - set(weights.tensors))
    missing += sorted(adapter.experts - {stored_pattern(name) for name in experts})
    if missing:
        raise BadInput(f"model.uri: {order.model_uri} has no {missing[0]}, which the adapter was trained on")
    round_trip = order.recipe.method == "qlora" and order.merge_base == "dequantized"
    log.info(
        "merging %d layers into %s",
        len(adapter.factors),
        "the dequantised base" if round_trip else "the base as stored",
    )

    parity = 0.0
    with whole_directory(target) as partial:
        for number, file in enumerate(weights.files, start=1):
            merged: dict[str, torch.Tensor] = {}
            for name, weight in _tensors(source / file):
                quantised = order.recipe if round_trip and name in adapter.quantized | experts else None
                if quantised and weight.dim() == 3:
                    merged[name], error = merged_experts(name, weight, quantised)
                else:
                    merged[name], error = merged_weight(
                        weight, adapter.delta(name), quantised, adapter.magnitudes.get(name)
                    )
                parity = max(parity, error)
            save_file(merged, partial / file, metadata={"format": "pt"})
            log.info("shard %d of %d written, %d tensors", number, len(weights.files), len(merged))
        copy_beside(source, partial, weights)
    result = MergeResult(
        digest=directory_digest(target), bytes=directory_bytes(target), shards=len(weights.files), parity=parity
    )
    record(order, result)
    return result


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  a safetensors handle is no mapping
            yield name, file.get_tensor(name)


def merged_weight(
    weight: torch.Tensor,
    delta: torch.Tensor | None,
    quantised: Recipe | None,
    magnitudes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """`weight` (as dequantised, if it was quantised) + `delta` in its own type, and how far the cast moved it.

    Each row is given its length in `magnitudes`, if there are any (DoRA, Liu et al. 2024, equation 5).
    The second value is the largest difference from the sum in fp32, relative to the sum's largest value.
    """
    if delta is None and quantised is None:
        return weight, 0.0
    exact = dequantised(weight, quantised) if quantised else weight.float()
    if delta is not None:
        exact += delta
    if magnitudes is not None:
        exact *= (magnitudes.float() / torch.linalg.norm(exact, dim=1))[:, None]
    written = exact.to(weight.dtype)
    largest = float(exact.abs().max())
    return written, float((written.float() - exact).abs().max()) / largest if largest else 0.0


def merged_experts(name: str, weight: torch.Tensor, quantised: Recipe) -> tuple[torch.Tensor, float]:
    """The same of all experts of a layer that are one tensor: matrix by matrix, as the training quantised them."""
    matrices = EXPERT_MATRICES[name.rpartition(".")[2]]
    done, parity = torch.empty_like(weight), 0.0
    for expert, target in zip(weight, done, strict=True):
        for matrix, place in zip(expert.chunk(matrices), target.chunk(matrices), strict=True):
            written, error = merged_weight(matrix, None, quantised)
            place.copy_(written)
            parity = max(parity, error)
    return done, parity


def read_adapter(directory: Path, model_digest: str) -> Adapter:
    """The adapter that the train stage wrote. Raises BadInput when it was trained on another model.

    Raises ValueError for kinds of adapters that this merge would get wrong.
    """
    config: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    trained_on: dict[str, Any] = json.loads((directory / "qlora-training.json").read_text(encoding="utf-8"))
    if trained_on["modelDigest"] != model_digest:
        raise BadInput("the adapter was trained on another base model than the order names: train anew")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "fan_in_fan_out"):
        if config.get(key):
            raise ValueError(f"adapter_config.json: {key} is set, which this merge does not know")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)

    tensors = load_file(directory / "adapter_model.safetensors")
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    magnitudes: dict[str, torch.Tensor] = {}
    for name in tensors:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name.endswith(".lora_A.weight"):
            factors[f"{module}.weight"] = (tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")])
        elif name.endswith(_MAGNITUDE):
            magnitudes[f"{name.removeprefix('base_model.model.').removesuffix(_MAGNITUDE)}.weight"] = tensors[name]
        elif not name.endswith(".lora_B.weight"):
            raise ValueError(f"adapter_model.safetensors: {name} is no LoRA factor")
    quantized = frozenset(f"{module}.weight" for module in trained_on["quantizedModules"])
    experts = frozenset(trained_on.get("quantizedExperts", ()))
    return Adapter(factors, scale, quantized, magnitudes, experts)


def copy_beside(source: Path, target: Path, weights: Weights) -> None:
    """Everything of the model but its weights: configuration, tokenizer, index. Code that came along stays behind."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix not in (*WEIGHT_SUFFIXES, ".py"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if len(weights.files) > 1 and not (target / INDEX_NAME).exists():
        raise RuntimeError(f"{INDEX_NAME} was lost")
