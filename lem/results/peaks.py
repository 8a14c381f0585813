"""Peak dense FLOP/s of NVIDIA GPUs by name and dtype, from their datasheets: for model FLOPs utilisation.

A peak is the datasheet's figure at boost clock, without structured sparsity. `float32` is the CUDA cores' peak,
not TF32 on the tensor cores; `bfloat16` and `float16` are the tensor cores' peaks with FP32 accumulation. If a
datasheet gives only the figure with sparsity, the table has half of it and the source says so. A device, a form
factor or a dtype that is not listed has no peak; none is guessed, and a MIG instance or a virtual GPU, which has
only part of the card, is never matched. Knows neither the clock nor the power limit that the device really ran at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Peak:
    """A device's peak arithmetic throughput in FLOP/s, and the document that states it."""

    flops_per_s: float
    source: str


class _Device(NamedTuple):
    """A row of the table: a pattern for the whole name without the maker's prefix, and the peaks in TFLOP/s."""

    name: str
    float32: float | None
    bfloat16: float | None
    float16: float | None
    source: str


_HALF = "half of the figure with sparsity"

# fmt: off
_DEVICES = (
    # Volta and Turing: no bfloat16 on the tensor cores.
    _Device("V100-SXM2-(16|32)GB", 15.7, None, 125, "NVIDIA V100 Tensor Core GPU datasheet"),
    _Device("V100-PCIE-(16|32)GB", 14, None, 112, "NVIDIA V100 Tensor Core GPU datasheet"),
    _Device("T4", 8.1, None, 65, "NVIDIA T4 datasheet"),
    # Ampere
    _Device("A100-(SXM4?|PCIE)-(40|80)GB|A100 80GB PCIE", 19.5, 312, 312, "NVIDIA A100 Tensor Core GPU datasheet"),
    _Device("A10", 31.2, 125, 125, "NVIDIA A10 datasheet"),
    # Lower tensor throughput than the A10, in spite of the name.
    _Device("A10G", 35, 70, 70, "NVIDIA A10G for AWS datasheet"),
    _Device("RTX A6000", 38.7, 154.8, 154.8, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    # GeForce: FP32 accumulation at half the rate of FP16 accumulation, which is the figure often quoted.
    _Device("RTX 3090", 35.6, 71, 71, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    # Ada
    _Device("RTX 4090", 82.6, 165.2, 165.2, "NVIDIA Ada GPU Architecture whitepaper"),
    _Device("L4", 30.3, 121, 121, f"NVIDIA L4 Tensor Core GPU datasheet ({_HALF})"),
    _Device("L40S", 91.6, 362.05, 362.05, "NVIDIA L40S datasheet"),
    # Hopper
    _Device("H100 80GB HBM3", 66.9, 989.4, 989.4, "NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5"),
    _Device("H100 PCIE", 51.2, 756, 756, "NVIDIA H100 Tensor Core GPU Architecture whitepaper, PCIe"),
    _Device("H100 NVL", 60, 835.5, 835.5, f"NVIDIA H100 Tensor Core GPU datasheet, NVL ({_HALF})"),
    _Device("H200", 67, 989.5, 989.5, f"NVIDIA H200 Tensor Core GPU datasheet, SXM ({_HALF})"),
    _Device("H200 NVL", 60, 835.5, 835.5, f"NVIDIA H200 Tensor Core GPU datasheet, NVL ({_HALF})"),
    _Device(r"GH200 \d+GB?( HBM3E?)?", 67, 989.5, 989.5, f"NVIDIA GH200 Grace Hopper Superchip datasheet ({_HALF})"),
    # Blackwell
    _Device("B200", 75, 2250, 2250, f"NVIDIA Blackwell datasheet, GPU of the HGX B200 ({_HALF})"),
)
# fmt: on

_MAKER = re.compile(r"^(NVIDIA )?(TESLA |GEFORCE )?")


def peak_flops_per_s(device_name: str, dtype: str) -> Peak | None:
    """Return the peak for float32, bfloat16 or float16 of a device as NVML and CUDA name it; None if unknown."""
    name = _MAKER.sub("", device_name.strip().upper())
    row = next((device for device in _DEVICES if re.fullmatch(device.name, name)), None)
    if row is None:
        return None
    tflops_per_s = {"float32": row.float32, "bfloat16": row.bfloat16, "float16": row.float16}.get(dtype)
    return None if tflops_per_s is None else Peak(tflops_per_s * 1e12, row.source)
