"""`lem presets` and `lem datasets`: all names that can be chosen, both built-in and the user's."""

from __future__ import annotations

import json

import pytest

from lem.config.inventory import summaries
from tests.conftest import command


@pytest.fixture
def mine(tmp_path):
    for path, text in {
        "conf/preset/mine.yaml": "# yaml-language-server: $schema=x\n# Mine, for [all]\ndecoder: factual\nseed: 5\n",
        "conf/preset/quick-test.yaml": "# Quicker\nmax_output_tokens: 3\n",
        "conf/dataset/questions.yaml": "# Ours\npath: q.csv\ncolumn: question\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)


def test_presets_are_listed_with_purpose_and_values(lem):
    shown = lem("presets").out
    assert "For a quick check that everything works" in shown
    assert "batching.batch_size=1" in shown
    assert "max_output_tokens=32" in shown
    assert "decoder=deterministic" in shown
    assert "yours" not in shown


def test_datasets_are_those_of_the_reference(lem):
    listed = {row["name"]: row for row in json.loads(lem("datasets", "--json").out)}
    assert {"ai-energy-score", "alpaca", "sharegpt", "gsm8k", "mmlu"} <= listed.keys()
    assert listed["mmlu"]["values"] == {
        "name": "mmlu", "path": "cais/mmlu", "config": "all", "split": "test", "column": "question",
    }  # fmt: skip
    assert listed["alpaca"]["file"] is None
    assert all(row["purpose"] for row in listed.values())


def test_a_users_own_are_listed_and_marked(lem, mine):
    shown = lem("presets").out
    assert "Mine, for [all] (yours)" in shown
    assert "Quicker (yours, in place of the built-in one)" in shown
    assert "quick check" not in shown
    rows = {row["name"]: row for row in json.loads(lem("presets", "--json").out)}
    assert rows["mine"]["values"] == {"decoder": "factual", "seed": 5}
    assert (rows["mine"]["file"], rows["mine"]["replaces_builtin"]) == ("conf/preset/mine.yaml", False)
    assert rows["quick-test"]["replaces_builtin"]
    assert "Ours (yours)" in lem("datasets").out


def test_the_directory_may_be_named(lem, mine, tmp_path):
    (tmp_path / "conf").rename(tmp_path / "options")
    assert "yours" not in lem("presets").out
    assert "Mine, for" in lem("presets", "--config-dir", "options").out
    refused = lem("presets", "--config-dir", "nowhere")
    assert (refused.code, "contains no options" in refused.err) == (2, True)


def test_a_bad_option_hides_no_other(lem, mine, tmp_path):
    (tmp_path / "conf" / "preset" / "bad.yaml").write_text("seed: [\n")
    done = lem("presets")
    assert done.code == 2
    assert "Mine, for" in done.out
    assert "conf/preset/bad.yaml:2:1: broken YAML" in done.err


def test_lems_own_options_are_not_the_users(tmp_path):
    from importlib import resources
    from pathlib import Path

    checkout = Path(str(resources.files("lem.conf"))).parent
    done = command("presets", cwd=checkout)
    assert (done.code, "yours" in done.out) == (0, False)


def test_the_lists_fit_a_narrow_terminal(tmp_path, mine, monkeypatch, capfd):
    from rich.console import Console

    from lem.cli import listing
    from lem.results import show

    monkeypatch.chdir(tmp_path)
    narrow = Console(width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(show, "console", lambda: narrow)
    listing.show_presets()
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("throughput" in line for line in lines)
    listing.show_datasets()
    # The names are too wide for a table: they are not truncated, and can be copied.
    assert "anon8231489123/ShareGPT_Vicuna_unfiltered" in capfd.readouterr().out


def test_every_built_in_option_says_what_it_is_for():
    for group in ("backend", "dataset", "decoder", "energy", "preset"):
        for option in summaries(group):
            assert option.purpose, (group, option.name)
