"""An engine with exactly known times and tokens, for trying out grids and for tests. No model runs.

A batch takes `prefill_s_per_token` for each input token and `decode_s_per_token` for each decode step. A prompt's
tokens are its words; the seed and the prompt's position decide the length of the output.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

from lem import __version__
from lem.backends.base import Backend, Encoded, Generation
from lem.errors import RunError
from lem.machine.gpu import Gpu
from lem.machine.host import Host, peak_memory_bytes
from lem.record import CodedWarning, EngineInfo, FinishReason, Memory, ModelInfo
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Decoder, Experiment
from lem.spec.rules import Objection, without_effect
from lem.units import NS_PER_S
from lem.warning_codes import warning
from lem.workload.batching import plan_batches
from lem.workload.models import Model
from lem.workload.tokens import Chunk, first_tokens

END_TOKEN = 0


class Simulated(Backend):
    """The simulated engine."""

    reports = frozenset(["prefill"])

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, SimulatedBackend)
        self._experiment = experiment
        self._options = experiment.backend
        self._late_ns = 0

    @classmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Object to more GPUs than are visible, and to model options, since no model runs."""
        assert isinstance(experiment.backend, SimulatedBackend)
        needed, visible = experiment.backend.gpus, len(host.gpus)
        too_few = Objection("too_few_gpus", "backend.gpus", f"GPUs needed: {needed}, visible: {visible}.")
        return [*([too_few] if needed > visible else []), *_ignored(experiment)]

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return whether GPUs are requested, although nothing runs on them."""
        assert isinstance(experiment.backend, SimulatedBackend)
        return experiment.backend.gpus > 0

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return the requested GPUs: the first visible ones."""
        return host.gpus[: self._options.gpus]

    def load(self) -> None:
        """Do nothing: there is no model."""

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Turn each word into a token."""
        limit = self._experiment.max_input_tokens
        encoded = []
        for index, text in enumerate(texts):
            ids = tuple(1 + len(word) for word in text.split())
            encoded.append(Encoded(index, ids[:limit], limit is not None and len(ids) > limit))
        return encoded

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Sleep for as long as a batch takes, then yield its outputs."""
        start_ns = time.perf_counter_ns()  # planning is part of the work
        batches = plan_batches([len(p.token_ids) for p in prompts], self._experiment.batching)
        for number, positions in enumerate(batches):
            members = [prompts[i] for i in positions]
            if any(p.index == self._options.fail_at_request for p in members):
                raise RunError(f"simulated failure at request {self._options.fail_at_request}")
            outputs = [self._output(p) for p in members]
            prefill_end_ns, chunks, end_ns = self._work(start_ns, members, max(map(len, outputs)))
            yield [
                Generation(
                    p.index,
                    number,
                    output,
                    _finish_reason(output),
                    start_ns,
                    end_ns,
                    prefill_end_ns,
                    first_tokens(chunks, len(output)),
                )
                for p, output in zip(members, outputs, strict=True)
            ]
            start_ns = time.perf_counter_ns()

    def _work(self, start_ns: int, members: Sequence[Encoded], steps: int) -> tuple[int, list[Chunk], int]:
        """Sleep through prefill and decode; return when each ended and, when streaming, when each step did.

        Sleeps until points in time, not for durations, and deducts late wake-ups from the next batch; otherwise delays
        would add up and batches would take too long.
        """
        prefill_s = sum(len(p.token_ids) for p in members) * self._options.prefill_s_per_token
        due_ns = start_ns - self._late_ns + round(prefill_s * NS_PER_S)
        prefill_end_ns = _sleep_until(due_ns)
        step_ns = self._options.decode_s_per_token * NS_PER_S
        timed = range(1, steps + 1) if self._experiment.streaming.enabled else ()
        chunks = [Chunk(_sleep_until(due_ns + round(step * step_ns)), 1) for step in timed]
        due_ns += round(steps * step_ns)
        end_ns = _sleep_until(due_ns)
        # Do not rush to catch up after a long interruption.
        self._late_ns = min(end_ns - due_ns, end_ns - start_ns)
        return prefill_end_ns, chunks, end_ns

    def peak_memory(self) -> Memory:
        """Return this process's peak."""
        return Memory(peak_memory_bytes(), "process, since its start")

    def model_info(self) -> ModelInfo | None:
        """Return None: no model runs."""
        return None

    def engine_info(self) -> EngineInfo:
        """Describe the simulation."""
        return EngineInfo("simulated", __version__, "none", "none", {})

    def warnings(self) -> list[CodedWarning]:
        """Warn that nothing here was measured on a model."""
        return [warning("simulated", "No model ran: times and tokens are simulated.")]

    def _output(self, prompt: Encoded) -> tuple[int, ...]:
        longest = self._experiment.max_output_tokens
        shortest = min(max(1, self._experiment.min_output_tokens), longest)
        wanted = random.Random(f"{self._experiment.seed}:{prompt.index}").randint(shortest, 2 * longest)
        tokens = tuple(range(1, min(wanted, longest) + 1))
        return (*tokens[:-1], END_TOKEN) if wanted < longest else tokens


def _sleep_until(moment_ns: int) -> int:
    """Sleep until a time of `time.perf_counter_ns`; return the time of waking."""
    left_ns = moment_ns - time.perf_counter_ns()
    if left_ns > 0:
        time.sleep(left_ns / NS_PER_S)
    return time.perf_counter_ns()


def _finish_reason(output: Sequence[int]) -> FinishReason:
    return "stop" if output[-1] == END_TOKEN else "length"


def _ignored(experiment: Experiment) -> Iterator[Objection]:
    """Object to model options, since no model runs here."""
    weights = {
        "revision": experiment.revision is not None,
        "adapter": experiment.adapter is not None,
        "quantization.quantization": experiment.quantization.quantization,
    }
    ways = {
        "trust_remote_code": experiment.trust_remote_code,
        "fp_precision": experiment.fp_precision != "auto",
        "chat_template": experiment.chat_template,
        "decoder": experiment.decoder != Decoder(name=experiment.decoder.name),
        "parallelism.strategy": experiment.parallelism.strategy in ("tensor_parallel", "pipeline_parallel"),
    }
    for path in (path for path, is_set in weights.items() if is_set):
        yield without_effect("no_weights_to_change", path, "no model is loaded.")
    for path in (path for path, is_set in ways.items() if is_set):
        yield without_effect("no_effect_on_simulation", path, "no model runs.")
