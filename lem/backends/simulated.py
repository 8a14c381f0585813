"""An engine with exactly known times and tokens, for trying grids and for tests. No model runs.

A batch takes `prefill_s_per_token` for each input token and `decode_s_per_token` for each decode step. A prompt's
tokens are its words; the output's length follows from the seed and the prompt's position.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

from lem._version import VERSION
from lem.backends.base import Backend, Encoded, Generation
from lem.batching import plan_batches
from lem.doubts import note
from lem.errors import RunError
from lem.gpu import Gpu
from lem.host import Host, peak_memory_bytes
from lem.models import Model
from lem.objection import Objection
from lem.record import EngineInfo, FinishReason, Memory, ModelInfo, Note
from lem.spec import Experiment, SimulatedBackend

END_TOKEN = 0


class Simulated(Backend):
    """See the module."""

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, SimulatedBackend)
        self._experiment = experiment
        self._options = experiment.backend

    @classmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Object only to more GPUs than there are: whatever else is configured can be simulated."""
        assert isinstance(experiment.backend, SimulatedBackend)
        wanted = experiment.backend.gpus
        if wanted <= len(host.gpus):
            return []
        reason = f"{wanted} GPUs are asked for, {len(host.gpus)} are visible."
        return [Objection("impossible", "backend.gpus", reason, "Lower it.")]

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return whether GPUs are claimed."""
        assert isinstance(experiment.backend, SimulatedBackend)
        return experiment.backend.gpus > 0

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return the first visible GPUs, as many as are claimed."""
        return host.gpus[: self._options.gpus]

    def load(self) -> None:
        """Do nothing: there is no model."""

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Take each word as a token."""
        limit = self._experiment.max_input_tokens
        encoded = []
        for index, text in enumerate(texts):
            ids = tuple(1 + len(word) for word in text.split())
            encoded.append(Encoded(index, ids[:limit], limit is not None and len(ids) > limit))
        return encoded

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Generation]:
        """Sleep as long as the batch takes, then yield its prompts."""
        batches = plan_batches([len(p.token_ids) for p in prompts], self._experiment.batching)
        for number, positions in enumerate(batches):
            members = [prompts[i] for i in positions]
            if any(p.index == self._options.fail_at_request for p in members):
                raise RunError(f"simulated failure at request {self._options.fail_at_request}")
            outputs = [self._output(p) for p in members]
            start_ns = time.perf_counter_ns()
            time.sleep(self._prefill_s(members))
            prefill_end_ns = time.perf_counter_ns()
            time.sleep(max(map(len, outputs)) * self._options.decode_s_per_token)
            end_ns = time.perf_counter_ns()
            for prompt, output in zip(members, outputs, strict=True):
                reason: FinishReason = "stop" if output[-1] == END_TOKEN else "length"
                yield Generation(prompt.index, number, output, reason, start_ns, end_ns, prefill_end_ns)

    def peak_memory(self) -> Memory:
        """Return this process's own peak."""
        return Memory(peak_memory_bytes(), "process, since its start")

    def model_info(self) -> ModelInfo | None:
        """Return None: no model runs."""
        return None

    def engine_info(self) -> EngineInfo:
        """Describe the simulation."""
        return EngineInfo("simulated", VERSION, "none", "none", {})

    def notes(self) -> list[Note]:
        """Say that nothing here was measured on a model."""
        return [note("simulated", "No model ran: times and tokens are simulated.")]

    def _output(self, prompt: Encoded) -> tuple[int, ...]:
        longest = self._experiment.max_output_tokens
        shortest = min(max(1, self._experiment.min_output_tokens), longest)
        wanted = random.Random(f"{self._experiment.seed}:{prompt.index}").randint(shortest, 2 * longest)
        tokens = tuple(range(1, min(wanted, longest) + 1))
        return (*tokens[:-1], END_TOKEN) if wanted < longest else tokens

    def _prefill_s(self, members: Sequence[Encoded]) -> float:
        return sum(len(p.token_ids) for p in members) * self._options.prefill_s_per_token
