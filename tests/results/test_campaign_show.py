"""A campaign's answer as text: sentences and the chart of intervals."""

import pytest

from lem.results.campaign import PairRow
from lem.results.campaign_show import forest, sentence


def pair(low, high, verdict="cannot tell", p_value=0.3):
    return PairRow(
        campaign="c", arm="b", baseline="a", measure="energy_per_output_token_j", is_primary=True, cycles=5,
        ratio=(low * high) ** 0.5, ci_low=low, ci_high=high, confidence=0.95, p_value=p_value, p_adjusted=p_value,
        verdict=verdict, cycles_needed=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.991, 1.14, ["0.99", "1", "1.14"]),
        (0.98, 1.45, ["0.98", "1", "1.45"]),
        (0.9991, 1.0017, ["0.9991", "1", "1.0017"]),
        (0.87, 1.006, ["0.87", "1", "1.01"]),
        (2.0, 2000.0, ["1", "2000.00"]),
        (0.5, 0.7, ["0.50", "1"]),
    ],
)
def test_the_labels_of_the_chart_are_whole(low, high, labels):
    *_, scale = forest([pair(low, high)])
    assert scale.split() == labels


def test_the_same_is_said_with_its_margin_and_without_the_p_value_of_a_ratio_of_1():
    said = sentence(pair(0.986, 0.990, "the same", 0.0003), "shuffled", margin=0.02)
    assert said.endswith("shuffled): the same within ±2 %.")
    assert "p = 0.0003" in sentence(pair(0.97, 0.98, "less", 0.0003), "shuffled", margin=0.02)
