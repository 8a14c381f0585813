"""CPU and memory energy from the processor's own counters (RAPL), read through Linux's powercap tree.

The meter reads the package zones (`intel-rapl:N`; AMD's packages appear under the same driver) and the DRAM zones
inside them (`intel-rapl:N:M`). It skips zones whose energy would otherwise be counted twice: core and uncore are parts
of their package, psys is the whole platform, and the `intel-rapl-mmio` tree shows the same packages again. A package's
counter includes everything that runs on the package. Processors of laptops and desktops often have no DRAM zone; then
there is no reading for memory. The meter knows nothing about GPUs and estimates nothing.

A counter has 32 bits and wraps around after about 65 to 262 kJ, that is, after minutes to an hour under load. A thread
reads it regularly while a window is open, so windows may be longer than that.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lem.energy.base import ImmediateMeter
from lem.errors import BadInput
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.quantities import NS_PER_S
from lem.record import Component, EnergyReading
from lem.spec.experiment import Energy
from lem.spec.rules import Objection

POWERCAP_DIR = "/sys/class/powercap"
UJ_PER_J = 1e6
# No single package (or its memory) sustains this power. At this power, a counter takes a certain time to reach its
# largest value. If two readings are less than that time apart, the counter has wrapped around at most once.
MAX_POWER_W = 1000.0
# Extra seconds at that power, which allow for power peaks, and for counter updates just before or after a reading.
GAIN_SLACK_S = 1.0
COUNTER_MAX = 2**32 - 1

_PACKAGE_ZONE = re.compile(r"intel-rapl:\d+")
_SUBZONE = re.compile(r"(intel-rapl:\d+):\d+")
# A package with several dies has one zone per die: package-0-die-1.
_PACKAGE_NAME = re.compile(r"package-\d+(-die-\d+)?")


@dataclass(frozen=True)
class Zone:
    """One zone of the powercap tree, such as `intel-rapl:0 package-0`."""

    directory: Path
    name: str
    component: Component

    @property
    def label(self) -> str:
        """The zone's id and name, used as the device name of a reading."""
        return f"{self.directory.name} {self.name}"

    def energy_uj(self) -> int:
        """Return the counter's value in µJ, or raise OSError or ValueError if it cannot be read."""
        return int((self.directory / "energy_uj").read_text())

    def range_uj(self) -> int:
        """Return the counter's largest value in µJ, or raise OSError or ValueError if it cannot be read."""
        return int((self.directory / "max_energy_range_uj").read_text())


class RaplMeter(ImmediateMeter):
    """Reads the energy counters of all packages and their DRAM zones.

    `poll_s` is the time between two readings of the counters while a window is open. It must be shorter than the time
    in which a counter wraps around.
    """

    options = ("idle_s", "powercap_dir")

    def __init__(
        self,
        powercap_dir: str = POWERCAP_DIR,
        poll_s: float = 30.0,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._powercap_dir = powercap_dir
        self._poll_s = poll_s
        self._clock_ns = clock_ns
        self._counters: list[_Counter] = []
        self._window_is_open = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def configured(cls, energy: Energy, gpus: Sequence[Gpu]) -> RaplMeter:
        """Return a meter for the configured powercap tree."""
        return cls(energy.powercap_dir)

    @classmethod
    def objections(cls, energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
        """Object if no package's counter can be read."""
        if fact := _why_unreadable(find_zones(energy.powercap_dir), energy.powercap_dir):
            yield Objection("rapl_unreadable", "energy", fact)

    def open(self) -> None:
        """Find the zones, and start the thread that reads the counters often enough to miss no wraparound.

        Raises:
            BadInput: no package's counter can be read.
        """
        zones = find_zones(self._powercap_dir)
        if fact := _why_unreadable(zones, self._powercap_dir):
            raise BadInput(Objection("rapl_unreadable", "energy", fact).message)
        self._counters = [_Counter(zone, self._clock_ns) for zone in zones]
        self._closing.clear()
        self._thread = threading.Thread(target=self._poll, name="lem-rapl", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Record the counters' values."""
        with self._lock:
            self._window_is_open = True
            for counter in self._counters:
                counter.start()

    def _taken(self) -> tuple[EnergyReading, ...]:
        """Return the increase of each zone's counter since `begin`, packages first."""
        with self._lock:
            self._window_is_open = False
            return self._advanced()

    def so_far(self) -> tuple[EnergyReading, ...]:
        """Return the increase of each zone's counter since `begin`; reading takes about 10 µs per zone."""
        with self._lock:
            return self._advanced()

    def _advanced(self) -> tuple[EnergyReading, ...]:
        for counter in self._counters:
            counter.advance()
        return tuple(counter.reading() for counter in self._counters)

    def close(self) -> None:
        """Stop the thread."""
        if self._thread is not None:
            self._closing.set()
            self._thread.join()
            self._thread = None

    def _poll(self) -> None:
        while not self._closing.wait(self._poll_s):
            with self._lock:
                if self._window_is_open:
                    for counter in self._counters:
                        counter.advance()


class _Counter:
    """A zone's energy over one window, accumulated from any number of readings of its counter."""

    def __init__(self, zone: Zone, clock_ns: Callable[[], int]) -> None:
        self._zone = zone
        self._clock_ns = clock_ns
        self._range_uj = 0
        self._last_uj = 0
        self._last_ns = 0
        self._total_uj = 0
        self._failure: str | None = None

    def start(self) -> None:
        """Begin a window."""
        self._total_uj, self._failure = 0, None
        try:
            self._range_uj = self._zone.range_uj()
            self._last_uj = self._zone.energy_uj()
        except (OSError, ValueError) as error:
            self._fail(error)
        self._last_ns = self._clock_ns()

    def advance(self) -> None:
        """Add the increase since the last reading; do nothing after a failure, because the energy is then unknown."""
        if self._failure is not None:
            return
        try:
            now_uj = self._zone.energy_uj()
        except (OSError, ValueError) as error:
            self._fail(error)
            return
        now_ns = self._clock_ns()
        gap_s = (now_ns - self._last_ns) / NS_PER_S
        gained_uj = increase_uj(self._last_uj, now_uj, self._range_uj)
        counter = f"the counter of {self._zone.label}"
        # This happens if the process was suspended.
        if gap_s > self._range_uj / UJ_PER_J / MAX_POWER_W:
            self._failure = f"{counter} was not read for {gap_s:.0f} s and may have wrapped around unnoticed"
        # A reset looks like a wraparound, but with an increase that is larger than a package's possible energy use.
        if gained_uj / UJ_PER_J > MAX_POWER_W * (gap_s + GAIN_SLACK_S):
            self._failure = f"{counter} was reset during the window (was the machine suspended?)"
        self._total_uj += gained_uj
        self._last_uj, self._last_ns = now_uj, now_ns

    def reading(self) -> EnergyReading:
        """Return the window's energy."""
        # With some firmware, and on some virtual machines, the counter of a zone never changes.
        reason = self._failure or (None if self._total_uj else f"the counter of {self._zone.label} did not advance")
        return EnergyReading(
            component=self._zone.component,
            source="counter",
            scope="package",
            device=self._zone.label,
            energy_j=None if reason else self._total_uj / UJ_PER_J,
            method=f"RAPL counter of zone {self._zone.label}, powercap energy_uj",
            resolution_j=step_uj(self._range_uj) / UJ_PER_J,
            reason=reason,
        )

    def _fail(self, error: OSError | ValueError) -> None:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        self._failure = f"the counter of {self._zone.label} could not be read: {why}"


def step_uj(range_uj: int) -> int:
    """Return a counter's step in µJ, derived from its largest value, which is 2^32 - 1 steps.

    Real counters have steps of 15.3 or 61 µJ. If the largest value is smaller than 2^32 - 1 µJ, it says nothing about
    the step; the step is then assumed to be 1 µJ, the resolution of the file.
    """
    return max(1, round(range_uj / COUNTER_MAX))


def increase_uj(before_uj: int, after_uj: int, range_uj: int) -> int:
    """Return a counter's increase between two readings, assuming that it wrapped around at most once.

    One step after its largest value, the counter is 0 again, so a full cycle is the range plus one step.
    """
    gained_uj = after_uj - before_uj
    return gained_uj if gained_uj >= 0 else gained_uj + range_uj + step_uj(range_uj)


def find_zones(powercap_dir: str = POWERCAP_DIR) -> tuple[Zone, ...]:
    """Return the zones to read, packages first, in the kernel's order; empty if the machine has no RAPL."""
    directories = {path.name: path for path in _directories(Path(powercap_dir))}
    packages = [
        Zone(path, name, "cpu")
        for path in _in_order(directories, _PACKAGE_ZONE)
        if _PACKAGE_NAME.fullmatch(name := _name(path))
    ]
    parents = {zone.directory.name for zone in packages}
    dram = [
        Zone(path, "dram", "dram")
        for path in _in_order(directories, _SUBZONE)
        if path.name.rpartition(":")[0] in parents and _name(path) == "dram"
    ]
    return (*packages, *dram)


def readable(powercap_dir: str = POWERCAP_DIR) -> bool:
    """Return whether the counter of at least one package can be read."""
    return any(zone.component == "cpu" and _is_readable(zone) for zone in find_zones(powercap_dir))


def _directories(root: Path) -> Iterator[Path]:
    """Yield the directories of all zones, some of them twice.

    A subzone appears twice because /sys/class/powercap shows it both next to and inside its package.
    """
    for pattern in ("intel-rapl:*/intel-rapl:*", "intel-rapl:*"):
        try:
            yield from sorted(root.glob(pattern))
        except OSError:
            continue


def _in_order(directories: dict[str, Path], zone_id: re.Pattern[str]) -> list[Path]:
    found = [path for name, path in directories.items() if zone_id.fullmatch(name)]
    return sorted(found, key=lambda path: [int(number) for number in path.name.split(":")[1:]])


def _name(directory: Path) -> str:
    try:
        return (directory / "name").read_text().strip()
    except (OSError, ValueError):
        return ""


def _is_readable(zone: Zone) -> bool:
    try:
        zone.energy_uj()
    except (OSError, ValueError):
        return False
    return True


def _why_unreadable(zones: tuple[Zone, ...], powercap_dir: str) -> str | None:
    """Return why no package's counter can be read, or None if at least one can."""
    packages = [zone for zone in zones if zone.component == "cpu"]
    if not packages:
        return (
            f"this machine has no RAPL counters: {powercap_dir} has no package zone (few virtual machines and "
            "containers have one)."
        )
    if not any(_is_readable(zone) for zone in packages):
        return (
            f"since CVE-2020-8694, the kernel lets only root read the RAPL counters in {powercap_dir}. To let everyone "
            f"read them until the next boot, run: sudo chmod a+r {powercap_dir}/intel-rapl:*/energy_uj."
        )
    return None
