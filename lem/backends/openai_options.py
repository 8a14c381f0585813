"""From lem's options to a server's: its address, the command that starts it, requests, what speaks against a run.

Imports no library of HTTP. Knows no request in flight and no time.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from lem.backends.base import Encoded
from lem.backends.objections import model_objections, unused_gpus
from lem.backends.server import answers, program_path
from lem.backends.vllm_options import raised_temperature, sampling_parameters, seed_of
from lem.errors import ConfigError, did_you_mean
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.spec.engines import OpenaiBackend
from lem.spec.experiment import Batching, Experiment
from lem.spec.processes import changed, gpus_needed
from lem.spec.rules import Objection, without_effect
from lem.workload.models import Model

HERE = "127.0.0.1"
PLACEHOLDERS = ("model", "revision", "host", "port", "dtype", "seed", "batch_size", "degree")
PLACEHOLDER = re.compile(r"\{(\w+)\}")  # not JSON, which has quotes
DEFAULT_PORTS = {"http": 80, "https": 443}
# Fields of a request that lem gives by itself, and what gives them.
OF_LEM = {
    "model": "backend.model_name",
    "prompt": "dataset",
    "max_tokens": "max_output_tokens",
    "min_tokens": "min_output_tokens",
    **{name: f"decoder.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "seed": "seed",
    "stream": "streaming.enabled",
    "stream_options": "streaming.enabled",
    **dict.fromkeys(("ignore_eos", "stop_token_ids"), "lem itself, with the model's end tokens"),
    "return_token_ids": "lem itself, which counts by them",
    **dict.fromkeys(("n", "best_of", "echo", "use_beam_search"), "lem itself: one output for each prompt"),
}
# Decoding that OpenAI's protocol has no field for.
OF_VLLM = ("top_k", "min_p", "repetition_penalty")
# Meters that a run on another machine can do without.
NOT_OF_THIS_MACHINE = ("auto", "none")
KEY_ARGUMENT = re.compile(r"--api[-_]key\b")
REACH_S = 3.0
REMEMBER_S = 10.0


# ------------------------------------------------------------------ where
@dataclass(frozen=True)
class Address:
    """Where a server is: `base` is scheme, host, port and path before /v1; no port yet where one will be chosen."""

    scheme: str
    host: str
    port: int | None
    path: str = ""

    @property
    def base(self) -> str:
        """The beginning of its URLs."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}{self.path}"

    @property
    def is_here(self) -> bool:
        """Whether it is an address that only this machine has."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")


def address_of(options: OpenaiBackend) -> Address:
    """Return the server's address; a port is still to be chosen where no url is given.

    Raises:
        ConfigError: the url is none, with the reason.
    """
    if options.url is None:
        return Address("http", HERE, None)
    try:
        parts = urlsplit(options.url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"it is no URL ({error}).") from None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ConfigError("it is no URL of a server: http://host:port.")
    if parts.username or parts.password:
        raise ConfigError("it holds a name or a password, and it is written into every record.")
    if parts.query or parts.fragment:
        raise ConfigError("it has more than a path behind the host.")
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    return Address(parts.scheme, parts.hostname, port or DEFAULT_PORTS[parts.scheme], path)


def runs_here(options: OpenaiBackend) -> bool:
    """Tell whether the model runs on this machine."""
    if options.device != "auto":
        return options.device == "cpu"
    try:
        return options.command is not None or address_of(options).is_here
    except ConfigError:
        return False


def wants_gpu(options: OpenaiBackend, host: Host) -> bool:
    """Tell whether the model is taken to run on GPUs of this machine."""
    return options.device == "auto" and runs_here(options) and bool(host.gpus)


def gpus_for(experiment: Experiment, host: Host) -> Sequence[Gpu]:
    """Return the GPUs that are taken to be the server's, and are metered: those named, else all, else those needed.

    A server that is started gets as many as the parallelism needs, unless it is given all that are named.
    """
    options = _options(experiment)
    if not wants_gpu(options, host):
        return ()
    is_told_how_many = experiment.gpus is None or experiment.parallelism.degree > 1
    return host.gpus[: gpus_needed(experiment)] if options.command is not None and is_told_how_many else host.gpus


# ------------------------------------------------------------------ the command
def command_line(experiment: Experiment, model: Model, address: Address) -> list[str]:
    """Return the program and the arguments that start the server; its placeholders are known."""
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
    return [_filled(part, values) for part in shlex.split(options.command or "")]


def _filled(part: str, values: Mapping[str, Any]) -> str:
    return PLACEHOLDER.sub(lambda found: str(values[found[1]]), part)


def _has(options: OpenaiBackend, placeholder: str) -> bool:
    return options.command is not None and f"{{{placeholder}}}" in options.command


# ------------------------------------------------------------------ requests
def request_body(
    experiment: Experiment, prompt: Encoded, end_tokens: frozenset[int], model_name: str, *, count_by_usage: bool
) -> dict[str, Any]:
    """Return the body of a request for one prompt.

    Args:
        experiment: without objections.
        prompt: goes in as token ids.
        end_tokens: of the model.
        model_name: what the server calls it.
        count_by_usage: have the server count the tokens with each event, for it does not tell their ids.
    """
    options = _options(experiment)
    asks_vllm = options.dialect == "vllm"
    fields = _vllm_fields(experiment, prompt, end_tokens) if asks_vllm else _plain_fields(experiment, prompt)
    if experiment.streaming.enabled:
        each_event = {"continuous_usage_stats": True} if asks_vllm and count_by_usage else {}
        fields |= {"stream": True, "stream_options": {"include_usage": True, **each_event}}
    return {"model": model_name, "prompt": list(prompt.token_ids), **fields, **(options.extra_body or {})}


def _vllm_fields(experiment: Experiment, prompt: Encoded, end_tokens: frozenset[int]) -> dict[str, Any]:
    """Return the same sampling as in vLLM's own process; all of it, for a server may have defaults of its model's."""
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    fields = neutral | sampling_parameters(experiment, prompt.index, end_tokens) | {"return_token_ids": True}
    del fields["detokenize"]
    # All tokens: of the servers that know the field, this is what each takes for it.
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
    """Return all objections; `model` is None when none was found, which has been objected to already."""
    options = _options(experiment)
    return [
        *_address(options),
        *_command(options),
        *_not_told(experiment),
        *_not_in_dialect(experiment),
        *_processes(experiment),
        *_batching(experiment),
        *_extra_body(options),
        *_key(options),
        *_meters(experiment),
        *(unused_gpus(experiment, host.gpus) if experiment.parallelism.degree > 1 else ()),
        *model_objections(experiment, model),
    ]


def _batching(experiment: Experiment) -> Iterator[Objection]:
    """Object to batches where requests are sent as they arrive; the continuous strategy is what happens there."""
    if experiment.traffic.pattern == "closed" or experiment.batching.strategy == "continuous":
        return
    if experiment.batching != Batching():
        reason = "with traffic each request is sent as it arrives, and the server has the queue."
        yield without_effect("no_effect_batching", "batching", reason, "Leave it out.")


def _address(options: OpenaiBackend) -> Iterator[Objection]:
    if options.url is None and options.command is None:
        reason = "neither a server's address nor a command that starts one is given."
        yield Objection("no_server", "backend.url", reason, "Set backend.url or backend.command.")
        return
    try:
        address = address_of(options)
    except ConfigError as error:
        yield Objection("bad_server_url", "backend.url", str(error), "Write it as http://host:port.")
        return
    if address.port is None:
        return
    is_there = _answers(address.host, address.port, int(time.monotonic() / REMEMBER_S))
    if options.command is None and not is_there:
        reason = f"no server answers at {address.base}."
        yield Objection("server_unreachable", "backend.url", reason, "Start it, or set backend.command.")
    if options.command is not None and is_there:
        reason = f"port {address.port} of {address.host} is taken by another program."
        yield Objection("server_port_taken", "backend.url", reason, "End it, leave url out, or leave command out.")


@cache
def _answers(host: str, port: int, _now: int) -> bool:
    """Tell whether somebody takes connections; remembered for a while, for a grid asks thousands of times."""
    return answers(host, port, REACH_S)


def _command(options: OpenaiBackend) -> Iterator[Objection]:
    path = "backend.command"
    if options.command is None:
        if changed(options, "start_timeout_s"):
            reason, remedy = "no server is started.", "Set backend.command, or leave it out."
            yield without_effect("no_effect_start_limit", "backend.start_timeout_s", reason, remedy)
        return
    try:
        parts = shlex.split(options.command)
    except ValueError as error:
        yield Objection("bad_server_command", path, f"it cannot be read: {error}.".lower(), "Balance its quotes.")
        return
    for name in dict.fromkeys(PLACEHOLDER.findall(options.command)):
        if name not in PLACEHOLDERS:
            hint = did_you_mean(name, PLACEHOLDERS) or f" There are {', '.join(PLACEHOLDERS)}."
            yield Objection("bad_server_command", path, f"there is no placeholder {{{name}}}.{hint}", "Correct it.")
    if options.url is None and not _has(options, "port"):
        remedy = "Write {port} where it takes one, or set backend.url."
        yield Objection("bad_server_command", path, "the server is not told the port that lem chooses.", remedy)
    if parts and program_path(parts[0]) is None:
        reason = f"there is no program {parts[0]}."
        yield Objection("missing_program", path, reason, "Install it, or give its whole path.")


def _not_told(experiment: Experiment) -> Iterator[Objection]:
    """Object to options of the model that the server would not hear of."""
    options = _options(experiment)
    to_fill_in = {
        "fp_precision": ("dtype", experiment.fp_precision != "auto"),
        "revision": ("revision", experiment.revision is not None and options.command is not None),
        "parallelism.degree": ("degree", experiment.parallelism.degree > 1),
    }
    for path, (placeholder, is_set) in to_fill_in.items():
        if is_set and not _has(options, placeholder):
            reason = "the server would not hear of it."
            remedy = f"Write {{{placeholder}}} into backend.command where it belongs, or leave it out."
            yield Objection("server_not_told", path, reason, remedy)
    alone = {
        "adapter": (experiment.adapter is not None, "Have the server load it, and name it in backend.model_name."),
        "quantization.quantization": (experiment.quantization.quantization, "Have the server do it."),
        "decoder.no_repeat_ngram_size": (experiment.decoder.no_repeat_ngram_size > 0, "Set it to 0."),
    }
    for path, (is_set, remedy) in alone.items():
        if is_set:
            yield Objection("server_not_told", path, "no request to a server can ask for it.", remedy)


def _not_in_dialect(experiment: Experiment) -> Iterator[Objection]:
    decoder = experiment.decoder
    if _options(experiment).dialect == "vllm":
        yield from raised_temperature(decoder)
        return
    paths = [f"decoder.{name}" for name in changed(decoder, *OF_VLLM)]
    for path in [*paths, *(["min_output_tokens"] if experiment.min_output_tokens else [])]:
        remedy = "Use backend.dialect=vllm if the server knows it, or leave it out."
        yield Objection("server_not_told", path, "OpenAI's protocol has no field for it.", remedy)


def _processes(experiment: Experiment) -> Iterator[Objection]:
    reason, remedy = "one process asks the server, which decides for itself how it runs.", "Leave it out."
    if experiment.num_processes > 1:
        yield Objection("server_processes", "num_processes", reason, remedy)
    if experiment.parallelism.strategy == "data_parallel":
        yield Objection("server_processes", "parallelism.strategy", reason, remedy)


def _extra_body(options: OpenaiBackend) -> Iterator[Objection]:
    for name in options.extra_body or {}:
        if name in OF_LEM:
            reason = f"{name} is given by {OF_LEM[name]}."
            yield Objection("engine_arg_of_lem", f"backend.extra_body.{name}", reason, "Leave it out here.")


def _key(options: OpenaiBackend) -> Iterator[Objection]:
    """Object to a key that is missing, or that would be written into every record."""
    key = os.environ.get(options.api_key_env)
    for name in ("url", "command", "extra_body"):
        text = str(getattr(options, name))
        if (key and key in text) or (name == "command" and KEY_ARGUMENT.search(text)):
            reason = "it holds a key, and configurations are written to files that people publish."
            remedy = f"Put it into the environment; lem sends what is in {options.api_key_env}."
            yield Objection("api_key_in_config", f"backend.{name}", reason, remedy)
    if changed(options, "api_key_env") and not os.environ.get(options.api_key_env):
        reason = f"the environment variable {options.api_key_env} is not set."
        yield Objection("no_api_key", "backend.api_key_env", reason, "Set it to the server's key, or leave this out.")


def _meters(experiment: Experiment) -> Iterator[Objection]:
    options = _options(experiment)
    is_named = (options.url, options.command) != (None, None)
    if is_named and not runs_here(options) and experiment.energy.name not in NOT_OF_THIS_MACHINE:
        reason = "the server runs on another machine, of which no meter of this one knows."
        yield Objection("no_meter_elsewhere", "energy", reason, "Use energy=auto; the energy will be null.")
