"""The NVIDIA devices of this machine, queried through the driver's management library (NVML).

The main functions return the GPUs that CUDA would show (`visible`), the GPUs that the driver knows (`topology`), and
the state of a GPU (`state`). The module opens no CUDA context, so any process can use it. Without a driver, it reports
no devices. It reads `CUDA_VISIBLE_DEVICES` but never sets it. It knows nothing about energy or engines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lem.machine.processes import children
from lem.record import DeviceState, ForeignProcess

# The bits of NVML's clocks-event reasons that count as throttling; bit 0, for example, means that the GPU is idle.
THROTTLE_REASONS = {
    0x02: "applications_clocks_setting",
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
}
W_PER_MW = 1e-3


@dataclass(frozen=True)
class Gpu:
    """A physical GPU; `mig_uuid` is set if CUDA_VISIBLE_DEVICES names one of its MIG instances.

    `memory_bytes` is None if the driver does not report it, as is the case if only a MIG instance of the GPU is
    accessible. `compute_capability` is CUDA's (major, minor) version number for the GPU, which determines which kernels
    can run; None if the driver does not report it. `mig` says whether the GPU is in MIG mode.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int | None
    mig_uuid: str | None = None
    compute_capability: tuple[int, int] | None = None
    mig: bool = False

    @property
    def is_divided(self) -> bool:
        """Whether CUDA uses only a MIG instance; always True in MIG mode, even if the GPU itself is selected."""
        return self.mig or self.mig_uuid is not None

    @property
    def computing_name(self) -> str:
        """The GPU's name, marked if only a MIG instance is used, because the datasheet applies to the whole GPU."""
        return f"{self.name} (MIG instance)" if self.is_divided else self.name

    @property
    def visible_uuid(self) -> str:
        """The UUID of the device that CUDA sees (the GPU or a MIG instance), as written in CUDA_VISIBLE_DEVICES."""
        return self.mig_uuid or self.uuid


@dataclass(frozen=True)
class MigInstance:
    """A MIG instance of a physical GPU; `visible` is False if CUDA_VISIBLE_DEVICES hides the instance."""

    uuid: str | None
    name: str | None
    profile: str | None
    memory_bytes: int | None
    visible: bool


@dataclass(frozen=True)
class PhysicalGpu:
    """A GPU with its MIG instances; a field is None if the driver does not report it.

    `visible` is False if CUDA_VISIBLE_DEVICES hides the GPU and all its instances. `reason` says why the GPU does not
    respond; None if it responds.
    """

    index: int
    uuid: str | None
    name: str | None
    memory_bytes: int | None
    power_limit_w: float | None
    mig: bool | None
    visible: bool
    instances: tuple[MigInstance, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Topology:
    """The driver's version, the newest CUDA version that the driver supports, and all GPUs, visible or hidden."""

    driver_version: str | None
    cuda_version: str | None
    gpus: tuple[PhysicalGpu, ...]


@contextmanager
def nvml() -> Iterator[Any]:
    """Yield the initialized `pynvml` module, or None if there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def why_no_driver() -> str | None:
    """Return why the NVIDIA driver's library does not respond, in the library's own words; None if it responds."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return str(error)
    pynvml.nvmlShutdown()
    return None


def installed() -> list[Gpu]:
    """Return the physical GPUs that respond, in the driver's order; the list is empty without a driver."""
    with nvml() as lib:
        if lib is None:
            return []
        return [gpu for i in range(lib.nvmlDeviceGetCount()) if (gpu := _answering(lib, i)) is not None]


def visible(environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Return the physical GPUs that CUDA would show, in CUDA's order.

    `CUDA_VISIBLE_DEVICES` may contain indices, `GPU-…` UUIDs (a unique prefix is enough) and complete `MIG-…` UUIDs. As
    in CUDA, the list ends at the first entry that matches no device. A GPU with two visible MIG instances is returned
    twice, once for each.
    """
    return _chosen(installed(), environ)


def pick(entry: int | str, among: Sequence[Gpu]) -> Gpu | None:
    """Return the GPU at a position in `among`, or with a UUID (`GPU-…`, `MIG-…`); None if none or several match."""
    if isinstance(entry, int):
        return among[entry] if 0 <= entry < len(among) else None
    is_prefix = entry.startswith("GPU-")
    matches = [g for g in among if entry in (g.mig_uuid, g.uuid) or (is_prefix and g.uuid.startswith(entry))]
    if matches or not entry.startswith("MIG-"):
        return matches[0] if len(matches) == 1 else None
    parent = _parent_of(entry)
    whole = parent is not None and any(gpu.uuid == parent.uuid and gpu.mig_uuid is None for gpu in among)
    return parent if whole else None


def topology(environ: Mapping[str, str] = os.environ) -> Topology | None:
    """Return the driver's GPUs and their MIG instances, or None if there is no NVIDIA driver."""
    with nvml() as lib:
        if lib is None:
            return None
        cuda = ask(lib, "nvmlSystemGetCudaDriverVersion")
        indices = range(lib.nvmlDeviceGetCount())
        chosen = _chosen([gpu for i in indices if (gpu := _answering(lib, i)) is not None], environ)
        return Topology(
            driver_version=ask(lib, "nvmlSystemGetDriverVersion", convert=_text),
            # For CUDA 12.8, the driver reports 12080.
            cuda_version=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            gpus=tuple(_physical(lib, i, chosen) for i in indices),
        )


def state(uuid: str, of_engine: Collection[int] = ()) -> DeviceState:
    """Return the current state of a GPU, or only its UUID if the GPU or the driver does not respond.

    Process ids come from the driver; in a container with its own process ids, they may be the host's. This process, its
    descendants and the processes in `of_engine` do not count as foreign.
    """
    with nvml() as lib:
        handle = None if lib is None else ask(lib, "nvmlDeviceGetHandleByUUID", uuid)
        if handle is None:
            return DeviceState(uuid)
        return DeviceState(
            uuid=uuid,
            sm_clock_mhz=ask(lib, "nvmlDeviceGetClockInfo", handle, lib.NVML_CLOCK_SM),
            memory_clock_mhz=ask(lib, "nvmlDeviceGetClockInfo", handle, lib.NVML_CLOCK_MEM),
            max_sm_clock_mhz=ask(lib, "nvmlDeviceGetMaxClockInfo", handle, lib.NVML_CLOCK_SM),
            temperature_c=ask(lib, "nvmlDeviceGetTemperature", handle, lib.NVML_TEMPERATURE_GPU),
            power_limit_w=ask(lib, "nvmlDeviceGetEnforcedPowerLimit", handle, convert=_watts),
            default_power_limit_w=ask(lib, "nvmlDeviceGetPowerManagementDefaultLimit", handle, convert=_watts),
            persistence=ask(lib, "nvmlDeviceGetPersistenceMode", handle, convert=bool),
            ecc=ask(lib, "nvmlDeviceGetEccMode", handle, convert=_is_on),
            mig=ask(lib, "nvmlDeviceGetMigMode", handle, convert=_is_on),
            throttle_reasons=throttle_reasons(lib, handle),
            foreign_processes=_foreign_processes(lib, handle, of_engine),
        )


def computing(gpu: Gpu) -> frozenset[int] | None:
    """Return the ids of the processes that compute on a GPU or its MIG instance; None if the driver does not list them.

    In a container with its own process ids, the ids may be the host's.
    """
    with nvml() as lib:
        handle = None if lib is None else ask(lib, "nvmlDeviceGetHandleByUUID", gpu.visible_uuid)
        running = None if handle is None else ask(lib, "nvmlDeviceGetComputeRunningProcesses", handle)
        return None if running is None else frozenset(process.pid for process in running)


def used_memory_bytes(gpu: Gpu) -> int | None:
    """Return the memory in use by all processes on a GPU or its MIG instance; None if the driver does not report it."""
    with nvml() as lib:
        handle = None if lib is None else ask(lib, "nvmlDeviceGetHandleByUUID", gpu.visible_uuid)
        memory = None if handle is None else ask(lib, "nvmlDeviceGetMemoryInfo", handle)
        return None if memory is None else int(memory.used)


# ------------------------------------------------------------------ CUDA_VISIBLE_DEVICES
def _chosen(everything: list[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return everything
    found = []
    for entry in map(str.strip, chosen.split(",")):
        if entry.isdecimal():
            gpu = next((gpu for gpu in everything if gpu.index == int(entry)), None)
        else:
            gpu = pick(entry, everything)
        if gpu is None:
            break
        found.append(gpu)
    return found


def _parent_of(mig_uuid: str) -> Gpu | None:
    with nvml() as lib:
        if lib is None:
            return None
        try:
            instance = lib.nvmlDeviceGetHandleByUUID(mig_uuid)
            parent = lib.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
            gpu = _gpu(lib, lib.nvmlDeviceGetIndex(parent))
        except lib.NVMLError:
            return None
        return replace(gpu, mig_uuid=mig_uuid)


# ------------------------------------------------------------------ querying the driver
def ask(lib: Any, function: str, *arguments: Any, convert: Callable[[Any], Any] = lambda answer: answer) -> Any:
    """Call a function of the driver's library and return its converted result, or None if it raises an error."""
    try:
        return convert(getattr(lib, function)(*arguments))
    except lib.NVMLError:
        return None


def _gpu(lib: Any, index: int) -> Gpu:
    handle = lib.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        index=index,
        uuid=_text(lib.nvmlDeviceGetUUID(handle)),
        name=_text(lib.nvmlDeviceGetName(handle)),
        memory_bytes=ask(lib, "nvmlDeviceGetMemoryInfo", handle, convert=_total),
        compute_capability=ask(lib, "nvmlDeviceGetCudaComputeCapability", handle),
        # GPUs without MIG do not support this query.
        mig=bool(ask(lib, "nvmlDeviceGetMigMode", handle, convert=_is_on)),
    )


def _answering(lib: Any, index: int) -> Gpu | None:
    try:
        return _gpu(lib, index)
    except lib.NVMLError:
        return None


def _physical(lib: Any, index: int, chosen: list[Gpu]) -> PhysicalGpu:
    try:
        gpu, handle = _gpu(lib, index), lib.nvmlDeviceGetHandleByIndex(index)
    except lib.NVMLError as error:
        return PhysicalGpu(index, None, None, None, None, None, visible=False, reason=str(error))
    return PhysicalGpu(
        index=index,
        uuid=gpu.uuid,
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        power_limit_w=ask(lib, "nvmlDeviceGetEnforcedPowerLimit", handle, convert=_watts),
        mig=ask(lib, "nvmlDeviceGetMigMode", handle, convert=_is_on),
        visible=any(other.uuid == gpu.uuid for other in chosen),
        instances=tuple(_instances(lib, handle, [other for other in chosen if other.uuid == gpu.uuid])),
    )


def _instances(lib: Any, handle: Any, chosen: list[Gpu]) -> Iterator[MigInstance]:
    named = {gpu.mig_uuid for gpu in chosen}
    for k in range(ask(lib, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        instance = ask(lib, "nvmlDeviceGetMigDeviceHandleByIndex", handle, k)
        if instance is None:
            continue  # the GPU has no instance with this number
        uuid, name = (ask(lib, f"nvmlDeviceGet{what}", instance, convert=_text) for what in ("UUID", "Name"))
        yield MigInstance(
            uuid=uuid,
            name=name,
            # The driver names an instance "<GPU> MIG <profile>".
            profile=None if name is None else name.rpartition(" MIG ")[2],
            memory_bytes=ask(lib, "nvmlDeviceGetMemoryInfo", instance, convert=_total),
            visible=None in named or (uuid is not None and uuid in named),
        )


def throttle_reasons(lib: Any, handle: Any) -> tuple[str, ...] | None:
    """Return the reasons why a GPU is currently throttled; None if the driver does not report them."""
    mask = ask(lib, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if mask is None:  # before driver 535, the function had another name
        mask = ask(lib, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return None if mask is None else tuple(name for bit, name in THROTTLE_REASONS.items() if mask & bit)


def _foreign_processes(lib: Any, handle: Any, of_engine: Collection[int]) -> tuple[ForeignProcess, ...] | None:
    running = ask(lib, "nvmlDeviceGetComputeRunningProcesses", handle)
    if running is None:
        return None
    own = {os.getpid(), *(child.pid for child in children()), *of_engine}
    return tuple(foreign(lib, process) for process in running if process.pid not in own)


def foreign(lib: Any, process: Any) -> ForeignProcess:
    """Return a description of a process that the driver lists."""
    name = ask(lib, "nvmlSystemGetProcessName", process.pid, convert=_text)
    return ForeignProcess(process.pid, process.usedGpuMemory, name)


def _watts(milliwatts: int) -> float:
    return milliwatts * W_PER_MW


def _total(memory: Any) -> int:
    return int(memory.total)


def _is_on(modes: Any) -> bool:
    """Return whether a mode is on now, given its current and its pending state."""
    return bool(modes[0])


def _text(value: str | bytes) -> str:
    # Older versions of the library's Python binding return bytes.
    return value.decode() if isinstance(value, bytes) else value
