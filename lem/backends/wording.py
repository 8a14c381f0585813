"""What engines and servers say, in the words of records and messages: errors as sentences, settings as text."""

from __future__ import annotations

from typing import Any

LONGEST_REASON = 400


def sentence(text: str) -> str:
    """Return a text in one line, not too long, with a full stop."""
    text = " ".join(text.split()) or "nothing is said about it"
    if len(text) > LONGEST_REASON:
        text = text[: text.rfind(" ", 0, LONGEST_REASON)] + " …"
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."


def reason_of(error: BaseException) -> str:
    """Return an error as a sentence: what pydantic or PyTorch say around it is for developers."""
    errors = getattr(error, "errors", None)
    details = errors() if callable(errors) else ()
    text = str(details[0]["msg"]).removeprefix("Value error, ") if details else str(error)
    return sentence(text if text.strip() else type(error).__name__)


def as_text(setting: Any) -> str:
    """Return a setting as text: an enumeration's member by its name, without PyTorch's prefix."""
    if setting is None:
        return "none"
    if isinstance(setting, bool):
        return "on" if setting else "off"
    return str(getattr(setting, "name", setting)).removeprefix("torch.")
