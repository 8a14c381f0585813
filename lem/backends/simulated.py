"""An engine with exactly known times and tokens, for trying out grids and for tests. No model runs.

A batch takes `prefill_s_per_token` for each input token and `decode_s_per_token` for each decode step. With continuous
batching, each step first takes the prefill time of the newly accepted prompts, while the other requests wait, and then
decodes one token of each request. A prompt's tokens are its words. The seed and the prompt's position determine the
length of the output. `Pace` makes the times vary by known amounts. If the engine does not sleep, time passes on a
virtual clock.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lem import __version__
from lem.backends.base import Backend, Begun, Encoded, Generation
from lem.backends.session import Request, Session
from lem.errors import RunError
from lem.machine.gpu import Gpu
from lem.machine.host import Host, peak_memory_bytes
from lem.quantities import NS_PER_S
from lem.record import CodedWarning, EngineInfo, FinishReason, Memory, ModelInfo
from lem.spec.campaign import CampaignCell
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Decoder, Experiment
from lem.spec.rules import Objection, without_effect
from lem.warning_codes import warning
from lem.workload.batching import plan_batches
from lem.workload.clock import REAL, Clock, VirtualClock
from lem.workload.models import Model
from lem.workload.tokens import Chunk, first_tokens
from lem.workload.traffic import Arrivals

END_TOKEN = 0


class Simulated(Backend):
    """The simulated engine."""

    reports = frozenset(["prefill"])

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, SimulatedBackend)
        self._experiment = experiment
        self._options = experiment.backend
        self.clock = REAL if self._options.sleep else VirtualClock()
        self._work = _Work(self.clock)
        self._pace = Pace(self._options, experiment.seed)
        self._session = SimulatedSession(experiment, self._output, self._work, self._pace)

    @classmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Object if too few GPUs are visible, or if options are set that have no effect on the simulation."""
        assert isinstance(experiment.backend, SimulatedBackend)
        needed, visible = experiment.backend.gpus, len(host.gpus)
        too_few = Objection("too_few_gpus", "backend.gpus", f"GPUs needed: {needed}, visible: {visible}.")
        return [*([too_few] if needed > visible else []), *_ignored(experiment)]

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return whether GPUs are to be metered, even though nothing runs on them."""
        assert isinstance(experiment.backend, SimulatedBackend)
        return experiment.backend.gpus > 0

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return as many of the visible GPUs as are requested, beginning with the first."""
        return host.gpus[: self._options.gpus]

    def start(self) -> None:
        """Determine how fast this run is, which depends on its place in a campaign."""
        self._pace.set_cell(self.cell)

    def load(self) -> None:
        """Do nothing, because there is no model."""

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Turn each word into a token."""
        limit = self._experiment.max_input_tokens
        encoded = []
        for index, text in enumerate(texts):
            ids = tuple(1 + len(word) for word in text.split())
            encoded.append(Encoded(index, ids[:limit], limit is not None and len(ids) > limit))
        return encoded

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Sleep for the duration of each batch, or of each step of continuous batching, and then yield its outputs."""
        if self._experiment.batching.strategy == "continuous":
            yield from self._session.fill_places(prompts)
            return
        start_ns = self.clock.now_ns()  # planning is part of the work
        batches = plan_batches([len(p.token_ids) for p in prompts], self._experiment.batching)
        for number, positions in enumerate(batches):
            members = [prompts[i] for i in positions]
            for prompt in members:
                _fail_at(prompt, self._options)
            outputs = [self._output(p) for p in members]
            prefill_end_ns, chunks, end_ns = self._run(start_ns, members, max(map(len, outputs)))
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
            start_ns = self.clock.now_ns()

    def _run(self, start_ns: int, members: Sequence[Encoded], steps: int) -> tuple[int, list[Chunk], int]:
        """Sleep through prefill and decode; return the end of prefill, of each step (if streaming) and of decode."""
        self._work.begin(start_ns)
        prefill_end_ns = self._work.do(self._pace.prefill_s(members))
        step_s = self._pace.step_s(members)
        if self._experiment.streaming.enabled:
            chunks = [Chunk(self._work.do(step_s), 1) for _ in range(steps)]
            end_ns = chunks[-1].at_ns
        else:
            chunks, end_ns = [], self._work.do(steps * step_s)
        self._work.end(end_ns)
        return prefill_end_ns, chunks, end_ns

    def call_while_busy(self, work: Callable[[], None] | None) -> bool:
        """Call `work` whenever simulated work has begun, which takes no longer because of it."""
        self._work.meanwhile = work
        return work is not None

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Run the waiting prompts batch by batch or, with continuous batching, accept each prompt as it arrives."""
        if self._experiment.batching.strategy == "continuous":
            yield from self._session.serve(arrivals, at_most)
        else:
            yield from super().serve(arrivals, at_most)

    def under_way(self) -> Sequence[Begun]:
        """Return the running requests of continuous batching; none for static batches, which finish as a whole."""
        return self._session.under_way()

    def peak_memory(self) -> Memory:
        """Return this process's peak memory."""
        return Memory(peak_memory_bytes(), "process, since its start")

    def model_info(self) -> ModelInfo | None:
        """Return None, because no model runs."""
        return None

    def engine_info(self) -> EngineInfo:
        """Describe the simulation."""
        return EngineInfo("simulated", __version__, "none", "none", {})

    def warnings(self) -> list[CodedWarning]:
        """Warn that no model was measured."""
        return [warning("simulated", "No model ran: times and tokens are simulated.")]

    def _output(self, prompt: Encoded) -> tuple[int, ...]:
        longest = self._experiment.max_output_tokens
        shortest = min(max(1, self._experiment.min_output_tokens), longest)
        wanted = random.Random(f"{self._experiment.seed}:{prompt.index}").randint(shortest, 2 * longest)
        tokens = tuple(range(1, min(wanted, longest) + 1))
        return (*tokens[:-1], END_TOKEN) if wanted < longest else tokens


def _fail_at(prompt: Encoded, options: SimulatedBackend) -> None:
    """Raise an error if the configuration requests a failure at this prompt."""
    if prompt.index == options.fail_at_request:
        raise RunError(f"simulated failure at request {prompt.index}")


class Pace:
    """How long work takes: the configured times, multiplied by factors that vary between cells and between requests.

    The noise is log-normal with median 1, so it does not change the ratio of geometric means that a campaign estimates.
    """

    def __init__(self, options: SimulatedBackend, seed: int) -> None:
        self._options, self._seed = options, seed
        self._of_requests: dict[int, float] = {}
        self.set_cell(None)

    def set_cell(self, cell: CampaignCell | None) -> None:
        """Set the place in a campaign; outside a campaign, only noise varies the times."""
        self._place = "" if cell is None else f"{cell.name}/{cell.arm}/{cell.cycle}"
        self._of_cell = self._noise("cell", self._options.noise)
        if cell is not None:
            self._of_cell *= _drift(self._options, cell) * _carried_over(self._options, cell)
        self._of_requests.clear()

    def prefill_s(self, prompts: Sequence[Encoded]) -> float:
        """Return how long the prefill of these prompts takes, in seconds."""
        tokens = math.fsum(len(p.token_ids) * self._of_request(p.index) for p in prompts)
        return tokens * self._options.prefill_s_per_token * self._of_cell

    def step_s(self, prompts: Sequence[Encoded]) -> float:
        """Return how long a decode step for these prompts takes, in seconds."""
        mean = statistics.fmean(self._of_request(p.index) for p in prompts)
        return mean * self._options.decode_s_per_token * self._of_cell

    def _of_request(self, index: int) -> float:
        if self._options.request_noise == 0:
            return 1.0
        if index not in self._of_requests:
            self._of_requests[index] = self._noise(f"request {index}", self._options.request_noise)
        return self._of_requests[index]

    def _noise(self, what: str, relative_sd: float) -> float:
        # The sigma of a log-normal variable whose standard deviation is `relative_sd` times its mean.
        sigma = math.sqrt(math.log1p(relative_sd**2))
        return random.Random(f"{self._seed}/{self._place}/{what}").lognormvariate(0, sigma)


def _drift(options: SimulatedBackend, cell: CampaignCell) -> float:
    return math.pow(1 + options.drift, (cell.number - 1) / max(1, cell.cells - 1))


def _carried_over(options: SimulatedBackend, cell: CampaignCell) -> float:
    before = cell.simulated_before
    if before is None or not before.decode_s_per_token or not options.decode_s_per_token:
        return 1.0
    return math.pow(before.decode_s_per_token / options.decode_s_per_token, options.carry_over)


class _Work:
    """Sleeps through consecutive stretches of simulated work.

    It sleeps until a given time rather than for a given duration, and deducts the delay of a late wake-up from the next
    stretch. Otherwise, delays would accumulate, and the work would take too long.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.meanwhile: Callable[[], None] | None = None
        self._late_ns = 0
        self._begun_ns = self._due_ns = 0

    def begin(self, start_ns: int) -> None:
        """Begin working at a time that may already have passed, and call `meanwhile`."""
        self._begun_ns, self._due_ns = start_ns, start_ns - self._late_ns
        if self.meanwhile is not None:
            self.meanwhile()

    def do(self, duration_s: float) -> int:
        """Work for the given time, and return when the work ended."""
        self._due_ns += round(duration_s * NS_PER_S)
        return self.clock.sleep_until(self._due_ns)

    def end(self, end_ns: int) -> None:
        """Record how late the work ended, but at most the time since it began; no further delay is made up for."""
        self._late_ns = min(end_ns - self._due_ns, end_ns - self._begun_ns)


@dataclass
class _Running(Request):
    """A request with its predetermined output; `start_ns` is None until a step accepts the request."""

    output: tuple[int, ...] = ()
    start_ns: int | None = None
    prefill_end_ns: int = 0


class SimulatedSession(Session[_Running]):
    """Simulated continuous batching: each step accepts the new prompts, and decodes one token of each request."""

    def __init__(
        self, experiment: Experiment, output: Callable[[Encoded], tuple[int, ...]], work: _Work, pace: Pace
    ) -> None:
        super().__init__(experiment, work.clock)
        assert isinstance(experiment.backend, SimulatedBackend)
        self._options, self._output, self._pace = experiment.backend, output, pace
        self._work = work

    def begin(self, key: int, prompt: Encoded, batch: int, arrived_ns: int) -> None:
        """Add a prompt for the next step to accept."""
        _fail_at(prompt, self._options)
        output, now_ns = self._output(prompt), self.clock.now_ns()
        self.running[key] = _Running(prompt, batch, arrived_ns, output=output, given_ns=now_ns)

    def advance(self, next_ns: int | None = None) -> Mapping[int, Generation]:
        """Sleep through one step, and return the outputs that it has finished, by key."""
        start_ns = self.clock.now_ns()
        self._work.begin(start_ns)
        for request in self.running.values():
            if request.start_ns is None:
                request.start_ns = start_ns
                request.prefill_end_ns = self._work.do(self._pace.prefill_s([request.prompt]))
        end_ns = self._work.do(self._pace.step_s([request.prompt for request in self.running.values()]))
        self._work.end(end_ns)
        for request in self.running.values():
            request.take([request.output[len(request.token_ids)]], end_ns, timed=self.streams)
        done = {key: r for key, r in self.running.items() if len(r.token_ids) == len(r.output)}
        return {key: self._generation(self.running.pop(key), end_ns) for key in done}

    def tokens_so_far(self, request: _Running) -> int | None:
        """Return how many tokens have been generated for an unfinished request."""
        return len(request.token_ids)

    def cancel(self) -> None:
        """Do nothing, because nothing runs between steps."""

    def _generation(self, request: _Running, end_ns: int) -> Generation:
        assert request.start_ns is not None
        return Generation(
            request.prompt.index,
            request.batch,
            request.output,
            _finish_reason(request.output),
            request.start_ns,
            end_ns,
            request.prefill_end_ns,
            tuple(request.chunks),
            request.arrived_ns,
        )


def _finish_reason(output: Sequence[int]) -> FinishReason:
    return "stop" if output[-1] == END_TOKEN else "length"


def _ignored(experiment: Experiment) -> Iterator[Objection]:
    """Object to campaign options outside a campaign, and to model options, because no model runs."""
    assert isinstance(experiment.backend, SimulatedBackend)
    for path in (path for path in ("drift", "carry_over") if getattr(experiment.backend, path)):
        yield without_effect("no_effect_outside_campaign", f"backend.{path}", "this is not a cell of a campaign.")
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
