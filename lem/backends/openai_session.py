"""A server that is ready and the requests sent to it: what the openai backend does over HTTP.

The server is started for the run, or already running. It is also queried for its models, its version and its
counters, and told to drop its prefix cache. Imported when the backend starts, as its client takes a while to import.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lem.backends import checkpoint
from lem.backends.base import Begun, Encoded, Generation
from lem.backends.checkpoint import Checkpoint, encode
from lem.backends.openai_client import Answer, Client, Refused, ServerGone, samples
from lem.backends.openai_options import Address, command_line, request_body
from lem.backends.server import LOG_NAME, Server, answers, environment
from lem.backends.vllm_source import COUNTERS
from lem.errors import RunError
from lem.machine.gpu import Gpu
from lem.record import FinishReason
from lem.spec.engines import OpenaiBackend
from lem.spec.experiment import Experiment
from lem.workload.batching import plan_batches
from lem.workload.models import Model
from lem.workload.traffic import Arrivals, Arrived

READY_POLL_S = 0.5
# For side requests, which may be sent while the run is being stopped.
ASIDE_S = 2.0
# How long a server that no longer answers may take to end with all of its processes.
ENDING_PATIENCE_S = 4.0
# Paths where servers drop cached prefixes: vLLM in its development mode, SGLang.
RESETS = ("/reset_prefix_cache", "/flush_cache")
RESET_TRIES = 20
RESET_POLL_S = 0.1
# The prompt of the first request.
TRIAL_TEXT = "Hello"
FOREVER_NS = sys.maxsize


# ------------------------------------------------------------------ the server
@dataclass(frozen=True)
class Loaded:
    """A server that is ready, and the model in it.

    `server` is None if it was already running. `card` is the server's entry for the model. `sends_ids`: whether it
    sends the ids of the output's tokens; otherwise they are counted by its usage.
    """

    checkpoint: Checkpoint
    address: Address
    client: Client
    server: Server | None
    card: Mapping[str, Any]
    version: str | None
    sends_ids: bool

    @property
    def positions(self) -> int | None:
        """Maximum number of tokens of a prompt and its output together; None if unknown."""
        hollow = self.checkpoint.hollow
        config = None if hollow is None else hollow.config.get_text_config()
        limits = [self.card.get("max_model_len"), getattr(config, "max_position_embeddings", None)]
        return min(filter(None, limits), default=None)

    def totals(self) -> dict[str, float]:
        """Return the server's counters since its start; empty if it has none that lem recognises."""
        status, text = _ask_aside(self.client, "/metrics")
        found = samples(text) if status == 200 else {}
        return {name: found[f"{full}_total"] for full, name in COUNTERS.items() if f"{full}_total" in found}

    def reset_prefix_cache(self) -> bool:
        """Have the server drop cached prefixes; return whether it did."""
        for path in RESETS:
            for _ in range(RESET_TRIES):
                status, text = _ask_aside(self.client, path, "POST")
                if status != 200:
                    break  # it has no such path
                if "false" not in text.lower():
                    return True
                time.sleep(RESET_POLL_S)  # blocks of the last requests are still in use
        return False

    def body(self, prompt: Encoded, experiment: Experiment) -> bytes:
        """Return the body of the request for a prompt."""
        end_tokens, name = self.checkpoint.end_tokens, str(self.card["id"])
        return json.dumps(
            request_body(experiment, prompt, end_tokens, name, count_by_usage=not self.sends_ids)
        ).encode()

    def checked(self, prompt: Encoded, answer: Answer | Exception) -> Answer:
        """Return an answer.

        Raises:
            RunError: there is none, or it does not fit what the server was sent.
        """
        if isinstance(answer, ServerGone):
            # A server takes a while to end, and what ended it may be about to end this process.
            end = None if self.server is None else self.server.how_it_ended(ENDING_PATIENCE_S)
            raise RunError(f"{answer} {end or ''}".rstrip())
        if isinstance(answer, Refused):
            raise RunError(f"The server did not answer prompt {prompt.index}: {answer}")
        if isinstance(answer, Exception):
            raise answer
        if answer.finish_reason not in ("stop", "length"):
            reason = answer.finish_reason or "it gives no reason"
            raise RunError(f"The server gave up on prompt {prompt.index}: {reason}.")
        if answer.input_tokens not in (None, len(prompt.token_ids)):
            raise RunError(
                f"The server counts {answer.input_tokens} input tokens for prompt {prompt.index}, but "
                f"{len(prompt.token_ids)} were sent: it adds or drops some."
            )
        return answer


def load(experiment: Experiment, address: Address, gpus: Sequence[Gpu], log_folder: Path, ending: ExitStack) -> Loaded:
    """Load the tokenizer, start the server if asked to, wait until it is ready, and try it out.

    Args:
        experiment: one that has passed preflight.
        address: the server's, whether it is running or to be started here.
        gpus: those given to a server that is started here.
        log_folder: takes its log.
        ending: will end the connections and a server that was started here, even if this function fails.

    Raises:
        RunError: the server does not start, does not become ready, or does not answer as it should.
    """
    assert isinstance(experiment.backend, OpenaiBackend)
    options = experiment.backend
    read = checkpoint.read(experiment, {})
    server = None
    if options.command is not None:
        server = _server(experiment, read.model, address, gpus, log_folder / LOG_NAME)
        ending.callback(server.close)
        server.start()
    client = Client(address.base, os.environ.get(options.api_key_env), options.timeout_s)
    ending.callback(client.close)
    client.start()
    models = _wait_for_models(client, server, address, options)
    card = _choose(models, experiment, read.model, address)
    loaded = Loaded(read, address, client, server, card, _version(client), sends_ids=True)
    # One token shows how the server counts, and that it accepts what it will be sent.
    short = replace(experiment, max_output_tokens=1, min_output_tokens=0)
    (prompt,) = encode(read.tokenizer, [TRIAL_TEXT], short, None)
    client.send(0, loaded.body(prompt, short))
    answer = loaded.checked(prompt, client.next_done()[1])
    return replace(loaded, sends_ids=answer.token_ids is not None)


def _server(experiment: Experiment, model: Model, address: Address, gpus: Sequence[Gpu], log: Path) -> Server:
    assert isinstance(experiment.backend, OpenaiBackend)
    assert address.port is not None
    if answers(address.host, address.port, ASIDE_S):
        raise RunError(f"The server cannot be started: its address {address.base} is taken.")
    shown = ",".join(gpu.mig_uuid or str(gpu.index) for gpu in gpus)
    hides_gpus = experiment.backend.device == "cpu"
    command = command_line(experiment, model, address)
    return Server(command, environment(shown if gpus or hides_gpus else None), log)


def _wait_for_models(
    client: Client, server: Server | None, address: Address, options: OpenaiBackend
) -> list[dict[str, Any]]:
    """Return what the server serves, after waiting for it if it was just started."""
    until_s = time.monotonic() + (options.start_timeout_s if server else 0.0)
    answered = None
    while True:
        try:
            status, text = client.fetch("/v1/models")
            answered = f"{address.base}/v1/models answers with HTTP {status}."
        except ServerGone as error:
            status, text = 0, str(error)
        if status == 200:
            return _models_in(text)
        if status in (401, 403):
            raise RunError(f"The server at {address.base} does not accept the API key in ${options.api_key_env}.")
        if server is not None and (end := server.how_it_ended()):
            raise RunError(f"{end} It was not ready yet.")
        if time.monotonic() > until_s:
            last = answered or text
            if server is None:
                raise RunError(last)
            limit = f"{options.start_timeout_s:g} s (backend.start_timeout_s)"
            raise RunError(f"The server was not ready after {limit}. {last}{server.last_words()}")
        time.sleep(READY_POLL_S)


def _models_in(text: str) -> list[dict[str, Any]]:
    try:
        listed = json.loads(text).get("data")
    except (ValueError, AttributeError):
        listed = None
    if not isinstance(listed, list):
        raise RunError("The server's list of models (/v1/models) cannot be read; is it an OpenAI-compatible server?")
    return [card for card in listed if isinstance(card, dict) and "id" in card]


def _choose(models: list[dict[str, Any]], experiment: Experiment, model: Model, address: Address) -> dict[str, Any]:
    """Return the server's entry for the model: the one named, else the only one, else the one with the model's name."""
    assert isinstance(experiment.backend, OpenaiBackend)
    names = [str(card["id"]) for card in models]
    if experiment.backend.model_name is not None:
        wanted = [experiment.backend.model_name]
    else:
        wanted = names if len(names) == 1 else [experiment.model or "", model.path]
    for card in models:
        if card["id"] in wanted:
            return card
    raise RunError(
        f"The server at {address.base} does not serve {wanted[0]}. Set backend.model_name to what it serves: "
        f"{', '.join(names) or 'nothing'}."
    )


def _version(client: Client) -> str | None:
    status, text = _ask_aside(client, "/version")
    with suppress(ValueError):
        found = json.loads(text) if status == 200 else None
        return str(found["version"]) if isinstance(found, dict) and found.get("version") else None
    return None


def _ask_aside(client: Client, path: str, method: str = "GET") -> tuple[int, str]:
    """Return the status and text of the response to a side request; 0 and nothing if there is none."""
    try:
        return client.fetch(path, method=method, timeout_s=ASIDE_S)
    except RunError:
        return 0, ""


# ------------------------------------------------------------------ requests
class OpenaiSession:
    """The requests of one window, from the first prompts after `Backend.forget`; unusable once a request has failed.

    `output_tokens` counts those of the answers so far; `tokens_are_timed`: whether each of them has its own time.
    """

    def __init__(self, experiment: Experiment, loaded: Loaded) -> None:
        self._experiment, self._loaded, self._client = experiment, loaded, loaded.client
        self.is_broken = False
        self.output_tokens = 0
        self.tokens_are_timed = True
        self._waiting: dict[int, Arrived[Encoded]] = {}

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Send batch after batch, each yielded as a whole; or keep a batch's number of requests in flight."""
        batching = self._experiment.batching
        if batching.strategy == "continuous":
            for done in self._served(Arrivals(prompts, None, batching.batch_size, time.perf_counter_ns())):
                yield [replace(done, arrived_ns=None)]
            return
        for number, positions in enumerate(plan_batches([len(p.token_ids) for p in prompts], batching)):
            yield self._batch([prompts[i] for i in positions], number)

    def serve(self, arrivals: Arrivals[Encoded]) -> Iterator[Sequence[Generation]]:
        """Send each prompt when it arrives, whatever else is in flight: the server has the queue."""
        for number, done in enumerate(self._served(arrivals)):
            yield [replace(done, batch=number)]

    def under_way(self) -> list[Begun]:
        """Return the requests sent and not answered yet, since they were sent: the server does not say what waits."""
        now_ns = time.perf_counter_ns()
        waiting = list(self._waiting.values())  # at once: the client's thread adds some
        return [Begun(each.request.index, each.at_ns) for each in waiting if each.at_ns <= now_ns]

    def _batch(self, prompts: Sequence[Encoded], batch: int) -> list[Generation]:
        with self._in_use():
            for number, body in enumerate([self._loaded.body(prompt, self._experiment) for prompt in prompts]):
                self._client.send(number, body)
            done: dict[int, Generation] = {}
            while len(done) < len(prompts):
                number, answer = self._client.next_done()
                done[number] = self._generation(prompts[number], batch, answer)
        return [done[number] for number in range(len(prompts))]

    def _served(self, arrivals: Arrivals[Encoded]) -> Iterator[Generation]:
        """Yield each request as it finishes; by then the next ones have been sent, however long the caller takes."""
        numbers = itertools.count()
        waiting: dict[int, Arrived[Encoded]] = {}
        self._waiting = waiting

        def send() -> None:
            # The client sends each at its time, which may be in the future.
            for each in arrivals.take(FOREVER_NS, sys.maxsize):
                number = next(numbers)
                waiting[number] = each
                self._client.send(number, self._loaded.body(each.request, self._experiment), each.at_ns)

        def take_the_place(answer: Answer) -> None:
            """Let the next request arrive; called in the client's thread, the only one that handles arrivals."""
            arrivals.finished(1, answer.ended_ns)
            send()

        with self._in_use():
            self._client.on_answer = take_the_place
            self._client.run(send)
            while waiting:
                number, answer = self._client.next_done()
                each = waiting.pop(number)
                yield replace(self._generation(each.request, 0, answer), arrived_ns=each.at_ns)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Cancel what is in flight if its results are no longer wanted; after an error the session is unusable."""
        try:
            yield
        except GeneratorExit:
            self._client.cancel()
            raise
        except BaseException:
            self.is_broken = True
            raise
        finally:
            self._client.on_answer = lambda _: None

    def _generation(self, prompt: Encoded, batch: int, answer: Answer | Exception) -> Generation:
        answer, wanted = self._loaded.checked(prompt, answer), self._experiment
        least, most = wanted.min_output_tokens, wanted.max_output_tokens
        if not least <= answer.output_tokens <= most:
            raise RunError(
                f"The server generated {answer.output_tokens} tokens for prompt {prompt.index}; {least} to {most} were "
                "requested: it ignores these limits."
            )
        self.output_tokens += answer.output_tokens
        self.tokens_are_timed = self.tokens_are_timed and answer.chunks_are_known
        return Generation(
            prompt.index,
            batch,
            answer.token_ids or (),
            cast(FinishReason, answer.finish_reason),
            start_ns=answer.sent_ns,
            end_ns=answer.ended_ns,
            chunks=answer.chunks,
            start_is_known=False,
            counted=answer.output_tokens if answer.token_ids is None else None,
        )
