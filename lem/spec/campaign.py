"""What a campaign is: how its arms are measured and compared. Plain data; each arm becomes an `Experiment`.

The single source of a campaign file's keys, of their types, ranges and descriptions, and of the flags' help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field

Structure = Literal["shuffled", "latin", "interleaved", "grouped"]
STRUCTURES: tuple[Structure, ...] = get_args(Structure)
# What arms can be compared by: columns of the experiments table.
Measure = Literal[
    "energy_per_output_token_j", "energy_per_request_j", "output_tokens_per_s", "latency_mean_s", "ttft_mean_s",
    "average_power_w",
]  # fmt: skip

MOST_CYCLES = 1_000
LONGEST_GAP_S = 86_400.0
# A campaign's name is also that of its directory.
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
NAME_IN_WORDS = "at most 100 letters, digits, '.', '_' and '-', beginning with a letter or a digit"


@dataclass(frozen=True)
class ArmSource:
    """An arm as a campaign file names it: a config file, perhaps with a name and overrides of its own."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    config: Annotated[str, Field(min_length=1, description="Config file, relative to the campaign file.")]
    name: Annotated[
        str | None, Field(min_length=1, description="Name of the arm; null: the shortest end of its path.")
    ] = None
    overrides: Annotated[tuple[str, ...], Field(description="Hydra overrides for this arm alone.")] = ()


@dataclass(frozen=True)
class Campaign:
    """What a campaign measures and how."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[
        str | None,
        Field(pattern=f"^{NAME}$", description="Name of the campaign, and of its directory in the results."),
    ] = None
    arms: Annotated[
        tuple[str | ArmSource, ...],
        Field(description="Configurations to compare: config files, or mappings of config, name and overrides."),
    ] = ()
    overrides: Annotated[tuple[str, ...], Field(description="Hydra overrides for all arms.")] = ()
    dataset: Annotated[str | None, Field(min_length=1, description="Dataset of all arms.")] = None
    sample_size: Annotated[int | None, Field(ge=1, description="Number of prompts of all arms.")] = None
    cycles: Annotated[int, Field(ge=1, le=MOST_CYCLES, description="How many times each arm is measured.")] = 3
    structure: Annotated[Structure, Field(description="Order of the cells.")] = "shuffled"
    seed: Annotated[int, Field(ge=0, description="Seed of the order.")] = 42
    resample_prompts: Annotated[bool, Field(description="Draw new prompts in each cycle, the same for all arms.")] = (
        False
    )
    warmup_prompts: Annotated[
        int | None, Field(ge=0, description="Warm-up of each cell, outside its window: at least so many prompts.")
    ] = None
    warmup_timeout_s: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="Longest warm-up of a cell.")
    ] = None
    config_gap_s: Annotated[
        float, Field(ge=0, le=LONGEST_GAP_S, allow_inf_nan=False, description="Pause between two cells.")
    ] = 0.0
    cycle_gap_s: Annotated[
        float | None,
        Field(
            ge=0,
            le=LONGEST_GAP_S,
            allow_inf_nan=False,
            description="Pause between two cycles, in place of config_gap_s; null: the same.",
        ),
    ] = None
    cool_to_c: Annotated[
        float | None, Field(allow_inf_nan=False, description="Before each cell, wait until the GPUs are no warmer.")
    ] = None
    baseline: Annotated[
        str | None, Field(min_length=1, description="Arm that the others are compared with; null: the first.")
    ] = None
    primary: Annotated[Measure, Field(description="Measure that decides, chosen before the data.")] = (
        "energy_per_output_token_j"
    )
    margin: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Ratios within 1 ± this count as the same; null: no such verdict."),
    ] = None
    retries: Annotated[
        int, Field(ge=0, le=10, description="How often a failed cell is tried again, at the end of its cycle.")
    ] = 0


def square_size(arms: int) -> int:
    """Return the number of cycles in a whole design in which each arm follows each other one equally often.

    Williams (1949): one square for an even number of arms, two for an odd one.
    """
    return arms if arms % 2 == 0 else 2 * arms
