"""Peak dense FLOP/s of NVIDIA GPUs by name and dtype, from their datasheets, for model FLOPs utilization.

A peak is the datasheet's figure at boost clock, without structured sparsity. `float32` is the CUDA cores' peak, not
TF32 on the tensor cores; `bfloat16`, `float16` and `float8` are the tensor cores' peaks with FP32 accumulation. What
counts is the dtype of the arithmetic: 4-bit weights are unpacked and multiplied in a wider dtype. If a datasheet gives
only the figure with sparsity, the table has half of it, and the source says so. Devices, form factors and dtypes that
are not listed have no peak, and none is guessed. A MIG instance or a virtual GPU is only part of the card, so it is
never matched. This module does not know the clock or power limit at which the device actually ran.
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
    """A row of the table: a pattern for the whole name without the vendor prefix, and the peaks in TFLOP/s."""

    name: str
    float32: float | None
    bfloat16: float | None
    float16: float | None
    source: str
    # None if the device has no units for float8, or if the source does not give the figure.
    float8: float | None = None


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
    # The A10G's tensor throughput is lower than the A10's, despite the similar name.
    _Device("A10G", 35, 70, 70, "NVIDIA A10G for AWS datasheet"),
    _Device("RTX A6000", 38.7, 154.8, 154.8, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    # GeForce cards run FP32 accumulation at half the rate of FP16 accumulation; the FP16 figure is often quoted.
    _Device("RTX 3090", 35.6, 71, 71, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    # Ada
    _Device("RTX 4090", 82.6, 165.2, 165.2, "NVIDIA Ada GPU Architecture whitepaper", 330.3),
    _Device("L4", 30.3, 121, 121, f"NVIDIA L4 Tensor Core GPU datasheet ({_HALF})", 242.5),
    _Device("L40S", 91.6, 362.05, 362.05, "NVIDIA L40S datasheet", 733),
    # Hopper
    _Device("H100 80GB HBM3", 66.9, 989.4, 989.4, "NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5", 1978.9),
    _Device("H100 PCIE", 51.2, 756, 756, "NVIDIA H100 Tensor Core GPU Architecture whitepaper, PCIe", 1513),
    _Device("H100 NVL", 60, 835.5, 835.5, f"NVIDIA H100 Tensor Core GPU datasheet, NVL ({_HALF})", 1670.5),
    _Device("H200", 67, 989.5, 989.5, f"NVIDIA H200 Tensor Core GPU datasheet, SXM ({_HALF})", 1979),
    _Device("H200 NVL", 60, 835.5, 835.5, f"NVIDIA H200 Tensor Core GPU datasheet, NVL ({_HALF})", 1670.5),
    _Device(
        r"GH200 \d+GB?( HBM3E?)?", 67, 989.5, 989.5, f"NVIDIA GH200 Grace Hopper Superchip datasheet ({_HALF})", 1979
    ),
    # Blackwell
    _Device("B200", 75, 2250, 2250, f"NVIDIA Blackwell datasheet, GPU of the HGX B200 ({_HALF})", 4500),
)
# fmt: on

_MAKER = re.compile(r"^(NVIDIA )?(TESLA |GEFORCE )?")


# Names that engines and checkpoints use for quantizations that unpack the weights to the model's dtype …
_WEIGHTS_ONLY = re.compile(r"awq(_marlin)?|gptq(_marlin)?|w[48]a16(_awq|_gptq)?|bitsandbytes 4-bit .*")
# … and for quantizations that compute in 8-bit floating point, on devices that have units for it.
_FLOAT8 = re.compile(r"fp8|fbgemm_fp8|ptpc_fp8")


def arithmetic_dtype(dtype: str | None, quantization: str | None) -> str | None:
    """Return the dtype of a model's matrix products, given its dtype and its quantization's name; None if unknown."""
    if quantization is None or _WEIGHTS_ONLY.fullmatch(quantization.lower()):
        return dtype
    return "float8" if _FLOAT8.fullmatch(quantization.lower()) else None


def peak_flops_per_s(device_name: str, dtype: str) -> Peak | None:
    """Return a device's peak throughput for arithmetic in a dtype; None if unknown.

    `device_name` is the name that NVML and CUDA report. The dtypes are float32, bfloat16, float16 and float8.
    """
    name = _MAKER.sub("", device_name.strip().upper())
    row = next((device for device in _DEVICES if re.fullmatch(device.name, name)), None)
    if row is None:
        return None
    known = {"float32": row.float32, "bfloat16": row.bfloat16, "float16": row.float16, "float8": row.float8}
    tflops_per_s = known.get(dtype)
    return None if tflops_per_s is None else Peak(tflops_per_s * 1e12, row.source)
