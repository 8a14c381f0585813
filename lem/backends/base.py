"""The interface of the inference backends.

A backend loads a model, turns prompts into tokens, generates outputs, and reports exactly which tokens they contain. It
knows nothing about energy, windows, datasets or results; `lem.runner.window` calls it inside a window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.record import CodedWarning, EngineInfo, FinishReason, Memory, ModelInfo
from lem.spec.campaign import CampaignCell
from lem.spec.experiment import Experiment
from lem.spec.rules import Objection
from lem.workload.clock import REAL, Clock
from lem.workload.flops import Architecture
from lem.workload.models import Model
from lem.workload.tokens import Chunk
from lem.workload.traffic import Arrivals, in_turn

T = TypeVar("T")

# Names of the values that only some backends report: in this order, `Generation.token_ids`, `model_info`,
# `Generation.prefill_end_ns`, `architecture`, `Memory.kv_cache_bytes` and `counters`.
Reported = Literal["tokens", "model", "prefill", "flops", "kv_cache", "counters"]


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids; `index` is its position among the experiment's prompts."""

    index: int
    token_ids: tuple[int, ...]
    truncated: bool = False


@dataclass(frozen=True)
class Generation:
    """The output for one prompt; all times are on the backend's clock.

    `token_ids` contains no padding and nothing after the first end token. It is empty if the engine reports only the
    number of output tokens, which is then in `counted`. `arrived_ns` is when the request arrived, or None if all
    prompts are present from the start (`Backend.generate`). `start_ns` is when the engine began working on the request.
    If that is unknown (`start_is_known` is False), `start_ns` is when the engine was given the request or had room for
    it, whichever was later. `prefill_end_ns` is when the logits of the first token were ready, or None if the engine
    does not report this time. `chunks` holds the times of the tokens if streaming is enabled. `error` says why the
    request failed, and is None if it succeeded. A failed request has no tokens, and its `finish_reason` is "error".
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
        """The number of output tokens."""
        return len(self.token_ids) if self.counted is None else self.counted


@dataclass(frozen=True)
class Begun:
    """A request that an engine is working on.

    `since_ns` is when the engine began working on the request, or the earliest time at which it could have begun.
    `output_tokens` is None if the engine delivers a request's tokens only once the request has finished.
    """

    index: int
    since_ns: int
    output_tokens: int | None = None


def needed(loaded: T | None) -> T:
    """Return the given value, which `Backend.load` must already have set."""
    assert loaded is not None, "load must be called first"
    return loaded


class Backend(ABC):
    """The interface to one engine in the worker process.

    `tests/backends/test_backends.py` checks each backend against this contract: `start` is called once, then `load`
    once. `generate` yields one output for every prompt, and can be called again. The same seed gives the same tokens,
    even if a resumed run skips batches that are already finished. Counts include neither padding nor anything after the
    end token. If the engine fails or rejects a call, the backend's method raises `RunError` with a message that names
    the engine and the reason.
    """

    reports: ClassVar[frozenset[Reported]] = frozenset()
    """The optional values that the backend reports; the other optional values are None, and null in the results."""

    imports_early: ClassVar[bool] = False
    """Whether `import_engine` may be called in a worker before the experiment is known."""

    local_rank: int = 0
    """The number (from 0) of this process among the run's processes on the node; set before `start`."""

    forced: bool = False
    """Whether the user has accepted inadvisable conditions (`--force`), such as missing weights; set before `load`."""

    cell: CampaignCell | None = None
    """The run's place in its campaign, or None outside a campaign; set before `start`."""

    clock: Clock = REAL
    """The clock that times the run; virtual only if the backend simulates all of its work."""

    log_folder: Path | None = None
    """The directory for the log of a server that the backend starts; set before `start`."""

    @abstractmethod
    def __init__(self, experiment: Experiment) -> None:
        """Store the experiment without loading or importing anything."""

    @classmethod
    @abstractmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Return the backend's objections to the experiment on this host, without importing the engine.

        If `model` is None, the checks that need the model are skipped.
        """

    @classmethod
    def about_key(cls, name: str) -> str | None:
        """Return a message about a key that is not an option; None if it never was an engine argument."""
        return None

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return whether the engine will run on a GPU of this host, as far as is known before importing the engine."""
        return False

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return all physical GPUs that the experiment's processes use on this node; called after `start`.

        Only these GPUs are metered.
        """
        return ()

    def runs_elsewhere(self) -> bool:
        """Return whether the model runs on another machine, out of reach of this machine's meters."""
        return False

    def tolerated_failures(self, requests: int) -> int:
        """Return how many of a window's requests may fail; 0 by default, because one failure stops most engines."""
        return 0

    def server_pids(self) -> Sequence[int]:
        """Return the ids of those engine processes that lem did not start; called after `start`."""
        return ()

    @classmethod
    def import_engine(cls) -> None:
        """Import the engine's libraries, so that `start` is quick; nothing here may depend on the experiment."""

    def start(self) -> None:
        """Import the engine; called before the first phase, so that no phase includes the import time."""

    @abstractmethod
    def load(self) -> None:
        """Load the model and everything else needed to generate text."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Turn prompts into token ids, in order, applying the chat template and truncation but no padding.

        Raises:
            RunError: a prompt has no tokens, or is too long for the model or the engine.
        """

    @abstractmethod
    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Seed the sampling, run the prompts, and yield the outputs in groups that finish together."""

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Run prompts as they arrive, and yield the outputs, with their arrival times, in groups that finish together.

        The default implementation runs one batch after another, each formed from the prompts that are waiting when the
        engine becomes free. Backends whose engine accepts prompts while it is working override this method.

        Args:
            arrivals: the requests and their arrival times.
            at_most: the maximum number of requests in a batch.
        """
        for number, (taken, part) in enumerate(in_turn(arrivals, at_most, self.generate)):
            at_ns = {each.request.index: each.at_ns for each in taken}
            yield [replace(g, batch=number, arrived_ns=at_ns[g.index]) for g in part]

    def under_way(self) -> Sequence[Begun]:
        """Return the requests that the engine is still working on; called just after `generate` or `serve` has yielded.

        Requests that are still waiting are not included. The default implementation returns no requests, which is right
        for backends that yield a batch only when the whole batch has finished.
        """
        return ()

    def call_while_busy(self, work: Callable[[], None] | None) -> bool:
        """From now on, call `work` each time the device has begun a batch or a step, so that it delays no device.

        A backend whose device computes in this thread, as a CPU does, cannot do so. None ends the calls. `work` raises
        `Interrupted` if the run is interrupted.

        Returns:
            Whether the backend calls `work`; False by default.
        """
        return False

    def forget(self) -> None:
        """Drop state left by earlier prompts, such as cached prefixes, and reset `counters`.

        This is called before each measured window.
        """

    def synchronize(self) -> None:
        """Wait until the device has finished its work. The default suits synchronous engines: it does nothing."""

    def close(self) -> None:
        """Release the model and the device; may be called at any time, even if `load` failed."""

    def reset_peak_memory(self) -> None:
        """Reset the peak that `peak_memory` reports, if the engine supports this."""

    @abstractmethod
    def peak_memory(self) -> Memory:
        """Return the peak memory over the period that `Memory.scope` states: since the last reset, if possible."""

    @abstractmethod
    def model_info(self) -> ModelInfo | None:
        """Return a description of the loaded model, or None if no model runs."""

    @abstractmethod
    def engine_info(self) -> EngineInfo:
        """Return a description of the engine and its effective settings."""

    def architecture(self) -> Architecture | None:
        """Return the sizes that determine the model's FLOPs, or None if the backend runs no model.

        Raises:
            UnknownArchitecture: the sizes cannot be determined; the message is the reason.
        """
        return None

    def counters(self) -> dict[str, float] | None:
        """Return the engine's own counters since `forget`; None if it has none, or if nothing has run since."""
        return None

    def warnings(self) -> list[CodedWarning]:
        """Return warnings about the engine, the model and everything that has happened since `forget`."""
        return []
