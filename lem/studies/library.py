"""`lem.campaign`: runs a campaign from Python, in the same way as `lem campaign`, and returns its results.

The command and this module both measure through `lem.studies.campaign`. This module only turns the arguments into arms
and settings, and the answer into DataFrames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lem.config.campaign import compose, is_campaign
from lem.config.overrides import quoted
from lem.config.yamltext import escaped
from lem.errors import ConfigError, RunError
from lem.results.campaign import CELLS, Answer, Arm, ArmRow, PairRow
from lem.results.campaign_show import sentences
from lem.results.frames import frame_of
from lem.runner.preflight import validated
from lem.spec.campaign import Campaign
from lem.spec.experiment import Experiment
from lem.spec.paths import expanded
from lem.studies import campaign as study
from lem.studies.ask import RunOptions
from lem.studies.campaign import Presentation
from lem.studies.manifest import Manifest

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CampaignOutcome:
    """How a campaign ended, and its results.

    `directory` is the campaign's directory. `is_complete` is False if a cell has no result or an arm could not be
    compared with the baseline; `failures` then has a sentence for each cell that failed. `answer` has everything that
    `lem results show` prints.
    """

    directory: Path
    is_complete: bool
    failures: Sequence[str]
    answer: Answer = field(repr=False)

    @property
    def name(self) -> str:
        """The campaign's name."""
        return self.answer.definition.name

    @property
    def manifest(self) -> Path:
        """The file that lists the campaign's cells."""
        return self.directory / CELLS

    @cached_property
    def arms(self) -> pd.DataFrame:
        """A row for each metric of each arm, with its mean and interval; the column `unit` gives their unit."""
        return frame_of(ArmRow, self.answer.arms)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """A row for each metric of each arm but the baseline: ratio to the baseline, interval, p-value and verdict."""
        return frame_of(PairRow, self.answer.pairs)

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A row for each cell that was needed: arm, cycle, position, experiment_id, status and error."""
        import pandas as pd

        names = ["arm", "cycle", "position", "experiment_id", "status", "error"]
        return pd.DataFrame([[getattr(cell, name) for name in names] for cell in self.answer.cells], columns=names)

    @property
    def sentences(self) -> list[str]:
        """A sentence for each comparison by the primary metric, such as `b needs 2 times the energy of a`."""
        return list(sentences(self.answer))

    @property
    def warnings(self) -> list[str]:
        """The reasons to doubt the results, each as `code: text`."""
        return [f"{note.code}: {note.text}" for note in self.answer.warnings]


def campaign(
    arms: Mapping[str, Experiment] | Sequence[str | Path] | str | Path,
    *,
    name: str | None = None,
    overrides: Sequence[str] = (),
    results_dir: str | Path | None = None,
    config_dir: str | Path | None = None,
    force: bool = False,
    allow_command: bool = False,
    allow_code: bool = False,
    allow_key: bool = False,
    progress: bool = False,
    **settings: Any,
) -> CampaignOutcome:
    """Measure several configurations in turn and compare them, as `lem campaign` does.

    This continues the example of `lem.run`:

    >>> from dataclasses import replace
    >>> import lem
    >>> arms = {
    ...     "quick": replace(experiment, backend=SimulatedBackend(sleep=False, decode_s_per_token=0.001)),
    ...     "slow": replace(experiment, backend=SimulatedBackend(sleep=False, decode_s_per_token=0.002)),
    ... }
    >>> outcome = lem.campaign(arms, name="speed", cycles=2, primary="output_tokens_per_s")
    >>> outcome.arms.query("is_primary")[["arm", "cells_completed", "mean", "unit"]].round(1)
         arm  cells_completed   mean     unit
    0  quick                2  995.5  token/s
    2   slow                2  498.9  token/s
    >>> outcome.pairs.query("is_primary")["ratio"].round(2).tolist()
    [0.5]

    A campaign that was interrupted, or in which cells failed, is continued by the same call: cells that have a result
    are not measured again. If all cells have a result, the call returns the answer at once. A campaign can also be
    continued with `lem campaign --resume NAME`.

    Args:
        arms: a mapping from the names of the arms to experiments; or config files, folders of them or glob patterns; or
            a campaign file.
        name: the name of the campaign and of its directory; needed unless a campaign file is given.
        overrides: Hydra overrides for all arms, such as `max_output_tokens=8`; only for arms from files.
        results_dir: where the results go; by default, the directory in the arms' configurations.
        config_dir: a directory with your own options, as given to --config-dir; only for arms from files.
        force: run the arms even if they are inadvisable, and continue a campaign even if the machine has changed.
        allow_command, allow_code, allow_key: agree to run the programs and the code, and to send the keys, that config
            files name.
        progress: show the progress on standard error.
        **settings: the other keys of a campaign file, with the same meanings and defaults: `cycles`, `until_ci`,
            `max_cycles`, `structure`, `seed`, `baseline`, `primary`, `margin`, `retries`, `resample_prompts`,
            `sample_size`, `warmup_prompts`, `warmup_timeout_s`, `config_gap_s`, `cycle_gap_s`, `cool_to_c` and, for
            arms from files, `dataset`. None means that a key is not given.

    Returns:
        The results, even if cells failed; see `CampaignOutcome`.

    Raises:
        ConfigError: an arm or a setting is wrong, or there is another campaign of this name; nothing has run. The error
            lists all problems, including those with models and prompts.
        ResultsError: the campaign's files are damaged, or another process is measuring it.
        RunError: the disk is full, or the campaign's cells are Slurm jobs that have not ended.
        Interrupted: the campaign was stopped from outside; the finished requests are kept.
    """
    given = {key: value for key, value in {"name": name, **settings}.items() if value is not None}
    options = RunOptions(
        yes=True, force=force, allow_command=allow_command, allow_code=allow_code, allow_key=allow_key,
        quiet=not progress,
    )  # fmt: skip
    shown: list[tuple[Answer, Manifest, Path]] = []
    presentation = Presentation(show=lambda *found: shown.append(found))
    if isinstance(arms, Mapping):
        if overrides or config_dir:
            raise ConfigError("overrides and config_dir are for arms from files; set the values in the experiments.")
        chosen, own = _from_experiments(arms, given, results_dir)
        code = study.measure(chosen, own, [], options, presentation)
    else:
        patterns = [str(arms)] if isinstance(arms, str | Path) else [str(each) for each in arms]
        _check_files(patterns, named=name is not None)
        place = [] if results_dir is None else [f"io.results_dir={quoted(escaped(str(results_dir)))}"]
        folder = None if config_dir is None else Path(config_dir)
        code = study.main(
            patterns, given, [*place, *overrides], options, config_dir=folder, presentation=presentation
        )  # fmt: skip
    if not shown:
        raise RunError("The cells of this campaign are Slurm jobs that have not ended; lem jobs follows them.")
    answer, manifest, directory = shown[-1]
    return CampaignOutcome(directory, code == 0, study.failures(manifest), answer)


def _check_files(patterns: Sequence[str], *, named: bool) -> None:
    if not patterns:
        raise ConfigError(
            "A campaign needs at least two arms: give a mapping from names to experiments, a list of config files, or "
            "a campaign file."
        )
    files = [expanded(pattern) for pattern in patterns]
    if not named and not any(file.is_file() and is_campaign(file) for file in files):
        raise ConfigError("A campaign without a campaign file needs a name: name='…'.")


def _from_experiments(
    experiments: Mapping[str, Experiment], given: Mapping[str, Any], results_dir: str | Path | None
) -> tuple[Campaign, list[Arm]]:
    """Return a campaign's settings and its arms; raises `ConfigError` if a setting or an arm is wrong."""
    if given.get("name") is None:
        raise ConfigError("A campaign of experiments needs a name: name='…'.")
    if unfit := [key for key in ("dataset", "overrides", "arms") if key in given]:
        raise ConfigError(f"{unfit[0]}: this is for arms from files; set the values in the experiments.")
    if len(experiments) < 2:
        raise ConfigError(
            f"A campaign compares at least two configurations, not {len(experiments)}. To measure the noise, give the "
            "same experiment twice, under two names."
        )
    campaign = compose(None, given)
    study.check(campaign)
    arms, problems = list[Arm](), list[str]()
    for name, experiment in experiments.items():
        if not isinstance(name, str) or not name:
            problems.append(f"The name of an arm must be a non-empty string, not {name!r}.")
            continue
        try:
            study.check_arm_name(name)
            arms.append(Arm(name, _with(campaign, validated(experiment))))
        except ConfigError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(*problems)
    arms = list(_in_one_place(arms, results_dir))
    return study.fitted(campaign, arms, given), arms


def _with(campaign: Campaign, experiment: Experiment) -> Experiment:
    """Return an experiment with the campaign's settings that apply to every arm."""
    wanted: dict[str, dict[str, Any]] = {
        "dataset": {"sample_size": campaign.sample_size},
        "warmup": {"prompts": campaign.warmup_prompts, "max_s": campaign.warmup_timeout_s},
        "cooldown": {"to_c": campaign.cool_to_c},
    }
    parts = {
        part: replace(getattr(experiment, part), **{key: value for key, value in values.items() if value is not None})
        for part, values in wanted.items()
    }
    return replace(experiment, **parts)


def _in_one_place(arms: Sequence[Arm], results_dir: str | Path | None) -> Iterator[Arm]:
    """Yield the arms, all with the given results directory or, if none is given, with the one that they share.

    This directory also holds the campaign's files. Raises `ConfigError` if none is given and they share none.
    """
    places = dict.fromkeys(arm.experiment.io.results_dir for arm in arms)
    if results_dir is None and len(places) > 1:
        raise ConfigError(
            f"io.results_dir: the experiments have different results directories ({', '.join(places)}); give one to "
            "the campaign: results_dir='…'."
        )
    root = str(next(iter(places)) if results_dir is None else results_dir)
    for arm in arms:
        yield replace(arm, experiment=replace(arm.experiment, io=replace(arm.experiment.io, results_dir=root)))
