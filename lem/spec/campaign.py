"""The settings of a campaign: how its arms are measured and compared. Each arm becomes an `Experiment`.

This module is the single source of the keys of a campaign file (their types, ranges and descriptions) and of the help
for the corresponding flags.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field

from lem.spec.engines import SimulatedBackend
from lem.spec.share import Share

Structure = Literal["shuffled", "latin", "interleaved", "grouped"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
# The metrics by which arms can be compared; each is a column of the experiments table.
Measure = Literal[
    "energy_per_output_token_j", "energy_per_request_j", "output_tokens_per_s", "latency_mean_s", "ttft_mean_s",
    "average_power_w",
]  # fmt: skip

MOST_CYCLES = 1_000
LONGEST_GAP_S = 86_400.0
# The smallest number of cycles after which an adaptive campaign may stop, and the largest value of max_cycles. The
# nominal levels in lem/results/levels.json are calibrated for this range.
FEWEST_ADAPTIVE_CYCLES, MOST_ADAPTIVE_CYCLES = 5, 100
# A campaign's name is also the name of its directory.
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
LIKE_AN_ID = "would hide the experiments whose ids begin with it; choose a name other than exp_ followed by digits"
NAME_IN_WORDS = "at most 100 letters, digits, '.', '_' and '-', beginning with a letter or a digit"


# Names that `lem results show` could not distinguish from an experiment's id or the beginning of one.
_LIKE_AN_ID = r"exp_[0-9_]*"


def is_like_an_id(name: str) -> bool:
    """Return whether a campaign's name could be an experiment's id or the beginning of one, such as exp_2026."""
    return re.fullmatch(_LIKE_AN_ID, name) is not None


@dataclass(frozen=True)
class ArmSource:
    """An arm as written in a campaign file: a config file and, optionally, a name and overrides."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    config: Annotated[str, Field(min_length=1, description="Config file, relative to the campaign file.")]
    name: Annotated[
        str | None,
        Field(min_length=1, description="Name of the arm; null: the shortest unique ending of the config's path."),
    ] = None
    overrides: Annotated[tuple[str, ...], Field(description="Hydra overrides for this arm alone.")] = ()


@dataclass(frozen=True)
class Campaign:
    """The arms of a campaign, and how they are measured and compared."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[
        str | None,
        Field(pattern=f"^{NAME}$", description="Name of the campaign and of its directory in the results directory."),
    ] = None
    arms: Annotated[
        tuple[str | ArmSource, ...],
        Field(
            description="Configurations to compare: config files, or mappings with the keys config, name and overrides."
        ),
    ] = ()
    overrides: Annotated[tuple[str, ...], Field(description="Hydra overrides for all arms.")] = ()
    dataset: Annotated[str | None, Field(min_length=1, description="Dataset for all arms.")] = None
    sample_size: Annotated[int | None, Field(ge=1, description="Number of prompts for every arm.")] = None
    cycles: Annotated[
        int,
        Field(
            ge=1,
            le=MOST_CYCLES,
            description="Number of times each arm is measured; with until_ci, the minimum.",
        ),
    ] = 3
    until_ci: Annotated[
        Share,
        Field(
            description="Stop once each interval's half-width, divided by the ratio to the baseline, is at most this "
            "share, such as 2% or 0.02; null: measure all cycles.",
        ),
    ] = None
    max_cycles: Annotated[
        int | None,
        Field(
            ge=FEWEST_ADAPTIVE_CYCLES + 1,
            le=MOST_ADAPTIVE_CYCLES,
            description="With until_ci: the maximum number of cycles; null: 30, or 100 if cycles is 30 or more.",
        ),
    ] = None
    structure: Annotated[Structure, Field(description="Order in which the cells run.")] = "shuffled"
    seed: Annotated[int, Field(ge=0, description="Random seed for the order of the cells.")] = 42
    resample_prompts: Annotated[bool, Field(description="Draw new prompts in each cycle, the same for all arms.")] = (
        False
    )
    warmup_prompts: Annotated[
        int | None, Field(ge=0, description="Minimum number of warm-up prompts in each cell, run before its window.")
    ] = None
    warmup_timeout_s: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="Maximum length of a cell's warm-up, in seconds.")
    ] = None
    config_gap_s: Annotated[
        float, Field(ge=0, le=LONGEST_GAP_S, allow_inf_nan=False, description="Pause between two cells, in seconds.")
    ] = 0.0
    cycle_gap_s: Annotated[
        float | None,
        Field(
            ge=0,
            le=LONGEST_GAP_S,
            allow_inf_nan=False,
            description="Pause between two cycles, in seconds; null: the same as config_gap_s.",
        ),
    ] = None
    cool_to_c: Annotated[
        float | None,
        Field(
            allow_inf_nan=False,
            description="Before each cell, wait until the GPUs are at or below this temperature in °C, but no longer "
            "than cooldown.max_s.",
        ),
    ] = None
    baseline: Annotated[
        str | None, Field(min_length=1, description="Arm that the others are compared with; null: the first arm.")
    ] = None
    primary: Annotated[
        Measure, Field(description="Metric that decides the comparison; choose it before seeing the data.")
    ] = "energy_per_output_token_j"
    margin: Annotated[
        Share,
        Field(
            description="Ratios within 1 ± this share, such as 2% or 0.02, count as equivalent; null: equivalence is "
            "not tested."
        ),
    ] = None
    across_nodes: Annotated[
        bool,
        Field(
            description="On a Slurm cluster: let cycles run on nodes of different types, and report how much the "
            "nodes differ."
        ),
    ] = False
    retries: Annotated[
        int,
        Field(
            ge=0,
            le=10,
            description="Maximum number of times a failed cell is retried, after the other cells of its cycle "
            "(grouped: of its arm).",
        ),
    ] = 0


@dataclass(frozen=True)
class CampaignCell:
    """An experiment's place in a campaign: its arm, its cycle, and its position in that cycle (both from 1).

    `number` is the cell's position, from 1, in the planned order of all cells, and `cells` is the number of cells.
    `simulated_before` holds the backend options of the preceding cell if that cell is simulated; a simulated carry-over
    depends on these options.
    """

    name: str
    arm: str
    cycle: int
    position: int
    number: int = 1
    cells: int = 1
    simulated_before: SimulatedBackend | None = None


def square_size(arms: int) -> int:
    """Return the number of cycles in a complete design in which every arm follows every other arm equally often.

    After Williams (1949): one square for an even number of arms, two squares for an odd number.
    """
    return arms if arms % 2 == 0 else 2 * arms


def whole_squares(cycles: int, size: int) -> int:
    """Return the smallest number of cycles, at least `cycles`, that consists of whole squares of `size` cycles."""
    return -(-cycles // size) * size
