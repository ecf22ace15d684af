"""What GPUs can compute at most: for how long a plan will take, and how well a training uses them."""

from __future__ import annotations

import re

#: Dense TFLOPS of the tensor cores in bf16 and fp16 with fp32 accumulation, by the device's name without the
#: vendor's and with spaces for hyphens. Vendors print twice as much "with sparsity"; these are the figures without.
#: Matched whole: a MIG slice or a laptop's chip of the same name is another device.
_DENSE_TFLOPS = {
    r"B200": 2250,  # NVIDIA HGX B200 datasheet: 36 PFLOPS sparse for eight
    r"GB200": 2500,  # NVIDIA GB200 NVL72: 360 PFLOPS sparse for 72
    r"H200": 989.5,  # NVIDIA H200 datasheet, SXM: 1,979 sparse
    r"H200 NVL": 835.5,  # the same, NVL: 1,671 sparse
    r"GH200 (120|480)GB": 989.5,  # NVIDIA GH200 datasheet: 1,979 sparse
    r"H[18]00( 80GB| 96GB)? HBM[23]e?": 989.5,  # NVIDIA H100 datasheet, SXM: 1,979 sparse
    r"H100 NVL": 835.5,  # the same, NVL: 1,671 sparse
    r"H100 PCIe": 756,  # the same, first edition, PCIe: 1,513 sparse
    r"A[18]00 (SXM4 |PCIE )?(40|80)GB( PCIe)?": 312,  # NVIDIA A100 datasheet, SXM and PCIe
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
    r"V100 SXM[23] (16|32)GB.*": 125,  # NVIDIA V100 datasheet, NVLink
    r"V100 PCIE (16|32)GB": 112,  # the same, PCIe
    r"V100S PCIE 32GB": 130,  # the same, V100S
}


def peak_flops(device_name: str, compute_dtype: str) -> float | None:
    """FLOPs per second that the device's vendor promises in `compute_dtype`; None where the tables do not say.

    `device_name` as torch or the label nvidia.com/gpu.product has it.
    """
    name = re.sub(r"^((NVIDIA|Tesla|GeForce) )+", "", device_name.replace("-", " "))
    tables = {
        "bfloat16": _DENSE_TFLOPS,
        "float16": _DENSE_TFLOPS | _DENSE_TFLOPS_FP16_ONLY,
    }
    for pattern, teraflops in tables.get(compute_dtype, {}).items():
        if re.fullmatch(pattern, name):
            return teraflops * 1e12
    return None
