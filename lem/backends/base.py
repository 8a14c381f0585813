"""The interface of the inference backends.

A backend turns prompts into tokens, loads a model, generates, and says exactly which tokens came out. It knows
nothing of energy, windows, datasets or results; `lem.runner.window` calls it between the edges of a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.record import CodedWarning, EngineInfo, FinishReason, Memory, ModelInfo
from lem.spec.experiment import Experiment
from lem.spec.rules import Objection
from lem.workload.flops import Architecture
from lem.workload.models import Model
from lem.workload.tokens import Chunk
from lem.workload.traffic import Arrivals, in_turn

# What an engine may be able to tell, by the methods that tell it; `prefill` is `Generation.prefill_end_ns`.
Told = Literal["tokens", "model", "prefill", "flops", "kv_cache", "counters"]


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids; `index` is its position among the experiment's prompts."""

    index: int
    token_ids: tuple[int, ...]
    truncated: bool = False


@dataclass(frozen=True)
class Generation:
    """What came out for one prompt.

    `token_ids` ends with the end token if one was generated and holds nothing after it, and no padding. Times
    are readings of `time.perf_counter_ns`; `prefill_end_ns` is when the first token's logits were there, None where
    the engine cannot tell. `chunks` says when the tokens came, if the experiment asks for streaming. `arrived_ns` is
    when the request came into a queue, where there is one; `start_ns` is when the engine began on it, or where it
    does not tell that (`start_is_told`), when it was given the request. `counted` is the number of output tokens where
    the engine tells no more than that; then there are no `token_ids`.
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
    start_is_told: bool = True
    counted: int | None = None

    @property
    def output_tokens(self) -> int:
        """Number of tokens that came out."""
        return len(self.token_ids) if self.counted is None else self.counted


class Backend(ABC):
    """One engine in the worker process.

    Contract, checked for each backend by `tests/backends/test_backends.py`: `start` and `load` come first, once;
    `generate` yields every prompt exactly once and can be called again; the same seed gives the same tokens, also when
    the first batches are left out; counts hold neither padding nor anything after the end token.
    """

    tells: ClassVar[frozenset[Told]] = frozenset()
    """What it tells; the rest is None, and null in the results."""

    local_rank: int = 0
    """Which of the node's processes this is; set before `start`."""

    log_folder: Path | None = None
    """Where an engine of its own process may write a log, which stays; set before `start`."""

    @abstractmethod
    def __init__(self, experiment: Experiment) -> None:
        """Take note of the experiment; nothing is loaded or imported yet."""

    @classmethod
    @abstractmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Return what speaks against the experiment on this host, without loading anything heavy.

        `model` is None when none was found; that has been objected to already.
        """

    @classmethod
    def about_key(cls, name: str) -> str | None:
        """Return a sentence about a key that the backend's options lack and its engine knows or knew; None without."""
        return None

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Tell whether the engine means to run on a GPU of this host, as far as is known without importing it."""
        return False

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return the physical GPUs that all processes of the experiment will use on this node; asked after `start`.

        Only these are metered.
        """
        return ()

    def runs_elsewhere(self) -> bool:
        """Tell whether another machine does the work: no meter of this one says anything about it."""
        return False

    def server_pids(self) -> Sequence[int]:
        """Return the engine's processes that this one has not started; asked after `start`."""
        return ()

    def start(self) -> None:
        """Import the engine, so that its seconds are in no phase; nothing to do for an engine of our own."""

    @abstractmethod
    def load(self) -> None:
        """Load the model and everything that generating needs."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Turn prompts into token ids: chat template and truncation included, padding not."""

    @abstractmethod
    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Seed the sampling, run the prompts, and yield those that finish together, batch by batch."""

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Run prompts as they arrive, and yield those that finish together, with their arrival.

        Here batch after batch, of those that wait when the engine is free; for an engine that takes in others while it
        works there is more to it.

        Args:
            arrivals: what arrives, and when.
            at_most: the size of a batch.
        """
        for number, (taken, part) in enumerate(in_turn(arrivals, at_most, self.generate)):
            at_ns = {each.request.index: each.at_ns for each in taken}
            yield [replace(g, batch=number, arrived_ns=at_ns[g.index]) for g in part]

    def forget(self) -> None:
        """Drop what earlier prompts have left behind, such as cached prefixes, and count anew.

        Called before each measured window; nothing to do for an engine that keeps nothing.
        """

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given; nothing to do for a synchronous engine."""

    def reset_peak_memory(self) -> None:
        """Forget the peak so far, where the engine can."""

    @abstractmethod
    def peak_memory(self) -> Memory:
        """Return the peak memory since the reset, or as the engine can tell it."""

    @abstractmethod
    def model_info(self) -> ModelInfo | None:
        """Describe the loaded model; None when no model runs."""

    @abstractmethod
    def engine_info(self) -> EngineInfo:
        """Describe the engine and the settings it really uses."""

    def architecture(self) -> Architecture | None:
        """Return the sizes that decide the model's FLOPs, or None when they cannot be told."""
        return None

    def kv_cache_bytes_per_token(self) -> int | None:
        """Return the size of one token's keys and values, or None when it cannot be told or nothing is cached."""
        return None

    def counters(self) -> dict[str, float] | None:
        """Return the engine's own counts since `forget`; None when it counts nothing, or nothing has run since."""
        return None

    def warnings(self) -> list[CodedWarning]:
        """Return what a reader of the numbers must know about the engine or the model."""
        return []

    def close(self) -> None:
        """Release the model and the device."""
