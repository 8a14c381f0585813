"""Decides when an adaptive campaign stops, and at which nominal level its intervals are computed.

Suppose that a campaign computed an ordinary 95% interval after every cycle and stopped as soon as the interval was
narrow enough. This interval would contain the true ratio in only 91 to 93% of cases, because campaigns tend to stop
when they underestimate the noise. Intervals are therefore computed at a higher nominal level. The level was calibrated
by simulation (`nox -s calibrate`) for pairs of limits (a minimum and a maximum number of cycles), so that even at the
least favorable noise, 95% of the reported intervals contain the true ratio. This module works on plain numbers, and
does not know what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lem.errors import ConfigError
from lem.results.compare import Analysis
from lem.spec.campaign import FEWEST_ADAPTIVE_CYCLES, Campaign, Structure, square_size, whole_squares

LEVELS = "levels.json"
ANALYSES: dict[Structure, Analysis] = {
    "shuffled": "position",
    "latin": "latin",
    "interleaved": "paired",
    "grouped": "paired",
}


@dataclass(frozen=True)
class Level:
    """A nominal level, calibrated for campaigns of `least` to `most` cycles.

    `worst_noise` is the noise with the lowest coverage: the standard deviation of the logarithm of one cycle's ratio,
    in units of the requested half-width (on the logarithmic scale). `coverage` is the coverage that the calibration
    found at that noise.
    """

    analysis: Analysis
    least: int
    most: int
    level: float
    worst_noise: float
    coverage: float


@dataclass(frozen=True)
class Rule:
    """When an adaptive campaign stops: after one of the cycles in `looks`, at the latest after the last of them.

    The campaign stops as soon as each interval's half-width, divided by its ratio, is at most `half_width`. `level` is
    the joint nominal level of the intervals: each of m intervals is computed at 1 - (1 - level) / m.
    """

    half_width: float
    looks: tuple[int, ...]
    level: float

    @property
    def least(self) -> int:
        """The minimum number of cycles."""
        return self.looks[0]

    @property
    def most(self) -> int:
        """The maximum number of cycles."""
        return self.looks[-1]


def rule_of(campaign: Campaign, arms: int, level: float | None = None) -> Rule | None:
    """Return the stopping rule of an adaptive campaign, or None if the campaign is not adaptive.

    Args:
        campaign: the settings of the campaign.
        arms: the number of arms, with the baseline.
        level: the nominal level with which the campaign began; None means the calibrated level.

    Raises:
        ConfigError: fewer than two squares of a latin campaign end between its minimum and maximum number of cycles,
            or no level was calibrated for this range of cycles.
    """
    if campaign.until_ci is None or campaign.max_cycles is None:
        return None
    step = square_size(arms) if campaign.structure == "latin" else 1
    looks = tuple(n for n in range(campaign.cycles, campaign.max_cycles + 1) if n % step == 0)
    if len(looks) < 2:
        raise ConfigError(
            f"max_cycles: a latin campaign of {arms} arms stops only after whole squares of {step} cycles, but "
            f"fewer than two squares end between {campaign.cycles} and {campaign.max_cycles} cycles; give at least "
            f"{whole_squares(campaign.cycles, step) + step}, or choose structure=shuffled."
        )
    # A latin campaign has at least as many degrees of freedom as a shuffled one, and may stop less often.
    analysis: Analysis = "paired" if ANALYSES[campaign.structure] == "paired" else "position"
    return Rule(campaign.until_ci, looks, level or level_for(analysis, looks[0], looks[-1]))


def cycles_at_most(campaign: Campaign, arms: int) -> int:
    """Return the number of cycles planned for a campaign; for an adaptive campaign, this is the maximum."""
    rule = rule_of(campaign, arms)
    return campaign.cycles if rule is None else rule.most


def level_for(analysis: Analysis, least: int, most: int) -> float:
    """Return the lowest of the nominal levels calibrated for ranges of cycles that contain `least` to `most`.

    A campaign with a narrower range than the calibrated one looks at its data less often, so at the same level, its
    coverage is at least as high.

    Raises:
        ConfigError: no level was calibrated for a range that contains `least` to `most`.
    """
    known = [each for each in levels() if each.analysis == analysis]
    found = [each.level for each in known if each.least <= least and most <= each.most]
    if not found:
        offered = ", ".join(f"{each.least} to {each.most}" for each in known if each.least >= FEWEST_ADAPTIVE_CYCLES)
        raise ConfigError(
            f"No nominal level is calibrated for {least} to {most} cycles; choose cycles and max_cycles within one of "
            f"these ranges: {offered}."
        )
    return min(found)


@cache
def levels() -> tuple[Level, ...]:
    """Return the calibrated levels."""
    table = json.loads(files("lem.results").joinpath(LEVELS).read_text(encoding="utf-8"))
    return tuple(Level(**each) for each in table["levels"])


def is_narrow(half_widths: Iterable[float | None], wanted: float) -> bool:
    """Return whether every half-width is known and is at most `wanted`; true if there are no half-widths."""
    return all(each is not None and each <= wanted for each in half_widths)
