"""Rules that depend on the options alone and apply to all backends."""

from __future__ import annotations

from tests.hosts import ONE, TWO
from tests.spec.examples.example import EIGHT_BIT, FOUR_BIT, POISSON, SAMPLED, Example, asks, spread

DYNAMIC = ("batching.strategy=dynamic", "batching.max_tokens_per_batch=8192")

EXAMPLES = [
    Example("min_above_max", "min_output_tokens", asks("min_output_tokens=129"), asks("min_output_tokens=128")),
    Example(
        "no_token_budget", "batching.max_tokens_per_batch", asks("batching.strategy=sorted_dynamic"), asks(*DYNAMIC)
    ),
    Example("traffic_incomplete", "traffic.target_qps", asks("traffic.pattern=poisson"), asks(*POISSON)),
    Example(
        "traffic_not_divisible",
        "traffic.concurrency",
        asks("num_processes=2", "traffic.pattern=concurrency", "traffic.concurrency=3"),
        asks("num_processes=2", "traffic.pattern=concurrency", "traffic.concurrency=4"),
    ),
    Example(
        "bits_conflict",
        "quantization.quantization",
        asks(*EIGHT_BIT, "quantization.load_in_4bit=true"),
        asks(*EIGHT_BIT),
    ),
    Example("no_bits", "quantization.quantization", asks("quantization.quantization=true"), asks(*FOUR_BIT)),
    Example(
        "unknown_country",
        "energy.country_iso_code",
        asks("energy.country_iso_code=XYZ"),
        asks("energy.country_iso_code=FRA"),
    ),
    Example(
        "processes_unlike_degree",
        "num_processes",
        asks("num_processes=3", *spread("data", 2)),
        asks("num_processes=2", *spread("data", 2)),
    ),
    Example(
        "processes_unlike_degree",
        "num_processes",
        asks("num_processes=4", *spread("tensor", 2)),
        asks(*spread("tensor", 2)),
    ),
    Example(
        "pipeline_processes",
        "num_processes",
        asks("num_processes=2", *spread("pipeline", 2), host=TWO),
        asks(*spread("pipeline", 2), host=TWO),
    ),
    Example(
        "no_effect_sampling",
        "decoder.temperature",
        asks("decoder.temperature=0.5"),
        asks(SAMPLED, "decoder.temperature=0.5"),
    ),
    Example("no_effect_sampling", "decoder.top_k", asks("decoder.top_k=5"), asks("decoder.repetition_penalty=1.5")),
    Example("no_effect_bits", "quantization.load_in_8bit", asks("quantization.load_in_8bit=true"), asks(*EIGHT_BIT)),
    Example(
        "no_effect_4bit_option",
        "quantization.bnb_4bit_quant_type",
        asks(*EIGHT_BIT, "quantization.bnb_4bit_quant_type=fp4"),
        asks(*FOUR_BIT, "quantization.bnb_4bit_quant_type=fp4"),
    ),
    Example("no_effect_degree", "parallelism.degree", asks("parallelism.degree=2"), asks(*spread("data", 2))),
    Example(
        "no_effect_warmup_limit",
        "warmup.max_prompts",
        asks("warmup.max_prompts=9"),
        asks("warmup.until_cv=0.1", "warmup.max_prompts=9"),
    ),
    Example(
        "no_effect_streaming_warmup",
        "streaming.warmup_requests",
        asks("streaming.warmup_requests=9"),
        asks("streaming.enabled=true", "streaming.warmup_requests=9"),
    ),
    Example(
        "no_effect_goodput_limit",
        "traffic.ttft_limit_s",
        asks("traffic.ttft_limit_s=0.5"),
        asks("streaming.enabled=true", "traffic.ttft_limit_s=0.5"),
    ),
    Example(
        "no_effect_traffic",
        "traffic.concurrency",
        asks(*POISSON, "traffic.concurrency=2"),
        asks("traffic.pattern=concurrency", "traffic.concurrency=2"),
    ),
    Example(
        "no_effect_cooldown_limit",
        "cooldown.max_s",
        asks("cooldown.max_s=60.0", host=ONE),
        asks("cooldown.to_c=40.0", "cooldown.max_s=60.0", host=ONE),
    ),
    Example(
        "no_effect_trace",
        "energy.trace",
        asks("energy.trace=trace.csv"),
        asks("energy=replay", "energy.trace=trace.csv"),
    ),
    Example(
        "no_effect_country",
        "energy.country_iso_code",
        asks("energy.country_iso_code=DEU", "energy.carbon_intensity_g_per_kwh=300.0"),
        asks("energy.country_iso_code=DEU"),
    ),
    Example(
        "no_effect_country",
        "energy.country_iso_code",
        asks("energy.country_iso_code=DEU", "energy.carbon_trace=grid.csv"),
        asks("energy.country_iso_code=DEU"),
    ),
    Example(
        "no_effect_carbon_intensity",
        "energy.carbon_intensity_g_per_kwh",
        asks("energy.carbon_intensity_g_per_kwh=300.0", "energy.carbon_trace=grid.csv"),
        asks("energy.carbon_intensity_g_per_kwh=300.0"),
    ),
    Example(
        "no_effect_token_budget",
        "batching.max_tokens_per_batch",
        asks("batching.max_tokens_per_batch=8192"),
        asks(*DYNAMIC),
    ),
    Example(
        "no_effect_warmup_prompts",
        "warmup.prompts",
        asks("warmup.prompts=9", "warmup.until_cv=0.1"),
        asks("warmup.prompts=9"),
    ),
    Example(
        "no_effect_warmup_prompts",
        "warmup.prompts",
        asks("warmup.prompts=9", "streaming.enabled=true"),
        asks("warmup.prompts=9"),
    ),
    Example("no_effect_strategy", "parallelism.strategy", asks(*spread("data", 1)), asks(*spread("data", 2))),
    Example(
        "no_effect_carbon",
        "energy.country_iso_code",
        asks("energy=none", "energy.country_iso_code=DEU"),
        asks("energy.country_iso_code=DEU"),
    ),
    Example(
        "no_effect_carbon",
        "energy.carbon_intensity_g_per_kwh",
        asks("energy=none", "energy.carbon_intensity_g_per_kwh=0.0"),
        asks("energy.carbon_intensity_g_per_kwh=0.0"),
    ),
    Example(
        "no_effect_carbon",
        "energy.carbon_trace",
        asks("energy=none", "energy.carbon_trace=grid.csv"),
        asks("energy.carbon_trace=grid.csv"),
    ),
    Example(
        "no_effect_meter_option",
        "energy.idle_s",
        asks("energy=none", "energy.idle_s=1.0"),
        asks("energy=codecarbon", "energy.idle_s=1.0"),
    ),
    Example(
        "no_effect_meter_option",
        "energy.power_hz",
        asks("energy=zeus", "energy.power_hz=50.0", host=ONE),
        asks("energy=nvml", "energy.power_hz=50.0", host=ONE),
    ),
    Example(
        "no_effect_meter_option",
        "energy.powercap_dir",
        asks("energy=codecarbon", "energy.powercap_dir=powercap"),
        asks("energy.powercap_dir=powercap"),
    ),
    Example("remote_code", "trust_remote_code", asks("trust_remote_code=true"), asks()),
]
