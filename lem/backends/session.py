"""The code shared by backends whose engines accept prompts while other prompts are running.

This module knows nothing about any particular engine. Each backend defines how its engine loads a model, takes a
prompt, works, and is interrupted.
"""

from __future__ import annotations

import itertools
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from lem.backends.base import Backend, Begun, Encoded, Generation, needed
from lem.backends.checkpoint import Checkpoint, encode
from lem.backends.engine import counter_warnings, prompt_settings, weights_warnings
from lem.machine.gpu import Gpu
from lem.machine.host import Host, cpu_model
from lem.record import CodedWarning, EngineInfo, ModelInfo
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed, gpus_per_process
from lem.workload.batching import plan_batches
from lem.workload.clock import REAL, Clock
from lem.workload.flops import Architecture
from lem.workload.tokens import Chunk
from lem.workload.traffic import Arrivals, as_places_become_free


@dataclass
class Request:
    """A prompt given to the engine, and the tokens delivered so far; `chunks` is used only if tokens are timed.

    `number` is the position of the prompt, counted from 0, in the order in which prompts were given to the engine.
    """

    prompt: Encoded
    batch: int
    arrived_ns: int
    token_ids: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    number: int = field(default=0, kw_only=True)
    given_ns: int = field(default_factory=lambda: time.perf_counter_ns(), kw_only=True)

    def take(self, token_ids: Sequence[int], at_ns: int, *, timed: bool) -> None:
        """Add tokens that the engine delivered together."""
        self.token_ids += token_ids
        if timed and token_ids:
            self.chunks.append(Chunk(at_ns, len(token_ids)))


R = TypeVar("R", bound=Request)


class Session(ABC, Generic[R]):
    """The unfinished requests of one engine, by key; after an error in the engine, a session cannot be used again.

    A `SessionBackend` creates a new session for the first prompts after `forget`. Other backends keep one session.
    """

    def __init__(self, experiment: Experiment, clock: Clock = REAL) -> None:
        self.experiment, self.clock = experiment, clock
        self.running: dict[int, R] = {}
        self.is_broken = False
        self._given = 0
        self._ended_ns: list[int] = []

    @abstractmethod
    def begin(self, key: int, prompt: Encoded, batch: int, arrived_ns: int) -> None:
        """Give the engine a prompt; `key` is unique among the unfinished requests."""

    @abstractmethod
    def advance(self, next_ns: int | None = None) -> Mapping[int, Generation]:
        """Let the engine work, and return the outputs of the requests that have finished, by key.

        These requests are removed from `running`. The result may be empty. `next_ns` is the arrival time of the next
        prompt, or None if it is unknown. If the engine can be interrupted, the method returns by that time.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Cancel all unfinished requests in the engine."""

    @property
    def streams(self) -> bool:
        """Whether tokens are timed."""
        return self.experiment.streaming.enabled

    # -------------------------------------------------------------- unfinished requests
    def under_way(self) -> list[Begun]:
        """Return the requests that the engine is working on.

        An engine with a queue of its own is assumed to run requests in the order in which it received them, one in each
        slot, and to begin the next request as soon as a slot is free.
        """
        first = itertools.islice(self.running.values(), self.experiment.batching.batch_size)
        return [Begun(each.prompt.index, self.taken_ns(each), self.tokens_so_far(each)) for each in first]

    def taken_ns(self, request: R) -> int:
        """Return when the engine received a request or had a free slot for it, whichever was later."""
        place = min(request.number - self.experiment.batching.batch_size, len(self._ended_ns) - 1)
        return request.given_ns if place < 0 else max(request.given_ns, self._ended_ns[place])

    def tokens_so_far(self, request: R) -> int | None:
        """Return how many tokens have been generated for an unfinished request; None if that is unknown."""
        return len(request.token_ids) if self.streams else None

    def _give(self, key: int, prompt: Encoded, batch: int, arrived_ns: int) -> None:
        self.begin(key, prompt, batch, arrived_ns)
        next(reversed(self.running.values())).number = self._given
        self._given += 1

    def _advance(self, next_ns: int | None = None) -> Mapping[int, Generation]:
        done = self.advance(next_ns)
        self._ended_ns += sorted(generation.end_ns for generation in done.values())
        return done

    # -------------------------------------------------------------- running
    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Run one batch after another, and yield each batch (or each output, if batching is continuous) as it ends."""
        batching = self.experiment.batching
        for number, positions in enumerate(plan_batches([len(p.token_ids) for p in prompts], batching)):
            steps = self._run({position: prompts[position] for position in positions}, number)
            if batching.strategy == "continuous":
                yield from ([replace(each, arrived_ns=None) for each in done.values()] for done in steps)
            else:
                generations = {key: generation for done in steps for key, generation in done.items()}
                yield [replace(generations[position], arrived_ns=None) for position in positions]

    def fill_places(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Run prompts on an engine without a queue, by giving it the next prompt whenever a slot is free."""
        everything = Arrivals(prompts, [0.0] * len(prompts), 1, self.clock.now_ns(), clock=self.clock)
        for done in self.serve(everything, self.experiment.batching.batch_size):
            yield [replace(generation, batch=0, arrived_ns=None) for generation in done]

    def _run(self, prompts: Mapping[int, Encoded], batch: int) -> Iterator[Mapping[int, Generation]]:
        with self._in_use():
            for key, prompt in prompts.items():
                self._give(key, prompt, batch, self.clock.now_ns())
            while self.running:
                if done := self._advance():
                    yield done

    def serve(self, arrivals: Arrivals[Encoded], at_most: int = sys.maxsize) -> Iterator[Sequence[Generation]]:
        """Give the engine each prompt as it arrives, while others run, and yield the outputs that finish together.

        An engine with a queue of its own is given every request on arrival. An engine without a queue is given at most
        `at_most` requests at a time.
        """
        with self._in_use():
            steps = as_places_become_free(
                arrivals,
                at_most,
                running=lambda: len(self.running),
                begin=lambda each: self._give(each.request.index, each.request, 0, each.at_ns),
                advance=lambda: list(self._advance(arrivals.next_ns()).values()),
            )
            for number, done in enumerate(steps):
                yield [replace(generation, batch=number) for generation in done]

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Cancel unfinished requests if the caller stops early; after an error, mark the session as broken."""
        self._given, self._ended_ns = 0, []
        try:
            yield
        except GeneratorExit:
            self.cancel()
            raise
        except BaseException:
            self.is_broken = True
            raise
        finally:
            self.running.clear()


@dataclass(frozen=True)
class Loaded:
    """An engine with its model loaded.

    `lora` is the adapter in the form that requests use, or None. `adapter_weights` says how many of the adapter's
    weights belong to the model's body, and how many to its output projection. `positions` is the maximum length of a
    sequence (prompt and output together) in tokens, or None if there is no limit. `clock_offset_ns` is added to the
    engine's clock to get `time.perf_counter_ns`. `model` is None if nothing is known about the model. `settings` holds
    the engine's resolved settings that affect the measurements.
    """

    engine: Any
    checkpoint: Checkpoint
    lora: Any
    adapter_weights: tuple[int, int]
    positions: int | None
    clock_offset_ns: int
    random_weights: bool
    model: ModelInfo | None
    settings: Mapping[str, str]


S = TypeVar("S", bound=Session[Any])


class SessionBackend(Backend, Generic[S]):
    """Base class of the backends that run their prompts through a `Session`."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        # The number of GPUs (on a CPU, of workers) on which this process runs the model.
        self._degree = gpus_per_process(experiment)
        self._own_gpus: Sequence[Gpu] = ()
        self._loaded: Loaded | None = None
        self._session: S | None = None

    @property
    @abstractmethod
    def _versions(self) -> str:
        """The engine's name and version, for the record."""

    @property
    def _on_gpu(self) -> bool:
        return True

    @abstractmethod
    def _begin(self, loaded: Loaded) -> S:
        """Return a session without any requests."""

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return all GPUs that the run's processes use on this node, in CUDA's order; none on a CPU."""
        if not self._on_gpu:
            return ()
        in_use, first = host.gpus[: gpus_needed(self._experiment)], self.local_rank * self._degree
        self._own_gpus = in_use[first : first + self._degree]
        return in_use

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize each text separately, with the model's own special tokens."""
        loaded = needed(self._loaded)
        return encode(loaded.checkpoint.tokenizer, texts, self._experiment, loaded.positions)

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Run one batch after another, and yield each batch (or each output, if batching is continuous) as it ends."""
        yield from self._begun().generate(prompts)

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Give the engine each prompt as it arrives or, without continuous batching, run waiting prompts in batches."""
        if self._experiment.batching.strategy == "continuous":
            yield from self._begun().serve(arrivals)
        else:
            yield from super().serve(arrivals, at_most)

    def under_way(self) -> Sequence[Begun]:
        """Return the requests that the engine is working on."""
        return () if self._session is None else self._session.under_way()

    def _begun(self) -> S:
        self._session = self._session or self._begin(needed(self._loaded))
        return self._session

    @property
    def _is_broken(self) -> bool:
        """Whether the engine failed or was stopped while working, so that it may no longer respond."""
        return self._session is not None and self._session.is_broken

    def model_info(self) -> ModelInfo | None:
        """Describe the model as loaded; None if nothing is known about it."""
        return needed(self._loaded).model

    def engine_info(self) -> EngineInfo:
        """Describe the engine and its resolved configuration."""
        import torch

        loaded = needed(self._loaded)
        return EngineInfo(
            backend=self._experiment.backend.name,
            version=f"{self._versions}, torch {torch.__version__}",
            device=", ".join(f"cuda:{i}" for i in range(self._degree)) if self._on_gpu else "cpu",
            device_name=self._own_gpus[0].computing_name if self._own_gpus else cpu_model(),
            settings={**loaded.settings, **prompt_settings(self._experiment, loaded.checkpoint.end_tokens)},
        )

    def architecture(self) -> Architecture:
        """Return the sizes of the model and its adapter, determined in the same way as in the pytorch backend."""
        loaded = needed(self._loaded)
        return loaded.checkpoint.architecture(loaded.adapter_weights)

    def warnings(self) -> list[CodedWarning]:
        """Warn about random weights, cache hits and preemptions."""
        loaded = needed(self._loaded)
        return [
            *weights_warnings(loaded.checkpoint.model.name, loaded.random_weights),
            *counter_warnings(self.counters()),
        ]
