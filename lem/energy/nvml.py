"""GPU energy from the driver's own counter (NVML), per physical GPU.

`nvmlDeviceGetTotalEnergyConsumption` counts millijoules since the driver was loaded, on Volta and newer, and
advances in ticks of some 100 ms (NVML API reference). A MIG instance has no counter: the parent's value is
given and labelled as shared. Opens no CUDA context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lem.energy.base import Meter
from lem.errors import BadInput
from lem.gpu import Gpu
from lem.record import EnergyReading

METHOD = "nvmlDeviceGetTotalEnergyConsumption"
COUNTER_UNIT_J = 1e-3


class NvmlMeter(Meter):
    """Differences of the energy counters of the given GPUs, each physical GPU once."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        # Two MIG instances of one GPU share its counter: the first stands for both.
        self._gpus = list({gpu.uuid: gpu for gpu in reversed(gpus)}.values())[::-1]
        self._lib: Any = None
        self._handles: list[Any] = []
        self._before: list[int | str] = []

    def open(self) -> None:
        """Initialise NVML and find the GPUs by UUID."""
        if not self._gpus:
            raise BadInput("energy=nvml needs a visible NVIDIA GPU and its driver; use energy=auto instead.")
        import pynvml

        pynvml.nvmlInit()
        self._lib = pynvml
        self._handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in self._gpus]

    def begin(self) -> None:
        """Note the counters."""
        self._before = [self._counter_mj(handle) for handle in self._handles]

    def end(self) -> tuple[EnergyReading, ...]:
        """Return the counters' increase."""
        after = [self._counter_mj(handle) for handle in self._handles]
        return tuple(map(self._reading, self._gpus, self._before, after))

    def close(self) -> None:
        """Release NVML."""
        if self._lib is not None:
            self._lib.nvmlShutdown()
            self._lib = None

    def _counter_mj(self, handle: Any) -> int | str:
        """Return the counter in mJ, or the driver's reason for having none."""
        try:
            return int(self._lib.nvmlDeviceGetTotalEnergyConsumption(handle))
        except self._lib.NVMLError as error:
            return str(error)

    def _reading(self, gpu: Gpu, before: int | str, after: int | str) -> EnergyReading:
        energy_j, reason = None, None
        if isinstance(before, int) and isinstance(after, int):
            energy_j = (after - before) * COUNTER_UNIT_J
        else:
            failure = before if isinstance(before, str) else after
            reason = f"the energy counter of {gpu.uuid} could not be read: {failure}"
        if energy_j is not None and energy_j < 0:
            energy_j, reason = None, f"the energy counter of {gpu.uuid} went backwards (driver reloaded?)"
        return EnergyReading(
            component="gpu",
            source="counter",
            scope="shared_device" if gpu.mig_uuid else "device",
            device=gpu.uuid,
            energy_j=energy_j,
            method=METHOD,
            resolution_j=COUNTER_UNIT_J,
            reason=reason,
        )
