"""Compares the batching strategies of the pytorch backend on prompts of mixed lengths, as a campaign.

Run with `python -m bench.batching` on an otherwise idle machine; it takes about ten minutes. 200 prompts with 8 to 400
tokens, most of them short, are run with each strategy, in random order within each cycle. The table has each strategy's
means, and their ratios to `static`, which takes the prompts in order, with the campaign's intervals. On a machine
without a meter, the energy is an estimate, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from pathlib import Path

import lem
from bench import perturbation

PROMPTS, OUTPUT_TOKENS = 200, 32
SHORTEST, LONGEST = 8, 400
BATCH_SIZE, MOST_TOKENS = 8, 1024
STRATEGIES = {
    "static": {},
    "sorted_static": {},
    "dynamic": {"max_tokens_per_batch": MOST_TOKENS},
    "sorted_dynamic": {"max_tokens_per_batch": MOST_TOKENS},
    "continuous": {},
}
MEASURES = {"output_tokens_per_s": "token/s", "energy_per_output_token_j": "J/token"}


def write_prompts(file: Path) -> None:
    """Write prompts whose lengths are spread evenly on a logarithmic scale; a word is at least one token."""
    dice = random.Random(17)
    words = " ".join(perturbation.texts(10)).split()
    lengths = [round(SHORTEST * (LONGEST / SHORTEST) ** dice.random()) for _ in range(PROMPTS)]
    rows = [{"prompt": " ".join(dice.choices(words, k=length))} for length in lengths]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_arm(folder: Path, strategy: str) -> Path:
    """Write the configuration of one strategy."""
    config = {
        "model": str(folder / "model"),
        "dataset": {"path": str(folder / "prompts.jsonl"), "sample_size": PROMPTS},
        "backend": {"name": "pytorch", "device": "cpu"},
        "batching": {"strategy": strategy, "batch_size": BATCH_SIZE, **STRATEGIES[strategy]},
        "max_input_tokens": LONGEST,
        "max_output_tokens": OUTPUT_TOKENS,
    }
    file = folder / f"{strategy}.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return file


def table(outcome: lem.CampaignOutcome) -> str:
    """Return the means and ratios as a Markdown table with a row for each strategy."""
    lines = ["| strategy | token/s | relative to `static` | J/token | relative to `static` |", "|---|---|---|---|---|"]
    arms, pairs = outcome.arms.set_index(["arm", "measure"]), outcome.pairs.set_index(["arm", "measure"])
    for strategy in STRATEGIES:
        cells = [f"`{strategy}`"]
        for measure in MEASURES:
            arm = arms.loc[(strategy, measure)]
            is_energy = measure == "energy_per_output_token_j"
            cells.append(f"{arm['mean']:.4g}" + (f" ({arm['source']})" if is_energy else ""))
            cells.append("1" if arm["is_baseline"] else _ratio(pairs.loc[(strategy, measure)]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(pair: object) -> str:
    ratio, low, high = (float(pair[name]) for name in ("ratio", "ci_low", "ci_high"))
    return f"{ratio:.3f}" if math.isnan(low) else f"{ratio:.3f} ({low:.3f}–{high:.3f})"  # one cycle has no interval


def main() -> int:
    """Run the campaign and print the table; return 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=5, help="the number of cycles (default: 5)")
    cycles = parser.parse_args().cycles
    with tempfile.TemporaryDirectory(prefix="lem-batching-") as name:
        folder = Path(name)
        perturbation.prepare(folder)
        write_prompts(folder / "prompts.jsonl")
        outcome = lem.campaign(
            [write_arm(folder, strategy) for strategy in STRATEGIES], name="batching", results_dir=folder / "results",
            cycles=cycles, baseline="static", config_gap_s=0, cycle_gap_s=0, progress=True,
        )  # fmt: skip
        print("\n".join([table(outcome), *outcome.warnings, *outcome.failures]))
    return int(not outcome.is_complete)


if __name__ == "__main__":
    sys.exit(main())
