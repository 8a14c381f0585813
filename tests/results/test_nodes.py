"""How far nodes and boards of a cluster differ: coverage of the ratios, tests of interactions, the spread of levels."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from lem.results.campaign import Answer, Arm, CellEntry, Definition, Machine
from lem.results.campaign import answer as answer_of
from lem.results.campaign_show import as_plain, on_nodes
from lem.results.compare import contrasts
from lem.results.nodes import Block, between_groups, spread
from lem.spec.campaign import Campaign
from lem.studies.orders import order

NODES = ("n1", "n2", "n3")
BOARDS = {"n1": "A100", "n2": "A100", "n3": "H100"}
NOISE, NODE_SD = 0.01, 0.2
RATIO = 1.5
CAMPAIGNS = 1000


def campaign(random, *, cycles=6, arms=2, interaction=0.0, structure="shuffled"):
    """Return a campaign on nodes that differ by 20% in level; H100s multiply the last ratio by exp(interaction)."""
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


@pytest.mark.simulations
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


@pytest.mark.simulations
@pytest.mark.parametrize("analysis", ["paired", "position"])
def test_an_interaction_is_found_and_chance_is_not(analysis):
    random = np.random.default_rng(11)

    def share(interaction):
        tests = [spread(campaign(random, cycles=9, interaction=interaction), 0, analysis) for _ in range(CAMPAIGNS)]
        return sum(any(test.p_adjusted < 0.05 for test in each.interactions) for each in tests) / CAMPAIGNS

    # By board and by node, adjusted for both (Holm): at most 5% false alarms, and not far below.
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


@pytest.mark.simulations
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


# ------------------------------------------------------------------ the answer of a campaign
def answer(blocks, *, ran_on=None, clocks_h=None, **settings) -> Answer:
    """Return the answer of a campaign with these cycles.

    `ran_on` has the nodes of cells that ran elsewhere than their cycle, by cycle and arm; None is this machine.
    `clocks_h` says by how many hours the clocks of nodes are ahead.
    """
    of = Campaign(name="one", cycles=len(blocks), primary="latency_mean_s", **settings)
    names = ("a", "b", "c")[: len(blocks[0].logs)]
    definition = Definition(of, tuple(Arm(name, None) for name in names), (), Machine("Slurm", None, (), {}, None))
    cells = []
    for place in order(of.structure, len(names), len(blocks), of.seed):
        block, name = blocks[place.cycle - 1], names[place.arm]
        node = (ran_on or {}).get((place.cycle, name), block.node)
        started_at = f"{10 + (clocks_h or {}).get(node, 0):02}:{place.cycle:02}:{place.position:02}"
        row = SimpleNamespace(
            energy_per_output_token_j=None, energy_per_request_j=None, output_tokens_per_s=None, ttft_mean_s=None,
            latency_mean_s=math.exp(block.logs[place.arm]), average_power_w=None, energy_source=None,
            hostname=node or "here", slurm_node=node, slurm_job_id=node and f"{place.cycle}", device=block.board,
            energy_scope=None, energy_components=None, prompts_sha256="0", output_tokens=8,
            started_at=started_at, warnings=(), status="completed", backend="simulated",
            engine_version=None,
        )  # fmt: skip
        cells.append(CellEntry(name, place.cycle, place.position, None, "completed", row))
    return answer_of(definition, cells)


def codes(found: Answer) -> set[str]:
    return {note.code for note in found.warnings}


def test_another_board_is_an_objection_unless_it_is_wanted():
    blocks = campaign(np.random.default_rng(1), cycles=6)
    found = answer(blocks)
    (note,) = [note for note in found.warnings if note.code == "campaign_boards_differ"]
    assert note.text == "the device differs between cells: A100, H100."
    assert "campaign_boards_differ" not in codes(answer(blocks, across_nodes=True))
    same_board = [Block(block.node, "A100", block.logs, block.positions) for block in blocks]
    assert "campaign_boards_differ" not in codes(answer(same_board))  # a cycle's arms share a node, whichever it is


def test_nodes_that_differ_in_level_look_like_neither_a_trend_nor_an_effect_of_the_position():
    random = np.random.default_rng(17)
    found = [codes(answer(campaign(random, cycles=6), across_nodes=True)) for _ in range(60)]
    assert not any("campaign_trend" in each for each in found)
    assert sum("campaign_position" in each for each in found) < 10
    assert sum("campaign_nodes_interact" in each for each in found) < 10


def test_a_cell_on_another_node_than_its_cycle_is_not_compared():
    blocks = campaign(np.random.default_rng(2), cycles=6)
    whole = answer(blocks, across_nodes=True)
    moved = answer(blocks, across_nodes=True, ran_on={(2, "b"): "n9", (4, "a"): "n1+n2"})
    assert [pair.cycles for pair in whole.pairs] == [6]
    assert [pair.cycles for pair in moved.pairs] == [4]
    without = [block for cycle, block in enumerate(blocks, start=1) if cycle not in (2, 4)]
    ratio = math.exp(np.mean([block.logs[1] - block.logs[0] for block in without]))
    assert moved.pairs[0].ratio == pytest.approx(ratio, rel=0.01)
    (note,) = [note for note in moved.warnings if note.code == "campaign_cycle_moved"]
    assert note.text.endswith("left out: b in cycle 2 (n9), a in cycle 4 (n1+n2), b in cycle 4 (n1).")
    assert "campaign_cycle_moved" not in codes(whole)
    # Without a cluster, nothing is left out: that another machine was allowed is said by campaign_boards_differ.
    here = answer([Block(None, "A100", block.logs, block.positions) for block in blocks])
    assert (here.pairs[0].cycles, here.spread, codes(here) & {"campaign_cycle_moved"}) == (6, None, set())


def test_the_answer_says_how_far_nodes_and_boards_differ():
    blocks = campaign(np.random.default_rng(4), cycles=9, interaction=0.2)
    found = answer(blocks, across_nodes=True)
    note = next(note for note in found.warnings if note.code == "campaign_nodes_interact")
    assert note.text.startswith("the ratio of b to a differs between boards (F-test, p = ")
    words = list(on_nodes(found))
    assert words[0] == "The cycles ran on the nodes n1, n2, n3 (A100, H100)."
    assert words[1].startswith("From node to node, mean latency varies by a factor of 1.")
    assert any(line.startswith("The ratio of b to a on H100 (n3; 3 cycles) is 1.8") for line in words)
    plain = as_plain(found)["nodes"]
    assert plain["nodes"] == ("n1", "n2", "n3")
    assert {(each["arm"], each["board"]) for each in plain["ratios"]} == {("b", "A100"), ("b", "H100")}
    assert as_plain(answer([blocks[0]] * 3))["nodes"] is None  # a single node


def test_clocks_that_differ_do_not_change_the_answer():
    blocks = campaign(np.random.default_rng(6), cycles=9, arms=3)
    found, apart = answer(blocks), answer(blocks, clocks_h={"n1": 1, "n3": -1})
    assert found.carry_over is not None
    assert as_plain(apart) == as_plain(found)
