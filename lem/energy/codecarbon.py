"""CPU and memory energy of the whole machine, as estimated or read by codecarbon.

codecarbon reads RAPL if the kernel permits it. Otherwise, it derives the CPU's power from the CPU's load and rated
power. For memory, it assumes a constant power per module. CPU energy without RAPL and all memory energy are labeled as
estimates. GPUs are left to the NVML meter, and CO2e to `lem.energy.carbon`: the carbon intensity that the tracker looks
up is never used. codecarbon's settings in `.codecarbon.config` files and CODECARBON_* variables are ignored, because
they would change the numbers without being visible in the record.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from msgspec.structs import replace

from lem.energy.base import ImmediateMeter
from lem.energy.quiet import quiet_stdout
from lem.errors import BadInput
from lem.machine.host import Host, kernels_cpu_model
from lem.quantities import J_PER_KWH, NS_PER_S
from lem.record import Component, EnergyReading, Scope, Source
from lem.spec.experiment import Energy
from lem.spec.rules import Objection

SAMPLING_PERIOD_S = 1.0
# In these modes, codecarbon computes CPU energy from power samples; in its other modes, it reads a counter at the end.
SAMPLED_MODES = ("cpu_load", "constant")
_WITHOUT = "Use energy=none to run without a meter."
# A program that opens the meter and, if that fails, prints the reason.
_TRY = """
import sys
from lem.energy import codecarbon
from lem.errors import BadInput
meter = codecarbon.CodecarbonMeter()
try:
    meter.open()
except BadInput as error:
    print(str(error).removesuffix(" " + codecarbon._WITHOUT))
    sys.exit(1)
meter.close()
"""
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


class CodecarbonMeter(ImmediateMeter):
    """Measures each window as a task of codecarbon's offline tracker."""

    def __init__(self) -> None:
        self._tracker: Any = None
        self._ram_power_w = 0.0
        self._begun_ns = 0

    @classmethod
    def objections(cls, energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
        """Object if codecarbon is missing or cannot start its tracker; the check takes a second or two."""
        fact = why_broken() if host.has("codecarbon") else "the package codecarbon is not installed."
        if fact is not None:
            yield Objection("meter_broken", "energy", fact)

    def open(self) -> None:
        """Create the tracker and run a throwaway task, so that no window includes the time for probing hardware."""
        try:
            self._tracker = _offline_tracker()
            with _name_of_cpu_given():
                self._tracker.start_task("set-up")
            data = self._tracker.stop_task("set-up")
        except Exception as error:  # codecarbon suppresses some errors and then fails on missing attributes
            self._tracker = None
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadInput(f"codecarbon could not start its tracker ({why}). {_WITHOUT}") from error
        if data is None:
            raise BadInput(f"codecarbon could not start its tracker. {_WITHOUT}")
        self._ram_power_w = data.ram_power

    def begin(self) -> None:
        """Start the window's task."""
        self._tracker.start_task("window")
        self._begun_ns = time.perf_counter_ns()

    def _taken(self) -> tuple[EnergyReading, ...]:
        """Stop the window's task and return its CPU and memory energy."""
        data = self._tracker.stop_task()
        return self._readings(
            data and data.cpu_energy * J_PER_KWH,
            data and data.ram_energy * J_PER_KWH,
            "codecarbon returned no energy for this window",
        )

    def so_far(self) -> tuple[EnergyReading, ...]:
        """Return the CPU energy up to the tracker's last sample, and the memory energy so far.

        The tracker's own thread takes the samples, so the last one can be up to a second old. Taking an extra sample
        here would change the final result, because the power that codecarbon derives is not linear in the CPU's load.
        The CPU energy is None before the first sample, and always if codecarbon reads RAPL, because it then takes no
        samples of the CPU. This method takes about 20 µs.
        """
        cpu, cpu_j, sampled_s = self._cpu(), None, None
        if getattr(cpu, "_mode", None) in SAMPLED_MODES:
            samples = list(getattr(cpu, "_power_history", ()))
            cpu_j = sum(power.W * seconds for power, seconds in samples)
            sampled_s = sum(seconds for _, seconds in samples)
        elapsed_s = (time.perf_counter_ns() - self._begun_ns) / NS_PER_S
        cpu_reading, dram = self._readings(cpu_j, self._ram_power_w * elapsed_s, "codecarbon has taken no sample yet")
        return replace(cpu_reading, covered_s=sampled_s if cpu_j else None), dram

    def _readings(self, cpu_j: float | None, ram_j: float | None, reason: str) -> tuple[EnergyReading, EnergyReading]:
        return (
            self._reading("cpu", cpu_j, reason, *self._cpu_method()),
            self._reading("dram", ram_j, reason, "estimate", "machine", "codecarbon: constant power per memory module"),
        )

    def close(self) -> None:
        """Stop the tracker's threads."""
        if self._tracker is not None:
            self._tracker.stop()
            self._tracker = None

    def _reading(
        self, component: Component, energy_j: float | None, reason: str, source: Source, scope: Scope, method: str
    ) -> EnergyReading:
        # The tracker hides its errors: a value of None or exactly 0 means that nothing was read.
        return EnergyReading(
            component=component,
            source=source,
            scope=scope,
            device=component,
            energy_j=energy_j or None,
            method=method,
            resolution_s=SAMPLING_PERIOD_S,
            reason=None if energy_j else reason,
        )

    def _cpu_method(self) -> tuple[Source, Scope, str]:
        cpu = self._cpu()
        mode, model = getattr(cpu, "_mode", "unknown"), getattr(cpu, "_model", "unknown CPU")
        if mode == "intel_rapl":
            return "counter", "package", f"codecarbon: RAPL of {model}"
        tdp_w = getattr(cpu, "_tdp", None)
        return "estimate", "machine", f"codecarbon: {mode}, {tdp_w} W rated for {model}"

    def _cpu(self) -> Any:
        return next((part for part in getattr(self._tracker, "_hardware", ()) if type(part).__name__ == "CPU"), None)


@cache
def why_broken() -> str | None:
    """Return why the meter cannot be opened on this machine; None if it can.

    A separate process opens the meter, because codecarbon prints, starts threads and stays in memory.
    """
    tried = subprocess.run([sys.executable, "-c", _TRY], capture_output=True, text=True, check=False)
    if not tried.returncode:
        return None
    return tried.stdout.strip() or "codecarbon could not start its tracker."


def _offline_tracker() -> Any:
    with quiet_stdout():
        from codecarbon import OfflineEmissionsTracker

    level = os.environ.get("CODECARBON_LOG_LEVEL", "").lower()
    level = level if level in LOG_LEVELS else "error"
    logging.getLogger("codecarbon").setLevel(level.upper())
    with _without_settings():
        return OfflineEmissionsTracker(
            # The country does not matter: only the tracker's energy is used, never its emissions.
            country_iso_code="FRA",
            measure_power_secs=SAMPLING_PERIOD_S,
            output_methods=[],
            log_level=level,
            pue=1.0,
            tracking_mode="machine",
            allow_multiple_runs=True,
            gpu_ids=[],
        )


@contextmanager
def _name_of_cpu_given() -> Iterator[None]:
    """Give codecarbon the CPU's name while it probes the hardware in the block, if the kernel reports the name.

    codecarbon asks py-cpuinfo for the name. py-cpuinfo would read it from /proc/cpuinfo, as lem does, but would then
    start other programs to find out more about the CPU, which takes a second of CPU time.
    """
    name = kernels_cpu_model()
    if name is None:
        yield
        return
    import cpuinfo

    find_out = cpuinfo.get_cpu_info
    cpuinfo.get_cpu_info = lambda: {"brand_raw": name}
    try:
        yield
    finally:
        cpuinfo.get_cpu_info = find_out


@contextmanager
def _without_settings() -> Iterator[None]:
    """Hide codecarbon's settings, in files and environment variables, from a tracker created in the block.

    The settings are meant for other programs' trackers and can, for example, override the power of the CPU and the
    memory. The function that reads the settings is replaced rather than called, because it fails if there is no home
    directory or if a file is damaged.
    """
    from codecarbon import emissions_tracker

    read = emissions_tracker.get_hierarchical_config
    emissions_tracker.get_hierarchical_config = dict
    try:
        yield
    finally:
        emissions_tracker.get_hierarchical_config = read
