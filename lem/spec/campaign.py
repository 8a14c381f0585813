"""What a campaign is: how its arms are measured and compared. Plain data; the arms are `Experiment`s."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Structure = Literal["shuffled", "latin", "interleaved", "grouped"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)

MOST_CYCLES = 1_000
# A campaign's name is also that of its directory.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Campaign:
    """How a campaign measures its arms.

    `config_gap_s` is the pause between two cells; between the last cell of a cycle and the first of the next,
    `cycle_gap_s` takes its place unless it is None. `margin`: a ratio within 1 ± margin counts as the same; None: no
    such verdict. `primary` is the measure that decides, chosen before the data. `retries` is how often a failed cell is
    tried again, at the end of its cycle. With `resample_prompts`, each cycle draws its own prompts, the same for all
    arms.
    """

    name: str
    cycles: int = 3
    structure: Structure = "shuffled"
    seed: int = 42
    config_gap_s: float = 0.0
    cycle_gap_s: float | None = None
    baseline: str = ""
    primary: str = "energy_per_output_token_j"
    margin: float | None = None
    retries: int = 0
    resample_prompts: bool = False
