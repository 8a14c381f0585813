"""Rules about GPUs, packages and meters that apply to all backends."""

from __future__ import annotations

from tests.hosts import A100, H100, ONE, T4, TWO, FakeHost, bare, gpus, machine
from tests.spec.examples.example import EIGHT_BIT, FOUR_BIT, ON_CPU, Example, asks, model, spread

EXAMPLES = [
    Example("no_gpu", "gpus", asks("gpus=[0]"), asks("gpus=[0]", host=ONE)),
    Example("no_gpu", "energy", asks("energy=nvml"), asks("energy=nvml", host=ONE)),
    Example("no_gpu_in_use", "energy", asks(ON_CPU, "energy=nvml", host=ONE), asks("energy=nvml", host=ONE)),
    Example(
        "no_gpu_in_use",
        "energy",
        asks("backend=simulated", "energy=zeus", host=ONE),
        asks("backend=simulated", "backend.gpus=1", "energy=zeus", host=ONE),
    ),
    Example("unknown_gpu", "gpus", asks("gpus=[0, 2]", host=TWO), asks("gpus=[0, 1]", host=TWO)),
    Example("unknown_gpu", "gpus", asks("gpus=[-1]", host=TWO), asks("gpus=[1]", host=TWO)),
    Example("unknown_gpu", "gpus", asks("gpus=[GPU-]", host=TWO), asks("gpus=[GPU-1]", host=TWO)),
    Example(
        "unknown_gpu",
        "gpus",
        asks("gpus=[MIG-1]", host=FakeHost(gpus(H100, mig="MIG-0"))),
        asks("gpus=[MIG-0]", host=FakeHost(gpus(H100, mig="MIG-0"))),
    ),
    Example("repeated_gpu", "gpus", asks("gpus=[1, GPU-1]", host=TWO), asks("gpus=[0, GPU-1]", host=TWO)),
    Example("too_few_gpus", "num_processes", asks("num_processes=3", host=TWO), asks("num_processes=2", host=TWO)),
    Example(
        "too_few_gpus",
        "num_processes",
        asks("num_processes=2", "gpus=[1]", host=TWO),
        asks("num_processes=2", "gpus=[1, 0]", host=TWO),
    ),
    Example(
        "too_few_gpus", "num_processes", asks("num_processes=2", host=ONE), asks("num_processes=2", ON_CPU, host=ONE)
    ),
    Example(
        "too_few_gpus",
        "parallelism.degree",
        asks(*spread("pipeline", 3), host=TWO),
        asks(*spread("pipeline", 2), host=TWO),
    ),
    Example(
        "pipeline_needs_gpus",
        "parallelism.strategy",
        asks(ON_CPU, *spread("pipeline", 2), host=TWO),
        asks(*spread("pipeline", 2), host=TWO),
    ),
    Example("missing_package", "adapter", asks("adapter=adapter", host=bare()), asks("adapter=adapter")),
    Example("missing_package", "quantization.quantization", asks(*FOUR_BIT, host=bare()), asks(*FOUR_BIT)),
    Example("missing_package", "energy", asks("energy=zeus", host=bare(H100)), asks("energy=zeus", host=ONE)),
    Example(
        "rapl_unreadable",
        "energy",
        asks("energy=rapl", "energy.powercap_dir=nowhere"),
        asks("energy=rapl", "energy.powercap_dir=powercap"),
    ),
    Example("no_effect_gpus", "gpus", asks("gpus=[0]", ON_CPU, host=ONE), asks("gpus=[0]", host=ONE)),
    Example(
        "bfloat16_emulated",
        "fp_precision",
        asks("fp_precision=bfloat16", host=machine(T4)),
        asks("fp_precision=bfloat16", host=machine(A100)),
    ),
    Example(
        "bfloat16_emulated",
        "fp_precision",
        asks(host=machine(T4), model=model(dtype="bfloat16")),
        asks("fp_precision=float16", host=machine(T4), model=model(dtype="bfloat16")),
    ),
    Example(
        "bfloat16_emulated",
        "quantization.bnb_4bit_compute_dtype",
        asks(*FOUR_BIT, host=machine(T4)),
        asks(*EIGHT_BIT, host=machine(T4)),
    ),
    Example(
        "bfloat16_emulated",
        "fp_precision",
        asks("fp_precision=bfloat16", "num_processes=2", host=machine(A100, T4)),
        asks("fp_precision=bfloat16", host=machine(A100, T4)),
    ),
    Example("unused_gpus", "gpus", asks("gpus=[0, 1]", host=TWO), asks("num_processes=2", "gpus=[0, 1]", host=TWO)),
    Example("no_effect_without_gpu", "cooldown.to_c", asks("cooldown.to_c=40.0"), asks("cooldown.to_c=40.0", host=ONE)),
    Example(
        "no_effect_without_gpu", "energy.power_hz", asks("energy.power_hz=50.0"), asks("energy.power_hz=50.0", host=ONE)
    ),
    Example("more_processes_than_cores", "num_processes", asks("num_processes=1024"), asks()),
    Example("more_processes_than_cores", "parallelism.degree", asks(*spread("data", 1024)), asks(*spread("data", 1))),
    Example("float16_on_cpu", "fp_precision", asks("fp_precision=float16"), asks("fp_precision=float16", host=ONE)),
]
