"""What one process measured: frozen structs with units, the single source of the raw files' schema.

`ProcessRecord` is what one worker process writes for a cycle (JSON), `RequestRecord` a row for each request,
`PowerRecord` a sample of a power trace. The rows of experiments and cycles are in `lem.results.schema`. A number that
was not measured is None, never 0. Does not know how anything is measured, written or shown.
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

# What all request rows of a measured window share; stated in its record.
COMMON = ("experiment_id", "rank", "cycle", "attempt")

# A reading covers a phase if it leaves out no more than this share, or a tick of a GPU's counter, which any window may
# lack at its edge; but never more than the proportional error of sensors (Yang et al. 2024).
UNCOVERED_SHARE = 0.01
UNCOVERED_S = 0.1
UNCOVERED_MOST = 0.05

# Only one process meters the node, however many there are, because each would see all of its energy.
ENERGY_OWNER = 0

Status = Literal["completed", "failed", "interrupted"]
Component = Literal["gpu", "cpu", "dram", "module"]
Source = Literal["counter", "integral", "estimate", "replay"]
Scope = Literal["device", "package", "machine", "process", "shared_device"]
PhaseName = Literal["idle_before", "load", "idle_loaded", "warmup", "measured"]
WarmupEnd = Literal["fixed", "converged", "max_prompts", "max_s"]
FinishReason = Literal["stop", "length", "error"]


class EnergyReading(Struct, frozen=True, gc=False):
    """Energy of one component over one window, and how far it can be trusted.

    `energy_j` is None if it could not be read; `reason` then says why. `resolution_s` is the tick of a counter or
    the period of the samples, `trace_energy_j` the integral of the power trace over the same window, if there is one.
    `covered_s` is the time that `energy_j` covers, from the opening of the phase; over several attempts at a window, it
    is the sum. None, as in records of 0.1.0, stands for all of the phase.
    `trace_reach_s` is how old the power that a sample of the trace reports may be: what the sensor averages over,
    the driver's update period and that of the samples.
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
        """Whether a sensor was read, now or when a replayed trace was recorded, rather than power estimated."""
        return self.source != "estimate"

    def seconds_of(self, duration_s: float) -> float:
        """Return how many seconds of a phase of this length the energy covers; 0 if there is none."""
        if self.energy_j is None:
            return 0.0
        return duration_s if self.covered_s is None else self.covered_s


def covering(readings: Iterable[EnergyReading], covered_s: float) -> tuple[EnergyReading, ...]:
    """Return readings that say which time they cover: this, unless the meter has said so itself."""
    return tuple(
        r if r.energy_j is None or r.covered_s is not None else replace(r, covered_s=covered_s) for r in readings
    )


class EnergySoFar(Struct, frozen=True, gc=False):
    """The headline energy of the measured window up to a time in it, as the meter had it then."""

    at_s: Annotated[float, units.SECOND]
    energy_j: Annotated[float, units.JOULE]


class Phase(Struct, frozen=True, gc=False):
    """A stretch of the run with its own clock and energy; phases do not overlap."""

    name: PhaseName
    duration_s: Annotated[float, units.SECOND]
    energy: tuple[EnergyReading, ...] = ()

    def usable(self) -> tuple[EnergyReading, ...]:
        """Return the readings; one that does not cover all of the phase has no energy, and the reason."""
        if all(map(self.is_covered_by, self.energy)):
            return self.energy
        return tuple(r if self.is_covered_by(r) else _without_energy(r, self.duration_s) for r in self.energy)

    def is_covered_by(self, reading: EnergyReading) -> bool:
        """Return whether a reading has no energy, or covers the phase up to what is uncertain at its edges anyway."""
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
    """One sample of a power trace, as it is written (t = 0 when the measured window opens)."""

    experiment_id: str
    rank: int
    cycle: int
    attempt: int
    t_s: Annotated[float, units.SECOND, "Time of the sample; negative before the measured window."]
    component: Annotated[str, "Component, such as gpu."]
    device: Annotated[str, "Device, by UUID."]
    power_w: Annotated[float, units.WATT, "Power reported by the driver at that time."]


class Prefill(Struct, frozen=True, gc=False):
    """The part of the measured window in which prompts were processed, until the first token of each batch or request.

    Time is measured directly; it is None if other requests were decoding meanwhile, because the spans then hold both.
    Energy is the integral of the power trace over those spans, None without a trace or if they are short against how
    far back its samples reach; `uncertainty_j` bounds the error from that, and also applies to the decode part, which
    is the rest of the window. `reason` says why a value is None.
    """

    duration_s: Annotated[float | None, units.SECOND]
    energy_j: Annotated[float | None, units.JOULE] = None
    uncertainty_j: Annotated[float | None, units.JOULE] = None
    reason: str | None = None


class WarmupInfo(Struct, frozen=True, gc=False):
    """What the warm-up did and why it ended."""

    prompts: int
    ended: WarmupEnd
    cv: float | None


class ErrorInfo(Struct, frozen=True, gc=False):
    """Why a process did not complete."""

    type: str
    message: str
    phase: str | None = None


class CodedWarning(Struct, frozen=True, gc=False):
    """Something a reader of the numbers must know; `code` is stable, `text` is for people."""

    code: str
    text: str


class ModelInfo(Struct, frozen=True, gc=False):
    """The model as it was loaded; a field is None if it cannot be determined, as for a model in a server.

    `weights_missing` are those that the checkpoint lacks and that were drawn at random, `weights_unexpected` those that
    it has in addition, `weights_mismatched` those whose shapes differ: the first names, and a count of the rest.
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
    # The dtype of the matrix products, where the engine is told it apart from that of the weights.
    arithmetic: str | None = None


class EngineInfo(Struct, frozen=True, gc=False):
    """The engine that ran the model and the settings it really used."""

    backend: str
    version: str
    device: str
    device_name: str
    settings: dict[str, str]


class Memory(Struct, frozen=True, gc=False):
    """Peak memory, and the largest batch's key/value cache as it was allocated; None if it cannot be determined."""

    peak_bytes: Annotated[int | None, units.BYTE]
    scope: str
    kv_cache_bytes: Annotated[int | None, units.BYTE] = None


class Flops(Struct, frozen=True, gc=False):
    """Floating-point operations of the counted tokens (model FLOPs: no padding, no recomputation)."""

    total: Annotated[float, units.FLOP]
    method: str


class Carbon(Struct, frozen=True, gc=False):
    """Carbon intensity that turns joules into grams of CO2e."""

    intensity_g_per_kwh: Annotated[float, units.GRAM_CO2E_PER_KWH]
    source: str


class ForeignProcess(Struct, frozen=True, gc=False):
    """A process other than ours that computes on a GPU."""

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
    """What happened to a GPU while the window was measured; a field is None if the driver does not report it.

    `throttled_s` is how long each of the driver's policies held clocks down, by the driver's own counters, `reasons`
    the share of samples in which each reason was in force, and `foreign_processes` every other process that was seen.
    """

    uuid: str
    duration_s: Annotated[float, units.SECOND]
    throttled_s: dict[str, float] | None = None
    reasons: dict[str, float] | None = None
    foreign_processes: tuple[ForeignProcess, ...] | None = None


class Environment(Struct, frozen=True, gc=False):
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
    slurm: dict[str, str] = {}
    devices_before: tuple[DeviceState, ...] = ()
    devices_after: tuple[DeviceState, ...] = ()


class CpuLoad(Struct, frozen=True, gc=False):
    """Processor time in the measured window, in busy cores: of the machine, and of this process and its children."""

    machine_cores: float
    process_cores: float


class UnderWay(Struct, frozen=True, gc=False):
    """Requests that an engine is working on at some time of a window, and the work that is in them by then.

    `request_s` is the sum of how long each has been worked on, `longest_s` the longest of these times; where an engine
    does not report when it began, they are upper bounds. `output_tokens` is None if it hands out none before the last.
    """

    requests: int = 0
    output_tokens: Annotated[int | None, units.TOKEN] = 0
    request_s: Annotated[float, units.SECOND] = 0.0
    longest_s: Annotated[float, units.SECOND] = 0.0


class Cut(Struct, frozen=True, gc=False):
    """What is known of a measured window that was cut short, or of several.

    The requests under way at its end are run again by the next attempt, while the time and energy spent on them are in
    the window: repeating them takes `under_way.longest_s` at most. `lost_s` is the time from its end to where it was
    interrupted, None if unknown. `energy_behind_s` is how long before its end its energy was read, None if it was not.
    """

    windows: int = 1
    lost_s: Annotated[float | None, units.SECOND] = None
    energy_behind_s: Annotated[float | None, units.SECOND] = None
    under_way: UnderWay = UnderWay()


class RequestRecord(Struct, frozen=True, gc=False, kw_only=True):
    """One request: its exact tokens and its times in the measured window (t = 0 when that window opens)."""

    experiment_id: Annotated[str, "Experiment that the request belongs to."] = ""
    rank: Annotated[int, "Process that ran it, from 0."] = 0
    cycle: Annotated[int, "Cycle that it belongs to, from 1."] = 1
    attempt: Annotated[int, "Attempt that ran it: 1, and one more for each time the experiment was resumed."] = 1
    request: Annotated[int, "Position of the prompt in the experiment's prompts, from 0."]
    batch: Annotated[int, "Batch it ran in, from 0, in order of execution."]
    input_tokens: Annotated[int, units.TOKEN, "Tokens of the prompt, without padding."]
    output_tokens: Annotated[
        int | None, units.TOKEN, "Tokens generated, including the end token but nothing after it; null if it failed."
    ]
    input_truncated: Annotated[bool, "The prompt was cut to max_input_tokens."]
    finish_reason: Annotated[str, "stop (end token), length (max_output_tokens) or error."]
    start_s: Annotated[float, units.SECOND, "When the engine took the request, or a server was sent it."]
    end_s: Annotated[float, units.SECOND, "When its last token was available, or when it failed."]
    latency_s: Annotated[
        float | None,
        units.SECOND,
        "end_s minus arrived_s, or minus start_s if there is no queue; the same for all of a padded batch; null if it "
        "failed.",
    ]
    prefill_s: Annotated[
        float | None,
        units.SECOND,
        "From start_s to the first token's logits, with what the engine does for other requests meanwhile; null if the "
        "engine does not report it.",
    ] = None
    arrived_s: Annotated[
        float | None,
        units.SECOND,
        "When it arrived; negative if before the window, which resumed a cycle; null if nothing arrives.",
    ] = None
    queue_s: Annotated[float | None, units.SECOND, "start_s minus arrived_s: how long it waited for its turn."] = None
    ttft_s: Annotated[
        float | None, units.SECOND, "Time to first token, from where latency_s begins; null unless streaming."
    ] = None
    tpot_s: Annotated[float | None, units.SECOND, "Time per output token after the first: the mean of itl_s."] = None
    itl_s: Annotated[list[float] | None, units.SECOND, "Inter-token latencies, one for each token after the first."] = (
        None
    )
    itl_spread: Annotated[
        bool | None, "Tokens that came in one chunk were spread over the time since the previous chunk."
    ] = None
    error: Annotated[str | None, "Why it failed; null if it did not."] = None


class ProcessRecord(Struct, frozen=True, gc=False):
    """What one worker process knows about one cycle, in one attempt at it.

    `phases` holds those of the attempt (idle, load), repeated in each of its records, and the cycle's own (warm-up,
    measured). `window_opened_unix_s` is for comparing processes, not for measuring. `energy_so_far` are readings at
    some of the times at which requests were finished, with continuous batching. `cut` is None if the window was not
    cut short. `arrivals_from_s` is when the window opened on the clock of the cycle's arrivals: the measured time of
    the attempts before it; None if nothing arrives.
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
        """Return the phase of that name, or None if the process did not get that far."""
        return next((phase for phase in self.phases if phase.name == name), None)
