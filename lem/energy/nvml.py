"""GPU energy from the driver (NVML): an energy counter and a power trace for each physical GPU.

On Volta and newer GPUs, `nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded. The
counter advances in ticks of about 100 ms (NVML API reference; ML.ENERGY, 2026-03), and a call takes 3 ms on an H100,
sometimes 15 ms. Each reading is therefore stored with the time of its call, and the counter's value at a window's edge
is interpolated between the ticks on either side (`lem.energy.ticks`). A plain difference of two readings would be off
by up to a tick at each edge. GPUs are read in parallel: if eight GPUs were read in turn, the last one would be read
long after the first.

Power is the instantaneous value if the driver reports it (field 186), otherwise the value of `nvmlDeviceGetPowerUsage`,
which is a one-second average on Ampere and newer GPUs, except the A100 and A30 (GA100). If a GPU has no counter, its
energy is the integral of the power trace. A MIG instance has neither a counter nor a power value of its own, so it gets
the reading of the whole GPU. On a GH200, the driver's values are for the whole module. Readings are labeled
accordingly. The meter opens no CUDA context.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from lem.energy.base import Meter
from lem.energy.ticks import Counter, Edge
from lem.energy.trace import RunningIntegral, Sampler, integral_j
from lem.errors import BadInput
from lem.machine.gpu import W_PER_MW, Gpu, ask, nvml
from lem.machine.host import Host
from lem.record import Component, EnergyReading, PowerSample
from lem.spec.experiment import Energy
from lem.spec.rules import Objection

COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
INSTANT_POWER_FIELD = 186  # NVML_FI_DEV_POWER_INSTANT
J_PER_MJ = 1e-3
MODULES = ("GH200",)
# The driver updates its power values every 0.1 s, but the instantaneous value sometimes only every 0.2 s (H100,
# 2026-11-26).
POWER_UPDATE_S = 0.2
# Temperatures change slowly, and a second call to the driver for each power sample would double the cost of sampling.
TEMPERATURE_PERIOD_S = 1.0
# Averaging time of nvmlDeviceGetPowerUsage (measured on an H100: the value rises for 1.0 s after a power step).
POWER_AVERAGE_S = 1.0


class NvmlMeter(Meter):
    """Reads the counters and the power of the given GPUs; each physical GPU is read once."""

    options = ("idle_s", "power_hz")

    def __init__(self, gpus: Sequence[Gpu], power_hz: float = 20.0) -> None:
        # Two MIG instances of one GPU share its counter, so the first instance represents both.
        self._gpus = list({gpu.uuid: gpu for gpu in reversed(gpus)}.values())[::-1]
        self._power_hz = power_hz
        self._lib: Any = None
        self._devices: list[Device] = []
        self._sampler: Sampler | None = None
        self._pool: ThreadPoolExecutor | None = None
        # Counter readings in progress around the window's edges.
        self._pending: list[Future[None]] = []
        self._begun: list[Edge] | None = None
        self._begun_ns = 0
        self._traced: RunningIntegral | None = None
        self._is_settled = False
        self._marked_ns: int | None = None
        self._temperature_due_s = 0.0

    @classmethod
    def configured(cls, energy: Energy, gpus: Sequence[Gpu]) -> NvmlMeter:
        """Return a meter for the GPUs in use, with the configured sampling rate for power."""
        return cls(gpus, energy.power_hz)

    @classmethod
    def objections(cls, energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
        """Yield an objection if no NVIDIA GPU is visible, or if the run uses none."""
        if not host.gpus:
            yield Objection("no_gpu", "energy", "nvml needs a visible NVIDIA GPU.")
        elif not uses_gpu:
            yield Objection("no_gpu_in_use", "energy", "nvml measures only GPUs, but the run uses no GPU.")

    def open(self) -> None:
        """Initialize NVML, find the GPUs by UUID, measure the ticks of their counters, and start the power trace."""
        if not self._gpus:
            raise BadInput("energy=nvml needs a run that uses an NVIDIA GPU; use energy=auto instead.")
        import pynvml

        try:
            pynvml.nvmlInit()
            self._lib = pynvml
            self._devices = [Device(pynvml, gpu) for gpu in self._gpus]
        except pynvml.NVMLError as error:
            raise BadInput(f"The NVIDIA driver does not respond ({error}); check the output of nvidia-smi.") from None
        # Two threads per GPU, because in a short window the readings around its two edges overlap.
        self._pool = ThreadPoolExecutor(2 * len(self._devices), thread_name_prefix="nvml")
        _finish(self._on_each(lambda device: device.counter.learn()))
        self._sampler = Sampler(self._sample, self._power_hz)
        self._sampler.start()

    def settle(self) -> None:
        """Wait for a tick of each counter, so that the ticks around the window's opening are known."""
        if self._is_settled:
            return
        _finish(self._on_each(lambda device: device.counter.watch()))
        self._is_settled = True

    def begin(self) -> None:
        """Record the time, and read each counter in the background: now, and after each of its next two ticks."""
        assert self._sampler is not None
        self.settle()
        self._is_settled, self._marked_ns, self._begun = False, None, None
        seen = self._sampler.count
        self._sampler.sample_now()
        self._pending = self._on_each(lambda device: device.counter.follow())
        # The time is recorded last, because the caller's clock starts when this method returns.
        self._begun_ns = time.perf_counter_ns()
        self._traced = RunningIntegral(self._sampler, seen, self._begun_ns)

    def mark(self) -> None:
        """Record the time and the power, and read each counter in the background until it has ticked twice."""
        assert self._sampler is not None
        if self._marked_ns is not None:
            return
        self._marked_ns = time.perf_counter_ns()
        self._pending += self._on_each(lambda device: device.counter.watch_end())
        self._sampler.sample_now()

    def end(self) -> tuple[EnergyReading, ...]:
        """Return each GPU's energy from `begin` to `mark`, after waiting for the two ticks that follow `mark`."""
        assert self._sampler is not None
        self.mark()
        assert self._marked_ns is not None
        _finish(self._pending)
        begun = self._begun or self._edges(self._begun_ns)
        ended = [
            device.counter.at(self._marked_ns, edge, self._begun_ns)
            for device, edge in zip(self._devices, begun, strict=True)
        ]
        samples = self._sampler.samples()
        traces = [[sample for sample in samples if sample.device == gpu.uuid] for gpu in self._gpus]
        integrals_j = [integral_j(own, self._begun_ns, self._marked_ns) for own in traces]
        return tuple(map(self._reading, self._devices, begun, ended, integrals_j))

    def so_far(self) -> tuple[EnergyReading, ...]:
        """Return each GPU's energy so far.

        This is the counter's increase up to its last tick or, without a counter, the power trace's integral up to its
        last sample. The method makes one call to the driver for each GPU that has a counter, in parallel, and does not
        wait for a tick.
        """
        assert self._traced is not None
        traced_j = self._traced.up_to_now()
        is_begun = all(each.done() for each in self._pending)
        if is_begun:
            self._begun = self._begun or self._edges(self._begun_ns)
            _finish(self._on_each(lambda device: device.counter.poll()))
        begun = self._begun or [Edge(None, "it has not ticked in this window yet")] * len(self._devices)
        readings = []
        for device, edge in zip(self._devices, begun, strict=True):
            # The trace of a GPU that no longer responds ends too early, so its integral is not used.
            trace_j = None if device.power_reason else traced_j.get(device.gpu.uuid) or None
            readings.append(self._reading(device, edge, device.counter.last_since(edge), trace_j))
        return tuple(readings)

    def trace(self) -> list[PowerSample]:
        """Return all power samples so far."""
        return self._sampler.samples() if self._sampler is not None else []

    def close(self) -> None:
        """Stop the trace and release NVML."""
        if self._sampler is not None:
            self._sampler.stop()
        if self._pool is not None:
            self._pool.shutdown()
        if self._lib is not None:
            self._lib.nvmlShutdown()
            self._lib = None

    def _on_each(self, act: Callable[[Device], object]) -> list[Future[None]]:
        """Start an action on all devices that have a counter, in parallel."""
        assert self._pool is not None

        def quietly(device: Device) -> None:
            act(device)

        return [self._pool.submit(quietly, device) for device in self._devices if device.has_counter]

    def _edges(self, at_ns: int) -> list[Edge]:
        return [device.counter.at(at_ns) for device in self._devices]

    def _sample(self) -> Iterable[PowerSample]:
        """Return the current power of all GPUs and, once a second, also their temperatures, which are read last."""
        samples = [(device, sample) for device in self._devices if (sample := device.sample()) is not None]
        if time.monotonic() < self._temperature_due_s:
            return [sample for _, sample in samples]
        self._temperature_due_s = time.monotonic() + TEMPERATURE_PERIOD_S
        return [replace(sample, temperature_c=device.temperature_c()) for device, sample in samples]

    def _reading(self, device: Device, begun: Edge, ended: Edge, trace_j: float | None) -> EnergyReading:
        uuid = device.gpu.uuid
        resolution_j: float | None = None
        if device.has_counter:
            energy_j, reason = _increase_j(begun, ended)
            reason = f"the energy counter of {uuid}: {reason}"
            method, resolution_j, resolution_s = COUNTER, J_PER_MJ, device.counter.tick_s
        else:
            energy_j, unread = trace_j, device.power_reason or "no power sample at an edge of the window"
            reason = f"{uuid}: no counter ({device.counter.reason}), no power ({unread})"
            method = f"integral of {device.power_method}, {self._power_hz:g} Hz: this GPU has no energy counter"
            resolution_s = 1 / self._power_hz
        return EnergyReading(
            component=device.component,
            source="counter" if device.has_counter else "integral",
            scope=device.scope,
            device=uuid,
            energy_j=energy_j,
            method=method,
            resolution_j=resolution_j,
            resolution_s=resolution_s,
            trace_energy_j=trace_j,
            reason=None if energy_j is not None else reason,
            trace_reach_s=None if trace_j is None else device.power_reach_s + 1 / self._power_hz,
        )


@dataclass(frozen=True)
class Sensors:
    """The sensors that the driver offers for a GPU, as the meter would use them.

    `counter_problem` says why the energy counter cannot be read, and is None if it can be read. `tick_s` is the time
    from one advance of the counter to the next, or None if there is no counter or the time cannot be determined.
    `power_w` is the current power, or None if it cannot be read; `power_problem` then says why. `power_is_instant` is
    False if the power is an average over the last second. `covers_module` says whether the driver's values cover a
    whole module, such as a GH200.
    """

    has_counter: bool
    counter_problem: str | None
    tick_s: float | None
    power_w: float | None
    power_problem: str | None
    power_is_instant: bool
    covers_module: bool


def sensors(gpus: Sequence[Gpu]) -> dict[str, Sensors]:
    """Return the sensors of the GPUs that respond, by UUID; waiting for the counters to tick takes 0.6 to 2 s."""
    with nvml() as lib:
        devices = [] if lib is None else [d for gpu in gpus if (d := _answering(lib, gpu)) is not None]
        with ThreadPoolExecutor(max(1, len(devices)), thread_name_prefix="nvml") as pool:
            _finish([pool.submit(device.counter.learn) for device in devices if device.has_counter])
        return {device.gpu.uuid: device.sensors() for device in devices}


def _answering(lib: Any, gpu: Gpu) -> Device | None:
    try:
        return Device(lib, gpu)
    except lib.NVMLError:
        return None


def _finish(tasks: Iterable[Future[None]]) -> None:
    """Wait for the tasks to finish, and re-raise any exception that one of them raised."""
    for task in tasks:
        task.result()


def _increase_j(begun: Edge, ended: Edge) -> tuple[float | None, str | None]:
    """Return a counter's increase in joules between two edges, or None and the reason why it is unknown."""
    if begun.energy_mj is None or ended.energy_mj is None:
        return None, begun.reason or ended.reason
    gained_mj = ended.energy_mj - begun.energy_mj
    if gained_mj < 0:
        return None, "it went backwards (was the driver reloaded?)"
    # Every GPU draws some power, so a counter that does not advance is not working.
    return (gained_mj * J_PER_MJ, None) if gained_mj else (None, "it did not advance")


class Device:
    """The energy counter and the power readings of one GPU."""

    def __init__(self, lib: Any, gpu: Gpu) -> None:
        self.gpu = gpu
        self._lib = lib
        self._handle = lib.nvmlDeviceGetHandleByUUID(gpu.uuid)
        self.counter = Counter(self._energy_mj, lib.NVMLError)
        self.has_counter = self._counter_exists()
        self.power_reason: str | None = None
        self._instant = self._has_instant_power()

    @property
    def scope(self) -> Any:
        """The scope of readings: `shared_device` if only a MIG instance of the GPU is in use, otherwise `device`."""
        return "shared_device" if self.gpu.is_divided else "device"

    @property
    def component(self) -> Component:
        """`module` if the driver's values cover the whole module (such as a GH200), otherwise `gpu`."""
        return "module" if any(name in self.gpu.name for name in MODULES) else "gpu"

    @property
    def power_method(self) -> str:
        """The name of the driver's power value that is read."""
        return "NVML_FI_DEV_POWER_INSTANT" if self._instant else "nvmlDeviceGetPowerUsage"

    @property
    def power_reach_s(self) -> float:
        """How far back in time a power value reaches: its averaging time plus the driver's update period."""
        return POWER_UPDATE_S if self._instant else POWER_AVERAGE_S + POWER_UPDATE_S

    def _energy_mj(self) -> int:
        return int(self._lib.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def _counter_exists(self) -> bool:
        """Read the counter once; return False if the driver does not support it. `counter.error` keeps any error."""
        self.counter.poll()
        return not isinstance(self.counter.error, self._lib.NVMLError_NotSupported)

    def sensors(self) -> Sensors:
        """Return the sensors of this GPU."""
        power_w = self.power_w()
        return Sensors(
            has_counter=self.has_counter,
            counter_problem=self.counter.reason,
            tick_s=self.counter.tick_s,
            power_w=power_w,
            power_problem=self.power_reason,
            power_is_instant=self._instant,
            covers_module=self.component == "module",
        )

    def power_w(self) -> float | None:
        """Return the current power in watts, or None if it cannot be read; `power_reason` then says why."""
        try:
            if self._instant:
                power_w = self._instant_power_w()
            else:
                power_w = float(self._lib.nvmlDeviceGetPowerUsage(self._handle)) * W_PER_MW
        except self._lib.NVMLError as error:
            self.power_reason = str(error)
            return None
        self.power_reason = None
        return power_w

    def sample(self) -> PowerSample | None:
        """Return a sample of the power, timed at the middle of the call, or None if the power cannot be read."""
        asked_ns = time.perf_counter_ns()
        power_w = self.power_w()
        if power_w is None:
            return None
        return PowerSample((asked_ns + time.perf_counter_ns()) // 2, "gpu", self.gpu.uuid, power_w)

    def temperature_c(self) -> int | None:
        """Return the GPU's temperature, or None if the driver does not report it."""
        kind = self._lib.NVML_TEMPERATURE_GPU
        temperature_c: int | None = ask(self._lib, "nvmlDeviceGetTemperature", self._handle, kind)
        return temperature_c

    def _instant_power_w(self) -> float:
        (value,) = self._lib.nvmlDeviceGetFieldValues(self._handle, [INSTANT_POWER_FIELD])
        if value.nvmlReturn != 0:
            raise self._lib.NVMLError(value.nvmlReturn)
        return float(value.value.uiVal) * W_PER_MW

    def _has_instant_power(self) -> bool:
        try:
            self._instant_power_w()
        except self._lib.NVMLError:
            return False
        return True
