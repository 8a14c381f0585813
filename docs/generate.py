"""Generates the reference pages from the schema, the records, the warnings, the rules, the backends and the commands.

Run `python docs/generate.py` to update the pages. A test fails if a page is stale.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from lem.cli.commands import all_commands
from lem.config.inventory import summaries
from lem.config.layers import default_choices
from lem.record import RequestRecord
from lem.results.parquet import Column, columns
from lem.results.schema import CycleRow, ExperimentRow
from lem.spec.engines import BACKENDS
from lem.spec.rules import EXPERIMENT_RULES, FILE_RULES, Rule
from lem.spec.schema import GROUPS, Leaf, leaves
from lem.warning_codes import WARNINGS

# The tests define the features that a backend may support, and state which features have been tested.
sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.backends.confirmations import confirmation
from tests.backends.features import FEATURES, Feature, support
from tests.hosts import IDEAL

REFERENCE = Path(__file__).parent / "reference"
GENERATED = "<!-- Made by docs/generate.py; do not edit. -->\n"


def pages() -> dict[Path, str]:
    """Return the content of each generated page, by path."""
    return {
        REFERENCE / "configuration.md": GENERATED + configuration(),
        REFERENCE / "results.md": GENERATED + results(),
        REFERENCE / "cli.md": GENERATED + command_line(),
        REFERENCE / "warnings.md": GENERATED + warnings(),
        REFERENCE / "rules.md": GENERATED + rules(),
        REFERENCE / "support.md": GENERATED + support_matrix(),
    }


# ------------------------------------------------------------------ configuration
def configuration() -> str:
    """Return the page that describes every configuration value."""
    parts = [
        "# Configuration\n",
        "You can set each value below in a config file (as nested YAML) or on the command line as an override "
        "(`batching.batch_size=4`). A value that nothing sets has the default shown here. A chosen option can set "
        "values, too: for example, `dataset=gsm8k` sets `dataset.path`. See [configuring](../how-to/configuring.md) "
        "for files, presets and precedence.\n",
    ]
    own = [leaf for leaf in leaves() if "." not in leaf.path]
    parts += ["## Experiment\n", _values_table(own)]
    for group in dict.fromkeys(leaf.path.split(".")[0] for leaf in leaves() if "." in leaf.path):
        parts += list(_group_section(group))
    parts += ["## preset\n", _choice("preset"), _choices_table("preset")]
    return "\n".join(parts)


def _group_section(group: str) -> Iterator[str]:
    yield f"## {group}\n"
    if group in GROUPS:
        yield _choice(group)
        yield _choices_table(group)
    if group == "backend":
        for name, backend in BACKENDS.items():
            yield f"### {name}\n"
            # A backend's summary may say, after its first sentence, what null means for all of its options.
            if note := str(backend.__doc__).splitlines()[0].partition(". ")[2]:
                yield f"{note}\n"
            yield _values_table(list(leaves(backend, f"{group}.")))
    else:
        yield _values_table([leaf for leaf in leaves() if leaf.path.startswith(f"{group}.")])


def _choice(group: str) -> str:
    default = default_choices().get(group)
    return (
        f"Choose one with `{group}=<name>`, or `{group}: <name>` in a file. "
        f"Default: {f'`{default}`' if default else 'none'}.\n"
    )


def _choices_table(group: str) -> str:
    rows = [f"| `{choice.name}` | {choice.purpose} |" for choice in summaries(group)]
    return "\n".join([f"| {group} | purpose |", "|---|---|", *rows]) + "\n"


def _values_table(values: list[Leaf]) -> str:
    rows = [
        f"| `{leaf.path}` | {_type(leaf.annotation)} | {_default(leaf)} | {_cell(leaf.description)} |"
        for leaf in values
    ]
    return "\n".join(["| value | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _type(annotation: Any) -> str:
    constraints = ""
    if get_origin(annotation) is Annotated:
        annotation, info = get_args(annotation)
        constraints = "".join(f", {_constraint(item)}" for item in info.metadata if _constraint(item))
    if get_origin(annotation) is Literal:
        return _cell(" | ".join(f"`{value}`" for value in get_args(annotation)))
    if get_origin(annotation) in (Union, types.UnionType):
        names = ["null" if member is type(None) else member.__name__ for member in get_args(annotation)]
        return _cell(" | ".join(names)) + constraints
    return f"{annotation.__name__}{constraints}"


def _constraint(item: Any) -> str:
    for name, symbol in {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}.items():
        if hasattr(item, name):
            return f"{symbol} {getattr(item, name)}"
    return ""


def _default(leaf: Leaf) -> str:
    plain = leaf.default is None or isinstance(leaf.default, bool)
    text = f"`{json.dumps(leaf.default) if plain else leaf.default}`"
    return f"`${leaf.env}`, else {text}" if leaf.env else text


# ------------------------------------------------------------------ results
def results() -> str:
    """Return the page that describes the columns of the tables."""
    return "\n".join(
        [
            "# Results\n",
            "The units are in the names of the columns and in the Arrow metadata of the files "
            "(`pyarrow.parquet.read_schema(file).field(name).metadata`). A number that was not measured is null. "
            "[Reading results](../how-to/results.md) describes the files.\n",
            "## Table `experiments`\n",
            f"One row per experiment. {_about_means()}\n",
            _columns_table(ExperimentRow),
            "## Table `cycles`\n",
            "One row per cycle.\n",
            _columns_table(CycleRow),
            "## Table `requests`\n",
            "One row per request of the measured window. The times `start_s`, `end_s` and `arrived_s` are counted from "
            "the opening of the window.\n",
            _columns_table(RequestRecord),
        ]
    )


def _about_means() -> str:
    """Return the second paragraph of the row's docstring, which says what the columns mean with several cycles."""
    return " ".join(str(inspect.getdoc(ExperimentRow)).split("\n\n")[1].split())


def _columns_table(record_type: type[Any]) -> str:
    rows = [
        f"| `{c.name}` | {_column_type(c)} | {_cell(c.unit or '')} | {_cell(c.description or '')} |"
        for c in columns(record_type)
    ]
    return "\n".join(["| column | type | unit | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _column_type(column: Column) -> str:
    (of,) = get_args(column.python_type) or (None,)
    name = f"list of {of.__name__}" if of else column.python_type.__name__
    return name + (" or null" if column.nullable else "")


# ------------------------------------------------------------------ warnings
WHERE_WARNINGS_APPEAR = """\
A warning is a reason to doubt a number. The warnings of an experiment are stored in the column `warnings` of its row,
as `code: message`, and `lem results show` prints them. If a code begins with `campaign_` or `schedule_`, the warning
concerns a campaign or schedule as a whole, and `lem results show` prints it with the answer. If a code begins with
`compare_`, the warning concerns a comparison, and `lem results compare` prints it. The codes are stable across
versions.
"""


def warnings() -> str:
    """Return the page that explains each warning and its remedy."""
    rows = [f"| `{code}` | {_cell(kind.meaning)} | {_cell(kind.remedy)} |" for code, kind in WARNINGS.items()]
    return "\n".join(
        [
            "# Warnings\n",
            WHERE_WARNINGS_APPEAR,
            "| code | meaning | remedy |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


# ------------------------------------------------------------------ rules
SEVERITIES = """\
Before anything runs, `lem` checks the configuration against these rules. If config files or overrides contain errors,
`lem` reports all of these errors at once; otherwise, it reports all violations of the rules on experiments.

If an experiment breaks a rule, the message begins with the path of an option and gives the code of the rule, as in
`decoder.temperature: it would have no effect … [no_effect_sampling]`. In the tables, "this option" is the option that
the message names. If a config file breaks a rule, the message begins with the file and the line; only
`lem config validate` gives the code. The codes are stable across versions.

| severity | effect |
|---|---|
| impossible | The experiment does not run, not even with `--force`. |
| inadvisable | The experiment runs only with `--force`. |
| warning | The experiment runs, and the message is shown. |

Each rule has a scope:

| scope | what the rule checks |
|---|---|
| options | The configuration only. |
| machine | The configuration together with the machine (devices, packages, programs, environment) and the server. |
| files | The configuration together with the model, the prompts, the results directory or the config file. |
"""


def rules() -> str:
    """Return the page on the rules by which experiments are refused or warned about."""
    return "\n".join(
        [
            "# Rules\n",
            SEVERITIES,
            "## Experiments\n",
            _rules_table(EXPERIMENT_RULES),
            "## Config files\n",
            _rules_table(FILE_RULES),
        ]
    )


def _rules_table(catalog: dict[str, Rule]) -> str:
    rows = [
        f'| <a id="{code}"></a>`{code}` | {rule.severity} | {rule.scope} '
        f"| {_cell(rule.meaning)} | {_cell(rule.remedy)} |"
        for code, rule in catalog.items()
    ]
    return "\n".join(["| code | severity | scope | problem | remedy |", "|---|---|---|---|---|", *rows]) + "\n"


# ------------------------------------------------------------------ what each backend can do
ANSWERS = """\
The tables show which features each backend would accept on a machine with eight modern NVIDIA GPUs and all packages
installed, and how each feature was tested. If your machine lacks something that an experiment needs, `lem` reports what
is missing before the run.

| answer | meaning |
|---|---|
| **tested** | Supported; a test runs the feature and checks its effect. |
| configured | Supported; a test checks that the option reaches the engine's configuration, but runs no engine. |
| stand-in | Supported, according to the backend; a test runs the feature on a stand-in for the engine. |
| not run | Supported, according to the backend; no test runs the feature. |
| no: `rule` | Not supported; the named [rule](rules.md) refuses the option or, if inadvisable, demands `--force`. |
| no effect: `rule` | The option is accepted, with the named rule's warning, but has no effect. |
| no | The backend does not provide this, and any columns for it are null. |
| – | The backend has no such option. |

All of these tests run on a CPU; no feature has been tested on a GPU.
"""


def support_matrix() -> str:
    """Return the page on which features each backend has, and how each feature is tested."""
    parts = ["# What each backend can do\n", ANSWERS]
    for group, members in FEATURES.items():
        parts += [f"## {group}\n", _support_table(members)]
    return "\n".join(parts)


def _support_table(members: tuple[Feature, ...]) -> str:
    rows = [
        f"| {each.name} | {_cell(each.meaning)} | {_asked_for_by(each)} | {' | '.join(map(_answer(each), BACKENDS))} |"
        for each in members
    ]
    head = f"| feature | meaning | requested by | {' | '.join(BACKENDS)} |"
    return "\n".join([head, "|---" * (3 + len(BACKENDS)) + "|", *rows]) + "\n"


def _asked_for_by(feature: Feature) -> str:
    ways = {tuple(feature.overrides(backend)) for backend in feature.own or BACKENDS}
    return "; or ".join(" ".join(f"`{_cell(each)}`" for each in way) for way in sorted(ways)) or "default"


def _answer(feature: Feature) -> Callable[[str], str]:
    def of(backend: str) -> str:
        found = support(feature, backend, IDEAL)
        if found.answer == "yes":
            how = confirmation(feature, backend)
            return f"**{how}**" if how == "tested" else how
        rules = ", ".join(f"[`{code}`](rules.md#{code})" for code in found.codes)
        return "–" if found.answer == "no option" else found.answer + (f": {rules}" if rules else "")

    return of


# ------------------------------------------------------------------ command line
def command_line() -> str:
    """Return the page on the commands and their options."""
    root = typer.main.get_command(all_commands())
    parts = ["# Command line\n", f"{root.help}\n"]
    parts += ["## lem\n", "Options before the command, as in `lem --verbose experiment`:\n"]
    parts += [_options_table(root)]
    for path, command in _commands(root, ("lem",)):
        parts += [f"## {' '.join(path)}\n", f"{command.help}\n", _options_table(command)]
    return "\n".join(parts)


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from _commands(child, (*path, name))


def _options_table(command: Any) -> str:
    rows = []
    for parameter in command.params:
        # The options --install-completion and --show-completion come from typer.
        if getattr(parameter, "hidden", False) or parameter.name.endswith("_completion"):
            continue
        if parameter.param_type_name == "argument":
            rows.append(f"| `{_cell(parameter.metavar or parameter.name)}` | {_cell(parameter.help or '')} |")
        else:
            names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
            value = f" `{_cell(parameter.metavar)}`" if parameter.metavar else ""
            is_said = parameter.default is None or isinstance(parameter.default, bool)
            default = "" if is_said else f" Default: {parameter.default}."
            rows.append(f"| {names}{value} | {_cell(parameter.help or '')}{default} |")
    if not rows:
        return ""
    return "\n".join(["| option | meaning |", "|---|---|", *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    """Write the pages."""
    for path, content in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
