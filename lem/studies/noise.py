"""`lem doctor --noise`: compares one configuration with itself in a campaign, and reports the machine's noise.

The campaign has the usual files and results, and can be resumed; only the output at its end differs. The statistics are
in `lem.results.noise`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lem.config.campaign import compose, is_campaign, settings_of_arms
from lem.config.compose import prepare
from lem.config.trust import asked_by
from lem.errors import ConfigError
from lem.results import campaign as results
from lem.results.campaign import Answer, Arm
from lem.results.codec import to_plain
from lem.results.noise import noise_of
from lem.results.noise_show import as_plain, show_noise
from lem.results.store import Store
from lem.studies import campaign as study
from lem.studies.ask import RunOptions
from lem.studies.campaign import Presentation
from lem.studies.consent import Consents
from lem.studies.manifest import Manifest

ARMS = ("A", "A again")
COMMAND = "lem doctor --noise"
# Five cycles make ten cells, the minimum for the correlation between neighboring cells.
CYCLES = 5
# The configuration to measure if none is given: it needs no network, and its windows take seconds.
DEFAULTS = {"model": "tiny", "dataset": "sample", "dataset.sample_size": "32"}


def main(
    config_file: Path | None,
    given: Mapping[str, Any],
    overrides: Sequence[str],
    options: RunOptions,
    *,
    difference: float,
    config_dir: Path | None = None,
    as_json: bool = False,
) -> int:
    """Compare a configuration with itself and show the noise; return 0, or 1 if a cell has no result.

    Args:
        config_file: the configuration; None for the built-in model and prompts.
        given: the command line's settings of the campaign, by key.
        overrides: the command line's Hydra overrides.
        options: how the command runs experiments.
        difference: the smallest difference, as a ratio minus 1, that later campaigns should detect.
        config_dir: a directory with the user's own options.
        as_json: whether the noise is shown as JSON.

    Raises:
        BadInput: raised before anything runs, with all problems.
        Interrupted: finished work is kept, and the message names the command that resumes the campaign.
    """
    if config_file is not None and config_file.is_file() and is_campaign(config_file):
        raise ConfigError(f"{config_file} is a campaign file; name the config file of a single configuration.")
    name = f"noise_{datetime.now():%Y%m%d_%H%M%S}"
    campaign = compose(None, {"name": name, "cycles": CYCLES, **given})
    study.check(campaign)
    words = [*settings_of_arms(campaign), *overrides]
    if config_file is None:
        words = [*_defaults(words), *words]
    composition = prepare(config_file, words, config_dir=config_dir)
    experiment = composition.experiment()
    Consents(options).require(asked_by(experiment, composition.sources))
    file = None if config_file is None else str(config_file)
    study.check_cooling(campaign, [experiment])
    campaign = replace(
        campaign, baseline=ARMS[0], sample_size=None, warmup_prompts=None, warmup_timeout_s=None, cool_to_c=None
    )
    arms = [Arm(arm, experiment, file) for arm in ARMS]
    return study.measure(campaign, arms, words, options, _presentation(difference, as_json))


def resume(name: str, results_dir: Path, options: RunOptions, *, difference: float, as_json: bool = False) -> int:
    """Resume a campaign that compares one configuration with itself, or show its noise again if it is complete.

    Raises:
        ResultsError: there is no such campaign.
        ConfigError: the campaign compares different configurations, or the machine or software has changed.
    """
    kept = results.read_definition(results.folder_named(name, Store(results_dir)))
    experiments = [to_plain(arm.experiment) for arm in kept.arms]
    if len(experiments) != len(ARMS) or experiments[0] != experiments[1]:
        raise ConfigError(
            f"Campaign '{kept.name}' does not compare one configuration with itself; to resume it: lem campaign "
            f"--resume {kept.name}."
        )
    return study.resume(name, results_dir, options, _presentation(difference, as_json))


def _defaults(words: Sequence[str]) -> list[str]:
    """Return overrides that set the defaults, leaving out the model or the prompts if the command line sets them."""
    keys = {word.partition("=")[0].lstrip("+") for word in words}
    chosen_prompts = any(key == "dataset" or key in ("dataset.path", "dataset.name") for key in keys)
    wanted = {key: value for key, value in DEFAULTS.items() if key == "model" or not chosen_prompts}
    return [f"{key}={value}" for key, value in wanted.items() if key not in keys]


def _presentation(difference: float, as_json: bool) -> Presentation:
    def show(found: Answer, manifest: Manifest, folder: Path) -> None:
        noise, wrong = noise_of(found, difference), study.failures(manifest)
        if as_json:
            plain = {**as_plain(noise), "failures": wrong, "campaign_directory": str(folder)}
            print(json.dumps(plain, indent=2, ensure_ascii=False))
            return
        show_noise(noise)
        for failure in wrong:
            print(failure)
        print(f"\nCampaign: {folder}")

    return Presentation(COMMAND, show)
