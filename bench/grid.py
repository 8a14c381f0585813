"""Measures the CPU time of validating and writing a grid of 10,000 points, and estimates Hydra's time to compose it.

Run with `python -m nox -s bench`. It fails if the grid exceeds its limit, which was set for a machine of 2026.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench.usage import is_within, parser, write_json
from lem.config.compose import prepare
from lem.studies import grid

BASE = "model: tiny\nbackend: simulated\ndataset: {name: sample, sample_size: 10}\npreset: quick-test\n"
VARY = ["batching.batch_size=range(1,101)", "seed=range(0,50)", "decoder=deterministic,creative"]
POINTS = 10_000
LIMIT_CPU_S = 15.0
COMPOSED_BY_HYDRA = 20


def generate(base: Path, folder: Path) -> float:
    """Return the CPU time of generating and writing the grid, in seconds."""
    began = time.process_time()
    made = grid.make(base, VARY)
    assert len(made.valid) == POINTS, f"{len(made.valid)} valid points"
    grid.write(made, folder, made.valid)
    took = time.process_time() - began
    assert len(list(folder.glob("batch_size-*.yaml"))) == POINTS
    return took


def compose_by_hydra(base: Path) -> float:
    """Return the mean CPU time of one composition by Hydra, in seconds."""
    composition = prepare(base, ["batching.batch_size=2", "seed=3", "decoder=creative"])
    composition.values()  # warm-up: imports Hydra and builds ANTLR's tables
    began = time.process_time()
    for _ in range(COMPOSED_BY_HYDRA):
        composition.values()
    return (time.process_time() - began) / COMPOSED_BY_HYDRA


def figures(cpu_s: float, by_hydra_cpu_s: float) -> dict[str, float]:
    """Return all figures, given the CPU times of the grid and of one composition by Hydra, in seconds."""
    return {
        "points": POINTS,
        "cpu_s": cpu_s,
        "limit_cpu_s": LIMIT_CPU_S,
        "composed_by_hydra": COMPOSED_BY_HYDRA,
        "one_by_hydra_cpu_ms": by_hydra_cpu_s * 1e3,
        "all_by_hydra_extrapolated_cpu_s": by_hydra_cpu_s * POINTS,
    }


def report(found: Mapping[str, float]) -> None:
    """Print all figures."""
    one_ms, all_s = found["one_by_hydra_cpu_ms"], found["all_by_hydra_extrapolated_cpu_s"]
    print(f"grid of {POINTS} points, validated and written  {found['cpu_s']:8.1f} s CPU  (limit {LIMIT_CPU_S:g})")
    print(f"one composition by Hydra                    {one_ms:8.1f} ms CPU ({COMPOSED_BY_HYDRA} composed)")
    print(f"all of them composed by Hydra               {all_s:8.0f} s CPU  (extrapolated)")


def main() -> int:
    """Measure and print both times; return 1 if the limit is exceeded."""
    options = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.yaml"
        base.write_text(BASE, encoding="utf-8")
        found = figures(generate(base, Path(folder) / "grid"), compose_by_hydra(base))
    report(found)
    write_json(options.json, found)
    return int(not is_within(found))


if __name__ == "__main__":
    sys.exit(main())
