"""Rules about the simulated backend."""

from __future__ import annotations

from tests.hosts import ONE, TWO
from tests.spec.examples.example import EIGHT_BIT, SAMPLED, Example, asks, simulated, spread

AT_ONCE = "backend.sleep=false"

EXAMPLES = [
    Example("no_weights_to_change", "quantization.quantization", simulated(*EIGHT_BIT), asks(*EIGHT_BIT)),
    Example("no_weights_to_change", "revision", simulated("revision=main"), asks("revision=main")),
    Example("no_weights_to_change", "adapter", simulated("adapter=adapter"), asks("adapter=adapter")),
    Example("no_effect_on_simulation", "fp_precision", simulated("fp_precision=float32"), asks("fp_precision=float32")),
    Example("no_effect_on_simulation", "decoder", simulated(SAMPLED), simulated("decoder.name=of another name")),
    Example(
        "no_effect_on_simulation",
        "trust_remote_code",
        simulated("trust_remote_code=true"),
        asks("trust_remote_code=true"),
    ),
    Example("no_effect_on_simulation", "chat_template", simulated("chat_template=true"), asks("chat_template=true")),
    Example(
        "no_effect_on_simulation",
        "parallelism.strategy",
        simulated(*spread("tensor", 2)),
        simulated(*spread("data", 2)),
    ),
    Example(
        "no_effect_outside_campaign", "backend.drift", simulated("backend.drift=0.1"), simulated("backend.noise=0.1")
    ),
    Example(
        "no_effect_outside_campaign",
        "backend.carry_over",
        simulated("backend.carry_over=0.1"),
        simulated("backend.request_noise=0.1"),
    ),
    Example("simulated_energy", "energy.name", asks("energy=simulated"), simulated("energy=simulated")),
    Example("simulated_time", "backend.sleep", simulated(AT_ONCE), simulated(AT_ONCE, "energy=simulated")),
    Example(
        "simulated_time",
        "backend.sleep",
        simulated(AT_ONCE, "energy=none", "num_processes=2"),
        simulated("energy=none", "num_processes=2"),
    ),
    Example(
        "simulated_time",
        "backend.sleep",
        simulated(AT_ONCE, "energy=none", "backend.gpus=1", host=ONE),
        simulated(AT_ONCE, "energy=none", host=ONE),
    ),
    Example(
        "no_effect_meter_option",
        "energy.power_w",
        simulated("energy=none", "energy.power_w=50.0"),
        simulated("energy=simulated", "energy.power_w=50.0"),
    ),
    Example(
        "too_few_gpus", "backend.gpus", simulated("backend.gpus=2", host=ONE), simulated("backend.gpus=2", host=TWO)
    ),
]
