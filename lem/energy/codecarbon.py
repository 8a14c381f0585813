"""CPU and memory energy as codecarbon estimates or reads it, for the whole machine.

codecarbon reads RAPL where the kernel lets it, else derives the CPU's power from its load and rated power;
memory is a heuristic per module. Both of the latter are estimates and labelled so. GPUs are left to the NVML
meter, CO2e to `lem.carbon`: the tracker's own grid look-up is never used.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from lem.energy.base import Meter
from lem.errors import BadInput
from lem.quiet import quiet_stdout
from lem.record import Component, EnergyReading, Scope, Source
from lem.units import J_PER_KWH

SAMPLING_PERIOD_S = 1.0


class CodecarbonMeter(Meter):
    """codecarbon's offline tracker, a task for each window."""

    def __init__(self) -> None:
        self._tracker: Any = None

    def open(self) -> None:
        """Create the tracker and run a throw-away task, which pays for the probing of the hardware."""
        self._tracker = _offline_tracker()
        self._tracker.start_task("set-up")
        if self._tracker.stop_task("set-up") is None:
            raise BadInput("codecarbon could not start its tracker; use energy=none to run without it.")

    def begin(self) -> None:
        """Start a task."""
        self._tracker.start_task("window")

    def end(self) -> tuple[EnergyReading, ...]:
        """Stop the task and return its CPU and memory energy."""
        data = self._tracker.stop_task()
        cpu = self._reading("cpu", data and data.cpu_energy, *self._cpu_method())
        ram = self._reading("dram", data and data.ram_energy, *self._ram_method())
        return (cpu, ram)

    def close(self) -> None:
        """Stop the tracker's threads."""
        if self._tracker is not None:
            self._tracker.stop()
            self._tracker = None

    def _reading(
        self, component: Component, energy_kwh: float | None, source: Source, scope: Scope, method: str
    ) -> EnergyReading:
        # The tracker swallows its own errors: nothing, or exactly zero, means that nothing was read.
        energy_j = energy_kwh * J_PER_KWH if energy_kwh else None
        return EnergyReading(
            component=component,
            source=source,
            scope=scope,
            device=component,
            energy_j=energy_j,
            method=method,
            resolution_s=SAMPLING_PERIOD_S,
            reason=None if energy_j is not None else "codecarbon returned no energy for this window",
        )

    def _cpu_method(self) -> tuple[Source, Scope, str]:
        cpu = self._hardware("CPU")
        mode, model = getattr(cpu, "_mode", "unknown"), getattr(cpu, "_model", "unknown CPU")
        if mode == "intel_rapl":
            return "counter", "package", f"codecarbon: RAPL of {model}"
        tdp_w = getattr(cpu, "_tdp", None)
        return "estimate", "machine", f"codecarbon: {mode}, {tdp_w} W rated for {model}"

    def _ram_method(self) -> tuple[Source, Scope, str]:
        return "estimate", "machine", "codecarbon: constant power per memory module"

    def _hardware(self, kind: str) -> Any:
        parts = getattr(self._tracker, "_hardware", [])
        return next((part for part in parts if type(part).__name__ == kind), None)


def _offline_tracker() -> Any:
    with quiet_stdout():
        from codecarbon import OfflineEmissionsTracker

    level = os.environ.get("CODECARBON_LOG_LEVEL", "error").lower()
    logging.getLogger("codecarbon").setLevel(level.upper())
    return OfflineEmissionsTracker(
        # Any country will do: only the tracker's energy is used, never its emissions.
        country_iso_code="FRA",
        measure_power_secs=SAMPLING_PERIOD_S,
        output_methods=[],
        log_level=level,
        pue=1.0,
        tracking_mode="machine",
        allow_multiple_runs=True,
        gpu_ids=[],
    )
