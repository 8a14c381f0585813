"""Servers as they are in practice: odd headers, encodings, events, counts and errors, over real sockets, in thousands.

Whatever a server sends, lem either counts its tokens correctly or says why the request failed.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import time
import zlib
from dataclasses import dataclass, replace
from email.utils import format_datetime

import pytest

from lem.backends import make_backend, openai_answer
from lem.backends.base import Encoded
from lem.backends.openai_answer import Refused, Reply, ServerGone, reason_in, waiting_s
from lem.errors import RunError
from lem.quantities import NS_PER_S
from lem.spec.engines import OpenaiBackend
from lem.spec.experiment import Batching, Experiment, Streaming, Traffic
from lem.workload.traffic import Arrivals
from tests.backends.raw_server import MODELS, Scripted, response

pytestmark = pytest.mark.engines

WORDS = ("Hel", "lo", " wor", "ld", "!", " And", " so", " on")
EVENT_STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def served():
    """Start a server that follows a script, and load a backend that talks to it."""
    ending = []

    def serve(complete, options=None, others=None, streaming=True, **experiment):
        server = Scripted(complete, others).__enter__()
        chosen = OpenaiBackend(**{"url": server.url, "device": "cpu", "timeout_s": 5.0} | (options or {}))
        wanted = {"model": "tiny", "max_output_tokens": 4, "streaming": Streaming(enabled=streaming)} | experiment
        backend = make_backend(Experiment(**wanted, backend=chosen))
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
    done = [g for batch in backend.generate(prompts(count)) for g in batch]
    return sorted(done, key=lambda g: g.index)


def usage(count, prompt=3):
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def prompt_tokens(body):
    return len(body["prompt"])


def choice(text, finish=None, **more):
    return {"index": 0, "text": text, "finish_reason": finish, **more}


def events(body, *, ids=True, each=None, final=True, finish="length", last_text=True):
    """Return the events of a response: one token each, with usage in each event as `each` makes it, and at the end."""
    count, made = body["max_tokens"], []
    for i in range(count):
        is_last = i == count - 1
        text = WORDS[i % len(WORDS)] if last_text or not is_last else ""
        more = {"token_ids": [100 + i]} if ids else {}
        event = {"choices": [choice(text, finish if is_last else None, **more)]}
        made.append(event | ({"usage": each(i + 1)} if each else {}))
    return [*made, {"choices": [], "usage": usage(count, prompt_tokens(body))}] if final else made


def lines(made, separator=b"\n\n"):
    return b"".join(b"data: " + json.dumps(event).encode() + separator for event in made)


def stream(made, *, kind=EVENT_STREAM, done=DONE, length=False, **headers):
    return [response(lines(made) + done, kind=kind, length=length, **headers)]


def whole(body, **more):
    ids = list(range(100, 100 + body["max_tokens"]))
    made = {"choices": [choice("".join(WORDS[: len(ids)]), "length", token_ids=ids)]}
    return json.dumps(made | {"usage": usage(len(ids), prompt_tokens(body))} | more).encode()


# ------------------------------------------------------------------ complete responses
ANSWERS = {
    "plain": lambda body: stream(events(body)),
    "content type in capitals": lambda body: stream(events(body), kind="Text/Event-Stream; Charset=UTF-8"),
    "no content type": lambda body: stream(events(body), kind=None),
    "text/plain": lambda body: stream(events(body), kind="text/plain"),
    "application/json": lambda body: stream(events(body), kind="application/json"),
    "gzip": lambda body: [
        response(gzip.compress(lines(events(body)) + DONE), kind=EVENT_STREAM, Content_Encoding="gzip")
    ],
    "gzip in capitals": lambda body: [
        response(gzip.compress(lines(events(body)) + DONE), kind=EVENT_STREAM, Content_Encoding="X-GZIP")
    ],
    "gzip without a word": lambda body: [response(gzip.compress(lines(events(body)) + DONE), kind=EVENT_STREAM)],
    "deflate": lambda body: [
        response(zlib.compress(lines(events(body)) + DONE), kind=EVENT_STREAM, Content_Encoding="deflate")
    ],
    "raw deflate": lambda body: [
        response(zlib.compress(lines(events(body)) + DONE)[2:-4], kind=EVENT_STREAM, Content_Encoding="deflate")
    ],
    "said to be gzip": lambda body: stream(events(body), Content_Encoding="gzip"),
    "BOM": lambda body: [response(b"\xef\xbb\xbf" + lines(events(body)) + DONE, kind=EVENT_STREAM)],
    "single newlines": lambda body: [
        response(lines(events(body), b"\n") + b"data: [DONE]\n", kind=EVENT_STREAM, length=False)
    ],
    "single carriage returns": lambda body: [
        response(lines(events(body), b"\r") + b"data: [DONE]\r", kind=EVENT_STREAM, length=False)
    ],
    "last event without its blank line": lambda body: [
        response(lines(events(body))[:-2] , kind=EVENT_STREAM, length=True)
    ],
    "end without its blank line": lambda body: stream(events(body), done=b"data: [DONE]"),
    "without [DONE], but with its length": lambda body: stream(events(body), done=b"", length=True),
    "connection lost after [DONE]": lambda body: [
        response(lines(events(body)) + DONE, kind=EVENT_STREAM, length=False, Content_Length="99999")
    ],
    "connection lost after the finish reason": lambda body: [
        response(lines(events(body, final=False)), kind=EVENT_STREAM, length=False, Content_Length="99999")
    ],
    "connection kept after [DONE]": lambda body: [
        response(lines(events(body)) + DONE, kind=EVENT_STREAM, length=False, Content_Length="99999"), 30.0
    ],
    "comments for ever after [DONE]": lambda body: [
        response(lines(events(body)) + DONE, kind=EVENT_STREAM, length=False), *[b": ping\n\n", 0.02] * 3000
    ],
    "finish reason eos_token": lambda body: stream(events(body, finish="eos_token")),
    "no finish reason": lambda body: stream(events(body, finish=None)),
    "usage alone": lambda body: stream(events(body, ids=False)),
    "interim usage with zeros": lambda body: stream(events(body, ids=False, each=lambda _: usage(0, 0))),
    "usage as 8.0": lambda body: stream(
        [*events(body, ids=False, final=False),
         {"choices": [], "usage": usage(float(body["max_tokens"]), prompt_tokens(body))}]
    ),
    'usage as "8"': lambda body: stream(
        [*events(body, ids=False, final=False),
         {"choices": [], "usage": {"completion_tokens": str(body["max_tokens"])}}]
    ),
    "pings and comments": lambda body: [
        response(b": ping\n\n" + lines(events(body)).replace(b"data:", b"event: x\nid: 1\n: ping\ndata:", 1) + DONE,
                 kind=EVENT_STREAM, length=False)
    ],
    "a blank line first": lambda body: [response(b"\n" + lines(events(body)) + DONE, kind=None, length=False)],
    "chat's words": lambda body: stream(
        [{"choices": [{"delta": {"content": e["choices"][0]["text"]}, **e["choices"][0]}]} if e["choices"] else e
         for e in events(body, ids=False)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_stream_is_understood_whatever_it_looks_like(served, answer):
    _, backend = served(answer)
    began_s = time.monotonic()
    for g in run(backend, 2):
        assert (g.error, g.output_tokens) == (None, 4)
        assert sum(chunk.tokens for chunk in g.chunks) == 4
        assert g.start_ns < g.chunks[0].at_ns <= g.end_ns
    assert {each.code for each in backend.warnings()} <= {"prefix_cache_kept", "random_weights"}
    assert time.monotonic() - began_s < 10


WHOLE = {
    "plain": lambda body: [response(whole(body))],
    "gzip": lambda body: [response(gzip.compress(whole(body)), Content_Encoding="gzip")],
    "gzip without a word": lambda body: [response(gzip.compress(whole(body)))],
    "BOM": lambda body: [response(b"\xef\xbb\xbf" + whole(body))],
    "text/plain": lambda body: [response(whole(body), kind="text/plain", length=False)],
    "usage as text": lambda body: [response(whole(body, usage={"completion_tokens": str(body["max_tokens"])}))],
}


@pytest.mark.parametrize("answer", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_an_answer_in_one_piece_is_understood_and_warned_about_where_it_should_stream(served, answer, streaming):
    _, backend = served(answer, streaming=streaming)
    for g in run(backend, 2):
        assert (g.error, g.output_tokens, g.chunks) == (None, 4, ())
    assert ("stream_ignored" in [each.code for each in backend.warnings()]) == streaming


def test_a_finish_reason_that_is_missing_follows_from_the_number_of_tokens(served):
    _, backend = served(lambda body: stream(events(body | {"max_tokens": min(3, body["max_tokens"])}, finish=None)))
    assert [(g.finish_reason, g.output_tokens) for g in run(backend, 1)] == [("stop", 3)]
    _, backend = served(lambda body: stream(events(body, finish=None)))
    assert [(g.finish_reason, g.output_tokens) for g in run(backend, 1)] == [("length", 4)]
    _, backend = served(lambda body: stream(events(body, finish="eos_token")))
    assert [g.finish_reason for g in run(backend, 1)] == ["stop"]


# ------------------------------------------------------------------ times
def timed(*made, ended=True):
    """Return the response of events that came 100 ms apart."""
    reply = Reply(0, 200, [(b"Content-Type", b"text/event-stream")], largest=2**20)
    for number, event in enumerate(made, 1):
        reply.take(lines([event]), number, number * 100_000_000)
    reply.take(DONE, len(made), len(made) * 100_000_000)
    return reply.answer()


def milliseconds(answer):
    chunks, are_timed = answer.chunks(answer.output_tokens)
    return [(chunk.at_ns // 1_000_000, chunk.tokens) for chunk in chunks], are_timed


def test_the_last_token_may_come_in_an_event_without_text():
    """There are neither ids nor usage in each event: an end token has no text, but a time."""
    five = [{"choices": [choice(word)]} for word in WORDS[:5]]
    end = {"choices": [choice("", "stop")], "usage": usage(6)}
    answer = timed(*five, end)
    assert milliseconds(answer) == ([(100 * n, 1) for n in range(1, 7)], True)
    assert answer.ended_ns == 600_000_000
    # The finish reason alone, after the last token, is not a token.
    answer = timed(*five, end | {"usage": usage(5)})
    assert milliseconds(answer) == ([(100 * n, 1) for n in range(1, 6)], True)
    # There are several tokens in an event: the first, and the rest up to the end.
    answer = timed(*five, end | {"usage": usage(9)})
    assert milliseconds(answer) == ([(100, 1), (600, 8)], False)
    answer = timed({"choices": [choice("a")]}, {"choices": [choice("", "stop")], "usage": usage(2)})
    assert milliseconds(answer) == ([(100, 1), (200, 1)], True)
    # If usage reported along the way starts counting too late, it is not believed.
    answer = timed(*(five[i] | {"usage": usage(0)} for i in range(5)), end)
    assert milliseconds(answer) == ([(100 * n, 1) for n in range(1, 7)], True)


# ------------------------------------------------------------------ invalid responses
def after_the_first(faulty):
    """Return a script that answers the first request correctly and all others in a faulty way."""
    asked = []

    def complete(body):
        asked.append(body)
        return stream(events(body)) if len(asked) == 1 else faulty(body)

    return complete


def some(body, count=2):
    return lines(events(body)[:count])


BOMB = gzip.compress(bytes(70 * 2**20), 1)
HTML = b"<!DOCTYPE html><html><head><title>502 Bad\nGateway</title></head><body>" + b"x" * 10_000 + b"</body></html>"
FAULTS = {
    "detail": (lambda _: [response(b'{"detail": "model overloaded"}', status=503)], r"HTTP 503: model overloaded\."),
    "details": (
        lambda _: [response(b'{"detail": [{"loc": ["body"], "msg": "Input should be a string"}, {}]}', status=422)],
        r"HTTP 422: Input should be a string\.",
    ),
    "object": (
        lambda _: [response(b'{"object": "error", "message": "out of memory", "code": 500}')], r"out of memory\.",
    ),
    "detail in the stream": (
        lambda b: [response(some(b) + b'data: {"detail": "worker died"}\n\n', kind=EVENT_STREAM)], r"worker died\.",
    ),
    "object in the stream": (
        lambda b: [response(some(b) + b'data: {"object": "error", "message": "worker died"}\n\n', kind=EVENT_STREAM)],
        r"worker died\.",
    ),
    "event: error": (
        lambda b: [response(some(b) + b"event: error\ndata: worker died\n\n", kind=EVENT_STREAM)], r"worker died\.",
    ),
    "event: error, single newlines": (
        lambda b: [response(lines(events(b)[:2], b"\n") + b"event: error\ndata: worker died", kind=EVENT_STREAM)],
        r"worker died\.",
    ),
    "bare error in the stream": (
        lambda b: [response(some(b) + b'{"error": {"message": "worker died"}}\n\n', kind=EVENT_STREAM)],
        r"worker died\.",
    ),
    "HTML": (lambda _: [response(HTML, status=502)], "HTTP 502: an HTML page, titled 502 Bad Gateway."),
    "HTML, well": (lambda _: [response(HTML, kind="text/html")], "the server sent an HTML page, titled 502 Bad Gat.*"),
    "redirect": (
        lambda _: [response(b"", status=307, Location="https://h/v2/completions")],
        r"HTTP 307: the server redirects to https://h/v2/completions; set backend\.url to the final address\.",
    ),
    "brotli": (
        lambda _: [response(b"\x8b\x03\x80abc\x03", Content_Encoding="br")], r"the response is compressed \(br\), .*",
    ),
    "damaged gzip": (
        lambda b: [response(gzip.compress(whole(b))[:20] + b"\xff" * 50, Content_Encoding="gzip")], "the compressed .*",
    ),
    "cut gzip": (lambda b: [response(gzip.compress(whole(b))[:-12], Content_Encoding="gzip")], "The server ended .*"),
    "cut stream": (lambda b: [response(some(b), kind=EVENT_STREAM, length=False)], "The server ended its response .*"),
    "lost connection": (
        lambda b: [response(some(b), kind=EVENT_STREAM, length=False, Content_Length="9999")],
        "The connection to the server at .* was lost: .*",
    ),
    "cut in the last event": (
        lambda b: [response(lines(events(b, final=False))[:-30], kind=EVENT_STREAM, length=False)],
        "The server ended its response .*",
    ),
    "cut before the count": (
        lambda b: [response(lines(events(b, ids=False, final=False)), kind=EVENT_STREAM, length=False)],
        "The server ended its response .*",
    ),
    "nothing": (lambda _: [], "The connection to the server at .* was lost: .*"),
    "an empty response": (lambda _: [response(b"")], "the server sent an empty response."),
    "no completion": (lambda _: [response(b'{"ok": true}')], r"the server sent no completion \(no choices\)\."),
    "odd choices": (lambda _: [response(b'{"choices": [null]}')], "the response's choices are not those of a .*"),
    "odd ids": (lambda _: [response(b'{"choices": [{"token_ids": ["a"]}]}')], "the response's token_ids are not a .*"),
    "deep JSON": (lambda _: [response(b"[" * 100_000)], "the server sent something other than a JSON object: .*"),
    "binary": (lambda _: [response(bytes(range(256)) * 10)], "the server sent something other than a JSON object: .*"),
    "not HTTP": (lambda _: [b"\x1b[31mSSH-2.0-OpenSSH\r\n\r\n"], "The connection to the server at .* was lost: .*"),
    "counts that fall": (
        lambda b: stream(events(b, ids=False, each=lambda n: usage(5 - n), final=False)),
        r"the server's token counts contradict each other: first 4, then 3\.",
    ),
    "counts that contradict ids": (
        lambda b: stream([*events(b, final=False), {"choices": [], "usage": usage(9)}]),
        "the server sent 4 token ids but counted 9 output tokens.",
    ),
    "no counts": (
        lambda b: stream(events(b, ids=False, final=False)), r".*set backend\.count=tokenizer to count tokens with .*",
    ),
    "abort": (lambda b: stream(events(b, finish="abort")), "The server stopped generating: abort."),
    "a line without end": (
        lambda _: [response(b"data: ", kind=EVENT_STREAM, length=False), *[b"x" * 2**20] * 9],
        "the server sent an event of .*",
    ),
    "gigabytes": (
        lambda _: [response(b"{", length=False), *[b" " * 2**20] * 70], "the server sent more than 64 MiB, .*",
    ),
    "a bomb": (
        lambda _: [response(BOMB, Content_Encoding="gzip")], "the server sent more than 64 MiB, .*",
    ),
    "an error of gigabytes": (
        lambda _: [response(b"no\n", status=500, length=False), *[b"x" * 2**20] * 200], "HTTP 500: no xxx.*",
    ),
    "comments for ever": (
        lambda _: [response(b"", kind=EVENT_STREAM, length=False), *[b": ping\n\n", 0.05] * 200],
        r"The server at .* has sent nothing for 1 s .*",
    ),
    "events without output for ever": (
        lambda b: [response(some(b), kind=EVENT_STREAM, length=False), *[b'data: {"choices": []}\n\n', 0.05] * 400],
        r"The server at .* has sent nothing for 1 s .*",
    ),
    "empty texts for ever": (
        lambda _: [response(b"", kind=EVENT_STREAM, length=False), *[lines([{"choices": [choice("")]}]), 0.05] * 400],
        r"The server at .* has sent nothing for 1 s .*",
    ),
    "reasons to finish for ever": (
        lambda _: [
            response(b"", kind=EVENT_STREAM, length=False), *[lines([{"choices": [choice("", "stop")]}]), 0.05] * 400
        ],
        r"The server at .* has sent nothing for 1 s .*",
    ),
    "pings as events for ever": (
        lambda _: [response(b"", kind=EVENT_STREAM, length=False), *[b"event: ping\ndata: {}\n\n", 0.05] * 400],
        r"The server at .* has sent nothing for 1 s .*",
    ),
    "tokens for ever": (
        lambda b: [response(b"", kind=EVENT_STREAM, length=False), *[some(b, 1) * 10, 0.001] * 20_000],
        r"the server sent more than 1064 events with output and did not stop\.",
    ),
    "counts of each event": (
        lambda b: stream(events(b, ids=False, each=lambda _: usage(1), final=False)),
        r"the server sent text in 4 events but counted 1 output tokens; set backend\.count=tokenizer .*",
    ),
    "a drip": (
        lambda _: [response(b"data: ", kind=EVENT_STREAM, length=False), *[b"x", 0.05] * 200],
        r"The server at .* has sent nothing for 1 s .*",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("faulty", "words"), FAULTS.values(), ids=FAULTS)
def test_what_is_no_answer_is_a_failed_request_with_a_printable_reason(served, faulty, words):
    # On a busy machine, megabytes take more than a second.
    _, backend = served(after_the_first(faulty), {"timeout_s": 1.0 if "has sent nothing" in words else 6.0})
    began_s = time.monotonic()
    (g,) = run(backend, 1)
    assert re.fullmatch(words, g.error), g.error
    assert g.error.isprintable()
    assert len(g.error) < 500
    assert (g.finish_reason, g.output_tokens) == ("error", 0)
    assert time.monotonic() - began_s < 8
    assert backend.warnings() is not None


@pytest.mark.parametrize(
    "text", ["", "x" * 10**6, "{" * 10**5, '{"error": {}}', '{"error": {"code": 3}}', "\x1b[31mred"]
)
def test_any_error_is_a_printable_sentence(text):
    reason = reason_in(text.encode())
    assert reason.isprintable()
    assert 0 < len(reason) < 500


# ------------------------------------------------------------------ counting by the tokenizer
def uncounted(body):
    text = " the cat sat on the mat"[: 4 * body["max_tokens"]]
    return stream([{"choices": [choice(text)]}, {"choices": [choice("", "stop" if len(text) > 4 else "length")]}])


@pytest.mark.parametrize("streaming", [True, False], ids=["streamed", "whole"])
def test_where_a_server_tells_no_counts_the_tokenizer_counts(served, streaming):
    def answer(body):
        if streaming:
            return uncounted(body)
        return [response(json.dumps({"choices": [choice(" the cat sat on", "stop")]}).encode())]

    with pytest.raises(RunError, match=r"set backend\.count=tokenizer to count tokens"):
        served(answer, streaming=streaming)
    _, backend = served(answer, {"count": "tokenizer"}, streaming=streaming, max_output_tokens=8)
    (g,) = run(backend, 1)
    text = " the cat sat on the mat"[:32] if streaming else " the cat sat on"
    by_text = len(backend._loaded.checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert (g.output_tokens, g.token_ids) == (by_text + 1, ())  # the end token has no text
    assert backend.engine_info().settings["output_tokens_counted_by"] == "the tokenizer"
    codes = [each.code for each in backend.warnings()]
    assert "tokens_by_tokenizer" in codes
    if streaming:
        assert sum(chunk.tokens for chunk in g.chunks) == g.output_tokens
        assert "tokens_not_timed" in codes


# ------------------------------------------------------------------ the first request
def test_prompts_that_are_refused_as_ids_can_be_sent_as_text(served):
    def takes_text(body):
        if not isinstance(body["prompt"], str):
            return [response(b'{"detail": "prompt must be a string"}', status=422)]
        return stream(events(body, final=False))

    with pytest.raises(
        RunError, match=r"first request failed: HTTP 422: prompt must be a string\. .*backend\.prompts=text"
    ):
        served(takes_text)
    server, backend = served(takes_text, {"prompts": "text"})
    text = "Once upon a time, there was"
    done = [g for batch in backend.generate(backend.encode([text])) for g in batch]
    assert (done[0].error, done[0].output_tokens) == (None, 4)
    assert server.bodies[-1]["prompt"] == text
    assert backend.engine_info().settings["prompts_sent_as"] == "text"


def test_a_prompt_that_no_text_yields_is_refused_before_it_is_measured(served):
    _, backend = served(lambda body: stream(events(body, final=False)), {"prompts": "text"})
    tokenizer = backend._loaded.checkpoint.tokenizer
    ids = tokenizer("hello")["input_ids"]
    split = [token for letter in "hello" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert split != ids
    with pytest.raises(RunError, match="cannot be sent as text"):
        backend._loaded.text_of(Encoded(0, tuple(split)))


LISTS = {
    "none": lambda _: response(b'{"detail": "Not Found"}', status=404),
    "no JSON": lambda _: response(b"ok", kind="text/plain"),
    "another": lambda _: response(b'{"ok": true}'),
    "empty": lambda _: response(b'{"data": []}'),
}
NAMED = {
    "of names": lambda _: response(b'["m"]'),
    "of models": lambda _: response(b'{"models": [{"name": "m"}]}'),
    "compressed": lambda _: response(gzip.compress(MODELS), Content_Encoding="gzip"),
    "with a BOM": lambda _: response(b"\xef\xbb\xbf" + MODELS),
}


@pytest.mark.parametrize("listed", LISTS.values(), ids=LISTS)
def test_a_server_without_a_list_of_models_needs_a_name(served, listed):
    with pytest.raises(RunError, match=r"[Ss]et backend\.model_name"):
        served(lambda body: stream(events(body)), others=listed)
    server, _ = served(lambda body: stream(events(body)), {"model_name": "named"}, listed)
    assert server.bodies[0]["model"] == "named"


@pytest.mark.parametrize("listed", NAMED.values(), ids=NAMED)
def test_other_lists_of_models_are_read(served, listed):
    server, _ = served(lambda body: stream(events(body)), others=listed)
    assert server.bodies[0]["model"] == "m"


@pytest.mark.parametrize("page", [response(bytes(2**25), length=False), response(BOMB, Content_Encoding="gzip")])
def test_pages_of_any_size_are_refused(served, page):
    """A list of models or a page of metrics that is too large is not read to its end."""
    with pytest.raises(RunError, match=r"/v1/models cannot be read: the server sent more than 16 MiB"):
        served(lambda body: stream(events(body)), others=lambda _: page)
    _, backend = served(
        lambda body: stream(events(body)), others=lambda path: response(MODELS) if path == "/v1/models" else page
    )
    assert run(backend, 1)[0].error is None
    assert backend.counters() is None


def test_what_a_server_says_about_itself_may_be_anything(served):
    card = {"id": "m\x1b[31m", "max_model_len": "4096", "owned_by": {"a": "x" * 10**5}, "root": ["\x07"]}
    pages = {
        "/v1/models": json.dumps({"data": [None, 7, {}, {"id": None}, card]}).encode(),
        "/version": b'{"version":' * 50_000,
        "/metrics": b"vllm:generation_tokens_total NaN\nvllm:prompt_tokens_total 1e999\n",
    }
    _, backend = served(lambda body: stream(events(body)), others=lambda path: response(pages.get(path, b"")))
    assert run(backend, 1)[0].error is None
    info = backend.engine_info()
    assert all(text.isprintable() and len(text) <= 300 for text in (info.version, *info.settings.values()))
    assert backend.encode(["hello"])
    assert not backend.counters()


def test_a_redirected_server_is_named(served):
    moved = response(b"", status=308, location="https://h:1/v1/models")
    with pytest.raises(RunError, match=r"HTTP 308: the server redirects to https://h:1/v1/models; set backend\.url"):
        served(lambda _: [], others=lambda _: moved)


# ------------------------------------------------------------------ busy servers
def busy(times, status=429, retry_after="1"):
    """Return a script that refuses the second request a number of times."""
    asked = []

    def complete(body):
        asked.append(body)
        if 1 < len(asked) <= 1 + times:
            head = {} if retry_after is None else {"Retry_After": retry_after}
            return [response(b'{"error": {"message": "busy"}}', status=status, **head)]
        return stream(events(body))

    return complete


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured_in_closed_runs(served, status):
    server, backend = served(busy(2, status))
    (g,) = run(backend, 1)
    assert (g.error, g.output_tokens) == (None, 4)
    gaps_s = [later - before for before, later in zip(server.begun_s[1:], server.begun_s[2:], strict=False)]
    assert len(gaps_s) == 2
    assert min(gaps_s) >= 1.0
    assert (g.end_ns - g.start_ns) / NS_PER_S >= 2.0, "latency counts from the first time"
    texts = {each.code: each.text for each in backend.warnings()}
    assert "(retries: 2)" in texts["requests_retried"]


def test_a_server_that_stays_busy_is_not_asked_for_ever(served):
    server, backend = served(busy(99), {"timeout_s": 2.5})
    (g,) = run(backend, 1)
    assert g.error == "HTTP 429: busy."
    assert len(server.bodies) == 1 + 3


def test_a_server_that_is_always_busy_is_soon_given_up(served, monkeypatch):
    monkeypatch.setattr("lem.backends.openai_session.TRIAL_PATIENCE_S", 1.5)
    refusal = response(b'{"error": {"message": "busy"}}', status=429, Retry_After="1")
    with pytest.raises(RunError, match=r"first request failed: HTTP 429: busy\."):
        served(lambda _: [refusal], {"timeout_s": 600})


@pytest.mark.parametrize("retry_after", [None, "soon", "3600"])
def test_a_busy_server_that_names_no_time_or_a_far_one_is_not_asked_again(served, retry_after):
    server, backend = served(busy(99, retry_after=retry_after))
    assert run(backend, 1)[0].error == "HTTP 429: busy."
    assert len(server.bodies) == 2


def test_open_loop_traffic_is_not_sent_again(served):
    server, backend = served(busy(1), traffic=Traffic(pattern="constant", target_qps=100))
    arrivals = Arrivals(prompts(2), [0.0, 0.2], 1, time.perf_counter_ns())
    done = {g.index: g for some in backend.serve(arrivals, 1) for g in some}
    assert (done[0].error, done[1].error) == ("HTTP 429: busy.", None)
    assert len(server.bodies) == 3


def test_a_failed_request_gives_its_place_to_the_next(served):
    _, backend = served(busy(3, retry_after=None), batching=Batching(strategy="continuous", batch_size=2))
    done = run(backend, 6)
    assert [g.index for g in done] == list(range(6))
    assert sum(g.error is not None for g in done) == 3


def test_times_of_retry_after():
    from datetime import UTC, datetime, timedelta

    assert waiting_s("7") == 7.0
    assert waiting_s("-3") == 0.0
    assert waiting_s(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)) == pytest.approx(
        30, abs=2
    )
    assert waiting_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [waiting_s(text) for text in ("", "soon", "1.5.2", "9" * 5000)] == [None] * 4


# ------------------------------------------------------------------ fuzz
@dataclass(frozen=True)
class Case:
    """A valid stream and its correct count, in an unusual form, and where it is cut off, if it is."""

    headers: list[tuple[bytes, bytes]]
    body: bytes
    pieces: list[bytes]
    tokens: int
    is_cut: bool
    has_length: bool


def a_case(draw: random.Random) -> Case:
    """Make a valid stream, encode it, split it, and perhaps cut it or add noise."""
    count = draw.randint(1, 12)
    body = lines_of(draw, count)
    headers: list[tuple[bytes, bytes]] = []
    kind = draw.choice(
        [b"text/event-stream", b"Text/Event-Stream;charset=utf-8", b"text/plain", b"application/json", None]
    )
    if kind is not None:
        headers.append((draw.choice([b"Content-Type", b"content-type", b"CONTENT-TYPE"]), kind))
    packed = draw.choice(["no", "no", "no", "gzip", "gzip unsaid", "deflate"])
    if packed.startswith("gzip"):
        body = gzip.compress(body, draw.randint(0, 9), mtime=0)
    elif packed == "deflate":
        body = zlib.compress(body)
    if packed in ("gzip", "deflate"):
        headers.append((b"Content-Encoding", packed.encode()))
    is_cut = draw.random() < 0.3
    sent = body[: draw.randint(0, len(body))] if is_cut else body
    has_length = draw.random() < 0.5
    headers += [(b"Content-Length", b"%d" % len(body))] if has_length else []
    pieces, left = [], sent
    while left:
        size = draw.choice([1, 2, 3, 7, 20, 100, 1000])
        pieces.append(left[:size])
        left = left[size:]
    return Case(headers, sent, pieces, count, is_cut, has_length)


def lines_of(draw: random.Random, count: int) -> bytes:
    """Write `count` tokens as events: by ids or usage, merged or not, with a BOM, comments, any line ends."""
    ids, each = draw.random() < 0.5, draw.choice([None, None, usage, lambda _: usage(0, 0)])
    finish = draw.choice(["stop", "length", "eos_token", None])
    is_last_silent = draw.random() < 0.3
    made, left, sent = [], count, 0
    while left:
        some = min(left, draw.choice([1, 1, 1, 2, 5]))
        left, sent = left - some, sent + some
        text = (
            ""
            if is_last_silent and not left
            else draw.choice(["é", "\u2028", "日本", "a", "\n", "data: x", "\\u00e9"]) * some
        )
        more = {"token_ids": list(range(some))} if ids else {}
        event = {"choices": [choice(text, finish if not left else None, **more)]}
        made.append(event | ({"usage": each(sent)} if each else {}))
    is_apart = not ids or draw.random() < 0.7
    made += [{"choices": [], "usage": usage(count)}] if is_apart else []
    end = draw.choice(["\n\n", "\r\n\r\n", "\r\r", "\n", "\r\n"])
    written = []
    for event in made:
        noise = draw.choice(["", "", "", ": ping", "id: 7", "retry: 10", "event: message"])
        line = json.dumps(event, ensure_ascii=draw.random() < 0.5)
        space = draw.choice(["", " "])
        written.append((f"{noise}{end[: len(end) // 2] or end}" if noise else "") + f"data:{space}{line}{end}")
    done = draw.choice(["data: [DONE]", "data:[DONE]"]) + draw.choice([end, ""])
    return draw.choice([b"", b"\xef\xbb\xbf"]) + "".join([*written, done]).encode()


def outcome(case: Case) -> int | None:
    """Return the number of tokens that lem counts in a case; None if it says that the request failed."""
    reply = Reply(0, 200, case.headers, largest=2**24)
    try:
        for number, piece in enumerate(case.pieces, 1):
            reply.take(piece, number, number)
        try:
            answer = reply.answer(is_whole=not case.is_cut)
        except ServerGone:
            return None
    except Refused:
        return None
    chunks, _ = answer.chunks(answer.output_tokens)
    assert sum(chunk.tokens for chunk in chunks) == answer.output_tokens
    assert all(0 < chunk.at_ns <= len(case.pieces) for chunk in chunks)
    assert answer.ended_ns == (chunks[-1].at_ns if chunks else answer.ended_ns)
    return answer.output_tokens


def test_two_thousand_odd_streams_are_counted_rightly_or_refused():
    cut_and_counted = 0
    for seed in range(2_000):
        case = a_case(random.Random(seed))
        found = outcome(case)
        if case.is_cut:
            assert found in (None, case.tokens), f"case {seed}"
            cut_and_counted += found is not None
        else:
            assert found == case.tokens, f"case {seed}"
    assert cut_and_counted > 5, "some are cut after all of their tokens"


def test_two_thousand_damaged_streams_end_in_a_count_or_a_reason():
    """If bytes are changed, dropped or doubled, any count is possible, but no hang and no other error."""
    for seed in range(2_000):
        draw = random.Random(seed)
        case = a_case(draw)
        damaged = bytearray(case.body)
        for _ in range(draw.randint(1, 5)):
            at = draw.randrange(len(damaged) + 1)
            damaged[at : at + draw.choice([0, 1, 5])] = draw.randbytes(draw.choice([0, 1, 3]))
        outcome(replace(case, pieces=[bytes(damaged[i : i + 50]) for i in range(0, len(damaged), 50)]))


def test_a_sample_of_odd_streams_over_a_real_socket(served):
    cases = [a_case(random.Random(10_000 + seed)) for seed in range(120)]
    left: list[Case] = []

    def complete(body):
        if not left:
            return stream(events(body))
        case = left.pop(0)
        headers, pieces = case.headers, case.pieces
        if not case.has_length and len(left) % 2:  # in chunks of HTTP, which show where it ends
            headers = [*headers, (b"transfer-encoding", b"Chunked")]
            pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"] * (not case.is_cut)
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        return [b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head + b"\r\n", *pieces]

    _, backend = served(complete, {"timeout_s": 5.0}, max_output_tokens=12)
    left += cases
    began_s = time.monotonic()
    for case, g in zip(cases, run(backend, len(cases)), strict=True):
        if case.is_cut:
            assert g.error is not None or g.output_tokens == case.tokens
        else:
            assert (g.error, g.output_tokens) == (None, case.tokens)
    assert time.monotonic() - began_s < 60


def test_events_of_any_size_take_time_in_proportion():
    began_s = time.monotonic()
    reply = Reply(0, 200, [(b"content-type", b"text/event-stream")], largest=2**30)
    reply.take(b"data: ", 0, 0)

    def never_end_the_line():
        for number in range(100_000):
            reply.take(b"x" * 500, number, number)

    with pytest.raises(Refused, match="an event of more than 8 MiB"):
        never_end_the_line()
    assert time.monotonic() - began_s < 5
    assert openai_answer.LARGEST_EVENT == 8 * 2**20
