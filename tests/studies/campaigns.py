"""What the tests of campaigns share: the config files of two arms, and what became of the cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUICK = ("-d", "sample", "-n", "4", "max_output_tokens=8", "-y")


def write_arms(folder: Path, tokens: int = 8) -> Path:
    """Write config files of two arms, whose power is replayed; the second arm takes twice as long per token."""
    (folder / "power.csv").write_text("t_s,power_w\n0,100\n100000,100\n")
    for name, step_s in (("quick", 0.004), ("slow", 0.008)):
        (folder / f"{name}.yaml").write_text(
            f"model: any\nbackend: {{name: simulated, decode_s_per_token: {step_s}}}\n"
            f"energy: {{name: replay, trace: power.csv, idle_s: 0.05}}\nmin_output_tokens: {tokens}\n"
        )
    return folder


def cells_of(folder: Path, name: str = "one") -> list[dict[str, Any]]:
    """Return the cells of a campaign as its manifest has them."""
    cells: list[dict[str, Any]] = json.loads((folder / "results" / "campaigns" / name / "experiments.json").read_text())
    return cells
