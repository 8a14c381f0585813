"""The `lem schedule` command, which runs an experiment or a campaign repeatedly at planned times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lem.cli import complete, flags
from lem.cli.base import ConfigDir, ResultsDir, app
from lem.errors import ConfigError
from lem.spec.paths import expanded
from lem.spec.schedule import DEFAULT_DURATION_S, Schedule, days_of, seconds_of, times_of
from lem.spec.schema import leaves

_HELP = {each.path: each.description for each in leaves(Schedule)}


@app.command(context_settings={"allow_interspersed_args": True})
def schedule(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml | KEY=VALUE",
            help="A config file or a campaign file, and Hydra overrides such as batching.batch_size=4.",
            show_default=False,
        ),
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option("--interval", "-i", metavar="TIME", help=_HELP["interval_s"] + " Required unless --at is given."),
    ] = None,
    at: Annotated[str | None, typer.Option(metavar="HH:MM,…", help=_HELP["at"])] = None,
    days: Annotated[str | None, typer.Option(metavar="DAYS", help=_HELP["days"])] = None,
    duration: Annotated[
        str | None,
        typer.Option(
            "--duration",
            "-d",
            metavar="TIME",
            help=f"{_HELP['duration_s']} Default: {DEFAULT_DURATION_S / 3600:g}h.",
        ),
    ] = None,
    time_zone: Annotated[
        str | None, typer.Option(metavar="NAME", help=_HELP["time_zone"] + " Default: this machine's.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="Dataset: a name, a hub id, or a local file or directory; lem datasets lists the names.",
            autocompletion=complete.datasets,
        ),
    ] = None,
    prompts: flags.Prompts = None,
    sample_size: flags.SampleSize = None,
    preset: flags.Preset = None,
    model: flags.Model = None,
    carbon_trace: Annotated[str | None, typer.Option(metavar="FILE.csv", help=_HELP["carbon_trace"])] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the schedule and of its directory in the results directory. Default: the name of the config "
            "file; without one, the names of the preset and the model, or else schedule.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Continue a schedule until its original end. Repeating the command that began it does the same.",
            autocompletion=complete.schedules,
        ),
    ] = None,
    config_dir: ConfigDir = None,
    results_dir: ResultsDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the table of starts without running anything.")
    ] = False,
    force: flags.Force = False,
    allow_command: flags.AllowCommand = False,
    allow_code: flags.AllowCode = False,
    allow_key: flags.AllowKey = False,
) -> None:
    """Run an experiment or a campaign at planned times, to study how costs vary over time."""
    from lem.results.store import default_root
    from lem.studies import schedule as study
    from lem.studies.ask import RunOptions
    from lem.studies.calendar import machine_zone

    options = RunOptions(
        yes=yes, dry_run=dry_run, force=force, allow_command=allow_command, allow_code=allow_code, allow_key=allow_key
    )
    timing = {
        "--interval": interval, "--at": at, "--days": days, "--duration": duration, "--time-zone": time_zone,
        "--carbon-trace": carbon_trace,
    }  # fmt: skip
    what = {
        "--dataset": dataset, "--prompts": prompts, "--sample-size": sample_size, "--preset": preset, "--model": model,
        "--name": name, "--config-dir": config_dir, "--force": force or None,
    }  # fmt: skip
    if resume is not None:
        given = [*(arguments or []), *(flag for flag, value in {**timing, **what}.items() if value is not None)]
        if given:
            raise ConfigError(f"--resume continues a schedule as it was planned; leave out {', '.join(given)}.")
        raise typer.Exit(study.resume(resume, results_dir or default_root(), options))
    settings = Schedule(
        interval_s=None if interval is None else seconds_of(interval, "--interval"),
        at=() if at is None else times_of(at),
        days=() if days is None else days_of(days),
        duration_s=DEFAULT_DURATION_S if duration is None else seconds_of(duration, "--duration"),
        time_zone=time_zone or machine_zone(),
        carbon_trace=None if carbon_trace is None else _existing(carbon_trace),
    )
    config_file, given = flags.split_arguments(arguments or [])
    overrides = [
        *flags.choice_overrides({"preset": preset}),
        *flags.dataset_overrides(dataset, prompts),
        *flags.value_overrides({"model": model, "io.results_dir": results_dir}),
        *given,
    ]
    origin = "-".join(filter(None, (preset, Path(model).name if model else None))) or "schedule"
    request = study.Request(config_file, overrides, settings, sample_size, name, origin, config_dir)
    raise typer.Exit(study.main(request, options))


def _existing(text: str) -> str:
    """Return the absolute path of a file with carbon intensities, so that every run can find the file.

    Raises:
        ConfigError: there is no such file.
    """
    file = expanded(text).absolute()
    if not file.is_file():
        raise ConfigError(f"--carbon-trace: there is no file {text}. Give a CSV file with times and g/kWh.")
    return str(file)
