"""Wraps prompts in a model's chat template, and checks that the result contains the prompt.

Some templates expect a message's content as text, others as a list of parts. Given the wrong form, a template may drop
the content without an error, so that every prompt becomes the same few tokens.
"""

from __future__ import annotations

import html
import json
from typing import Any

from lem.backends.engine import reason_of
from lem.errors import RunError

PROBE = "Which of the 7 seas is the deepest?"


def rendered(tokenizer: Any, text: str) -> str:
    """Return a prompt wrapped as the first turn of a conversation, followed by the text that opens the model's answer.

    Raises:
        RunError: the template fails, or its result does not contain the prompt.
    """
    reason = ""
    for content in (text, [{"type": "text", "text": text}]):
        turns = [{"role": "user", "content": content}]
        try:
            found = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may raise anything
            reason = reason or f"fails: {reason_of(error)}"
            continue
        # A template that expects text would print a list of parts as a Python list.
        if isinstance(found, str) and _holds(found, text) and "'type': 'text'" not in found.replace(text, ""):
            return found
    raise RunError(f"The model's chat template {reason or 'leaves out the prompt.'}")


def _holds(found: str, text: str) -> bool:
    """Return whether a rendered text contains the prompt, possibly trimmed, or escaped as in JSON or HTML."""
    core = text.strip()
    forms = (core, json.dumps(core)[1:-1], json.dumps(core, ensure_ascii=False)[1:-1])
    return any(form in found for form in forms) or core in html.unescape(found)


def problem_of(tokenizer: Any) -> str | None:
    """Return a sentence that says why a tokenizer's chat template fails, or None if the template works."""
    try:
        rendered(tokenizer, PROBE)
    except RunError as error:
        return str(error)
    return None
