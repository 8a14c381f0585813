"""The interface of the inference backends.

A backend turns prompts into tokens, loads a model, generates, and reports exactly which tokens came out. It knows
nothing about energy, windows, datasets or results; `lem.runner.window` calls it between the edges of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.record import CodedWarning, EngineInfo, FinishReason, Memory, ModelInfo
from lem.spec.experiment import Experiment
from lem.spec.rules import Objection
from lem.workload.flops import Architecture
from lem.workload.models import Model
from lem.workload.tokens import Chunk
from lem.workload.traffic import Arrivals, in_turn

T = TypeVar("T")

# What a backend may report: `Generation.token_ids`, `model_info`, `Generation.prefill_end_ns`, `architecture`,
# `Memory.kv_cache_bytes`, `counters`.
Reported = Literal["tokens", "model", "prefill", "flops", "kv_cache", "counters"]


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids; `index` is its position among the experiment's prompts."""

    index: int
    token_ids: tuple[int, ...]
    truncated: bool = False


@dataclass(frozen=True)
class Generation:
    """The output for one prompt; times are readings of `time.perf_counter_ns`.

    `token_ids` ends with the end token if one was generated and holds nothing after it, and no padding; it is empty
    if the engine reports only the number of output tokens, `counted`. `arrived_ns` is when the request arrived, None
    if all prompts are there from the start (`Backend.generate`). `start_ns` is when the engine began on the request or,
    unless `start_is_known`, when the engine was given it or had room for it, whichever was later. `prefill_end_ns` is
    when the logits of the first token were ready, None if the engine does not report it. `chunks` holds the times of
    the tokens, if the experiment asks for streaming. `error` says why the request failed, None if it did not; a failed
    one has no tokens, and its `finish_reason` is error.
    """

    index: int
    batch: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    start_ns: int
    end_ns: int
    prefill_end_ns: int | None = None
    chunks: tuple[Chunk, ...] = ()
    arrived_ns: int | None = None
    start_is_known: bool = True
    counted: int | None = None
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        """Number of output tokens."""
        return len(self.token_ids) if self.counted is None else self.counted


@dataclass(frozen=True)
class Begun:
    """A request that an engine is working on.

    `since_ns` is when it began on it, or the earliest time at which it may have. `output_tokens` is None if the engine
    hands out no tokens before the last.
    """

    index: int
    since_ns: int
    output_tokens: int | None = None


def needed(loaded: T | None) -> T:
    """Return what `Backend.load` has made, for the methods that come after it."""
    assert loaded is not None, "load comes first"
    return loaded


class Backend(ABC):
    """One engine in the worker process.

    Contract, checked for each backend by `tests/backends/test_backends.py`: `start` and `load` come first, once;
    `generate` yields every prompt exactly once and can be called again; the same seed gives the same tokens, even if
    the first batches are left out; counts include neither padding nor anything after the end token. A method raises
    `RunError` when the engine fails or refuses something, with a message that names the engine and the reason.
    """

    reports: ClassVar[frozenset[Reported]] = frozenset()
    """What the backend reports; everything else is None, and null in the results."""

    local_rank: int = 0
    """This process's number among those of the node; set before `start`."""

    forced: bool = False
    """Whether the user has accepted what is inadvisable, such as missing weights; set before `load`."""

    log_folder: Path | None = None
    """Where a server that the backend starts writes its log; set before `start`."""

    @abstractmethod
    def __init__(self, experiment: Experiment) -> None:
        """Keep the experiment; nothing is loaded or imported yet."""

    @classmethod
    @abstractmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Return the backend's objections to the experiment on this host, without loading anything heavy.

        `model` is None when none was found; preflight has already objected to that.
        """

    @classmethod
    def about_key(cls, name: str) -> str | None:
        """Return a message about a key that is not an option of the backend but is or was one of its engine."""
        return None

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return whether the engine will run on a GPU of this host, as far as is known without importing it."""
        return False

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return the physical GPUs that all processes of the experiment use on this node; called after `start`.

        Only these are metered.
        """
        return ()

    def runs_elsewhere(self) -> bool:
        """Return whether another machine does the work, so that no meter on this one covers it."""
        return False

    def tolerated_failures(self, requests: int) -> int:
        """Return how many of a window's requests may fail before the run ends; most engines fail as a whole."""
        return 0

    def server_pids(self) -> Sequence[int]:
        """Return the engine's processes that lem did not start; called after `start`."""
        return ()

    def start(self) -> None:
        """Import the engine, so that no phase includes the time of the import."""

    @abstractmethod
    def load(self) -> None:
        """Load the model and everything needed to generate."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Turn prompts into token ids, in order: chat template and truncation included, padding not.

        Raises:
            RunError: a prompt has no tokens, or is too long for the model or the engine.
        """

    @abstractmethod
    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Seed the sampling, run the prompts, and yield those that finish together, batch by batch."""

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Run prompts as they arrive, and yield those that finish together, with their arrival times.

        The default runs batch after batch, from the prompts that are waiting when the engine becomes free; engines
        that accept prompts while they work override it.

        Args:
            arrivals: the requests and when they arrive.
            at_most: the size of a batch.
        """
        for number, (taken, part) in enumerate(in_turn(arrivals, at_most, self.generate)):
            at_ns = {each.request.index: each.at_ns for each in taken}
            yield [replace(g, batch=number, arrived_ns=at_ns[g.index]) for g in part]

    def under_way(self) -> Sequence[Begun]:
        """Return the requests that the engine is working on, between two batches that `generate` or `serve` yields.

        Requests that wait for their turn are not among them. The default is for engines whose batches finish together.
        """
        return ()

    def forget(self) -> None:
        """Drop what earlier prompts left behind, such as cached prefixes, and reset `counters`.

        Called before each measured window.
        """

    def synchronize(self) -> None:
        """Wait until the device has finished its work; does nothing for a synchronous engine."""

    def close(self) -> None:
        """Release the model and the device; may be called at any time, even if `load` failed."""

    def reset_peak_memory(self) -> None:
        """Reset the peak of `peak_memory`, if the engine can."""

    @abstractmethod
    def peak_memory(self) -> Memory:
        """Return the peak memory since the reset, or over the span named by its `scope`."""

    @abstractmethod
    def model_info(self) -> ModelInfo | None:
        """Describe the loaded model; None when no model runs."""

    @abstractmethod
    def engine_info(self) -> EngineInfo:
        """Describe the engine and the settings in effect."""

    def architecture(self) -> Architecture | None:
        """Return the sizes that decide the model's FLOPs, or None when the engine has no model to ask about.

        Raises:
            UnknownArchitecture: they are unknown, with the reason.
        """
        return None

    def counters(self) -> dict[str, float] | None:
        """Return the engine's own counters since `forget`; None if it has none or nothing has run since."""
        return None

    def warnings(self) -> list[CodedWarning]:
        """Return the warnings about the engine, the model and the window since `forget`."""
        return []
