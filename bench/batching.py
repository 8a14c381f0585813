"""Compares the batching strategies of the pytorch backend on prompts of mixed lengths, as a campaign.

Run with `python -m bench.batching` on an otherwise idle machine; it takes about ten minutes. 200 prompts with 8 to 400
tokens, most of them short, are run with each strategy, in random order within each cycle. The table has each strategy's
means, and their ratios to `static`, which takes the prompts in order, with the campaign's intervals. On a machine
without a meter, the energy is an estimate, and the table says so.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lem
from bench import perturbation
from bench.usage import parser, write_json
from lem.results.campaign import Answer, ArmRow, PairRow

PROMPTS, OUTPUT_TOKENS = 200, 32
SHORTEST, LONGEST = 8, 400
BATCH_SIZE, MOST_TOKENS = 8, 1024
STRATEGIES: dict[str, dict[str, int]] = {
    "static": {},
    "sorted_static": {},
    "dynamic": {"max_tokens_per_batch": MOST_TOKENS},
    "sorted_dynamic": {"max_tokens_per_batch": MOST_TOKENS},
    "continuous": {},
}
BASELINE = "static"
TOKENS, ENERGY = "output_tokens_per_s", "energy_per_output_token_j"


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


def figures(answer: Answer) -> dict[str, dict[str, Any]]:
    """Return the means of each strategy, and the ratios to the baseline with their intervals."""
    arms = {(arm.arm, arm.measure): arm for arm in answer.arms}
    pairs = {(pair.arm, pair.measure): pair for pair in answer.pairs}
    return {
        strategy: {
            measure: _figure(arms[strategy, measure], pairs.get((strategy, measure))) for measure in (TOKENS, ENERGY)
        }
        for strategy in STRATEGIES
    }


def _figure(arm: ArmRow, pair: PairRow | None) -> dict[str, Any]:
    found: dict[str, Any] = {"mean": arm.mean}
    if arm.measure == ENERGY:
        found["source"] = arm.source
    ratio, low, high = (pair.ratio, pair.ci_low, pair.ci_high) if pair else (None, None, None)
    return found | {"ratio": 1.0 if arm.is_baseline else ratio, "ratio_low": low, "ratio_high": high}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the means and ratios as a Markdown table with a row for each strategy."""
    lines = ["| strategy | token/s | relative to `static` | J/token | relative to `static` |", "|---|---|---|---|---|"]
    for strategy, measures in found.items():
        cells = [f"`{strategy}`"]
        for each in measures.values():
            mean = "not measured" if each["mean"] is None else f"{each['mean']:.4g}"
            cells.append(mean + (f" ({each['source']})" if each.get("source") else ""))
            cells.append("1" if strategy == BASELINE else _ratio(each))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(figure: Mapping[str, Any]) -> str:
    ratio, low, high = figure["ratio"], figure["ratio_low"], figure["ratio_high"]
    if ratio is None:
        return "not measured"
    return f"{ratio:.3f}" if low is None else f"{ratio:.3f} ({low:.3f}–{high:.3f})"  # one cycle has no interval


def main() -> int:
    """Run the campaign and print the table; return 1 if a cell failed."""
    arguments = parser(__doc__)
    arguments.add_argument("--cycles", type=int, default=5, help="the number of cycles (default: 5)")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="lem-batching-") as name:
        folder = Path(name)
        perturbation.prepare(folder)
        write_prompts(folder / "prompts.jsonl")
        outcome = lem.campaign(
            [write_arm(folder, strategy) for strategy in STRATEGIES], name="batching", results_dir=folder / "results",
            cycles=options.cycles, baseline=BASELINE, config_gap_s=0, cycle_gap_s=0, progress=True,
        )  # fmt: skip
        found = figures(outcome.answer)
        notes = {"warnings": list(outcome.warnings), "failures": list(outcome.failures)}
        print("\n".join([table(found), *notes["warnings"], *notes["failures"]]))
        write_json(options.json, {"cycles": options.cycles, "strategies": found, **notes})
    return int(not outcome.is_complete)


if __name__ == "__main__":
    sys.exit(main())
