"""The part of a checkup that is about the NVIDIA driver, and about the GPUs' sensors and settings.

If the record of a run would warn about the fact in a finding, the finding has that warning's remedy. This module
changes no settings and opens no CUDA context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lem.energy.nvml import Sensors, sensors
from lem.machine import gpu
from lem.machine.gpu import Gpu
from lem.machine.host import Host, device_states
from lem.record import DeviceState, ForeignProcess
from lem.runner.finding import Finding
from lem.warning_codes import NOT_THROTTLING, WARNINGS

NOT_REPORTED = "the driver does not report it"
LISTED_PROCESSES = 3
MS_PER_S = 1e3
ASK_NVIDIA_SMI = "Run nvidia-smi to see the cause; after an update of the driver, reboot."
NO_DRIVER = (
    "If this machine has an NVIDIA GPU, install its driver; in a container, allow access to the GPUs (--gpus all)."
)


def gpu_findings(host: Host) -> Iterator[Finding]:
    """Yield the findings about the driver and each visible GPU."""
    if problem := gpu.why_no_driver():
        is_absent = "not found" in problem.lower()
        fact = (
            "there is no NVIDIA driver." if is_absent else f"the NVIDIA driver does not answer: {problem.rstrip('.')}."
        )
        yield Finding("driver", "missing", fact, NO_DRIVER if is_absent else ASK_NVIDIA_SMI)
        return
    found = gpu.topology()
    version = found.driver_version if found else None
    cuda = found.cuda_version if found else None
    values = {"driver_version": version, "cuda_version": cuda}
    yield Finding("driver", "ok", f"{version or 'unknown version'}, CUDA up to {cuda or 'unknown'}.", values=values)
    yield from _visible(host, found.gpus if found else ())
    each = list({device.uuid: device for device in host.gpus}.values())
    states = {state.uuid: state for state in device_states(each)}
    readable = sensors(each)
    for device in each:
        yield from _of_sensors(device, readable.get(device.uuid))
        yield from _of_state(device, states[device.uuid])


def _visible(host: Host, present: tuple[gpu.PhysicalGpu, ...]) -> Iterator[Finding]:
    names = dict.fromkeys(device.name for device in host.gpus)
    visible = len({device.uuid for device in host.gpus})
    values = {"visible": visible, "present": len(present)}
    for lost in present:
        if lost.reason is not None:
            yield Finding("visible_gpus", "missing", f"does not answer: {lost.reason}.", ASK_NVIDIA_SMI, lost.index)
    if visible == 0:
        fact = "CUDA_VISIBLE_DEVICES hides all GPUs." if present else "the driver finds no GPU."
        remedy = "Unset CUDA_VISIBLE_DEVICES, or name a GPU in it." if present else ASK_NVIDIA_SMI
        yield Finding("visible_gpus", "missing", fact, remedy, values=values)
        return
    hidden = f" of {len(present)}" if visible < len(present) else ""
    yield Finding("visible_gpus", "ok", f"{visible}{hidden}: {', '.join(names)}.", values=values)


# ------------------------------------------------------------------ what can be read
def _of_sensors(device: Gpu, found: Sensors | None) -> Iterator[Finding]:
    if found is None:
        yield Finding("gpu_energy", "missing", "the GPU does not answer.", ASK_NVIDIA_SMI, device.index)
        return
    yield _energy(device, found)
    yield _power(device, found)


def _energy(device: Gpu, found: Sensors) -> Finding:
    whole = " of the whole module" if found.covers_module else ""
    values = {"source": "counter" if found.has_counter else "integral", "tick_s": found.tick_s}
    if not found.has_counter and found.power_w is None:
        fact = f"no energy counter ({found.counter_problem}) and no power ({found.power_problem})."
        return Finding("gpu_energy", "missing", fact, ASK_NVIDIA_SMI, device.index, {"source": None, "tick_s": None})
    if found.has_counter and found.counter_problem:
        fact = f"the energy counter cannot be read: {found.counter_problem}."
        return Finding("gpu_energy", "missing", fact, ASK_NVIDIA_SMI, device.index, {"source": None, "tick_s": None})
    if not found.has_counter:
        fact = f"integral of sampled power{whole}, because there is no energy counter."
        return Finding("gpu_energy", "limited", fact, WARNINGS["energy_integrated"].remedy, device.index, values)
    tick = "tick unknown" if found.tick_s is None else f"tick {found.tick_s * MS_PER_S:.0f} ms"
    if device.is_divided:
        fact = f"energy counter{whole}, {tick}; it covers the whole GPU, because a MIG instance has no counter."
        return Finding("gpu_energy", "limited", fact, WARNINGS["energy_shared"].remedy, device.index, values)
    if found.tick_s is None:
        fact = f"energy counter{whole}, {tick}: each edge of a window may be off by one tick."
        return Finding("gpu_energy", "limited", fact, WARNINGS["short_window"].remedy, device.index, values)
    return Finding("gpu_energy", "ok", f"energy counter{whole}, {tick}.", None, device.index, values)


def _power(device: Gpu, found: Sensors) -> Finding:
    values = {"power_w": found.power_w, "is_instant": found.power_is_instant}
    if found.power_w is None:
        fact = f"the power cannot be read: {found.power_problem}."
        remedy = "Energy comes from the counter alone; prefill energy and idle checks need power."
        return Finding("gpu_power", "missing", fact, remedy, device.index, values)
    if found.power_is_instant:
        return Finding("gpu_power", "ok", "instant value (NVML_FI_DEV_POWER_INSTANT).", None, device.index, values)
    fact = (
        "only nvmlDeviceGetPowerUsage, which on Ampere (except A100 and A30) and newer GPUs is the average over the "
        "last second."
    )
    remedy = (
        "Use a driver that reports instant power; until then, trust the power trace only over windows of 5 s or more."
    )
    return Finding("gpu_power", "limited", fact, remedy, device.index, values)


# ------------------------------------------------------------------ how it is set
def _of_state(device: Gpu, state: DeviceState) -> Iterator[Finding]:
    for finding in (_mig(device, state), _persistence(state), _power_limit(state), _clocks(state), _processes(state)):
        yield Finding(finding.check, finding.status, finding.fact, finding.remedy, device.index, finding.values)


def _mig(device: Gpu, state: DeviceState) -> Finding:
    values = {"mig": device.is_divided if state.mig is None else state.mig}
    if device.is_divided:
        return Finding("mig", "limited", "on.", WARNINGS["energy_shared"].remedy, values=values)
    return Finding("mig", "ok", "off." if state.mig is False else "not supported.", values=values)


def _persistence(state: DeviceState) -> Finding:
    values = {"persistence": state.persistence}
    if state.persistence is None:
        return Finding("persistence", "missing", f"{NOT_REPORTED}.", values=values)
    if state.persistence:
        return Finding("persistence", "ok", "on.", values=values)
    fact = "off: the driver may unload between runs, which resets GPU settings and delays the next run."
    return Finding(
        "persistence", "limited", fact, "sudo nvidia-smi -pm 1, or start nvidia-persistenced.", values=values
    )


def _power_limit(state: DeviceState) -> Finding:
    limit_w, default_w = state.power_limit_w, state.default_power_limit_w
    values = {"power_limit_w": limit_w, "default_power_limit_w": default_w}
    if limit_w is None:
        return Finding("power_limit", "missing", f"{NOT_REPORTED}.", values=values)
    if default_w is None:
        return Finding("power_limit", "ok", f"{limit_w:g} W; the driver does not report the default.", values=values)
    if limit_w == default_w:
        return Finding("power_limit", "ok", f"{limit_w:g} W, the default.", values=values)
    remedy = (
        f"Restore the default with sudo nvidia-smi -pl {default_w:g}, unless this limit is part of your study. "
        "Every record holds the limit."
    )
    return Finding("power_limit", "limited", f"{limit_w:g} W; the default is {default_w:g} W.", remedy, values=values)


def _clocks(state: DeviceState) -> Finding:
    """Return the finding about the current limits of the clocks.

    NVML does not report directly whether clocks are locked. A setting that fixes the clocks appears among the active
    throttle reasons, but possibly not while the GPU is idle.
    """
    reasons = state.throttle_reasons
    values: Mapping[str, object] = {
        "sm_clock_mhz": state.sm_clock_mhz,
        "max_sm_clock_mhz": state.max_sm_clock_mhz,
        "reasons": None if reasons is None else list(reasons),
    }
    if reasons is None:
        return Finding("clocks", "missing", "the driver does not report their limits.", values=values)
    limit = "" if state.max_sm_clock_mhz is None else f" of {state.max_sm_clock_mhz}"
    now = "not reported" if state.sm_clock_mhz is None else f"SM at {state.sm_clock_mhz}{limit} MHz"
    throttling = [reason for reason in reasons if reason not in NOT_THROTTLING]
    if throttling:
        fact = f"{now}, throttled now: {', '.join(throttling)}."
        return Finding("clocks", "limited", fact, WARNINGS["throttled"].remedy, values=values)
    if reasons:
        return Finding("clocks", "ok", f"{now}, held by a setting: {', '.join(reasons)}.", values=values)
    return Finding("clocks", "ok", f"{now}; the driver reports no limit or setting in force.", values=values)


def _processes(state: DeviceState) -> Finding:
    others = state.foreign_processes
    values = {"processes": None if others is None else [_as_data(each) for each in others]}
    if others is None:
        return Finding("gpu_processes", "missing", f"{NOT_REPORTED}.", values=values)
    if not others:
        return Finding("gpu_processes", "ok", "none.", values=values)
    named = [f"{each.pid} ({each.name})" if each.name else str(each.pid) for each in others[:LISTED_PROCESSES]]
    more = f" and {len(others) - LISTED_PROCESSES} more" if len(others) > LISTED_PROCESSES else ""
    fact = f"{len(others)} process{'es' * (len(others) > 1)}: {', '.join(named)}{more}."
    return Finding("gpu_processes", "limited", fact, WARNINGS["foreign_process"].remedy, values=values)


def _as_data(process: ForeignProcess) -> dict[str, object]:
    return {"pid": process.pid, "used_bytes": process.used_bytes, "name": process.name}
