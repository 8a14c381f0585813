"""A campaign's answer as text: sentences and the chart of intervals."""

import contextlib
import os
import pty
import sys

import pytest
from rich.cells import cell_len

from lem.results import show
from lem.results.campaign import PairRow
from lem.results.campaign_show import forest, sentence


def pair(low, high, verdict="cannot tell", p_value=0.3, arm="b"):
    return PairRow(
        campaign="c", arm=arm, baseline="a", measure="energy_per_output_token_j", is_primary=True, cycles=5,
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
    assert said.endswith("shuffled): the same within ±2%.")
    assert "p = 0.0003" in sentence(pair(0.97, 0.98, "less", 0.0003), "shuffled", margin=0.02)


PAIRS = [pair(0.6, 0.64), pair(0.9, 1.2, arm="large in batches"), pair(0.99, 1.01, arm="大きい")]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
def test_the_chart_fits_the_terminal_and_has_every_interval_and_label(width):
    *lines, scale = forest(PAIRS, width)
    assert max(map(cell_len, [*lines, scale])) <= width
    assert scale.split() == ["0.60", "1", "1.20"]
    is_stacked = len(lines) == 2 * len(PAIRS)
    assert is_stacked is (width < 50)
    plots = lines[1::2] if is_stacked else lines
    for each, plot in zip(PAIRS, plots, strict=True):
        assert plot.count("●") == 1
        head = lines[plots.index(plot) * 2] if is_stacked else plot
        assert head.startswith(each.arm)
        assert head.endswith(f"  {each.ratio:.3f}")
    assert plots[0].index("│") == scale.index(" 1 ") + 1


def test_without_a_terminal_the_chart_has_one_width():
    assert list(forest(PAIRS)) == list(forest(PAIRS, 2 + 41 + 2 + 5 + len("large in batches")))


@pytest.fixture
def said(monkeypatch):
    """Return what `show.say` prints on a terminal of a given width."""

    def on(width, text):
        ours, theirs = pty.openpty()
        # Rich asks the streams that were open when it was imported, and takes unnamed terminals to be 80 columns wide.
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm")
        with os.fdopen(theirs, "w") as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            show.say(text)
        monkeypatch.undo()
        printed = b""
        with contextlib.suppress(OSError):  # at the end of what was printed
            while chunk := os.read(ours, 10_000):
                printed += chunk
        os.close(ours)
        return printed.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")

    return on


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_a_sentence_is_broken_between_words_only(said, width):
    text = sentence(pair(0.6, 0.64, "less", 0.0001), "shuffled")
    lines = said(width, text)
    assert max(map(len, lines)) <= width
    assert " ".join(lines) == text
    assert not [line for line in lines if line.startswith(("%", "=", "0.0001"))]


def test_a_word_wider_than_the_terminal_is_left_to_the_terminal(said):
    assert said(20, f"See {'x' * 30} there") == ["See", "x" * 30, "there"]
