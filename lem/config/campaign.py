"""A campaign's settings, composed by Hydra: schema < conf/campaign/<structure>.yaml < campaign file < command line.

A campaign file may inherit from others (`defaults: [base]`). Like a config file, it is read as plain data with the line
of each key, and is checked as a whole. The configurations of the arms are in separate files, which this module only
locates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lem.config import adaptive, yamlfile
from lem.config.files import find_each
from lem.config.options import SUFFIXES
from lem.config.problem import Location, Problem, Problems, shortened, shown_path
from lem.config.userfile import MAX_FILES, merged
from lem.config.yamlfile import KeyPath, dotted
from lem.errors import did_you_mean
from lem.results.codec import adapter, to_plain
from lem.spec.campaign import (
    LIKE_AN_ID,
    MOST_ADAPTIVE_CYCLES,
    MOST_CYCLES,
    NAME_IN_WORDS,
    STRUCTURES,
    ArmSource,
    Campaign,
    is_like_an_id,
    square_size,
    whole_squares,
)
from lem.spec.paths import expanded

CONFIG_MODULE = "lem.conf"
ROOT = "campaign"
KEYS = tuple(each.name for each in fields(Campaign))


@dataclass
class CampaignFile:
    """The content of a campaign file merged with its parents, and the location of each value."""

    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[KeyPath, Location] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def is_campaign(file: Path) -> bool:
    """Return whether a file describes a campaign, not an experiment: it or one of its parents has the key `arms`."""
    waiting, seen = [file], set[Path]()
    while waiting and len(seen) < MAX_FILES:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        try:
            values = yamlfile.read(path).values
            # Reading from a named pipe would block.
            waiting += [each for each in _parents(values.get("defaults", []), path) if each.is_file()]
        except Problems:
            continue
        if "arms" in values:
            return True
    return False


def check_alone(file: Path) -> None:
    """Raise `Problems` if a file cannot be read as YAML.

    This is for a file that is given alone and was not recognized as a campaign file: broken YAML may be the reason.
    """
    if problems := yamlfile.read(file).problems:
        raise Problems(problems)


def read(file: Path, children: tuple[Path, ...] = ()) -> CampaignFile:
    """Read a campaign file and its parents, which are the files that it inherits from.

    Raises:
        Problems: a file cannot be read, its `defaults` are wrong, or it inherits from itself or from too many files.
    """
    ring = [os.path.realpath(child) for child in children]
    if os.path.realpath(file) in ring:
        names = " -> ".join(path.name for path in (*children, file))
        raise Problems.one("inheritance_cycle", "defaults", f"the file inherits from itself ({names}).", Location(file))
    if len(ring) >= MAX_FILES:
        message = f"the file inherits from more than {MAX_FILES} files."
        raise Problems.one("too_large", "defaults", message, Location(children[0]))
    document = yamlfile.read(file)
    found = CampaignFile(problems=list(document.problems))
    content = dict(document.values)
    for parent in _parents(content.pop("defaults", []), file):
        if not parent.is_file():
            message = f"the file inherits from {shown_path(parent)}, which does not exist."
            raise Problems.one("missing_parent", "defaults", message, document.locations.get(("defaults",)))
        below = read(parent, (*children, file))
        found.values |= below.values
        found.locations |= below.locations
        found.problems += below.problems
    if isinstance(content.get("arms"), list):
        content["arms"] = list(_beside(content["arms"], file))
    found.values |= content
    found.locations |= document.locations
    return found


def compose(file: Path | None, given: Mapping[str, Any]) -> Campaign:
    """Return a campaign's settings.

    Args:
        file: a campaign file, or None.
        given: the command line's values by key; they take precedence over the file's.

    Raises:
        Problems: some values are wrong; the error lists all problems, with the line number of each value that comes
            from a file.
    """
    found = CampaignFile() if file is None else read(file)
    wanted = adaptive.completed({**found.values, **given})
    structure = wanted.get("structure", STRUCTURES[0])
    if structure not in STRUCTURES:
        hint = did_you_mean(str(structure), STRUCTURES)
        message = f"'{shortened(str(structure))}' is not one of {', '.join(STRUCTURES)}.{hint}"
        found.problems.append(Problem("unknown_option", "structure", message, _location(found, given, ("structure",))))
        structure = STRUCTURES[0]
        wanted.pop("structure")
    unknown = [key for key in wanted if key not in KEYS]
    for key in unknown:
        message = f"unknown key.{did_you_mean(str(key), KEYS)}"
        found.problems.append(Problem("unknown_key", str(key), message, _location(found, given, (key,))))
    campaign, problems = _checked(_composed(structure, {k: v for k, v in wanted.items() if k not in unknown}))
    for path, problem in [*problems, *_of_name(campaign), *adaptive.problems(campaign)]:
        found.problems.append(replace(problem, location=_location(found, given, path)))
    if campaign is None or found.problems:
        raise Problems(found.problems)
    return campaign


def place_of(key: str, file: Path | None, given: Mapping[str, Any]) -> Location | None:
    """Return where a campaign file or one of its parents sets a key; if none of them does, return the file itself.

    Return None if there is no file, or if the key is in `given`.
    """
    if file is None or key in given:
        return None
    return read(file).locations.get((key,), Location(file))


def keys_given(file: Path | None, given: Mapping[str, Any]) -> set[str]:
    """Return the keys that a campaign file, its parents or the command line set to a value other than null.

    Raises:
        Problems: as for `read`.
    """
    values = {**(CampaignFile() if file is None else read(file)).values, **given}
    return {key for key, value in values.items() if value is not None}


def in_whole_squares(campaign: Campaign, arms: int, given: Container[str]) -> Campaign:
    """Return a campaign's settings; for the structure `latin`, raise the number of cycles to allow complete squares.

    Without `until_ci`, `cycles` is raised to complete Latin squares. With `until_ci`, `max_cycles` is raised to allow
    one square more than `cycles` needs. A number that the user set stays unchanged, and no number is raised beyond its
    limit.

    Args:
        campaign: the campaign's settings.
        arms: the number of arms, with the baseline.
        given: the keys that the user set.
    """
    if campaign.structure != "latin":
        return campaign
    size = square_size(arms)
    whole = whole_squares(campaign.cycles, size)
    if campaign.until_ci is None:
        is_rounded = "cycles" not in given and whole <= MOST_CYCLES
        return replace(campaign, cycles=whole) if is_rounded else campaign
    # An adaptive campaign stops only after complete squares, so its maximum must leave room for another square.
    most = max(campaign.max_cycles or 0, whole + size)
    is_raised = "max_cycles" not in given and most <= MOST_ADAPTIVE_CYCLES
    return replace(campaign, max_cycles=most) if is_raised else campaign


def campaign_arms(campaign: Campaign) -> Iterator[tuple[ArmSource, Path]]:
    """Yield each arm together with its config file; an arm given as a pattern is yielded once for each matching file.

    Raises:
        ConfigError: some arms' patterns match no config file; the message lists all such patterns.
    """
    sources = [ArmSource(arm) if isinstance(arm, str) else arm for arm in campaign.arms]
    # All patterns are passed at once, because a grid's index is skipped only if files of the same grid are found too.
    for source, files in zip(sources, find_each([source.config for source in sources]), strict=True):
        for file in files:
            yield source, file


def settings_of_arms(campaign: Campaign) -> Iterator[str]:
    """Yield the overrides that apply the campaign's settings to every arm."""
    if campaign.dataset is not None:
        yield f"dataset={campaign.dataset}"
    for path, value in (
        ("dataset.sample_size", campaign.sample_size),
        ("warmup.prompts", campaign.warmup_prompts),
        ("warmup.max_s", campaign.warmup_timeout_s),
        ("cooldown.to_c", campaign.cool_to_c),
    ):
        if value is not None:
            yield f"{path}={value}"


def _composed(structure: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema's defaults and the option for the structure, composed by Hydra, with the values merged in."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    # The values are stored as JSON text, so that Hydra does not resolve interpolations in them.
    store.store(name="campaign_schema", node=to_plain(Campaign()))
    store.store(name="campaign_values", node={"values": json.dumps(dict(values))})
    root = {"defaults": ["campaign_schema", {ROOT: structure}, "campaign_values", "_self_"]}
    store.store(name="campaign_root", node=root)
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        composed = OmegaConf.to_container(hydra_compose("campaign_root"))
    assert isinstance(composed, dict)
    text = composed.pop("values")
    result: dict[str, Any] = merged({str(key): value for key, value in composed.items()}, json.loads(text))
    return result


def _checked(values: dict[str, Any]) -> tuple[Campaign | None, list[tuple[KeyPath, Problem]]]:
    try:
        return adapter(Campaign).validate_json(json.dumps(values)), []
    except ValidationError as error:
        by_path: dict[KeyPath, list[Any]] = {}
        for detail in error.errors(include_url=False):
            by_path.setdefault(_path(values, detail["loc"]), []).append(detail)
        # pydantic also complains that the arm is not a string; report only the problem with the value inside the arm.
        inner = [path for path in by_path if not any(path == other[: len(path)] for other in by_path if other != path)]
        return None, [(path, _problem(path, by_path[path])) for path in inner]


def _of_name(campaign: Campaign | None) -> Iterator[tuple[KeyPath, Problem]]:
    if campaign is not None and campaign.name is not None and is_like_an_id(campaign.name):
        yield ("name",), Problem("out_of_range", "name", f"'{campaign.name}' {LIKE_AN_ID}.")


def _path(values: Any, location: Iterable[str | int]) -> KeyPath:
    """Turn pydantic's location of an error into the path of a value by dropping the names of union members."""
    path: list[str | int] = []
    for part in location:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):  # the name of a union member, or a missing key
            continue
        path.append(part)
    return tuple(path)


def _problem(path: KeyPath, details: list[Any]) -> Problem:
    name = dotted(path)
    if any(detail["type"] == "unexpected_keyword_argument" for detail in details):
        keys = [each.name for each in fields(ArmSource)]
        return Problem("unknown_key", name, f"unknown key.{did_you_mean(str(path[-1]), keys)}")
    missing = [detail for detail in details if detail["type"] in ("missing", "missing_argument")]
    if missing:
        return Problem("missing_value", name, f"{missing[0]['loc'][-1]!r} is missing.")
    # pydantic's remarks about parsing are dropped, because they mean nothing to the author of a file.
    told = (str(detail["msg"]).removeprefix("Input should be ").partition(", unable to parse")[0] for detail in details)
    wanted = " or ".join(dict.fromkeys(told))
    given = shortened(json.dumps(details[0]["input"], ensure_ascii=False, default=str))
    if details[0]["type"] == "string_pattern_mismatch":
        return Problem("out_of_range", name, f"must be {NAME_IN_WORDS}, not {given}.")
    if details[0]["type"] == "string_too_short":
        return Problem("out_of_range", name, "must not be empty.")
    is_type = str(details[0]["type"]).endswith(("_type", "_parsing", "_from_float"))
    return Problem("wrong_type" if is_type else "out_of_range", name, f"must be {wanted}, not {given}.")


def _location(found: CampaignFile, given: Mapping[str, Any], path: KeyPath) -> Location | None:
    if path and path[0] in given:
        return None
    above = (path[:end] for end in range(len(path), 0, -1))
    return next((found.locations[part] for part in above if part in found.locations), None)


def _parents(value: Any, file: Path) -> Iterator[Path]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        message = "must be a list of campaign files, such as [base]."
        raise Problems.one("wrong_type", "defaults", message, Location(file))
    for name in value:
        if name == "_self_":
            continue
        if "\0" in name:
            raise Problems.one(
                "missing_parent", "defaults", "a file name contains a null character; remove it.", Location(file)
            )
        path = file.parent / name
        yield path if path.suffix in SUFFIXES else path.with_name(f"{path.name}.yaml")


def _beside(arms: list[Any], file: Path) -> Iterator[Any]:
    """Yield the arms, with file names resolved relative to the campaign file that lists them."""
    for arm in arms:
        if isinstance(arm, str):
            yield str(file.parent / expanded(arm))
        elif isinstance(arm, dict) and isinstance(arm.get("config"), str):
            yield {**arm, "config": str(file.parent / expanded(arm["config"]))}
        else:
            yield arm
