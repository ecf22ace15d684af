"""What is learned, and how: the recipes that a spec allows for a model. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_api.exchange import Inspection, ModelShape, Recipe
from qlora_api.v1alpha1 import JobSpec, Loss, Method
from qlora_operator.placement.choice import SHARED_OPTIMIZER, Recipes
from qlora_operator.sizing.training import adapted_by_default, attention_by_default

DEFAULT_EPOCHS = 3.0
CPU = "cpu"
#: HQQ packs the weights of two groups of 64 into the same bytes (hqq 0.2.8, BitPack.pack_4bit_u8).
HQQ_PAIR = 128
#: bitsandbytes' optimizers, which fail on weights that FSDP2 has sharded.
ONE_GPU_OPTIMIZERS = frozenset({"paged_adamw_8bit", "adamw_8bit"})
#: What experts' matrices were called before transformers 5 made one tensor of them: on a mixture PEFT takes layers of
#: these names, which dense layers and shared experts still have, for the experts (0.19, _MOE_TARGET_MODULE_MAPPING).
EXPERT_MATRICES = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
#: Attention kernels that a CPU can train with: torch has no backward of flex_attention there (measured, torch 2.15).
CPU_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Unfit:
    """No plan is possible. `final` where the spec itself is at fault, and no node could help."""

    reason: str
    message: str
    final: bool = False


def recipes(spec: JobSpec, shape: ModelShape, *, max_length: int, loss: Loss) -> list[Recipe] | Unfit:
    """The recipes that the spec allows for a model, the preferred one first: LoRA where it fits, else QLoRA."""
    known = list(dict.fromkeys(m.name for m in shape.linear))
    targets = list(spec.lora.target_modules or adapted_by_default(shape))
    if shape.experts and (refusal := _adapts_experts(set(targets), shape)):
        return refusal
    if unknown := sorted(set(targets) - set(known)):
        return Unfit(
            "UnknownTargetModules",
            f"spec.lora.targetModules: the model has no linear layer {', '.join(unknown)}; it has {', '.join(known)}",
            final=True,
        )
    if max_length > shape.max_position:
        return Unfit(
            "SequenceTooLong",
            f"spec.dataset.maxLength: {max_length} tokens, the model takes {shape.max_position}",
            final=True,
        )
    if asks_for_hqq(spec) and (reason := _not_in_hqq(shape)):
        return Unfit("NotWithHqq", f"spec.quantization.type: hqq cannot hold {reason}; use nf4", final=True)
    usual = attention_by_default(shape)
    attention = spec.training.attention or usual
    if attention == "sdpa" != usual:
        return Unfit(
            "AttentionCannotWork",
            f"spec.training.attention: sdpa cannot cap scores, as {shape.family} does: "
            f"leave the field out, or give {usual}",
            final=True,
        )
    if spec.hardware.accelerator == CPU and attention not in CPU_ATTENTION:
        return Unfit(
            "AttentionCannotWork",
            f"spec.training.attention: {attention} cannot train on a CPU: leave the field out, or give {usual}",
            final=True,
        )
    # what LoftQ makes good is there with qlora alone
    either: list[Method] = ["qlora"] if spec.lora.init == "loftq" else ["lora", "qlora"]
    methods: list[Method] = [spec.method] if spec.method else either
    on_cpu = spec.hardware.accelerator == CPU
    training = spec.training
    on_host = training.offload == "parameters"  # FSDP2 keeps them there, of one GPU too
    if on_host and training.optimizer in ONE_GPU_OPTIMIZERS:
        return Unfit(
            "OptimizerCannotStep",
            f"spec.training.optimizer: {training.optimizer} cannot step weights under training.offload: parameters: "
            f"leave the optimizer out, or give {SHARED_OPTIMIZER}",
            final=True,
        )
    neither = training.epochs is None and training.max_steps is None
    best = training.best_metric if training.best_metric != "evalLoss" or spec.dataset.holds_out else None
    return [
        Recipe(
            method=method,
            quant_type=spec.quantization.type,
            double_quant=spec.quantization.double_quant and spec.quantization.type != "hqq",
            # CPUs without AMX emulate bfloat16: fp32 is several times faster there and exact.
            compute_dtype=spec.quantization.compute_dtype or ("float32" if on_cpu else "bfloat16"),
            rank=spec.lora.rank,
            alpha=spec.lora.alpha or 2 * spec.lora.rank,
            dropout=spec.lora.dropout,
            target_modules=sorted(targets),
            rslora=spec.lora.rslora,
            dora=spec.lora.dora,
            init=spec.lora.init,
            max_length=max_length,
            packing=spec.dataset.packing,
            loss=loss,
            epochs=DEFAULT_EPOCHS if neither else training.epochs,
            max_steps=training.max_steps,
            learning_rate=training.learning_rate,
            min_learning_rate=training.min_learning_rate or 0.0,
            schedule=training.schedule,
            warmup_fraction=training.warmup_fraction,
            effective_batch_size=training.effective_batch_size,
            optimizer=training.optimizer or (SHARED_OPTIMIZER if on_host else "paged_adamw_8bit"),
            seed=training.seed,
            **_whereabouts(spec),
            attention=attention,
            max_grad_norm=training.max_grad_norm,
            evals_per_epoch=training.evals_per_epoch,
            best_metric=best,
            early_stopping_epochs=(training.early_stopping_epochs or None) if best else None,
        )
        for method in methods
    ]


def _adapts_experts(targets: set[str], shape: ModelShape) -> Unfit | None:
    """Why layers of these names cannot get an adapter in a mixture."""
    linear = {module.name for module in shape.linear}
    taken = EXPERT_MATRICES | ({weights.name for weights in shape.experts} - linear)
    if not (experts := sorted(targets & taken)):
        return None
    return Unfit(
        "ExpertsNotAdapted",
        f"spec.lora.targetModules: {', '.join(experts)} are, in a mixture, the weights of all experts of a layer "
        f"together, which get no adapter: name other linear layers, it has {', '.join(sorted(linear - taken))}",
        final=True,
    )


def asks_for_hqq(spec: JobSpec) -> bool:
    """Whether the base is to be in HQQ's 4 bits, or may come to be: where the method is left open."""
    return spec.quantization.type == "hqq" and spec.method != "lora"


def _not_in_hqq(shape: ModelShape) -> str | None:
    """Which weights of the model HQQ cannot hold."""
    if shape.experts:
        return "routed experts, which are one tensor for all of a layer"
    odd = next((m for m in shape.linear if m.in_features * m.out_features % HQQ_PAIR), None)
    return odd and f"{odd.name} ({odd.in_features} × {odd.out_features} weights), which is no multiple of {HQQ_PAIR}"


def open_recipes(spec: JobSpec, inspection: Inspection, keep: Recipe | None) -> list[Recipe] | Unfit:
    """The recipes for one GPU: that of a training that has begun alone, its tensors where the spec wants them."""
    if keep:
        return [keep.model_copy(update=_whereabouts(spec))]
    return recipes(spec, inspection.shape, max_length=inspection.max_length, loss=inspection.loss)


def by_gpus(found: Sequence[Recipe], spec: JobSpec, keep: Recipe | None) -> Recipes:
    """The recipes by the number of GPUs."""
    optimizer = spec.training.optimizer or (keep.optimizer if keep else None)
    return lambda gpus: found if gpus == 1 else sharded(found, optimizer)


def sharded(found: Sequence[Recipe], optimizer: str | None) -> list[Recipe]:
    """The recipes for GPUs that share a model, with the `optimizer` that is set, if one is; none where it cannot, nor
    of HQQ."""
    if optimizer in ONE_GPU_OPTIMIZERS:
        return []
    update = {"optimizer": optimizer or SHARED_OPTIMIZER}
    return [recipe.model_copy(update=update) for recipe in found if not recipe.half_quadratic]


def _whereabouts(spec: JobSpec) -> dict[str, Any]:
    """What is kept where: it changes nothing of what is learned."""
    training = spec.training
    return {
        "gradient_checkpointing": training.gradient_checkpointing is not False,
        "offload": training.offload or "none",
    }
