"""Model FLOPs utilisation: the work that learning takes, beside what the device could do in that time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qlora_api.exchange import ModelShape
from qlora_trainer.sequences import Sequence

#: Dense TFLOPS of the tensor cores in bf16 and fp16 with fp32 accumulation, by torch's name of the device without the
#: vendor's. Vendors print twice as much "with sparsity"; these are the figures without. Matched whole: a MIG slice or a
#: laptop's chip of the same name is another device.
_DENSE_TFLOPS = {
    r"B200": 2250,  # NVIDIA HGX B200 datasheet: 36 PFLOPS sparse for eight
    r"GB200": 2500,  # NVIDIA GB200 NVL72: 360 PFLOPS sparse for 72
    r"H200": 989.5,  # NVIDIA H200 datasheet, SXM: 1,979 sparse
    r"H200 NVL": 835.5,  # the same, NVL: 1,671 sparse
    r"GH200 (120|480)GB": 989.5,  # NVIDIA GH200 datasheet: 1,979 sparse
    r"H[18]00( 80GB| 96GB)? HBM[23]e?": 989.5,  # NVIDIA H100 datasheet, SXM: 1,979 sparse
    r"H100 NVL": 835.5,  # the same, NVL: 1,671 sparse
    r"H100 PCIe": 756,  # the same, first edition, PCIe: 1,513 sparse
    r"A[18]00[- ](SXM4-|PCIE-)?(40|80)GB( PCIe)?": 312,  # NVIDIA A100 datasheet, SXM and PCIe
    r"A40": 149.7,  # NVIDIA A40 datasheet
    r"A30": 165,  # NVIDIA A30 datasheet
    r"A10": 125,  # NVIDIA A10 datasheet
    r"A10G": 70,  # NVIDIA A10G datasheet: the cloud's A10 has fewer tensor operations
    r"L40S": 362.05,  # NVIDIA L40S datasheet
    r"L40": 181.05,  # NVIDIA L40 datasheet
    r"L4": 121,  # NVIDIA L4 datasheet: 242 sparse
    r"RTX 6000 Ada Generation": 364.2,  # NVIDIA Ada GPU architecture whitepaper, appendix
    r"RTX A6000": 154.8,  # NVIDIA Ampere GA102 whitepaper, appendix
    r"RTX 5090": 209.5,  # NVIDIA RTX Blackwell whitepaper, appendix
    r"RTX 4090": 165.2,  # NVIDIA Ada GPU architecture whitepaper, appendix
    r"RTX 4080": 97.5,  # the same
    r"RTX 3090": 71,  # NVIDIA Ampere GA102 whitepaper, appendix
}
#: Tensor cores from before bf16.
_DENSE_TFLOPS_FP16_ONLY = {
    r"T4": 65,  # NVIDIA T4 datasheet
    r"V100-SXM[23]-(16|32)GB.*": 125,  # NVIDIA V100 datasheet, NVLink
    r"V100-PCIE-(16|32)GB": 112,  # the same, PCIe
    r"V100S-PCIE-32GB": 130,  # the same, V100S
}


def peak_flops(device_name: str, compute_dtype: str) -> float | None:
    """FLOPs per second that the device's vendor promises in `compute_dtype`; None where the tables do not say."""
    name = re.sub(r"^((NVIDIA|Tesla|GeForce) )+", "", device_name)
    tables = {
        "bfloat16": _DENSE_TFLOPS,
        "float16": _DENSE_TFLOPS | _DENSE_TFLOPS_FP16_ONLY,
    }
    for pattern, teraflops in tables.get(compute_dtype, {}).items():
        if re.fullmatch(pattern, name):
            return teraflops * 1e12
    return None


@dataclass(frozen=True)
class Work:
    """What an optimizer step takes by the model's arithmetic, however it is computed."""

    shape: ModelShape
    adapter_parameters: int
    peak: float | None = None  # FLOPs per second; None: not known, and neither is the utilisation

    def flops(self, sequences: list[Sequence]) -> float:
        """FLOPs of a step over `sequences`: those that the result needs, none for recomputed activations.

        The count of PaLM (Chowdhery et al. 2022, appendix B) with what is frozen left out: per token, 2 FLOPs a weight
        forward and 2 backward to the activations; the 2 for a weight's own gradient (Kaplan et al. 2020, table 1)
        only for the adapter. That is 2/3 of a full fine-tune, as Schulman et al. 2025 ("LoRA Without Regret") count it.
        Attention takes 12·heads·width·length per token and layer, not halved for causality, as in PaLM; `length` is the
        example's own, for packed examples do not see one another. The output head counts where there is loss:
        nowhere else is it needed.
        """
        shape = self.shape
        linear = sum(module.in_features * module.out_features * module.count for module in shape.linear)
        # of routed experts, those that work on a token
        linear += sum(weights.weights // weights.experts for weights in shape.experts) * shape.experts_per_token
        tokens = sum(len(sequence.ids) for sequence in sequences)
        loss_tokens = sum(sequence.loss_tokens for sequence in sequences)
        pairs = sum(length * length for sequence in sequences for length in sequence.lengths)
        return (
            tokens * (4.0 * linear + 6.0 * self.adapter_parameters)
            + loss_tokens * 4.0 * shape.vocab_size * shape.hidden_size
            + pairs * 12.0 * shape.layers * shape.heads * shape.head_dim
        )

    def mfu(self, flops: float, seconds: float) -> float | None:
        """Share of the device's peak that `flops` in `seconds` are."""
        return flops / seconds / self.peak if self.peak and seconds else None
