"""The openai backend, tested with our own small server over real sockets: counting, times, batching, failures.

The contract of all backends is in test_backends.py, and the tests with vLLM's own server are in test_vllm_serve.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from lem.backends import make_backend
from lem.backends.base import Encoded
from lem.backends.openai_answer import Events, ServerGone, Transcript
from lem.backends.openai_client import Client, Failure, samples
from lem.backends.openai_options import Address, address_of, command_line, gpus_for, request_body, runs_here
from lem.backends.openai_session import Loaded
from lem.backends.server import Server, environment, free_port
from lem.errors import ConfigError, RunError
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.record import ModelInfo
from lem.spec.engines import OpenaiBackend
from lem.spec.experiment import Batching, Decoder, Experiment, Parallelism, Streaming, Traffic
from lem.workload.models import Model
from lem.workload.traffic import Arrivals, arrival_times_s
from tests.conftest import begin, command, kill_group, raw_record, wait_for
from tests.http_server import Behaviour, Running, counted_tokens

pytestmark = pytest.mark.engines

STREAMING = Streaming(enabled=True)
SAMPLING = Decoder(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.05)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def served():
    """Start a server with a given behaviour, and load a backend that talks to it; both end with the test."""
    ending = []

    def serve(behaviour=None, options=None, tokens=counted_tokens, **experiment):
        server = Running(tokens, behaviour or Behaviour()).__enter__()
        chosen = OpenaiBackend(**{"url": server.url, "device": "cpu"} | (options or {}))
        wanted = Experiment(**{"model": "tiny", "max_output_tokens": 6} | experiment, backend=chosen)
        backend = make_backend(wanted)
        ending.append((server, backend))
        backend.start()
        backend.load()
        backend.forget()
        return server, backend

    yield serve
    for server, backend in ending:
        backend.close()
        server.__exit__()


def prompts(count=3):
    return [Encoded(index, (5, 6, 7 + index)) for index in range(count)]


def run(backend, count=3):
    return [g for batch in backend.generate(prompts(count)) for g in batch]


def expected(count=3, length=6):
    return [tuple(counted_tokens({"prompt": p.token_ids, "max_tokens": length})) for p in prompts(count)]


# ------------------------------------------------------------------ events
PIECES = b"data: one\n\ndata:two\r\n\r\n: a comment\n\nevent: x\ndata: th\ndata: ree\nid: 4\n\rdata: four\r\r"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_come_out_whole_however_they_are_cut(size):
    events = Events()
    cut = [PIECES[i : i + size] for i in range(0, len(PIECES), size)]
    found = [event.data for piece in [*cut, b"\n"] for event in events.feed(piece)]
    assert found == [b"one", b"two", b"th\nree", b"four"]


def test_half_an_event_is_none():
    events = Events()
    assert events.feed(b'data: {"a"') == []
    assert events.feed(b": 1}\n") == []
    (whole,) = events.feed(b"\n")
    assert whole.data == b'{"a": 1}'


def test_metrics_are_summed_over_their_labels():
    text = '# TYPE a_total counter\na_total{engine="0",x="{}"} 3.0\na_total{engine="1"} 4\nb 1e3\nc NaN\nbad line\n'
    found = samples(text)
    assert (found["a_total"], found["b"]) == (7.0, 1000.0)


# ------------------------------------------------------------------ tokens and their times
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("sends_ids", "usage"), [(True, "final"), (True, "never"), (False, "final"), (False, "each")])
def test_tokens_are_counted_by_ids_or_usage(served, streaming, sends_ids, usage):
    behaviour = Behaviour(sends_ids=sends_ids, usage=usage, tokens_in_event=2)
    _, backend = served(behaviour, streaming=Streaming(enabled=streaming))
    done = run(backend)
    assert [g.output_tokens for g in done] == [6, 6, 6]
    assert [g.token_ids for g in done] == (expected() if sends_ids else [(), (), ()])
    counted_by = backend.engine_info().settings["output_tokens_counted_by"]
    assert counted_by == ("ids" if sends_ids else "the server's usage")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_server_that_counts_nothing_is_refused(served, streaming):
    with pytest.raises(RunError, match="neither the ids nor the number of the output tokens"):
        served(Behaviour(sends_ids=False, usage="never"), streaming=Streaming(enabled=streaming))


def transcript(*reads):
    """Return the response of events that arrived in network reads, one read per millisecond."""
    answered = Transcript(0)
    for number, received in enumerate(reads, 1):
        for piece in [received] if isinstance(received, bytes) else received:
            answered.take(piece, number, number * 1_000_000)
    return answered.answer()


def event(*ids, finish=None, **more):
    choice = {"text": "x" * len(ids), "token_ids": list(ids), "finish_reason": finish}
    return b"data: %s\n\n" % json.dumps({"choices": [choice], **more}).encode()


ONE, TWO, LAST, DONE = event(1), event(2), event(3, finish="length"), b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("reads", "chunks"),
    [
        ([ONE, TWO, LAST + DONE], [(1, 1), (2, 1), (3, 1)]),
        ([ONE + TWO, LAST, DONE], [(1, 2), (2, 1)]),
        # HTTP chunks in one packet are handed out one after the other.
        ([[ONE, TWO], [LAST, DONE]], [(1, 2), (2, 1)]),
        # An event counts when it is complete, whatever came with its beginning or its end.
        ([ONE + TWO[:9], TWO[9:-2], TWO[-2:] + LAST[:-2], LAST[-2:], DONE], [(1, 1), (3, 1), (4, 1)]),
        # It is complete with its line of data, not with the blank line that follows.
        ([ONE[:-1], ONE[-1:] + TWO[:-1], TWO[-1:], LAST + DONE], [(1, 1), (2, 1), (4, 1)]),
        ([ONE[:5], ONE[5:] + TWO + LAST[:5], LAST[5:] + DONE], [(2, 2), (3, 1)]),
        ([event(1, 2), event(3, finish="stop")], [(1, 2), (2, 1)]),
        ([event(1), event(), event(2, 3), event(finish="stop")], [(1, 1), (3, 2)]),
    ],
)
def test_tokens_have_the_time_of_the_read_that_made_their_event_whole(reads, chunks):
    answer = transcript(*reads)
    assert answer.token_ids == (1, 2, 3)
    found, are_known = answer.chunks(3)
    assert [(chunk.at_ns // 1_000_000, chunk.tokens) for chunk in found] == chunks
    assert answer.ended_ns == found[-1].at_ns
    assert are_known


def usage(count):
    return {"usage": {"prompt_tokens": 5, "completion_tokens": count}}


def text(words, finish=None, **more):
    choice = {"text": words, "finish_reason": finish}
    return b"data: %s\n\n" % json.dumps({"choices": [choice], **more}).encode()


@pytest.mark.parametrize(
    ("reads", "chunks", "are_known"),
    [
        # The server reports the usage so far with each event.
        (
            [text("a", **usage(1)), text("bc", **usage(3)), text("", "length", **usage(4))],
            [(1, 1), (2, 2), (3, 1)],
            True,
        ),
        # The server reports usage only at the end, and as many events with text as tokens.
        ([text("a"), text("b"), text("c"), text("d", "length", **usage(4))], [(1, 1), (2, 1), (3, 1), (4, 1)], True),
        ([text("a") + text("b"), text("c"), text("d", "length", **usage(4))], [(1, 2), (2, 1), (3, 1)], True),
        # There are fewer events than tokens.
        ([text("a"), text("bc"), text("d", "length", **usage(4))], [(1, 1), (3, 3)], False),
    ],
)
def test_without_ids_usage_counts(reads, chunks, are_known):
    answer = transcript(*reads)
    assert (answer.output_tokens, answer.token_ids, answer.input_tokens) == (4, None, 5)
    found, timed = answer.chunks(4)
    assert [(chunk.at_ns // 1_000_000, chunk.tokens) for chunk in found] == chunks
    assert timed == are_known


def test_ids_and_usage_that_disagree_are_not_believed():
    with pytest.raises(RunError, match="sent 2 token ids but counted 3 output tokens"):
        transcript(event(1, 2, finish="length", **usage(3)))


@pytest.mark.parametrize("behaviour", [
    Behaviour(),
    Behaviour(cut=1, packet_wait_s=0),
    Behaviour(cut=50),
    Behaviour(tokens_in_event=3),
    Behaviour(merged=3),
    Behaviour(tokens_in_event=3, cut=9),
    Behaviour(sends_ids=False, usage="each"),
    Behaviour(tokens_in_event=3, sends_ids=False, usage="each"),
], ids=["whole", "bytes", "pieces", "several", "merged", "both", "by usage", "several by usage"])  # fmt: skip
def test_tokens_are_timed_as_they_travel(served, behaviour):
    wait_s = 0.05
    _, backend = served(replace(behaviour, wait_s=wait_s), streaming=STREAMING)
    for g in run(backend):
        together = behaviour.tokens_in_event * behaviour.merged
        # A busy machine may read several events at once, but never splits them further.
        assert len(g.chunks) <= 6 / together
        assert sum(chunk.tokens for chunk in g.chunks) == 6
        assert {chunk.tokens % together for chunk in g.chunks} == {0}
        moments = [g.start_ns, *(chunk.at_ns for chunk in g.chunks)]
        assert all(before < later for before, later in pairwise(moments))
        assert moments[-1] == g.end_ns
        waits = 6 // behaviour.tokens_in_event - 1
        assert g.end_ns - g.start_ns >= waits * wait_s * 1e9
    assert "tokens_not_timed" not in [each.code for each in backend.warnings()]


def test_unknown_gaps_are_spread_and_warned_about(served):
    behaviour = Behaviour(tokens_in_event=2, sends_ids=False, usage="final", wait_s=0.1)
    _, backend = served(behaviour, streaming=STREAMING)
    (g,) = run(backend, 1)
    assert [chunk.tokens for chunk in g.chunks] == [1, 5]
    assert g.start_ns < g.chunks[0].at_ns < g.chunks[1].at_ns == g.end_ns
    assert "tokens_not_timed" in [each.code for each in backend.warnings()]


def test_without_streaming_nothing_is_timed_by_token(served):
    server, backend = served()
    assert all(g.chunks == () for g in run(backend))
    assert not any("stream" in body for body in server.bodies)


def test_queueing_in_a_server_is_not_known(served):
    _, backend = served()
    assert all(not g.start_is_known and g.prefill_end_ns is None for g in run(backend))


@pytest.mark.parametrize(("ends", "finish"), [({103}, "stop"), (set(), "length")])
def test_an_end_token_is_a_part_of_the_output(served, ends, finish):
    def tokens(body):
        made = list(range(100, 100 + body["max_tokens"]))
        return made[:4] if ends and body["max_tokens"] > 1 else made

    behaviour = Behaviour(finish=finish)
    _, backend = served(behaviour, tokens=tokens)
    (g,) = run(backend, 1)
    assert (g.finish_reason, g.token_ids[-1], g.output_tokens) == ((finish, 103, 4) if ends else (finish, 105, 6))


# ------------------------------------------------------------------ requests as sent
def asked(experiment=None, *, count_by_usage=False, **backend):
    wanted = replace(experiment or Experiment(model="tiny"), backend=OpenaiBackend(url="http://h:1", **backend))
    return request_body(wanted, Encoded(4, (8, 9)), frozenset([7, 2]), "m", count_by_usage=count_by_usage)


def test_greedy_decoding_leaves_nothing_to_the_servers_defaults():
    assert asked(Experiment(max_output_tokens=16, min_output_tokens=3)) == {
        "model": "m", "prompt": [8, 9], "max_tokens": 16, "min_tokens": 3, "temperature": 0.0, "top_k": -1,
        "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "stop_token_ids": [2, 7],
        "return_token_ids": True,
    }  # fmt: skip


def test_sampling_is_passed_on_with_a_seed_for_each_prompt():
    body = asked(Experiment(decoder=SAMPLING, seed=3))
    wanted = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "seed": 3 * 2**31 + 4}
    assert {name: body[name] for name in wanted} == wanted
    assert asked(Experiment(decoder=replace(SAMPLING, top_k=0)))["top_k"] == -1


def test_a_plain_server_is_asked_in_the_protocols_own_words():
    greedy = asked(dialect="openai")
    assert set(greedy) == {"model", "prompt", "max_tokens", "temperature"}
    sampled = asked(Experiment(decoder=Decoder(do_sample=True, top_p=0.5)), dialect="openai")
    assert set(sampled) == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}


def test_other_fields_and_streaming_are_passed_on():
    body = asked(Experiment(streaming=STREAMING), extra_body={"priority": 1})
    assert (body["priority"], body["stream"], body["stream_options"]) == (1, True, {"include_usage": True})
    by_usage = asked(Experiment(streaming=STREAMING), count_by_usage=True)
    assert by_usage["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_the_command_is_filled_in():
    line = "srv {model} --port={port} --host {host} --dtype {dtype} {degree} {batch_size} {seed}"
    line += """ -x '{"method": "ngram"}'"""
    experiment = Experiment(
        backend=OpenaiBackend(command=line, url="http://localhost:81/v1/"), fp_precision="bfloat16", seed=9,
        batching=Batching(batch_size=8), parallelism=Parallelism(strategy="tensor_parallel", degree=2),
    )  # fmt: skip
    filled = command_line(experiment, Model("m", "/a folder/m", None, {}), address_of(experiment.backend))
    assert filled == [
        "srv", "/a folder/m", "--port=81", "--host", "localhost", "--dtype", "bfloat16", "2", "8", "9",
        "-x", '{"method": "ngram"}',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("https://h/some/path/v1/completions", "https://h:443/some/path"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_addresses(url, base):
    assert address_of(OpenaiBackend(url=url)).base == base


@pytest.mark.parametrize("url", ["h:8000", "ftp://h", "http://", "http://h:x", "http://u:p@h", "http://h/?key=1"])
def test_what_is_no_address(url):
    with pytest.raises(ConfigError):
        address_of(OpenaiBackend(url=url))


GPUS = Host(tuple(Gpu(i, f"GPU-{i}", "H100", 80 * 2**30) for i in range(4)))


@pytest.mark.parametrize(
    ("options", "is_here", "metered"),
    [
        ({"url": "http://127.0.0.1:1"}, True, 4),
        ({"url": "http://localhost:1"}, True, 4),
        ({"url": "http://[::1]:1"}, True, 4),
        ({"url": "http://10.0.0.1:1"}, False, 0),
        ({"url": "http://node7:1"}, False, 0),
        ({"url": "http://127.0.0.1:1", "device": "remote"}, False, 0),
        ({"url": "http://127.0.0.1:1", "device": "cpu"}, True, 0),
        ({"command": "x {port}"}, True, 1),
        ({"command": "x {port} {degree}", "degree": 2}, True, 2),
        ({"command": "x {port}", "gpus": [0, 1, 2]}, True, 3),
        ({"command": "x {port} {degree}", "gpus": [0, 1, 2], "degree": 2}, True, 2),
        ({"command": "x", "url": "http://node7:1"}, True, 1),
        ({"command": "x", "url": "http://node7:1", "device": "remote"}, False, 0),
    ],
)
def test_where_the_server_runs_and_what_is_metered(options, is_here, metered):
    options = dict(options)
    gpus, degree = options.pop("gpus", None), options.pop("degree", 1)
    spread = Parallelism(strategy="tensor_parallel", degree=degree) if degree > 1 else Parallelism()
    experiment = Experiment(backend=OpenaiBackend(**options), gpus=gpus, parallelism=spread)
    assert runs_here(experiment.backend) == is_here
    assert len(gpus_for(experiment, GPUS.only(gpus))) == metered


# ------------------------------------------------------------------ requests in flight
def test_a_batch_is_in_flight_together_and_the_next_one_waits(served):
    server, backend = served(Behaviour(first_wait_s=0.05), batching=Batching(batch_size=3))
    done = list(backend.generate(prompts(7)))
    assert [[g.index for g in batch] for batch in done] == [[0, 1, 2], [3, 4, 5], [6]]
    assert server.most_in_flight == 3
    assert max(g.end_ns for g in done[0]) <= min(g.start_ns for g in done[1])


def test_continuous_batching_keeps_as_many_in_flight(served):
    def slower_or_faster(body):
        time.sleep(0.02 if sum(body["prompt"]) % 3 else 0.15)
        return counted_tokens(body)

    batching = Batching(strategy="continuous", batch_size=3)
    server, backend = served(tokens=slower_or_faster, batching=batching)
    done = [g for batch in backend.generate(prompts(12)) for g in batch]
    assert sorted(g.index for g in done) == list(range(12))
    assert {(g.batch, g.arrived_ns) for g in done} == {(0, None)}
    assert server.most_in_flight == 3
    # A place is taken again while other places are still busy.
    assert any(a.start_ns < b.end_ns < c.start_ns < a.end_ns for a in done for b in done for c in done)


def test_requests_are_sent_when_they_are_due_whatever_is_in_flight(served):
    server, backend = served(Behaviour(first_wait_s=0.4))
    times_s = [0.1, 0.2, 0.3]
    opened_ns = time.perf_counter_ns()
    done = [g for some in backend.serve(Arrivals(prompts(3), times_s, 1, opened_ns), 1) for g in some]
    assert {g.index: g.arrived_ns for g in done} == {i: opened_ns + round(t * 1e9) for i, t in enumerate(times_s)}
    assert all(g.arrived_ns <= g.start_ns for g in done)
    assert server.most_in_flight == 3, "batch size and slow answers hold nothing up"
    begun = server.begun_s[1:]  # the first request is the trial
    assert begun == sorted(begun)


def test_a_fixed_concurrency_sends_the_next_one_before_the_last_is_dealt_with(served):
    server, backend = served(Behaviour(first_wait_s=0.05))
    generations = backend.serve(Arrivals(prompts(4), None, 2, time.perf_counter_ns()), 1)
    next(generations)
    until_s = time.monotonic() + 30
    while len(server.bodies) < 1 + 4 and time.monotonic() < until_s:
        time.sleep(0.05)  # the results are consumed slowly
    assert len(server.bodies) == 1 + 4
    assert server.most_in_flight == 2
    assert len(list(generations)) == 3


def test_requests_that_are_no_longer_waited_for_are_cancelled(served):
    batching = Batching(strategy="continuous", batch_size=2)
    _, backend = served(batching=batching)
    generations = backend.generate(prompts(6))
    next(generations)
    generations.close()
    assert [g.token_ids for g in sorted(run(backend, 4), key=lambda g: g.index)] == expected(4)


def test_a_request_sent_by_an_answer_while_all_are_cancelled_is_not_sent(served):
    _, backend = served(batching=Batching(strategy="continuous", batch_size=2))
    client = backend._loaded.client
    body = backend._loaded.body(prompts(1)[0], backend._experiment)

    def asked_for_too_late():
        cancelling = client._loop.create_task(client._cancel())
        client.send(7, body)  # starts only once the request could no longer be cancelled
        return cancelling

    client.run(asked_for_too_late)
    client.run(lambda: None)  # all requests sent so far have begun
    assert not client._running
    client.send(0, body)
    assert client.next_done()[0] == 0
    assert client._done.empty()


# ------------------------------------------------------------------ what the server reports
def test_counters_are_those_of_the_window(served):
    _, backend = served()
    assert backend.counters() is None  # nothing has run, which must not read as 0
    run(backend, 4)
    assert backend.counters() == {
        "generation_tokens": 24.0, "prompt_tokens": 12.0, "prefix_cache_queried_tokens": 12.0,
        "prefix_cache_hit_tokens": 0.0,
    }  # fmt: skip
    backend.forget()
    run(backend, 1)
    assert backend.counters()["generation_tokens"] == 6


def test_a_server_without_metrics_has_no_counters(served):
    _, backend = served(Behaviour(sends_metrics=False))
    run(backend)
    assert backend.counters() is None


@pytest.mark.parametrize(("resets", "sends_metrics", "is_warned_about"), [(True, True, False), (False, False, True)])
def test_a_prefix_cache_that_cannot_be_emptied_is_noted(served, resets, sends_metrics, is_warned_about):
    server, backend = served(Behaviour(resets=resets, sends_metrics=sends_metrics))
    run(backend)
    assert ("prefix_cache_kept" in [each.code for each in backend.warnings()]) == is_warned_about
    assert server.resets == resets
    assert backend.engine_info().settings["prefix_cache_reset"] == ("on" if resets else "off")


def test_a_cache_that_was_not_emptied_and_not_hit_does_no_harm(served):
    _, backend = served(Behaviour(resets=False))
    run(backend)
    assert "prefix_cache_kept" not in [each.code for each in backend.warnings()]


def test_others_who_use_the_server_are_noted(served):
    server, backend = served()
    run(backend)
    assert "server_shared" not in [each.code for each in backend.warnings()]
    backend.forget()
    run(backend)
    server.generated += 100
    assert "server_shared" in [each.code for each in backend.warnings()]


def test_doubt_about_the_servers_gpus_is_a_warning(served):
    _, backend = served()
    assert "server_gpus_unknown" not in [each.code for each in backend.warnings()]
    backend._doubt = "it is unknown which GPUs the server runs on."
    assert "server_gpus_unknown" in [each.code for each in backend.warnings()]


def test_what_is_not_known_is_none(served):
    _, backend = served()
    info = backend.model_info()
    assert info == ModelInfo(
        "tiny", None, "LlamaForCausalLM", info.parameters, True, weights_bytes=None, dtype=None, adapter=None
    )  # fmt: skip
    assert info.parameters > 10**6
    engine = backend.engine_info()
    assert (engine.version, engine.device) == ("tests 9.9", "cpu")
    assert engine.settings["served_model_root"] == "/models/m"
    assert backend.architecture() is not None
    assert backend.peak_memory().kv_cache_bytes is None


def test_the_servers_own_limit_counts(served):
    _, backend = served(Behaviour(max_model_len=10))
    with pytest.raises(RunError, match="more than the model's 10 positions"):
        backend.encode(["one two three four five six seven eight nine ten"])


# ------------------------------------------------------------------ failures
@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (Behaviour(error=(400, "max_tokens is\n too large")), r"HTTP 400: max_tokens is too large\."),
        (Behaviour(error=(500, "out of memory")), r"HTTP 500: out of memory\."),
        (Behaviour(error=(503, "busy"), error_in_stream=True), r"busy\."),
        (Behaviour(dies_after=2), "The (connection to the server .* was lost|server ended its response before).*"),
        (Behaviour(finish="abort"), r"The server stopped generating: abort\."),
    ],
)
@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
def test_a_failed_request_has_its_reason_in_a_sentence_and_its_times(served, behaviour, words, streaming):
    if behaviour.error_in_stream and not streaming:
        pytest.skip("there is no stream")
    server, backend = served(streaming=Streaming(enabled=streaming))
    server.behaviour = replace(behaviour, faulty_from=2)
    before_ns = time.perf_counter_ns()
    failed = run(backend, 3)[1] if behaviour.finish is None else run(backend, 1)[0]
    assert re.fullmatch(words, failed.error)
    assert (failed.finish_reason, failed.output_tokens, failed.token_ids, failed.chunks) == ("error", 0, (), ())
    assert before_ns < failed.start_ns < failed.end_ns < time.perf_counter_ns()
    # Values that are still known are reported, without waiting for the server.
    assert backend.model_info().name == "tiny"


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
def test_a_server_that_counts_other_input_ends_the_run(served, streaming):
    server, backend = served(streaming=Streaming(enabled=streaming))
    server.behaviour = Behaviour(extra_input=1)
    with pytest.raises(RunError, match="counted 4 input tokens for prompt 0, but 3 were sent"):
        run(backend, 1)
    assert backend.counters() is None


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
def test_a_server_that_falls_silent_is_not_waited_for(served, streaming):
    server, backend = served(options={"timeout_s": 0.3}, streaming=Streaming(enabled=streaming))
    server.behaviour = Behaviour(silent_after=2)
    (failed,) = run(backend, 1)
    assert re.search(r"has sent nothing for 0\.3 s \(backend\.timeout_s", failed.error)
    assert failed.end_ns - failed.start_ns >= 0.3e9
    assert backend.counters() is None


def test_a_server_that_does_not_heed_the_limits_is_found_out(served):
    _, backend = served(tokens=lambda body: [3] * (9 if body["max_tokens"] > 1 else 1))
    with pytest.raises(RunError, match="generated 9 tokens for prompt 0, although the request set a maximum of 6"):
        run(backend, 1)


def test_models_are_chosen_by_name(served):
    server, _ = served(Behaviour(models=("a", "tiny")))
    assert server.bodies[-1]["model"] == "tiny"
    server, _ = served(Behaviour(models=("a", "b")), {"model_name": "b"})
    assert server.bodies[-1]["model"] == "b"
    with pytest.raises(RunError, match=r"does not serve c\. Set backend\.model_name to one of its models: a, b\."):
        served(Behaviour(models=("a", "b")), {"model_name": "c"})
    with pytest.raises(RunError, match="does not serve tiny"):
        served(Behaviour(models=("a", "b")))


def test_the_key_is_sent_and_a_wrong_one_is_reported(served, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-sesame")
    server, _ = served(Behaviour(key="sk-sesame"), {"api_key_env": "MY_KEY"})
    assert set(server.keys) == {"Bearer sk-sesame"}
    monkeypatch.setenv("MY_KEY", "sk-other")
    with pytest.raises(RunError, match=r"does not accept the API key in \$MY_KEY") as caught:
        served(Behaviour(key="sk-sesame"), {"api_key_env": "MY_KEY"})
    assert "sk-" not in str(caught.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(RunError, match="requires an API key; set the environment variable MY_KEY"):
        served(Behaviour(key="sk-sesame"), {"api_key_env": "MY_KEY"})


# ------------------------------------------------------------------ starting a server
def line(*options, python=sys.executable):
    return shlex.join([python, "-m", "tests.http_server", "--port", "{port}", *options])


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def living(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def gone_within(pids, seconds=10.0):
    until_s = time.monotonic() + seconds
    while living(pids) and time.monotonic() < until_s:
        time.sleep(0.05)
    return not living(pids)


def start_family(tmp_path, *options):
    port = free_port()
    arguments = [*shlex.split(line("--children", *options).replace("{port}", str(port)))]
    server = Server(arguments, environment(None), tmp_path / "server.log")
    server.start()
    until_s, before = time.monotonic() + 60, set[int]()
    # A process that leaves another behind is seen for a moment only: the family is complete when it stays the same.
    while len(now := {process.pid for process in server.processes()}) < 3 or now != before:
        assert time.monotonic() < until_s, server.last_words()
        before = now
        time.sleep(0.3)
    return server


@pytest.mark.parametrize("options", [(), ("--stubborn",)], ids=["obedient", "stubborn"])
def test_closing_ends_the_whole_family(tmp_path, in_root, options):
    server = start_family(tmp_path, *options)
    family = [process.pid for process in server.processes()]
    assert len(living(family)) >= 3
    server.close()
    assert living(family) == []


def test_a_server_that_is_killed_takes_its_family_along(tmp_path, in_root):
    server = start_family(tmp_path)
    family = [process.pid for process in server.processes()]
    os.kill(family[0], signal.SIGKILL)
    assert gone_within(family)
    until_s = time.monotonic() + 10
    while server.how_it_ended() is None and time.monotonic() < until_s:
        time.sleep(0.05)
    assert re.match(r"The server was ended by SIGKILL\. The end of its log: serving at \d+", server.how_it_ended())
    server.close()


def test_a_killed_server_is_the_reason_even_if_its_listening_socket_closes_last(tmp_path):
    server = Server(["sh", "-c", "sleep 1; kill -9 $$"], environment(None), tmp_path / "server.log")
    listening = socket.create_server(("127.0.0.1", 0))  # stands in for the socket that the kernel has not closed yet
    address = Address("http", *listening.getsockname())
    loaded = Loaded(None, address, None, server, {}, None, sends_ids=True)
    server.start()
    closing = threading.Timer(0.05, listening.close)
    closing.start()
    try:
        with pytest.raises(RunError, match=r"The connection was lost\. The server was ended by SIGKILL\."):
            loaded.failure(Failure(0, 1, ServerGone("The connection was lost.")))
    finally:
        closing.join()
        server.close()


def test_no_process_outlives_the_one_that_started_the_server(tmp_path, in_root):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.backends.test_openai import start_family
server = start_family(Path({str(tmp_path)!r}))
print(*[process.pid for process in server.processes()], flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        family = [int(pid) for pid in process.stdout.readline().split()]
        assert len(living(family)) >= 3
    finally:
        kill_group(process)
    assert gone_within(family)


@pytest.mark.parametrize(
    ("program", "timeout_s", "words"),
    [
        # It answers, but it is a different kind of server.
        (
            ["-m", "http.server"],
            5.0,
            r"http://\S+/v1/models answers with HTTP 404\. The end of its log: .*GET /v1/models",
        ),
        (["-c", "import time; time.sleep(600)"], 0.1, r"No server can be reached at http://\S+: .*\.$"),
    ],
    ids=["another kind", "none"],
)
def test_a_server_that_does_not_get_ready_is_reported_with_its_last_answer(tmp_path, program, timeout_s, words):
    options = OpenaiBackend(
        command=f"{shlex.join([sys.executable, *program])} {{port}}", device="cpu", start_timeout_s=timeout_s
    )
    backend = make_backend(Experiment(model="tiny", backend=options))
    backend.log_folder = tmp_path
    backend.start()
    try:
        with pytest.raises(RunError) as caught:
            backend.load()
    finally:
        backend.close()
    expected = rf"The server was not ready after {timeout_s:g} s \(backend\.start_timeout_s\)\. {words}"
    assert re.match(expected, str(caught.value))


COMMON = ("experiment", "--backend", "openai", "-m", "tiny", "-d", "sample", "-n", "8", "-y", "energy=none",
          "max_output_tokens=8", "warmup.prompts=1")  # fmt: skip


def starting(*options):
    return "backend.command=" + json.dumps(line(*options))


def rows(results):
    return sorted(pq.read_table(results / "requests").to_pylist(), key=lambda row: row["request"])


@pytest.mark.processes
def test_run_with_a_server_of_its_own(tmp_path, in_root):
    done = command(*COMMON, starting("--children"), "--streaming", "batching.batch_size=4", cwd=tmp_path)
    assert done.code == 0, done.out + done.err
    record = raw_record(tmp_path / "results")
    assert (record["status"], record["requests_completed"], record["output_tokens"]) == ("completed", 8, 64)
    assert record["engine"]["settings"]["started_by_lem"] == "on"
    assert record["flops"]["total"] > 0
    assert re.match(r"server's \d+ processes", record["memory"]["scope"])
    assert record["memory"]["peak_bytes"] > 2**20
    (log,) = (tmp_path / "results").glob("raw/*/server.log")
    assert log.read_text().startswith("serving at")
    for row in rows(tmp_path / "results"):
        assert len(row["itl_s"]) == 7
        assert row["queue_s"] is None


@pytest.mark.processes
def test_run_of_poisson_arrivals_at_a_server(tmp_path):
    with Running() as server:
        traffic = ("traffic.pattern=poisson", "traffic.target_qps=20", "backend.device=remote")
        done = command(*COMMON, f"backend.url={server.url}", *traffic, "energy=auto", cwd=tmp_path)
    assert done.code == 0, done.out + done.err
    due = arrival_times_s(Traffic(pattern="poisson", target_qps=20), 8, 42)
    assert [row["arrived_s"] for row in rows(tmp_path / "results")] == pytest.approx(due, abs=1e-6)
    assert all(row["queue_s"] is None and row["latency_s"] > 0 for row in rows(tmp_path / "results"))
    # For a server on another machine there is no energy, not even this machine's, and the reason is given.
    (row,) = pq.read_table(tmp_path / "results" / "experiments").to_pylist()
    assert (row["energy_j"], row["device"]) == (None, "another machine")
    record = raw_record(tmp_path / "results")
    assert all(phase["energy"] == [] for phase in record["phases"])
    assert "server_elsewhere" in [each["code"] for each in record["warnings"]]
    assert "runs on another machine" in " ".join(done.out.split())


def test_no_server_is_bad_input(lem):
    finished = lem(*COMMON, f"backend.url=http://127.0.0.1:{free_port()}")
    assert finished.code == 2
    assert "nothing is listening at http://127.0.0.1" in " ".join((finished.out + finished.err).split())


@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--behaviour", '{"error": [400, "no such thing"], "faulty_from": 4}'], "prompt .: HTTP 400: no such thing"),
        (
            ["--no-such-option"],
            r"ended with exit code 2\. The end of its log: .*unrecognized arguments: --no-such-option",
        ),
        (["--behaviour", '{"silent_after": 0, "faulty_from": 3}'], r"has sent nothing for 2 s"),
        (["--behaviour", '{"dies_after": 0, "faulty_from": 3}'], r"connection to the server .* was lost"),
    ],
    ids=["refuses", "does not start", "falls silent", "hangs up"],
)
def test_a_failed_run_leaves_a_record_and_no_process(tmp_path, in_root, options, words):
    process = begin(*COMMON, starting("--children", *options), "backend.timeout_s=2.0", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, out + err
    assert "Traceback" not in out + err
    record = raw_record(tmp_path / "results")
    assert record["status"] == "failed"
    assert re.search(words, record["error"]["message"])
    assert gone_within(processes_with(tmp_path))


def processes_with(folder):
    """Return the processes that run in a directory: those of the run, including the server's."""
    found = []
    for process in psutil.process_iter(["pid", "cwd"]):
        if process.info["cwd"] == str(folder):
            found.append(process.info["pid"])
    return found


@pytest.mark.processes
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "kill -9 of the group", "kill -9 of the worker", "of the server"])
def test_no_process_is_left_however_a_run_ends(tmp_path, in_root, how):
    slow = starting("--children", "--stubborn", "--behaviour", '{"first_wait_s": 1.0}')
    process = begin(*COMMON, slow, "-n", "20", cwd=tmp_path)
    try:
        wait_for(process, "Prompts 2/")
        family = psutil.Process(process.pid).children(recursive=True)
        own = [each for each in processes_with(tmp_path) if each != process.pid]
        assert len(own) >= 5  # the worker, the guardian, the server and its two children
        by_name = {name: each.pid for each in family for name in ("lem.runner.worker", "tests.http_server")
                   if name in each.cmdline() and "guardian.py" not in " ".join(each.cmdline())}  # fmt: skip
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        elif how == "kill -9 of the group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(by_name["lem.runner.worker" if "worker" in how else "tests.http_server"], signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_group(process)
    assert gone_within(own)
    if how in ("Ctrl-C", "SIGTERM"):
        record = raw_record(tmp_path / "results")
        assert (process.returncode, record["status"], record["error"]["type"]) == (130, "interrupted", "Interrupted")
    elif how == "of the server":
        record = raw_record(tmp_path / "results")
        assert (process.returncode, record["status"]) == (1, "failed")
        assert "was ended by SIGKILL" in record["error"]["message"]


def test_the_server_sees_the_gpus_that_are_metered(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2,1")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert environment(None)["CUDA_VISIBLE_DEVICES"] == "3,2,1"
    assert environment("0,1")["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "PYTHONSAFEPATH" not in environment(None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux stamps what arrives")
def test_the_time_of_a_token_is_when_it_arrived_even_if_the_client_is_busy():
    with Running(counted_tokens, Behaviour(first_wait_s=0.2, wait_s=0.05)) as server:
        client = Client(server.url, None, 10.0)
        client.start()
        try:
            _answered(client)  # the kernel begins to stamp shortly after it was first asked to
            # From before the first token until long after the last, the client's thread reads nothing.
            answer = _answered(client, pause_s=0.15, busy_s=0.6)
        finally:
            client.close()
    assert answer.chunks(4)[0][-1].at_ns - answer.sent_ns < 0.5e9


def _answered(client, pause_s=0.0, busy_s=0.0):
    """Send a request, keep the client's thread busy for a while, and return the answer."""
    body = {"prompt": [5], "max_tokens": 4, "stream": True, "return_token_ids": True}
    client.send(0, json.dumps(body).encode())
    time.sleep(pause_s)
    client.run(lambda: time.sleep(busy_s))
    return client.next_done()[1]
