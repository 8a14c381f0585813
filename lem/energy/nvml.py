"""GPU energy from the driver (NVML), per physical GPU: its energy counter, and a power trace alongside it.

`nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded, on Volta and newer, and advances
in ticks of about 100 ms (NVML API reference; ML.ENERGY, 2026-03). The tick is measured when the meter is opened, and a
window is corrected for the part of a tick at each of its edges: that leaves a second-order error whereas a plain
difference is off by up to a tick. Power is the instant value if the driver has it (field 186), otherwise
`nvmlDeviceGetPowerUsage`, a one-second average on Ampere and newer. Without a counter a GPU's energy is the integral
of the trace. A MIG instance has neither, so its reading is the parent's. On a GH200 the driver's values are those of
the whole module. Readings are labelled accordingly. Opens no CUDA context.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lem.energy.base import Meter
from lem.energy.trace import RunningIntegral, Sampler, integral_j
from lem.errors import BadInput
from lem.machine.gpu import W_PER_MW, Gpu
from lem.machine.host import Host
from lem.record import Component, EnergyReading, PowerSample
from lem.spec.experiment import Energy
from lem.spec.rules import Objection
from lem.units import NS_PER_S

COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
INSTANT_POWER_FIELD = 186  # NVML_FI_DEV_POWER_INSTANT
J_PER_MJ = 1e-3
MODULES = ("GH200",)
# Enough for five ticks of 100 ms.
LEARN_TICK_S = 0.6
# Longest wait for a tick at a window's edge; there is none for counters without a known tick.
EDGE_WAIT_S = 0.3
POLL_S = 0.001


@dataclass(frozen=True)
class Edge:
    """The counter at a point in time, interpolated if the tick is known; `counter_mj` is the value read."""

    energy_mj: float | None
    reason: str | None = None
    counter_mj: int | None = None


class NvmlMeter(Meter):
    """Counters and power traces of the given GPUs, each physical GPU once."""

    options = ("idle_s", "power_hz")

    def __init__(self, gpus: Sequence[Gpu], power_hz: float = 20.0) -> None:
        # Two MIG instances of one GPU share its counter: the first represents both.
        self._gpus = list({gpu.uuid: gpu for gpu in reversed(gpus)}.values())[::-1]
        self._power_hz = power_hz
        self._lib: Any = None
        self._devices: list[Device] = []
        self._sampler: Sampler | None = None
        self._begun: list[Edge] = []
        self._begun_ns = 0
        self._traced: RunningIntegral | None = None
        self._is_settled = False
        self._marked_ns: int | None = None

    @classmethod
    def configured(cls, energy: Energy, gpus: Sequence[Gpu]) -> NvmlMeter:
        """Read the GPUs in use, and their power at the configured rate."""
        return cls(gpus, energy.power_hz)

    @classmethod
    def objections(cls, energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
        """Object if no NVIDIA GPU is visible, or none is used."""
        if not host.gpus:
            yield Objection("no_gpu", "energy", "nvml needs a visible NVIDIA GPU.")
        elif not uses_gpu:
            yield Objection("no_gpu_in_use", "energy", "nvml reads GPUs, but the run uses none.")

    def open(self) -> None:
        """Initialise NVML, find the GPUs by UUID, measure their counters' ticks, start the power trace."""
        if not self._gpus:
            raise BadInput("energy=nvml needs an NVIDIA GPU in use; use energy=auto instead.")
        import pynvml

        try:
            pynvml.nvmlInit()
            self._lib = pynvml
            self._devices = [Device(pynvml, gpu) for gpu in self._gpus]
        except pynvml.NVMLError as error:
            raise BadInput(f"The NVIDIA driver does not answer ({error}); see what nvidia-smi says.") from None
        learn_ticks(self._devices)
        self._sampler = Sampler(self._sample, self._power_hz)
        self._sampler.start()

    def settle(self) -> None:
        """Wait for each counter's next tick, so that the window begins when the counter's value is known."""
        wait_for_ticks(self._devices, keep_polling=True)
        self._is_settled = True

    def begin(self) -> None:
        """Note the counters, just after a tick of each."""
        assert self._sampler is not None
        if not self._is_settled:
            self.settle()
        for device in self._devices:
            device.poll()  # time may have passed since it settled
        self._is_settled, self._marked_ns = False, None
        seen = self._sampler.count
        self._sampler.sample_now()
        self._begun_ns = time.perf_counter_ns()
        self._begun = [device.extrapolated(self._begun_ns) for device in self._devices]
        self._traced = RunningIntegral(self._sampler, seen, self._begun_ns)

    def mark(self) -> None:
        """Note the time, the counters and the power."""
        assert self._sampler is not None
        self._marked_ns = time.perf_counter_ns()
        for device in self._devices:
            device.poll()
        self._sampler.sample_now()

    def end(self) -> tuple[EnergyReading, ...]:
        """Return each GPU's energy since `begin`; waits, after the window, for the next tick to interpolate."""
        assert self._sampler is not None
        if self._marked_ns is None:
            self.mark()
        assert self._marked_ns is not None
        wait_for_ticks(self._devices, keep_polling=False)
        samples = self._sampler.samples()
        traces = [[sample for sample in samples if sample.device == gpu.uuid] for gpu in self._gpus]
        return tuple(
            self._reading(
                device, begun, device.interpolated(self._marked_ns), integral_j(own, self._begun_ns, self._marked_ns)
            )
            for device, begun, own in zip(self._devices, self._begun, traces, strict=True)
        )

    def so_far(self) -> tuple[EnergyReading, ...]:
        """Return each counter's increase up to its last tick, and the trace's integral up to its last sample.

        Makes one call to the driver for each GPU that has a counter, and does not wait for a tick.
        """
        assert self._traced is not None
        traced_j = self._traced.up_to_now()
        readings = []
        for device, begun in zip(self._devices, self._begun, strict=True):
            device.poll()
            # If the GPU has stopped answering, its trace ends in the past.
            trace_j = None if device.power_reason else traced_j.get(device.gpu.uuid) or None
            readings.append(self._reading(device, begun, device.ticked_since(begun), trace_j))
        return tuple(readings)

    def trace(self) -> list[PowerSample]:
        """Return all power samples so far."""
        return self._sampler.samples() if self._sampler is not None else []

    def close(self) -> None:
        """Stop the trace and release NVML."""
        if self._sampler is not None:
            self._sampler.stop()
        if self._lib is not None:
            self._lib.nvmlShutdown()
            self._lib = None

    def _sample(self) -> Iterable[PowerSample]:
        for device in self._devices:
            power_w = device.power_w()
            if power_w is not None:
                yield PowerSample(time.perf_counter_ns(), "gpu", device.gpu.uuid, power_w)

    def _reading(self, device: Device, begun: Edge, ended: Edge, trace_j: float | None) -> EnergyReading:
        uuid = device.gpu.uuid
        resolution_j: float | None = None
        if device.has_counter:
            energy_j, reason = _increase_j(begun, ended)
            reason = f"the energy counter of {uuid}: {reason}"
            method, resolution_j, resolution_s = COUNTER, J_PER_MJ, device.tick_s
        else:
            energy_j, unread = trace_j, device.power_reason or "no sample at an edge of the window"
            reason = f"{uuid}: no counter ({begun.reason}), no power ({unread})"
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
        )


def _increase_j(begun: Edge, ended: Edge) -> tuple[float | None, str | None]:
    """Return the counter's increase between two edges, or None and why it is unknown."""
    if begun.energy_mj is None or ended.energy_mj is None:
        return None, begun.reason or ended.reason
    gained_mj = ended.energy_mj - begun.energy_mj
    if gained_mj < 0:
        return None, "it went backwards (driver reloaded?)"
    # Every GPU draws some power, so a counter that stands still is not working.
    return (gained_mj * J_PER_MJ, None) if gained_mj else (None, "it did not advance")


class Device:
    """One GPU's counter and power, with the counter's last two observed ticks."""

    def __init__(self, lib: Any, gpu: Gpu) -> None:
        self.gpu = gpu
        self.tick_s: float | None = None
        self._lib = lib
        self._handle = lib.nvmlDeviceGetHandleByUUID(gpu.uuid)
        self._value_mj: int | None = None
        self._before_mj: int | None = None
        self._ticked_ns: int | None = None
        self._polled_ns = 0
        self._polled_mj: int | None = None
        self._unpolled_s = 0.0
        self._reason: str | None = None
        self.power_reason: str | None = None
        self.has_counter = self._counter_exists()
        self._instant = self._has_instant_power()

    @property
    def scope(self) -> Any:
        """`shared_device` if only an instance of the GPU is in use."""
        return "shared_device" if self.gpu.mig_uuid else "device"

    @property
    def component(self) -> Component:
        """`module` if the driver's values cover more than the GPU (documented in zeus's NVIDIA device layer)."""
        return "module" if any(name in self.gpu.name for name in MODULES) else "gpu"

    @property
    def power_method(self) -> str:
        """The name of the driver's power value that is read."""
        return "NVML_FI_DEV_POWER_INSTANT" if self._instant else "nvmlDeviceGetPowerUsage"

    def _counter_exists(self) -> bool:
        try:
            self._value_mj = int(self._lib.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._lib.NVMLError as error:
            self._reason = str(error)
            return not isinstance(error, self._lib.NVMLError_NotSupported)
        return True

    def poll(self) -> bool:
        """Read the counter; return whether it has advanced, and remember when."""
        if not self.has_counter:
            return False
        try:
            value = int(self._lib.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._lib.NVMLError as error:
            self._reason, self._polled_mj = str(error), None
            return False
        now_ns = time.perf_counter_ns()
        unpolled_s = (now_ns - self._polled_ns) / NS_PER_S
        self._reason, self._polled_ns, self._polled_mj = None, now_ns, value
        if value == self._value_mj:
            return False
        self._before_mj, self._value_mj, self._ticked_ns = self._value_mj, value, now_ns
        self._unpolled_s = unpolled_s
        return True

    @property
    def readable(self) -> bool:
        """True when the last reading succeeded."""
        return self._reason is None

    def extrapolated(self, at_ns: int) -> Edge:
        """Return the counter just after a tick: the tick's value, extrapolated at the rate of the step before it."""
        if self._polled_mj is None or self._value_mj is None:
            return Edge(None, self._reason or "it was not read")
        if not self.tick_s or self._before_mj is None or self._ticked_ns is None or self._unpolled_s > self.tick_s:
            # The last step may span several ticks, as none came during the wait.
            return Edge(float(self._value_mj), counter_mj=self._value_mj)
        rate = (self._value_mj - self._before_mj) / self.tick_s
        since_s = min((at_ns - self._ticked_ns) / NS_PER_S, self.tick_s)
        return Edge(self._value_mj + rate * since_s, counter_mj=self._value_mj)

    def interpolated(self, at_ns: int) -> Edge:
        """Return the counter at a point in time within the step that has just ended."""
        if self._polled_mj is None or self._value_mj is None:
            return Edge(None, self._reason or "it was not read")
        if not self.tick_s or self._before_mj is None or self._ticked_ns is None:
            return Edge(float(self._value_mj))
        share = 1 - (self._ticked_ns - at_ns) / NS_PER_S / self.tick_s
        return Edge(self._before_mj + (self._value_mj - self._before_mj) * min(max(share, 0.0), 1.0))

    def ticked_since(self, begun: Edge) -> Edge:
        """Return the counter as last read, without a value until it has advanced since `begun`."""
        if self._polled_mj is None or self._value_mj is None:
            return Edge(None, self._reason or "it was not read")
        if self._value_mj == begun.counter_mj:
            return Edge(None, "it has not advanced yet")
        return Edge(float(self._value_mj))

    def power_w(self) -> float | None:
        """Return the current power, or None when it cannot be read; `power_reason` then says why."""
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


def learn_ticks(devices: Sequence[Device]) -> None:
    """Poll the counters briefly and set each device's tick to the median time between its advances."""
    seen: dict[str, list[int]] = {device.gpu.uuid: [] for device in devices}
    until_ns = time.perf_counter_ns() + int(LEARN_TICK_S * NS_PER_S)
    while time.perf_counter_ns() < until_ns:
        for device in devices:
            if device.has_counter and device.poll():
                seen[device.gpu.uuid].append(time.perf_counter_ns())
        time.sleep(POLL_S)
    for device in devices:
        times = seen[device.gpu.uuid]
        gaps = [(later - earlier) / NS_PER_S for earlier, later in itertools.pairwise(times)]
        device.tick_s = statistics.median(gaps) if len(gaps) >= 2 else None


def wait_for_ticks(devices: Sequence[Device], *, keep_polling: bool) -> None:
    """Poll until each counter with a known tick has advanced once.

    With `keep_polling`, those that have advanced are polled further, so that all end up to date; otherwise each stays
    at its first advance.
    """
    for device in devices:
        device.poll()
    waiting = {device for device in devices if device.tick_s and device.readable}
    until_ns = time.perf_counter_ns() + int(EDGE_WAIT_S * NS_PER_S)
    while waiting and time.perf_counter_ns() < until_ns:
        time.sleep(POLL_S)
        for device in devices if keep_polling else list(waiting):
            if device.poll() or not device.readable:
                waiting.discard(device)
