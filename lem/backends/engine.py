"""Helpers shared by several engines: error messages, settings as text, the clock, and warnings for records."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lem.errors import Interrupted, RunError
from lem.record import CodedWarning
from lem.spec.experiment import Experiment
from lem.warning_codes import warning
from lem.workload.weights import Fit, summary

# Maximum length of a reason, in characters.
LONGEST_REASON = 400
# A smaller offset between two clocks counts as zero, because the time between the two readings explains it.
SAME_CLOCK_NS = 1_000_000


# ------------------------------------------------------------------ errors
def sentence(text: str) -> str:
    """Return a string as one line that ends like a sentence; anything beyond `LONGEST_REASON` characters is cut."""
    text = " ".join(text.split()) or "no reason is given"
    if len(text) > LONGEST_REASON:
        space = text.rfind(" ", 0, LONGEST_REASON)
        text = f"{text[: space if space > LONGEST_REASON // 2 else LONGEST_REASON]} …"
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."


def reason_of(error: BaseException) -> str:
    """Return an error as a one-line message, without the details that pydantic and PyTorch add for developers."""
    errors = getattr(error, "errors", None)
    details = errors() if callable(errors) else ()
    text = str(details[0]["msg"]).removeprefix("Value error, ") if details else str(error)
    return sentence(text if text.strip() else type(error).__name__)


@contextmanager
def failing_as(beginning: str, hint: Callable[[BaseException], str] = lambda _: "") -> Iterator[None]:
    """Turn an error in the block into a `RunError`.

    Its message is one line: `beginning`, the reason for the error, and the remedy that `hint` returns for the error.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        raise RunError(f"{beginning}: {reason_of(error)}{hint(error)}") from error


@dataclass(frozen=True)
class MemoryHint:
    """The remedy for out-of-memory errors, which are recognized by certain words in their messages."""

    words: Sequence[str]
    remedy: str

    def __call__(self, error: BaseException) -> str:
        """Return the remedy, with a leading space, if the error is about memory; otherwise an empty string."""
        text = " ".join(str(error).lower().split())
        return f" {self.remedy}" if any(each in text for each in self.words) else ""


# ------------------------------------------------------------------ clock and compiler
def clock_offset_ns() -> int:
    """Return what to add to `time.monotonic`, the engine's clock, to get `time.perf_counter`, in ns; 0 on Linux."""
    before_ns = time.perf_counter_ns()
    engine_ns = time.monotonic_ns()
    offset_ns = (before_ns + time.perf_counter_ns()) // 2 - engine_ns
    return offset_ns if abs(offset_ns) > SAME_CLOCK_NS else 0


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has compiled in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


# ------------------------------------------------------------------ for the record
def as_text(setting: Any) -> str:
    """Return a setting as text: enumeration members by name, PyTorch dtypes without their prefix."""
    if setting is None:
        return "none"
    if isinstance(setting, bool):
        return "on" if setting else "off"
    return str(getattr(setting, "name", setting)).removeprefix("torch.")


def prompt_settings(experiment: Experiment, end_tokens: frozenset[int]) -> dict[str, str]:
    """Return the settings for prompts: the token ids that end an output, and whether a chat template is used."""
    return {
        "end_token_ids": ",".join(map(str, sorted(end_tokens))) or "none",
        "chat_template": as_text(experiment.chat_template),
    }


def sum_if_known(sizes: Sequence[int | None]) -> int | None:
    """Return the sum of the sizes, or None if any of them is unknown."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def weights_warnings(name: str, are_random: bool) -> Iterator[CodedWarning]:
    """Warn if the model's weights are random."""
    if are_random:
        yield warning("random_weights", f"{name} has random weights, so its output is meaningless.")


def fit_warnings(name: str, fit: Fit) -> Iterator[CodedWarning]:
    """Warn about weights that the checkpoint lacks and about weights that the model does not use."""
    if fit.missing:
        text = f"{name} lacks weights, which were initialized at random: {summary(fit.missing)}."
        yield warning("random_weights", text)
    if fit.unexpected:
        yield warning("unused_weights", f"{name} has weights that the model does not use: {summary(fit.unexpected)}.")


def counter_warnings(counters: Mapping[str, float] | None) -> Iterator[CodedWarning]:
    """Warn if the engine did less work (cache hits) or more work (preemptions) than the token counts suggest."""
    counters = counters or {}
    if hits := counters.get("prefix_cache_hit_tokens"):
        share = hits / counters["prefix_cache_queried_tokens"]
        yield warning("prefix_cached", f"{hits:.0f} input tokens ({share:.0%}) came from the prefix cache.")
    if preemptions := counters.get("preemptions"):
        yield warning("preempted", f"preemptions of requests for lack of cache space: {preemptions:.0f}.")


def compilation_warnings(graphs: int) -> Iterator[CodedWarning]:
    """Warn if graphs were compiled inside the window."""
    if graphs:
        yield warning("compiled_in_window", f"graphs that were compiled in the window: {graphs}.")
