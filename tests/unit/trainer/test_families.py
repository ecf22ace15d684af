"""Every family that is sized from its config.json alone, beside what transformers builds from the same config."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from transformers import AutoConfig

from qlora_operator.sizing.config import shape_of_config
from qlora_operator.sizing.families import FAMILIES
from qlora_trainer.model import block_linears, empty_model
from tests.unit.families import CONFIGS


def built(config: dict[str, Any]) -> Any:
    return empty_model(AutoConfig.for_model(**config))


def test_every_family_is_compared():
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_alone_gives_every_weight_and_every_linear_layer(name: str) -> None:
    model, shape = built(CONFIGS[name]), shape_of_config(CONFIGS[name])
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    linears = Counter(
        (name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in block_linears(model).items()
    )
    found: Counter[tuple[str, int, int]] = Counter()
    for module in shape.linear:
        found[module.name, module.in_features, module.out_features] += module.count
    assert found == linears
    fused = Counter(
        (name.rpartition(".")[2], *parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3
    )
    assert fused == {(w.name, w.experts, w.out_features, w.in_features): w.count for w in shape.experts}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_as_transformers_writes_it_says_the_same(name: str) -> None:
    """What it leaves out because it is the default, and what it adds, change nothing."""
    written = AutoConfig.for_model(**CONFIGS[name]).to_diff_dict()
    assert shape_of_config(written).linear == shape_of_config(CONFIGS[name]).linear
    assert shape_of_config(written).parameters == shape_of_config(CONFIGS[name]).parameters
