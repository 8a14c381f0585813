"""The table of peak FLOP/s: which device names find which row, and that its figures are consistent."""

from __future__ import annotations

import pytest

from lem.results.peaks import _DEVICES, arithmetic_dtype, peak_flops_per_s

NAMES = {
    "Tesla V100-SXM2-16GB": 125,
    "Tesla V100-SXM2-32GB": 125,
    "Tesla V100-PCIE-32GB": 112,
    "Tesla T4": 65,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362.05,
    "A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.5,
    "NVIDIA GH200 144G HBM3e": 989.5,
    "NVIDIA B200": 2250,
}


@pytest.mark.parametrize(("name", "tflops_per_s"), NAMES.items())
def test_a_name_of_the_driver_finds_its_device(name, tflops_per_s):
    peak = peak_flops_per_s(name, "float16")
    assert peak is not None
    assert peak.flops_per_s == pytest.approx(tflops_per_s * 1e12)
    assert "NVIDIA" in peak.source


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "NVIDIA A100-SXM-64GB",  # made for one customer, with different clocks and more units
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "GRID A100-40C",
        "NVIDIA A10-24Q",
        "NVIDIA L40",
        "Tesla V100S-PCIE-32GB",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA H800",
        "NVIDIA GB200",
        "AMD Instinct MI300X",
    ],
)
def test_a_device_that_is_only_similar_has_no_peak(name):
    assert peak_flops_per_s(name, "float16") is None


def test_a_dtype_that_the_source_does_not_give_has_no_peak():
    assert peak_flops_per_s("Tesla T4", "bfloat16") is None
    assert peak_flops_per_s("NVIDIA H200", "int8") is None


@pytest.mark.parametrize(
    ("dtype", "quantization", "arithmetic"),
    [
        ("bfloat16", None, "bfloat16"),
        ("float16", "awq_marlin", "float16"),
        ("float16", "gptq", "float16"),
        ("bfloat16", "W4A16_AWQ", "bfloat16"),
        ("float16", "bitsandbytes 4-bit nf4", "float16"),
        ("bfloat16", "fp8", "float8"),
        ("bfloat16", "FP8", "float8"),
        # 8-bit integers, or an arithmetic that the name does not tell
        ("float16", "bitsandbytes 8-bit", None),
        ("float16", "bitsandbytes", None),
        ("bfloat16", "compressed-tensors", None),
        ("bfloat16", "NVFP4", None),
        ("bfloat16", "mxfp4", None),
        ("float16", "W4A8_AWQ", None),
        (None, None, None),
    ],
)
def test_the_arithmetic_has_the_dtype_of_the_products_and_not_of_the_weights(dtype, quantization, arithmetic):
    assert arithmetic_dtype(dtype, quantization) == arithmetic


def test_a_device_without_units_for_8_bits_has_no_peak_for_them():
    assert peak_flops_per_s("NVIDIA A100-SXM4-80GB", "float8") is None
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3", "float8").flops_per_s == 1978.9e12


def test_every_row_is_found_by_one_name_and_by_no_other_row():
    rows = {peak_flops_per_s(name, "float16") for name in NAMES}
    assert {row.source for row in _DEVICES} == {peak.source for peak in rows if peak}


@pytest.mark.parametrize("row", _DEVICES, ids=lambda row: row.name)
def test_the_figures_hang_together(row):
    assert row.source
    assert row.float32 is None or 5 < row.float32 < 100
    assert row.float16 >= 2 * (row.float32 or 0) * 0.99
    # On every device with bfloat16, the tensor cores run it at float16's rate.
    assert row.bfloat16 in (None, row.float16)
    assert row.float8 is None or row.float8 == pytest.approx(2 * row.float16, rel=0.02)  # L40S: its figures are rounded
