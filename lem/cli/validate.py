"""`lem config validate` and `lem config show`: report problems in configurations, and show resolved ones.

This module runs nothing, looks for no model, loads no prompts and does not use the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lem.config.campaign import (
    campaign_arms,
    compose,
    in_whole_squares,
    is_campaign,
    keys_given,
    place_of,
    settings_of_arms,
)
from lem.config.check import Found, examine, texts, without
from lem.config.compose import Inputs, located, read_inputs, values_of, without_echoes
from lem.config.layers import Sources, leaf_paths, origin
from lem.config.problem import Location, Problem, Problems, impossible, shown_path
from lem.config.userfile import Layer
from lem.config.yamlfile import KeyPath, resolvers
from lem.config.yamltext import escaped
from lem.errors import ConfigError
from lem.machine.host import Host, look
from lem.quantities import is_printable, one_line
from lem.results.codec import to_plain
from lem.results.stopping import rule_of
from lem.runner.preflight import OUTSIDE_CAMPAIGNS, objections
from lem.spec.campaign import Measure
from lem.spec.conflicts import unmeasured
from lem.spec.experiment import Experiment

COMMENT_COLUMN = 46


# ------------------------------------------------------------------ validate
@dataclass(frozen=True)
class Verdict:
    """A checked file and its problems."""

    file: Path
    problems: tuple[Problem, ...]
    force: bool = False

    def blocks(self, problem: Problem) -> bool:
        """Return whether a problem prevents the file from being used."""
        return problem.severity == "impossible" or (problem.severity == "inadvisable" and not self.force)

    @property
    def valid(self) -> bool:
        """Whether the file can be run, or inherited from."""
        return not any(map(self.blocks, self.problems))

    def plain(self) -> dict[str, Any]:
        """Return the verdict as plain data for JSON."""
        return {"file": str(self.file), "valid": self.valid, "problems": list(map(_plain, self.problems))}

    def lines(self) -> Iterator[str]:
        """Yield one line for each problem, and one line if the file is valid."""
        for problem in self.problems:
            blocks = self.blocks(problem)
            remedy = " (use --force to run it anyway)" if blocks and problem.severity == "inadvisable" else ""
            where, kind = problem.where or shown_path(self.file), "error" if blocks else "warning"
            yield one_line(f"{where}: {kind}: {problem.sentence}{remedy} [{problem.code}]")
        if self.valid:
            yield one_line(f"{shown_path(self.file)}: valid")


def _plain(problem: Problem) -> dict[str, Any]:
    location = problem.location
    return {
        "code": problem.code,
        "severity": problem.severity,
        "path": problem.path or None,
        "message": problem.message,
        "file": shown_path(location.file) if location else None,
        "line": location.line if location else None,
        "column": location.column if location else None,
    }


def validate(
    files: Sequence[Path], *, config_dir: Path | None, force: bool, any_machine: bool, as_json: bool = False
) -> int:
    """Check files and print the problems of each; return 0 if all files are valid, else 2."""
    host = look()
    verdicts = []
    for file in files:
        find = problems_of_campaign if is_campaign(file) else problems
        verdicts.append(Verdict(file, tuple(find(file, host, config_dir, any_machine)), force))
    if as_json:
        print(json.dumps([verdict.plain() for verdict in verdicts], indent=2, ensure_ascii=False))
    else:
        print("\n".join(line for verdict in verdicts for line in verdict.lines()))
        if len(verdicts) > 1:
            valid = sum(verdict.valid for verdict in verdicts)
            print(f"{len(verdicts)} files: {valid} valid, {len(verdicts) - valid} invalid.")
    return 0 if all(verdict.valid for verdict in verdicts) else 2


def problems(
    file: Path,
    host: Host,
    config_dir: Path | None = None,
    any_machine: bool = False,
    overrides: Sequence[str] = (),
    primary: Measure | None = None,
) -> list[Problem]:
    """Return all problems of a config file: those in its text, keys and values, and conflicts between values.

    Args:
        file: the config file.
        host: the machine to check for.
        config_dir: a directory with the user's own options.
        any_machine: ignore problems specific to this machine.
        overrides: Hydra overrides to check the file with.
        primary: the metric by which a campaign compares this configuration.
    """
    inputs = read_inputs(file, overrides, config_dir)
    if not inputs.sources.file.layers:
        return list(inputs.problems)  # the file cannot be read at all
    values, found = values_of(inputs.sources)
    known = without_echoes(inputs.problems, located(inputs.sources, found))
    # Leave out the values that are wrong, so that the rules can check the rest.
    experiment = examine(without(values, [path for path, _ in found]))[0] if values else None
    if experiment is None:
        return _in_order(known, file)
    if experiment.model is None and not _is_about("model", known):
        known.append(
            Problem(
                "no_model",
                "model",
                "no model is set; other files can inherit from this file, but it cannot be run as it is.",
                Location(file),
            )
        )
    return _in_order([*known, *_objections(experiment, host, inputs, any_machine, known, primary)], file)


def problems_of_campaign(file: Path, host: Host, config_dir: Path | None, any_machine: bool) -> Sequence[Problem]:
    """Return all problems of a campaign file and of the config files of its arms."""
    from lem.studies.campaign import NO_COOLING, baseline_of, names_of

    try:
        campaign = compose(file, {})
        arms = list(campaign_arms(campaign))
    except Problems as error:
        return _in_order(error.found, file)
    except ConfigError as error:
        where = place_of("arms", file, {})
        return [Problem("missing_file", "arms", problem, where) for problem in error.problems]
    found: list[Problem] = []
    cannot_cool = []
    for source, arm in arms:
        overrides = [*settings_of_arms(campaign), *campaign.overrides, *source.overrides]
        of_arm = problems(arm, host, config_dir, any_machine, overrides, campaign.primary)
        cannot_cool.append(("no_effect_without_gpu", "cooldown.to_c") in [(each.code, each.path) for each in of_arm])
        found += of_arm
    if campaign.cool_to_c is not None and cannot_cool and all(cannot_cool):
        found.append(Problem("no_gpu", "cool_to_c", NO_COOLING, place_of("cool_to_c", file, {})))
    if len(arms) < 2:
        message = f"a campaign compares at least two configurations, not {len(arms)}."
        found.append(Problem("out_of_range", "arms", message, place_of("arms", file, {})))
        return _in_order(list(dict.fromkeys(found)), file)
    try:
        baseline_of(campaign.baseline, names_of(arms))
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        found.append(Problem("out_of_range", key, message, place_of(key, file, {})))
    try:
        rule_of(in_whole_squares(campaign, len(arms), keys_given(file, {})), len(arms))
    except ConfigError as error:
        found += [Problem("out_of_range", "", problem, Location(file)) for problem in error.problems]
    return _in_order(list(dict.fromkeys(found)), file)


def _in_order(found: Sequence[Problem], first: Path) -> list[Problem]:
    """Return problems sorted by file and line; problems without a line come last."""
    files = list(dict.fromkeys([first, *(problem.location.file for problem in found if problem.location)]))
    last = len(files), 0

    def key(problem: Problem) -> tuple[int, int]:
        location = problem.location
        return (files.index(location.file), location.line) if location and location.line else last

    return sorted(found, key=key)


def _objections(
    experiment: Experiment,
    host: Host,
    inputs: Inputs,
    any_machine: bool,
    known: Sequence[Problem],
    primary: Measure | None,
) -> list[Problem]:
    """Return the objections to an experiment, with their locations.

    The result leaves out objections to values that are already reported as wrong, objections that hold only outside
    campaigns and, with `any_machine`, objections that concern this machine.
    """
    found: Found = [
        (tuple(objection.path.split(".")), Problem(objection.code, objection.path, objection.message))
        for objection in [*objections(experiment, host), *(unmeasured(experiment, primary) if primary else [])]
        if not (any_machine and objection.scope == "machine")
        and objection.code not in OUTSIDE_CAMPAIGNS
        and not _is_about(f"{objection.path} {objection.message}", known)
    ]
    return located(inputs.sources, found)


def _is_about(text: str, known: Sequence[Problem]) -> bool:
    names = {problem.path.rpartition(".")[2] for problem in impossible(known) if problem.path}
    return any(re.search(rf"\b{re.escape(name)}\b", text) for name in names)


# ------------------------------------------------------------------ show
@dataclass(frozen=True)
class Origin:
    """The source of a value; file and line locate the value itself if it is in a user's file."""

    kind: str
    name: str | None = None
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        location = f"{self.file}:{self.line}" if self.file else ""
        if self.kind == "file":
            return location
        shown = {"option": "option {}", "preset": "preset {}", "environment": "environment {}"}
        text = shown.get(self.kind, self.kind).format(self.name)
        return f"{text} ({location})" if location else text


def show(
    config_file: Path | None,
    overrides: Sequence[str],
    *,
    config_dir: Path | None,
    with_origin: bool = False,
    as_json: bool = False,
) -> int:
    """Print the resolved configuration, as a complete config file in YAML or as JSON."""
    if config_file is not None and is_campaign(config_file):
        return _show_campaign(config_file, overrides, with_origin=with_origin, as_json=as_json)
    values, sources = resolve(config_file, overrides, config_dir)
    origins: dict[KeyPath, Origin] = {}
    if with_origin:
        layers = sources.layers()
        origins |= {path: _origin(origin(layers, path), path) for path, _ in leaf_paths(values)}
    if as_json and with_origin:
        rows = {".".join(path): {"value": v, "origin": asdict(origins[path])} for path, v in leaf_paths(values)}
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif as_json:
        print(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(values, origins)))
    return 0


def _show_campaign(file: Path, overrides: Sequence[str], *, with_origin: bool, as_json: bool) -> int:
    if overrides or with_origin:
        raise ConfigError("lem config show accepts neither overrides nor --origin for a campaign file; leave them out.")
    campaign = compose(file, {})
    with suppress(ConfigError):  # the settings are shown even if an arm's file is missing
        campaign = in_whole_squares(campaign, len(list(campaign_arms(campaign))), keys_given(file, {}))
    values = to_plain(campaign)
    if as_json:
        print(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        print("\n".join(f"{key}: {as_yaml(value)}" for key, value in values.items()))
    return 0


def resolve(
    config_file: Path | None, overrides: Sequence[str], config_dir: Path | None = None
) -> tuple[dict[str, Any], Sources]:
    """Return the checked values of a configuration, and their sources; raises `ConfigError` if any is unusable."""
    inputs = read_inputs(config_file, overrides, config_dir)
    if swept := [override.text for override in inputs.overrides if override.is_sweep]:
        raise ConfigError(f"{swept[0]}: several values are given, but lem config show needs a single value.")
    if settings := [override.text for override in inputs.overrides if not override.key]:
        raise ConfigError(f"{settings[0]}: a Hydra setting has no effect here; leave it out.")
    if found := impossible(inputs.all_problems()):
        raise Problems(found)
    values, _ = values_of(inputs.sources)
    experiment, _ = examine(values)
    assert experiment is not None
    return to_plain(experiment), inputs.sources


def _origin(layer: Layer | None, path: KeyPath) -> Origin:
    if layer is None:
        return Origin("default")
    # A value implied by a word in a file, such as a dataset's path or name, has the location of that word.
    above = (path[:end] for end in range(len(path), 0, -1))
    location = next((layer.locations[part] for part in above if part in layer.locations), None)
    name = shown_path(Path(layer.name)) if layer.kind == "file" and layer.name else layer.name
    return Origin(layer.kind, name, shown_path(location.file), location.line) if location else Origin(layer.kind, name)


def _lines(values: dict[str, Any], origins: dict[KeyPath, Origin], path: KeyPath = ()) -> Iterator[str]:
    indent = "  " * len(path)
    for key, value in values.items():
        at = (*path, key)
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, origins, at)
        else:
            line = f"{indent}{key}: {as_yaml(value)}"
            yield f"{line:<{COMMENT_COLUMN}} # {origins[at]}" if at in origins else line


def as_yaml(value: Any) -> str:
    """Return a value as YAML on one line; reading this text from a config file gives the same value."""

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers = resolvers(yaml.SafeDumper)

    shown = all(is_printable(text) for _, text in texts(value))  # PyYAML does not escape all control characters
    text: str = yaml.dump([escaped(value)], Dumper=Dumper, default_flow_style=True, allow_unicode=shown, width=10**9)
    return text.strip()[1:-1]
