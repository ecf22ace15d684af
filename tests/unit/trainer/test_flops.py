"""Model FLOPs utilisation: the count is that of the arithmetic, and a device that is not known gives no figure."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qlora_api.peaks import peak_flops
from qlora_trainer.adapter import with_adapter
from qlora_trainer.evaluation import summed_loss
from qlora_trainer.flops import Work
from qlora_trainer.model import open_base
from qlora_trainer.quantization import load_for_training
from qlora_trainer.sequences import NO_LOSS, Sequence, collate

from .conftest import Place, recipe_of

CPU = torch.device("cpu")


def rows(length: int, learned: int) -> list[Sequence]:
    """Two sequences of `length` tokens, the last `learned` of which carry loss."""
    ids = [3 + n % 300 for n in range(length)]
    return [Sequence(ids, [NO_LOSS] * (length - learned) + ids[length - learned :], [length])] * 2


@pytest.mark.parametrize(("length", "learned"), [(16, 8), (128, 8), (128, 120)])
def test_flops_are_those_that_torch_counts(place: Place, length: int, learned: int) -> None:
    """Eager attention, no recomputation: what torch multiplies is what the model takes.

    Torch counts a little less: nothing asks for the gradient of the first layer's inputs.
    """
    base = open_base(place.claims / "base" / "model", "pvc://base/model")
    recipe = recipe_of(method="lora", attention="eager")
    model = with_adapter(load_for_training(base, recipe, CPU), recipe, base)
    adapter = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    sequences = rows(length, learned)
    with FlopCounterMode(display=False) as counter:
        summed_loss(model, collate(sequences, pad=0), CPU).backward()
    predicted = Work(base.shape, adapter).flops(sequences)
    first = {"q_proj", "k_proj", "v_proj"}
    unasked = sum(2 * m.in_features * m.out_features for m in base.shape.linear if m.name in first) * 2 * length
    rank_sized = 2 * recipe.rank * base.shape.hidden_size * 3 * 2 * length
    assert counter.get_total_flops() == pytest.approx(predicted - unasked - rank_sized, rel=1e-3)


def test_packed_examples_do_not_see_one_another(place: Place) -> None:
    shape = open_base(place.claims / "base" / "model", "pvc://base/model").shape
    ids = list(range(64))
    apart = [Sequence(ids[:32], ids[:32], [32]), Sequence(ids[32:], ids[32:], [32])]
    packed, whole = [Sequence(ids, ids, [32, 32])], [Sequence(ids, ids, [64])]
    work = Work(shape, adapter_parameters=0)
    assert work.flops(packed) == work.flops(apart)
    more = 12 * shape.layers * shape.heads * shape.head_dim * (64**2 - 2 * 32**2) + 4 * shape.vocab_size * 64
    assert work.flops(whole) - work.flops(packed) == more  # one more token carries loss: there is no second beginning


def test_utilisation_is_a_share_of_the_peak(place: Place) -> None:
    shape = open_base(place.claims / "base" / "model", "pvc://base/model").shape
    assert Work(shape, 0, peak=312e12).mfu(flops=312e12, seconds=2) == 0.5
    assert Work(shape, 0).mfu(flops=312e12, seconds=2) is None
    assert Work(shape, 0, peak=312e12).mfu(flops=0, seconds=0) is None


@pytest.mark.parametrize(
    ("device", "dtype", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA GH200 480GB", "bfloat16", 989.5),
        ("NVIDIA B200", "float16", 2250),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40", "bfloat16", 181.05),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 3090", "float16", 71),
        ("Tesla T4", "float16", 65),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-PCIE-16GB", "float16", 112),
    ],
)
def test_devices_are_known_by_torchs_names(device: str, dtype: str, teraflops: float) -> None:
    assert peak_flops(device, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", "bfloat16"),
        ("Tesla T4", "bfloat16"),  # it has no bf16
        ("NVIDIA A100-SXM4-80GB", "float32"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA H300", "bfloat16"),
    ],
)
def test_a_device_that_is_not_in_the_table_gets_no_figure(device: str, dtype: str) -> None:
    assert peak_flops(device, dtype) is None
