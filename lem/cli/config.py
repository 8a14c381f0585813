"""The `lem config` commands, which check, show and create configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lem.cli import flags
from lem.cli.base import AnyMachine, ConfigDir, ResultsDir, app
from lem.errors import ConfigError
from lem.machine.collector import paused_collector

Campaign = Annotated[
    bool, typer.Option("--campaign", help="Use the format of campaign files instead of the format of config files.")
]

config_app = typer.Typer(help="Check, show and create configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@config_app.command("validate")
@paused_collector()
def validate(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Config files and campaign files.", show_default=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Accept inadvisable options (but not impossible ones).")
    ] = False,
    any_machine: AnyMachine = False,
    config_dir: ConfigDir = None,
) -> None:
    """Check config files (syntax, keys, types, ranges, inheritance and rules) and report all problems at once."""
    from lem.cli import validate

    raise typer.Exit(
        validate.validate(files, config_dir=config_dir, force=force, any_machine=any_machine, as_json=as_json)
    )


@config_app.command("show", context_settings={"allow_interspersed_args": True})
@paused_collector()
def show(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml | KEY=VALUE",
            help="A config file, and overrides such as batching.batch_size=4.",
            show_default=False,
        ),
    ] = None,
    preset: flags.Preset = None,
    dataset: flags.Dataset = None,
    model: flags.Model = None,
    backend: Annotated[str | None, typer.Option(help="Inference backend.")] = None,
    results_dir: ResultsDir = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="Show where each value comes from: file and line, preset, …")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Print the complete configuration that a config file and overrides produce, in the form of a config file."""
    from lem.cli import validate

    config_file, given = flags.split_arguments(arguments or [])
    overrides = flags.choice_overrides({"preset": preset, "dataset": dataset, "backend": backend})
    overrides += [*flags.value_overrides({"model": model, "io.results_dir": results_dir}), *given]
    raise typer.Exit(validate.show(config_file, overrides, config_dir=config_dir, with_origin=origin, as_json=as_json))


@config_app.command("generate-grid")
def generate_grid(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE.yaml", help="The config file that the generated files inherit from.", show_default=False
        ),
    ],
    vary: Annotated[
        list[str],
        typer.Option(
            "--vary",
            metavar="KEY=VALUES",
            help="A key and its values, such as batch_size=1,2,4 or seed=range(1,9) or backend=pytorch,simulated. "
            "Repeat the flag for each key; the last key varies fastest.",
            show_default=False,
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Output directory.")] = Path("configs/grid"),
    validate: Annotated[bool, typer.Option("--validate", help="Write only valid configurations.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Write nothing if any configuration is invalid.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier grid in the output directory; keep other files.")
    ] = False,
    any_machine: AnyMachine = False,
    as_group: Annotated[
        bool, typer.Option("--as-group", help="Write complete configs that Hydra can load as a group without lem.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the index as JSON.")] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Write and check a config file for every combination of the given values."""
    from lem.studies import grid

    options = grid.GridOptions(
        validate=validate, strict=strict, force=force, any_machine=any_machine, as_group=as_group, as_json=as_json
    )
    raise typer.Exit(grid.generate(base, vary, output_dir, options, config_dir))


@config_app.command("schema")
def schema(campaign: Campaign = False, config_dir: ConfigDir = None) -> None:
    """Print the JSON Schema for config files, which editors use to check and complete them."""
    from lem.config import file_schema
    from lem.config.options import Options

    if campaign:
        print(file_schema.campaign_as_text(), end="")
    else:
        print(file_schema.as_text(Options.find(config_dir)), end="")


@config_app.command("new")
def new(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The file to write. Default: experiment.yaml on a terminal, otherwise standard output; with "
            "--campaign, always standard output.",
        ),
    ] = None,
    preset: flags.Preset = None,
    campaign: Campaign = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask no questions, even on a terminal.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    config_dir: ConfigDir = None,
) -> None:
    """Write a new config file with comments that explain every value. On a terminal, ask for the main values."""
    from lem.cli import new

    if campaign:
        if preset is not None:
            raise ConfigError("--preset is for config files and cannot be used with --campaign; leave it out.")
        raise typer.Exit(new.new_campaign(output, force=force))
    raise typer.Exit(new.new(output, preset=preset, yes=yes, force=force, config_dir=config_dir))
