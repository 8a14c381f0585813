"""Estimates how an arm of a campaign affects the cell after it, for example through heat, clocks or caches.

The model is first-order carry-over: the logarithm of a cell's value is the sum of the effects of its cycle, its arm,
its position in the cycle, and the arm that ran just before it (possibly in the previous cycle). This module works on
plain numbers. Source of the model: B. Jones and M. G. Kenward, Design and Analysis of Cross-Over Trials, 3rd ed.
(2014), ch. 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lem.results.statistics import CONFIDENCE, t_quantile

if TYPE_CHECKING:
    import numpy as np

# With one or two degrees of freedom, t exceeds 4.3, so an interval is too wide to be useful.
LEAST_DEGREES_OF_FREEDOM = 3
# Logarithms that differ by no more than this are treated as equal; the difference is a rounding error.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Ran:
    """A cell that was measured: the logarithm of its value, and the arm that was measured just before it.

    Cycles and positions are counted from 1, arms from 0.
    """

    cycle: int
    position: int
    arm: int
    before: int
    log: float


@dataclass(frozen=True)
class After:
    """The ratio of a cell's value after `arm` to its value after the baseline; all arms' intervals hold jointly."""

    arm: int
    ratio: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class CarryOver:
    """The effects of predecessors; `p_value` is from the F-test of whether there are any effects."""

    after: tuple[After, ...]
    p_value: float
    degrees_of_freedom: int


def carry_over(cells: Sequence[Ran], arms: int, baseline: int = 0, confidence: float = CONFIDENCE) -> CarryOver | None:
    """Return each predecessor's effect relative to the baseline's; None if the effects cannot be estimated.

    The effects cannot be estimated in two cases:

    - The effects of predecessors cannot be separated from the effects of arms, cycles and positions, for example if
      the arms run in the same order in each cycle.
    - Fewer than `LEAST_DEGREES_OF_FREEDOM` degrees of freedom are left for the noise.

    Args:
        cells: the cells with a known predecessor; the first cell of a campaign has none.
        arms: the number of arms.
        baseline: the predecessor with which all other predecessors are compared.
        confidence: the joint confidence of all intervals (Bonferroni).
    """
    import numpy as np
    from scipy.special import fdtrc

    if not cells:
        return None
    logs = np.array([cell.log for cell in cells])
    others = _without_predecessors(cells, arms)
    of_before = np.delete(np.eye(arms)[[cell.before for cell in cells]], baseline, axis=1)
    design = np.hstack([of_before, others])
    rank = int(np.linalg.matrix_rank(design))
    degrees_of_freedom = len(cells) - rank
    is_told = rank == np.linalg.matrix_rank(others) + arms - 1
    if not is_told or degrees_of_freedom < LEAST_DEGREES_OF_FREEDOM:
        return None
    inverse = np.linalg.pinv(design)
    effects = inverse @ logs
    rest, rest_without = _rest(design, logs), _rest(others, logs)
    smallest = len(cells) * ROUNDING**2
    if rest > smallest:
        p_value = float(
            fdtrc(arms - 1, degrees_of_freedom, (rest_without - rest) / (arms - 1) * degrees_of_freedom / rest)
        )
    else:
        p_value = 0.0 if rest_without > smallest else 1.0
    errors = np.sqrt(rest / degrees_of_freedom * np.diag(inverse @ inverse.T))
    half = t_quantile(1 - (1 - confidence) / (arms - 1) / 2, degrees_of_freedom)
    found = zip((arm for arm in range(arms) if arm != baseline), effects, half * errors, strict=False)
    after = tuple(After(arm, math.exp(mean), math.exp(mean - by), math.exp(mean + by)) for arm, mean, by in found)
    return CarryOver(after, p_value, degrees_of_freedom)


def _without_predecessors(cells: Sequence[Ran], arms: int) -> np.ndarray[Any, Any]:
    """Return the columns of the design matrix for cycles, arms and positions, but not those for predecessors."""
    import numpy as np

    cycles = sorted({cell.cycle for cell in cells})
    of_cycle = np.eye(len(cycles))[[cycles.index(cell.cycle) for cell in cells]]
    of_arm = np.eye(arms)[[cell.arm for cell in cells]][:, 1:]
    of_position = np.eye(arms)[[cell.position - 1 for cell in cells]][:, 1:]
    return np.hstack([of_cycle, of_arm, of_position])


def _rest(design: np.ndarray[Any, Any], logs: np.ndarray[Any, Any]) -> float:
    """Return the residual sum of squares of a linear model."""
    import numpy as np

    left = logs - design @ (np.linalg.pinv(design) @ logs)
    return float(left @ left)
