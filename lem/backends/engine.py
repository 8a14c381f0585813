"""What engines and servers say, in the words of records and messages: errors as sentences, settings as text."""

from __future__ import annotations

import sys
import time
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


# Less is the time between two readings.
SAME_CLOCK_NS = 1_000_000


def clock_offset_ns() -> int:
    """Return what is to be added to the engine's clock, `time.monotonic`, for `time.perf_counter`: 0 on Linux."""
    before_ns = time.perf_counter_ns()
    engine_ns = time.monotonic_ns()
    offset_ns = (before_ns + time.perf_counter_ns()) // 2 - engine_ns
    return offset_ns if abs(offset_ns) > SAME_CLOCK_NS else 0


def compiled_graphs() -> int:
    """Return how many graphs this process has compiled so far with torch.compile, by whoever asked for it."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0
