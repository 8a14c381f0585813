"""Compares the GPU meter's joules with power curves that have known integrals, and measures the meter's CPU use.

The benchmark covers these cases:

- one GPU at a time, with fast calls;
- eight GPUs, with calls as slow as a real driver's;
- power that the driver averages, or renews only ten times a second;
- two ranks that open their windows together.

Run with `python -m nox -s accuracy`. The real NVML binding runs on a stand-in for the driver's library
(tests/nvml_standin.c), which reports power curves as functions of the monotonic clock; the meter cannot tell the
difference. The benchmark prints tables, and fails if an error exceeds its limit. Real sensors have additional errors
(docs/concepts/methodology.md).
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
# The limits for eight GPUs in windows of 5 s. The mean error shows a bias. The largest error is that of a single
# reading; it grows with the time that a call takes, including the wait for its turn.
SLOW_CALLS_MS = (0, 1, 3, 15)
SLOW_WINDOWS = 3
BIAS_LIMIT_MS = 5.0  # 0.1% of the window
LARGEST_LIMIT_MS = 10.0
LARGEST_LIMIT_CALLS = 1.5
RANKS_LIMIT = 0.01
RANKS_APART_LIMIT_S = 0.02
SAMPLING_LIMIT = 0.01
PARENT_LIMIT = 0.005


@dataclass(frozen=True)
class Curve:
    """A power curve: its name, its notation in a scenario, and its integral from 0 to t seconds, in joules."""

    name: str
    scenario: str
    integral_j: Callable[[float], float]


def constant(power_w: float) -> Curve:
    """Return a curve of constant power."""
    return Curve(f"constant {power_w:g} W", f"constant {power_w:g}", lambda t: power_w * t)


def ramp(low_w: float, high_w: float, period_s: float) -> Curve:
    """Return a sawtooth curve that rises from low to high power in each period."""

    def integral_j(t: float) -> float:
        whole, part = divmod(t, period_s)
        slope = (high_w - low_w) / period_s
        return whole * (low_w + high_w) / 2 * period_s + low_w * part + slope * part**2 / 2

    return Curve(
        f"ramp {low_w:g}–{high_w:g} W in {period_s:g} s", f"ramp {low_w:g} {high_w:g} {period_s:g}", integral_j
    )


def square(low_w: float, high_w: float, hz: float) -> Curve:
    """Return a square wave, low in the first half of each period and high in the second."""

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
seconds, windows = float(sys.argv[1]), int(sys.argv[2])
meter = NvmlMeter(gpu.visible())
meter.open()
for k in range(windows):
    meter.settle()
    cpu_s = time.process_time()
    meter.begin()
    start_s = time.monotonic()
    time.sleep(seconds + k * 0.0237)
    end_s = time.monotonic()
    meter.mark()
    cpu_s = time.process_time() - cpu_s
    readings = meter.end()
    print(json.dumps({
        "start_s": start_s, "end_s": end_s, "cpu_share": cpu_s / (end_s - start_s),
        "readings": [[r.energy_j, r.trace_energy_j, r.resolution_s, r.trace_reach_s] for r in readings],
    }))
meter.close()
"""


def measured(library: Path, scenario: str, seconds: float, windows: int = 1) -> list[dict]:
    """Run the meter on a scenario in a separate process; return one dict of readings per window."""
    file = library.parent / "scenario.txt"
    file.write_text(textwrap.dedent(scenario))
    done = subprocess.run(
        [sys.executable, "-c", METER, str(seconds), str(windows)],
        env=environment(library, file),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def true_j(curve: Curve, window: dict) -> float:
    """Return the integral of the curve over a window, in joules."""
    return curve.integral_j(window["end_s"]) - curve.integral_j(window["start_s"])


def accuracy(library: Path) -> bool:
    """Print the error for each curve, tick and window length; return whether all are within their limits."""
    print(f"{'power':<28} {'tick':>6} {'window':>7} {'truth':>11} {'counter':>9} {'trace':>9}  learned tick")
    good = True
    for seconds in WINDOWS_S:
        for curve in CURVES:
            lines = ["devices 2"]
            lines += [f"device {i} power {curve.scenario}\ndevice {i} tick_ms {ms}" for i, ms in enumerate(TICKS_MS)]
            (window,) = measured(library, "\n".join(lines), seconds)
            truth_j = true_j(curve, window)
            for ms, (counter_j, trace_j, tick_s, _) in zip(TICKS_MS, window["readings"], strict=True):
                errors = {"counter": counter_j / truth_j - 1, "trace": trace_j / truth_j - 1}
                bad = [name for name, error in errors.items() if not abs(error) <= LIMITS[seconds][name]]
                good &= not bad
                print(
                    f"{curve.name:<28} {ms:>3} ms {seconds:>5} s {truth_j:>9.1f} J {errors['counter']:>+9.2%} "
                    f"{errors['trace']:>+9.2%}  {(tick_s or math.nan) * 1e3:.1f} ms{'  TOO FAR OFF' if bad else ''}",
                    flush=True,
                )
    return good


def slow_calls(library: Path) -> bool:
    """Print the errors for eight GPUs with slow counter calls; return whether all are within their limits."""
    print(f"\n{'eight GPUs, whose ticks are 12 ms apart':<50} {'windows':>9} {'mean error':>12} {'largest':>10}")
    good = True
    curve = ramp(100, 700, 40)
    for ms in SLOW_CALLS_MS:
        for is_in_turn in (False, True) if ms == 3 else (False,):
            lines = ["devices 8", *(["counters_in_turn"] if is_in_turn else [])]
            for i in range(8):
                lines += [f"device {i} power {curve.scenario}", f"device {i} tick_ms 100 {12 * i}"]
                lines += [f"device {i} counter_ms {ms}"]
            errors_ms = []
            for window in measured(library, "\n".join(lines), 5, SLOW_WINDOWS):
                truth_j = true_j(curve, window)
                power_w = truth_j / (window["end_s"] - window["start_s"])
                errors_ms += [1e3 * (reading[0] - truth_j) / power_w for reading in window["readings"]]
            mean_ms, largest_ms = sum(errors_ms) / len(errors_ms), max(errors_ms, key=abs)
            limit_ms = LARGEST_LIMIT_MS + LARGEST_LIMIT_CALLS * ms * (8 if is_in_turn else 1)
            bad = abs(mean_ms) > BIAS_LIMIT_MS or abs(largest_ms) > limit_ms
            good &= not bad
            name = f"a call takes {ms} ms{', one GPU after the other' if is_in_turn else ''}"
            print(
                f"{name:<50} {SLOW_WINDOWS:>3} x 5 s {mean_ms:>+9.2f} ms {largest_ms:>+7.2f} ms"
                f"{'  TOO FAR OFF' if bad else ''}",
                flush=True,
            )
    return good


def averaging(library: Path) -> bool:
    """Print the errors for power that the driver averages or renews slowly; return whether all are within bounds.

    A bound is the energy that delayed samples may miss at the two edges: the maximum age of a sample times the range of
    the curve's power.
    """
    print(f"\n{'power values, renewed every 100 ms':<50} {'window':>9} {'counter':>9} {'trace':>9} {'bound':>10}")
    good = True
    sensors = {
        "instant": "power_update_ms 100",
        "mean of 1 s": "power_update_ms 100\ndevice 0 average_s 1\ndevice 0 no_instant",
    }
    for name, more in sensors.items():
        for curve in (square(100, 400, 0.3), ramp(100, 400, 7)):
            lines = f"device 0 power {curve.scenario}\ndevice 0 tick_ms 100\ndevice 0 {more}"
            (window,) = measured(library, lines, 5)
            truth_j = true_j(curve, window)
            ((counter_j, trace_j, _, reach_s),) = window["readings"]
            bound = 300 * reach_s / truth_j
            counter, trace = counter_j / truth_j - 1, trace_j / truth_j - 1
            bad = abs(counter) > LIMITS[5]["counter"] or abs(trace) > bound
            good &= not bad
            print(
                f"{name + ', ' + curve.name:<50} {5:>7} s {counter:>+9.2%} {trace:>+9.2%} {bound:>10.1%}"
                f"{'  TOO FAR OFF' if bad else ''}",
                flush=True,
            )
    return good


def two_ranks(library: Path) -> bool:
    """Print the error of a run of two processes with a GPU each; return whether it is within its limit.

    The processes must also open their windows together. Otherwise, the metering process misses some of the other
    process's work.
    """
    file = library.parent / "scenario.txt"
    gpus = (f"device {i} power constant 300\ndevice {i} tick_ms 100 {40 * i}\ndevice {i} counter_ms 3" for i in (0, 1))
    file.write_text("devices 2\n" + "\n".join(gpus))
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "lem", "experiment", "--backend", "simulated", "-m", "any", "-d", "sample", "-y",
            "-n", "60", "energy=auto", "energy.idle_s=0", "num_processes=2", "backend.gpus=2",
            "backend.decode_s_per_token=0.002",
        ]  # fmt: skip
        subprocess.run(command, cwd=folder, env=environment(library, file), capture_output=True, check=True)
        records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("results/raw/*/process_*.json"))]
    windows = [next(phase for phase in record["phases"] if phase["name"] == "measured") for record in records]
    energy_j = sum(r["energy_j"] for r in windows[0]["energy"] if r["component"] == "gpu")
    error = energy_j / (600 * windows[0]["duration_s"]) - 1
    opened_s = [record["window_opened_unix_s"] for record in records]
    apart_s = abs(opened_s[0] - opened_s[1]), abs(windows[0]["duration_s"] - windows[1]["duration_s"])
    bad = abs(error) > RANKS_LIMIT or max(apart_s) > RANKS_APART_LIMIT_S
    print(
        f"\ntwo ranks, a GPU each, calls of 3 ms: {error:+.2%} over {windows[0]['duration_s']:.2f} s; the windows "
        f"opened {apart_s[0] * 1e3:.1f} ms apart, and their lengths differed by {apart_s[1] * 1e3:.1f} ms"
        f"{'  TOO FAR OFF' if bad else ''}"
    )
    return not bad


def cost_of_sampling(library: Path) -> bool:
    """Print the CPU use of sampling one GPU's power; return whether it is within its limit."""
    (window,) = measured(library, "devices 1\ndevice 0 power constant 300", 10)
    share = window["cpu_share"]
    print(f"sampling one GPU at 20 Hz: {share:.3%} of a core (limit {SAMPLING_LIMIT:.1%})")
    return share < SAMPLING_LIMIT


def cost_of_waiting() -> bool:
    """Print the CPU use of the parent process while its worker runs; return whether it is within its limit."""
    # The worker notices only after a moment that its parent is gone, and may still write to the folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
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
    """Run and print all checks; return 1 if a limit is exceeded."""
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        checks = (accuracy, slow_calls, averaging, two_ranks, cost_of_sampling)
        results = [check(library) for check in checks]
    results.append(cost_of_waiting())
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
