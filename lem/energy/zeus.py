"""GPU energy through zeus: for AMD GPUs and others that its device layer knows and NVML does not.

zeus reads the energy counter where the GPU has one, else it integrates sampled power; the reading says which. GPUs
are those that `CUDA_VISIBLE_DEVICES` (or its ROCm counterpart) leaves visible, by zeus's own numbering. Processors are
left to the RAPL meter. Needs the extra `zeus`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lem.energy.base import Meter
from lem.errors import BadInput
from lem.gpu import Gpu
from lem.quiet import quiet_stdout
from lem.record import EnergyReading, Source

WINDOW = "lem"


class ZeusMeter(Meter):
    """zeus's monitor, a window of it for each of ours."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        # Where NVML knows the GPUs in use, they are the first visible ones; elsewhere all visible ones are read.
        self._indices = list(range(len(gpus))) if gpus else None
        self._monitor: Any = None
        self._scope_is_shared = any(gpu.mig_uuid for gpu in gpus)

    def open(self) -> None:
        """Find the GPUs; raises `BadInput` where zeus finds none."""
        with quiet_stdout():
            from zeus.monitor import ZeusMonitor

        logging.getLogger("zeus").setLevel(logging.ERROR)
        self._monitor = ZeusMonitor(gpu_indices=self._indices, cpu_indices=[])
        if not self._monitor.gpu_indices:
            raise BadInput("energy=zeus found no GPU that it can read; use energy=auto instead.")

    def begin(self) -> None:
        """Begin a window; the device was synchronised by the caller."""
        self._monitor.begin_window(WINDOW, sync_execution=False)

    def end(self) -> tuple[EnergyReading, ...]:
        """End the window and return each GPU's energy."""
        measured = self._monitor.end_window(WINDOW, sync_execution=False).gpu_energy
        return tuple(self._reading(index, measured.get(index)) for index in self._monitor.gpu_indices)

    def _reading(self, index: int, energy_j: float | None) -> EnergyReading:
        counted = self._monitor.gpus.supports_get_total_energy_consumption(index)
        source: Source = "counter" if counted else "integral"
        return EnergyReading(
            component="gpu",
            source=source,
            scope="shared_device" if self._scope_is_shared else "device",
            device=f"zeus GPU {index}: {self._monitor.gpus.get_name(index)}",
            energy_j=energy_j,
            method=f"zeus: {'the energy counter' if counted else 'the integral of sampled power'}",
            reason=None if energy_j is not None else "zeus returned no energy for this GPU",
        )
