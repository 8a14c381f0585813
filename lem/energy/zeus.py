"""GPU energy through zeus, for AMD and other GPUs that zeus supports but NVML does not.

zeus reads the energy counter if the GPU has one, and otherwise integrates sampled power; each reading names its source.
zeus sees only the GPUs that `CUDA_VISIBLE_DEVICES` (or its ROCm counterpart) leaves visible. It identifies them by
number and does not know UUIDs or MIG instances. This meter needs the extra `zeus`. It does not read CPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lem.energy.base import ImmediateMeter
from lem.energy.quiet import quiet_stdout
from lem.errors import BadInput
from lem.machine import gpu
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.record import EnergyReading, Source
from lem.spec.experiment import Energy
from lem.spec.rules import Objection

WINDOW = "lem"
J_PER_MJ = 1e-3


class ZeusMeter(ImmediateMeter):
    """Measures each window of lem with a window of zeus's monitor."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        # The GPUs in use, if NVML knows them; otherwise all visible GPUs are read.
        self._gpus = gpus
        # zeus's numbers for the GPUs of which only a MIG instance is in use; zeus reads the whole GPU.
        self._divided: set[int] = set()
        self._monitor: Any = None
        self._errors: tuple[type[Exception], ...] = ()
        # For each GPU, the source that zeus reads, and the GPU's name.
        self._labels: dict[int, tuple[Source, str]] = {}
        self._begun_j: dict[int, float | None] = {}
        self._failure: str | None = None

    @classmethod
    def configured(cls, energy: Energy, gpus: Sequence[Gpu]) -> ZeusMeter:
        """Return a meter for the GPUs in use."""
        return cls(gpus)

    @classmethod
    def objections(cls, energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
        """Object if zeus is not installed, or if the run uses no GPU.

        On a machine without NVIDIA GPUs, a GPU is considered to be in use if zeus finds one.
        """
        if not host.has("zeus"):
            fact = "the zeus meter needs the package zeus (pip install 'lem[zeus]')."
            yield Objection("missing_package", "energy", fact)
        elif not (uses_gpu if host.gpus else _finds_a_gpu()):
            yield Objection("no_gpu_in_use", "energy", "zeus measures only GPUs, but the run uses no GPU.")

    def open(self) -> None:
        """Find the GPUs; raises `BadInput` if zeus finds none or cannot read them."""
        with quiet_stdout():
            from zeus.device import get_gpus
            from zeus.device.exception import ZeusBaseGPUError
            from zeus.device.gpu import ZeusGPUInitError
            from zeus.monitor import ZeusMonitor

        logging.getLogger("zeus").setLevel(logging.ERROR)
        self._errors = (ZeusBaseGPUError,)
        indices = self._indices()
        try:
            gpus = get_gpus()
            self._monitor = ZeusMonitor(gpu_indices=indices, cpu_indices=[])
            for index in self._monitor.gpu_indices:
                has_counter = gpus.supports_get_total_energy_consumption(index)
                self._labels[index] = "counter" if has_counter else "integral", gpus.get_name(index)
        except ZeusGPUInitError as error:
            raise BadInput(f"energy=zeus found no GPU that it can read ({error}); use energy=auto instead.") from None
        except ZeusBaseGPUError as error:
            raise BadInput(f"energy=zeus cannot read the visible GPUs ({error}); use energy=auto instead.") from None
        except ValueError:
            raise BadInput(
                "energy=zeus identifies GPUs only by number, but CUDA_VISIBLE_DEVICES contains other names. "
                "Use only numbers in CUDA_VISIBLE_DEVICES, or use energy=auto instead."
            ) from None
        if not self._labels:
            raise BadInput("energy=zeus found no GPU that it can read; use energy=auto instead.")

    def _indices(self) -> list[int] | None:
        """Return the positions of the GPUs in use among the visible GPUs; None if NVML does not know the GPUs."""
        if not self._gpus:
            return None
        shown = list(dict.fromkeys(each.uuid for each in gpu.visible()))
        hidden = [str(each.index) for each in self._gpus if each.uuid not in shown]
        if hidden:
            raise BadInput(
                f"energy=zeus cannot read GPU {', GPU '.join(hidden)}, which CUDA_VISIBLE_DEVICES hides; use "
                "energy=auto instead."
            )
        self._divided = {shown.index(each.uuid) for each in self._gpus if each.is_divided}
        return list(dict.fromkeys(shown.index(each.uuid) for each in self._gpus))

    def begin(self) -> None:
        """Begin a window; the caller has already synchronized the device."""
        _, self._failure = self._try(lambda: self._monitor.begin_window(WINDOW, sync_execution=False, restart=True))
        self._begun_j = {index: self._counter_j(index)[0] for index in self._labels}

    def _taken(self) -> tuple[EnergyReading, ...]:
        """End the window and return each GPU's energy; if one GPU is lost, zeus fails, and every energy is None."""
        measured, failure = None, self._failure
        if failure is None:
            measured, failure = self._try(lambda: self._monitor.end_window(WINDOW, sync_execution=False).gpu_energy)
        reason = failure or "zeus reported no energy for this window"
        return tuple(self._reading(index, (measured or {}).get(index), reason) for index in self._labels)

    def so_far(self) -> tuple[EnergyReading, ...]:
        """Return each counter's increase without ending zeus's window; a GPU without a counter has no energy."""
        return tuple(self._so_far_of(index) for index in self._labels)

    def _so_far_of(self, index: int) -> EnergyReading:
        before_j, (now_j, failure) = self._begun_j[index], self._counter_j(index)
        if before_j is None or now_j is None:
            return self._reading(index, None, failure or self._failure or "zeus integrates only at a window's end")
        return self._reading(index, now_j - before_j, "the counter has not advanced yet")

    def _counter_j(self, index: int) -> tuple[float | None, str | None]:
        if self._labels[index][0] != "counter":
            return None, None
        value_mj, failure = self._try(lambda: self._monitor.gpus.get_total_energy_consumption(index))
        return None if value_mj is None else value_mj * J_PER_MJ, failure

    def _try(self, call: Callable[[], Any]) -> tuple[Any, str | None]:
        """Return the result of a call to zeus, or None and the reason why it failed."""
        try:
            return call(), None
        except self._errors as error:
            return None, f"zeus: {error}"
        except KeyError:
            return None, "zeus: no power was sampled in this window"

    def _reading(self, index: int, energy_j: float | None, reason: str) -> EnergyReading:
        source, name = self._labels[index]
        is_known = energy_j is not None and energy_j > 0
        return EnergyReading(
            component="gpu",
            source=source,
            scope="shared_device" if index in self._divided else "device",
            device=f"zeus GPU {index}: {name}",
            energy_j=energy_j if is_known else None,
            method=f"zeus: {'the energy counter' if source == 'counter' else 'the integral of sampled power'}",
            reason=None if is_known else reason,
        )


def _finds_a_gpu() -> bool:
    with quiet_stdout():
        from zeus.device import get_gpus
        from zeus.device.exception import ZeusBaseGPUError
    try:
        return len(get_gpus()) > 0
    except ZeusBaseGPUError:
        return False
