"""Frozen structs, with units, for the measurements of one process: the single source of the raw files' schema.

A worker process writes one `ProcessRecord` per cycle (as JSON), one `RequestRecord` per request, and one `PowerRecord`
per sample of a power trace. The rows for experiments and cycles are in `lem.results.schema`. A number that was not
measured is None, never 0. This module knows nothing about how values are measured, written or displayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from lem import quantities

# History of the raw record's format:
# 1  first version
# 2  a record for each cycle and attempt; request rows in journals
FORMAT_VERSION = 2

# Fields that have the same value in all request rows of a measured window; the window's record holds them once.
COMMON = ("experiment_id", "rank", "cycle", "attempt")

# A reading covers a phase if it misses at most UNCOVERED_SHARE of the phase or at most UNCOVERED_S (one tick of a GPU's
# counter). In a short phase, UNCOVERED_S is limited to UNCOVERED_MOST of the phase, which is the relative error of a
# power sensor (Yang et al. 2024).
UNCOVERED_SHARE = 0.01
UNCOVERED_S = 0.1
UNCOVERED_MOST = 0.05

# Only the process of this rank meters energy, because each meter reads the energy of the whole node.
ENERGY_OWNER = 0

# The ranges of the numbers in a record. A file with a number outside its range was edited or is damaged, and is
# rejected. `MOST` is larger than any quantity of a run, but small enough to be summed and squared. Amounts have a lower
# maximum, except for FLOPs. An amount may be slightly below 0, because a difference of two times may be rounded. Other
# numbers, such as temperatures, may be negative. Integers have 64 bits, as in the tables.
MOST, ROUNDING = 1e30, 1e-6
Number = Annotated[float, Meta(ge=-MOST, le=MOST)]
Amount = Annotated[float, Meta(ge=-ROUNDING, lt=2.0**63)]
Operations = Annotated[float, Meta(ge=-ROUNDING, le=MOST)]
Integer = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]

Status = Literal["completed", "failed", "interrupted"]
Component = Literal["gpu", "cpu", "dram", "module"]
Source = Literal["counter", "integral", "estimate", "replay", "simulated"]
Scope = Literal["device", "package", "machine", "process", "shared_device"]
PhaseName = Literal["idle_before", "load", "idle_loaded", "warmup", "measured"]
WarmupEnd = Literal["fixed", "converged", "max_prompts", "max_s"]
FinishReason = Literal["stop", "length", "error"]


class EnergyReading(Struct, frozen=True, gc=False):
    """The energy of one component over one phase, and how it was obtained.

    `energy_j` is None if the energy could not be read; `reason` then says why. `resolution_s` is the counter's tick or
    the sampling period. `trace_energy_j` is the integral of the power trace, if any, over the same phase. `covered_s`
    is the length of the part of the phase that `energy_j` covers. This part begins when the phase opens; the lengths of
    several attempts are added up. If `covered_s` is None, as in records written by lem 0.1.0, `energy_j` covers the
    whole phase. `trace_reach_s` is the maximum age of the power that a trace sample reports: the sensor's averaging
    time, plus the driver's update period, plus the sampling period.
    """

    component: Component
    source: Source
    scope: Scope
    device: str
    energy_j: Annotated[Amount | None, quantities.JOULE]
    method: str
    resolution_j: Annotated[Amount | None, quantities.JOULE] = None
    resolution_s: Annotated[Amount | None, quantities.SECOND] = None
    trace_energy_j: Annotated[Amount | None, quantities.JOULE] = None
    reason: str | None = None
    covered_s: Annotated[Number | None, quantities.SECOND] = None
    trace_reach_s: Annotated[Number | None, quantities.SECOND] = None

    @property
    def is_measured(self) -> bool:
        """Whether a sensor measured the energy, in this run or when a replayed trace was recorded."""
        return self.source not in ("estimate", "simulated")

    def seconds_of(self, duration_s: float) -> float:
        """Return how many seconds of a phase of `duration_s` seconds this reading covers; 0 if it has no energy."""
        if self.energy_j is None:
            return 0.0
        return duration_s if self.covered_s is None else self.covered_s


def covering(readings: Iterable[EnergyReading], covered_s: float) -> tuple[EnergyReading, ...]:
    """Return the readings, with `covered_s` set in each that has an `energy_j` but no `covered_s` yet."""
    return tuple(
        r if r.energy_j is None or r.covered_s is not None else replace(r, covered_s=covered_s) for r in readings
    )


class EnergySoFar(Struct, frozen=True, gc=False):
    """The headline energy used from the opening of the measured window until `at_s`."""

    at_s: Annotated[Number, quantities.SECOND]
    energy_j: Annotated[Amount, quantities.JOULE]


class Phase(Struct, frozen=True, gc=False):
    """A part of a run with its own time and energy; phases do not overlap."""

    name: PhaseName
    duration_s: Annotated[Amount, quantities.SECOND]
    energy: tuple[EnergyReading, ...] = ()

    def usable(self) -> tuple[EnergyReading, ...]:
        """Return the readings; an energy that covers only part of the phase is replaced by None, with the reason."""
        if all(map(self.is_covered_by, self.energy)):
            return self.energy
        return tuple(r if self.is_covered_by(r) else _without_energy(r, self.duration_s) for r in self.energy)

    def is_covered_by(self, reading: EnergyReading) -> bool:
        """Return whether a reading covers the phase, except perhaps its edges; True for a reading without energy."""
        if reading.energy_j is None or reading.covered_s is None:
            return True
        missing_s = self.duration_s - reading.covered_s
        if missing_s <= UNCOVERED_SHARE * self.duration_s:
            return True
        return missing_s <= min(UNCOVERED_S, UNCOVERED_MOST * self.duration_s)


def _without_energy(reading: EnergyReading, duration_s: float) -> EnergyReading:
    part = f"the reading covers only {reading.seconds_of(duration_s):.3g} of {duration_s:.3g} s"
    reason = f"{part} ({reading.reason})" if reading.reason else part
    return replace(reading, energy_j=None, trace_energy_j=None, reason=reason)


class PowerSample(Struct, frozen=True, gc=False):
    """One sample of a power trace; `t_ns` comes from `time.perf_counter_ns`.

    `temperature_c` is None in most samples, because a meter reads the temperature less often than the power.
    """

    t_ns: int
    component: Component
    device: str
    power_w: Annotated[float, quantities.WATT]
    temperature_c: int | None = None


class PowerRecord(Struct, frozen=True, gc=False):
    """One sample of a power trace, as written to a file; `t_s` is 0 when the measured window opens."""

    experiment_id: str
    rank: int
    cycle: int
    attempt: int
    t_s: Annotated[float, quantities.SECOND, "Time of the sample; negative before the measured window opens."]
    component: Annotated[str, "Measured component, such as gpu."]
    device: Annotated[str, "UUID of the device."]
    power_w: Annotated[float, quantities.WATT, "Power reported by the driver at that time."]
    temperature_c: Annotated[
        int | None,
        quantities.CELSIUS,
        "Temperature reported by the driver; read about once a second, and null in the samples in between.",
    ] = None


class Prefill(Struct, frozen=True, gc=False):
    """The part of the measured window in which prompts were processed, up to the first token of each batch or request.

    `duration_s` is measured directly. It is None if other requests were decoding during more than 1% of this time,
    which then contains both kinds of work. `energy_j` is the integral of the power trace over the prefills. It is None
    if there is no usable trace, or if the prefills are short compared with the maximum age of the trace's samples.
    `uncertainty_j` bounds the error that this age causes in the energy of prefill and, equally, of decode. `reason`
    says why a value is None.
    """

    duration_s: Annotated[Amount | None, quantities.SECOND]
    energy_j: Annotated[Amount | None, quantities.JOULE] = None
    uncertainty_j: Annotated[Amount | None, quantities.JOULE] = None
    reason: str | None = None


class WarmupInfo(Struct, frozen=True, gc=False):
    """How long the warm-up ran, and why it ended."""

    prompts: Count
    ended: WarmupEnd
    cv: Number | None


class ErrorInfo(Struct, frozen=True, gc=False):
    """Why a process did not complete."""

    type: str
    message: str
    phase: str | None = None


class CodedWarning(Struct, frozen=True, gc=False):
    """A reason to doubt a number; `code` stays the same in later versions, and `text` is for people."""

    code: str
    text: str


class ModelInfo(Struct, frozen=True, gc=False):
    """The model as loaded; a field is None if it cannot be determined, for example for a model in a server.

    `weights_missing` names the weights that were initialized at random because the checkpoint lacks them.
    `weights_unexpected` names the checkpoint's weights that the model does not use. `weights_mismatched` names the
    weights with different shapes in the checkpoint and the model. Each field holds the first few names and a count of
    the rest.
    """

    name: str
    revision: str | None
    architecture: str
    parameters: Integer | None
    random_weights: bool
    weights_bytes: Annotated[Count | None, quantities.BYTE]
    dtype: str | None
    adapter: str | None = None
    quantization: str | None = None
    weights_missing: tuple[str, ...] | None = None
    weights_unexpected: tuple[str, ...] | None = None
    weights_mismatched: tuple[str, ...] | None = None
    # The dtype of the matrix products, if the engine sets it separately from the dtype of the weights.
    arithmetic: str | None = None


class EngineInfo(Struct, frozen=True, gc=False):
    """The engine that ran the model, and the settings that it actually used."""

    backend: str
    version: str
    device: str
    device_name: str
    settings: dict[str, str]


class Memory(Struct, frozen=True, gc=False):
    """Peak memory and the size of the key/value cache for the largest batch; None if they cannot be determined."""

    peak_bytes: Annotated[Count | None, quantities.BYTE]
    scope: str
    kv_cache_bytes: Annotated[Count | None, quantities.BYTE] = None


class Flops(Struct, frozen=True, gc=False):
    """Floating-point operations of the counted tokens (model FLOPs, without padding or recomputation)."""

    total: Annotated[Operations, quantities.FLOP]
    method: str


class Carbon(Struct, frozen=True, gc=False):
    """The carbon intensity that converts joules into grams of CO2e, and its source.

    `trace_sha256` is the digest of the file with intensities over time, if there was one. `until_unix_s` is set only
    while a window is open: `intensity_g_per_kwh` applies up to that time, and later intensities are not known yet.
    """

    intensity_g_per_kwh: Annotated[Amount, quantities.GRAM_CO2E_PER_KWH]
    source: str
    trace_sha256: str | None = None
    until_unix_s: Number | None = None


class ForeignProcess(Struct, frozen=True, gc=False):
    """A process that uses a GPU of the run but is not part of the run."""

    pid: Integer
    used_bytes: Annotated[Count | None, quantities.BYTE]
    name: str | None


class DeviceState(Struct, frozen=True, gc=False):
    """A GPU at one point in time; a field is None if the driver does not report it."""

    uuid: str
    sm_clock_mhz: Integer | None = None
    memory_clock_mhz: Integer | None = None
    max_sm_clock_mhz: Integer | None = None
    temperature_c: Integer | None = None
    power_limit_w: Annotated[Number | None, quantities.WATT] = None
    default_power_limit_w: Annotated[Number | None, quantities.WATT] = None
    persistence: bool | None = None
    ecc: bool | None = None
    mig: bool | None = None
    throttle_reasons: tuple[str, ...] | None = None
    foreign_processes: tuple[ForeignProcess, ...] | None = None


class DeviceWindow(Struct, frozen=True, gc=False):
    """Observations of a GPU during the measured window; a field is None if the driver does not report it.

    `throttled_s` says how long each driver policy held the clocks down, according to the driver's own counters.
    `reasons` gives the share of samples in which each throttle reason was active. `foreign_processes` lists the
    processes seen on the GPU that are not part of the run.
    """

    uuid: str
    duration_s: Annotated[Amount, quantities.SECOND]
    throttled_s: dict[str, Number] | None = None
    reasons: dict[str, Number] | None = None
    foreign_processes: tuple[ForeignProcess, ...] | None = None


class Environment(Struct, frozen=True, gc=False):
    """The machine and its software; never contains secrets."""

    hostname: str
    os: str
    cpu_model: str
    cpu_threads: Integer
    memory_bytes: Annotated[Count, quantities.BYTE]
    gpus: tuple[str, ...]
    versions: dict[str, str]
    cpu_governor: str | None = None
    driver_version: str | None = None
    cuda_version: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    container: str | None = None
    slurm: dict[str, str] = {}
    devices_before: tuple[DeviceState, ...] = ()
    devices_after: tuple[DeviceState, ...] = ()


class CpuLoad(Struct, frozen=True, gc=False):
    """The average number of cores kept busy in the window: by all processes, and by this process and its children."""

    machine_cores: Amount
    process_cores: Amount


class OwnTime(Struct, frozen=True, gc=False):
    """The time that a process spent on work without a phase of its own.

    `import_s` is the time for starting the engine, which imports its libraries, and `encode_s` the time for tokenizing
    the prompts; both happen once in an attempt, outside the phases. `recording_s` is the part of the measured window
    that was spent on reading the meter and writing the journal between batches; what is written while the device works
    on the next batch is not included. A time is None if the work was not finished.
    """

    import_s: Annotated[Amount | None, quantities.SECOND] = None
    encode_s: Annotated[Amount | None, quantities.SECOND] = None
    recording_s: Annotated[Amount | None, quantities.SECOND] = None


class UnderWay(Struct, frozen=True, gc=False):
    """The requests in flight at some moment in a window, and the work already spent on them.

    `request_s` is the total time spent on these requests so far, and `longest_s` is the longest time spent on any one
    of them. Both are upper bounds if the engine does not report when it began a request. `output_tokens` is None if the
    engine delivers no tokens of a request before the request has finished.
    """

    requests: Integer = 0
    output_tokens: Annotated[Count | None, quantities.TOKEN] = 0
    request_s: Annotated[Number, quantities.SECOND] = 0.0
    longest_s: Annotated[Number, quantities.SECOND] = 0.0


class Cut(Struct, frozen=True, gc=False):
    """The early end of an interrupted window, or of several interrupted windows.

    The next attempt reruns the requests that were in flight when the window ended, but the time and energy already
    spent on them stay in this window. At most `under_way.longest_s` seconds therefore count twice. `lost_s` is the
    time between the end of the window and the interruption, or None if unknown. `energy_behind_s` is the time between
    the last reading of the energy and the end of the window, or None if the energy was not read.
    """

    windows: Integer = 1
    lost_s: Annotated[Number | None, quantities.SECOND] = None
    energy_behind_s: Annotated[Number | None, quantities.SECOND] = None
    under_way: UnderWay = UnderWay()


class RequestRecord(Struct, frozen=True, gc=False, kw_only=True):
    """One request: its exact token counts, and its times in the measured window (t = 0 when the window opens)."""

    experiment_id: Annotated[str, "Id of the request's experiment."] = ""
    rank: Annotated[Integer, "Rank of the process that ran the request, counted from 0."] = 0
    cycle: Annotated[Integer, "Cycle in which the request ran, counted from 1."] = 1
    attempt: Annotated[Integer, "Attempt that ran the request, counted from 1; each resume starts a new attempt."] = 1
    request: Annotated[Integer, "Position of the prompt among the experiment's prompts, counted from 0."]
    batch: Annotated[Integer, "Batch in which the request ran, counted from 0 in order of execution."]
    input_tokens: Annotated[Count, quantities.TOKEN, "Number of tokens in the prompt, without padding."]
    output_tokens: Annotated[
        Count | None,
        quantities.TOKEN,
        "Number of generated tokens, including the end token; null if the request failed.",
    ]
    input_truncated: Annotated[bool, "Whether the prompt was truncated to max_input_tokens."]
    finish_reason: Annotated[str, "Why generation ended: stop (end token), length (max_output_tokens) or error."]
    start_s: Annotated[
        Number, quantities.SECOND, "When the engine started the request or, with a server, when the request was sent."
    ]
    end_s: Annotated[Number, quantities.SECOND, "When the last token was available, or when the request failed."]
    latency_s: Annotated[
        Amount | None,
        quantities.SECOND,
        "end_s minus arrived_s; without traffic, end_s minus start_s (the same for all requests of a padded batch). "
        "Null if the request failed.",
    ]
    prefill_s: Annotated[
        Number | None,
        quantities.SECOND,
        "Time from start_s to the first token's logits, including any work for other requests in between; null if the "
        "engine does not report it.",
    ] = None
    arrived_s: Annotated[
        Number | None,
        quantities.SECOND,
        "When the request arrived; null without traffic. Negative if the request arrived before the window of a "
        "resumed cycle opened.",
    ] = None
    queue_s: Annotated[
        Number | None,
        quantities.SECOND,
        "Time in the queue: start_s minus arrived_s; null without traffic, or if the engine does not report when it "
        "started the request.",
    ] = None
    ttft_s: Annotated[
        Amount | None,
        quantities.SECOND,
        "Time to first token, counted from the same moment as latency_s; null unless streaming.",
    ] = None
    tpot_s: Annotated[Amount | None, quantities.SECOND, "Time per output token after the first: the mean of itl_s."] = (
        None
    )
    itl_s: Annotated[
        list[Amount] | None, quantities.SECOND, "Inter-token latencies, one per token after the first."
    ] = None
    itl_spread: Annotated[
        bool | None,
        "Whether itl_s was computed by spreading the tokens of a chunk evenly over the time since the previous chunk.",
    ] = None
    error: Annotated[str | None, "Why the request failed; null if it succeeded."] = None


class ProcessRecord(Struct, frozen=True, gc=False):
    """Everything that one worker process recorded about one attempt at one cycle.

    `phases` holds the phases of the cycle (warm-up, measured) and of the attempt (idle, load). An attempt's phases are
    repeated in each of its records. `window_opened_unix_s` is for comparing processes, not for measuring. With
    continuous batching, `energy_so_far` holds a sample of the energy readings taken during the window. `cut` is None if
    the window was not cut short. `arrivals_from_s` is the time on the arrival clock when the window opened: the total
    measured time of the cycle's earlier attempts. It is None without traffic. `slurm_job_id` and `slurm_node` are None
    outside Slurm. `hostname` is None if no process of the attempt ran.
    """

    format_version: Integer
    lem_version: str
    experiment_id: str
    rank: Integer
    world_size: Integer
    status: Status
    started_at: str
    hostname: str | None
    cycle: Integer = 1
    attempt: Integer = 1
    config_sha256: str = ""
    backend: str = ""
    window_opened_unix_s: Number | None = None
    error: ErrorInfo | None = None
    slurm_job_id: str | None = None
    slurm_node: str | None = None
    model: ModelInfo | None = None
    engine: EngineInfo | None = None
    phases: tuple[Phase, ...] = ()
    requests_planned: Count = 0
    requests_completed: Count = 0
    requests_failed: Count = 0
    input_tokens: Annotated[Count, quantities.TOKEN] = 0
    output_tokens: Annotated[Count, quantities.TOKEN] = 0
    memory: Memory | None = None
    flops: Flops | None = None
    carbon: Carbon | None = None
    prefill: Prefill | None = None
    warmup: WarmupInfo | None = None
    cpu_load: CpuLoad | None = None
    cut: Cut | None = None
    arrivals_from_s: Annotated[Number | None, quantities.SECOND] = None
    counters: dict[str, Amount] | None = None
    energy_so_far: tuple[EnergySoFar, ...] = ()
    environment: Environment | None = None
    warnings: tuple[CodedWarning, ...] = ()
    devices_during: tuple[DeviceWindow, ...] = ()
    own_time: OwnTime | None = None

    def phase(self, name: PhaseName) -> Phase | None:
        """Return the phase with this name, or None if the process did not reach it."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        return None
