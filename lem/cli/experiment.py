"""`lem experiment`: flags become overrides, whose help texts come from the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lem.cli.base import ResultsDir, app
from lem.errors import ConfigError, DatasetError
from lem.spec import leaf


@app.command(context_settings={"allow_interspersed_args": True})
def experiment(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml | KEY=VALUE",
            help="A config file, and Hydra overrides such as batching.batch_size=4.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "-d", help="Dataset: a built-in name, a hub id or a local file."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", "-p", help="File of prompts, one on each line.")] = None,
    sample_size: Annotated[
        int | None, typer.Option("--sample-size", "-n", help=leaf("dataset.sample_size").description)
    ] = None,
    split: Annotated[str | None, typer.Option(help=leaf("dataset.split").description)] = None,
    column: Annotated[str | None, typer.Option(help=leaf("dataset.column").description)] = None,
    preset: Annotated[str | None, typer.Option(help="Start from a preset; lem presets lists them.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=leaf("model").description)] = None,
    backend: Annotated[str | None, typer.Option(help=leaf("backend.name").description)] = None,
    max_tokens: Annotated[int | None, typer.Option(help=leaf("max_output_tokens").description)] = None,
    seed: Annotated[int | None, typer.Option(help=leaf("seed").description)] = None,
    no_aggregate: Annotated[
        bool, typer.Option("--no-aggregate", help="Write raw records only, no row in the tables.")
    ] = False,
    results_dir: ResultsDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before running.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the configuration, run nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Run despite options that are inadvisable (not impossible).")
    ] = False,
    multirun: Annotated[
        bool, typer.Option("--multirun", help="Run every combination of comma-separated override values.")
    ] = False,
) -> None:
    """Run an experiment and show what it measured."""
    from lem.apps import experiment as run_app

    config_file, overrides = _split_arguments(arguments or [])
    choices = {"preset": preset, "backend": backend}
    flags = [f"{group}={option}" for group, option in choices.items() if option is not None]
    flags += _dataset_flags(dataset, prompts)
    values = {
        "model": model,
        "dataset.split": split,
        "dataset.column": column,
        "dataset.sample_size": sample_size,
        "max_output_tokens": max_tokens,
        "seed": seed,
        "io.results_dir": None if results_dir is None else str(results_dir),
    }
    flags += [_override(path, value) for path, value in values.items() if value is not None]
    options = run_app.Options(yes=yes, dry_run=dry_run, force=force, write_tables=not no_aggregate)
    raise typer.Exit(run_app.main(config_file, [*flags, *overrides], options, multirun=multirun))


def _split_arguments(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Tell the config file from the overrides."""
    files = [text for text in arguments if _is_config_file(text)]
    if len(files) > 1:
        raise ConfigError(f"An experiment has one config file, not {len(files)}: {', '.join(files)}.")
    return (Path(files[0]) if files else None), [text for text in arguments if text not in files]


def _is_config_file(text: str) -> bool:
    return "=" not in text.partition("/")[0] and text.endswith((".yaml", ".yml"))


def _dataset_flags(dataset: str | None, prompts: Path | None) -> list[str]:
    from lem.apps.compose import quoted

    if dataset is not None and prompts is not None:
        raise DatasetError("--dataset and --prompts exclude each other; give one of them.")
    if dataset is not None:
        return [f"dataset={dataset}"]
    if prompts is None:
        return []
    if not prompts.is_file():
        raise DatasetError(f"There is no prompts file {prompts}.")
    path = quoted(str(prompts))
    return ["dataset=custom", f"dataset.path={path}", f"dataset.name={path}"]


def _override(path: str, value: str | int) -> str:
    from lem.apps.compose import quoted

    return f"{path}={quoted(value) if isinstance(value, str) else value}"
