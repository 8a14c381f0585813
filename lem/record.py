"""The measurements of one process, as frozen structs with units: the single source of the raw files' schema.

A worker process writes one `ProcessRecord` per cycle (as JSON), one `RequestRecord` per request, and one `PowerRecord`
per sample of a power trace. The rows for experiments and cycles are in `lem.results.schema`. A number that was not
measured is None, never 0. This module knows nothing about how values are measured, written or displayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Struct
from msgspec.structs import replace

from lem import units

# History of the raw record's format:
# 1  first version
# 2  a record for each cycle and attempt; request rows in journals
FORMAT_VERSION = 2

# Fields that have the same value in all request rows of a measured window; the window's record holds them once.
COMMON = ("experiment_id", "rank", "cycle", "attempt")

# A reading covers a phase if the part it misses is at most this share of the phase, or one tick of a GPU's counter
# (any window can miss a tick at its edge), but never more than the proportional error of sensors (Yang et al. 2024).
UNCOVERED_SHARE = 0.01
UNCOVERED_S = 0.1
UNCOVERED_MOST = 0.05

# Only one process meters the node, however many there are, because every meter sees the whole node's energy.
ENERGY_OWNER = 0

Status = Literal["completed", "failed", "interrupted"]
Component = Literal["gpu", "cpu", "dram", "module"]
Source = Literal["counter", "integral", "estimate", "replay", "simulated"]
Scope = Literal["device", "package", "machine", "process", "shared_device"]
PhaseName = Literal["idle_before", "load", "idle_loaded", "warmup", "measured"]
WarmupEnd = Literal["fixed", "converged", "max_prompts", "max_s"]
FinishReason = Literal["stop", "length", "error"]


class EnergyReading(Struct, frozen=True, gc=False):
    """Energy of one component over one window, and how it was obtained.

    `energy_j` is None if the energy could not be read; `reason` then says why. `resolution_s` is the counter's tick or
    the sampling period. `trace_energy_j` is the integral of the power trace, if any, over the same window.
    `covered_s` is the time that `energy_j` covers, counted from the opening of the phase and summed over the attempts
    at a window. None (as in records written by 0.1.0) means the whole phase.
    `trace_reach_s` is the maximum age of the power that a trace sample reports: the sensor's averaging time, plus the
    driver's update period, plus the sampling period.
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
    covered_s: Annotated[float | None, units.SECOND] = None
    trace_reach_s: Annotated[float | None, units.SECOND] = None

    @property
    def is_measured(self) -> bool:
        """Whether the energy came from a sensor (in this run or in a replayed trace), not from a model of the power."""
        return self.source not in ("estimate", "simulated")

    def seconds_of(self, duration_s: float) -> float:
        """Return how many seconds this reading covers of a phase that took `duration_s`; 0 if it has no energy."""
        if self.energy_j is None:
            return 0.0
        return duration_s if self.covered_s is None else self.covered_s


def covering(readings: Iterable[EnergyReading], covered_s: float) -> tuple[EnergyReading, ...]:
    """Return the readings with `covered_s` filled in wherever the meter did not set it itself."""
    return tuple(
        r if r.energy_j is None or r.covered_s is not None else replace(r, covered_s=covered_s) for r in readings
    )


class EnergySoFar(Struct, frozen=True, gc=False):
    """The headline energy from the opening of the measured window to a point inside it, as read at that point."""

    at_s: Annotated[float, units.SECOND]
    energy_j: Annotated[float, units.JOULE]


class Phase(Struct, frozen=True, gc=False):
    """A stretch of the run with its own clock and energy; phases do not overlap."""

    name: PhaseName
    duration_s: Annotated[float, units.SECOND]
    energy: tuple[EnergyReading, ...] = ()

    def usable(self) -> tuple[EnergyReading, ...]:
        """Return the readings; if one covers only part of the phase, its energy is replaced with None and a reason."""
        if all(map(self.is_covered_by, self.energy)):
            return self.energy
        return tuple(r if self.is_covered_by(r) else _without_energy(r, self.duration_s) for r in self.energy)

    def is_covered_by(self, reading: EnergyReading) -> bool:
        """Return whether a reading covers the phase to within the uncertainty at its edges, or has no energy at all."""
        if reading.energy_j is None or reading.covered_s is None:
            return True
        edge_s = min(UNCOVERED_S, UNCOVERED_MOST * self.duration_s)
        return self.duration_s - reading.covered_s <= max(edge_s, UNCOVERED_SHARE * self.duration_s)


def _without_energy(reading: EnergyReading, duration_s: float) -> EnergyReading:
    part = f"it covers only {reading.seconds_of(duration_s):.3g} of {duration_s:.3g} s"
    reason = f"{part} ({reading.reason})" if reading.reason else part
    return replace(reading, energy_j=None, trace_energy_j=None, reason=reason)


class PowerSample(Struct, frozen=True, gc=False):
    """One sample of a power trace; `t_ns` is a reading of `time.perf_counter_ns`."""

    t_ns: int
    component: Component
    device: str
    power_w: Annotated[float, units.WATT]


class PowerRecord(Struct, frozen=True, gc=False):
    """One sample of a power trace, as written to file (t = 0 when the measured window opens)."""

    experiment_id: str
    rank: int
    cycle: int
    attempt: int
    t_s: Annotated[float, units.SECOND, "Time of the sample; negative if before the measured window."]
    component: Annotated[str, "Measured component, such as gpu."]
    device: Annotated[str, "UUID of the device."]
    power_w: Annotated[float, units.WATT, "Power reported by the driver at that time."]


class Prefill(Struct, frozen=True, gc=False):
    """The part of the measured window in which prompts were processed, up to the first token of each batch or request.

    Time is measured directly. It is None if other requests were decoding at the same time, because the time spans then
    contain both kinds of work. Energy is the integral of the power trace over the prefill spans. It is None without a
    trace, or if the spans are short compared with the age that the trace's samples can have; `uncertainty_j` bounds the
    resulting error, and applies equally to the energy of decode, which is the rest of the window. `reason` says why a
    value is None.
    """

    duration_s: Annotated[float | None, units.SECOND]
    energy_j: Annotated[float | None, units.JOULE] = None
    uncertainty_j: Annotated[float | None, units.JOULE] = None
    reason: str | None = None


class WarmupInfo(Struct, frozen=True, gc=False):
    """How long the warm-up ran, and why it ended."""

    prompts: int
    ended: WarmupEnd
    cv: float | None


class ErrorInfo(Struct, frozen=True, gc=False):
    """Why a process did not complete."""

    type: str
    message: str
    phase: str | None = None


class CodedWarning(Struct, frozen=True, gc=False):
    """A caveat that readers of the numbers need to know; `code` is stable, `text` is for people."""

    code: str
    text: str


class ModelInfo(Struct, frozen=True, gc=False):
    """The model as loaded; a field is None if it cannot be determined, for example for a model in a server.

    `weights_missing` names weights that the checkpoint lacks and that were initialised at random, `weights_unexpected`
    weights that the model does not use, and `weights_mismatched` weights of a different shape. Each holds the first few
    names and a count of the rest.
    """

    name: str
    revision: str | None
    architecture: str
    parameters: int | None
    random_weights: bool
    weights_bytes: Annotated[int | None, units.BYTE]
    dtype: str | None
    adapter: str | None = None
    quantization: str | None = None
    weights_missing: tuple[str, ...] | None = None
    weights_unexpected: tuple[str, ...] | None = None
    weights_mismatched: tuple[str, ...] | None = None
    # The dtype of the matrix products, if the engine takes it as a setting separate from the dtype of the weights.
    arithmetic: str | None = None


class EngineInfo(Struct, frozen=True, gc=False):
    """The engine that ran the model, and the settings that it actually used."""

    backend: str
    version: str
    device: str
    device_name: str
    settings: dict[str, str]


class Memory(Struct, frozen=True, gc=False):
    """Peak memory, and the key/value cache allocated for the largest batch; None if it cannot be determined."""

    peak_bytes: Annotated[int | None, units.BYTE]
    scope: str
    kv_cache_bytes: Annotated[int | None, units.BYTE] = None


class Flops(Struct, frozen=True, gc=False):
    """Floating-point operations of the counted tokens (model FLOPs, without padding or recomputation)."""

    total: Annotated[float, units.FLOP]
    method: str


class Carbon(Struct, frozen=True, gc=False):
    """Carbon intensity that turns joules into grams of CO2e."""

    intensity_g_per_kwh: Annotated[float, units.GRAM_CO2E_PER_KWH]
    source: str


class ForeignProcess(Struct, frozen=True, gc=False):
    """A process that is not part of the run but computes on a GPU."""

    pid: int
    used_bytes: Annotated[int | None, units.BYTE]
    name: str | None


class DeviceState(Struct, frozen=True, gc=False):
    """A GPU at one point in time; a field is None if the driver does not report it."""

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


class DeviceWindow(Struct, frozen=True, gc=False):
    """Observations of a GPU during the measured window; a field is None if the driver does not report it.

    `throttled_s` is how long each of the driver's policies held clocks down, according to the driver's own counters.
    `reasons` is the share of samples in which each throttle reason was active. `foreign_processes` lists every process
    seen on the GPU that is not part of the run.
    """

    uuid: str
    duration_s: Annotated[float, units.SECOND]
    throttled_s: dict[str, float] | None = None
    reasons: dict[str, float] | None = None
    foreign_processes: tuple[ForeignProcess, ...] | None = None


class Environment(Struct, frozen=True, gc=False):
    """The machine and its software; never contains secrets."""

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
    slurm: dict[str, str] = {}
    devices_before: tuple[DeviceState, ...] = ()
    devices_after: tuple[DeviceState, ...] = ()


class CpuLoad(Struct, frozen=True, gc=False):
    """CPU load in the measured window, in busy cores, for the whole machine and for this process with its children."""

    machine_cores: float
    process_cores: float


class UnderWay(Struct, frozen=True, gc=False):
    """The requests that an engine is working on at some point in a window, and the work already spent on them.

    `request_s` is the total time spent on these requests so far, and `longest_s` the longest time spent on any of them.
    Both are upper bounds if the engine does not report when it began a request. `output_tokens` is None if the engine
    delivers a request's tokens only once it is finished.
    """

    requests: int = 0
    output_tokens: Annotated[int | None, units.TOKEN] = 0
    request_s: Annotated[float, units.SECOND] = 0.0
    longest_s: Annotated[float, units.SECOND] = 0.0


class Cut(Struct, frozen=True, gc=False):
    """The end of a measured window that was cut short, or of several such windows.

    The next attempt runs the requests in flight at the end of the window again, although the time and energy spent on
    them remain in this window. Repeating them takes at most `under_way.longest_s`. `lost_s` is the time between the end
    of the window and the interruption, None if unknown. `energy_behind_s` is how long before the end of the window its
    energy was last read, None if it was not read.
    """

    windows: int = 1
    lost_s: Annotated[float | None, units.SECOND] = None
    energy_behind_s: Annotated[float | None, units.SECOND] = None
    under_way: UnderWay = UnderWay()


class RequestRecord(Struct, frozen=True, gc=False, kw_only=True):
    """One request: its exact token counts, and its times in the measured window (t = 0 when the window opens)."""

    experiment_id: Annotated[str, "Id of the request's experiment."] = ""
    rank: Annotated[int, "Process that ran the request, from 0."] = 0
    cycle: Annotated[int, "Cycle of the request, from 1."] = 1
    attempt: Annotated[int, "Attempt that ran the request: 1, plus one for each time the experiment was resumed."] = 1
    request: Annotated[int, "Position of the prompt in the experiment's prompts, from 0."]
    batch: Annotated[int, "Batch that the request ran in, from 0, in order of execution."]
    input_tokens: Annotated[int, units.TOKEN, "Number of tokens in the prompt, without padding."]
    output_tokens: Annotated[
        int | None, units.TOKEN, "Number of generated tokens, including the end token; null if the request failed."
    ]
    input_truncated: Annotated[bool, "Whether the prompt was cut to max_input_tokens."]
    finish_reason: Annotated[str, "Why generation ended: stop (end token), length (max_output_tokens) or error."]
    start_s: Annotated[float, units.SECOND, "When the engine or server was given the request."]
    end_s: Annotated[float, units.SECOND, "When the last token was available, or when the request failed."]
    latency_s: Annotated[
        float | None,
        units.SECOND,
        "end_s minus arrived_s, or minus start_s if there is no queue. The same for all requests of a padded batch; "
        "null if the request failed.",
    ]
    prefill_s: Annotated[
        float | None,
        units.SECOND,
        "From start_s to the first token's logits, including work that the engine does for other requests in between; "
        "null if the engine does not report it.",
    ] = None
    arrived_s: Annotated[
        float | None,
        units.SECOND,
        "When the request arrived; negative if it arrived before the window of a resumed cycle opened; null without "
        "traffic.",
    ] = None
    queue_s: Annotated[float | None, units.SECOND, "start_s minus arrived_s: how long the request waited."] = None
    ttft_s: Annotated[
        float | None, units.SECOND, "Time to first token, with the same start as latency_s; null unless streaming."
    ] = None
    tpot_s: Annotated[float | None, units.SECOND, "Time per output token after the first: the mean of itl_s."] = None
    itl_s: Annotated[list[float] | None, units.SECOND, "Inter-token latencies, one per token after the first."] = None
    itl_spread: Annotated[
        bool | None, "Whether tokens that came in one chunk were spread over the time since the previous chunk."
    ] = None
    error: Annotated[str | None, "Why the request failed; null if it did not."] = None


class ProcessRecord(Struct, frozen=True, gc=False):
    """Everything that one worker process recorded about one attempt at one cycle.

    `phases` holds the phases of the attempt (idle, load), repeated in each of its records, and those of the cycle
    (warm-up, measured). `window_opened_unix_s` is for comparing processes, not for measuring. With continuous batching,
    `energy_so_far` holds energy readings taken when some of the requests finished. `cut` is None if the window was not
    cut short. `arrivals_from_s` is the position of the window's opening on the clock of the cycle's arrivals, that is,
    the measured time of the previous attempts; None without traffic.
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
    requests_failed: int = 0
    input_tokens: Annotated[int, units.TOKEN] = 0
    output_tokens: Annotated[int, units.TOKEN] = 0
    memory: Memory | None = None
    flops: Flops | None = None
    carbon: Carbon | None = None
    prefill: Prefill | None = None
    warmup: WarmupInfo | None = None
    cpu_load: CpuLoad | None = None
    cut: Cut | None = None
    arrivals_from_s: Annotated[float | None, units.SECOND] = None
    counters: dict[str, float] | None = None
    energy_so_far: tuple[EnergySoFar, ...] = ()
    environment: Environment | None = None
    warnings: tuple[CodedWarning, ...] = ()
    devices_during: tuple[DeviceWindow, ...] = ()

    def phase(self, name: PhaseName) -> Phase | None:
        """Return the phase with this name, or None if the process did not reach it."""
        return next((phase for phase in self.phases if phase.name == name), None)
