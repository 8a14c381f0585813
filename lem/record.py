"""What was measured: frozen dataclasses with units, the single source of the results' schema.

Three shapes: `ProcessRecord` is what one worker process writes (JSON), `RequestRecord` is a row for each
request (Parquet), `ExperimentRow` is the row that an experiment contributes to the aggregated table
(Parquet). A number that was not measured is None, never 0. This module does not know how anything is
measured, written or shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from lem import units

# History of the raw record's format:
# 1  first version
# 2  a record for each cycle and attempt; request rows in journals
FORMAT_VERSION = 2

# What all request rows of a measured window share, and its record says.
COMMON = ("experiment_id", "rank", "cycle", "attempt")

# One process meters the node, however many there are: each would see all of its energy.
ENERGY_OWNER = 0

T = TypeVar("T")

Status = Literal["completed", "failed", "interrupted"]
Component = Literal["gpu", "cpu", "dram", "module"]
Source = Literal["counter", "integral", "estimate", "replay"]
Scope = Literal["device", "package", "machine", "process", "shared_device"]
PhaseName = Literal["idle_before", "load", "idle_loaded", "warmup", "measured"]
WarmupEnd = Literal["fixed", "converged", "max_prompts", "max_s"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class EnergyReading:
    """Energy of one component over one window, and how far it can be trusted.

    `energy_j` is None when it could not be read; `reason` then says why. `resolution_s` is the tick of a counter or
    the period of the samples, `trace_energy_j` the integral of a power trace over the same window, where there is one.
    """

    component: Component
    source: Source
    scope: Scope
    device: str
    energy_j: Annotated[float | None, units.JOULE]
    method: str
    resolution_j: Annotated[float | None, units.JOULE] = None
    resolution_s: Annotated[float | None, units.SECOND] = None
    trace_energy_j: Annotated[float | None, units.JOULE] = None
    reason: str | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with its own clock and energy; phases do not overlap."""

    name: PhaseName
    duration_s: Annotated[float, units.SECOND]
    energy: tuple[EnergyReading, ...] = ()


@dataclass(frozen=True)
class PowerSample:
    """One sample of a power trace; `t_ns` is a reading of `time.perf_counter_ns`."""

    t_ns: int
    component: Component
    device: str
    power_w: Annotated[float, units.WATT]


@dataclass(frozen=True)
class PowerRecord:
    """One sample of a power trace, as it is written (t = 0 where the measured window opens)."""

    experiment_id: str
    rank: int
    cycle: int
    attempt: int
    t_s: Annotated[float, units.SECOND, "Time of the sample; negative before the measured window."]
    component: Annotated[str, "Component, such as gpu."]
    device: Annotated[str, "Device, by UUID."]
    power_w: Annotated[float, units.WATT, "Power as the driver told it at that moment."]


@dataclass(frozen=True)
class Prefill:
    """The part of the measured window in which prompts were taken in, until the first token of each batch or request.

    Time is measured directly. Energy is the integral of the power trace over those spans, None without a trace;
    `uncertainty_j` bounds what the samples' period leaves open, and holds for the decode part, which is the rest of
    the window, as well.
    """

    duration_s: Annotated[float, units.SECOND]
    energy_j: Annotated[float | None, units.JOULE] = None
    uncertainty_j: Annotated[float | None, units.JOULE] = None


@dataclass(frozen=True)
class WarmupInfo:
    """What the warm-up did and why it ended."""

    prompts: int
    ended: WarmupEnd
    cv: float | None


@dataclass(frozen=True)
class ErrorInfo:
    """Why a process did not complete."""

    type: str
    message: str
    phase: str | None = None


@dataclass(frozen=True)
class Note:
    """Something a reader of the numbers must know; `code` is stable, `text` is for people."""

    code: str
    text: str


@dataclass(frozen=True)
class ModelInfo:
    """The model as it was loaded; None where that cannot be told, as of one in a server."""

    name: str
    revision: str | None
    architecture: str
    parameters: int | None
    random_weights: bool
    weights_bytes: Annotated[int | None, units.BYTE]
    dtype: str | None
    adapter: str | None = None
    quantization: str | None = None


@dataclass(frozen=True)
class EngineInfo:
    """The engine that ran the model and the settings it really used."""

    backend: str
    version: str
    device: str
    device_name: str
    settings: dict[str, str]


@dataclass(frozen=True)
class Memory:
    """Peak memory, and the key/value cache of the largest batch by formula; None where it cannot be told."""

    peak_bytes: Annotated[int | None, units.BYTE]
    scope: str
    kv_cache_bytes: Annotated[int | None, units.BYTE] = None


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the counted tokens (model FLOPs: no padding, no recomputation)."""

    total: Annotated[float, units.FLOP]
    method: str


@dataclass(frozen=True)
class Carbon:
    """Carbon intensity that turns joules into grams of CO2e."""

    intensity_g_per_kwh: Annotated[float, units.GRAM_CO2E_PER_KWH]
    source: str


@dataclass(frozen=True)
class ForeignProcess:
    """A process other than ours that computes on a GPU."""

    pid: int
    used_bytes: Annotated[int | None, units.BYTE]
    name: str | None


@dataclass(frozen=True)
class DeviceState:
    """A GPU at one moment; a field is None where the driver does not tell."""

    uuid: str
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_limit_w: Annotated[float | None, units.WATT] = None
    default_power_limit_w: Annotated[float | None, units.WATT] = None
    persistence: bool | None = None
    ecc: bool | None = None
    mig: bool | None = None
    throttle_reasons: tuple[str, ...] | None = None
    foreign_processes: tuple[ForeignProcess, ...] | None = None


@dataclass(frozen=True)
class Environment:
    """The machine and the software; never holds a secret."""

    hostname: str
    os: str
    cpu_model: str
    cpu_threads: int
    memory_bytes: Annotated[int, units.BYTE]
    gpus: tuple[str, ...]
    versions: dict[str, str]
    cpu_governor: str | None = None
    driver_version: str | None = None
    cuda_version: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    container: str | None = None
    slurm: dict[str, str] = field(default_factory=dict)
    devices_before: tuple[DeviceState, ...] = ()
    devices_after: tuple[DeviceState, ...] = ()


@dataclass(frozen=True)
class CpuLoad:
    """Processor time in the measured window, in busy cores: of the machine, and of this process and its children."""

    machine_cores: float
    process_cores: float


@dataclass(frozen=True)
class RequestRecord:
    """One request: exact tokens and its time in the measured window (t = 0 where its window opens)."""

    experiment_id: Annotated[str, "Experiment that it belongs to."]
    rank: Annotated[int, "Process that ran it, from 0."]
    cycle: Annotated[int, "Cycle that it belongs to, from 1."]
    attempt: Annotated[int, "Attempt that ran it: 1, and one more for each time the experiment was resumed."]
    request: Annotated[int, "Position of the prompt in the experiment's prompts, from 0."]
    batch: Annotated[int, "Batch it ran in, from 0, in order of execution."]
    input_tokens: Annotated[int, units.TOKEN, "Tokens of the prompt, without padding."]
    output_tokens: Annotated[int, units.TOKEN, "Tokens generated, the end token included, nothing after it."]
    input_truncated: Annotated[bool, "The prompt was cut to max_input_tokens."]
    finish_reason: Annotated[str, "stop (end token) or length (max_output_tokens)."]
    start_s: Annotated[float, units.SECOND, "When the engine took the request."]
    end_s: Annotated[float, units.SECOND, "When its last token was there."]
    latency_s: Annotated[
        float, units.SECOND, "end_s less arrived_s, or start_s where there is no queue; a padded batch shares it."
    ]
    prefill_s: Annotated[
        float | None, units.SECOND, "From start_s to the first token's logits; null where the engine cannot tell."
    ] = None
    arrived_s: Annotated[float | None, units.SECOND, "When it came into a queue; null where there is none."] = None
    queue_s: Annotated[float | None, units.SECOND, "start_s less arrived_s: how long it waited for its turn."] = None
    ttft_s: Annotated[
        float | None, units.SECOND, "Time to first token, from where latency_s begins; null unless streaming."
    ] = None
    tpot_s: Annotated[float | None, units.SECOND, "Time per output token after the first: the mean of itl_s."] = None
    itl_s: Annotated[list[float] | None, units.SECOND, "Inter-token latencies, one for each token after the first."] = (
        None
    )
    itl_spread: Annotated[
        bool | None, "Tokens that came in one chunk were spread over the time since the chunk before."
    ] = None


@dataclass(frozen=True)
class ProcessRecord:
    """What one worker process knows of one cycle, in one attempt at it.

    `phases` holds those of the attempt (idle, load), the same in each of its records, and the cycle's own (warm-up,
    measured). `window_opened_unix_s` is for comparing processes, not for measuring.
    """

    format_version: int
    lem_version: str
    experiment_id: str
    rank: int
    world_size: int
    status: Status
    started_at: str
    hostname: str
    cycle: int = 1
    attempt: int = 1
    config_sha256: str = ""
    backend: str = ""
    window_opened_unix_s: float | None = None
    error: ErrorInfo | None = None
    model: ModelInfo | None = None
    engine: EngineInfo | None = None
    phases: tuple[Phase, ...] = ()
    requests_planned: int = 0
    requests_completed: int = 0
    input_tokens: Annotated[int, units.TOKEN] = 0
    output_tokens: Annotated[int, units.TOKEN] = 0
    memory: Memory | None = None
    flops: Flops | None = None
    carbon: Carbon | None = None
    prefill: Prefill | None = None
    warmup: WarmupInfo | None = None
    cpu_load: CpuLoad | None = None
    counters: dict[str, float] | None = None
    environment: Environment | None = None
    warnings: tuple[Note, ...] = ()

    def phase(self, name: PhaseName) -> Phase | None:
        """Return the phase of that name, or None when the process did not get there."""
        return next((phase for phase in self.phases if phase.name == name), None)


@dataclass(frozen=True)
class ExperimentRow:
    """An experiment's row in the aggregated table.

    Energy columns are sums over all devices of a component. The headline `energy_j` is the GPUs' when it was
    read from them, else the sum of the estimates; `energy_source` and `energy_components` say which.

    With several cycles, what is counted, timed or metered is the mean over the cycles that were finished: it
    describes one pass over the prompts. Quotients, such as tokens per second, are those of the means, so that they
    agree with each other. The spread over the cycles is in the columns that end in `_sd`, `_cv`, `_ci95_low` and
    `_ci95_high`, around the mean of the cycles' own values.
    """

    experiment_id: Annotated[str, "Unique id of the experiment."]
    status: Annotated[str, "completed, failed or interrupted."]
    error: Annotated[str | None, "Why it did not complete."]
    started_at: Annotated[str, "Wall-clock start, ISO 8601 with offset; a label, not a measurement."]
    lem_version: Annotated[str, "Version of lem that measured."]
    hostname: Annotated[str, "Machine it ran on."]
    processes: Annotated[int, "Worker processes that wrote a record."]
    cycles_planned: Annotated[int, "Times that the prompts were to be measured."]
    cycles_completed: Annotated[int, "Cycles in which every prompt was finished."]
    resumed: Annotated[int, "Times that the experiment was resumed."]
    # what ran
    model: Annotated[str, "Model as asked for."]
    random_weights: Annotated[bool | None, "The weights are random: the text has no meaning, the work is real."]
    parameters: Annotated[int | None, "Parameters of the loaded model, an adapter's included."]
    backend: Annotated[str, "Inference backend."]
    engine_version: Annotated[str | None, "Version of the engine behind the backend."]
    device: Annotated[str | None, "Device the model ran on, by name."]
    dtype: Annotated[str | None, "Dtype of the weights as loaded, and of the arithmetic."]
    quantization: Annotated[str | None, "How the weights were quantized, or null."]
    adapter: Annotated[str | None, "LoRA adapter, or null."]
    weights_bytes: Annotated[int | None, units.BYTE, "Size of the weights as loaded."]
    dataset: Annotated[str, "Dataset choice."]
    prompts_sha256: Annotated[str, "Digest of the prompts in order: equal digests, equal prompts."]
    decoder: Annotated[str, "Decoder choice."]
    batching_strategy: Annotated[str, "Batching strategy."]
    batch_size: Annotated[int, units.REQUEST, "Requests in a batch, at most."]
    max_output_tokens: Annotated[int, units.TOKEN, "Limit on generated tokens of a request."]
    seed: Annotated[int, "Seed of the sampling."]
    # counted
    requests_planned: Annotated[int, units.REQUEST, "Prompts of the experiment."]
    requests_completed: Annotated[int, units.REQUEST, "Requests that have a row of their own."]
    input_tokens: Annotated[int, units.TOKEN, "Sum over the requests, without padding."]
    output_tokens: Annotated[int, units.TOKEN, "Sum over the requests, nothing after an end token."]
    # timed
    duration_s: Annotated[float | None, units.SECOND, "Wall-clock length of the measured window."]
    output_tokens_per_s: Annotated[float | None, units.TOKEN_PER_SECOND, "output_tokens / duration_s."]
    requests_per_s: Annotated[float | None, units.REQUEST_PER_SECOND, "requests_completed / duration_s."]
    latency_mean_s: Annotated[float | None, units.SECOND, "Mean latency of a request."]
    latency_p50_s: Annotated[float | None, units.SECOND, "Median latency of a request."]
    latency_p95_s: Annotated[float | None, units.SECOND, "95th percentile of the latency."]
    latency_p99_s: Annotated[float | None, units.SECOND, "99th percentile of the latency."]
    load_duration_s: Annotated[float | None, units.SECOND, "Loading the model, outside the window."]
    warmup_duration_s: Annotated[float | None, units.SECOND, "Warm-up, outside the window."]
    # metered
    energy_j: Annotated[float | None, units.JOULE, "Headline energy of the measured window, gross."]
    energy_source: Annotated[str | None, "counter, integral, estimate or replay."]
    energy_scope: Annotated[str | None, "What the headline covers: device, package, machine, shared_device."]
    energy_components: Annotated[str | None, "Components in the headline, such as gpu or cpu+dram."]
    gpu_energy_j: Annotated[float | None, units.JOULE, "GPUs in use, measured window."]
    gpu_energy_source: Annotated[str | None, "Source of gpu_energy_j."]
    cpu_energy_j: Annotated[float | None, units.JOULE, "CPUs, measured window."]
    cpu_energy_source: Annotated[str | None, "Source of cpu_energy_j."]
    dram_energy_j: Annotated[float | None, units.JOULE, "Main memory, measured window."]
    dram_energy_source: Annotated[str | None, "Source of dram_energy_j."]
    load_energy_j: Annotated[float | None, units.JOULE, "As energy_j, while the model was loaded."]
    warmup_energy_j: Annotated[float | None, units.JOULE, "As energy_j, during warm-up."]
    idle_power_before_w: Annotated[float | None, units.WATT, "Power before anything was loaded, headline components."]
    idle_power_loaded_w: Annotated[float | None, units.WATT, "Power with the model resident and nothing running."]
    energy_idle_adjusted_j: Annotated[
        float | None, units.JOULE, "energy_j less idle_power_loaded_w times duration_s; negative if so."
    ]
    trace_energy_j: Annotated[float | None, units.JOULE, "Integral of the GPU power trace, beside the counter."]
    counter_tick_s: Annotated[float | None, units.SECOND, "Coarsest tick of the GPU energy counters."]
    prefill_duration_s: Annotated[float | None, units.SECOND, "Time in which prompts were taken in."]
    decode_duration_s: Annotated[
        float | None, units.SECOND, "The rest of the window, less idle_share of it where that is known."
    ]
    prefill_energy_j: Annotated[float | None, units.JOULE, "Power trace over the prefill spans (integral)."]
    decode_energy_j: Annotated[
        float | None,
        units.JOULE,
        "energy_j less prefill_energy_j; negative if so; null with idle time, whose energy is not measured apart.",
    ]
    prefill_energy_uncertainty_j: Annotated[
        float | None, units.JOULE, "Bound on what the trace's period leaves open, of prefill and of decode."
    ]
    # derived
    energy_wh: Annotated[float | None, units.WATT_HOUR, "energy_j / 3600."]
    average_power_w: Annotated[float | None, units.WATT, "energy_j / duration_s."]
    energy_per_output_token_j: Annotated[float | None, units.JOULE_PER_TOKEN, "energy_j / output_tokens."]
    energy_per_request_j: Annotated[float | None, units.JOULE_PER_REQUEST, "energy_j / requests_completed."]
    co2e_g: Annotated[float | None, units.GRAM_CO2E, "energy_j times the carbon intensity."]
    carbon_intensity_g_per_kwh: Annotated[float | None, units.GRAM_CO2E_PER_KWH, "Carbon intensity used."]
    carbon_intensity_source: Annotated[str | None, "Where the carbon intensity comes from."]
    peak_memory_bytes: Annotated[int | None, units.BYTE, "Peak memory, the largest of the processes."]
    peak_memory_scope: Annotated[str | None, "What the peak covers."]
    flops: Annotated[float | None, units.FLOP, "Model FLOPs of the counted tokens."]
    flops_per_token: Annotated[float | None, units.FLOP_PER_TOKEN, "flops / (input_tokens + output_tokens)."]
    flops_per_s: Annotated[float | None, units.FLOP_PER_SECOND, "flops / duration_s."]
    flops_method: Annotated[str | None, "How the FLOPs were had."]
    peak_flops_per_s: Annotated[float | None, units.FLOP_PER_SECOND, "Datasheet peak of the GPUs for the dtype."]
    peak_flops_source: Annotated[str | None, "Where the peak is from."]
    mfu: Annotated[float | None, units.RATIO, "Model FLOPs utilisation: flops_per_s / peak_flops_per_s."]
    kv_cache_bytes: Annotated[
        int | None, units.BYTE, "Keys and values of the largest batch, padding included, by formula."
    ]
    warmup_prompts: Annotated[int | None, units.REQUEST, "Prompts that the warm-up ran."]
    warmup_ended: Annotated[str | None, "Why the warm-up ended: fixed, converged, max_prompts, max_s."]
    warmup_cv: Annotated[float | None, units.RATIO, "Coefficient of variation of its last latencies."]
    # token by token, when streaming
    ttft_mean_s: Annotated[float | None, units.SECOND, "Mean time to first token."] = None
    ttft_p50_s: Annotated[float | None, units.SECOND, "Median time to first token."] = None
    ttft_p95_s: Annotated[float | None, units.SECOND, "95th percentile of the time to first token."] = None
    ttft_p99_s: Annotated[float | None, units.SECOND, "99th percentile of the time to first token."] = None
    itl_mean_s: Annotated[float | None, units.SECOND, "Mean inter-token latency, over all tokens."] = None
    itl_p50_s: Annotated[float | None, units.SECOND, "Median inter-token latency, over all tokens."] = None
    itl_p95_s: Annotated[float | None, units.SECOND, "95th percentile of the inter-token latency, over all tokens."] = (
        None
    )
    itl_p99_s: Annotated[float | None, units.SECOND, "99th percentile of the inter-token latency, over all tokens."] = (
        None
    )
    tpot_mean_s: Annotated[float | None, units.SECOND, "Mean time per output token after the first."] = None
    tpot_p50_s: Annotated[float | None, units.SECOND, "Median time per output token after the first."] = None
    tpot_p95_s: Annotated[
        float | None, units.SECOND, "95th percentile of the time per output token after the first."
    ] = None
    tpot_p99_s: Annotated[
        float | None, units.SECOND, "99th percentile of the time per output token after the first."
    ] = None
    # under traffic
    arrival_rate_per_s: Annotated[float | None, units.REQUEST_PER_SECOND, "Rate at which requests arrived."] = None
    queue_mean_s: Annotated[float | None, units.SECOND, "Mean wait in the queue."] = None
    queue_p50_s: Annotated[float | None, units.SECOND, "Median wait in the queue."] = None
    queue_p95_s: Annotated[float | None, units.SECOND, "95th percentile of the wait in the queue."] = None
    queue_p99_s: Annotated[float | None, units.SECOND, "99th percentile of the wait in the queue."] = None
    idle_share: Annotated[
        float | None, units.RATIO, "Share of the window in which no request was there, in any process."
    ] = None
    goodput_requests_per_s: Annotated[
        float | None, units.REQUEST_PER_SECOND, "Requests that kept the limits on TTFT and ITL, by duration_s."
    ] = None
    # over the cycles
    energy_sd_j: Annotated[float | None, units.JOULE, "Standard deviation of energy_j over the cycles."] = None
    energy_cv: Annotated[float | None, units.RATIO, "Coefficient of variation of energy_j."] = None
    energy_ci95_low_j: Annotated[float | None, units.JOULE, "95 % t-interval of mean energy_j, lower end."] = None
    energy_ci95_high_j: Annotated[float | None, units.JOULE, "Upper end."] = None
    output_tokens_per_s_mean: Annotated[
        float | None, units.TOKEN_PER_SECOND, "Mean of the cycles' own rates: what the interval is around."
    ] = None
    output_tokens_per_s_sd: Annotated[float | None, units.TOKEN_PER_SECOND, "Of output_tokens_per_s."] = None
    output_tokens_per_s_cv: Annotated[float | None, units.RATIO, "Of output_tokens_per_s."] = None
    output_tokens_per_s_ci95_low: Annotated[float | None, units.TOKEN_PER_SECOND, "Lower end."] = None
    output_tokens_per_s_ci95_high: Annotated[float | None, units.TOKEN_PER_SECOND, "Upper end."] = None
    latency_mean_sd_s: Annotated[float | None, units.SECOND, "Of latency_mean_s, over the cycles."] = None
    latency_mean_cv: Annotated[float | None, units.RATIO, "Of latency_mean_s."] = None
    latency_mean_ci95_low_s: Annotated[float | None, units.SECOND, "Lower end."] = None
    latency_mean_ci95_high_s: Annotated[float | None, units.SECOND, "Upper end."] = None
    energy_per_output_token_mean_j: Annotated[
        float | None, units.JOULE_PER_TOKEN, "Mean of the cycles' own quotients: what the interval is around."
    ] = None
    energy_per_output_token_sd_j: Annotated[float | None, units.JOULE_PER_TOKEN, "Over the cycles."] = None
    energy_per_output_token_cv: Annotated[float | None, units.RATIO, "Of energy_per_output_token_j."] = None
    energy_per_output_token_ci95_low_j: Annotated[float | None, units.JOULE_PER_TOKEN, "Lower end."] = None
    energy_per_output_token_ci95_high_j: Annotated[float | None, units.JOULE_PER_TOKEN, "Upper end."] = None
    # for the record
    warnings: Annotated[list[str], "What to doubt, each as `code: sentence`; see the page on warnings."] = field(
        default_factory=list
    )
    overrides: Annotated[list[str], "Overrides given on the command line, in order."] = field(default_factory=list)
    config_json: Annotated[str, "The whole resolved configuration, as JSON."] = ""


@dataclass(frozen=True)
class CycleRow:
    """One cycle of an experiment: a pass over all its prompts. Columns mean what they mean for the experiment."""

    experiment_id: Annotated[str, "Experiment that it belongs to."]
    cycle: Annotated[int, "Cycle, from 1."]
    status: Annotated[str, "completed, failed or interrupted."]
    attempts: Annotated[int, "Attempts that it took: more than 1 when it was interrupted and resumed."]
    requests_completed: Annotated[int, units.REQUEST, "Requests that have a row of their own."]
    input_tokens: Annotated[int, units.TOKEN, "Sum over the requests, without padding."]
    output_tokens: Annotated[int, units.TOKEN, "Sum over the requests, nothing after an end token."]
    duration_s: Annotated[float | None, units.SECOND, "Wall-clock length of its windows."]
    output_tokens_per_s: Annotated[float | None, units.TOKEN_PER_SECOND, "output_tokens / duration_s."]
    requests_per_s: Annotated[float | None, units.REQUEST_PER_SECOND, "requests_completed / duration_s."]
    latency_mean_s: Annotated[float | None, units.SECOND, "Mean latency of a request."]
    latency_p50_s: Annotated[float | None, units.SECOND, "Median latency of a request."]
    latency_p95_s: Annotated[float | None, units.SECOND, "95th percentile of the latency."]
    latency_p99_s: Annotated[float | None, units.SECOND, "99th percentile of the latency."]
    warmup_duration_s: Annotated[float | None, units.SECOND, "Warm-up, outside the window."]
    energy_j: Annotated[float | None, units.JOULE, "Headline energy of its windows, gross."]
    energy_source: Annotated[str | None, "counter, integral, estimate or replay."]
    gpu_energy_j: Annotated[float | None, units.JOULE, "GPUs in use."]
    cpu_energy_j: Annotated[float | None, units.JOULE, "CPUs."]
    dram_energy_j: Annotated[float | None, units.JOULE, "Main memory."]
    energy_idle_adjusted_j: Annotated[float | None, units.JOULE, "energy_j less idle power times duration_s."]
    average_power_w: Annotated[float | None, units.WATT, "energy_j / duration_s."]
    energy_per_output_token_j: Annotated[float | None, units.JOULE_PER_TOKEN, "energy_j / output_tokens."]
    energy_per_request_j: Annotated[float | None, units.JOULE_PER_REQUEST, "energy_j / requests_completed."]
    prefill_duration_s: Annotated[float | None, units.SECOND, "Time in which prompts were taken in."]
    decode_duration_s: Annotated[
        float | None, units.SECOND, "The rest of the window, less idle_share of it where that is known."
    ]
    flops_per_s: Annotated[float | None, units.FLOP_PER_SECOND, "flops / duration_s."]
    mfu: Annotated[float | None, units.RATIO, "Model FLOPs utilisation."]
    # token by token, when streaming
    ttft_mean_s: Annotated[float | None, units.SECOND, "Mean time to first token."] = None
    ttft_p50_s: Annotated[float | None, units.SECOND, "Median time to first token."] = None
    ttft_p95_s: Annotated[float | None, units.SECOND, "95th percentile of the time to first token."] = None
    ttft_p99_s: Annotated[float | None, units.SECOND, "99th percentile of the time to first token."] = None
    itl_mean_s: Annotated[float | None, units.SECOND, "Mean inter-token latency, over all tokens."] = None
    itl_p50_s: Annotated[float | None, units.SECOND, "Median inter-token latency, over all tokens."] = None
    itl_p95_s: Annotated[float | None, units.SECOND, "95th percentile of the inter-token latency, over all tokens."] = (
        None
    )
    itl_p99_s: Annotated[float | None, units.SECOND, "99th percentile of the inter-token latency, over all tokens."] = (
        None
    )
    tpot_mean_s: Annotated[float | None, units.SECOND, "Mean time per output token after the first."] = None
    tpot_p50_s: Annotated[float | None, units.SECOND, "Median time per output token after the first."] = None
    tpot_p95_s: Annotated[
        float | None, units.SECOND, "95th percentile of the time per output token after the first."
    ] = None
    tpot_p99_s: Annotated[
        float | None, units.SECOND, "99th percentile of the time per output token after the first."
    ] = None
    # under traffic
    arrival_rate_per_s: Annotated[float | None, units.REQUEST_PER_SECOND, "Rate at which requests arrived."] = None
    queue_mean_s: Annotated[float | None, units.SECOND, "Mean wait in the queue."] = None
    queue_p50_s: Annotated[float | None, units.SECOND, "Median wait in the queue."] = None
    queue_p95_s: Annotated[float | None, units.SECOND, "95th percentile of the wait in the queue."] = None
    queue_p99_s: Annotated[float | None, units.SECOND, "99th percentile of the wait in the queue."] = None
    idle_share: Annotated[
        float | None, units.RATIO, "Share of the window in which no request was there, in any process."
    ] = None
    goodput_requests_per_s: Annotated[
        float | None, units.REQUEST_PER_SECOND, "Requests that kept the limits on TTFT and ITL, by duration_s."
    ] = None
    warnings: Annotated[list[str], "What to doubt about this cycle, each as `code: sentence`."] = field(
        default_factory=list
    )


def made(record_type: type[T], values: dict[str, Any]) -> T:
    """Return a record of all its fields' values, in a tenth of the time that a frozen dataclass takes to be made.

    For many records of values that have been checked. Nothing is left to defaults, and `values` belongs to the record
    from then on.
    """
    record = object.__new__(record_type)
    object.__setattr__(record, "__dict__", values)
    return record
