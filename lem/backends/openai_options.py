"""Translates lem's options into a server's address, command and request bodies, and reports unsuitable options.

This module imports no HTTP library. It knows nothing about requests in flight or about time.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from lem.backends.base import Encoded
from lem.backends.objections import model_objections, set_by_lem, unused_gpus
from lem.backends.server import answers, program_path
from lem.backends.vllm_options import raised_temperature, sampling_parameters, seed_of
from lem.errors import ConfigError, RunError, did_you_mean
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.spec.engines import OpenaiBackend
from lem.spec.experiment import Batching, Experiment
from lem.spec.processes import changed, gpus_needed
from lem.spec.rules import Objection, without_effect
from lem.workload.models import Model

HERE = "127.0.0.1"
PLACEHOLDERS = ("model", "revision", "host", "port", "dtype", "seed", "batch_size", "degree")
PLACEHOLDER = re.compile(r"\{(\w+)\}")  # does not match JSON, which has quotes after its braces
DEFAULT_PORTS = {"http": 80, "https": 443}
# Request fields that lem sets, and what sets each: an option, or lem for the given reason.
OF_LEM = {
    "model": "backend.model_name",
    "prompt": "dataset",
    "max_tokens": "max_output_tokens",
    "min_tokens": "min_output_tokens",
    **{name: f"decoder.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "seed": "seed",
    **dict.fromkeys(("stream", "stream_options"), "streaming.enabled"),
    **dict.fromkeys(("ignore_eos", "stop_token_ids"), "lem, to the model's end tokens"),
    "return_token_ids": "lem, which counts the ids",
    **dict.fromkeys(("n", "best_of", "echo", "use_beam_search"), "lem, which requests one output for each prompt"),
}
# Decoder options for which OpenAI's protocol has no field.
OF_VLLM = ("top_k", "min_p", "repetition_penalty")
# The meters that are allowed if the server runs on another machine.
NOT_OF_THIS_MACHINE = ("auto", "none")
KEY_ARGUMENT = re.compile(r"--api[-_]key\b")
REACH_S = 3.0
REMEMBER_S = 10.0


# ------------------------------------------------------------------ where
@dataclass(frozen=True)
class Address:
    """A server's address; `path` is the part before /v1, and `port` is None until a port is chosen."""

    scheme: str
    host: str
    port: int | None
    path: str = ""

    @property
    def base(self) -> str:
        """The beginning of the server's URLs: scheme, host, port and path."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}{self.path}"

    @property
    def is_here(self) -> bool:
        """Whether this is a loopback address, which means that the server runs on this machine."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")


def address_of(options: OpenaiBackend) -> Address:
    """Return the server's address; if no URL is set, the port is None, because it has yet to be chosen.

    Raises:
        ConfigError: the URL is not a server's address; the message says why.
    """
    if options.url is None:
        return Address("http", HERE, None)
    try:
        parts = urlsplit(options.url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"it is not a URL ({error}).") from None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ConfigError("it is not the URL of a server.")
    if parts.username or parts.password:
        raise ConfigError("it contains a user name or password, but the address is written to every record.")
    if parts.query or parts.fragment:
        raise ConfigError("it contains more than a path after the host.")
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    return Address(parts.scheme, parts.hostname, port or DEFAULT_PORTS[parts.scheme], path)


def runs_here(options: OpenaiBackend) -> bool:
    """Return whether the server runs on this machine."""
    if options.device != "auto":
        return options.device == "cpu"
    try:
        return options.command is not None or address_of(options).is_here
    except ConfigError:
        return False


def wants_gpu(options: OpenaiBackend, host: Host) -> bool:
    """Return whether the server is assumed to use this machine's GPUs."""
    return may_use_gpu(options) and bool(host.gpus)


def may_use_gpu(options: OpenaiBackend) -> bool:
    """Return whether the server may use a GPU of this machine, even one that is hidden from lem."""
    return options.device == "auto" and runs_here(options)


def gpus_for(experiment: Experiment, host: Host) -> Sequence[Gpu]:
    """Return the GPUs that the server is assumed to use, and that are metered.

    For a server that is already running, these are the GPUs named in `gpus`, or all visible GPUs. A server that lem
    starts gets as many GPUs as the parallelism needs; if GPUs are named but no degree of parallelism is set, it gets
    all named GPUs.
    """
    options = _options(experiment)
    if not wants_gpu(options, host):
        return ()
    needs_are_known = experiment.gpus is None or experiment.parallelism.degree > 1
    return host.gpus[: gpus_needed(experiment)] if options.command is not None and needs_are_known else host.gpus


# ------------------------------------------------------------------ the command
def command_line(experiment: Experiment, model: Model, address: Address) -> list[str]:
    """Return the command that starts the server, as a list of arguments with the placeholders filled in."""
    options = _options(experiment)
    values = {
        "model": model.path,
        "revision": model.revision or "main",
        "host": address.host,
        "port": address.port,
        "dtype": experiment.fp_precision,
        "seed": experiment.seed,
        "batch_size": experiment.batching.batch_size,
        "degree": experiment.parallelism.degree,
    }
    return [PLACEHOLDER.sub(lambda found: str(values[found[1]]), part) for part in shlex.split(options.command or "")]


def _has(options: OpenaiBackend, placeholder: str) -> bool:
    return options.command is not None and f"{{{placeholder}}}" in options.command


# ------------------------------------------------------------------ requests
def as_text(tokenizer: Any, prompt: Encoded) -> str:
    """Return a text that the server, which adds special tokens itself, will turn into exactly the prompt's tokens.

    Raises:
        RunError: no text produces exactly the prompt's tokens.
    """
    ids = list(prompt.token_ids)
    added = [token for token in tokenizer("")["input_ids"] if token in tokenizer.all_special_ids]
    inside = ids[1:] if ids and ids[0] in added else ids
    for some in (inside, inside[:-1] if inside and inside[-1] in added else inside):
        text = str(tokenizer.decode(some, clean_up_tokenization_spaces=False))
        if list(tokenizer(text)["input_ids"]) == ids:
            return text
    raise RunError(
        f"Prompt {prompt.index} cannot be sent as text (backend.prompts=text): no text produces exactly its tokens. "
        "Leave out max_input_tokens or the chat template, or use a server that takes token ids."
    )


def request_body(
    experiment: Experiment,
    prompt: Encoded,
    end_tokens: frozenset[int],
    model_name: str,
    *,
    text: str | None = None,
    count_by_usage: bool,
) -> dict[str, Any]:
    """Return the body of a request for one prompt.

    Args:
        experiment: an experiment that has passed preflight.
        prompt: the prompt as token ids.
        end_tokens: the model's end tokens.
        model_name: the model's name on the server.
        text: the prompt as text, to be sent instead of the token ids; None to send the ids.
        count_by_usage: whether each event should state the number of tokens so far, because the server sends no ids.
    """
    options = _options(experiment)
    asks_vllm = options.dialect == "vllm"
    fields = _vllm_fields(experiment, prompt, end_tokens) if asks_vllm else _plain_fields(experiment, prompt)
    if experiment.streaming.enabled:
        each_event = {"continuous_usage_stats": True} if asks_vllm and count_by_usage else {}
        fields |= {"stream": True, "stream_options": {"include_usage": True, **each_event}}
    content = list(prompt.token_ids) if text is None else text
    return {"model": model_name, "prompt": content, **fields, **(options.extra_body or {})}


def _vllm_fields(experiment: Experiment, prompt: Encoded, end_tokens: frozenset[int]) -> dict[str, Any]:
    """Return all sampling fields, with the same values as in the vllm backend.

    Each field is always sent, because a server may use the model's own default for a missing field.
    """
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    fields = neutral | sampling_parameters(experiment, prompt.index, end_tokens) | {"return_token_ids": True}
    del fields["detokenize"]
    # Every server that knows this field understands -1 as all tokens.
    return fields | ({"top_k": -1} if fields["top_k"] == 0 else {})


def _plain_fields(experiment: Experiment, prompt: Encoded) -> dict[str, Any]:
    decoder = experiment.decoder
    if not decoder.do_sample:
        return {"max_tokens": experiment.max_output_tokens, "temperature": 0.0}
    return {
        "max_tokens": experiment.max_output_tokens,
        "temperature": decoder.temperature,
        "top_p": decoder.top_p,
        "seed": seed_of(experiment, prompt.index),
    }


def _options(experiment: Experiment) -> OpenaiBackend:
    assert isinstance(experiment.backend, OpenaiBackend)
    return experiment.backend


# ------------------------------------------------------------------ objections
def objections(experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
    """Return all objections; if `model` is None, the checks that need the model are skipped."""
    options = _options(experiment)
    return [
        *_address(options),
        *_command(options),
        *_not_passed_on(experiment),
        *_not_in_dialect(experiment),
        *_processes(experiment),
        *_batching(experiment),
        *_extra_body(options),
        *_key(options),
        *_meters(experiment),
        *(unused_gpus(experiment, host.gpus) if experiment.parallelism.degree > 1 else ()),
        *model_objections(experiment, model),
    ]


def _address(options: OpenaiBackend) -> Iterator[Objection]:
    if options.url is None and options.command is None:
        yield Objection("no_server", "backend.url", "neither an address nor a command that starts a server is set.")
        return
    try:
        address = address_of(options)
    except ConfigError as error:
        yield Objection("bad_server_url", "backend.url", str(error))
        return
    if address.port is None:
        return
    is_listening = _answers(address.host, address.port, int(time.monotonic() / REMEMBER_S))
    if options.command is None and not is_listening:
        yield Objection("server_unreachable", "backend.url", f"nothing is listening at {address.base}.")
    if options.command is not None and is_listening:
        fact = f"port {address.port} of {address.host} is already in use."
        yield Objection("server_port_taken", "backend.url", fact)


@cache
def _answers(host: str, port: int, _now: int) -> bool:
    """Return whether a server accepts connections; cached per value of `_now`, because a study may have many cells."""
    return answers(host, port, REACH_S)


def _command(options: OpenaiBackend) -> Iterator[Objection]:
    path = "backend.command"
    if options.command is None:
        if changed(options, "start_timeout_s"):
            yield without_effect("no_effect_start_limit", "backend.start_timeout_s", "lem does not start a server.")
        return
    try:
        parts = shlex.split(options.command)
    except ValueError as error:
        yield Objection("bad_server_command", path, f"it cannot be parsed: {error}.".lower())
        return
    for name in dict.fromkeys(PLACEHOLDER.findall(options.command)):
        if name not in PLACEHOLDERS:
            hint = did_you_mean(name, PLACEHOLDERS) or f" The placeholders are {', '.join(PLACEHOLDERS)}."
            yield Objection("bad_server_command", path, f"there is no placeholder {{{name}}}.{hint}")
    if options.url is None and not _has(options, "port"):
        fact = "without backend.url, the command must contain {port}, for the port that lem chooses."
        yield Objection("bad_server_command", path, fact)
    if parts and program_path(parts[0]) is None:
        yield Objection("missing_program", path, f"there is no program {parts[0]}.")


def _not_passed_on(experiment: Experiment) -> Iterator[Objection]:
    """Object to options that would have no effect, because neither the command nor a request passes them on."""
    options = _options(experiment)
    to_fill_in = {
        "fp_precision": ("dtype", experiment.fp_precision != "auto"),
        "revision": ("revision", experiment.revision is not None and options.command is not None),
        "parallelism.degree": ("degree", experiment.parallelism.degree > 1),
    }
    for path, (placeholder, is_set) in to_fill_in.items():
        if is_set and not _has(options, placeholder):
            fact = f"this option reaches the server only if backend.command contains {{{placeholder}}}."
            yield Objection("server_not_told", path, fact)
    in_no_request = {
        "adapter": (
            experiment.adapter is not None,
            "; use backend.model_name to choose an adapter that the server has loaded",
        ),
        "quantization.quantization": (experiment.quantization.quantization, ""),
        "decoder.no_repeat_ngram_size": (experiment.decoder.no_repeat_ngram_size > 0, ""),
    }
    for path, (is_set, instead) in in_no_request.items():
        if is_set:
            yield Objection("server_not_told", path, f"requests have no field for this option{instead}.")


def _not_in_dialect(experiment: Experiment) -> Iterator[Objection]:
    decoder = experiment.decoder
    if _options(experiment).dialect == "vllm":
        yield from raised_temperature(decoder)
        return
    paths = [f"decoder.{name}" for name in changed(decoder, *OF_VLLM)]
    for path in [*paths, *(["min_output_tokens"] if experiment.min_output_tokens else [])]:
        fact = "OpenAI's protocol has no field for this option, but backend.dialect=vllm has one."
        yield Objection("server_not_told", path, fact)


def _processes(experiment: Experiment) -> Iterator[Objection]:
    fact = "a single process sends all requests to the server."
    if experiment.num_processes > 1:
        yield Objection("server_processes", "num_processes", fact)
    if experiment.parallelism.strategy == "data_parallel":
        yield Objection("server_processes", "parallelism.strategy", fact)


def _batching(experiment: Experiment) -> Iterator[Objection]:
    """Object to batching options if requests are sent as they arrive, because then no batches are formed."""
    if experiment.traffic.pattern == "closed" or experiment.batching.strategy == "continuous":
        return
    if experiment.batching != Batching():
        fact = "if traffic is configured, each request is sent as it arrives, and the server queues it."
        yield without_effect("no_effect_batching", "batching", fact)


def _extra_body(options: OpenaiBackend) -> Iterator[Objection]:
    names = [name for name in options.extra_body or {} if name in OF_LEM]
    yield from (set_by_lem(f"backend.extra_body.{name}", OF_LEM[name]) for name in names)


def _key(options: OpenaiBackend) -> Iterator[Objection]:
    """Object to an API key that is missing, or that would be written into every record."""
    key = os.environ.get(options.api_key_env)
    for name in ("url", "command", "extra_body"):
        text = str(getattr(options, name))
        if (key and key in text) or (name == "command" and KEY_ARGUMENT.search(text)):
            fact = "it contains an API key, but the configuration is written to files that may be published."
            yield Objection("api_key_in_config", f"backend.{name}", fact)
    if changed(options, "api_key_env") and not key:
        fact = f"the environment variable {options.api_key_env} is not set."
        yield Objection("no_api_key", "backend.api_key_env", fact)


def _meters(experiment: Experiment) -> Iterator[Objection]:
    options = _options(experiment)
    is_named = (options.url, options.command) != (None, None)
    if is_named and not runs_here(options) and experiment.energy.name not in NOT_OF_THIS_MACHINE:
        fact = f"{experiment.energy.name} reads this machine, but the server runs on another machine."
        yield Objection("no_meter_elsewhere", "energy", fact)
