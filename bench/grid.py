"""Measures the CPU time of validating and writing a grid of 10,000 points, and estimates Hydra's time to compose it.

Run with `python -m nox -s bench`. It fails if the grid exceeds its limit, which was set for a machine of 2026.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

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


def main() -> int:
    """Measure and print both times; return 1 if the limit is exceeded."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.yaml"
        base.write_text(BASE, encoding="utf-8")
        took, by_hydra = generate(base, Path(folder) / "grid"), compose_by_hydra(base)
    print(f"grid of {POINTS} points, validated and written  {took:8.1f} s CPU  (limit {LIMIT_CPU_S:g})")
    print(f"one composition by Hydra                    {by_hydra * 1e3:8.1f} ms CPU ({COMPOSED_BY_HYDRA} composed)")
    print(f"all of them composed by Hydra               {by_hydra * POINTS:8.0f} s CPU  (extrapolated)")
    return int(took > LIMIT_CPU_S)


if __name__ == "__main__":
    sys.exit(main())
