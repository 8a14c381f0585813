"""A server that speaks OpenAI's protocol, asked over HTTP as its users ask it; started for the run, or running already.

Prompts go in as token ids through the completions endpoint, so that tokenizer, end tokens and seeds are those of every
backend. Times are this side's, from sending a request to the arrival of its tokens. What the server keeps to itself is
None: when it began on a request, where prefill ended, how much GPU memory it has taken.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lem.backends import checkpoint
from lem.backends.base import Backend, Encoded, Generation
from lem.backends.openai_options import (
    Address,
    address_of,
    command_line,
    gpus_for,
    objections,
    request_body,
    runs_here,
    wants_gpu,
)
from lem.backends.prompts import encode, end_tokens
from lem.backends.server import LOG_NAME, Server, answers, environment, free_port
from lem.backends.vllm_source import COUNTERS, warnings_of
from lem.errors import ConfigError, RunError
from lem.machine.gpu import Gpu
from lem.machine.host import Host, cpu_model
from lem.machine.processes import listening_at, peak_memory_bytes
from lem.record import CodedWarning, EngineInfo, Memory, ModelInfo
from lem.spec.engines import OpenaiBackend
from lem.spec.experiment import Experiment
from lem.spec.rules import Objection
from lem.warning_codes import warning
from lem.workload.batching import plan_batches
from lem.workload.flops import Architecture
from lem.workload.models import Model, find
from lem.workload.traffic import Arrivals, Arrived

READY_POLL_S = 0.5
# Questions beside the work, which may be asked when the run is being stopped.
ASIDE_S = 2.0
# How long a server that does not answer any more may take to be gone with all of its processes.
ENDING_PATIENCE_S = 4.0
# Where servers drop cached prefixes: vLLM in its development mode, SGLang.
RESETS = ("/reset_prefix_cache", "/flush_cache")
RESET_TRIES = 20
RESET_POLL_S = 0.1
# What a request of one token is asked for, to see how the server answers.
TRIAL_TEXT = "Hello"
FOREVER_NS = sys.maxsize


class Openai(Backend):
    """See the module."""

    tells = frozenset(["tokens", "flops", "counters"])

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, OpenaiBackend)
        self._experiment = experiment
        self._options = experiment.backend
        self._found: Model | None = None
        self._tokenizer: Any = None
        self._hollow: Any = None
        self._end_tokens: frozenset[int] = frozenset()
        self._address = Address("http", "", None)
        self._client: Any = None
        self._server: Server | None = None
        self._gpus: Sequence[Gpu] = ()
        self._card: dict[str, Any] = {}
        self._version: str | None = None
        self._tells_ids = True
        self._is_reset: bool | None = None
        self._is_broken = False
        self._has_run = False
        self._tokens_are_timed = True
        self._own_tokens = 0
        self._before: dict[str, float] = {}
        self._counts: dict[str, float] | None = None
        self._peak: Memory | None = None

    # -------------------------------------------------------------- before the run
    @classmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Object to a server that is not there, and to what it cannot be told."""
        return objections(experiment, model, host)

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return True where this machine has a GPU and the server is on it, unless it is said to use the CPU."""
        assert isinstance(experiment.backend, OpenaiBackend)
        return wants_gpu(experiment.backend, host)

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return the GPUs that the server is taken to run on."""
        self._gpus = gpus_for(self._experiment, host)
        return self._gpus

    def runs_elsewhere(self) -> bool:
        """Tell whether the server is on another machine."""
        return not runs_here(self._options)

    # -------------------------------------------------------------- loading
    def start(self) -> None:
        """Import what speaks HTTP, and settle on the address."""
        from lem.backends.openai_client import Client

        try:
            self._address = address_of(self._options)
        except ConfigError as error:
            raise RunError(f"backend.url: {error}") from None
        if self._address.port is None:
            self._address = replace(self._address, port=free_port())
        key = os.environ.get(self._options.api_key_env)
        self._client = Client(self._address.base, key, self._options.timeout_s)

    def load(self) -> None:
        """Load the tokenizer, start the server if that is asked for, and try it out."""
        self._found = find(self._experiment.model or "", self._experiment.revision)
        trusted = self._experiment.trust_remote_code
        self._tokenizer = checkpoint.load_tokenizer(self._found, trusted=trusted)
        self._hollow = checkpoint.load_hollow(self._found, trusted=trusted)
        self._end_tokens = end_tokens(checkpoint.generation_config(self._found, trusted=trusted), self._tokenizer)
        if self._options.command is not None:
            self._start_server(self._found)
        self._client.start()
        self._card = self._choose(self._wait_for_models())
        self._version = self._told_version()
        self._try_out()

    def _start_server(self, model: Model) -> None:
        assert self._address.port is not None
        if answers(self._address.host, self._address.port, ASIDE_S):
            raise RunError(f"The server cannot be started: its address {self._address.base} is taken.")
        shown = ",".join(gpu.mig_uuid or str(gpu.index) for gpu in self._gpus)
        hides_gpus = self._options.device == "cpu"
        self._server = Server(
            command_line(self._experiment, model, self._address),
            environment(shown if self._gpus or hides_gpus else None),
            (self.log_folder or Path.cwd()) / LOG_NAME,
        )
        self._server.start()

    def _wait_for_models(self) -> list[dict[str, Any]]:
        """Return what the server serves, waiting until it answers if it was started just now."""
        from lem.backends.openai_client import ServerGone

        until_s = time.monotonic() + (self._options.start_timeout_s if self._server else 0.0)
        answered = None
        while True:
            try:
                status, text = self._client.fetch("/v1/models")
                answered = f"{self._address.base}/v1/models answers with HTTP {status}."
            except ServerGone as error:
                status, text = 0, str(error)
            if status == 200:
                return _models_in(text)
            if status in (401, 403):
                raise RunError(
                    f"The server at {self._address.base} wants another API key than ${self._options.api_key_env} has."
                )
            if self._server is not None and (end := self._server.how_it_ended()):
                raise RunError(f"{end} It was not ready yet.")
            if time.monotonic() > until_s:
                raise RunError(self._not_ready(answered or text))
            time.sleep(READY_POLL_S)

    def _not_ready(self, last: str) -> str:
        """Return a sentence about a server that does not get ready, given what it answered last."""
        if self._server is None:
            return last
        limit = f"{self._options.start_timeout_s:g} s (backend.start_timeout_s)"
        return f"The server was not ready after {limit}. {last}{self._server.last_words()}"

    def _choose(self, models: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the server's entry of the model: the one named, else the only one, else that of the model's name."""
        assert self._found is not None
        names = [str(card["id"]) for card in models]
        if self._options.model_name is not None:
            wanted = [self._options.model_name]
        else:
            wanted = names if len(names) == 1 else [self._experiment.model or "", self._found.path]
        for card in models:
            if card["id"] in wanted:
                return card
        raise RunError(
            f"The server at {self._address.base} does not serve {wanted[0]}. Set backend.model_name to what it serves: "
            f"{', '.join(names) or 'nothing'}."
        )

    def _told_version(self) -> str | None:
        try:
            status, text = self._client.fetch("/version", timeout_s=ASIDE_S)
            told = json.loads(text) if status == 200 else None
        except (RunError, ValueError):
            return None
        return str(told["version"]) if isinstance(told, dict) and told.get("version") else None

    def _try_out(self) -> None:
        """Ask for one token, to learn how the server counts and that it takes what it will be sent."""
        (prompt,) = encode(self._tokenizer, [TRIAL_TEXT], replace(self._experiment, max_output_tokens=1), None)
        short = replace(self._experiment, max_output_tokens=1, min_output_tokens=0)
        self._client.send(0, self._body(prompt, short))
        answer = self._answered(prompt, self._client.next_done()[1])
        self._tells_ids = answer.token_ids is not None

    # -------------------------------------------------------------- running
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize each text by itself, with the model's own special tokens."""
        limits = [self._card.get("max_model_len"), getattr(self._config(), "max_position_embeddings", None)]
        return encode(self._tokenizer, texts, self._experiment, min(filter(None, limits), default=None))

    def _config(self) -> Any:
        return None if self._hollow is None else self._hollow.config.get_text_config()

    def forget(self) -> None:
        """Have the server empty its prefix cache, if it lets itself be told to, and count anew."""
        self._is_reset = self._reset_prefix_cache()
        self._before = self._totals()
        self._has_run, self._own_tokens, self._counts = False, 0, None
        self._tokens_are_timed = True

    def _reset_prefix_cache(self) -> bool:
        for path in RESETS:
            for _ in range(RESET_TRIES):
                status, text = self._aside(path, "POST")
                if status != 200:
                    break  # it has no such thing
                if "false" not in text.lower():
                    return True
                time.sleep(RESET_POLL_S)  # blocks of the last requests are still held
        return False

    def _aside(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Return what the server answers to a question beside the work; 0 and nothing when it does not."""
        if self._is_broken:
            return 0, ""
        try:
            status, text = self._client.fetch(path, method=method, timeout_s=ASIDE_S)
        except RunError:
            return 0, ""
        return int(status), str(text)

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Send batch after batch, each yielded as a whole; or keep as many in flight as a batch has."""
        self._runs()
        batching = self._experiment.batching
        if batching.strategy == "continuous":
            places = Arrivals(prompts, None, batching.batch_size, time.perf_counter_ns())
            for done in self._served(places):
                yield [replace(done, arrived_ns=None)]
            return
        for number, positions in enumerate(plan_batches([len(p.token_ids) for p in prompts], batching)):
            yield self._batch([prompts[i] for i in positions], number)

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Send each prompt when it arrives, whatever else is in flight: the server has the queue."""
        self._runs()
        for number, done in enumerate(self._served(arrivals)):
            yield [replace(done, batch=number)]

    def _runs(self) -> None:
        self._has_run, self._counts = True, None

    def _batch(self, prompts: Sequence[Encoded], batch: int) -> list[Generation]:
        with self._breaking_off():
            for number, body in enumerate([self._body(prompt, self._experiment) for prompt in prompts]):
                self._client.send(number, body)
            done: dict[int, Generation] = {}
            while len(done) < len(prompts):
                number, answer = self._client.next_done()
                done[number] = self._generation(prompts[number], batch, answer)
        return [done[number] for number in range(len(prompts))]

    def _served(self, arrivals: Arrivals[Encoded]) -> Iterator[Generation]:
        """Yield each as it is finished; the next ones are on their way by then, however long dealing with it takes."""
        numbers, waiting = itertools.count(), dict[int, Arrived[Encoded]]()

        def send() -> None:
            # The client waits for the moment of each, which may lie ahead.
            for each in arrivals.take(FOREVER_NS, sys.maxsize):
                number = next(numbers)
                waiting[number] = each
                self._client.send(number, self._body(each.request, self._experiment), each.at_ns)

        def take_the_place(answer: Any) -> None:
            """Let the next one arrive; called in the client's thread, which alone deals with arrivals."""
            arrivals.finished(1, answer.ended_ns)
            send()

        with self._breaking_off():
            self._client.on_answer = take_the_place
            self._client.run(send)
            while waiting:
                number, answer = self._client.next_done()
                each = waiting.pop(number)
                yield replace(self._generation(each.request, 0, answer), arrived_ns=each.at_ns)

    @contextmanager
    def _breaking_off(self) -> Iterator[None]:
        """Break off what nobody waits for any more; remember when the server cannot be asked any more."""
        try:
            yield
        except GeneratorExit:
            if self._client is not None:
                self._client.cancel()
            raise
        except BaseException:
            self._is_broken = True
            raise
        finally:
            if self._client is not None:
                self._client.on_answer = lambda _: None

    def _body(self, prompt: Encoded, experiment: Experiment) -> bytes:
        body = request_body(
            experiment, prompt, self._end_tokens, str(self._card["id"]), count_by_usage=not self._tells_ids
        )
        return json.dumps(body).encode()

    def _answered(self, prompt: Encoded, answer: Any) -> Any:
        """Return an answer; raises `RunError` where there is none, or where the server was asked for something else."""
        from lem.backends.openai_client import Answer, Refused, ServerGone

        if isinstance(answer, ServerGone):
            # A server that is being ended takes a while; and what has ended it may be about to end this process.
            end = None if self._server is None else self._server.how_it_ended(ENDING_PATIENCE_S)
            raise RunError(f"{answer} {end or ''}".rstrip())
        if isinstance(answer, Refused):
            raise RunError(f"The server has not answered prompt {prompt.index}: {answer}")
        if not isinstance(answer, Answer):
            raise answer
        if answer.finish_reason not in ("stop", "length"):
            raise RunError(
                f"The server gave up prompt {prompt.index}: {answer.finish_reason or 'it does not say why'}."
            )
        if answer.input_tokens not in (None, len(prompt.token_ids)):
            raise RunError(
                f"The server counts {answer.input_tokens} input tokens for prompt {prompt.index}, and "
                f"{len(prompt.token_ids)} were sent: it adds or cuts some."
            )
        return answer

    def _generation(self, prompt: Encoded, batch: int, answer: Any) -> Generation:
        answer, wanted = self._answered(prompt, answer), self._experiment
        least, most = wanted.min_output_tokens, wanted.max_output_tokens
        if not least <= answer.output_tokens <= most:
            raise RunError(
                f"The server has made {answer.output_tokens} tokens of prompt {prompt.index}; asked for were {least} "
                f"to {most}: it does not heed what it is asked."
            )
        self._own_tokens += answer.output_tokens
        self._tokens_are_timed = self._tokens_are_timed and answer.chunks_are_known
        return Generation(
            prompt.index,
            batch,
            answer.token_ids or (),
            answer.finish_reason,
            start_ns=answer.sent_ns,
            end_ns=answer.ended_ns,
            chunks=answer.chunks,
            start_is_told=False,
            counted=answer.output_tokens if answer.token_ids is None else None,
        )

    # -------------------------------------------------------------- telling
    def counters(self) -> dict[str, float] | None:
        """Return the server's own counts since `forget`; None where it has none that are known here."""
        if not self._has_run:
            return None
        if self._counts is None and (now := self._totals()):
            self._counts = {name: total - self._before.get(name, 0.0) for name, total in now.items()}
        return self._counts

    def _totals(self) -> dict[str, float]:
        from lem.backends.openai_client import samples

        status, text = self._aside("/metrics")
        told = samples(text) if status == 200 else {}
        return {name: told[f"{full}_total"] for full, name in COUNTERS.items() if f"{full}_total" in told}

    def server_pids(self) -> Sequence[int]:
        """Return the processes of a server on this machine that was running already."""
        return [] if self._server is not None else [process.pid for process in self._processes()]

    def _processes(self) -> list[Any]:
        if self._server is not None:
            return self._server.processes()
        return [] if self.runs_elsewhere() or self._address.port is None else listening_at(self._address.port)

    def peak_memory(self) -> Memory:
        """Return the peaks of the main memory of the server's processes; what it has of a GPU's is not known."""
        processes = self._processes()
        if self._gpus:
            return Memory(None, "a server does not tell its GPU memory")
        if processes or self._peak is None:
            several = "1 process" if len(processes) == 1 else f"{len(processes)} processes"
            scope = (
                "unknown: the server runs elsewhere" if self.runs_elsewhere() else f"server's {several}, since start"
            )
            self._peak = Memory(peak_memory_bytes(process.pid for process in processes), scope)
        return self._peak

    def model_info(self) -> ModelInfo | None:
        """Describe the model as its files do; of what the server has made of them nothing is known."""
        assert self._found is not None
        config = self._found.config
        is_told = "{dtype}" in (self._options.command or "") and self._experiment.fp_precision != "auto"
        return ModelInfo(
            name=self._found.name,
            revision=self._found.revision,
            architecture=", ".join(config.get("architectures") or ["unknown"]),
            parameters=None if self._hollow is None else self._hollow.num_parameters(),
            random_weights=self._found.random_weights,
            weights_bytes=None,
            dtype=self._experiment.fp_precision if is_told else None,
            quantization=(config.get("quantization_config") or {}).get("quant_method"),
        )

    def engine_info(self) -> EngineInfo:
        """Describe the server, as far as it tells."""
        here = "cpu" if not self._gpus else ", ".join(f"cuda:{i}" for i in range(len(self._gpus)))
        name = self._gpus[0].name if self._gpus else cpu_model()
        maker = str(self._card.get("owned_by") or "server")
        return EngineInfo(
            backend="openai",
            version=f"{maker} {self._version or 'of an unknown version'}",
            device="remote" if self.runs_elsewhere() else here,
            device_name="another machine" if self.runs_elsewhere() else name,
            settings={
                "address": self._address.base,
                "started_by_lem": "on" if self._options.command else "off",
                "dialect": self._options.dialect,
                "served_model": str(self._card.get("id")),
                "served_model_root": str(self._card.get("root") or "unknown"),
                "max_model_len": str(self._card.get("max_model_len") or "unknown"),
                "output_tokens_counted_by": "ids" if self._tells_ids else "the server's usage",
                "prefix_cache_reset": {True: "on", False: "off", None: "unknown"}[self._is_reset],
                "end_token_ids": self._told_end_tokens(),
                "chat_template": "on" if self._experiment.chat_template else "off",
                **({"extra_body": json.dumps(self._options.extra_body)} if self._options.extra_body else {}),
            },
        )

    def _told_end_tokens(self) -> str:
        if self._options.dialect == "openai":
            return "the server's own"
        return ",".join(map(str, sorted(self._end_tokens))) or "none"

    def architecture(self) -> Architecture | None:
        """Read the sizes off the model without weights, by the same code as for PyTorch."""
        return checkpoint.sizes(self._hollow)

    def warnings(self) -> list[CodedWarning]:
        """Say what is not measured or not known of a server, and what its counts give to doubt."""
        assert self._found is not None
        counts, notes = self.counters(), []
        if self.runs_elsewhere():
            text = f"the server at {self._address.base} runs on another machine: what it takes cannot be metered here."
            notes.append(warning("server_elsewhere", text))
        if self._found.random_weights:
            notes.append(warning("random_weights", f"{self._found.name} has random weights: its text has no meaning."))
        if self._has_run and not self._is_reset and (counts or {}).get("prefix_cache_hit_tokens") != 0:
            text = "the server cannot be told to drop cached prefixes, which the warm-up or others may have left."
            notes.append(warning("prefix_cache_kept", text))
        if not self._tokens_are_timed:
            text = "the server's events do not tell their tokens; these are spread from the first event to the last."
            notes.append(warning("tokens_not_timed", text))
        others = (counts or {}).get("generation_tokens", 0) - self._own_tokens
        if others > 0 and not self._is_broken:
            notes.append(warning("server_shared", f"it has made {others:.0f} tokens for others in the window."))
        return [*notes, *warnings_of(counts or {})]

    def close(self) -> None:
        """End the connections, and the server if it was started here."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        if self._server is not None:
            with suppress(OSError):
                self._server.close()


def _models_in(text: str) -> list[dict[str, Any]]:
    try:
        listed = json.loads(text).get("data")
    except (ValueError, AttributeError):
        listed = None
    if not isinstance(listed, list):
        raise RunError("The server's list of models (/v1/models) cannot be read; is it an OpenAI-compatible server?")
    return [card for card in listed if isinstance(card, dict) and "id" in card]
