"""Rules about servers."""

from __future__ import annotations

import socket

from lem.backends.server import free_port
from tests.hosts import H100, ONE, TWO, machine
from tests.spec.examples.example import EIGHT_BIT, ON_CPU, POISSON, SAMPLED, Example, asks, server, spread

STARTED = "backend.command=sh {port}"
# An address where a server listens while the tests run, and one where none does.
SOCKET = socket.create_server(("127.0.0.1", 0))
LISTENING, UNUSED = (f"http://127.0.0.1:{port}" for port in (SOCKET.getsockname()[1], free_port()))

EXAMPLES = [
    Example(
        "temperature_raised",
        "decoder.temperature",
        server(STARTED, SAMPLED, "decoder.temperature=0.009"),
        server(STARTED, "backend.dialect=openai", SAMPLED, "decoder.temperature=0.009"),
    ),
    Example(
        "engine_arg_of_lem",
        "backend.extra_body.max_tokens",
        server(STARTED, "backend.extra_body={max_tokens: 3}"),
        server(STARTED, "backend.extra_body={priority: 3}"),
    ),
    Example("no_server", "backend.url", server(), server(STARTED)),
    Example("bad_server_url", "backend.url", server("backend.url=localhost:8000"), server(f"backend.url={UNUSED}")),
    Example("bad_server_url", "backend.url", server("backend.url=http://me:key@h"), server(f"backend.url={UNUSED}")),
    Example("bad_server_command", "backend.command", server("backend.command=sh '{port}"), server(STARTED)),
    Example("bad_server_command", "backend.command", server("backend.command=sh {port} {modle}"), server(STARTED)),
    Example(
        "bad_server_command",
        "backend.command",
        server("backend.command=sh"),
        server(f"backend.url={UNUSED}", "backend.command=sh"),
    ),
    Example(
        "server_not_told",
        "fp_precision",
        server("fp_precision=float16", STARTED),
        server("fp_precision=float16", "backend.command=sh {port} {dtype}"),
    ),
    Example(
        "server_not_told",
        "revision",
        server("revision=v1", STARTED),
        server("revision=v1", "backend.command=sh {port} {revision}"),
    ),
    Example(
        "server_not_told",
        "parallelism.degree",
        server(STARTED, *spread("tensor", 2), host=TWO),
        server("backend.command=sh {port} {degree}", *spread("tensor", 2), host=TWO),
    ),
    Example(
        "server_not_told",
        "decoder.top_k",
        server(STARTED, "backend.dialect=openai", SAMPLED, "decoder.top_k=5"),
        server(STARTED, SAMPLED, "decoder.top_k=5"),
    ),
    Example(
        "server_not_told",
        "min_output_tokens",
        server("min_output_tokens=5", STARTED, "backend.dialect=openai"),
        server("min_output_tokens=5", STARTED),
    ),
    Example("server_not_told", "adapter", server("adapter=owner/name", STARTED), server(STARTED)),
    Example(
        "server_not_told",
        "decoder.no_repeat_ngram_size",
        server(STARTED, "decoder.no_repeat_ngram_size=3"),
        server(STARTED),
    ),
    Example("server_not_told", "quantization.quantization", server(STARTED, *EIGHT_BIT), server(STARTED)),
    Example("server_processes", "num_processes", server("num_processes=2", STARTED), server(STARTED)),
    Example(
        "server_processes",
        "parallelism.strategy",
        server(STARTED, *spread("data", 2)),
        server("backend.command=sh {port} {degree}", *spread("tensor", 2)),
    ),
    Example(
        "no_meter_elsewhere",
        "energy",
        server(STARTED, "backend.device=remote", "energy=codecarbon"),
        server(STARTED, "energy=codecarbon"),
    ),
    Example(
        "api_key_in_config",
        "backend.command",
        server("backend.command=sh {port} --api-key sk-1"),
        server("backend.command=sh {port} --api-keys"),
    ),
    Example(
        "no_effect_start_limit",
        "backend.start_timeout_s",
        server(f"backend.url={LISTENING}", "backend.start_timeout_s=5.0"),
        server(STARTED, "backend.start_timeout_s=5.0"),
    ),
    Example(
        "no_effect_batching",
        "batching",
        server("backend.url=http://localhost:8000", "batching.batch_size=4", *POISSON),
        server("backend.url=http://localhost:8000", *POISSON),
    ),
    Example("server_unreachable", "backend.url", server(f"backend.url={UNUSED}"), server(f"backend.url={LISTENING}")),
    Example(
        "server_port_taken",
        "backend.url",
        server(f"backend.url={LISTENING}", "backend.command=sh"),
        server(f"backend.url={LISTENING}"),
    ),
    Example("missing_program", "backend.command", server("backend.command=no-such-program {port}"), server(STARTED)),
    Example("no_api_key", "backend.api_key_env", server(STARTED, "backend.api_key_env=NO_KEY"), server(STARTED)),
    Example("no_effect_gpus", "gpus", server("gpus=[0]", STARTED, ON_CPU, host=ONE), asks("gpus=[0]", host=ONE)),
    Example(
        "unused_gpus",
        "gpus",
        server(
            "gpus=[0, 1, 2]", "backend.command=sh {port} {degree}", *spread("tensor", 2), host=machine(H100, H100, H100)
        ),
        server("gpus=[0, 1]", STARTED, host=TWO),
    ),
]
