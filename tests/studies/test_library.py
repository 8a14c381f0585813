"""`lem.campaign` measures through the same code as `lem campaign`, and returns what that prints."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pandas as pd
import pytest

import lem as library
from lem.results import parquet
from lem.results.campaign import ArmRow, PairRow, folder_of, read_definition
from lem.results.store import Store
from lem.spec.campaign import Campaign
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Dataset, Energy, Experiment, Io
from lem.studies import campaign as study
from tests.studies.campaigns import QUICK, write_arms


def arm(decode_s_per_token=0.001, results_dir="results", **values):
    """Return a simulated experiment that takes no time."""
    backend = SimulatedBackend(sleep=False, decode_s_per_token=decode_s_per_token)
    known = {"model": "any", "backend": backend, "energy": Energy(name="simulated", power_w=100.0)}
    known |= {
        "dataset": Dataset(name="sample", path="builtin:sample", sample_size=4),
        "io": Io(results_dir=results_dir),
    }
    return Experiment(**known | {"min_output_tokens": 8, "max_output_tokens": 8} | values)


ARMS = {"quick": arm(), "slow": arm(0.002)}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A campaign of two arms and two cycles, and its results directory."""
    root = tmp_path_factory.mktemp("library") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root.parent)  # out of the checkout, whose commit is a condition of a campaign
        return library.campaign(ARMS, name="speed", cycles=2, results_dir=root), root


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_answer_comes_as_tables_and_sentences(done):
    outcome, root = done
    assert (outcome.name, outcome.is_complete, list(outcome.failures)) == ("speed", True, [])
    assert outcome.manifest == root / "campaigns" / "speed" / "experiments.json"
    assert [cell["status"] for cell in json.loads(outcome.manifest.read_text())] == ["completed"] * 4
    assert list(outcome.arms.columns) == parquet.names(ArmRow)
    assert list(outcome.pairs.columns) == parquet.names(PairRow)
    (pair,) = outcome.pairs[outcome.pairs["is_primary"]].to_dict("records")
    assert (pair["arm"], pair["baseline"], pair["cycles"]) == ("slow", "quick", 2)
    assert pair["ratio"] == pytest.approx(2, rel=0.05)
    assert outcome.sentences[0].startswith("slow needs 1.96 times the energy per output token of quick")
    assert all(": " in warning for warning in outcome.warnings)
    assert library.units(outcome.pairs)["ratio"] == "1"
    assert set(outcome.arms["unit"]) >= {"J/token", "token/s", "s"}


def test_the_cells_name_the_experiments(done):
    outcome, root = done
    rows = library.load(root).experiments
    both = outcome.cells.merge(rows, on="experiment_id", suffixes=("", "_of_row"))
    assert list(both["arm"]) == list(both["campaign_arm"])
    assert list(both["cycle"]) == list(both["campaign_cycle"])
    assert len(both) == 4


def test_the_command_shows_the_same(done, lem):
    outcome, root = done
    shown = json.loads(lem("results", "show", "speed", "-o", str(root), "--json").out)
    assert shown["sentences"] == outcome.sentences
    assert shown["cells"] == [
        {key: value for key, value in cell.items() if key != "error"} for cell in outcome.cells.to_dict("records")
    ]
    for name, frame in (("arms", outcome.arms), ("pairs", outcome.pairs)):
        assert frame.astype(object).where(frame.notna(), None).to_dict("records") == shown[name]


def test_the_same_call_measures_nothing_again(done, lem):
    outcome, root = done
    before = Store(root).ids()
    again = library.campaign(ARMS, name="speed", cycles=2, results_dir=root)
    assert Store(root).ids() == before
    pd.testing.assert_frame_equal(again.arms, outcome.arms)
    assert lem("campaign", "--resume", "speed", "-o", str(root)).code == 0
    assert Store(root).ids() == before


def test_another_campaign_of_the_name_is_refused(done):
    _, root = done
    with pytest.raises(library.ConfigError, match="A campaign 'speed' with other arms or settings already exists"):
        library.campaign(ARMS | {"slow": arm(0.003)}, name="speed", cycles=2, results_dir=root)


def test_an_interrupted_campaign_goes_on_with_the_same_call(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    real, calls = study.OneByOne._measured, []

    def measured(self, number, experiment, report):
        calls.append(number)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, number, experiment, report)

    monkeypatch.setattr(study.OneByOne, "_measured", measured)
    with pytest.raises(library.Interrupted, match="To resume: lem campaign --resume cut"):
        library.campaign(ARMS, name="cut", cycles=1)
    outcome = library.campaign(ARMS, name="cut", cycles=1)
    assert outcome.is_complete
    assert calls == [0, 1, 1]
    assert capfd.readouterr().out == ""


def test_a_file_gives_the_arm_that_the_command_measures(lem, tmp_path, capfd):
    """The command begins the campaign, and the call finds that it is the same one and complete."""
    write_arms(tmp_path)
    begun = lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    assert begun.code == 0, begun.err
    ids = Store(tmp_path / "results").ids()
    settings = {"dataset": None, "sample_size": 4, "cycles": 1}
    overrides = ["dataset=sample", "max_output_tokens=8"]
    outcome = library.campaign(["quick.yaml", "slow.yaml"], name="one", overrides=overrides, **settings)
    assert Store(tmp_path / "results").ids() == ids
    assert outcome.is_complete
    assert capfd.readouterr() == ("", "")


def test_a_campaign_file_and_a_results_directory(tmp_path, monkeypatch, capfd):
    write_arms(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.yaml").write_text("arms: [quick.yaml, slow.yaml]\ncycles: 1\ndataset: sample\nsample_size: 2\n")
    outcome = library.campaign(tmp_path / "both.yaml", results_dir=tmp_path / "else, where", progress=True)
    assert outcome.directory == tmp_path / "else, where" / "campaigns" / "both"
    assert [len(outcome.cells), *outcome.arms["arm"].unique()] == [2, "quick", "slow"]
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "[1/2]" in shown.err


def test_a_failed_cell_is_no_exception(tmp_path):
    broken = replace(ARMS["slow"], backend=SimulatedBackend(fail_at_request=0))
    outcome = library.campaign({"good": arm(), "broken": broken}, name="half", cycles=1, results_dir=tmp_path)
    assert not outcome.is_complete
    assert [failure.split(":")[0] for failure in outcome.failures] == ["broken, cycle 1/1"]
    assert list(outcome.cells.sort_values("arm")["status"]) == ["failed", "completed"]


def test_settings_of_the_campaign_reach_the_arms_and_the_definition(tmp_path):
    outcome = library.campaign(
        ARMS, name="set", cycles=1, results_dir=tmp_path, baseline="slow", sample_size=3, warmup_prompts=2,
        warmup_timeout_s=7, seed=5, structure="interleaved", margin="2%",
    )  # fmt: skip
    kept = read_definition(folder_of(Store(tmp_path), "set"))
    of_campaign = (kept.campaign.baseline, kept.campaign.seed, kept.campaign.structure, kept.campaign.margin)
    assert of_campaign == ("slow", 5, "interleaved", 0.02)
    for each in kept.arms:
        assert each.experiment.dataset.sample_size == 3
        assert (each.experiment.warmup.prompts, each.experiment.warmup.max_s) == (2, 7)
    assert set(outcome.pairs["baseline"]) == {"slow"}
    assert set(library.load(tmp_path).experiments["requests_completed"]) == {3}


def test_the_docstring_names_every_setting():
    for each in fields(Campaign):
        if each.name not in ("arms", "across_nodes"):
            assert each.name in (library.campaign.__doc__ or "")


BAD_EXPERIMENT = {"quick": arm(), "slow": arm(cycles=0, seed="x")}


@pytest.mark.parametrize(
    ("arms", "more", "problems"),
    [
        (ARMS, {"name": None}, ["A campaign of experiments needs a name: name='…'."]),
        (["a.yaml", "b.yaml"], {"name": None}, ["A campaign without a campaign file needs a name: name='…'."]),
        ([], {}, ["A campaign needs at least two arms: "]),
        ({"one": arm()}, {}, ["A campaign compares at least two configurations, not 1."]),
        (["nothing.yaml", "b.yaml"], {}, ["'nothing.yaml' matches no config file", "'b.yaml' matches no config"]),
        (ARMS, {"cycels": 2}, ["cycels: unknown key. Did you mean 'cycles'"]),
        (ARMS, {"config_gap": 2}, ["config_gap: unknown key. Did you mean 'config_gap_s'"]),
        (ARMS, {"cycles": 0, "seed": -1}, ["cycles: must be", "seed: must be"]),
        (ARMS, {"structure": "latine"}, ["structure: 'latine' is not one of"]),
        (ARMS, {"baseline": "fast"}, ["baseline: no arm is called 'fast'."]),
        (ARMS, {"dataset": "sample"}, ["dataset: this is for arms from files; set the values in the experiments."]),
        (ARMS, {"overrides": ["seed=1"]}, ["overrides and config_dir are for arms from files; "]),
        (ARMS, {"name": "a/b"}, ["name: must be at most 100 letters"]),
        (ARMS, {"across_nodes": True}, ["across_nodes: without --launcher slurm, all cycles run on this machine."]),
        (BAD_EXPERIMENT, {}, ["slow: seed: should be a valid integer, not 'x'.", "slow: cycles: should be greater"]),
        ({"a": arm(), "b": {"model": "m"}}, {}, ["b: An Experiment is needed, not dict; see lem.Experiment."]),
        ({"a\nb": arm(), "c": arm()}, {}, ["a\\nb: arms: the name 'a\\nb' has characters that cannot be printed"]),
        ({"": arm(), "c": arm()}, {}, ["The name of an arm must be a non-empty string, not ''."]),
        ({1: arm(), 2: arm()}, {}, ["The name of an arm must be a non-empty string, not 1.", "The name of an arm"]),
        ({"a": arm(results_dir="x"), "b": arm()}, {}, ["io.results_dir: the experiments have different results"]),
        ({"a": arm(model=None), "b": arm()}, {}, ["a: No model"]),
        (
            {name: replace(each, energy=Energy(name="none")) for name, each in ARMS.items()}, {},
            ["quick: ", "slow: "],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_anything_is_written(arms, more, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(library.BadInput) as caught:
        library.campaign(arms, **{"name": "bad", **more})
    found = caught.value.problems
    assert len(found) == len(problems), found
    for one, wanted in zip(found, problems, strict=True):
        assert one.startswith(wanted)
    assert list(tmp_path.iterdir()) == []


def test_jobs_that_have_not_ended_are_an_error(monkeypatch):
    monkeypatch.setattr(study, "measure", lambda *_: 0)
    with pytest.raises(library.RunError, match="Slurm jobs that have not ended; lem jobs follows them"):
        library.campaign(ARMS, name="jobs")
