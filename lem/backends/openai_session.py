"""The HTTP side of the openai backend: gets a server ready and sends it requests.

The server is either started for the run or already running. This module also queries the server's models, version and
counters, and has the server drop its prefix cache. It is imported only when the backend starts, because the HTTP client
takes a while to load.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, cast

from lem.backends import checkpoint
from lem.backends.base import Begun, Encoded, Generation
from lem.backends.checkpoint import Checkpoint, encode
from lem.backends.engine import sentence
from lem.backends.openai_answer import Answer, Refused, ServerGone, printable
from lem.backends.openai_client import Client, Failure, samples
from lem.backends.openai_options import Address, as_text, command_line, request_body
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
# The timeout of requests other than completions. It is short, because these requests may be sent during a shutdown.
ASIDE_S = 2.0
# How long a busy server may delay the test request.
TRIAL_PATIENCE_S = 30.0
# How long to wait for a server's processes to end if the server no longer answers.
ENDING_PATIENCE_S = 4.0
# The time within which the kernel closes all sockets of a process that was killed.
CLOSING_S = 0.2
# Paths that make servers drop cached prefixes: vLLM in its development mode, and SGLang.
RESETS = ("/reset_prefix_cache", "/flush_cache")
RESET_TRIES = 20
RESET_POLL_S = 0.1
# How long one thread may keep another from running.
SWITCH_S = 1e-4
# The prompt of the test request.
TRIAL_TEXT = "Hello"
FOREVER_NS = sys.maxsize
# The finish reasons that servers use, and lem's names for them.
FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop", "eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop",
    "length": "length", "max_tokens": "length", "max_length": "length",
}  # fmt: skip
# The HTTP statuses with which servers without a list of models answer a request for it.
NO_SUCH_PATH = (404, 405, 501)
# The maximum size of an answer in bytes: for each token, and for everything else.
LARGEST_TOKEN, LARGEST_REST = 2**16, 2**26
# The maximum number of an answer's events with output: for each token (a proxy may split a token's text over several
# events), and in addition to these.
MOST_EVENTS_PER_TOKEN, MOST_EVENTS_BESIDE = 16, 1000
# The maximum length in characters of a value that a server reports about itself.
LONGEST_TOLD = 200
# The HTTP statuses with which servers reject the form of a request, and the remedy to suggest.
REFUSED_KINDS = (400, 404, 415, 422, 500)
HINT = (
    "If the server accepts prompts only as text, set backend.prompts=text; if it knows only OpenAI's own fields, "
    "set backend.dialect=openai."
)


# ------------------------------------------------------------------ the server
@dataclass(frozen=True)
class Loaded:
    """A server that is ready, and its model.

    `server` is None if the server was already running. `card` is the model's entry in the server's list of models.
    `sends_ids` says whether the server sends the ids of output tokens. If not, output tokens are counted by the server
    or, with `backend.count=tokenizer`, by the tokenizer. `texts` holds the text of each prompt that is sent as text,
    keyed by the prompt's tokens.
    """

    checkpoint: Checkpoint
    address: Address
    client: Client
    server: Server | None
    card: Mapping[str, Any]
    version: str | None
    sends_ids: bool
    texts: dict[tuple[int, ...], str] = field(default_factory=dict)

    @property
    def positions(self) -> int | None:
        """The maximum length of a sequence (prompt and output together) in tokens; None if unknown."""
        hollow = self.checkpoint.hollow
        config = None if hollow is None else hollow.config.get_text_config()
        limits = [self.card.get("max_model_len"), getattr(config, "max_position_embeddings", None)]
        return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)

    def told(self, name: str) -> str | None:
        """Return a value in the model's entry as printable text; None if the entry lacks the value."""
        value = self.card.get(name)
        return printable(str(value))[:LONGEST_TOLD] if value else None

    def totals(self) -> dict[str, float]:
        """Return the server's counters since its start; empty if it has no counters that lem recognizes."""
        status, text = _ask_aside(self.client, "/metrics")
        found = samples(text) if status == 200 else {}
        return {name: found[f"{full}_total"] for full, name in COUNTERS.items() if f"{full}_total" in found}

    def reset_prefix_cache(self) -> bool:
        """Have the server drop its cached prefixes, and return whether it did."""
        for path in RESETS:
            for _ in range(RESET_TRIES):
                status, text = _ask_aside(self.client, path, "POST")
                if status != 200:
                    break  # the server does not have this path
                if "false" not in text.lower():
                    return True
                time.sleep(RESET_POLL_S)  # the cache blocks of the last requests are still in use
        return False

    def body(self, prompt: Encoded, experiment: Experiment) -> bytes:
        """Return the body of the request for a prompt."""
        end_tokens, name = self.checkpoint.end_tokens, str(self.card["id"])
        return json.dumps(
            request_body(
                experiment,
                prompt,
                end_tokens,
                name,
                text=self.text_of(prompt) if _options(experiment).prompts == "text" else None,
                count_by_usage=not self.sends_ids,
            )
        ).encode()

    def text_of(self, prompt: Encoded) -> str:
        """Return a prompt as text; raise RunError if no text produces exactly the prompt's tokens."""
        if prompt.token_ids not in self.texts:
            self.texts[prompt.token_ids] = as_text(self.checkpoint.tokenizer, prompt)
        return self.texts[prompt.token_ids]

    def failure(self, answer: Answer | Failure) -> str | None:
        """Return why a request failed, as a sentence; None if it succeeded.

        Raises:
            RunError: a server that lem started has ended, so that no further request can succeed.
        """
        if isinstance(answer, Failure):
            if isinstance(answer.error, ServerGone) and self.server is not None:
                # A server takes a while to end, and whatever is ending the server may soon end this process, too.
                end = self.server.how_it_ended(0.0 if self._is_listening() else ENDING_PATIENCE_S)
                if end is not None:
                    raise RunError(f"{answer.error} {end}")
            return str(answer.error)
        if answer.finish_reason is not None and answer.finish_reason not in FINISH_REASONS:
            return f"The server stopped generating: {printable(answer.finish_reason)[:80]}."
        return None

    def _is_listening(self) -> bool:
        """Return whether the server accepts connections, both now and a moment later.

        When a server is killed, its connections may be closed before the socket on which it listens.
        """
        host, port = self.address.host, self.address.port or 0
        if not answers(host, port, ASIDE_S):
            return False
        time.sleep(CLOSING_S)
        return answers(host, port, ASIDE_S)

    def counted(self, prompt: Encoded, answer: Answer, experiment: Experiment) -> Answer:
        """Return an answer with its token count and with lem's name for the finish reason.

        Raises:
            RunError: the answer contradicts the request, so that none of the server's counts can be trusted.
        """
        if answer.input_tokens not in (None, len(prompt.token_ids)):
            raise RunError(
                f"The server counted {answer.input_tokens} input tokens for prompt {prompt.index}, but "
                f"{len(prompt.token_ids)} were sent: the server adds or drops tokens."
            )
        least, most = experiment.min_output_tokens, experiment.max_output_tokens
        reason = None if answer.finish_reason is None else FINISH_REASONS[answer.finish_reason]
        if _options(experiment).count == "tokenizer":
            # The end token has no text, so it is added to the count.
            in_text = len(self.checkpoint.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
            reason = reason or ("length" if in_text >= most else "stop")
            return replace(answer, output_tokens=in_text + (reason == "stop"), token_ids=None, finish_reason=reason)
        output_tokens = answer.output_tokens or 0
        if not least <= output_tokens <= most:
            limit = f"a minimum of {least}" if output_tokens < least else f"a maximum of {most}"
            raise RunError(
                f"The server generated {output_tokens} tokens for prompt {prompt.index}, although the request set "
                f"{limit}: the server ignores this limit."
            )
        reason = reason or ("length" if output_tokens == most else "stop")
        return replace(answer, output_tokens=output_tokens, finish_reason=reason)


def load(experiment: Experiment, address: Address, gpus: Sequence[Gpu], log_folder: Path, ending: ExitStack) -> Loaded:
    """Load the tokenizer, start the server if requested, wait until it is ready, and send it a test request.

    Args:
        experiment: an experiment that has passed preflight.
        address: the address of the server, which is either running or to be started here.
        gpus: the GPUs for a server that is started here.
        log_folder: the directory for the server's log.
        ending: an exit stack that will close the connections and stop a server that was started here, even if this
            function fails.

    Raises:
        RunError: the server does not start, does not become ready, or gives an invalid answer.
    """
    assert isinstance(experiment.backend, OpenaiBackend)
    options = experiment.backend
    read = checkpoint.read(experiment, {})
    server = None
    if options.command is not None:
        server = _server(experiment, read.model, address, gpus, log_folder / LOG_NAME)
        ending.callback(server.close)
        server.start()
    client = Client(
        address.base,
        os.environ.get(options.api_key_env),
        options.timeout_s,
        largest=LARGEST_REST + LARGEST_TOKEN * experiment.max_output_tokens,
        most_events=MOST_EVENTS_BESIDE + MOST_EVENTS_PER_TOKEN * experiment.max_output_tokens,
        by_text=options.count == "tokenizer",
    )
    ending.callback(client.close)
    client.start()
    models = _wait_for_models(client, server, address, options)
    card = _choose(models, experiment, read.model, address)
    loaded = Loaded(read, address, client, server, card, _version(client), sends_ids=True)
    # A request for a single token shows how the server counts, and whether it accepts requests of this form.
    short = replace(experiment, max_output_tokens=1, min_output_tokens=0)
    (prompt,) = encode(read.tokenizer, [TRIAL_TEXT], short, None)
    client.send(0, loaded.body(prompt, short), patience_s=min(options.timeout_s, TRIAL_PATIENCE_S))
    _, answer = client.next_done()
    reason = loaded.failure(answer)
    if isinstance(answer, Failure) or reason is not None:
        is_kind = isinstance(answer, Failure) and _is_refusal_of_its_kind(answer)
        raise RunError(f"The first request failed: {reason}{f' {HINT}' if is_kind else ''}")
    answer = loaded.counted(prompt, answer, short)
    _favor_the_client(ending)
    return replace(loaded, sends_ids=answer.token_ids is not None)


def _favor_the_client(ending: ExitStack) -> None:
    """Until `ending` closes, keep the rest of this process from delaying the client's thread, which times the tokens.

    Otherwise, the client's thread waits up to 5 ms for the main thread to release the interpreter, and even longer
    while the garbage collector searches the objects of all libraries loaded so far.
    """
    ending.callback(sys.setswitchinterval, sys.getswitchinterval())
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    ending.callback(gc.unfreeze)


def _is_refusal_of_its_kind(failure: Failure) -> bool:
    """Return whether a request probably failed because of its form, judging by the HTTP status."""
    return isinstance(failure.error, Refused) and failure.error.status in REFUSED_KINDS


def _options(experiment: Experiment) -> OpenaiBackend:
    assert isinstance(experiment.backend, OpenaiBackend)
    return experiment.backend


def _server(experiment: Experiment, model: Model, address: Address, gpus: Sequence[Gpu], log: Path) -> Server:
    assert isinstance(experiment.backend, OpenaiBackend)
    assert address.port is not None
    if answers(address.host, address.port, ASIDE_S):
        raise RunError(f"The server cannot be started: its address {address.base} is already in use.")
    shown = ",".join(gpu.mig_uuid or str(gpu.index) for gpu in gpus)
    hides_gpus = experiment.backend.device == "cpu"
    command = command_line(experiment, model, address)
    return Server(command, environment(shown if gpus or hides_gpus else None), log)


def _wait_for_models(
    client: Client, server: Server | None, address: Address, options: OpenaiBackend
) -> list[dict[str, Any]]:
    """Return the server's list of models, after waiting for the server to be ready if lem has just started it.

    A server without a readable list is assumed to serve `backend.model_name`.
    """
    named = [{"id": options.model_name}] if options.model_name is not None else None
    until_s = time.monotonic() + (options.start_timeout_s if server else 0.0)
    answered = None
    while True:
        try:
            status, text = client.fetch("/v1/models")
            answered = f"{address.base}/v1/models answers with HTTP {status}."
            answered = f"{answered[:-1]}: {text}" if 300 <= status < 400 else answered
        except ServerGone as error:
            status, text = 0, str(error)
        except Refused as error:
            status, text = 0, f"{address.base}/v1/models cannot be read: {error}"
        if status == 200:
            return _models_in(text) or named or _raise_unreadable()
        if named is not None and status in NO_SUCH_PATH:
            return named
        if status in (401, 403):
            raise RunError(f"The server at {address.base} {_refusal(options.api_key_env)}.")
        if server is not None and (end := server.how_it_ended()):
            raise RunError(f"The server did not become ready. {end}")
        if time.monotonic() > until_s:
            last = answered or text
            if server is None:
                hint = " If the server has no list of models, set backend.model_name." if status in NO_SUCH_PATH else ""
                raise RunError(f"{last}{hint}")
            limit = f"{options.start_timeout_s:g} s (backend.start_timeout_s)"
            raise RunError(f"The server was not ready after {limit}. {last}{server.last_words()}")
        time.sleep(READY_POLL_S)


def _refusal(api_key_env: str) -> str:
    if os.environ.get(api_key_env):
        return f"does not accept the API key in ${api_key_env}"
    return f"requires an API key; set the environment variable {api_key_env}"


def _models_in(text: str) -> list[dict[str, Any]]:
    """Return the models in a server's list, whichever format it has; empty if the list cannot be read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if isinstance(found, dict):
        found = next((found[name] for name in ("data", "models") if name in found), None)
    cards = [{"id": each} if isinstance(each, str) else each for each in found] if isinstance(found, list) else []
    named = [card | {"id": card.get("id") or card.get("name")} for card in cards if isinstance(card, dict)]
    return [card for card in named if isinstance(card["id"], str)]


def _raise_unreadable() -> NoReturn:
    raise RunError(
        "The server's list of models (/v1/models) is empty or cannot be read. If the server is OpenAI-compatible, "
        "set backend.model_name to the name of its model."
    )


def _choose(models: list[dict[str, Any]], experiment: Experiment, model: Model, address: Address) -> dict[str, Any]:
    """Return the entry whose id is `backend.model_name`.

    If `backend.model_name` is null, the result is the only entry or, if there are several, the entry whose id is the
    configured model or the model's path.

    Raises:
        RunError: there is no such entry.
    """
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
        f"The server at {address.base} does not serve {wanted[0]}. Set backend.model_name to one of its models: "
        f"{sentence(printable(', '.join(names)))}"
    )


def _version(client: Client) -> str | None:
    status, text = _ask_aside(client, "/version")
    with suppress(ValueError, RecursionError):
        found = json.loads(text) if status == 200 else None
        version = found.get("version") if isinstance(found, dict) else None
        return printable(str(version))[:LONGEST_TOLD] if version else None
    return None


def _ask_aside(client: Client, path: str, method: str = "GET") -> tuple[int, str]:
    """Send a request other than a completion; return the status and the text, or 0 and "" if there is no response."""
    try:
        return client.fetch(path, method=method, timeout_s=ASIDE_S)
    except RunError:
        return 0, ""


# ------------------------------------------------------------------ requests
class OpenaiSession:
    """The requests of one window: all requests since `Backend.forget`.

    `is_broken` is True if the server did not answer the last request or gave an invalid answer. In that case, lem does
    not query the server's counters. `output_tokens` is the number of tokens in the answers so far, `failed` is the
    number of failed requests, and `retries` is how often requests were sent again. `tokens_are_timed` says whether the
    times of tokens are exact. `ignores_stream` says whether an answer came in one piece although streaming was
    requested.
    """

    def __init__(self, experiment: Experiment, loaded: Loaded) -> None:
        self._experiment, self._loaded, self._client = experiment, loaded, loaded.client
        # In open-loop traffic, requests are not sent again, because they would arrive at a different time.
        is_closed = experiment.traffic.pattern in ("closed", "concurrency")
        self._patience_s = _options(experiment).timeout_s if is_closed else 0.0
        self.is_broken = False
        self.output_tokens = self.failed = self.retries = 0
        self.tokens_are_timed = True
        self.ignores_stream = False
        self._waiting: dict[int, Arrived[Encoded]] = {}

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Send one batch after another or, with continuous batching, keep `batch_size` requests in flight."""
        batching = self._experiment.batching
        if batching.strategy == "continuous":
            for done in self._served(Arrivals(prompts, None, batching.batch_size, time.perf_counter_ns())):
                yield [replace(done, arrived_ns=None)]
            return
        for number, positions in enumerate(plan_batches([len(p.token_ids) for p in prompts], batching)):
            yield self._batch([prompts[i] for i in positions], number)

    def serve(self, arrivals: Arrivals[Encoded]) -> Iterator[Sequence[Generation]]:
        """Send each prompt as soon as it arrives, without waiting for answers, because the server queues requests."""
        for number, done in enumerate(self._served(arrivals)):
            yield [replace(done, batch=number)]

    def under_way(self) -> list[Begun]:
        """Return the unanswered requests and when each was sent; which of them the server has begun is unknown."""
        now_ns = time.perf_counter_ns()
        waiting = list(self._waiting.values())  # a copy, because the client's thread adds requests
        return [Begun(each.request.index, each.at_ns) for each in waiting if each.at_ns <= now_ns]

    def _batch(self, prompts: Sequence[Encoded], batch: int) -> list[Generation]:
        with self._in_use():
            for number, body in enumerate([self._loaded.body(prompt, self._experiment) for prompt in prompts]):
                self._client.send(number, body, patience_s=self._patience_s)
            done: dict[int, Generation] = {}
            while len(done) < len(prompts):
                number, answer = self._client.next_done()
                done[number] = self._generation(prompts[number], batch, answer)
        return [done[number] for number in range(len(prompts))]

    def _served(self, arrivals: Arrivals[Encoded]) -> Iterator[Generation]:
        """Yield each request's output as it finishes, while the client sends further requests in the background."""
        numbers = itertools.count()
        waiting: dict[int, Arrived[Encoded]] = {}
        self._waiting = waiting

        def send() -> None:
            # The client sends each request at its arrival time, which may be in the future.
            for each in arrivals.take(FOREVER_NS, sys.maxsize):
                number = next(numbers)
                waiting[number] = each
                body = self._loaded.body(each.request, self._experiment)
                self._client.send(number, body, each.at_ns, patience_s=self._patience_s)

        def take_the_place(answer: Answer | Failure) -> None:
            """Send the next request after an answer; like `send`, called only in the client's thread."""
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
        """Cancel unfinished requests if the caller stops early; after an error, mark the session as broken."""
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

    def _generation(self, prompt: Encoded, batch: int, answer: Answer | Failure) -> Generation:
        """Return the result of a request, which may be a failure."""
        self.retries += answer.retries
        reason = self._loaded.failure(answer)
        if isinstance(answer, Failure) or reason is not None:
            self.failed += 1
            self.is_broken = isinstance(answer, Failure) and isinstance(answer.error, ServerGone)
            return Generation(
                prompt.index, batch, (), "error", answer.sent_ns, answer.ended_ns, start_is_known=False, error=reason
            )
        self.is_broken = False
        answer = self._loaded.counted(prompt, answer, self._experiment)
        output_tokens = answer.output_tokens or 0
        chunks, are_known = answer.chunks(output_tokens)
        self.output_tokens += output_tokens
        self.ignores_stream |= self._experiment.streaming.enabled and not answer.is_streamed
        self.tokens_are_timed &= are_known or not answer.is_streamed
        return Generation(
            prompt.index,
            batch,
            answer.token_ids or (),
            cast(FinishReason, answer.finish_reason),
            start_ns=answer.sent_ns,
            end_ns=chunks[-1].at_ns if chunks else answer.ended_ns,
            chunks=chunks,
            start_is_known=False,
            counted=output_tokens if answer.token_ids is None else None,
        )
