"""`lem campaign`: measures several configurations in turn, cycle by cycle, and compares the results.

    config files ─> arms, checked ─> order ─> cells, each a fresh process, with pauses ─> manifest ─> answer

A campaign lives in its own directory and can be resumed from it, keeping completed cells. The statistics are
in `lem.results.campaign`; this module knows when a cell runs, not how it is measured.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

from lem.config.campaign import (
    campaign_arms,
    check_alone,
    compose,
    in_whole_squares,
    is_campaign,
    keys_given,
    place_of,
    settings_of_arms,
)
from lem.config.compose import compose_quickly, prepare
from lem.config.overrides import has_several_values, is_hydra_setting
from lem.config.trust import all_asked, asked_by
from lem.errors import BadInput, ConfigError, LemError, ResultsError, did_you_mean
from lem.machine import host, slurm
from lem.results import campaign as results
from lem.results import show
from lem.results.aggregate import read
from lem.results.campaign import Answer, Arm, Definition, Machine
from lem.results.campaign_show import show_answer
from lem.results.codec import config_sha256, to_json, to_plain
from lem.results.compare import expected_degrees_of_freedom
from lem.results.directory import ExperimentDir
from lem.results.files import NO_SPACE, DiskFull, needs_space, write_atomically
from lem.results.jobs import Ledger
from lem.results.merging import total
from lem.results.plan import FINISHED
from lem.results.statistics import summarize
from lem.results.stopping import ANALYSES, cycles_at_most, rule_of
from lem.results.store import Store, results_flag
from lem.runner.preflight import Ready, preflight, wants_gpu
from lem.runner.progress import Event, Report
from lem.spec.campaign import (
    LIKE_AN_ID,
    NAME,
    NAME_IN_WORDS,
    ArmSource,
    Campaign,
    CampaignCell,
    is_like_an_id,
    square_size,
)
from lem.spec.conflicts import unmeasured
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Experiment
from lem.spec.paths import expanded
from lem.spec.schedule import ScheduleRun
from lem.spec.slurm import SlurmOptions
from lem.studies import adaptive
from lem.studies.ask import RunOptions, catch_up_rows, confirmed, print_warnings, summary_of
from lem.studies.checks import RecentPrompts
from lem.studies.consent import Consents
from lem.studies.continuing import Submitted, follow
from lem.studies.display import StudyDisplay
from lem.studies.earlier import earlier_rows, mean_energy_j, mean_time_s, rows_like
from lem.studies.manifest import Cell, CellState, Manifest, read_manifest, row_of
from lem.studies.node_types import kept_on_one_type
from lem.studies.orders import Place, order
from lem.studies.slurm import SlurmRunner, gpus_of_job, preflight_for_job
from lem.studies.study import Left, OneByOne, Runner, forget_jobs, run_cells

# An arm is given up after this many failures in a row.
GIVE_UP = 3
NO_COOLING = (
    "no arm runs on a GPU, so there is no temperature to wait for. Leave cool_to_c out, or set a pause (config_gap_s)."
)
NOTHING_YET = "Free some space, then run the same command again."


@dataclass(frozen=True)
class Planned:
    """A checked campaign: its definition, its cells in order, and the experiment of each cell."""

    definition: Definition
    places: Sequence[Place]
    experiments: Sequence[Experiment]
    words: Sequence[str]
    results_dir: Path
    # The run of a schedule to which the campaign belongs.
    schedule: ScheduleRun | None = None

    @property
    def folder(self) -> Path:
        """The campaign's directory."""
        return results.folder_of(Store(self.results_dir), self.definition.name)


def _show(found: Answer, manifest: Manifest, folder: Path) -> None:
    show_answer(found)
    for failure in failures(manifest):
        show.say(failure)
    print(f"\nCampaign: {folder}")


@dataclass(frozen=True)
class Presentation:
    """How a command presents a campaign: the command that resumes it, and the output at its end."""

    command: str = "lem campaign"
    show: Callable[[Answer, Manifest, Path], None] = _show


def main(
    patterns: Sequence[str],
    given: Mapping[str, Any],
    overrides: Sequence[str],
    options: RunOptions,
    *,
    config_dir: Path | None = None,
    presentation: Presentation = Presentation(),
) -> int:
    """Measure a campaign's arms; return 0, or 1 if a cell has no result or an arm cannot be compared.

    Args:
        patterns: a campaign file, or the config files of the arms.
        given: the campaign's settings from the command line, by key.
        overrides: Hydra overrides from the command line, for all arms.
        options: how the command runs experiments.
        config_dir: a directory with the user's own options.
        presentation: how the campaign is presented.

    Raises:
        BadInput: raised before anything runs, listing all problems.
        Interrupted: finished requests are kept, and the message names the command that resumes the campaign.
    """
    campaign, arms, of_all = planned_arms(patterns, given, overrides, config_dir, Consents(options))
    return measure(campaign, arms, of_all, options, presentation)


def measure(
    campaign: Campaign,
    arms: Sequence[Arm],
    overrides: Sequence[str],
    options: RunOptions,
    presentation: Presentation = Presentation(),
) -> int:
    """Check composed arms, measure them, and present the answer; return 0 or 1 as `main` does.

    Args:
        campaign: the campaign's settings; its name has been checked.
        arms: the configurations to compare; the user has consented to everything that they run.
        overrides: the overrides of all arms, to be stored with the campaign.
        options: how the command runs experiments.
        presentation: how the campaign is presented.

    Raises:
        BadInput: raised before anything runs, listing all problems.
        Interrupted: finished requests are kept, and the message names the command that resumes the campaign.
    """
    if campaign.across_nodes:
        check_across_nodes(campaign, options)
    prompts = RecentPrompts()
    return measure_planned(plan(campaign, arms, overrides, options, prompts), options, prompts, presentation)


def measure_planned(
    planned: Planned, options: RunOptions, prompts: RecentPrompts, presentation: Presentation = Presentation()
) -> int:
    """Measure the arms of a checked campaign as `measure` does; `prompts` loads the prompts."""
    again = _resume_command(planned.definition.name, Store(planned.results_dir), presentation)
    return _measure(planned, options, prompts, presentation, again)


def planned_arms(
    patterns: Sequence[str],
    given: Mapping[str, Any],
    overrides: Sequence[str],
    config_dir: Path | None,
    consents: Consents,
) -> tuple[Campaign, list[Arm], list[str]]:
    """Return a campaign's settings, its arms, and overrides for all arms; raises `ConfigError` with all problems."""
    files = [expanded(pattern) for pattern in patterns]
    campaigns = [file for file in files if file.is_file() and is_campaign(file)]
    if campaigns and len(files) > 1:
        raise ConfigError(f"{campaigns[0]} is a campaign file, which lists its own arms; leave out the other files.")
    if not campaigns and len(files) == 1 and files[0].is_file():
        check_alone(files[0])
    own = campaigns[0] if campaigns else None
    campaign = compose(own, given)
    named = campaign if own else replace(campaign, arms=tuple(patterns))
    place = _place("arms", own, given)
    try:
        found = list(campaign_arms(named))
    except ConfigError as error:
        raise ConfigError(*(f"{place}arms: {problem}" if place else problem for problem in error.problems)) from None
    if own and campaign.name is None:
        campaign = replace(campaign, name=own.stem)
    if campaign.name is None:
        raise ConfigError("A campaign without a campaign file needs a name: use --campaign-name.")
    check(campaign)
    of_all = [*settings_of_arms(campaign), *campaign.overrides]
    arms = _arms(found, of_all, overrides, config_dir, consents, place)
    return fitted(campaign, arms, given, own), arms, [*of_all, *overrides]


def fitted(campaign: Campaign, arms: Sequence[Arm], given: Mapping[str, Any], own: Path | None = None) -> Campaign:
    """Return the final settings of a campaign whose arms are known.

    Settings that depend on the arms are filled in, and settings that the arms' experiments contain are removed.

    Args:
        campaign: the settings.
        arms: the arms; their experiments already contain the settings that apply to every arm.
        given: the settings that do not come from a file, by key.
        own: the campaign file, if there is one.

    Raises:
        ConfigError: no arm has the baseline's name, or `cool_to_c` is set although no arm uses a GPU.
    """
    baseline = baseline_of(campaign.baseline, [arm.name for arm in arms], _place("baseline", own, given))
    check_cooling(campaign, [arm.experiment for arm in arms], _place("cool_to_c", own, given))
    return _without_arms(in_whole_squares(replace(campaign, baseline=baseline), len(arms), keys_given(own, given)))


def _place(key: str, file: Path | None, given: Mapping[str, Any]) -> str:
    location = place_of(key, file, given)
    return f"{location}: " if location else ""


def _without_arms(campaign: Campaign) -> Campaign:
    """Return a campaign's settings without those already contained in the experiments of its arms."""
    return replace(
        campaign, arms=(), overrides=(), dataset=None, sample_size=None, warmup_prompts=None, warmup_timeout_s=None,
        cool_to_c=None,
    )  # fmt: skip


def resume(
    name: str,
    results_dir: Path,
    options: RunOptions,
    presentation: Presentation = Presentation(),
) -> int:
    """Resume a campaign from its files, given its name or its directory; return 0 or 1 as `main` does.

    Raises:
        ResultsError: the campaign does not exist.
        ConfigError: an arm cannot run, or the machine, the software or the prompts have changed and `options.force` is
            not set.
    """
    folder = results.folder_named(name, Store(results_dir))
    kept = results.read_definition(folder)
    root = results.store_of(folder).root
    arms = [replace(arm, experiment=_moved(arm.experiment, root)) for arm in kept.arms]
    for arm in arms:
        Consents(options).require(all_asked(arm.experiment))
    # The command is built before the working directory changes, because the user will type it in the current one.
    again = _resume_command(kept.name, Store(root), presentation)
    prompts = RecentPrompts()
    with _where_it_began(kept):
        planned = plan(kept.campaign, arms, kept.overrides, replace(options, force=True), prompts)
        return _measure(planned, options, prompts, presentation, again)


def _resume_command(name: str, store: Store, presentation: Presentation) -> str:
    return f"{presentation.command} --resume {name}{results_flag(store)}"


@contextmanager
def _where_it_began(kept: Definition) -> Iterator[None]:
    """Within the block, make the directory in which a campaign was started the working directory.

    Relative paths in the campaign's arms refer to that directory.
    """
    before = os.getcwd()
    try:
        os.chdir(kept.working_dir or before)
    except OSError as error:
        print_warnings(
            f"The directory in which campaign '{kept.name}' was started cannot be used ({kept.working_dir}: "
            f"{error.strerror}); relative paths in its arms are looked up in the current directory."
        )
    try:
        yield
    finally:
        os.chdir(before)


# ------------------------------------------------------------------ the request
def check(campaign: Campaign) -> None:
    """Check a campaign's name; raises `ConfigError` if it cannot be a directory name or looks like an id."""
    if not re.fullmatch(NAME, campaign.name or ""):
        raise ConfigError(f"name: '{campaign.name}' cannot be a directory name; use {NAME_IN_WORDS}.")
    if is_like_an_id(campaign.name or ""):
        raise ConfigError(f"name: '{campaign.name}' {LIKE_AN_ID}.")


def _arms(
    found: Sequence[tuple[ArmSource, Path]],
    of_all: Sequence[str],
    overrides: Sequence[str],
    config_dir: Path | None,
    consents: Consents,
    place: str,
) -> list[Arm]:
    """Return the arms, one for each file; a file that is given twice becomes two arms.

    Raises:
        ConfigError: a file has problems, or there are fewer than two arms.
    """
    if len(found) < 2:
        fact = f"campaign compares at least two configurations, not {len(found)}."
        if place:
            remedy = "List several config files, or the same file twice to measure the noise."
            raise ConfigError(f"{place}arms: a {fact} {remedy}")
        raise ConfigError(
            f"A {fact} Give several config files, the same file twice to measure the noise, or a campaign file, which "
            "lists its arms."
        )
    problems: list[str] = []
    arms: list[Arm] = []
    for name, (source, file) in zip(names_of(found, place), found, strict=True):
        everything = [*of_all, *source.overrides, *overrides]
        # If an arm has its own overrides, the file and line of a problem do not always show which arm is wrong.
        whose = f"{place}{name}: " if source.overrides else ""
        try:
            _check_single(everything)
            # A campaign file's overrides are left out, because the user did not type them on the command line.
            own = prepare(file, overrides, config_dir=config_dir).sources
            # Hydra composes one arm, because only Hydra checks overrides of its own settings.
            if arms and not any(map(is_hydra_setting, source.overrides)):
                experiment, _ = compose_quickly(file, everything, config_dir)
            else:
                experiment = prepare(file, everything, config_dir=config_dir).experiment()
            consents.require(asked_by(experiment, own))
            arms.append(Arm(name, experiment, str(file)))
        except BadInput as error:
            problems += [problem if str(file) in problem else whose + problem for problem in error.problems]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return arms


def _check_single(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` if an override has several values."""
    if several := next(filter(has_several_values, overrides), None):
        raise ConfigError(
            f"{several}: an arm has one value for each key. For several values, list the file several times in a "
            "campaign file, with different overrides; for a list, write [a,b]."
        )


def names_of(found: Sequence[tuple[ArmSource, Path]], place: str = "") -> list[str]:
    """Return a name for each arm: the given name or, by default, the shortest unique ending of its file's path.

    If a file is given several times, the names end with a number. Raises `ConfigError` if a given name is also the name
    of another arm, or if a name cannot be printed.
    """
    files = [file for _, file in found]
    whole = [file.with_suffix("").parts for file in (file.absolute() for file in files)]
    names = []
    for parts in whole:
        others = [other for other in whole if other != parts]
        length = next(
            (n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts)
        )
        names.append("/".join(parts[-length:]))
    names = [source.name or name for name, (source, _) in zip(names, found, strict=True)]
    for name in names:
        check_arm_name(name, place)
    given = {source.name: source for source, _ in found if source.name}
    for name, (source, _) in zip(names, found, strict=True):
        if given.get(name, source) is not source:
            raise ConfigError(f"{place}arms: two arms are called '{name}'; give them different names.")
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        if names.count(name) > 1 or seen[name] > 1:
            names[i] = f"{name}#{seen[name]}"
    return names


def check_arm_name(name: str, place: str = "") -> None:
    """Raise `ConfigError` if a name has characters that would break the layout of tables and sentences."""
    if not name.isprintable():
        raise ConfigError(f"{place}arms: the name {name!r} has characters that cannot be printed; set another name.")


def baseline_of(wanted: str | None, names: Sequence[str], place: str = "") -> str:
    """Return the name of the baseline arm, by default the first; raises `ConfigError` if no arm has the wanted name."""
    if not wanted:
        return names[0]
    if wanted not in names:
        hint = did_you_mean(wanted, names)
        raise ConfigError(f"{place}baseline: no arm is called '{wanted}'.{hint} Choose one of {', '.join(names)}.")
    return wanted


def check_cooling(campaign: Campaign, experiments: Sequence[Experiment], place: str = "") -> None:
    """Raise `ConfigError` if the campaign waits for GPUs to cool down although no arm uses a GPU."""
    if campaign.cool_to_c is None:
        return
    machine = host.look()
    if not any(wants_gpu(each, machine.only(each.gpus)) for each in experiments):
        raise ConfigError(f"{place}cool_to_c: {NO_COOLING}")


def check_across_nodes(campaign: Campaign, options: RunOptions) -> None:
    """Raise `ConfigError` if a campaign with `across_nodes` cannot run its cycles on different nodes."""
    if options.launcher is None:
        raise ConfigError(
            "across_nodes: without --launcher slurm, all cycles run on this machine. Leave across_nodes out."
        )
    if options.one_job:
        raise ConfigError("across_nodes: with --one-job, all cycles run on one node. Use only one of the two settings.")
    if campaign.structure == "grouped":
        raise ConfigError(
            "across_nodes: with structure=grouped, each arm is a job, so a difference between nodes would look like a "
            "difference between arms. Use another structure."
        )


def _moved(experiment: Experiment, results_dir: Path) -> Experiment:
    return replace(experiment, io=replace(experiment.io, results_dir=str(results_dir)))


# ------------------------------------------------------------------ the plan
def plan(
    campaign: Campaign, arms: Sequence[Arm], overrides: Sequence[str], options: RunOptions, prompts: RecentPrompts
) -> Planned:
    """Check every arm with every sample of prompts, and plan the cells; raises `ConfigError` with all problems."""
    machine = None if options.launcher else host.look()
    rule, cycles = rule_of(campaign, len(arms)), cycles_at_most(campaign, len(arms))
    if rule and options.one_job:
        raise ConfigError(
            "--one-job plans all cycles in advance, but --until-ci decides after each cycle; use only one of them."
        )
    seeds = range(cycles) if campaign.resample_prompts else range(1)
    ready: dict[tuple[str, int], Ready] = {}
    problems: dict[str, None] = {}
    warnings: dict[str, None] = {}
    for shift in seeds:
        for arm in arms:
            experiment = replace(arm.experiment, seed=arm.experiment.seed + shift)
            try:
                if machine is None:
                    found = preflight_for_job(experiment, options, prompts, in_campaign=True)
                else:
                    found = preflight(experiment, machine, force=options.force, in_campaign=True, load=prompts)
            except BadInput as error:
                problems |= dict.fromkeys(f"{arm.name}: {problem}" for problem in error.problems)
                continue
            wrong = [f"{arm.name}: {objection}" for objection in unmeasured(experiment, campaign.primary)]
            problems |= dict.fromkeys(wrong)
            ready[arm.name, shift] = found
            warnings |= dict.fromkeys(f"{arm.name}: {warning}" for warning in found.warnings)
    if problems:
        raise ConfigError(*problems)
    print_warnings(*warnings)
    print_warnings(*(f"{note.code}: {note.text}" for note in results.about_order(campaign, len(arms))))
    places = order(campaign.structure, len(arms), cycles, campaign.seed)
    shifts = _shifts(campaign, places)
    chosen = [ready[arms[place.arm].name, shift] for place, shift in zip(places, shifts, strict=True)]
    digests = ["+".join(dict.fromkeys(ready[arm.name, shift].prompts.sha256 for arm in arms)) for shift in seeds]
    if len(digests) > 1 and len(set(digests)) == 1:
        raise ConfigError(
            "resample_prompts: each cycle would have the same prompts, because every prompt of the dataset is used. "
            "Set sample_size (-n) to fewer prompts than the dataset has."
        )
    return Planned(
        definition=Definition(
            campaign,
            tuple(arms),
            tuple(digests),
            _machine(machine),
            tuple(overrides),
            rule.level if rule else None,
            os.getcwd(),
        ),
        places=places,
        experiments=[each.experiment for each in chosen],
        words=[summary_of(each) for each in chosen],
        results_dir=expanded(arms[0].experiment.io.results_dir),
    )


def _shifts(campaign: Campaign, places: Sequence[Place]) -> list[int]:
    """Return the number to add to each cell's seed; with `resample_prompts`, it differs from cycle to cycle."""
    return [place.cycle - 1 if campaign.resample_prompts else 0 for place in places]


def _machine(machine: host.Host | None) -> Machine:
    """Return the conditions that all cells share: the machine, its GPUs and the software.

    If `machine` is None, the cells run on nodes of a cluster, and each row names the node on which its cell ran.
    """
    if machine is None:
        return Machine("Slurm", None, (), host.versions(), host.git_state()[0])
    found = host.environment(machine)
    return Machine(found.hostname, found.driver_version, found.gpus, found.versions, found.git_commit)


def _changes(kept: Definition, now: Definition) -> list[str]:
    """Return what has changed since a campaign began: the machine, its software or the prompts."""
    changed = [
        f"{what}: {before or 'none'} then, {after or 'none'} now"
        for what, before, after in (
            ("machine", kept.machine.hostname, now.machine.hostname),
            ("driver", kept.machine.driver_version, now.machine.driver_version),
            ("GPUs", ", ".join(kept.machine.gpus), ", ".join(now.machine.gpus)),
            ("commit", kept.machine.git_commit, now.machine.git_commit),
        )
        if before != after
    ]
    packages = kept.machine.versions.keys() | now.machine.versions.keys()
    changed += [
        f"{package}: {kept.machine.versions.get(package, 'none')} then, {now.machine.versions.get(package, 'none')} now"
        for package in sorted(packages)
        if kept.machine.versions.get(package) != now.machine.versions.get(package)
    ]
    if kept.prompts_sha256 != now.prompts_sha256:
        changed.append("the prompts have changed")
    return changed


def _check_same(kept: Definition, now: Definition, force: bool, resume: str) -> None:
    """Raise `ConfigError` if arms or settings differ or, without `force`, if the machine, software or prompts do."""
    name = kept.name

    def wanted(definition: Definition) -> object:
        arms = [(arm.name, {k: v for k, v in to_plain(arm.experiment).items() if k != "io"}) for arm in definition.arms]
        return definition.campaign, arms

    if wanted(kept) != wanted(now):
        raise ConfigError(
            f"A campaign '{name}' with other arms or settings already exists. Choose another --campaign-name, or "
            f"resume the existing one: {resume}"
        )
    changed = _changes(kept, now)
    if changed and not force:
        raise ConfigError(
            *(f"Campaign '{name}' began under different conditions: {each}." for each in changed),
            "Its cells would not be comparable. Restore the earlier conditions, choose another --campaign-name, or use "
            "--force.",
        )


# ------------------------------------------------------------------ measuring
def _measure(
    planned: Planned, options: RunOptions, prompts: RecentPrompts, presentation: Presentation, resume: str
) -> int:
    """Run the cells that have no result yet, and present the answer; `resume` is the command to resume the campaign."""
    store, folder, name = Store(planned.results_dir), planned.folder, planned.definition.name
    kept = _continued(planned, store, options, resume)
    planned, states = kept or (planned, [CellState(cell) for cell in _cells(planned)])
    left = [state for state in states if not state.is_settled]
    if options.dry_run:
        _preview(planned, states)
        return 0
    if kept and (ledger := Ledger.read(folder)) and not ledger.is_shown:
        return follow(campaign_at(folder, presentation), options)
    if kept and _is_recorded(folder, states):
        manifest = _manifest(folder, states)
        _write_missing_rows(manifest, store, options)
        return _present(planned, store, manifest, presentation)
    if left and not (options.yes or confirmed(_question(planned, len(left)))):
        return 0
    with _locked(folder, name):
        kept = _continued(planned, store, options, resume)  # another process may have measured cells meanwhile
        planned, states = kept or (planned, states)
        manifest = _manifest(folder, states)
        if kept is None:
            _begin(manifest, planned.definition)
        _write_missing_rows(manifest, store, options)
        try:
            if any(not state.is_settled for state in states):
                make_runner = partial(_runner, options=options, prompts=prompts, planned=planned)
                run_cells(
                    manifest, make_runner, [],
                    again=f"To resume: {resume}", launcher=options.launcher, quiet=options.quiet,
                )  # fmt: skip
            else:
                manifest.open()
        except Left as left:
            return left.show()
        except BaseException:
            _present_outcome(planned, store, manifest, presentation)
            raise
        return _present_outcome(planned, store, manifest, presentation)


def _present_outcome(planned: Planned, store: Store, manifest: Manifest, presentation: Presentation) -> int:
    """Present the answer, unless the list of cells is missing because the disk is full; return the exit code."""
    folder = planned.folder
    code = _present(planned, store, manifest, presentation) if (folder / results.CELLS).is_file() else 1
    forget_jobs(folder)
    return code


def campaign_at(folder: Path, presentation: Presentation = Presentation()) -> Submitted:
    """Return the campaign in a directory as a study whose jobs can be followed.

    Raises:
        ResultsError: the campaign's files are missing or damaged.
    """
    store, kept = results.store_of(folder), results.read_definition(folder)
    campaign = kept.campaign
    arms = tuple(replace(arm, experiment=_moved(arm.experiment, store.root)) for arm in kept.arms)
    places = order(campaign.structure, len(arms), cycles_at_most(campaign, len(arms)), campaign.seed)
    of_arms = [arms[place.arm].experiment for place in places]
    shifts = _shifts(campaign, places)
    experiments = [replace(each, seed=each.seed + shift) for each, shift in zip(of_arms, shifts, strict=True)]
    planned = Planned(replace(kept, arms=arms), places, experiments, [""] * len(places), store.root)

    def read(ledger: Ledger) -> Manifest:
        states = read_manifest(folder, ledger.terms.head).states
        cells = _cells(planned)
        if len(states) != len(cells):
            raise ResultsError(f"{folder / results.CELLS} has {len(states)} cells instead of {len(cells)}.")
        return _manifest(folder, [_reread(state, cell) for state, cell in zip(states, cells, strict=True)])

    def runner(manifest: Manifest, display: StudyDisplay, options: RunOptions, ledger: Ledger) -> SlurmRunner:
        return CampaignJobs(manifest, display, options, RecentPrompts(), ledger.terms.slurm, planned=planned)

    def present(manifest: Manifest) -> int:
        return _present(planned, store, manifest, presentation)

    return Submitted(folder.resolve(), read, runner, present)


def _reread(state: CellState, cell: Cell) -> CellState:
    """Complete a cell's state with what the list of cells does not contain: the experiment to resume, and the row."""
    is_planned = state.directory is not None and (state.directory.path / "spec.json").is_file()
    unfinished = state.directory if state.status == "not run" and is_planned else None
    row = row_of(state.directory) if state.status == "completed" else None
    return replace(state, cell=replace(cell, unfinished=unfinished), row=row)


def _manifest(folder: Path, states: Sequence[CellState]) -> Manifest:
    manifest = Manifest(folder, [state.cell for state in states], "cell")
    manifest.states = list(states)
    return manifest


def _is_recorded(folder: Path, states: Sequence[CellState]) -> bool:
    """Return whether no cell is left to run and the list of cells says so; showing the answer then needs no lock.

    The list of cells may be out of date if the campaign was killed after its last cell.
    """
    try:
        recorded = [entry["status"] for entry in results.read_entries(folder)]
    except ResultsError:
        return False
    return all(state.is_settled for state in states) and recorded == [state.status for state in states]


def _begin(manifest: Manifest, definition: Definition) -> None:
    """Write a new campaign's files.

    The definition is written last. If it exists and the list of cells does not, the list has therefore been lost.
    """
    try:
        manifest.open()
        with needs_space(manifest.directory):
            write_atomically(manifest.directory / results.DEFINITION, to_json(definition))
    except DiskFull as full:
        raise DiskFull(full.folder, NOTHING_YET) from None


def _write_missing_rows(manifest: Manifest, store: Store, options: RunOptions) -> None:
    done = [state.directory.id for state in manifest.states if state.status == "completed" and state.directory]
    catch_up_rows(store.root, options, done)


def _present(planned: Planned, store: Store, manifest: Manifest, presentation: Presentation) -> int:
    """Write the tables, show the answer, and return the exit code."""
    folder = planned.folder
    found = results.answer(planned.definition, results.read_cells(store, folder))
    _write_answer(folder, found)
    presentation.show(found, manifest, folder)
    return 0 if manifest.all_completed and found.is_complete else 1


def _continued(
    planned: Planned, store: Store, options: RunOptions, resume: str
) -> tuple[Planned, list[CellState]] | None:
    """If a campaign of this name exists, return the campaign and its cells' states; otherwise, return None.

    The intervals keep the nominal level with which the campaign began.

    Raises:
        ConfigError: the existing campaign has other arms or settings or, without `options.force`, its conditions have
            changed.
    """
    if not (planned.folder / results.DEFINITION).is_file():
        return None
    kept = results.read_definition(planned.folder)
    _check_same(kept, planned.definition, options.force, resume)
    planned = replace(planned, definition=replace(planned.definition, nominal_level=kept.nominal_level))
    return planned, adaptive.settled(planned.definition, planned.places, _states(planned, store))


def _write_answer(folder: Path, found: Answer) -> None:
    try:
        results.write_answer(folder, found)
    except OSError as error:  # such as a full disk; this must not hide the answer or how the run ended
        print_warnings(f"{folder}: cannot write the tables ({error.strerror}); resume the campaign to retry.")


def failures(manifest: Manifest) -> list[str]:
    """Return a sentence for each cell that failed, or that did not run because its arm was abandoned."""
    wrong = [state for state in manifest.states if state.status in ("failed", "not run") and state.error]
    return [f"{state.cell.label}: {state.sentence}" for state in wrong]


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Hold a campaign's lock; the kernel releases it when this process ends.

    Raises:
        ResultsError: another process is measuring the campaign, or the directory is not writable.
    """
    try:
        with needs_space(folder, NOTHING_YET):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ".lock").open("a")
    except OSError as error:
        raise ResultsError(f"The campaign's directory {folder} cannot be used: {error.strerror}.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(
                f"Another process is measuring campaign '{name}'. Wait until that process has ended, or stop it first."
            ) from None
        yield


def _cells(planned: Planned) -> list[Cell]:
    arms, cycles = planned.definition.arms, max(place.cycle for place in planned.places)
    before = [None, *(each.backend for each in planned.experiments)]
    return [
        Cell(
            label=f"{arms[place.arm].name}, cycle {place.cycle}/{cycles}",
            experiment=experiment,
            overrides=planned.definition.overrides,
            config_file=Path(file) if (file := arms[place.arm].config_file) else None,
            words=words,
            campaign=CampaignCell(
                planned.definition.name,
                arms[place.arm].name,
                place.cycle,
                place.position,
                number=number,
                cells=len(planned.places),
                simulated_before=options if isinstance(options := before[number - 1], SimulatedBackend) else None,
            ),
            schedule=planned.schedule,
        )
        for number, (place, experiment, words) in enumerate(
            zip(planned.places, planned.experiments, planned.words, strict=True), start=1
        )
    ]


def _states(planned: Planned, store: Store) -> list[CellState]:
    """Return the state of each cell: completed, to be resumed, or not run."""
    try:
        ids = [entry["experiment_id"] for entry in results.read_entries(planned.folder)]
    except ResultsError:
        ids = []
    if len(ids) != len(planned.places):
        ids = _ids_of_cells(planned, store)
    states = [CellState(cell) for cell in _cells(planned)]
    for number, (state, experiment_id) in enumerate(zip(states, ids, strict=True)):
        if experiment_id is not None:
            states[number] = _state(state, store.directory(experiment_id))
    return states


def _ids_of_cells(planned: Planned, store: Store) -> list[str | None]:
    """Return the id of each cell's latest experiment, found in the experiments' plans; None for a cell without one.

    This replaces the list of cells if it is lost.
    """
    ids: list[str | None] = [None] * len(planned.places)
    for experiment_id in store.ids():
        try:
            plan = store.directory(experiment_id).plan()
        except ResultsError:
            continue
        cell = plan.campaign
        if cell is None or cell.name != planned.definition.name or not 1 <= cell.number <= len(ids):
            continue
        place, experiment = planned.places[cell.number - 1], planned.experiments[cell.number - 1]
        digests = planned.definition.prompts_sha256
        prompts = digests[place.cycle - 1 if len(digests) > 1 else 0].split("+")
        if plan.config_sha256 == config_sha256(experiment) and plan.prompts.sha256 in prompts:
            ids[cell.number - 1] = experiment_id
    return ids


def _state(state: CellState, directory: ExperimentDir) -> CellState:
    if not directory.path.is_dir():
        return state
    found = directory.state()
    if found.status in FINISHED:
        return replace(state, status="completed", directory=directory, row=read(directory, strict=False).row)
    is_cut = found.status == "interrupted" or (found.error or "").startswith(NO_SPACE)
    if is_cut and (directory.path / "spec.json").is_file():
        return replace(state, cell=replace(state.cell, unfinished=directory), directory=directory)
    return state


def _runner(
    manifest: Manifest, display: StudyDisplay, options: RunOptions, prompts: RecentPrompts, planned: Planned
) -> Runner:
    if options.launcher is None:
        return CampaignRunner(manifest, display, options, prompts, planned)
    of_jobs = options.launcher.options
    if not planned.definition.campaign.across_nodes:
        gpus = max(gpus_of_job(experiment, of_jobs) for experiment in planned.experiments)
        ran_on = [state.row.slurm_node for state in manifest.states if state.row and state.row.slurm_node]
        of_jobs, note = kept_on_one_type(of_jobs, gpus, ran_on)
        print_warnings(*([note] if note else []))
    return CampaignJobs(manifest, display, options, prompts, of_jobs, planned=planned)


@dataclass
class CampaignRunner(OneByOne):
    """Runs a campaign's cells with pauses between them; retries failed cells and gives up on arms that keep failing."""

    planned: Planned
    failures: Counter[int] = field(default_factory=Counter)
    to_retry: list[int] = field(default_factory=list)
    before: Place | None = None

    def run(self, number: int, experiment: Experiment) -> None:
        """Run this cell, unless its arm was abandoned or no further cycle is needed.

        Before a new cycle begins, the failed cells of the previous cycle are retried. In a grouped campaign,
        the failed cells of an arm are retried before the next arm begins.
        """
        if self.before is not None and self._part(self.before) != self._part(self.planned.places[number]):
            self._retry()
        before, places = self.planned.places[number].cycle - 1, self.planned.places
        if adaptive.is_over(self.planned.definition, places, self.manifest.states, before, self._given_up()):
            self.manifest.leave_out(adaptive.after(places, before))
            return
        self._attempt(number, experiment)
        if self.manifest.states[number].status == "failed":
            self.to_retry.append(number)

    def finish(self) -> None:
        """Retry the failed cells of the last cycle or, if grouped, of the last arm."""
        self._retry()

    def wait_before(self, number: int, report: Report) -> None:
        """Pause, unless this is the first cell to run."""
        campaign, place = self.planned.definition.campaign, self.planned.places[number]
        before, self.before = self.before, place
        if before is None:
            return
        count_down(pause_s(campaign, before, place), report)

    def _given_up(self) -> list[str]:
        return [arm.name for i, arm in enumerate(self.planned.definition.arms) if self.failures[i] >= GIVE_UP]

    def _part(self, place: Place) -> int:
        """Return the number of the cell's cycle (if grouped, of its arm), after which failed cells are retried."""
        return place.arm if self.planned.definition.campaign.structure == "grouped" else place.cycle

    def _attempt(self, number: int, experiment: Experiment) -> None:
        arm = self.planned.places[number].arm
        if self.failures[arm] >= GIVE_UP:
            error = f"{self.planned.definition.arms[arm].name} was abandoned after {GIVE_UP} failures in a row."
            self.manifest.change(number, status="not run", error=error)
            return
        super().run(number, experiment)
        self.failures[arm] = self.failures[arm] + 1 if self.manifest.states[number].status == "failed" else 0

    def _retry(self) -> None:
        for _ in range(self.planned.definition.campaign.retries):
            for number in self.to_retry:
                arm = self.planned.places[number].arm
                if self.manifest.states[number].status == "failed" and self.failures[arm] < GIVE_UP:
                    self.manifest.change(number, directory=None, row=None, error=None)
                    self._attempt(number, self.planned.experiments[number])
        self.to_retry.clear()


@dataclass(kw_only=True)
class CampaignJobs(SlurmRunner):
    """Submits each cycle of a campaign, or each arm if grouped, as one job that runs its cells in order.

    All cells of a cycle (if grouped, of an arm) therefore run on one node. With `options.one_job`, the whole campaign
    is one job. Failed cells are retried at the end, in one job for each cycle (or arm). If possible, this job runs on
    the node that ran the other cells of the cycle (or arm).
    """

    resubmits: ClassVar[bool] = False  # instead, a lost cycle is retried as a whole

    planned: Planned
    waiting: list[int] = field(default_factory=list)

    def run(self, number: int, experiment: Experiment) -> None:
        """Leave the cell to `submit_more`, which plans cells when it submits them."""

    def submit_more(self) -> None:
        """Submit all cycles or, if adaptive, the next one that is needed; after the last, retry failed cells."""
        numbers = self._next()
        with self.manifest.together():
            for number in numbers:
                if self._begins_a_part(number):
                    self._submit_waiting()
                if self.manifest.states[number].status == "failed":
                    self.manifest.change(number, status="not run", directory=None, row=None, error=None, log=None)
                self._add(number, self.planned.experiments[number])
            self._submit_waiting()

    def adopt_plan(self, number: int, directory: ExperimentDir) -> None:
        """Leave the cell to `submit_more`, which resumes its unfinished experiment."""

    def has_more(self) -> bool:
        """Return whether `submit_more` would submit cells: further ones or, after these, failed ones to retry."""
        return bool(self._next())

    def _next(self) -> list[int]:
        """Return the numbers of the cells to submit next."""
        definition, places, states = self.planned.definition, self.planned.places, self.manifest.states
        tries = Counter[int]() if self.ledger is None else self.ledger.tries()
        new = [n for n, state in enumerate(states) if not (state.is_settled or tries[n])]
        if new and definition.rule:
            before = places[new[0]].cycle - 1
            if not adaptive.is_over(definition, places, states, before, self._given_up()):
                return [n for n in new if places[n].cycle == before + 1]
            self.manifest.leave_out(adaptive.after(places, before))
            new = []
        tries_at_most = 1 + definition.campaign.retries
        return new or [n for n, state in enumerate(states) if state.status == "failed" and tries[n] < tries_at_most]

    def _add(self, number: int, experiment: Experiment) -> None:
        campaign, places = self.planned.definition.campaign, self.planned.places
        before = self.waiting[-1] if self.waiting else None
        try:
            self.plan(number, experiment, 0.0 if before is None else pause_s(campaign, places[before], places[number]))
        except DiskFull:
            raise
        except LemError as error:
            self.manifest.change(number, status="failed", error=str(error))
            return
        self.waiting.append(number)

    def _begins_a_part(self, number: int) -> bool:
        is_other = bool(self.waiting) and self._part(self.waiting[-1]) != self._part(number)
        return is_other and not self.options.one_job

    def _submit_waiting(self) -> None:
        if self.waiting:
            self.submit(self.waiting)
            self.waiting.clear()

    def options_of(self, numbers: Sequence[int]) -> SlurmOptions:
        """Return the options of a job; if all completed cells of its cycle (or arm) ran on one node, it goes there."""
        parts = {self._part(number) for number in numbers}
        rows = [state.row for number, state in enumerate(self.manifest.states) if self._part(number) in parts]
        ran_on = {row.slurm_node for row in rows if row and row.status == "completed" and row.slurm_node}
        # A node that cannot run jobs would make the job wait forever. A name such as "n1+n2" means two nodes.
        is_possible = len(ran_on) == 1 and slurm.is_usable(*ran_on)
        return replace(self.slurm, nodelist=ran_on.pop()) if is_possible else self.slurm

    def _part(self, number: int) -> int:
        place = self.planned.places[number]
        return place.arm if self.planned.definition.campaign.structure == "grouped" else place.cycle

    def _given_up(self) -> list[str]:
        """Return the names of the arms whose last `GIVE_UP` cells have all failed."""
        names = []
        for i, arm in enumerate(self.planned.definition.arms):
            own = [s for s, place in zip(self.manifest.states, self.planned.places, strict=True) if place.arm == i]
            last = [state.status for state in own if state.status != "not run"][-GIVE_UP:]
            if last == ["failed"] * GIVE_UP:
                names.append(arm.name)
        return names


def pause_s(campaign: Campaign, before: Place, after: Place) -> float:
    """Return the pause between two consecutive cells, in seconds.

    In a grouped campaign, the pause before the next arm is always `config_gap_s`, although the cycle changes as well.
    """
    is_next_arm = campaign.structure == "grouped" and before.arm != after.arm
    if before.cycle != after.cycle and not is_next_arm and campaign.cycle_gap_s is not None:
        return campaign.cycle_gap_s
    return campaign.config_gap_s


def count_down(seconds: float, report: Report) -> None:
    """Wait, reporting each second that has passed."""
    until_s, total = time.monotonic() + seconds, math.ceil(seconds)
    while (left_s := until_s - time.monotonic()) > 0:
        report(Event("gap", total - math.ceil(left_s), total))
        time.sleep(min(1.0, left_s))
    if total:
        report(Event("gap", total, total))


# ------------------------------------------------------------------ before the run
def _question(planned: Planned, left: int) -> str:
    campaign, arms = planned.definition.campaign, planned.definition.arms
    of = f" of {len(planned.places)}" if left < len(planned.places) else ""
    most = "up to " if planned.definition.rule else ""
    return f"Run {most}{left}{of} cells ({len(arms)} arms in {_cycles(planned.definition)}, {campaign.structure})?"


def _cycles(definition: Definition) -> str:
    rule, cycles = definition.rule, definition.campaign.cycles
    if rule is not None:
        return f"{rule.least} to {rule.most} cycles"
    size = square_size(len(definition.arms))
    whole = " (complete Latin squares)" if definition.campaign.structure == "latin" and cycles % size == 0 else ""
    return f"{cycles} cycle{'s' if cycles != 1 else ''}{whole}"


def _preview(planned: Planned, states: Sequence[CellState]) -> None:
    """Print what is left to run: the order, the pauses, and the expected time and energy based on earlier runs."""
    campaign, arms = planned.definition.campaign, planned.definition.arms
    left = [number for number, state in enumerate(states) if not state.is_settled]
    show.say(
        f"Campaign {campaign.name}: {len(arms)} arms in {_cycles(planned.definition)}, {campaign.structure}, "
        f"seed {campaign.seed}; baseline {campaign.baseline}"
    )
    if planned.definition.rule:
        show.say(adaptive.plan_words(planned.definition.rule))
    elif campaign.structure == "latin" and campaign.cycles % (size := square_size(len(arms))) == 0:
        show.say(
            f"After every {size} cycles, each arm has had every position and followed every other arm equally often."
        )
    if len(left) < len(states):
        completed = sum(state.status == "completed" for state in states)
        show.say(f"{completed} of {len(states)} cells are completed; {_left_words(left)}")
    gaps_s = 0.0
    for number, after in zip_longest(left, left[1:]):
        state = states[number]
        resumed = ", to be resumed" if state.cell.unfinished else ""
        show.say(f"[{number + 1}/{len(states)}] {state.cell.label}: {state.cell.words}{resumed}")
        gap_s = 0.0 if after is None else pause_s(campaign, planned.places[number], planned.places[after])
        gaps_s += gap_s
        if gap_s:
            print(f"      pause of {gap_s:g} s")
    for line in _expected(planned, Counter(planned.places[number].arm for number in left), gaps_s):
        show.say(line)
    show.say("# dry run: nothing was measured")


def _left_words(left: Sequence[int]) -> str:
    if not left:
        return "nothing is left to run."
    return "this one is left:" if len(left) == 1 else f"these {len(left)} are left:"


def _expected(planned: Planned, cells: Mapping[int, int], gaps_s: float) -> Iterator[str]:
    """Yield sentences that estimate time, energy and detectable difference from earlier runs, or say what is unknown.

    Args:
        planned: the campaign.
        cells: how many cells of each arm are left to run, by the arm's number.
        gaps_s: the total length of the pauses between these cells, in seconds.
    """
    campaign, arms, rule = planned.definition.campaign, planned.definition.arms, planned.definition.rule
    rows = earlier_rows(Store(planned.results_dir), [campaign.primary])
    spent_s, energies_j, spreads = 0.0, list[float | None](), list[float]()
    unknown = []
    for number, arm in enumerate(arms):
        own = rows_like(arm.experiment, rows)
        values = [value for row in own if (value := getattr(row, campaign.primary))]
        if len(values) > 1:
            spreads.append(summarize([math.log(value) for value in values]).sd or 0.0)
        count = cells.get(number, 0)
        if not own and count:
            unknown.append(arm.name)
        each_s = mean_time_s(arm.experiment, own)
        if each_s is None or not count:
            continue
        spent_s += count * each_s
        each_j = mean_energy_j(arm.experiment, own)
        energies_j.append(None if each_j is None else count * each_j)
    if not cells:
        return
    if unknown:
        yield f"No earlier run of {', '.join(unknown)}: the expected time and energy are unknown."
    else:
        energy_j = total(energies_j)
        energy = "unknown energy" if energy_j is None else f"{energy_j:.4g} J"
        most = f", if the campaign takes all {cycles_at_most(campaign, len(arms))} cycles" if rule else ""
        yield f"Expected from earlier runs: {(spent_s + gaps_s) / 60:.1f} min including pauses, {energy}{most}."
    sd_log = math.sqrt(sum(s**2 for s in spreads) / len(spreads)) if spreads else None
    yield from _precision(planned.definition, sd_log)


def _precision(definition: Definition, sd_log: float | None) -> Iterator[str]:
    """Yield a sentence about the detectable difference or, in an adaptive campaign, the expected number of cycles.

    `sd_log` is the standard deviation of the logarithm of a cell's metric in earlier runs; None if unknown. In an
    adaptive campaign, no sentence is yielded if it is unknown.
    """
    campaign, arms, rule = definition.campaign, len(definition.arms), definition.rule
    cycles = cycles_at_most(campaign, arms)
    if rule is not None:
        if sd_log is not None:
            yield adaptive.expected_words(definition, rule, sd_log)
    elif sd_log is not None and cycles > 1:
        degrees_of_freedom = expected_degrees_of_freedom(ANALYSES[campaign.structure], cycles, arms)
        ratio = results.detectable_ratio(sd_log, cycles, degrees_of_freedom, arms - 1)
        yield f"With {cycles} cycles, a difference of {ratio - 1:.1%} is detected with a probability of 80%."
    else:
        yield "The detectable difference is unknown: estimating it needs two cycles and two earlier runs of an arm."
