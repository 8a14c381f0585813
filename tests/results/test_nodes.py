"""How far nodes and boards of a cluster differ: coverage of the ratios, tests of interactions, the spread of levels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lem.results.compare import contrasts
from lem.results.nodes import Block, between_groups, spread
from lem.studies.orders import order

NODES = ("n1", "n2", "n3")
BOARDS = {"n1": "A100", "n2": "A100", "n3": "H100"}
NOISE, NODE_SD = 0.01, 0.2
RATIO = 1.5
CAMPAIGNS = 1000


def campaign(random, *, cycles=6, arms=2, interaction=0.0, structure="shuffled"):
    """Return a campaign on nodes that differ by 20 % in level; H100s multiply the last ratio by exp(interaction)."""
    levels = dict(zip(NODES, random.normal(0, NODE_SD, len(NODES)), strict=True))
    places = order(structure, arms, cycles, int(random.integers(1000)))
    blocks = []
    for cycle in range(cycles):
        node = NODES[cycle % len(NODES)]
        logs = levels[node] + random.normal(0, NOISE, arms)
        logs[-1] += math.log(RATIO) + (interaction if BOARDS[node] == "H100" else 0.0)
        positions = {place.arm: place.position for place in places if place.cycle == cycle + 1}
        blocks.append(Block(node, BOARDS[node], tuple(logs), tuple(positions[arm] for arm in range(arms))))
    return blocks


def last_contrast(blocks, analysis):
    values = [[math.exp(log) for log in block.logs] for block in blocks]
    return contrasts(values, analysis=analysis, positions=[block.positions for block in blocks])[-1]


@pytest.mark.parametrize(("analysis", "arms", "cycles"), [("paired", 2, 3), ("position", 2, 6), ("latin", 3, 6)])
def test_intervals_keep_their_coverage_when_nodes_differ_in_level(analysis, arms, cycles):
    random = np.random.default_rng(7)
    structure = "latin" if analysis == "latin" else "shuffled"
    campaigns = CAMPAIGNS // 4 if analysis == "latin" else CAMPAIGNS  # a latin fit takes long
    made = [campaign(random, cycles=cycles, arms=arms, structure=structure) for _ in range(campaigns)]
    found = [last_contrast(each, analysis) for each in made]
    covered = sum(each.ci_low < RATIO < each.ci_high for each in found) / campaigns
    expected = 0.95 if arms == 2 else 0.975  # the two intervals hold jointly
    assert covered == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / campaigns))
    # As narrow as the noise of the cells allows: the level of the nodes does not widen them.
    width = np.median([math.log(each.ci_high / each.ci_low) for each in found])
    assert width < 12 * NOISE < NODE_SD


@pytest.mark.parametrize("analysis", ["paired", "position"])
def test_an_interaction_is_found_and_chance_is_not(analysis):
    random = np.random.default_rng(11)

    def share(interaction):
        tests = [spread(campaign(random, cycles=9, interaction=interaction), 0, analysis) for _ in range(CAMPAIGNS)]
        return sum(any(test.p_adjusted < 0.05 for test in each.interactions) for each in tests) / CAMPAIGNS

    # By board and by node, adjusted for both (Holm): at most 5 % false alarms, and not far below.
    assert 0.02 < share(0.0) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / CAMPAIGNS)
    assert share(0.08) > 0.9


def test_each_board_has_its_own_ratio():
    blocks = campaign(np.random.default_rng(3), cycles=9, interaction=0.1)
    found = {each.board: each for each in spread(blocks).ratios}
    assert found["A100"].nodes == ("n1", "n2")
    assert (found["A100"].cycles, found["H100"].cycles) == (6, 3)
    assert found["A100"].ratio == pytest.approx(RATIO, rel=0.02)
    assert found["H100"].ratio == pytest.approx(RATIO * math.exp(0.1), rel=0.04)
    assert found["H100"].ci_low > found["A100"].ci_high


def test_intervals_of_a_board_keep_their_coverage():
    random = np.random.default_rng(5)
    found = [spread(campaign(random), 0, "position").ratios for _ in range(CAMPAIGNS)]
    covered = sum(each.ci_low < RATIO < each.ci_high for of in found for each in of) / sum(map(len, found))
    assert covered == pytest.approx(0.95, abs=0.02)


def test_the_spread_of_levels_is_that_of_the_nodes():
    random = np.random.default_rng(13)
    groups = [
        [
            list(level + random.normal(0, 0.1, size))
            for level, size in zip(random.normal(0, 0.2, 4), (2, 3, 5, 4), strict=True)
        ]
        for _ in range(CAMPAIGNS)
    ]
    found = [between_groups(each) for each in groups]
    assert np.mean(np.square(found)) == pytest.approx(0.2**2, rel=0.1)  # the component of the variance is unbiased
    without = [between_groups([list(random.normal(0, 0.1, 4)) for _ in range(3)]) for _ in range(50)]
    assert without.count(0.0) > 10  # nodes that are alike differ by less than the noise suggests


def test_what_cannot_be_estimated_is_none():
    assert between_groups([[1.0, 2.0]]) is None
    assert between_groups([[1.0], [2.0]]) is None
    one_each = [Block("n1", "A100", (0.0, 0.1), (1, 2)), Block("n2", "H100", (0.0, 0.2), (2, 1))]
    found = spread(one_each)
    assert (found.node_sd_log, found.interactions) == (None, ())
    assert [(each.ci_low, each.ci_high) for each in found.ratios] == [(None, None)] * 2
    missing = [Block("n1", "A100", (math.nan, 0.1), (1, 2)), Block("n2", "A100", (0.0, math.nan), (2, 1))]
    assert spread(missing).ratios == ()


def test_values_without_noise_are_told_apart_or_equal():
    def tests(on_n2):
        blocks = [Block(node, "A100", (0.0, 0.1 if node == "n1" else on_n2), (1, 2)) for node in ("n1", "n2") * 2]
        return [test.p_value for test in spread(blocks).interactions]

    assert tests(0.1) == [1.0]
    assert tests(0.2) == [0.0]
