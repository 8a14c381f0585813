"""Flags that several commands share, and the overrides they become."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lem.cli import complete
from lem.errors import ConfigError, DatasetError
from lem.spec.campaign import Campaign
from lem.spec.paths import expanded
from lem.spec.schema import leaf, leaves

if TYPE_CHECKING:
    from lem.config import launcher as config_launcher

Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        "-d",
        help="Dataset: a name, a hub id, or a local file or directory; lem datasets lists the names.",
        autocompletion=complete.datasets,
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts", "-p", help="File with the prompts: txt (one per line), json, jsonl, csv, tsv or parquet."
    ),
]
SampleSize = Annotated[int | None, typer.Option("--sample-size", "-n", help=leaf("dataset.sample_size").description)]
_OF_CAMPAIGN = {each.path: each.description for each in leaves(Campaign)}
CampaignName = Annotated[
    str | None,
    typer.Option("--campaign-name", help=_OF_CAMPAIGN["name"] + " Required unless a campaign file is given."),
]
WarmupPrompts = Annotated[int | None, typer.Option(help=_OF_CAMPAIGN["warmup_prompts"])]
WarmupTimeout = Annotated[float | None, typer.Option(help=_OF_CAMPAIGN["warmup_timeout_s"])]
ConfigGap = Annotated[
    float | None, typer.Option(help=_OF_CAMPAIGN["config_gap_s"] + f" Default: {Campaign.config_gap_s:g}.")
]
CycleGap = Annotated[
    float | None, typer.Option(help="Pause between two cycles, in seconds. Default: the same as --config-gap.")
]
CoolTo = Annotated[float | None, typer.Option(help=_OF_CAMPAIGN["cool_to_c"])]
OrderSeed = Annotated[int | None, typer.Option(help=_OF_CAMPAIGN["seed"] + f" Default: {Campaign.seed}.")]
Preset = Annotated[
    str | None, typer.Option(help="Start from a preset; lem presets lists them.", autocompletion=complete.presets)
]
Model = Annotated[str | None, typer.Option("--model", "-m", help=leaf("model").description)]
NoAggregate = Annotated[bool, typer.Option("--no-aggregate", help="Write only raw records, and no rows in the tables.")]
Force = Annotated[bool, typer.Option("--force", help="Run despite inadvisable options (but not impossible ones).")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over even if an identical experiment is unfinished.")]
AllowCommand = Annotated[
    bool,
    typer.Option(
        "--allow-command", help="Do not ask before starting programs named in config files (backend.command)."
    ),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Do not ask before running code named in config files (trust_remote_code).")
]
AllowKey = Annotated[
    bool,
    typer.Option("--allow-key", help="Do not ask before sending API keys to other machines named in config files."),
]

Launcher = Annotated[
    str | None,
    typer.Option(
        "--launcher",
        metavar="NAME",
        help="Where to run: basic (this machine, the default), slurm (jobs on a Slurm cluster), or a Slurm launcher "
        "of your own in --config-dir. Short for hydra/launcher=NAME. To set the launcher's options, give overrides of "
        "the form hydra.launcher.KEY=VALUE.",
    ),
]

PerJob = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help="With --launcher slurm: run K experiments in each job, one after another. Default: 1.",
    ),
]

Detach = Annotated[
    bool,
    typer.Option(
        "--detach", help="With --launcher slurm: exit as soon as the jobs are submitted; lem jobs follows them later."
    ),
]

# A key in Hydra's grammar. A path does not count as a key, except for hydra/launcher and similar settings.
OVERRIDE = re.compile(r"(\+{0,2}|~)([\w.@:]+|hydra/[\w/@:]+)=|~[\w@:][\w.@:/]*$")


def is_override(text: str) -> bool:
    """Return whether an argument is an override (key=value); the name of an existing file is not an override."""
    if text.startswith("~") and text.endswith((".yaml", ".yml")):
        return False  # a file in another user's home directory
    return OVERRIDE.match(text) is not None and not os.path.exists(os.path.expanduser(text))


def dataset_overrides(dataset: str | None, prompts: str | None) -> list[str]:
    """Return the overrides that select the prompts, given the values of --dataset and --prompts."""
    from lem.config.overrides import quoted
    from lem.config.yamltext import escaped

    if dataset is not None and prompts is not None:
        raise DatasetError("--dataset and --prompts are mutually exclusive; give only one.")
    if dataset is not None:
        return [f"dataset={dataset}"]
    if prompts is None:
        return []
    file = expanded(prompts)
    if os.path.isdir(file):
        raise DatasetError(f"{prompts} is a directory, but --prompts takes a file. Use --dataset to read a directory.")
    if not os.path.lexists(file):
        raise DatasetError(f"--prompts: there is no file {prompts}.")
    path = quoted(escaped(prompts))
    return ["dataset=custom", f"dataset.path={path}", f"dataset.name={path}"]


def choice_overrides(choices: Mapping[str, str | None]) -> list[str]:
    """Return the overrides that choose options of groups; None means that a flag was not given."""
    return [f"{group}={option}" for group, option in choices.items() if option is not None]


def launcher_of(
    name: str | None, overrides: list[str], config_dir: Path | None
) -> tuple[config_launcher.Launcher | None, list[str]]:
    """Return the Slurm launcher, or None if it is not chosen, and the overrides to apply to the experiments.

    If the Slurm launcher is chosen, the overrides that choose it or set its options are left out.
    """
    given = [*choice_overrides({"hydra/launcher": name}), *overrides]
    if not any(text.lstrip("+").startswith("hydra/launcher=") for text in given):
        return None, overrides
    from lem.config.launcher import chosen_launcher, is_of_launcher

    launcher = chosen_launcher(given, config_dir)
    return launcher, given if launcher is None else [text for text in given if not is_of_launcher(text)]


def check_per_job(per_job: int | None, launcher: config_launcher.Launcher | None, *, several: bool = True) -> None:
    """Raise `ConfigError` if --per-job is given to a command that submits no jobs or runs only one experiment."""
    if per_job is not None and launcher is None:
        raise ConfigError("--per-job needs --launcher slurm.")
    if per_job is not None and not several:
        raise ConfigError("--per-job needs several experiments: add --multirun, or use lem batch.")


def check_detach(detach: bool, launcher: config_launcher.Launcher | None) -> None:
    """Raise `ConfigError` if --detach is given to a command that submits no jobs."""
    if detach and launcher is None:
        raise ConfigError("--detach needs --launcher slurm.")


def value_overrides(values: Mapping[str, str | int | float | Path | None]) -> list[str]:
    """Return the overrides that set values; None means that a flag was not given.

    Strings are taken literally: a directory named `${x}` is not an interpolation.
    """
    from lem.config.overrides import quoted
    from lem.config.yamltext import escaped

    return [
        f"{path}={quoted(escaped(str(value))) if isinstance(value, (str, Path)) else value}"
        for path, value in values.items()
        if value is not None
    ]


def split_arguments(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Split arguments into the config file (None if none is given) and the overrides."""
    files = [text for text in arguments if "=" not in text.partition("/")[0] and text.endswith((".yaml", ".yml"))]
    if len(files) > 1:
        raise ConfigError(f"Give one config file, not {len(files)}: {', '.join(files)}.")
    return (Path(files[0]) if files else None), [text for text in arguments if text not in files]
