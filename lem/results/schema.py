"""The columns of the experiments and cycles tables, with their units; `lem.record` has the columns of requests."""

# Annotations are evaluated here rather than kept as strings, because every command that reads a table needs them.

from typing import Annotated, ClassVar

from msgspec import Struct

from lem import quantities

Seconds = Annotated[float | None, quantities.SECOND]
Joules = Annotated[float | None, quantities.JOULE]
Watts = Annotated[float | None, quantities.WATT]
Ratio = Annotated[float | None, quantities.RATIO]
TokensPerSecond = Annotated[float | None, quantities.TOKEN_PER_SECOND]
RequestsPerSecond = Annotated[float | None, quantities.REQUEST_PER_SECOND]
JoulesPerToken = Annotated[float | None, quantities.JOULE_PER_TOKEN]
Bytes = Annotated[int | None, quantities.BYTE]


class Measures(Struct, frozen=True, gc=False, kw_only=True):
    """The measurements of an experiment or of one of its cycles: the columns that both tables have.

    Energy columns are sums over all devices of a component. The headline `energy_j` is the energy of the GPUs if they
    were metered, else that of the measured components, else the sum of the estimates.
    """

    # Columns are in the order of the class's fields, except that each column named here follows the column it maps to.
    AFTER: ClassVar[dict[str, str]] = {}

    experiment_id: Annotated[str, "Unique id of the experiment."]
    status: Annotated[str, "Outcome: completed, failed or interrupted."]
    # counted
    requests_completed: Annotated[int, quantities.REQUEST, "Number of requests that finished without an error."]
    input_tokens: Annotated[int, quantities.TOKEN, "Input tokens of the finished requests, without padding."]
    output_tokens: Annotated[
        int, quantities.TOKEN, "Output tokens of the finished requests, up to and including the first end token."
    ]
    # timed
    duration_s: Annotated[Seconds, "Wall-clock length of the measured window."]
    output_tokens_per_s: Annotated[TokensPerSecond, "output_tokens / duration_s."]
    requests_per_s: Annotated[RequestsPerSecond, "requests_completed / duration_s."]
    latency_mean_s: Annotated[Seconds, "Mean latency of a request."]
    latency_p50_s: Annotated[Seconds, "Median latency of a request."]
    latency_p95_s: Annotated[Seconds, "95th percentile of the latency."]
    latency_p99_s: Annotated[Seconds, "99th percentile of the latency."]
    latency_samples: Annotated[int | None, "Number of latencies from which the percentiles are computed."] = None
    warmup_duration_s: Annotated[Seconds, "Length of the warm-up, which is outside the window."]
    # metered
    energy_j: Annotated[Joules, "Headline energy of the measured window, gross."]
    energy_source: Annotated[str | None, "Source of energy_j: counter, integral, estimate, replay or simulated."]
    gpu_energy_j: Annotated[Joules, "Energy of the GPUs in use during the window."]
    cpu_energy_j: Annotated[Joules, "Energy of the CPUs during the window."]
    dram_energy_j: Annotated[Joules, "Energy of main memory during the window."]
    energy_idle_adjusted_j: Annotated[Joules, "energy_j minus idle_power_loaded_w times duration_s; may be negative."]
    prefill_duration_s: Annotated[
        Seconds,
        "Time spent processing prompts, on average over the processes; null if other requests were decoding at the "
        "same time.",
    ]
    decode_duration_s: Annotated[Seconds, "duration_s minus prefill_duration_s and, where known, minus idle time."]
    # derived
    average_power_w: Annotated[Watts, "energy_j / duration_s."]
    energy_per_output_token_j: Annotated[JoulesPerToken, "energy_j / output_tokens."]
    energy_per_request_j: Annotated[float | None, quantities.JOULE_PER_REQUEST, "energy_j / requests_completed."]
    flops_per_s: Annotated[float | None, quantities.FLOP_PER_SECOND, "flops / duration_s."]
    mfu: Annotated[Ratio, "Model FLOPs utilization: flops_per_s / peak_flops_per_s."]
    # of an interrupted run
    repeated_share: Annotated[
        Ratio,
        "Upper bound on the share of duration_s spent on requests that were cut off and later run again.",
    ] = None
    # token by token, when streaming
    ttft_mean_s: Annotated[Seconds, "Mean time to first token (TTFT)."] = None
    ttft_p50_s: Annotated[Seconds, "Median time to first token."] = None
    ttft_p95_s: Annotated[Seconds, "95th percentile of the time to first token."] = None
    ttft_p99_s: Annotated[Seconds, "99th percentile of the time to first token."] = None
    ttft_samples: Annotated[int | None, "Number of TTFTs from which the percentiles are computed."] = None
    itl_mean_s: Annotated[Seconds, "Mean inter-token latency (ITL), over all tokens."] = None
    itl_p50_s: Annotated[Seconds, "Median inter-token latency, over all tokens."] = None
    itl_p95_s: Annotated[Seconds, "95th percentile of the inter-token latency, over all tokens."] = None
    itl_p99_s: Annotated[Seconds, "99th percentile of the inter-token latency, over all tokens."] = None
    itl_samples: Annotated[int | None, "Number of ITLs from which the percentiles are computed."] = None
    tpot_mean_s: Annotated[Seconds, "Mean time per output token after the first (TPOT)."] = None
    tpot_p50_s: Annotated[Seconds, "Median time per output token after the first."] = None
    tpot_p95_s: Annotated[Seconds, "95th percentile of the time per output token after the first."] = None
    tpot_p99_s: Annotated[Seconds, "99th percentile of the time per output token after the first."] = None
    tpot_samples: Annotated[int | None, "Number of TPOTs from which the percentiles are computed."] = None
    # under traffic
    arrival_rate_per_s: Annotated[RequestsPerSecond, "Rate at which requests arrived."] = None
    queue_mean_s: Annotated[Seconds, "Mean wait in the queue."] = None
    queue_p50_s: Annotated[Seconds, "Median wait in the queue."] = None
    queue_p95_s: Annotated[Seconds, "95th percentile of the wait in the queue."] = None
    queue_p99_s: Annotated[Seconds, "99th percentile of the wait in the queue."] = None
    queue_samples: Annotated[int | None, "Number of waits from which the percentiles are computed."] = None
    idle_share: Annotated[Ratio, "Share of the window in which no process had a request."] = None
    goodput_requests_per_s: Annotated[RequestsPerSecond, "Rate of requests within the limits on TTFT and ITL."] = None
    # while all slots were taken, with continuous batching
    steady_duration_s: Annotated[Seconds, "Length of the steady state, in which all slots are taken."] = None
    steady_output_tokens: Annotated[int | None, quantities.TOKEN, "Output tokens generated in the steady state."] = None
    steady_output_tokens_per_s: Annotated[TokensPerSecond, "steady_output_tokens / steady_duration_s."] = None
    steady_energy_j: Annotated[Joules, "Headline energy of the steady state."] = None
    steady_average_power_w: Annotated[Watts, "steady_energy_j / steady_duration_s."] = None
    steady_energy_per_output_token_j: Annotated[JoulesPerToken, "steady_energy_j / steady_output_tokens."] = None
    # failed requests
    requests_failed: Annotated[
        int | None,
        quantities.REQUEST,
        "Number of failed requests. Token counts, latencies and throughput exclude them; time, energy, the arrival "
        "rate and the queue include them.",
    ] = None
    error_rate: Annotated[Ratio, "requests_failed / (requests_completed + requests_failed)."] = None
    warnings: Annotated[
        list[str], "Reasons to doubt a number, each as `code: sentence`; see docs/reference/warnings.md."
    ] = []


class CycleRow(Measures, frozen=True, gc=False, kw_only=True):
    """One cycle of an experiment: a pass over all its prompts. Columns have the same meaning as for the experiment."""

    AFTER: ClassVar[dict[str, str]] = {
        "cycle": "experiment_id", "attempts": "status",
        "average_power_w": "energy_idle_adjusted_j", "flops_per_s": "decode_duration_s",
    }  # fmt: skip

    cycle: Annotated[int, "Number of the cycle, from 1."]
    attempts: Annotated[int, "Number of attempts at the cycle; more than 1 if it was interrupted and resumed."]


class ExperimentRow(Measures, frozen=True, gc=False, kw_only=True):
    """An experiment's row in the experiments table.

    With several cycles, counted, timed and metered values are means over the finished cycles, so they describe one pass
    over the prompts. Quotients, such as tokens per second, are computed from the means, so that they are consistent
    with each other. The columns with `_sd`, `_cv`, `_ci95_low` and `_ci95_high` in their names describe the spread of
    the cycles' own values around their mean.
    """

    AFTER: ClassVar[dict[str, str]] = {
        "error": "status", "load_duration_s": "latency_samples", "energy_scope": "energy_source",
        "gpu_energy_source": "gpu_energy_j", "cpu_energy_source": "cpu_energy_j",
        "dram_energy_source": "dram_energy_j", "trace_energy_j": "energy_idle_adjusted_j",
        "prefill_energy_j": "decode_duration_s", "co2e_g": "energy_per_request_j", "flops_method": "flops_per_s",
        "kv_cache_bytes": "mfu", "campaign": "seed", "energy_sd_j": "steady_energy_per_output_token_j",
        "overrides": "warnings",
    }  # fmt: skip

    error: Annotated[str | None, "Reason why the experiment did not complete, or null."]
    started_at: Annotated[str, "Wall-clock start, ISO 8601 with UTC offset; a label, not a measurement."]
    lem_version: Annotated[str, "Version of lem that ran the experiment."]
    hostname: Annotated[str | None, "Name of the machine that ran the experiment; null if no process ran."]
    processes: Annotated[int, "Number of worker processes that wrote a record."]
    cycles_planned: Annotated[int, "Number of cycles planned."]
    cycles_completed: Annotated[
        int, "Number of cycles in which all requests ended, at least one of them without an error."
    ]
    resumed: Annotated[int, "Number of times the experiment was resumed."]
    # what ran
    model: Annotated[str, "Model, as configured."]
    random_weights: Annotated[bool | None, "Whether the weights are random, so that the output is meaningless."]
    parameters: Annotated[int | None, "Number of parameters of the loaded model, including any adapter's."]
    backend: Annotated[str, "Backend used."]
    engine_version: Annotated[str | None, "Version of the engine behind the backend."]
    device: Annotated[str | None, "Name of the device on which the model ran."]
    dtype: Annotated[str | None, "Dtype of the loaded weights, and of the arithmetic unless they are quantized."]
    quantization: Annotated[str | None, "How the weights were quantized, or null."]
    adapter: Annotated[str | None, "LoRA adapter, or null if none was used."]
    weights_bytes: Annotated[Bytes, "Size of the weights as loaded."]
    dataset: Annotated[str, "Name of the chosen dataset."]
    prompts_sha256: Annotated[str, "Digest of the prompts in order; equal digests mean equal prompts."]
    prompts_read: Annotated[int | None, quantities.REQUEST, "Number of prompts in the source, including empty ones."]
    prompts_empty: Annotated[
        int | None, quantities.REQUEST, "Number of prompts_read that were empty and dropped before sampling."
    ]
    prompts_cut: Annotated[int | None, quantities.REQUEST, "Number of prompts that were truncated to max_input_tokens."]
    decoder: Annotated[str, "Name of the chosen decoder."]
    batching_strategy: Annotated[str, "Batching strategy."]
    batch_size: Annotated[
        int, quantities.REQUEST, "Maximum number of requests in a batch, or of requests running concurrently."
    ]
    max_output_tokens: Annotated[int, quantities.TOKEN, "Maximum number of generated tokens per request."]
    seed: Annotated[int, "Seed for drawing prompts, for Poisson arrivals and for sampling tokens."]
    # counted
    requests_planned: Annotated[int, quantities.REQUEST, "Number of prompts of the experiment."]
    load_duration_s: Annotated[Seconds, "Time to load the model, which is outside the window."]
    energy_scope: Annotated[str | None, "Scope of the headline energy: device, package, machine or shared_device."]
    energy_components: Annotated[str | None, "Components in the headline, such as gpu or cpu+dram."]
    energy_without_gpu: Annotated[bool | None, "Whether a GPU ran the model but is missing from the energy."] = None
    gpu_energy_source: Annotated[str | None, "Source of gpu_energy_j."]
    cpu_energy_source: Annotated[str | None, "Source of cpu_energy_j."]
    dram_energy_source: Annotated[str | None, "Source of dram_energy_j."]
    load_energy_j: Annotated[Joules, "Headline energy of loading the model."]
    warmup_energy_j: Annotated[Joules, "Headline energy of the warm-up."]
    idle_power_before_w: Annotated[Watts, "Power of the headline components before the model is loaded."]
    idle_power_loaded_w: Annotated[Watts, "Power of the headline components with the model loaded and idle."]
    trace_energy_j: Annotated[Joules, "Integral of the GPU power trace, to compare with the counter."]
    counter_tick_s: Annotated[Seconds, "Longest tick of the GPU energy counters."]
    prefill_energy_j: Annotated[
        Joules, "Integral of the power trace over the prefill spans; null if the sensor cannot resolve them."
    ]
    decode_energy_j: Annotated[
        Joules,
        "energy_j minus prefill_energy_j; may be negative; null if the window has idle time, whose energy is unknown.",
    ]
    prefill_energy_uncertainty_j: Annotated[
        Joules,
        "Upper bound on the error of prefill and decode energy, caused by sampling and by the sensor's averaging.",
    ]
    prefill_reason: Annotated[str | None, "Reason why prefill_duration_s or prefill_energy_j is null, where known."] = (
        None
    )
    # derived
    energy_wh: Annotated[float | None, quantities.WATT_HOUR, "energy_j / 3600."]
    co2e_g: Annotated[float | None, quantities.GRAM_CO2E, "Emissions: energy_j times the carbon intensity."]
    carbon_intensity_g_per_kwh: Annotated[
        float | None, quantities.GRAM_CO2E_PER_KWH, "Carbon intensity used; from a trace, its mean over the window."
    ]
    carbon_intensity_source: Annotated[
        str | None,
        "Source of the carbon intensity; for a trace, also whether its mean is weighted by energy or by time.",
    ]
    carbon_trace_sha256: Annotated[
        str | None, "Digest of the file that energy.carbon_trace names; null without one."
    ] = None
    peak_memory_bytes: Annotated[Bytes, "Peak memory, the maximum over all processes."]
    peak_memory_scope: Annotated[str | None, "What the peak covers, in words, such as 'process, since its start'."]
    flops: Annotated[float | None, quantities.FLOP, "Model FLOPs of the counted tokens."]
    flops_per_token: Annotated[float | None, quantities.FLOP_PER_TOKEN, "flops / (input_tokens + output_tokens)."]
    flops_method: Annotated[str | None, "How the FLOPs were determined."]
    peak_flops_per_s: Annotated[
        float | None, quantities.FLOP_PER_SECOND, "Datasheet peak of the GPUs for the arithmetic's dtype."
    ]
    peak_flops_source: Annotated[str | None, "Source of the datasheet peak."]
    kv_cache_bytes: Annotated[Bytes, "Allocated key/value cache of the largest batch, padding included."]
    warmup_prompts: Annotated[int | None, quantities.REQUEST, "Number of prompts run in the warm-up."]
    warmup_ended: Annotated[str | None, "Reason why the warm-up ended: fixed, converged, max_prompts or max_s."]
    warmup_cv: Annotated[Ratio, "Coefficient of variation of the warm-up's last latencies."]
    # over the cycles
    energy_sd_j: Annotated[Joules, "Standard deviation of energy_j over the cycles."] = None
    energy_cv: Annotated[Ratio, "Coefficient of variation of energy_j over the cycles."] = None
    energy_ci95_low_j: Annotated[Joules, "Lower end of the 95% t-interval of the mean of energy_j."] = None
    energy_ci95_high_j: Annotated[Joules, "Upper end of the 95% t-interval of the mean of energy_j."] = None
    output_tokens_per_s_mean: Annotated[
        TokensPerSecond, "Mean of output_tokens_per_s over the cycles; the middle of the interval."
    ] = None
    output_tokens_per_s_sd: Annotated[TokensPerSecond, "Standard deviation of output_tokens_per_s over the cycles."] = (
        None
    )
    output_tokens_per_s_cv: Annotated[Ratio, "Coefficient of variation of output_tokens_per_s over the cycles."] = None
    output_tokens_per_s_ci95_low: Annotated[
        TokensPerSecond, "Lower end of the 95% t-interval of the mean of output_tokens_per_s."
    ] = None
    output_tokens_per_s_ci95_high: Annotated[
        TokensPerSecond, "Upper end of the 95% t-interval of the mean of output_tokens_per_s."
    ] = None
    latency_mean_sd_s: Annotated[Seconds, "Standard deviation of latency_mean_s over the cycles."] = None
    latency_mean_cv: Annotated[Ratio, "Coefficient of variation of latency_mean_s over the cycles."] = None
    latency_mean_ci95_low_s: Annotated[Seconds, "Lower end of the 95% t-interval of the mean of latency_mean_s."] = None
    latency_mean_ci95_high_s: Annotated[Seconds, "Upper end of the 95% t-interval of the mean of latency_mean_s."] = (
        None
    )
    energy_per_output_token_mean_j: Annotated[
        JoulesPerToken, "Mean of energy_per_output_token_j over the cycles; the middle of the interval."
    ] = None
    energy_per_output_token_sd_j: Annotated[
        JoulesPerToken, "Standard deviation of energy_per_output_token_j over the cycles."
    ] = None
    energy_per_output_token_cv: Annotated[
        Ratio, "Coefficient of variation of energy_per_output_token_j over the cycles."
    ] = None
    energy_per_output_token_ci95_low_j: Annotated[
        JoulesPerToken, "Lower end of the 95% t-interval of the mean of energy_per_output_token_j."
    ] = None
    energy_per_output_token_ci95_high_j: Annotated[
        JoulesPerToken, "Upper end of the 95% t-interval of the mean of energy_per_output_token_j."
    ] = None
    campaign: Annotated[str | None, "Campaign that the experiment belongs to."] = None
    campaign_arm: Annotated[str | None, "The experiment's arm in the campaign."] = None
    campaign_cycle: Annotated[int | None, "The experiment's cycle of the campaign, from 1."] = None
    campaign_position: Annotated[int | None, "The experiment's position in its cycle of the campaign, from 1."] = None
    schedule: Annotated[str | None, "Schedule that the experiment belongs to."] = None
    schedule_run: Annotated[int | None, "Number of the run in the schedule, from 1."] = None
    schedule_planned_at: Annotated[
        str | None, "Planned start of the run, ISO 8601 in the schedule's time zone, with UTC offset."
    ] = None
    schedule_started_at: Annotated[
        str | None, "Actual start of the run, ISO 8601 in the schedule's time zone, with UTC offset."
    ] = None
    schedule_late_s: Annotated[Seconds, "Actual start minus planned start of the run."] = None
    slurm_job_id: Annotated[
        str | None,
        "Slurm job that ran the experiment; several, joined by +, if it was resumed in another job; null without "
        "Slurm.",
    ] = None
    slurm_node: Annotated[
        str | None,
        "Slurm's name of the node that ran the experiment; several, joined by +, if it was resumed on another node; "
        "null without Slurm, or if no process ran.",
    ] = None
    overrides: Annotated[list[str], "Overrides given on the command line, in order."] = []
    config_json: Annotated[str, "The complete resolved configuration, as JSON."] = ""
