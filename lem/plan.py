"""The plan of one experiment: what its directory is there to hold. The worker starts from it alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from lem._version import VERSION
from lem.spec import Experiment

# History of spec.json's format:
# 1  first version
# 2  replicas, shared_with and the configuration's digest
# 3  the digest of a trace's arrivals, which lie in arrivals.json
FORMAT_VERSION = 3


def sha256_of(texts: Iterable[str]) -> str:
    """Return the digest of prompts in order; equal digests mean equal prompts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


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
    """What is to be run: the checked configuration, the prompts, and how many processes share them.

    `replicas` is the number of shares of the prompts: the processes of one replica run the same prompts together
    (tensor parallelism). `shared_with` counts the other runs that were meant to be on this machine at the same time.
    `arrivals_sha256` is the digest of a trace's arrivals, as arrivals.json holds them; empty without such a file.
    """

    experiment_id: str
    created_at: str
    experiment: Experiment
    prompts: PromptsInfo
    config_sha256: str = ""
    processes: int = 1
    replicas: int = 1
    shared_with: int = 0
    overrides: tuple[str, ...] = ()
    config_file: str | None = None
    arrivals_sha256: str = ""
    lem_version: str = VERSION
    format_version: int = field(default=FORMAT_VERSION)

    def share(self, rank: int) -> range:
        """Return the positions of the prompts that a process runs."""
        return range(rank // (self.processes // self.replicas), self.prompts.count, self.replicas)

    def counts(self, rank: int) -> bool:
        """Tell whether the process counts its prompts: of those that run the same ones, the first does."""
        return rank % (self.processes // self.replicas) == 0

    @property
    def fingerprint(self) -> str:
        """Return what makes two experiments the same: configuration, prompts in order, arrivals of a trace."""
        digests = (self.config_sha256, self.prompts.sha256, self.arrivals_sha256)
        return "-".join(digest[:16] for digest in digests if digest)


def process_counts(experiment: Experiment) -> tuple[int, int]:
    """Return how many processes an experiment starts, and how many shares of the prompts they have."""
    strategy, degree = experiment.parallelism.strategy, experiment.parallelism.degree
    if strategy == "tensor_parallel" and not experiment.backend.spreads_a_model_itself:
        return degree, 1
    if strategy == "data_parallel":
        return degree, degree
    return experiment.num_processes, experiment.num_processes


def timestamp(now: datetime | None = None) -> str:
    """Return a moment as ISO 8601 with the local offset, to the second: a label, never a measurement."""
    return (now or datetime.now()).astimezone().isoformat(timespec="seconds")
