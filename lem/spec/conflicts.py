"""Objections that follow from the configuration alone: mutually exclusive options, and options that have no effect.

This module knows nothing about devices, files or how an engine works.
"""

from __future__ import annotations

from collections.abc import Iterator

from lem.spec.campaign import Measure
from lem.spec.engines import PytorchBackend, SimulatedBackend
from lem.spec.experiment import Cooldown, Experiment, Quantization
from lem.spec.processes import changed, process_counts, runs_in_one_process
from lem.spec.rules import Objection, without_effect

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
OF_4_BIT = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
WARMUP_LIMITS = ("cv_batches", "max_prompts")
# The option that each traffic pattern reads.
TRAFFIC_VALUES = {"constant": "target_qps", "poisson": "target_qps", "concurrency": "concurrency", "trace": "trace"}

# The metrics that only arms with a meter can have.
OF_ENERGY: tuple[Measure, ...] = ("energy_per_output_token_j", "energy_per_request_j", "average_power_w")

# Meters that read no sensor and can therefore follow a simulated clock.
WITHOUT_SENSORS = ("simulated", "replay", "none")


def conflicts(experiment: Experiment) -> Iterator[Objection]:
    """Yield objections to combinations of options."""
    yield from _decoding(experiment)
    yield from _batching(experiment)
    yield from _quantization(experiment.quantization)
    yield from _compile(experiment)
    yield from _parallelism(experiment)
    yield from _warmup(experiment)
    yield from _traffic(experiment)
    yield from _cooldown(experiment.cooldown)
    yield from _simulation(experiment)


def _decoding(experiment: Experiment) -> Iterator[Objection]:
    least, most, decoder = experiment.min_output_tokens, experiment.max_output_tokens, experiment.decoder
    if least > most:
        yield Objection("min_above_max", "min_output_tokens", f"{least} is more than max_output_tokens ({most}).")
    if not decoder.do_sample:
        for name in changed(decoder, *SAMPLING):
            yield without_effect("no_effect_sampling", f"decoder.{name}", "the decoder does not sample.")


def _batching(experiment: Experiment) -> Iterator[Objection]:
    batching, path = experiment.batching, "batching.max_tokens_per_batch"
    is_dynamic, budget = batching.strategy.endswith("dynamic"), batching.max_tokens_per_batch
    if is_dynamic and budget is None:
        yield Objection("no_token_budget", path, f"{batching.strategy} batching needs a token budget.")
    if not is_dynamic and budget is not None:
        yield without_effect("no_effect_token_budget", path, f"{batching.strategy} batching has no token budget.")


def _quantization(wanted: Quantization) -> Iterator[Objection]:
    path = "quantization.quantization"
    if wanted.load_in_4bit and wanted.load_in_8bit:
        yield Objection("bits_conflict", path, "load_in_4bit and load_in_8bit are mutually exclusive.")
    elif wanted.quantization and not (wanted.load_in_4bit or wanted.load_in_8bit):
        yield Objection("no_bits", path, "no bit width is set.")
    elif not wanted.quantization:
        for name in changed(wanted, "load_in_8bit", "load_in_4bit"):
            yield without_effect("no_effect_bits", f"quantization.{name}", "quantization is off.")
    if not (wanted.quantization and wanted.load_in_4bit):
        for name in changed(wanted, *OF_4_BIT):
            yield without_effect(
                "no_effect_4bit_option", f"quantization.{name}", "the weights are not loaded in 4 bits."
            )


def _compile(experiment: Experiment) -> Iterator[Objection]:
    options, path = experiment.backend, "backend.torch_compile_mode"
    if isinstance(options, PytorchBackend) and not options.torch_compile and changed(options, "torch_compile_mode"):
        yield without_effect("no_effect_compile_mode", path, "torch.compile is off.")


def _parallelism(experiment: Experiment) -> Iterator[Objection]:
    strategy, degree = experiment.parallelism.strategy, experiment.parallelism.degree
    processes = experiment.num_processes
    if strategy == "none":
        if degree > 1:
            yield without_effect("no_effect_degree", "parallelism.degree", "no parallelism.strategy is set.")
        return
    if degree == 1:
        fact = f"{strategy} with degree 1 splits nothing."
        yield without_effect("no_effect_strategy", "parallelism.strategy", fact)
    if runs_in_one_process(experiment) and processes > 1:
        backend = experiment.backend.name
        fact = f"{processes} processes are requested, but {strategy} with backend={backend} uses a single process."
        yield Objection("pipeline_processes", "num_processes", fact)
    elif not runs_in_one_process(experiment) and processes not in (1, degree):
        fact = f"{processes} processes are requested, but {strategy} with degree {degree} starts {degree}."
        yield Objection("processes_unlike_degree", "num_processes", fact)


def _warmup(experiment: Experiment) -> Iterator[Objection]:
    streaming, warmup = experiment.streaming, experiment.warmup
    until_steady = "warmup.until_cv decides the length of the warm-up."
    if warmup.until_cv is None:
        for name in changed(warmup, *WARMUP_LIMITS):
            fact = "the warm-up has a fixed number of prompts."
            yield without_effect("no_effect_warmup_limit", f"warmup.{name}", fact)
    if changed(warmup, "prompts"):
        if warmup.until_cv is not None:
            yield without_effect("no_effect_warmup_prompts", "warmup.prompts", until_steady)
        elif streaming.enabled:
            fact = "streaming.warmup_requests is used instead when tokens are timed."
            yield without_effect("no_effect_warmup_prompts", "warmup.prompts", fact)
    if changed(streaming, "warmup_requests"):
        path = "streaming.warmup_requests"
        if not streaming.enabled:
            yield without_effect("no_effect_streaming_warmup", path, "tokens are not timed.")
        elif warmup.until_cv is not None:
            yield without_effect("no_effect_streaming_warmup", path, until_steady)


def _traffic(experiment: Experiment) -> Iterator[Objection]:
    traffic = experiment.traffic
    read = TRAFFIC_VALUES.get(traffic.pattern)
    if read is not None and getattr(traffic, read) is None:
        yield Objection("traffic_incomplete", f"traffic.{read}", f"{traffic.pattern} traffic needs this value.")
    for name in changed(traffic, "target_qps", "concurrency", "trace"):
        if name != read:
            patterns = " or ".join(pattern for pattern, value in TRAFFIC_VALUES.items() if value == name)
            fact = f"only {patterns} traffic uses this value, but traffic.pattern is {traffic.pattern}."
            yield without_effect("no_effect_traffic", f"traffic.{name}", fact)
    if not experiment.streaming.enabled:
        for name in changed(traffic, "ttft_limit_s", "itl_limit_s"):
            yield without_effect("no_effect_goodput_limit", f"traffic.{name}", "tokens are not timed.")
    _, replicas = process_counts(experiment)
    if traffic.pattern == "concurrency" and traffic.concurrency is not None and traffic.concurrency % replicas:
        fact = f"{traffic.concurrency} requests cannot be shared evenly among {replicas} processes."
        yield Objection("traffic_not_divisible", "traffic.concurrency", fact)


def _cooldown(cooldown: Cooldown) -> Iterator[Objection]:
    if cooldown.to_c is None and changed(cooldown, "max_s"):
        yield without_effect("no_effect_cooldown_limit", "cooldown.max_s", "cooldown.to_c is not set.")


def _simulation(experiment: Experiment) -> Iterator[Objection]:
    options, meter = experiment.backend, experiment.energy.name
    if meter == "simulated" and not isinstance(options, SimulatedBackend):
        fact = f"the backend is {options.name}, but only the simulated backend has simulated energy."
        yield Objection("simulated_energy", "energy.name", fact)
    if not isinstance(options, SimulatedBackend) or options.sleep:
        return
    processes, _ = process_counts(experiment)
    reasons = {
        f"energy={meter} reads a sensor": meter not in WITHOUT_SENSORS,
        f"{processes} processes would wait for each other": processes > 1,
        "GPUs are metered": options.gpus > 0,
    }
    for fact in (fact for fact, is_so in reasons.items() if is_so):
        yield Objection(
            "simulated_time", "backend.sleep", f"{fact}, which needs real time; without sleep, time is only simulated."
        )


def unmeasured(experiment: Experiment, measure: Measure) -> Iterator[Objection]:
    """Yield an objection if an arm cannot have a value for the metric by which the campaign compares its arms."""
    if measure == "ttft_mean_s" and not experiment.streaming.enabled:
        yield Objection("primary_without_ttft", "streaming.enabled", f"without it, an arm has no {measure}.")
    if measure in OF_ENERGY and experiment.energy.name == "none":
        yield Objection("primary_without_energy", "energy.name", f"with energy=none, an arm has no {measure}.")
