"""Energy from a recorded power trace, for tests and for replaying a measurement made elsewhere.

The trace is a CSV file with the columns `t_s` and `power_w`, and optionally `component` (default: gpu). The trace's
time 0 is the moment when the meter is opened. Power is interpolated linearly between samples. This module knows nothing
about sensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from lem.energy.base import ImmediateMeter
from lem.errors import BadInput
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.quantities import NS_PER_S
from lem.record import Component, EnergyReading
from lem.spec.experiment import Energy
from lem.spec.rules import Objection

Trace = tuple[np.ndarray, np.ndarray]


class ReplayMeter(ImmediateMeter):
    """Integrates a recorded trace over each window."""

    def __init__(self, trace: str | None) -> None:
        self._path = trace
        self._traces: dict[Component, Trace] = {}
        self._opened_ns = 0
        self._begun_ns = 0

    @classmethod
    def configured(cls, energy: Energy, gpus: Sequence[Gpu]) -> ReplayMeter:
        """Return a meter that replays the configured trace."""
        return cls(energy.trace)

    @classmethod
    def objections(cls, energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
        """Object if the trace is missing or cannot be read."""
        if energy.trace is None:
            yield Objection("bad_trace", "energy.trace", "the replay meter needs a trace.")
            return
        try:
            read_trace(Path(energy.trace))
        except BadInput as error:
            yield Objection("bad_trace", "energy.trace", str(error))

    def open(self) -> None:
        """Read the trace and start its clock."""
        if self._path is None:
            raise BadInput("energy=replay needs energy.trace: a CSV file with the columns t_s and power_w.")
        self._traces = read_trace(Path(self._path))
        self._opened_ns = self.clock.now_ns()

    def begin(self) -> None:
        """Record the time at which the window begins."""
        self._begun_ns = self.clock.now_ns()

    def _taken(self) -> tuple[EnergyReading, ...]:
        """Return the integral of the trace since `begin`, per component."""
        return self.so_far()

    def so_far(self) -> tuple[EnergyReading, ...]:
        """Return the integral up to now; this takes about 50 µs, or longer if the window has thousands of samples."""
        start_s = (self._begun_ns - self._opened_ns) / NS_PER_S
        end_s = (self.clock.now_ns() - self._opened_ns) / NS_PER_S
        return tuple(self._reading(component, trace, start_s, end_s) for component, trace in self._traces.items())

    def _reading(self, component: Component, trace: Trace, start_s: float, end_s: float) -> EnergyReading:
        energy_j, (t_s, _) = integral_j(trace, start_s, end_s), trace
        return EnergyReading(
            component=component,
            source="replay",
            scope="device",
            device=str(self._path),
            energy_j=energy_j,
            method="trapezoidal integral of a recorded trace",
            resolution_s=float(np.diff(t_s).max()) if len(t_s) > 1 else None,  # the longest gap
            reason=None if energy_j is not None else _outside_reason(trace, start_s, end_s),
        )


def _outside_reason(trace: Trace, start_s: float, end_s: float) -> str:
    t_s, _ = trace
    if start_s < t_s[0]:
        return f"the trace begins at {t_s[0]:.3f} s, after the window's beginning at {start_s:.3f} s"
    return f"the trace ends at {t_s[-1]:.3f} s, before the window's end at {end_s:.3f} s"


def integral_j(trace: Trace, start_s: float, end_s: float) -> float | None:
    """Return the integral of power over [start_s, end_s] by the trapezoidal rule, in joules.

    The result is None if the trace does not cover the whole interval.
    """
    t_s, power_w = trace
    if start_s < t_s[0] or end_s > t_s[-1]:
        return None
    inside = t_s[(t_s > start_s) & (t_s < end_s)]
    at = np.concatenate(([start_s], inside, [end_s]))
    return float(np.trapezoid(np.interp(at, t_s, power_w), at))


def read_trace(path: Path) -> dict[Component, Trace]:
    """Read a trace: for each component, its times in seconds and its powers in watts.

    Raises:
        BadInput: the file is missing or invalid; the message names its path and the problem.
    """
    try:
        samples = _samples(path)
    except FileNotFoundError:
        raise BadInput(f"The power trace {path} does not exist.") from None
    except KeyError as missing:
        raise BadInput(f"The power trace {path} has no column {missing}.") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"The power trace {path} cannot be read: {error}.") from None
    if not samples:
        raise BadInput(f"The power trace {path} has no samples.")
    columns = {component: np.array(sorted(points)).T for component, points in samples.items()}
    return {component: (t_s, power_w) for component, (t_s, power_w) in columns.items()}


def _samples(path: Path) -> dict[Component, list[tuple[float, float]]]:
    import csv

    samples: dict[Component, list[tuple[float, float]]] = {}
    # Spreadsheets write a byte order mark at the beginning of the file.
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if any(";" in column for column in rows.fieldnames or ()):
            raise ValueError("the columns are separated by semicolons; separate them with commas")
        for row in rows:
            component = row.get("component") or "gpu"
            if component not in get_args(Component):
                raise ValueError(f"unknown component '{component}'")
            sample = (_number(row["t_s"]), _number(row["power_w"]))
            if not np.isfinite(sample).all() or sample[1] < 0:
                raise ValueError(f"{sample[1]} W at {sample[0]} s is not a valid sample")
            samples.setdefault(component, []).append(sample)  # type: ignore[arg-type]
    return samples


def _number(text: str | None) -> float:
    if text is None:
        raise ValueError("a row has fewer values than the header has columns")
    return float(text)
