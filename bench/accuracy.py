"""How far the GPU meter's joules are from the truth, on power curves whose integral is known, and what it costs.

`python -m nox -s accuracy`. The real NVML binding runs on a stand-in for the driver's library (tests/nvml_standin.c),
which serves power curves as functions of the monotonic clock; the meter knows nothing of it. Prints a table and
fails when an error exceeds its limit. Real sensors add errors of their own (docs/methodology.md).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.nvml_standin import build, environment

WINDOWS_S = (5, 20)
LIMITS = {5: {"counter": 0.02, "trace": 0.02}, 20: {"counter": 0.005, "trace": 0.02}}
SAMPLING_LIMIT = 0.01
PARENT_LIMIT = 0.005


@dataclass(frozen=True)
class Curve:
    """A power curve as the scenario writes it, and its integral from 0 to t in joules."""

    name: str
    scenario: str
    integral_j: Callable[[float], float]


def constant(power_w: float) -> Curve:
    """Return a constant power."""
    return Curve(f"constant {power_w:g} W", f"constant {power_w:g}", lambda t: power_w * t)


def ramp(low_w: float, high_w: float, period_s: float) -> Curve:
    """Return a sawtooth."""

    def integral_j(t: float) -> float:
        whole, part = divmod(t, period_s)
        slope = (high_w - low_w) / period_s
        return whole * (low_w + high_w) / 2 * period_s + low_w * part + slope * part**2 / 2

    return Curve(
        f"ramp {low_w:g}–{high_w:g} W in {period_s:g} s", f"ramp {low_w:g} {high_w:g} {period_s:g}", integral_j
    )


def square(low_w: float, high_w: float, hz: float) -> Curve:
    """Return a square wave: low in the first half of a period, high in the second."""

    def integral_j(t: float) -> float:
        whole, part = divmod(t * hz, 1.0)
        return (whole * (low_w + high_w) / 2 + low_w * min(part, 0.5) + high_w * max(part - 0.5, 0.0)) / hz

    return Curve(f"square {low_w:g}/{high_w:g} W, {hz:g} Hz", f"square {low_w:g} {high_w:g} {hz:g}", integral_j)


CURVES = (
    constant(300), ramp(100, 400, 7), square(100, 400, 0.5), square(100, 400, 1), square(100, 400, 2),
    square(100, 400, 3),
)  # fmt: skip
TICKS_MS = (100, 10)

METER = """
import json, sys, time
from lem.machine import gpu
from lem.energy.nvml import NvmlMeter
seconds = float(sys.argv[1])
meter = NvmlMeter(gpu.visible())
meter.open()
meter.begin()
start_s, cpu_s = time.monotonic(), time.process_time()
time.sleep(seconds)
cpu_s, end_s = time.process_time() - cpu_s, time.monotonic()
readings = meter.end()
meter.close()
print(json.dumps({
    "start_s": start_s, "end_s": end_s, "cpu_share": cpu_s / (end_s - start_s),
    "readings": [[r.energy_j, r.trace_energy_j, r.resolution_s] for r in readings],
}))
"""


def measured(library: Path, scenario: str, seconds: float) -> dict:
    """Run the meter over one window on a scenario."""
    file = library.parent / "scenario.txt"
    file.write_text(textwrap.dedent(scenario))
    done = subprocess.run(
        [sys.executable, "-c", METER, str(seconds)],
        env=environment(library, file),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def accuracy(library: Path) -> bool:
    """Print the error of each curve, tick and window; return whether all are within their limits."""
    print(f"{'power':<28} {'tick':>6} {'window':>7} {'truth':>11} {'counter':>9} {'trace':>9}  learnt tick")
    good = True
    for seconds in WINDOWS_S:
        for curve in CURVES:
            lines = ["devices 2"]
            lines += [f"device {i} power {curve.scenario}\ndevice {i} tick_ms {ms}" for i, ms in enumerate(TICKS_MS)]
            window = measured(library, "\n".join(lines), seconds)
            truth_j = curve.integral_j(window["end_s"]) - curve.integral_j(window["start_s"])
            for ms, (counter_j, trace_j, tick_s) in zip(TICKS_MS, window["readings"], strict=True):
                errors = {"counter": counter_j / truth_j - 1, "trace": trace_j / truth_j - 1}
                bad = [name for name, error in errors.items() if not abs(error) <= LIMITS[seconds][name]]
                good &= not bad
                print(
                    f"{curve.name:<28} {ms:>3} ms {seconds:>5} s {truth_j:>9.1f} J {errors['counter']:>+9.2%} "
                    f"{errors['trace']:>+9.2%}  {(tick_s or math.nan) * 1e3:.1f} ms{'  TOO FAR OFF' if bad else ''}",
                    flush=True,
                )
    return good


def cost_of_sampling(library: Path) -> bool:
    """Print what the trace costs while it samples one GPU; return whether it is within its limit."""
    share = measured(library, "devices 1\ndevice 0 power constant 300", 10)["cpu_share"]
    print(f"sampling one GPU at 20 Hz: {share:.3%} of a core (limit {SAMPLING_LIMIT:.1%})")
    return share < SAMPLING_LIMIT


def cost_of_waiting() -> bool:
    """Print what the parent process costs while its worker runs; return whether it is within its limit."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "lem", "experiment", "--backend", "simulated", "-m", "any", "-d", "sample", "-y",
            "-n", "150", "energy=none", "backend.decode_s_per_token=0.001",
        ]  # fmt: skip
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("Prompts"))
        parent = psutil.Process(process.pid)
        before = sum(parent.cpu_times()[:2])
        seconds = 10.0
        psutil.wait_procs([parent], timeout=seconds)
        share = (sum(parent.cpu_times()[:2]) - before) / seconds
        process.kill()
        process.wait()
    print(f"the waiting parent: {share:.3%} of a core (limit {PARENT_LIMIT:.1%})")
    return share < PARENT_LIMIT


def main() -> int:
    """Measure and print; return 1 when a limit is exceeded."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        results = [accuracy(library), cost_of_sampling(library)]
    results.append(cost_of_waiting())
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
