"""`lem schedule`: checks what is to be measured, writes the table of all starts, and becomes the daemon.

    settings ─> composed, checked ─> table of starts ─> schedule.json, what.json ─> lem.studies.daemon (same process)

Everything that imports heavy libraries or may ask the user a question happens here, before this process is replaced by
the daemon, which works through the table. A schedule that has begun is continued by the same command or by its name,
without checking again what it measures.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

from lem.config.campaign import is_campaign
from lem.config.compose import prepare
from lem.config.overrides import quoted
from lem.config.trust import all_asked, asked_by
from lem.config.yamltext import escaped
from lem.errors import ConfigError, ResultsError
from lem.machine import host
from lem.results import campaign as campaign_results
from lem.results import schedule as files
from lem.results import show
from lem.results.codec import from_json, to_json
from lem.results.files import needs_space, write_atomically
from lem.results.schedule import Config, ScheduleManifest, Start
from lem.results.store import Store
from lem.runner.preflight import preflight
from lem.spec.campaign import LIKE_AN_ID, NAME, NAME_IN_WORDS, is_like_an_id
from lem.spec.experiment import Experiment
from lem.spec.paths import expanded
from lem.spec.schedule import Schedule, length_of
from lem.studies import campaign as campaigns
from lem.studies import daemon
from lem.studies.ask import RunOptions, confirmed, print_warnings, summary_of
from lem.studies.calendar import starts
from lem.studies.checks import RecentPrompts
from lem.studies.consent import Consents
from lem.studies.earlier import earlier_rows, mean_time_s, rows_like
from lem.studies.scheduled_run import What, digest_of


@dataclass(frozen=True)
class Request:
    """What the user asks for on the command line; None means that a value was not given.

    `sample_size` is the number of prompts of an experiment or of every arm. `origin` names the schedule if there is
    neither a config file nor a `name`; it is derived from the flags.
    """

    config_file: Path | None
    overrides: Sequence[str]
    settings: Schedule
    sample_size: int | None = None
    name: str | None = None
    origin: str = "schedule"
    config_dir: Path | None = None


def main(request: Request, options: RunOptions) -> int:
    """Start a schedule, or continue it if it has begun, and return the exit code.

    If the daemon takes over, this process is replaced and the function does not return.

    Raises:
        BadInput: the input is wrong; nothing has been written.
    """
    starts(request.settings, datetime.now(UTC))  # wrong settings are reported first
    name = _name(request)
    what, overrides = _what(request, Consents(options))
    store = Store(_experiments(what)[0].io.results_dir)
    folder = files.folder_of(store, name)
    if files.exists(store, name):
        manifest = files.read_manifest(folder)
        _check_same(manifest, folder, what, request.settings)
        return _go_on(folder, manifest, options)
    if campaign_results.folder_of(store, name).is_dir():
        raise ConfigError(f"There is already a campaign called '{name}' in {store.root}. Choose another --name.")
    config, each_s = _checked(what, overrides, request, options, store)
    make = partial(_manifest, name, request.settings, config)
    manifest = make(datetime.now(UTC))
    print_warnings(*_about_time(manifest, each_s))
    if options.dry_run:
        _preview(manifest, each_s)
        return 0
    question = f"Start schedule '{name}': {_words(manifest)}?"
    if not (options.yes or confirmed(question)):
        return 0
    with files.held(folder), needs_space(folder):
        if files.exists(store, name):
            raise ResultsError(f"Another process has just started schedule '{name}'. Choose another --name.")
        write_atomically(folder / files.WHAT, to_json(what))
        files.write_manifest(folder, make(datetime.now(UTC)))  # answering the question may have taken a while
    return _become_daemon(folder)


def resume(name: str, results_dir: Path, options: RunOptions) -> int:
    """Continue a schedule, given its name, and return the exit code.

    If the daemon takes over, this process is replaced and the function does not return.

    Raises:
        ResultsError: there is no such schedule, or its files are damaged.
    """
    store = Store(results_dir)
    manifest = files.load_schedule(store, name)
    folder = files.folder_of(store, manifest.name)
    what = _kept(folder)
    # Someone else may have written the files, so nothing in them counts as coming from the command line.
    for experiment in _experiments(what):
        Consents(options).require(all_asked(experiment))
    return _go_on(folder, manifest, options)


def _go_on(folder: Path, manifest: ScheduleManifest, options: RunOptions) -> int:
    left = [start for start in manifest.starts if start.status in ("planned", *files.CUT)]
    if options.dry_run:
        _preview(manifest, None)
        return 0
    if not left:
        print(
            f"Schedule {manifest.name} is over: {manifest.counts()}. {files.results_hint(folder)}\n"
            "For a new schedule with the same settings, choose another --name."
        )
        return daemon.exit_code(manifest)
    return _become_daemon(folder)


def _become_daemon(folder: Path) -> int:
    """Replace this process with the daemon, which keeps the terminal and the process id but needs little memory."""
    sys.stdout.flush()
    sys.stderr.flush()
    # The daemon fetches the signals that arrive while its interpreter starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, daemon.STOPPING)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "lem.studies.daemon", str(folder)])


# ------------------------------------------------------------------ what to measure
def _what(request: Request, consents: Consents) -> tuple[What, list[str]]:
    """Return what each run measures, with the results directory as an absolute path, and the overrides in effect."""
    file, size = request.config_file, request.sample_size
    overrides = list(request.overrides)
    if request.settings.carbon_trace is not None:
        overrides = [f"energy.carbon_trace={quoted(escaped(request.settings.carbon_trace))}", *overrides]
    if file is not None and is_campaign(expanded(file)):
        given = {} if size is None else {"sample_size": size}
        found, arms, of_all = campaigns.planned_arms([str(file)], given, overrides, request.config_dir, consents)
        return What(None, found, tuple(replace(arm, experiment=_absolute(arm.experiment)) for arm in arms)), of_all
    if size is not None:
        overrides.insert(0, f"dataset.sample_size={size}")
    composition = prepare(file, overrides, config_dir=request.config_dir)
    experiment = composition.experiment()
    consents.require(asked_by(experiment, composition.sources))
    return What(_absolute(experiment)), overrides


def _absolute(experiment: Experiment) -> Experiment:
    return replace(
        experiment, io=replace(experiment.io, results_dir=str(expanded(experiment.io.results_dir).absolute()))
    )


def _experiments(what: What) -> list[Experiment]:
    return [what.experiment] if what.experiment else [arm.experiment for arm in what.arms]


def _checked(
    what: What, overrides: Sequence[str], request: Request, options: RunOptions, store: Store
) -> tuple[Config, float | None]:
    """Check what each run measures; return its `Config`, and the time that a run takes according to earlier rows."""
    rows = earlier_rows(store)
    if what.experiment is not None:
        ready = preflight(what.experiment, host.look(), force=options.force)
        print_warnings(*ready.warnings)
        words, digest = summary_of(ready), ready.prompts.sha256
        each_s = mean_time_s(what.experiment, rows_like(what.experiment, rows))
    else:
        assert what.campaign is not None
        planned = campaigns.plan(what.campaign, what.arms, overrides, options, RecentPrompts())
        words = f"campaign of {len(what.arms)} arms, {len(planned.places)} cells"
        digest = digest_of(planned.definition.prompts_sha256)
        arms = [arm.experiment for arm in what.arms]
        each_s = _time_of_campaign_s(planned, [mean_time_s(arm, rows_like(arm, rows)) for arm in arms])
    config = Config(
        kind="experiment" if what.experiment else "campaign",
        words=words,
        config_file=str(request.config_file) if request.config_file else None,
        overrides=tuple(overrides),
        prompts_sha256=digest,
        forced=options.force,
        working_dir=os.getcwd(),
    )
    return config, each_s


def _time_of_campaign_s(planned: campaigns.Planned, of_arms: Sequence[float | None]) -> float | None:
    total = 0.0
    for place in planned.places:
        each_s = of_arms[place.arm]
        if each_s is None:
            return None
        total += each_s
    settings = planned.definition.campaign
    return total + sum(campaigns.pause_s(settings, before, after) for before, after in pairwise(planned.places))


# ------------------------------------------------------------------ the schedule
def _name(request: Request) -> str:
    """Return the schedule's name; raises `ConfigError` if it cannot be used.

    By default, it is derived from the config file's name or, without a config file, from `origin`.
    """
    if request.name is None:
        origin = request.config_file.stem if request.config_file else request.origin
        found = re.sub(r"[^A-Za-z0-9._-]+", "-", origin).lstrip("._-")[:100] or "schedule"
    else:
        found = request.name
    if not re.fullmatch(NAME, found):
        raise ConfigError(f"--name: '{found}' cannot be a directory name; use {NAME_IN_WORDS}.")
    if is_like_an_id(found):
        raise ConfigError(f"--name: '{found}' {LIKE_AN_ID}.")
    return found


def _manifest(name: str, settings: Schedule, config: Config, now: datetime) -> ScheduleManifest:
    table = starts(settings, now)
    zone = table[0].tzinfo
    begin = now.replace(microsecond=0)
    end = datetime.fromtimestamp(begin.timestamp() + settings.duration_s, zone)
    return ScheduleManifest(
        name=name,
        id=f"schedule_{begin.astimezone(zone):%Y%m%d_%H%M%S}",
        created_at=begin.astimezone(zone).isoformat(),
        ends_at=end.isoformat(timespec="seconds"),
        time_zone=settings.time_zone,
        settings=settings,
        config=config,
        starts=[Start(number, start.isoformat()) for number, start in enumerate(table, start=1)],
    )


def _kept(folder: Path) -> What:
    file = folder / files.WHAT
    try:
        return from_json(What, file.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResultsError(f"{file} cannot be used ({reason}). Restore the file, or use another --name.") from None


def _check_same(manifest: ScheduleManifest, folder: Path, what: What, settings: Schedule) -> None:
    if manifest.settings != settings or _kept(folder) != what:
        raise ConfigError(
            f"A schedule '{manifest.name}' with other settings already exists. Choose another --name, or continue "
            f"the existing one: {files.resume_command(folder)}"
        )


# ------------------------------------------------------------------ words
def _words(manifest: ScheduleManifest) -> str:
    count, end = len(manifest.starts), datetime.fromisoformat(manifest.ends_at)
    runs = "1 run" if count == 1 else f"{count} runs"
    return f"{runs} until {end:%a %Y-%m-%d %H:%M} ({manifest.time_zone}), each {manifest.config.words}"


def _about_time(manifest: ScheduleManifest, each_s: float | None) -> Iterable[str]:
    """Yield a warning if a run is expected to take longer than the shortest time between two starts."""
    times = [files.due(start) for start in manifest.starts]
    shortest_s = min(((after - before).total_seconds() for before, after in pairwise(times)), default=None)
    if each_s is not None and shortest_s is not None and each_s > shortest_s:
        yield (
            f"Judging by earlier runs, a run takes about {length_of(each_s)}, but two of the starts are only "
            f"{length_of(shortest_s)} apart; starts that come while a run is still going are skipped."
        )


def _preview(manifest: ScheduleManifest, each_s: float | None) -> None:
    """Print the table of starts with the outcomes so far, then the expected time of a run if it is known."""
    show.say(f"Schedule {manifest.name}: {_words(manifest)}")
    width = len(str(len(manifest.starts)))
    for start in manifest.starts:
        status = "" if start.status == "planned" else f"  {start.status} {start.experiment_id or start.campaign or ''}"
        show.say(f"{start.number:{width}}  {files.due(start):%a %Y-%m-%d %H:%M:%S %z}{status}".rstrip())
    if each_s is not None:
        total_s = each_s * len(manifest.starts)
        show.say(f"Expected from earlier runs: {length_of(each_s)} for each run, {length_of(total_s)} in all.")
    elif all(start.status == "planned" for start in manifest.starts):
        show.say("No earlier run of this configuration: the time that a run takes is unknown.")
    show.say("# dry run: nothing was measured")
