"""The questions that `lem config new` asks on a terminal; each answer is immediately checked against the schema.

Help texts and choices come from the schema and from conf/. This module does not know how the file is written.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any, Literal, get_args, get_origin

import questionary

from lem.cli.draft import DATASET, FIRST, MODEL, SAMPLE_SIZE, WIDTH, Draft
from lem.config.check import examine
from lem.config.file_schema import type_words
from lem.config.inventory import summaries
from lem.config.options import CUSTOM, Options
from lem.config.overrides import choice_of
from lem.config.userfile import UserFile
from lem.machine import host
from lem.spec.schema import Leaf, leaf
from lem.studies.grid import judge

# Suggestions for values that have no default.
SUGGESTIONS = {"model": MODEL, "dataset.sample_size": SAMPLE_SIZE, "batching.max_tokens_per_batch": 8192}
VALUES = ("dataset.sample_size", "fp_precision", "max_output_tokens", "batching.strategy", "batching.batch_size")
ELSEWHERE = "a hub id or a local file"


def ask_all(options: Options, preset: str | None) -> Draft:
    """Ask all questions and return the answers; KeyboardInterrupt or EOFError means that the user quit."""
    draft = _value(Draft(options), "model")
    draft = draft.choose("preset", preset) if preset else _option(draft, "preset")
    draft = _dataset(_option(draft, "backend"))
    for path in VALUES:
        draft = _value(draft, path)
    if draft.at("batching.strategy").endswith("dynamic"):
        draft = _value(draft, "batching.max_tokens_per_batch")
    draft = _option(_option(draft, "decoder"), "energy")
    return _value(draft, "energy.country_iso_code")


def agrees(question: str) -> bool:
    """Ask a yes-or-no question; the default answer is no."""
    return bool(questionary.confirm(question, default=False).unsafe_ask())


def is_content(draft: Draft) -> bool:
    """Return whether to write the draft; if its configuration cannot run here, print the reasons and ask the user."""
    chosen = {group: choice_of(group, name, draft.options) for group, name in draft.choices.items()}
    problems = judge(UserFile(draft.options), {**chosen, **draft.values}, host.look())
    for problem in problems:
        print(problem)
    return not problems or agrees("This configuration cannot run on this machine. Write it anyway?")


def _option(draft: Draft, group: str) -> Draft:
    """Ask for an option of a group; the default is the option currently in effect."""
    found = [questionary.Choice(f"{c.name}: {c.purpose}", c.name) for c in summaries(group, draft.options)]
    if group == "preset":
        found.insert(0, questionary.Choice("none", ""))
    default = "" if group == "preset" else str(draft.at(f"{group}.name"))
    print()
    answer = str(questionary.select(f"{group.capitalize()}:", found, default=default).unsafe_ask())
    return draft if answer == default else draft.choose(group, answer)


def _dataset(draft: Draft) -> Draft:
    named = (c for c in summaries("dataset", draft.options) if c.name != CUSTOM)
    found = [questionary.Choice(f"{c.name}: {c.purpose}", c.name) for c in named]
    found.append(questionary.Choice(ELSEWHERE, CUSTOM))
    print()
    answer = str(questionary.select("Dataset:", found, default=DATASET).unsafe_ask())
    if answer == CUSTOM:

        def known(text: str) -> bool | str:
            found = draft.options.get("dataset", text.strip()) or draft.options.is_source(text.strip())
            return bool(found) or f"dataset: {draft.options.unknown('dataset', text.strip())}"

        answer = str(questionary.text("Hub id (owner/name) or local file:", validate=known).unsafe_ask()).strip()
    return draft.choose("dataset", answer)


def _value(draft: Draft, path: str) -> Draft:
    """Ask for a value; set it if it differs from the value in effect, or if every new file sets it."""
    item, now = leaf(path), draft.at(path)
    print(f"\n{textwrap.fill(item.description, WIDTH, break_on_hyphens=False)}")
    names = _names(item)
    answer = questionary.select(f"{path}:", names, default=now).unsafe_ask() if names else _typed(draft, item, now)
    stays = path in FIRST and path not in draft.preset_values()
    return draft.set(path, answer) if stays or answer != now else draft


def _names(item: Leaf) -> list[str]:
    annotation = get_args(item.annotation)[0]
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []


def _typed(draft: Draft, item: Leaf, now: Any) -> Any:
    start = SUGGESTIONS.get(item.path) if now is None else now
    question = questionary.text(
        f"{item.path}:",
        default="" if start is None else str(start),
        instruction=f"({type_words(item).replace(' null', ' nothing')}) ",
        validate=lambda text: problem_with(draft, item, text) or True,
    )
    return parsed(item, question.unsafe_ask())


def parsed(item: Leaf, text: str) -> Any:
    """Convert typed text to a value; empty text becomes null if null is allowed."""
    text, words = text.strip(), type_words(item)
    if not text and words.endswith("null"):
        return None
    if words.startswith("text"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def problem_with(draft: Draft, item: Leaf, text: str) -> str:
    """Return a message that describes the problem with an answer, or an empty string if there is no problem."""
    value = parsed(item, text)
    if item.path == "model" and not value:
        return "An experiment needs a model."
    found = examine(draft.set(item.path, value).effective())[1]
    return next((problem.message.capitalize() for path, problem in found if ".".join(map(str, path)) == item.path), "")
