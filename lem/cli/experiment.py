"""The `lem experiment` command. It turns flags into overrides; the help texts come from the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lem.cli import complete, deprecated, flags
from lem.cli.base import ConfigDir, ResultsDir, app
from lem.errors import ConfigError
from lem.machine.collector import paused_collector
from lem.spec.schema import leaf

Resume = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="Resume an interrupted or failed experiment; the beginning of its id is enough. "
        "With --force, you can also resume an experiment that is marked as running on a host that no longer exists.",
        autocompletion=complete.experiment_ids,
    ),
]


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
    dataset: flags.Dataset = None,
    prompts: flags.Prompts = None,
    sample_size: flags.SampleSize = None,
    split: Annotated[str | None, typer.Option(help=leaf("dataset.split").description)] = None,
    column: Annotated[str | None, typer.Option(help=leaf("dataset.column").description)] = None,
    preset: flags.Preset = None,
    model: flags.Model = None,
    backend: Annotated[
        str | None, typer.Option(help=leaf("backend.name").description, autocompletion=complete.backends)
    ] = None,
    streaming: Annotated[
        bool | None, typer.Option("--streaming", help=leaf("streaming.enabled").description, show_default=False)
    ] = None,
    streaming_warmup: Annotated[int | None, typer.Option(help=leaf("streaming.warmup_requests").description)] = None,
    max_tokens: Annotated[int | None, typer.Option(help=leaf("max_output_tokens").description)] = None,
    seed: Annotated[int | None, typer.Option(help=leaf("seed").description)] = None,
    cycles: Annotated[int | None, typer.Option("--cycles", "-c", help=leaf("cycles").description)] = None,
    no_aggregate: flags.NoAggregate = False,
    fresh: flags.Fresh = False,
    resume: Resume = None,
    results_dir: ResultsDir = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Skip confirmation; an identical unfinished experiment is resumed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the configuration without running it.")
    ] = False,
    force: flags.Force = False,
    allow_command: flags.AllowCommand = False,
    allow_code: flags.AllowCode = False,
    allow_key: flags.AllowKey = False,
    config_dir: ConfigDir = None,
    launcher: flags.Launcher = None,
    per_job: flags.PerJob = None,
    detach: flags.Detach = False,
    multirun: Annotated[
        bool, typer.Option("--multirun", help="Run every combination of comma-separated override values.")
    ] = False,
    batch_size: Annotated[int | None, deprecated.option("batch_size", "--batch-size", "-b")] = None,
    precision: Annotated[str | None, deprecated.option("precision", "--precision")] = None,
    num_processes: Annotated[int | None, deprecated.option("num_processes", "--num-processes")] = None,
    gpu_list: Annotated[str | None, deprecated.option("gpu_list", "--gpu-list")] = None,
    temperature: Annotated[float | None, deprecated.option("temperature", "--temperature")] = None,
    quantization: Annotated[bool | None, deprecated.option("quantization", "--quantization/--no-quantization")] = None,
) -> None:
    """Run an experiment and show its results."""
    with paused_collector():
        from lem.studies import ask
        from lem.studies import experiment as run_app

    config_file, given = flags.split_arguments(arguments or [])
    values = {
        "model": model,
        "dataset.split": split,
        "dataset.column": column,
        "dataset.sample_size": sample_size,
        "max_output_tokens": max_tokens,
        "seed": seed,
        "cycles": cycles,
        "streaming.enabled": streaming,
        "streaming.warmup_requests": streaming_warmup,
        "io.results_dir": results_dir,
    }
    old_flags = {
        "batch_size": batch_size,
        "precision": precision,
        "num_processes": num_processes,
        "gpu_list": gpu_list,
        "temperature": temperature,
        "quantization": quantization,
    }
    overrides = [
        *flags.choice_overrides({"preset": preset, "backend": backend}),
        *flags.dataset_overrides(dataset, prompts),
        *flags.value_overrides(values),
        *deprecated.overrides(old_flags),
        *given,
    ]
    slurm, overrides = flags.launcher_of(launcher, overrides, config_dir or _conf_beside(config_file))
    flags.check_per_job(per_job, slurm, several=multirun)
    flags.check_detach(detach, slurm)
    options = ask.RunOptions(
        yes=yes, dry_run=dry_run, force=force, write_tables=not no_aggregate, fresh=fresh,
        allow_command=allow_command, allow_code=allow_code, allow_key=allow_key,
        launcher=slurm, per_job=per_job, detach=detach,
    )  # fmt: skip
    if resume is not None:
        if slurm:
            raise ConfigError(
                "--resume runs the experiment on this machine, not as a Slurm job. To resume it as a job, repeat the "
                "command that began it."
            )
        _check_alone(config_file, overrides, fresh=fresh, multirun=multirun)
        raise typer.Exit(run_app.resume(resume, results_dir, options))
    if multirun or slurm:
        from lem.studies import sweep

        raise typer.Exit(sweep.main(config_file, overrides, options, config_dir=config_dir))
    raise typer.Exit(run_app.main(config_file, overrides, options, config_dir=config_dir))


def _conf_beside(config_file: Path | None) -> Path | None:
    """Return the default config directory, which is `conf/` beside the config file; None if there is none."""
    folder = config_file.parent / "conf" if config_file else None
    return folder if folder and folder.is_dir() else None


def _check_alone(config_file: Path | None, overrides: list[str], *, fresh: bool, multirun: bool) -> None:
    """Raise `ConfigError` if --resume is given together with an argument that would change the experiment."""
    given = [str(config_file)] if config_file else []
    given += [text for text in overrides if not text.startswith("io.results_dir=")]
    given += ["--fresh"] * fresh + ["--multirun"] * multirun
    if given:
        raise ConfigError(f"--resume keeps the experiment's original configuration; leave out {', '.join(given)}.")
