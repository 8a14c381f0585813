"""Watches GPUs during a window: how long the driver throttled them, and which other processes used them.

Before and after the window, the GPU is idle, so its state at these times says little about the window. The driver
counts how long each of its policies has throttled a GPU; these counters are read at both edges of the window. In
between, a thread samples the active throttle reasons and the processes, which takes about 10 µs per GPU and sample
(H100, measured 2026-11-26). This module knows nothing about energy and opens no CUDA context.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any

from lem.machine import gpu
from lem.machine.gpu import Gpu
from lem.quantities import NS_PER_S
from lem.record import DeviceWindow, ForeignProcess

PERIOD_S = 0.1
# NVML_FI_DEV_PERF_POLICY_…: the time in nanoseconds for which a policy has throttled the GPU. Policies that do not
# limit the work (low utilization) or that the user has chosen (clocks, synchronized GPUs) are left out.
POLICIES = {74: "power", 75: "thermal", 77: "board_limit", 79: "reliability"}


class Watch:
    """Watches each of the given physical GPUs, one window at a time.

    Args:
        gpus: the GPUs; if empty, nothing is watched.
        own: a function that returns the ids of the run's own processes, called whenever an unknown process appears.
    """

    def __init__(self, gpus: Sequence[Gpu] = (), own: Callable[[], Collection[int]] = tuple) -> None:
        self._uuids = tuple(dict.fromkeys(each.uuid for each in gpus))
        self._own = own
        self._open = ExitStack()
        self._seen: list[_Seen] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._begun_ns = 0

    def begin(self) -> None:
        """Read the counters and start sampling."""
        self._stop()
        lib = self._open.enter_context(gpu.nvml()) if self._uuids else None
        self._seen = [] if lib is None else [_Seen(lib, uuid) for uuid in self._uuids]
        self._begun_ns = time.perf_counter_ns()
        if self._seen:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._sample, name="gpu-watch", daemon=True)
            self._thread.start()

    def end(self) -> tuple[DeviceWindow, ...]:
        """Stop sampling, and return the observations since `begin`; the result is empty without GPUs or driver."""
        duration_s = (time.perf_counter_ns() - self._begun_ns) / NS_PER_S
        throttled_s = [seen.throttled_s() for seen in self._seen]
        self._stop()
        found = tuple(seen.summary(duration_s, s) for seen, s in zip(self._seen, throttled_s, strict=True))
        self._seen = []
        return found

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._open.close()

    def _sample(self) -> None:
        while True:
            for seen in self._seen:
                seen.sample(self._own)
            if self._stopped.wait(PERIOD_S):
                return


class _Seen:
    """The observations of one GPU."""

    def __init__(self, lib: Any, uuid: str) -> None:
        self.uuid = uuid
        self._lib = lib
        self._handle = gpu.ask(lib, "nvmlDeviceGetHandleByUUID", uuid)
        self._begun_s = self._counters_s()
        self._samples = 0
        self._reasons: Counter[str] | None = None
        self._processes: dict[int, ForeignProcess | None] | None = None

    def _counters_s(self) -> dict[str, float]:
        fields = None
        if self._handle is not None:
            fields = gpu.ask(self._lib, "nvmlDeviceGetFieldValues", self._handle, list(POLICIES))
        return {POLICIES[f.fieldId]: f.value.ullVal / NS_PER_S for f in fields or () if f.nvmlReturn == 0}

    def throttled_s(self) -> dict[str, float] | None:
        """Return how long each policy has throttled the GPU since `begin`, omitting zeros; None if that is unknown."""
        now_s = self._counters_s()
        known = self._begun_s.keys() & now_s.keys()
        if not known:
            return None
        return {name: now_s[name] - s for name, s in self._begun_s.items() if name in known and now_s[name] > s}

    def sample(self, own: Callable[[], Collection[int]]) -> None:
        """Record the active throttle reasons and any new processes."""
        if self._handle is None:
            return
        self._samples += 1
        reasons = gpu.throttle_reasons(self._lib, self._handle)
        if reasons is not None:
            self._reasons = Counter() if self._reasons is None else self._reasons
            self._reasons.update(reasons)
        running = gpu.ask(self._lib, "nvmlDeviceGetComputeRunningProcesses", self._handle)
        if running is not None:
            self._processes = {} if self._processes is None else self._processes
            new = [process for process in running if process.pid not in self._processes]
            ours = own() if new else ()
            self._processes |= {p.pid: None if p.pid in ours else gpu.foreign(self._lib, p) for p in new}

    def summary(self, duration_s: float, throttled_s: dict[str, float] | None) -> DeviceWindow:
        """Return the observations in the form used in records."""
        shares = None if self._reasons is None else {name: n / self._samples for name, n in self._reasons.items()}
        processes = None if self._processes is None else tuple(filter(None, self._processes.values()))
        return DeviceWindow(self.uuid, duration_s, throttled_s, shares, processes)
