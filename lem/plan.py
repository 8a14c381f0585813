"""The plan of one experiment: what its directory is there to hold. The worker starts from it alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from lem._version import VERSION
from lem.spec import Experiment

# History of spec.json's format:
# 1  first version
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PromptsInfo:
    """The prompts of the experiment, without their texts, which lie in prompts.jsonl."""

    count: int
    sha256: str
    source: str
    split: str | None
    column: str | None
    available: int
    dropped_empty: int


@dataclass(frozen=True)
class Plan:
    """What is to be run: the checked configuration, the prompts, and how many processes share them."""

    experiment_id: str
    created_at: str
    experiment: Experiment
    prompts: PromptsInfo
    processes: int = 1
    overrides: tuple[str, ...] = ()
    config_file: str | None = None
    lem_version: str = VERSION
    format_version: int = field(default=FORMAT_VERSION)


def timestamp(now: datetime | None = None) -> str:
    """Return a moment as ISO 8601 with the local offset, to the second: a label, never a measurement."""
    return (now or datetime.now()).astimezone().isoformat(timespec="seconds")
