"""The `lem doctor` command, which reports what this machine can measure and, with `--noise`, how precisely."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lem.cli import complete, flags
from lem.cli.base import ConfigDir, ResultsDir, app
from lem.errors import ConfigError
from lem.spec.campaign import Campaign
from lem.spec.schema import leaf, leaves
from lem.spec.share import share

_HELP = {each.path: each.description for each in leaves(Campaign)}
# The default for the smallest difference that campaigns should detect, as a share.
DIFFERENCE = 0.02


@app.command(context_settings={"allow_interspersed_args": True})
def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml | KEY=VALUE",
            help="With --noise: the configuration to measure, and Hydra overrides. Default: the built-in model and "
            "32 prompts.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    results_dir: ResultsDir = None,
    noise: Annotated[
        bool,
        typer.Option(
            "--noise",
            help="Compare one configuration with itself, and report the noise. The options below require this flag.",
        ),
    ] = False,
    model: flags.Model = None,
    backend: Annotated[
        str | None, typer.Option(help=leaf("backend.name").description, autocompletion=complete.backends)
    ] = None,
    preset: flags.Preset = None,
    dataset: flags.Dataset = None,
    prompts: flags.Prompts = None,
    sample_size: Annotated[
        int | None, typer.Option("--sample-size", "-n", help="Number of prompts to draw at random.")
    ] = None,
    cycles: Annotated[
        int | None,
        typer.Option("--cycles", "-c", help="Number of cycles; each measures the configuration twice. Default: 5."),
    ] = None,
    warmup_prompts: flags.WarmupPrompts = None,
    warmup_timeout: flags.WarmupTimeout = None,
    config_gap: flags.ConfigGap = None,
    cycle_gap: flags.CycleGap = None,
    cool_to: flags.CoolTo = None,
    seed: flags.OrderSeed = None,
    primary: Annotated[
        str | None,
        typer.Option(
            help="Examine this metric in full; for other metrics, report only the noise floor. "
            f"Default: {Campaign.primary}."
        ),
    ] = None,
    difference: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Smallest difference that campaigns should detect: a share, such as 2% or 0.02. "
            f"Default: {DIFFERENCE:.0%}.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--campaign-name", help=_HELP["name"] + " Default: noise_ followed by the time.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="NAME|DIR",
            help="Resume an earlier --noise campaign; if it is complete, show its noise again.",
        ),
    ] = None,
    config_dir: ConfigDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Skip confirmation.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the order without running anything.")
    ] = False,
    force: flags.Force = False,
    allow_command: flags.AllowCommand = False,
    allow_code: flags.AllowCode = False,
    allow_key: flags.AllowKey = False,
) -> None:
    """Report what can be measured on this machine, what cannot, and how to fix that.

    The exit code is 0 if experiments can be measured here, 1 if they cannot (no meter, no engine, or no writable
    results directory), and 2 for invalid arguments; with --noise, it is the same as for lem campaign.
    """
    from lem.results.store import default_root
    from lem.studies.ask import RunOptions

    settings = {
        "name": name,
        "sample_size": sample_size,
        "cycles": cycles,
        "warmup_prompts": warmup_prompts,
        "warmup_timeout_s": warmup_timeout,
        "config_gap_s": config_gap,
        "cycle_gap_s": cycle_gap,
        "cool_to_c": cool_to,
        "seed": seed,
        "primary": primary,
    }
    chosen = {key: value for key, value in settings.items() if value is not None}
    of_arms = {
        "--model": model, "--backend": backend, "--preset": preset, "--dataset": dataset, "--prompts": prompts,
        "--config-dir": config_dir,
    }  # fmt: skip
    if not noise:
        of_runs = {
            "--difference": difference, "--resume": resume, "--yes": yes, "--dry-run": dry_run, "--force": force,
            "--allow-command": allow_command, "--allow-code": allow_code, "--allow-key": allow_key,
        }  # fmt: skip
        _refuse(arguments, chosen, {**of_arms, **of_runs})
        from lem.cli.findings import show_checkup

        raise typer.Exit(show_checkup(results_dir or default_root(), as_json=as_json))
    if as_json and dry_run:
        raise ConfigError("--dry-run shows the order as text; leave out --json.")
    options = RunOptions(
        yes=yes, dry_run=dry_run, force=force,
        allow_command=allow_command, allow_code=allow_code, allow_key=allow_key,
    )  # fmt: skip
    wanted = DIFFERENCE if difference is None else _share("--difference", difference)
    from lem.studies import noise as study

    if resume is not None:
        given = [
            *(arguments or []),
            *_flags_of(chosen),
            *(flag for flag, value in of_arms.items() if value is not None),
        ]
        if given:
            raise ConfigError(f"--resume continues a campaign as it was planned; leave out {', '.join(given)}.")
        root = results_dir or default_root()
        raise typer.Exit(study.resume(resume, root, options, difference=wanted, as_json=as_json))
    config_file, overrides = flags.split_arguments(arguments or [])
    words = [
        *flags.choice_overrides({"preset": preset, "backend": backend}),
        *flags.dataset_overrides(dataset, prompts),
        *flags.value_overrides({"model": model, "io.results_dir": results_dir}),
        *overrides,
    ]
    code = study.main(config_file, chosen, words, options, difference=wanted, config_dir=config_dir, as_json=as_json)
    raise typer.Exit(code)


def _flags_of(settings: dict[str, Any]) -> list[str]:
    names = {"name": "campaign-name"}
    return [f"--{names.get(key, key).removesuffix('_s').removesuffix('_c').replace('_', '-')}" for key in settings]


def _refuse(arguments: list[str] | None, settings: dict[str, Any], others: dict[str, Any]) -> None:
    """Raise `ConfigError` if any argument is given that has an effect only with --noise."""
    given = [*(arguments or []), *_flags_of(settings), *(flag for flag, value in others.items() if value)]
    if given:
        raise ConfigError(f"{', '.join(given)}: accepted only together with --noise. Add --noise to measure the noise.")


def _share(flag: str, text: str) -> float:
    try:
        return share(text)
    except ValueError as error:
        raise ConfigError(f'{flag}: must be {error}, not "{text}".') from None
