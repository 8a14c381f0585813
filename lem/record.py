"""What was measured: frozen dataclasses with units, the single source of the results' schema.

Three shapes: `ProcessRecord` is what one worker process writes (JSON), `RequestRecord` is a row for each
request (Parquet), `ExperimentRow` is the row that an experiment contributes to the aggregated table
(Parquet). A number that was not measured is None, never 0. This module does not know how anything is
measured, written or shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from lem import units

# History of the raw record's format:
# 1  first version
FORMAT_VERSION = 1

Status = Literal["completed", "failed", "interrupted"]
Component = Literal["gpu", "cpu", "dram", "module"]
Source = Literal["counter", "integral", "estimate", "replay"]
Scope = Literal["device", "package", "machine", "process", "shared_device"]
PhaseName = Literal["load", "warmup", "measured"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class EnergyReading:
    """Energy of one component over one window, and how far it can be trusted.

    `energy_j` is None when it could not be read; `reason` then says why.
    """

    component: Component
    source: Source
    scope: Scope
    device: str
    energy_j: Annotated[float | None, units.JOULE]
    method: str
    resolution_j: Annotated[float | None, units.JOULE] = None
    reason: str | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of the run with its own clock and energy; phases do not overlap."""

    name: PhaseName
    duration_s: Annotated[float, units.SECOND]
    energy: tuple[EnergyReading, ...] = ()


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
    """The model as it was loaded."""

    name: str
    revision: str | None
    architecture: str
    parameters: int
    random_weights: bool
    weights_bytes: Annotated[int, units.BYTE]
    dtype: str
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
    """Peak memory; None where nothing could be read."""

    peak_bytes: Annotated[int | None, units.BYTE]
    scope: str


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
class Environment:
    """The machine and the software; never holds a secret."""

    hostname: str
    os: str
    cpu_model: str
    cpu_threads: int
    memory_bytes: Annotated[int, units.BYTE]
    gpus: tuple[str, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class RequestRecord:
    """One request: exact tokens and its time in the measured window (t = 0 where the window opens)."""

    experiment_id: str
    rank: int
    request: Annotated[int, "Position of the prompt in the experiment's prompts, from 0."]
    batch: Annotated[int, "Batch it ran in, from 0, in order of execution."]
    input_tokens: Annotated[int, units.TOKEN, "Tokens of the prompt, without padding."]
    output_tokens: Annotated[int, units.TOKEN, "Tokens generated, the end token included, nothing after it."]
    input_truncated: Annotated[bool, "The prompt was cut to max_input_tokens."]
    finish_reason: Annotated[str, "stop (end token) or length (max_output_tokens)."]
    start_s: Annotated[float, units.SECOND, "When the engine took the request."]
    end_s: Annotated[float, units.SECOND, "When its last token was there."]
    latency_s: Annotated[float, units.SECOND, "end_s - start_s; requests of a static batch share it."]


@dataclass(frozen=True)
class ProcessRecord:
    """Everything that one worker process knows at its end."""

    format_version: int
    lem_version: str
    experiment_id: str
    rank: int
    world_size: int
    status: Status
    started_at: str
    hostname: str
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
    environment: Environment | None = None
    notes: tuple[Note, ...] = ()

    def phase(self, name: PhaseName) -> Phase | None:
        """Return the phase of that name, or None when the process did not get there."""
        return next((phase for phase in self.phases if phase.name == name), None)


@dataclass(frozen=True)
class ExperimentRow:
    """An experiment's row in the aggregated table.

    Energy columns are sums over all devices of a component. The headline `energy_j` is the GPUs' when it was
    read from them, else the sum of the estimates; `energy_source` and `energy_components` say which.
    """

    experiment_id: Annotated[str, "Unique id of the experiment."]
    status: Annotated[str, "completed, failed or interrupted."]
    error: Annotated[str | None, "Why it did not complete."]
    started_at: Annotated[str, "Wall-clock start, ISO 8601 with offset; a label, not a measurement."]
    lem_version: Annotated[str, "Version of lem that measured."]
    hostname: Annotated[str, "Machine it ran on."]
    processes: Annotated[int, "Worker processes that wrote a record."]
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
    # for the record
    notes: Annotated[list[str], "Codes and sentences that a reader of the numbers must know."] = field(
        default_factory=list
    )
    overrides: Annotated[list[str], "Overrides given on the command line, in order."] = field(default_factory=list)
    config_json: Annotated[str, "The whole resolved configuration, as JSON."] = ""
