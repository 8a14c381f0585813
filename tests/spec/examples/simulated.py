"""Rules about the simulated backend."""

from __future__ import annotations

from tests.hosts import ONE, TWO
from tests.spec.examples.example import EIGHT_BIT, SAMPLED, Example, asks, simulated, spread

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
        "too_few_gpus", "backend.gpus", simulated("backend.gpus=2", host=ONE), simulated("backend.gpus=2", host=TWO)
    ),
]
