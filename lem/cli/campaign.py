"""The `lem campaign` command, which measures several configurations in turn and compares them."""

from __future__ import annotations

from typing import Annotated

import typer

from lem.cli import flags
from lem.cli.base import ConfigDir, ResultsDir, app
from lem.errors import ConfigError
from lem.spec.campaign import Campaign
from lem.spec.schema import leaves

_HELP = {each.path: each.description for each in leaves(Campaign)}


@app.command(context_settings={"allow_interspersed_args": True})
def campaign(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG_PATH… | KEY=VALUE",
            help="The arms' config files, folders or quoted patterns, or a campaign file; also Hydra overrides for all "
            "arms.",
            show_default=False,
        ),
    ] = None,
    name: flags.CampaignName = None,
    dataset: flags.Dataset = None,
    prompts: flags.Prompts = None,
    sample_size: flags.SampleSize = None,
    cycles: Annotated[
        int | None,
        typer.Option(
            "--cycles",
            "-c",
            help="Number of times each arm is measured; with --until-ci, the minimum. Default: 3 (for latin, rounded "
            "up to complete Latin squares); with --until-ci, 5.",
        ),
    ] = None,
    until_ci: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Stop as soon as every arm's interval is narrow enough: its half-width, divided by the arm's ratio to "
            "the baseline, is at most this share, such as 2% or 0.02.",
        ),
    ] = None,
    max_cycles: Annotated[
        int | None,
        typer.Option(
            help="With --until-ci: maximum number of cycles. Default: 30, or 100 if --cycles is 30 or more; for latin, "
            "more if the squares need it."
        ),
    ] = None,
    structure: Annotated[
        str | None,
        typer.Option(help=_HELP["structure"].rstrip(".") + ": shuffled (default), latin, interleaved or grouped."),
    ] = None,
    warmup_prompts: flags.WarmupPrompts = None,
    warmup_timeout: flags.WarmupTimeout = None,
    config_gap: flags.ConfigGap = None,
    cycle_gap: flags.CycleGap = None,
    cool_to: flags.CoolTo = None,
    seed: flags.OrderSeed = None,
    resample_prompts: Annotated[bool | None, typer.Option("--resample-prompts", help=_HELP["resample_prompts"])] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="The arm that the others are compared with. Default: the first."),
    ] = None,
    primary: Annotated[str | None, typer.Option(help=f"{_HELP['primary']} Default: {Campaign.primary}.")] = None,
    margin: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Equivalence margin, such as 2% or 0.02: ratios within 1 ± this margin count as equivalent.",
        ),
    ] = None,
    retries: Annotated[int | None, typer.Option(help=_HELP["retries"] + f" Default: {Campaign.retries}.")] = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="NAME|DIR", help="Resume the campaign with this name or directory."),
    ] = None,
    launcher: flags.Launcher = None,
    per_job: Annotated[int | None, typer.Option(hidden=True)] = None,
    one_job: Annotated[
        bool,
        typer.Option(
            "--one-job",
            help="With --launcher slurm: run all cycles in a single job. Default: one job for each cycle or, with "
            "grouped, for each arm.",
        ),
    ] = False,
    detach: flags.Detach = False,
    across_nodes: Annotated[bool | None, typer.Option("--across-nodes", help=_HELP["across_nodes"])] = None,
    config_dir: ConfigDir = None,
    results_dir: ResultsDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all arms and show the order without running anything.")
    ] = False,
    force: flags.Force = False,
    allow_command: flags.AllowCommand = False,
    allow_code: flags.AllowCode = False,
    allow_key: flags.AllowKey = False,
) -> None:
    """Measure several configurations in turn and compare them."""
    from lem.results.store import default_root
    from lem.studies import campaign as study
    from lem.studies.ask import RunOptions

    slurm, arguments = flags.launcher_of(launcher, arguments or [], config_dir)
    if one_job and slurm is None:
        raise ConfigError("--one-job needs --launcher slurm.")
    flags.check_detach(detach, slurm)
    if per_job is not None:
        raise ConfigError(
            "--per-job does not apply to campaigns: to compare experiments on the same node, each job runs a whole "
            "cycle (or, with structure=grouped, a whole arm). Use --one-job to run all cycles in a single job."
        )
    options = RunOptions(
        yes=yes, dry_run=dry_run, force=force,
        allow_command=allow_command, allow_code=allow_code, allow_key=allow_key,
        launcher=slurm, one_job=one_job, detach=detach,
    )  # fmt: skip
    settings = {
        "name": name,
        "sample_size": sample_size,
        "cycles": cycles,
        "until_ci": until_ci,
        "max_cycles": max_cycles,
        "structure": structure,
        "warmup_prompts": warmup_prompts,
        "warmup_timeout_s": warmup_timeout,
        "config_gap_s": config_gap,
        "cycle_gap_s": cycle_gap,
        "cool_to_c": cool_to,
        "seed": seed,
        "resample_prompts": resample_prompts,
        "baseline": baseline[0] if baseline else None,
        "primary": primary,
        "margin": margin,
        "across_nodes": across_nodes,
        "retries": retries,
    }
    chosen = {key: value for key, value in settings.items() if value is not None}
    if resume is not None:
        if arguments or chosen or dataset or prompts or (config_dir and not slurm):
            raise ConfigError("--resume continues a campaign as it was planned; leave out config files and settings.")
        raise typer.Exit(study.resume(resume, results_dir or default_root(), options))
    if baseline and len(baseline) > 1:
        raise ConfigError(f"--baseline takes one arm, not {len(baseline)} ({', '.join(baseline)}).")
    given = [text for text in arguments or [] if flags.is_override(text)]
    patterns = [text for text in arguments or [] if text not in given]
    if not patterns:
        raise ConfigError("A campaign needs at least two config files, or a campaign file.")
    overrides = [
        *flags.dataset_overrides(dataset, prompts),
        *flags.value_overrides({"io.results_dir": results_dir}),
        *given,
    ]
    raise typer.Exit(study.main(patterns, chosen, overrides, options, config_dir=config_dir))
