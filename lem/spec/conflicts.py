"""Options that exclude each other, and options without effect, whatever the machine: experiment -> objections.

Looks at the configuration alone. Knows no device, no file and no engine's inner workings.
"""

from __future__ import annotations

from collections.abc import Iterator

from lem.spec.engines import PytorchBackend
from lem.spec.experiment import Cooldown, Decoder, Experiment, Quantization, Warmup
from lem.spec.processes import changed, process_counts, runs_in_one_process
from lem.spec.rules import Objection, without_effect

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
OF_4_BIT = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
WARMUP_LIMITS = ("cv_batches", "max_prompts", "max_s")


def conflicts(experiment: Experiment) -> Iterator[Objection]:
    """Yield what is wrong between options."""
    yield from _lengths(experiment)
    yield from _batching(experiment)
    yield from _continuous(experiment)
    yield from _decoder(experiment.decoder)
    yield from _quantization(experiment.quantization)
    yield from _compile(experiment)
    yield from _parallelism(experiment)
    yield from _warmup(experiment.warmup)
    yield from _streaming(experiment)
    yield from _traffic(experiment)
    yield from _cooldown(experiment.cooldown)


def _lengths(experiment: Experiment) -> Iterator[Objection]:
    if experiment.min_output_tokens > experiment.max_output_tokens:
        yield Objection(
            "min_above_max",
            "min_output_tokens",
            f"{experiment.min_output_tokens} is more than max_output_tokens ({experiment.max_output_tokens}).",
            "Lower it, or raise the other.",
        )


def _batching(experiment: Experiment) -> Iterator[Objection]:
    batching, path = experiment.batching, "batching.max_tokens_per_batch"
    is_dynamic, budget = batching.strategy.endswith("dynamic"), batching.max_tokens_per_batch
    if is_dynamic and budget is None:
        yield Objection(
            "no_token_budget",
            path,
            f"{batching.strategy} batching needs a token budget.",
            "Set it, for example to 8192, or use static batching.",
        )
    if not is_dynamic and budget is not None:
        yield without_effect(
            "no_effect_token_budget",
            path,
            f"{batching.strategy} batching has no token budget.",
            "Set it to null, or use batching.strategy=dynamic.",
        )


def _continuous(experiment: Experiment) -> Iterator[Objection]:
    if experiment.batching.strategy == "continuous" and not experiment.backend.runs_continuously:
        reason = f"the {experiment.backend.name} backend runs batch after batch."
        remedy = "Choose static, or a backend that runs a model."
        yield Objection("no_continuous_batching", "batching.strategy", reason, remedy)


def _decoder(decoder: Decoder) -> Iterator[Objection]:
    if decoder.do_sample:
        return
    for name in changed(decoder, *SAMPLING):
        yield without_effect(
            "no_effect_sampling",
            f"decoder.{name}",
            "it is not used without sampling.",
            "Set decoder.do_sample=true, or leave it out.",
        )


def _quantization(wanted: Quantization) -> Iterator[Objection]:
    path = "quantization.quantization"
    if wanted.load_in_4bit and wanted.load_in_8bit:
        yield Objection("bits_conflict", path, "4-bit and 8-bit exclude each other.", "Choose one.")
    elif wanted.quantization and not (wanted.load_in_4bit or wanted.load_in_8bit):
        yield Objection(
            "no_bits",
            path,
            "it does not say to how many bits.",
            "Set quantization.load_in_8bit or quantization.load_in_4bit to true.",
        )
    elif not wanted.quantization:
        for name in changed(wanted, "load_in_8bit", "load_in_4bit"):
            yield without_effect(
                "no_effect_bits", f"quantization.{name}", "quantization is off.", f"Set {path}=true, or leave it out."
            )
    if not (wanted.quantization and wanted.load_in_4bit):
        for name in changed(wanted, *OF_4_BIT):
            yield without_effect(
                "no_effect_4bit_option", f"quantization.{name}", "it belongs to 4-bit weights.", "Leave it out."
            )


def _compile(experiment: Experiment) -> Iterator[Objection]:
    options = experiment.backend
    if isinstance(options, PytorchBackend) and not options.torch_compile and changed(options, "torch_compile_mode"):
        yield without_effect(
            "no_effect_compile_mode",
            "backend.torch_compile_mode",
            "torch_compile is off.",
            "Set backend.torch_compile=true, or leave it out.",
        )


def _parallelism(experiment: Experiment) -> Iterator[Objection]:
    strategy, degree = experiment.parallelism.strategy, experiment.parallelism.degree
    processes = experiment.num_processes
    if strategy == "none":
        if degree > 1:
            yield without_effect(
                "no_effect_degree",
                "parallelism.degree",
                "there is no strategy.",
                f"Choose parallelism.strategy, or set num_processes={degree} for processes that share the prompts.",
            )
        return
    if degree == 1:
        yield without_effect(
            "no_effect_strategy",
            "parallelism.strategy",
            f"{strategy} of degree 1 spreads nothing.",
            "Raise the degree.",
        )
    if runs_in_one_process(experiment) and processes > 1:
        yield Objection(
            "pipeline_processes",
            "num_processes",
            f"{processes} processes are asked for, and {strategy} runs in one here.",
            "Leave it out; parallelism.degree is the number of GPUs.",
        )
    elif not runs_in_one_process(experiment) and processes not in (1, degree):
        yield Objection(
            "processes_unlike_degree",
            "num_processes",
            f"{processes} processes are asked for, and {strategy} of degree {degree} starts {degree}.",
            f"Leave it out, or set parallelism.degree={processes}.",
        )


def _warmup(warmup: Warmup) -> Iterator[Objection]:
    if warmup.until_cv is None:
        for name in changed(warmup, *WARMUP_LIMITS):
            yield without_effect(
                "no_effect_warmup_limit",
                f"warmup.{name}",
                "the warm-up has a fixed number of prompts.",
                "Set warmup.until_cv, for example to 0.05, or leave it out.",
            )
    elif changed(warmup, "prompts"):
        yield without_effect(
            "no_effect_warmup_prompts",
            "warmup.prompts",
            "warmup.until_cv decides how long the warm-up is.",
            "Set warmup.until_cv to null to use it.",
        )


def _streaming(experiment: Experiment) -> Iterator[Objection]:
    streaming, warmup = experiment.streaming, experiment.warmup
    if not streaming.enabled and changed(streaming, "warmup_requests"):
        reason, remedy = "tokens are not timed.", "Set streaming.enabled=true (--streaming), or leave it out."
        yield without_effect("no_effect_streaming_warmup", "streaming.warmup_requests", reason, remedy)
    if streaming.enabled and warmup.until_cv is not None and changed(streaming, "warmup_requests"):
        reason = "warmup.until_cv decides how long the warm-up is."
        remedy = "Set warmup.until_cv to null to use it."
        yield without_effect("no_effect_streaming_warmup", "streaming.warmup_requests", reason, remedy)
    if streaming.enabled and warmup.until_cv is None and changed(warmup, "prompts"):
        reason = "when tokens are timed, streaming.warmup_requests counts."
        yield without_effect("no_effect_warmup_prompts", "warmup.prompts", reason, "Set that instead.")


# The value that each pattern of traffic reads.
TRAFFIC_VALUES = {"constant": "target_qps", "poisson": "target_qps", "concurrency": "concurrency", "trace": "trace"}


def _traffic(experiment: Experiment) -> Iterator[Objection]:
    traffic, streaming = experiment.traffic, experiment.streaming.enabled
    read = TRAFFIC_VALUES.get(traffic.pattern)
    if read is not None and getattr(traffic, read) is None:
        yield Objection("traffic_incomplete", f"traffic.{read}", f"{traffic.pattern} traffic needs it.", "Set it.")
    for name in changed(traffic, "target_qps", "concurrency", "trace"):
        if name != read:
            reason = f"traffic.pattern is {traffic.pattern}."
            patterns = " or ".join(pattern for pattern, value in TRAFFIC_VALUES.items() if value == name)
            yield without_effect("no_effect_traffic", f"traffic.{name}", reason, f"Use traffic.pattern={patterns}.")
    for name in changed(traffic, "ttft_limit_s", "itl_limit_s"):
        if not streaming:
            reason = "tokens are not timed."
            yield without_effect("no_effect_goodput_limit", f"traffic.{name}", reason, "Use --streaming.")
    _, replicas = process_counts(experiment)
    if traffic.pattern == "concurrency" and traffic.concurrency is not None and traffic.concurrency % replicas:
        reason = f"{traffic.concurrency} requests cannot be shared evenly by {replicas} processes."
        yield Objection("traffic_not_divisible", "traffic.concurrency", reason, f"Use a multiple of {replicas}.")


def _cooldown(cooldown: Cooldown) -> Iterator[Objection]:
    if cooldown.to_c is None and changed(cooldown, "max_s"):
        yield without_effect(
            "no_effect_cooldown_limit",
            "cooldown.max_s",
            "no temperature is waited for.",
            "Set cooldown.to_c, or leave it out.",
        )
