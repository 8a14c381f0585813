"""How far a campaign's results depend on the nodes and boards of a cluster on which its cycles ran.

A cycle is measured on one node. The node is therefore a block that contains whole cycles: its level is part of the
cycle's level and cancels out in ratios within the cycle. What does not cancel out is an interaction, that is, a ratio
that differs between nodes. This module works on plain numbers and does not know how a campaign is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lem.results.compare import POSITION_PAIRS, Analysis, holm
from lem.results.statistics import CONFIDENCE, t_quantile

if TYPE_CHECKING:
    import numpy as np

By = Literal["board", "node"]
BLOCKS: tuple[By, ...] = ("board", "node")
# Logarithms that differ by no more than this are treated as equal; the difference is a rounding error.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Block:
    """A cycle: where it ran, the logarithms of the arms' values (NaN if missing), and the arms' positions."""

    node: str
    board: str
    logs: tuple[float, ...]
    positions: tuple[int, ...]

    def place(self, by: By) -> str:
        """Return the board or the node on which the cycle ran, depending on `by`."""
        return self.board if by == "board" else self.node


@dataclass(frozen=True)
class RatioThere:
    """The ratio of an arm to the baseline on one board.

    The 95% interval is not adjusted for the number of ratios. It is None if the cycles leave no degrees of freedom for
    the noise.
    """

    arm: int
    board: str
    nodes: tuple[str, ...]
    cycles: int
    ratio: float
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class Interaction:
    """An F-test of whether an arm's ratio to the baseline is the same on all boards, or on all nodes.

    `p_adjusted` is adjusted by Holm's method for all tests of a campaign.
    """

    arm: int
    by: By
    p_value: float
    p_adjusted: float
    degrees_of_freedom: tuple[int, int]


@dataclass(frozen=True)
class Spread:
    """How far nodes and boards differ.

    `node_sd_log` and `board_sd_log` are the standard deviations of the level (a cycle's mean logarithm) from node to
    node and from board to board, without the noise within a node or a board. `node_sd_log` is None if there is only one
    node, or if no node ran two complete cycles; the same holds for `board_sd_log` and boards.
    """

    nodes: tuple[str, ...]
    boards: tuple[str, ...]
    node_sd_log: float | None
    board_sd_log: float | None
    ratios: tuple[RatioThere, ...]
    interactions: tuple[Interaction, ...]


def spread(cycles: Sequence[Block], baseline: int = 0, analysis: Analysis = "paired") -> Spread:
    """Return how far nodes and boards differ in their level and in the ratios of arms to the baseline.

    Each interaction is tested as a fixed effect in a one-way layout of the cycles' log ratios (H. Scheffé, The Analysis
    of Variance, 1959, ch. 3). As when a campaign's arms are compared, a straight line in the difference of the
    positions is fitted as well, unless the analysis is `paired` or there are too few cycles.

    Args:
        cycles: the cycles; the value of a cell that is not comparable with the baseline's cell is NaN.
        baseline: the arm with which the others are compared.
        analysis: how the comparison treats the position in the cycle.
    """
    arms = [arm for arm in range(len(cycles[0].logs) if cycles else 0) if arm != baseline]
    ratios, tests = list[RatioThere](), list[Interaction]()
    for arm in arms:
        pairs = [each for each in cycles if not math.isnan(each.logs[arm] - each.logs[baseline])]
        if pairs:
            ratios += _ratios(pairs, arm, baseline, analysis)
            tests += [test for by in _blocks(pairs) if (test := _interaction(pairs, arm, baseline, analysis, by))]
    adjusted = holm([test.p_value for test in tests])
    return Spread(
        nodes=tuple(dict.fromkeys(each.node for each in cycles)),
        boards=tuple(dict.fromkeys(each.board for each in cycles)),
        node_sd_log=_between(cycles, "node"),
        board_sd_log=_between(cycles, "board"),
        ratios=tuple(ratios),
        interactions=tuple(replace(test, p_adjusted=p) for test, p in zip(tests, adjusted, strict=True)),
    )


def between_groups(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation between groups of values, without the noise within the groups.

    This is the root of the variance component in a one-way random model, estimated from the mean squares; a negative
    estimate counts as 0. The result is None if there are fewer than two groups, or if every group has a single value.
    Source: S. R. Searle, G. Casella and C. E. McCulloch, Variance Components (1992), ch. 3.
    """
    count, size = len(groups), sum(map(len, groups))
    if count < 2 or size <= count:
        return None
    means = [math.fsum(group) / len(group) for group in groups]
    mean = math.fsum(value for group in groups for value in group) / size
    between = math.fsum(len(group) * (own - mean) ** 2 for group, own in zip(groups, means, strict=True)) / (count - 1)
    within = math.fsum((value - own) ** 2 for group, own in zip(groups, means, strict=True) for value in group)
    typical_size = (size - sum(len(group) ** 2 for group in groups) / size) / (count - 1)
    return math.sqrt(max(0.0, between - within / (size - count)) / typical_size)


def _between(cycles: Sequence[Block], by: By) -> float | None:
    complete = [each for each in cycles if not any(map(math.isnan, each.logs))]
    levels = _grouped(complete, lambda each: each.place(by))
    return between_groups([[math.fsum(each.logs) / len(each.logs) for each in group] for group in levels.values()])


def _grouped(cycles: Sequence[Block], place: Callable[[Block], str]) -> dict[str, list[Block]]:
    groups: dict[str, list[Block]] = {}
    for each in cycles:
        groups.setdefault(place(each), []).append(each)
    return groups


def _blocks(pairs: Sequence[Block]) -> list[By]:
    """Return the groupings of the cycles to test: by board, by node, both or neither.

    Boards are tested if there are at least two. Nodes are tested if there are more nodes than boards; otherwise,
    grouping by node would give the same groups as grouping by board.
    """
    boards, nodes = len({each.board for each in pairs}), len({each.node for each in pairs})
    return [by for by in BLOCKS if (boards > 1 if by == "board" else nodes > max(boards, 1))]


def _ratios(pairs: Sequence[Block], arm: int, baseline: int, analysis: Analysis) -> list[RatioThere]:
    groups = _grouped(pairs, lambda each: each.board)
    fit = _Fit.of(pairs, arm, baseline, analysis, "board")
    found = []
    for place, (board, own) in enumerate(groups.items()):
        mean, half = fit.means[place], None
        if fit.degrees_of_freedom >= 1:
            half = t_quantile(0.5 + CONFIDENCE / 2, fit.degrees_of_freedom) * fit.errors[place]
        low, high = (None, None) if half is None else (math.exp(mean - half), math.exp(mean + half))
        nodes = tuple(dict.fromkeys(each.node for each in own))
        found.append(RatioThere(arm, board, nodes, len(own), math.exp(mean), low, high))
    return found


def _interaction(pairs: Sequence[Block], arm: int, baseline: int, analysis: Analysis, by: By) -> Interaction | None:
    """Test whether an arm's ratio differs between boards or nodes; None if no degrees of freedom are left for noise."""
    from scipy.special import fdtrc

    apart, alike = _Fit.of(pairs, arm, baseline, analysis, by), _Fit.of(pairs, arm, baseline, analysis, None)
    left, used = apart.degrees_of_freedom, alike.degrees_of_freedom - apart.degrees_of_freedom
    if left < 1 or used < 1:
        return None
    smallest = len(pairs) * ROUNDING**2
    if apart.rest > smallest:
        p_value = float(fdtrc(used, left, max(0.0, alike.rest - apart.rest) / used * left / apart.rest))
    else:
        p_value = 0.0 if alike.rest > smallest else 1.0
    return Interaction(arm, by, p_value, p_value, (used, left))


@dataclass(frozen=True)
class _Fit:
    """A least-squares fit of log ratios: the mean of each node or board, and the residual sum of squares.

    If the difference of the positions is fitted too, each mean is the log ratio of two cells at the same position.
    """

    means: list[float]
    errors: list[float]
    rest: float
    degrees_of_freedom: int

    @classmethod
    def of(cls, pairs: Sequence[Block], arm: int, baseline: int, analysis: Analysis, by: By | None) -> _Fit:
        """Fit the cycles' log ratios with a mean for each board or node, or with a common mean if `by` is None."""
        import numpy as np

        ratios = np.array([each.logs[arm] - each.logs[baseline] for each in pairs])
        names = ["" if by is None else each.place(by) for each in pairs]
        known = list(dict.fromkeys(names))
        design = np.eye(len(known))[[known.index(name) for name in names]]
        if analysis != "paired" and len(pairs) >= POSITION_PAIRS:
            design = _with_line(design, [each.positions[arm] - each.positions[baseline] for each in pairs])
        inverse = np.linalg.pinv(design)
        found = inverse @ ratios
        left = ratios - design @ found
        rest, degrees_of_freedom = float(left @ left), len(pairs) - design.shape[1]
        variance = rest / max(1, degrees_of_freedom)
        errors = np.sqrt(variance * np.diag(inverse @ inverse.T))
        return cls(found[: len(known)].tolist(), errors[: len(known)].tolist(), rest, degrees_of_freedom)


def _with_line(design: np.ndarray[Any, Any], offsets: Sequence[int]) -> np.ndarray[Any, Any]:
    """Add a column for the difference of the positions, unless the other columns already determine it."""
    import numpy as np

    wider = np.column_stack([design, np.array(offsets, float)])
    return wider if np.linalg.matrix_rank(wider) == wider.shape[1] else design
