"""`lem config new`: writes a config file that shows every value of the schema, most of them commented out.

A `Draft` holds the values to set: either the few that people change first, or the answers to questions on a terminal.
Each commented-out value is already in effect, so removing the `#` before any of these values changes nothing. This
module does not handle inheritance.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from lem.cli.draft import WIDTH, Draft, first_draft
from lem.config import file_schema
from lem.config.file_schema import type_words
from lem.config.inventory import summaries
from lem.config.options import CUSTOM, SUFFIXES, Options
from lem.config.yamltext import flow
from lem.errors import ConfigError, Interrupted
from lem.spec.campaign import Campaign
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Experiment
from lem.spec.schema import GROUPS, Leaf, leaves

DEFAULT_FILE = Path("experiment.yaml")
HEAD = """\
{editor}
# A lem experiment: lem config validate checks it, lem experiment runs it.
# A value after # is in effect; to change it, delete its # and its group's #."""


def render(draft: Draft) -> str:
    """Return the text of the config file."""
    values = draft.effective()
    preset = draft.choices.get("preset")
    lines = [HEAD.format(editor=file_schema.EDITOR_LINE), ""]
    lines += _comment("A preset to start from; values set in this file replace the preset's.")
    lines += [*_option_lines(draft, "preset"), f"preset: {flow(preset)}" if preset else "#preset: null", ""]
    for item in leaves():
        if "." not in item.path:
            lines += _value_lines(draft, item, values[item.path])
    for part in dict.fromkeys(item.path.partition(".")[0] for item in leaves() if "." in item.path):
        lines += _part_lines(draft, part, values[part])
    return "\n".join(lines) + "\n"


def _part_lines(draft: Draft, part: str, values: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a section: its purpose and its values."""
    kind = BACKENDS[values["name"]] if part == "backend" else get_type_hints(Experiment)[part]
    own = [item for item in leaves(kind, f"{part}.") if item.path != f"{part}.name"]
    is_set = part in draft.choices or any(path.startswith(f"{part}.") for path in draft.values)
    yield f"# {part} ".ljust(WIDTH, "-")
    yield from _comment(str(kind.__doc__).splitlines()[0])
    yield f"{'' if is_set else '#'}{part}:"
    if part in GROUPS:
        yield from _option_lines(draft, part, "  ")
        name = values["path"] if part == "dataset" and values["name"] == CUSTOM else values["name"]
        yield f"  {'' if part in draft.choices else '#'}name: {flow(draft.choices.get(part, name))}"
        yield ""
    opened = ""
    for item in own:
        *outer, last = item.path.removeprefix(f"{part}.").split(".")
        if outer and outer[0] != opened:
            opened = outer[0]
            yield f"  #{opened}:"
        holder = values[outer[0]] if outer else values
        yield from _value_lines(draft, item, holder[last], "  " * (1 + len(outer)))
    if part == "backend":
        yield from _other_backends(values["name"])


def _option_lines(draft: Draft, group: str, indent: str = "") -> Iterator[str]:
    """Yield the options of a group and their purposes as comment lines."""
    options = [option for option in summaries(group, draft.options) if (group, option.name) != ("dataset", CUSTOM)]
    width = max(len(option.name) for option in options)
    for option in options:
        yield f"{indent}#   {option.name.ljust(width)}  {option.purpose}".rstrip()
    if group == "dataset":
        yield f"{indent}#   or a hub id (owner/name), or a local file"


def _value_lines(draft: Draft, item: Leaf, value: Any, indent: str = "") -> Iterator[str]:
    by_preset = f"; set by {draft.choices['preset']}" if item.path in draft.preset_values() else ""
    yield from _comment(item.description, indent)
    yield from _comment(f"[{type_words(item)}; default {flow(item.default)}{by_preset}]", indent)
    name = item.path.rpartition(".")[2]
    # A value that the draft sets is written as it was given, because it may be an interpolation.
    given = item.path in draft.values
    yield f"{indent}{name}: {flow(draft.values[item.path])}" if given else f"{indent}#{name}: {flow(value)}"
    yield ""


def _other_backends(chosen: str) -> Iterator[str]:
    """Yield the values of the other backends, as comments only, since they cannot be set with the chosen backend."""
    for name, backend in BACKENDS.items():
        if name == chosen:
            continue
        yield from _comment(f"With name: {name}, the section has these values instead:", "  ")
        for item in leaves(backend):
            if item.path != "name":
                about = f"- {item.path}: {item.description} [{type_words(item)}; default {flow(item.default)}]"
                yield from _comment(about, "  ", "  ")
        yield ""


def _comment(text: str, indent: str = "", hanging: str = "") -> Iterator[str]:
    start = f"{indent}# "
    yield from textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=start + hanging, break_on_hyphens=False
    )


def new(file: Path | None, *, preset: str | None, yes: bool, force: bool, config_dir: Path | None = None) -> int:
    """Write a new config file, or print it; return the exit code.

    Args:
        file: the file to write; None means experiment.yaml on a terminal, and otherwise standard output.
        preset: the preset to start from.
        yes: ask no questions.
        force: replace an existing file.
        config_dir: a directory with the user's own options.

    Raises:
        ConfigError: there is no such preset, or the file or the JSON Schema beside it cannot be written.
        Interrupted: the user quit; nothing has been written.
    """
    file = DEFAULT_FILE if file is None and sys.stdout.isatty() else file
    options = Options.find(config_dir, file)
    if preset is not None and not options.get("preset", preset):
        raise ConfigError(f"--preset: {options.unknown('preset', preset)}")
    can_ask = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    if file is not None:
        _check_target(file, replaceable=force or can_ask)
    draft = _asked(options, preset, file, force) if can_ask else first_draft(options, preset)
    if draft is None:
        print("Nothing was written.")
    elif file is None:
        print(render(draft), end="")
    else:
        _write(draft, file)
    return 0


CAMPAIGN_HEAD = """\
# A lem campaign: lem config validate checks it, lem campaign runs it.
# A value after # is in effect; to change it, delete its #."""
CAMPAIGN_ARMS = ("first.yaml", "second.yaml")


def new_campaign(file: Path | None, *, force: bool) -> int:
    """Write a commented template of a campaign file, or print it; return the exit code.

    Raises:
        ConfigError: the file cannot be written.
    """
    lines = [CAMPAIGN_HEAD, ""]
    lines += _comment(
        "Configurations to compare: config files relative to this one, or mappings such as {config: second.yaml, "
        "name: large batches, overrides: [batching.batch_size=16]}."
    )
    lines += [f"arms: {flow(list(CAMPAIGN_ARMS))}", ""]
    for item in leaves(Campaign):
        if "." not in item.path:  # not a key of an arm
            default = list(item.default) if isinstance(item.default, tuple) else item.default
            lines += _comment(item.description)
            lines += _comment(f"[{type_words(item)}; default {flow(default)}]")
            lines += [f"#{item.path}: {flow(default)}", ""]
    text = "\n".join(lines)
    if file is None:
        print(text, end="")
        return 0
    _check_target(file, replaceable=force)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: the file cannot be written: {error.strerror}.") from None
    print(f"Wrote {file}. List the config files of your arms in it, then run lem campaign {file}.")
    return 0


def _check_target(file: Path, *, replaceable: bool) -> None:
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"{file}: a config file's name must end in {' or '.join(SUFFIXES)}.")
    if file.is_dir():
        raise ConfigError(f"{file} is a directory; give the name of a file.")
    if file.exists() and not replaceable:
        raise ConfigError(f"{file} already exists; use --force to replace it.")


def _asked(options: Options, preset: str | None, file: Path | None, force: bool) -> Draft | None:
    """Return a draft with the user's answers, or None if the user decides not to write the file."""
    from lem.cli import interview

    try:
        if file is not None and file.exists() and not force and not interview.agrees(f"{file} exists. Replace it?"):
            return None
        draft = interview.ask_all(options, preset)
        return draft if interview.is_content(draft) else None
    except (KeyboardInterrupt, EOFError):
        raise Interrupted("Nothing was written.") from None


def _write(draft: Draft, file: Path) -> None:
    text = render(draft)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file_schema.write_beside(file, draft.options)
    except OSError as error:
        raise ConfigError(f"{file}: the file cannot be written: {error.strerror}.") from None
    print(f"Wrote {file} and, beside it, {file_schema.SCHEMA_FILE}, which lets editors check and complete the file.")
    print(f"Check it with lem config validate {file}, and run it with lem experiment {file}.")
