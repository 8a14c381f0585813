"""The `lem batch` command, which runs many config files, one after another or several at a time."""

from __future__ import annotations

from typing import Annotated

import typer

from lem.cli import flags
from lem.cli.base import ConfigDir, ResultsDir, app
from lem.errors import ConfigError


@app.command(context_settings={"allow_interspersed_args": True})
def batch(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERN… | KEY=VALUE",
            help="Config files, folders or quoted patterns ('configs/**/*.yaml'), and Hydra overrides for all files.",
            show_default=False,
        ),
    ],
    dataset: flags.Dataset = None,
    prompts: flags.Prompts = None,
    sample_size: flags.SampleSize = None,
    preset: flags.Preset = None,
    model: flags.Model = None,
    parallel: Annotated[
        int,
        typer.Option(min=1, help="Number of experiments to run at a time; the visible GPUs are shared out among them."),
    ] = 1,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="After a failure, start no more experiments.")] = False,
    config_dir: ConfigDir = None,
    launcher: flags.Launcher = None,
    per_job: flags.PerJob = None,
    detach: flags.Detach = False,
    no_aggregate: flags.NoAggregate = False,
    results_dir: ResultsDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list all experiments without running any.")
    ] = False,
    force: flags.Force = False,
    allow_command: flags.AllowCommand = False,
    allow_code: flags.AllowCode = False,
    allow_key: flags.AllowKey = False,
    fresh: flags.Fresh = False,
) -> None:
    """Check many config files, then run one experiment for each of them."""
    from lem.studies import batch as batch_app
    from lem.studies.ask import RunOptions

    given = [text for text in arguments if flags.is_override(text)]
    patterns = [text for text in arguments if text not in given]
    if not patterns:
        raise ConfigError("A batch needs config files: give files, a folder, or a pattern such as 'configs/*.yaml'.")
    values = {"model": model, "dataset.sample_size": sample_size, "io.results_dir": results_dir}
    overrides = [
        *flags.choice_overrides({"preset": preset}),
        *flags.dataset_overrides(dataset, prompts),
        *flags.value_overrides(values),
        *given,
    ]
    slurm, overrides = flags.launcher_of(launcher, overrides, config_dir)
    flags.check_per_job(per_job, slurm)
    flags.check_detach(detach, slurm)
    options = RunOptions(
        yes=yes, dry_run=dry_run, force=force, write_tables=not no_aggregate, fresh=fresh,
        allow_command=allow_command, allow_code=allow_code, allow_key=allow_key,
        launcher=slurm, per_job=per_job, detach=detach,
    )  # fmt: skip
    raise typer.Exit(
        batch_app.main(patterns, overrides, options, parallel=parallel, fail_fast=fail_fast, config_dir=config_dir)
    )
