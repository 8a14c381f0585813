"""The `lem` command: flags become overrides, and each command calls its app.

Help texts come from the schema. Nothing heavy is imported here: torch, transformers, hydra, pyarrow and
codecarbon come with the command that needs them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lem._version import VERSION
from lem.errors import BadInput, ConfigError, DatasetError, Interrupted, LemError
from lem.spec import leaf

app = typer.Typer(
    help="Measure what running a language model costs: joules, seconds, tokens, FLOPs and CO2e.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
results_app = typer.Typer(help="Look at results.", no_args_is_help=True)
app.add_typer(results_app, name="results")

# The values that have a flag of their own.
FLAGS = {
    "model": "--model",
    "dataset.split": "--split",
    "dataset.column": "--column",
    "dataset.sample_size": "--sample-size",
    "max_output_tokens": "--max-tokens",
    "seed": "--seed",
    "io.results_dir": "--results-dir",
}

ResultsDir = Annotated[
    Path | None,
    typer.Option("--results-dir", "-o", help="Results directory [LLM_ENERGY_RESULTS_DIR, else results/]."),
]


def _version(asked: bool) -> None:
    if asked:
        print(f"lem {VERSION}")
        raise typer.Exit


@app.callback()
def _lem(
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, typer.Option("--version", "-v", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Read .env before any command looks at the environment; what is set already wins."""
    import dotenv

    dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))


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


@app.command()
def aggregate(
    experiment_id: Annotated[
        str | None, typer.Argument(help="Experiment id, or the beginning of one.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All experiments that have no row yet.")] = False,
    results_dir: ResultsDir = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Anew, also where a row exists.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict/--no-strict", help="Fail when records of some processes are missing.")
    ] = True,
) -> None:
    """Turn raw records into rows of the tables; lem experiment does it by itself."""
    from lem.apps import results

    store = results.store_at(results_dir)
    raise typer.Exit(
        results.aggregate_experiments(store, experiment_id, everything=everything, force=force, strict=strict)
    )


@results_app.command("list")
def results_list(
    results_dir: ResultsDir = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also those that have no row yet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List experiments, oldest first."""
    from lem.apps import results

    raise typer.Exit(results.list_experiments(results.store_at(results_dir), everything=everything, as_json=as_json))


@results_app.command("show")
def results_show(
    experiment_id: Annotated[str, typer.Argument(help="Experiment id, or the beginning of one.")],
    results_dir: ResultsDir = None,
    raw: Annotated[bool, typer.Option("--raw", help="The records of the processes: phases, readings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show one experiment."""
    from lem.apps import results

    raise typer.Exit(results.show(results.store_at(results_dir), experiment_id, raw=raw, as_json=as_json))


@app.command()
def gpus(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show the NVIDIA GPUs, their MIG instances, and which of them CUDA_VISIBLE_DEVICES hides."""
    from lem.apps import gpus as gpus_app

    raise typer.Exit(gpus_app.show_gpus(as_json=as_json))


@app.command()
def datasets() -> None:
    """List the datasets that can be named with --dataset."""
    from lem.apps import inventory

    raise typer.Exit(inventory.show_datasets())


@app.command()
def presets() -> None:
    """List the presets that can be named with --preset."""
    from lem.apps import inventory

    raise typer.Exit(inventory.show_presets())


def main() -> NoReturn:
    """Run the command line; an error that lem raises on purpose is one sentence and an exit code."""
    try:
        app(prog_name="lem")
    except BadInput as error:
        sys.exit(_tell(error))
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except LemError as error:
        sys.exit(_tell(error))
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
    except BrokenPipeError:
        _quit_quietly()
    sys.exit(0)


def _tell(error: LemError) -> int:
    for line in str(error).splitlines():
        path = line.partition(":")[0]
        print(
            f"Error: {line.replace(path, f'{path} ({FLAGS[path]})', 1) if path in FLAGS else line}",
            file=sys.stderr,
        )
    return error.exit_code


def _quit_quietly() -> NoReturn:
    """Leave when the reader of a pipe has gone (lem … | head); Python must not flush into it once more."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


if __name__ == "__main__":
    main()
