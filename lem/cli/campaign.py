"""`lem campaign`: several configurations measured in turn and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lem.cli import flags
from lem.cli.base import ConfigDir, ResultsDir, app
from lem.errors import ConfigError


@app.command(context_settings={"allow_interspersed_args": True})
def campaign(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG_PATH… | KEY=VALUE",
            help="Config files, folders or quoted patterns, one arm for each file, and Hydra overrides for all arms.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--campaign-name", help="Name of the campaign, and of its directory in the results.")
    ] = None,
    dataset: flags.Dataset = None,
    prompts: flags.Prompts = None,
    sample_size: flags.SampleSize = None,
    cycles: Annotated[int, typer.Option("--cycles", "-c", help="How many times each arm is measured.")] = 3,
    structure: Annotated[
        str, typer.Option(help="Order of the cells: shuffled, latin, interleaved or grouped.")
    ] = "shuffled",
    warmup_prompts: Annotated[
        int | None, typer.Option(help="Warm-up of each cell, outside the window: at least so many prompts.")
    ] = None,
    warmup_timeout: Annotated[
        float | None, typer.Option(help="Longest warm-up of a cell in seconds, if it runs until latencies are steady.")
    ] = None,
    config_gap: Annotated[float, typer.Option(help="Pause between two cells in seconds.")] = 0.0,
    cycle_gap: Annotated[
        float | None, typer.Option(help="Pause between two cycles in seconds (default: --config-gap).")
    ] = None,
    cool_to: Annotated[
        float | None, typer.Option(help="Wait before each cell until the GPUs are no warmer than this, in °C.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 42,
    resample_prompts: Annotated[
        bool, typer.Option("--resample-prompts", help="Draw new prompts in each cycle, the same for all arms.")
    ] = False,
    baseline: Annotated[
        str | None, typer.Option(help="Arm that the others are compared with (default: the first).")
    ] = None,
    primary: Annotated[
        str, typer.Option(help="Measure that decides, a column of the experiments table.")
    ] = "energy_per_output_token_j",
    margin: Annotated[
        float | None, typer.Option(help="Ratios within 1 ± this count as the same, such as 0.02.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed cell is tried again.")] = 0,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="NAME|DIR", help="Continue a campaign by its name or directory.")
    ] = None,
    config_dir: ConfigDir = None,
    results_dir: ResultsDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, show the order, run nothing.")] = False,
    force: flags.Force = False,
) -> None:
    """Measure several configurations in turn and say how they compare."""
    from lem.results.store import default_root
    from lem.spec.campaign import Campaign
    from lem.studies import campaign as study
    from lem.studies.ask import RunOptions

    options = RunOptions(yes=yes, dry_run=dry_run, force=force)
    if resume is not None:
        if arguments or name:
            raise ConfigError("--resume continues a campaign as it was planned; give no config files or name with it.")
        raise typer.Exit(study.resume(resume, results_dir or default_root(), options))
    given = [text for text in arguments or [] if flags.is_override(text)]
    patterns = [text for text in arguments or [] if text not in given]
    if not patterns:
        raise ConfigError("A campaign needs config files: name at least two.")
    if name is None:
        raise ConfigError("A campaign of several config files needs a name: give --campaign-name.")
    values: dict[str, int | float | str | Path | None] = {
        "dataset.sample_size": sample_size,
        "io.results_dir": results_dir,
        "warmup.prompts": warmup_prompts,
        "warmup.max_s": warmup_timeout,
        "cooldown.to_c": cool_to,
    }
    overrides = [*flags.dataset_overrides(dataset, prompts), *flags.value_overrides(values), *given]
    wanted = Campaign(
        name=name,
        cycles=cycles,
        structure=structure,  # type: ignore[arg-type] # checked with the other settings
        seed=seed,
        config_gap_s=config_gap,
        cycle_gap_s=cycle_gap,
        baseline=baseline or "",
        primary=primary,
        margin=margin,
        retries=retries,
        resample_prompts=resample_prompts,
    )
    raise typer.Exit(study.main(patterns, wanted, overrides, options, config_dir=config_dir))
