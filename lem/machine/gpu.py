"""The NVIDIA devices of this machine, as the driver's management library (NVML) tells.

Three questions: which GPUs would CUDA show (`visible`), what is there (`topology`), how is one doing (`state`).
Opens no CUDA context, so it can be asked from any process. Without a driver there are simply no devices.
`CUDA_VISIBLE_DEVICES` is read, never written. Knows nothing of energy or of engines.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lem.record import DeviceState, ForeignProcess

# Bits of NVML's clocks-event reasons. That a GPU is idle (bit 0) is no reason to doubt its clocks.
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
    """A physical GPU; `mig_uuid` is set where only one MIG instance of it is visible to CUDA.

    `memory_bytes` is None where the driver does not tell, as of the parent of the only MIG instance that is allowed.
    `compute_capability` is CUDA's (major, minor), by which kernels choose; None where the driver does not tell.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int | None
    mig_uuid: str | None = None
    compute_capability: tuple[int, int] | None = None

    @property
    def visible_uuid(self) -> str:
        """The UUID of what CUDA sees, the GPU or its MIG instance, as CUDA_VISIBLE_DEVICES takes it."""
        return self.mig_uuid or self.uuid


@dataclass(frozen=True)
class MigInstance:
    """A MIG instance of a physical GPU; `visible` tells whether CUDA_VISIBLE_DEVICES leaves it to choose from."""

    uuid: str | None
    name: str | None
    profile: str | None
    memory_bytes: int | None
    visible: bool


@dataclass(frozen=True)
class PhysicalGpu:
    """A GPU with its MIG instances; a field is None where the driver does not tell.

    `visible` tells whether CUDA_VISIBLE_DEVICES names the GPU or an instance of it. A GPU that does not answer at
    all has a `reason`.
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
    """What a driver has: its version, the newest CUDA that it supports, and its GPUs, visible or not."""

    driver_version: str | None
    cuda_version: str | None
    gpus: tuple[PhysicalGpu, ...]


@contextmanager
def nvml() -> Iterator[Any]:
    """Yield the initialised `pynvml` module, or None where there is no NVIDIA driver."""
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


def installed() -> list[Gpu]:
    """Return the physical GPUs that answer, in the driver's order; empty without a driver."""
    with nvml() as lib:
        if lib is None:
            return []
        return [gpu for i in range(lib.nvmlDeviceGetCount()) if (gpu := _answering(lib, i)) is not None]


def visible(environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Return the physical GPUs that CUDA would show, in CUDA's order.

    `CUDA_VISIBLE_DEVICES` may name indices, `GPU-…` or `MIG-…` UUIDs (a unique beginning is enough); as in CUDA,
    the first entry that names no device ends the list. A GPU of which two MIG instances are visible is
    returned twice, once for each.
    """
    return _chosen(installed(), environ)


def pick(entry: int | str, among: Sequence[Gpu]) -> Gpu | None:
    """Return the visible GPU that an index among them or a UUID (`GPU-…`, `MIG-…`) means; None if none or several."""
    if isinstance(entry, int):
        return among[entry] if 0 <= entry < len(among) else None
    matches = [gpu for gpu in among if entry in (gpu.mig_uuid, gpu.uuid) or _begins(gpu.uuid, entry)]
    if matches or not entry.startswith("MIG-"):
        return matches[0] if len(matches) == 1 else None
    parent = _parent_of(entry)
    whole = parent is not None and any(gpu.uuid == parent.uuid and gpu.mig_uuid is None for gpu in among)
    return parent if whole else None


def topology(environ: Mapping[str, str] = os.environ) -> Topology | None:
    """Return the driver's GPUs and their MIG instances, or None where there is no NVIDIA driver."""
    with nvml() as lib:
        if lib is None:
            return None
        cuda = _told(lib, "nvmlSystemGetCudaDriverVersion")
        driver = _told(lib, "nvmlSystemGetDriverVersion")
        indices = range(lib.nvmlDeviceGetCount())
        chosen = _chosen([gpu for i in indices if (gpu := _answering(lib, i)) is not None], environ)
        return Topology(
            driver_version=None if driver is None else _text(driver),
            # 12080 is 12.8
            cuda_version=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            gpus=tuple(_physical(lib, i, chosen) for i in indices),
        )


def state(uuid: str, of_engine: Collection[int] = ()) -> DeviceState:
    """Return how a GPU is doing at this moment; nothing but its UUID where it or the driver cannot be asked.

    Process ids are the driver's: in a container that has process ids of its own, they may be those of the host. Those
    of this process, of what it has started, and `of_engine` are not foreign.
    """
    with nvml() as lib:
        handle = None if lib is None else _told(lib, "nvmlDeviceGetHandleByUUID", uuid)
        if handle is None:
            return DeviceState(uuid)
        ecc = _told(lib, "nvmlDeviceGetEccMode", handle)
        persistence = _told(lib, "nvmlDeviceGetPersistenceMode", handle)
        return DeviceState(
            uuid=uuid,
            sm_clock_mhz=_told(lib, "nvmlDeviceGetClockInfo", handle, lib.NVML_CLOCK_SM),
            memory_clock_mhz=_told(lib, "nvmlDeviceGetClockInfo", handle, lib.NVML_CLOCK_MEM),
            max_sm_clock_mhz=_told(lib, "nvmlDeviceGetMaxClockInfo", handle, lib.NVML_CLOCK_SM),
            temperature_c=_told(lib, "nvmlDeviceGetTemperature", handle, lib.NVML_TEMPERATURE_GPU),
            power_limit_w=_watts(_told(lib, "nvmlDeviceGetEnforcedPowerLimit", handle)),
            default_power_limit_w=_watts(_told(lib, "nvmlDeviceGetPowerManagementDefaultLimit", handle)),
            persistence=None if persistence is None else bool(persistence),
            ecc=None if ecc is None else bool(ecc[0]),
            mig=_mig(lib, handle),
            throttle_reasons=_throttle_reasons(lib, handle),
            foreign_processes=_foreign_processes(lib, handle, of_engine),
        )


def used_memory_bytes(gpu: Gpu) -> int | None:
    """Return the memory that all processes use on a GPU, or on a MIG instance of it; None where it is not told."""
    with nvml() as lib:
        handle = None if lib is None else _told(lib, "nvmlDeviceGetHandleByUUID", gpu.visible_uuid)
        memory = None if handle is None else _told(lib, "nvmlDeviceGetMemoryInfo", handle)
        return None if memory is None else int(memory.used)


# ------------------------------------------------------------------ CUDA_VISIBLE_DEVICES
def _chosen(everything: list[Gpu], environ: Mapping[str, str]) -> list[Gpu]:
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return everything
    found = []
    for entry in chosen.split(","):
        gpu = _named(entry.strip(), everything)
        if gpu is None:
            break
        found.append(gpu)
    return found


def _named(entry: str, everything: list[Gpu]) -> Gpu | None:
    if entry.isdecimal():
        return next((gpu for gpu in everything if gpu.index == int(entry)), None)
    if entry.startswith("GPU-"):
        matches = [gpu for gpu in everything if _begins(gpu.uuid, entry)]
        return matches[0] if len(matches) == 1 else None
    if entry.startswith("MIG-"):
        return _parent_of(entry)
    return None


def _begins(uuid: str, entry: str) -> bool:
    return entry.startswith("GPU-") and uuid.startswith(entry)


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


# ------------------------------------------------------------------ asking the driver
def _told(lib: Any, function: str, *arguments: Any) -> Any:
    """Return what a function of the driver's library answers, or None where it refuses."""
    try:
        return getattr(lib, function)(*arguments)
    except lib.NVMLError:
        return None


def _gpu(lib: Any, index: int) -> Gpu:
    handle = lib.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        index=index,
        uuid=_text(lib.nvmlDeviceGetUUID(handle)),
        name=_text(lib.nvmlDeviceGetName(handle)),
        memory_bytes=_memory(lib, handle),
        compute_capability=_told(lib, "nvmlDeviceGetCudaComputeCapability", handle),
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
        power_limit_w=_watts(_told(lib, "nvmlDeviceGetEnforcedPowerLimit", handle)),
        mig=_mig(lib, handle),
        visible=any(other.uuid == gpu.uuid for other in chosen),
        instances=tuple(_instances(lib, handle, [other for other in chosen if other.uuid == gpu.uuid])),
    )


def _instances(lib: Any, handle: Any, chosen: list[Gpu]) -> Iterator[MigInstance]:
    named = {gpu.mig_uuid for gpu in chosen}
    for k in range(_told(lib, "nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        instance = _told(lib, "nvmlDeviceGetMigDeviceHandleByIndex", handle, k)
        if instance is None:
            continue  # there is room for another one
        uuid, name = (_told(lib, f"nvmlDeviceGet{what}", instance) for what in ("UUID", "Name"))
        yield MigInstance(
            uuid=None if uuid is None else _text(uuid),
            name=None if name is None else _text(name),
            # The driver calls it "<GPU> MIG <profile>".
            profile=None if name is None else _text(name).rpartition(" MIG ")[2],
            memory_bytes=_memory(lib, instance),
            visible=None in named or (uuid is not None and _text(uuid) in named),
        )


def _memory(lib: Any, handle: Any) -> int | None:
    memory = _told(lib, "nvmlDeviceGetMemoryInfo", handle)
    return None if memory is None else int(memory.total)


def _mig(lib: Any, handle: Any) -> bool | None:
    modes = _told(lib, "nvmlDeviceGetMigMode", handle)
    return None if modes is None else bool(modes[0])


def _throttle_reasons(lib: Any, handle: Any) -> tuple[str, ...] | None:
    mask = _told(lib, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if mask is None:  # the function's name before driver 535
        mask = _told(lib, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return None if mask is None else tuple(name for bit, name in THROTTLE_REASONS.items() if mask & bit)


def _foreign_processes(lib: Any, handle: Any, of_engine: Collection[int]) -> tuple[ForeignProcess, ...] | None:
    processes = _told(lib, "nvmlDeviceGetComputeRunningProcesses", handle)
    if processes is None:
        return None
    own = _own_processes()
    return tuple(
        ForeignProcess(pid=p.pid, used_bytes=p.usedGpuMemory, name=_process_name(lib, p.pid))
        for p in processes
        if p.pid not in own and p.pid not in of_engine
    )


def _own_processes() -> frozenset[int]:
    """Return this process and those that it has started: an engine's workers."""
    import psutil

    return frozenset([os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))])


def _process_name(lib: Any, pid: int) -> str | None:
    name = _told(lib, "nvmlSystemGetProcessName", pid)
    return None if name is None else _text(name)


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts * W_PER_MW


def _text(value: str | bytes) -> str:
    # Older versions of the library's Python binding return bytes.
    return value.decode() if isinstance(value, bytes) else value
