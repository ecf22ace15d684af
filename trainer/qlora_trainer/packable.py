"""What can be held in 4 bits: whole blocks of weights, and routed experts of the usual make.

Known without bitsandbytes, whose import takes longer than a look at a model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter

#: Blocks of 64 weights share a scale: bitsandbytes' and transformers' fixed choice (QLoRA, section 3).
BLOCK_SIZE = 64
#: Matrices of one expert in the tensors that hold all of a layer's, by their names: each is quantised by itself.
EXPERT_MATRICES = {"gate_up_proj": 2, "down_proj": 1}


def packable(module: nn.Module) -> bool:
    """Whether `module` is a layer's routed experts, of the kind that can be held in 4 bits.

    Of transformers' experts those with a gate above what it gates, one output a row, and nothing added to products.
    """
    if any(getattr(module, name, None) is None for name in (*EXPERT_MATRICES, "is_transposed", "num_experts")):
        return False
    experts: Any = module
    return (
        experts.has_gate
        and experts.is_concatenated
        and not (experts.is_transposed or experts.has_bias or experts.has_post_expert_norm)
    )


def packable_experts(model: Any) -> bool:
    """Whether all routed experts of `model` can be held in 4 bits, as its modules are and as its files hold them.

    The files have a matrix for each expert, or one tensor as the model has it; other layouts would have to be turned
    before they are quantised, and the merge could not do the same with what it reads.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # the merge does without transformers
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    of_experts = {
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, nn.Conv1d)
    }
    whole = all(
        name in EXPERT_MATRICES
        and packable(module)
        and math.prod(getattr(module, name).shape[1:]) // EXPERT_MATRICES[name] % BLOCK_SIZE == 0
        for module, name in of_experts
    )
    plain = all(
        isinstance(operation, MergeModulelist | Concatenate)
        for rule in get_model_conversion_mapping(model)
        if isinstance(rule, WeightConverter) and joins_experts(rule)
        for operation in rule.operations
    )
    return bool(of_experts) and whole and plain


def joins_experts(rule: WeightConverter) -> bool:
    """Whether it is transformers' rule for how experts in the files become one tensor."""
    return any(pattern.endswith(f".experts.{name}") for pattern in rule.target_patterns for name in EXPERT_MATRICES)
