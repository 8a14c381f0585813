"""Power that changes over virtual time, meters that read it, and its true energy over any span.

The meters are lem's where these can run on a virtual clock, with a sensor in place of the machine's; NVML's reads its
counters in threads, so stand-ins of its contract take its place.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from lem.energy.base import CombinedMeter, ImmediateMeter, Meter, NoMeter
from lem.energy.codecarbon import CodecarbonMeter
from lem.energy.rapl import RaplMeter
from lem.energy.replay import ReplayMeter
from lem.quantities import J_PER_KWH
from lem.record import EnergyReading, PowerSample
from tests.virtual_time import CLOCKS

UNTIL_S = 400.0
JUMP_S = 1e-4
IDLE_W, FULL_W = 60.0, 700.0
MEMORY_W = 15.0
# A GPU's counter ticks, its power is sampled, and a sample shows power that long ago.
TICK_S, SAMPLED_S, REACH_S = 0.1, 0.05, 0.2
UJ_PER_J = 1e6


# ------------------------------------------------------------------ power
@dataclass(frozen=True)
class Power:
    """Power over time, in straight lines between points."""

    points: tuple[tuple[float, float], ...]

    @cached_property
    def _times_s(self) -> list[float]:
        return [t_s for t_s, _ in self.points]

    @cached_property
    def _sums_j(self) -> list[float]:
        sums = [0.0]
        for (t, p), (u, q) in pairwise(self.points):
            sums.append(sums[-1] + (u - t) * (p + q) / 2)
        return sums

    @cached_property
    def most_w(self) -> float:
        return max(power_w for _, power_w in self.points)

    def at_w(self, t_s: float) -> float:
        place = min(max(bisect_right(self._times_s, t_s), 1), len(self.points) - 1)
        (t, p), (u, q) = self.points[place - 1 : place + 1]
        return p + (q - p) * (min(max(t_s, t), u) - t) / (u - t)

    def until_j(self, t_s: float) -> float:
        place = min(max(bisect_right(self._times_s, t_s), 1), len(self.points) - 1) - 1
        t, p = self.points[place]
        return self._sums_j[place] + (t_s - t) * (p + self.at_w(t_s)) / 2

    def energy_j(self, start_s: float, end_s: float) -> float:
        return self.until_j(end_s) - self.until_j(start_s)

    def write(self, file: Path, component: str) -> Path:
        lines = [f"{t_s!r},{power_w!r},{component}" for t_s, power_w in self.points]
        file.write_text("\n".join(["t_s,power_w,component", *lines, ""]))
        return file


def constant(power_w: float) -> Power:
    return Power(((0.0, power_w), (UNTIL_S, power_w)))


SHAPES = ("constant", "idle", "steps", "ramps", "mixed")


def drawn(shape: str, seed: int) -> Power:
    """Return power that stays, jumps between idle and full or in steps, goes up and down in ramps, or does all that."""
    chance = random.Random(f"{shape}{seed}")
    if shape == "constant":
        return constant(chance.uniform(IDLE_W, FULL_W))
    t_s = 0.0
    points = [(t_s, IDLE_W)]
    while t_s < UNTIL_S:
        length_s = chance.choice([0.25, 0.5, 1.0, 3.0]) * chance.uniform(0.8, 1.2)
        levels_w = [IDLE_W, FULL_W] if shape == "idle" else [IDLE_W, 200.0, 450.0, FULL_W]
        next_w = chance.choice(levels_w)
        if shape == "ramps" or (shape == "mixed" and chance.random() < 0.5):
            points.append((t_s := t_s + length_s, next_w))
        else:
            points += [(t_s + JUMP_S, next_w), (t_s := t_s + length_s, next_w)]
    return Power(tuple(points))


@dataclass(frozen=True)
class Powers:
    """What the components of a machine draw."""

    gpu: Power
    cpu: Power
    dram: Power = field(default_factory=lambda: constant(MEMORY_W))

    def of(self, component: str) -> Power:
        found: Power = getattr(self, component)
        return found


# ------------------------------------------------------------------ meters
class GpuMeter(ImmediateMeter):
    """As NVML's: a counter that is known at its ticks within a window and exactly at its ends, beside a trace.

    Without a counter, energy is the integral of the trace, up to its last sample. `lost_at_s` is when the driver ceases
    to answer.
    """

    def __init__(self, power: Power, *, has_counter: bool = True, lost_at_s: float | None = None) -> None:
        self._power, self._has_counter, self._lost_at_s = power, has_counter, lost_at_s
        self._begun_s = 0.0

    def begin(self) -> None:
        self._begun_s = CLOCKS.now_s()

    def _taken(self) -> tuple[EnergyReading, ...]:
        return (self._reading(CLOCKS.now_s()),)

    def so_far(self) -> tuple[EnergyReading, ...] | None:
        step_s = TICK_S if self._has_counter else SAMPLED_S
        return (self._reading(CLOCKS.now_s() // step_s * step_s),)

    def trace(self) -> list[PowerSample]:
        times_s = [i * SAMPLED_S for i in range(int(CLOCKS.now_s() / SAMPLED_S) + 1)]
        return [PowerSample(round(t_s * 1e9), "gpu", "GPU-0", self._power.at_w(t_s - REACH_S)) for t_s in times_s]

    def _reading(self, until_s: float) -> EnergyReading:
        is_known = until_s > self._begun_s and (self._lost_at_s is None or until_s < self._lost_at_s)
        energy_j = self._power.energy_j(self._begun_s, until_s) if is_known else None
        # Samples show what was drawn before; so do those around the edges.
        seen_j = self._power.energy_j(self._begun_s - REACH_S, until_s - REACH_S) if is_known else None
        return EnergyReading(
            component="gpu",
            source="counter" if self._has_counter else "integral",
            scope="device",
            device="GPU-0",
            energy_j=energy_j if self._has_counter else seen_j,
            method="counter" if self._has_counter else "integral of samples",
            resolution_s=TICK_S if self._has_counter else SAMPLED_S,
            trace_energy_j=seen_j,
            reason=None if is_known else "the GPU is lost",
            trace_reach_s=REACH_S + SAMPLED_S if is_known else None,
        )


class BlindMeter(GpuMeter):
    """One that knows no energy before the window closes."""

    def so_far(self) -> None:
        return None


class CPU:
    """codecarbon's model of the processor: a sample each second, as its thread takes them."""

    _mode, _model, _tdp = "cpu_load", "virtual", 100

    def __init__(self, power: Power) -> None:
        self._power, self.begun_s = power, 0.0

    @property
    def _power_history(self) -> Sequence[tuple[SimpleNamespace, float]]:
        whole = int(CLOCKS.now_s() - self.begun_s)
        starts_s = [self.begun_s + i for i in range(whole)]
        return [(SimpleNamespace(W=self._power.energy_j(s, s + 1.0)), 1.0) for s in starts_s]


class Tracker:
    """codecarbon's tracker on a virtual clock."""

    def __init__(self, power: Power) -> None:
        self._power, self._cpu = power, CPU(power)
        self._hardware = [self._cpu]

    def start_task(self, name: str) -> None:
        self._cpu.begun_s = CLOCKS.now_s()

    def stop_task(self, name: str | None = None) -> SimpleNamespace:
        begun_s, now_s = self._cpu.begun_s, CLOCKS.now_s()
        return SimpleNamespace(
            cpu_energy=self._power.energy_j(begun_s, now_s) / J_PER_KWH,
            ram_energy=MEMORY_W * (now_s - begun_s) / J_PER_KWH,
            ram_power=MEMORY_W,
        )

    def stop(self) -> None:
        pass


def meter(kind: str, powers: Powers, folder: Path) -> Meter:
    """Return a meter that has not been opened."""
    made: dict[str, Callable[[], Meter]] = {
        "none": NoMeter,
        "replay": lambda: ReplayMeter(str(powers.gpu.write(folder / "gpu.csv", "gpu"))),
        "rapl": lambda: RaplMeter(str(folder / "powercap")),
        "estimate": CodecarbonMeter,
        "counter": lambda: GpuMeter(powers.gpu),
        "counter+rapl": lambda: CombinedMeter(GpuMeter(powers.gpu), RaplMeter(str(folder / "powercap"))),
        "counter+estimate": lambda: CombinedMeter(GpuMeter(powers.gpu), CodecarbonMeter()),
        "integral": lambda: GpuMeter(powers.gpu, has_counter=False),
        "lost": lambda: GpuMeter(powers.gpu, lost_at_s=2.5),
        "blind": lambda: BlindMeter(powers.gpu),
    }
    return made[kind]()


KINDS = (
    "replay", "counter", "rapl", "estimate", "counter+rapl", "counter+estimate", "integral", "lost", "blind", "none",
)  # fmt: skip


@contextmanager
def metered(kinds: Sequence[str], powers: Powers, folder: Path) -> Iterator[None]:
    """Have each attempt use the meter of its number; the last kind is that of all further attempts."""
    zone = folder / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text(f"{2**40}\n")

    def made(*_) -> Meter:
        assert CLOCKS.attempt is not None
        return meter(kinds[min(CLOCKS.attempt._number, len(kinds)) - 1], powers, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lem.runner.attempt.make_meter", made)
        patch.setattr("lem.energy.codecarbon._offline_tracker", lambda: Tracker(powers.cpu))
        patch.setattr("lem.energy.rapl.Zone.energy_uj", lambda _: int(powers.cpu.until_j(CLOCKS.now_s()) * UJ_PER_J))
        yield
