"""Choosing the launcher for Slurm, and checking its options."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from lem.config.launcher import chosen_launcher
from lem.errors import ConfigError
from lem.spec.slurm import SlurmOptions

FILE = Path(__file__).parents[2] / "conf" / "hydra" / "launcher" / "slurm.yaml"
SLURM = "hydra/launcher=slurm"


def test_the_file_has_every_option_with_its_default():
    values = yaml.safe_load(FILE.read_text())
    values.pop("_target_")
    assert values == asdict(SlurmOptions())


def test_without_a_launcher_nothing_is_composed():
    assert chosen_launcher(["seed=1", "hydra.sweep.dir=x"], None) is None
    assert chosen_launcher([SLURM, "hydra/launcher=basic"], None) is None


def test_overrides_set_options():
    given = ["hydra.launcher.partition=gpu", "hydra.launcher.setup=[a b,c]", "hydra.launcher.timeout_min=30"]
    more = "+hydra.launcher.additional_parameters.mail-user=me@site"
    launcher = chosen_launcher(["seed=1", SLURM, *given, more], None)
    assert launcher is not None
    options = launcher.options
    assert (options.partition, options.setup, options.timeout_min) == ("gpu", ["a b", "c"], 30)
    assert options.additional_parameters == {"mail-user": "me@site"}
    assert launcher.settings == (SLURM, *given, more)


def test_a_sites_file_is_a_launcher(tmp_path):
    folder = tmp_path / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "mysite.yaml").write_text("defaults: [slurm]\npartition: big\nsetup: [module load cuda]\n")
    launcher = chosen_launcher(["hydra/launcher=mysite", "hydra.launcher.qos=long"], tmp_path)
    assert launcher is not None
    assert (launcher.options.partition, launcher.options.qos) == ("big", "long")
    assert launcher.options.setup == ["module load cuda"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([SLURM, "hydra.launcher.partitoin=gpu"], "hydra.launcher.partitoin: unknown key. Did you mean 'partition'?"),
        (["hydra/launcher=slum"], "Could not find 'hydra/launcher/slum' among basic, slurm. Did you mean 'slurm'?"),
        (["hydra/launcher=submitit_slurm"], "hydra/launcher=submitit_slurm: lem cannot use this launcher"),
        ([SLURM, "hydra.launcher.timeout_min=0.5"], "hydra.launcher.timeout_min: must be a valid integer, not 0.5."),
        ([SLURM, "hydra.launcher.timeout_min=0"], "hydra.launcher.timeout_min: must be greater than or equal to 1"),
        ([SLURM, "hydra.launcher.setup=x"], "hydra.launcher.setup: must be a valid array, not 'x'."),
        ([SLURM, "hydra.launcher.timeout_min=2"], "hydra.launcher.signal_delay_s: must be shorter than the time limit"),
    ],
    ids=["unknown option", "unknown launcher", "another plugin", "type", "range", "no list", "signal before the start"],
)
def test_mistakes_are_refused(given, message):
    with pytest.raises(ConfigError) as caught:
        chosen_launcher(given, None)
    assert message in str(caught.value)


def test_mistakes_in_a_sites_file_are_refused(tmp_path):
    folder = tmp_path / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "mysite.yaml").write_text("defaults: [slurm]\nacount: me\npoll_s: 0\n")
    with pytest.raises(ConfigError) as caught:
        chosen_launcher(["hydra/launcher=mysite"], tmp_path)
    assert caught.value.problems == (
        "hydra.launcher.acount: unknown key. Did you mean 'account' or 'comment'?",
        "hydra.launcher.poll_s: must be greater than or equal to 0.2, not 0.",
    )
