"""Interprets a server's answer as the bytes arrive: decompresses them, splits them into events and counts tokens.

Servers deviate from the protocol in many small ways. This module therefore judges by an answer's bytes whether the
answer is compressed, and whether it is a stream of events or a single JSON object; headers are only hints. Tokens are
counted by the ids or the usage that the server sends, never by events. This module knows nothing about the network,
prompts or experiments.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from lem.backends.engine import sentence
from lem.errors import RunError
from lem.workload.tokens import Chunk

OK = 200
# HTTP statuses after which a request may be sent again.
BUSY = (429, 503)
END_OF_STREAM = b"[DONE]"
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
# The possible beginnings of an uncompressed response, whatever its header says.
PLAIN = (BOM[:2], b"{", b"[", b"<", b":", b"da", b"ev", b"id", b"re")
LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a \r at the very end may be half of a \r\n
LINE_ENDS = (b"\n", b"\r")
EVENT_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
LONGEST_FIELD = max(map(len, EVENT_FIELDS))
# Limits in bytes: a larger event is rejected, and only this much of an error's text is read.
LARGEST_EVENT, LARGEST_ERROR = 8 * 2**20, 64 * 2**10
TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.DOTALL | re.IGNORECASE)
HTML = re.compile(r"\s*<(!doctype|html|head|body)\b", re.IGNORECASE)


class ServerGone(RunError):
    """No complete answer arrived: the server was unreachable or silent, or its response ended early."""


class Refused(RunError):
    """The server answered with an error, or with something that is not a completion.

    `status` is the HTTP status. `retry_after_s` is how long a busy server asks the client to wait, or None if the
    server does not say.
    """

    def __init__(self, reason: str, status: int = OK, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.retry_after_s = status, retry_after_s


class Part(NamedTuple):
    """An event of an answer.

    `read` and `at_ns` are the number and the time of the network read that completed the event. `tokens` is None if the
    event has no token count. `is_last` says whether the event has a finish reason.
    """

    read: int
    at_ns: int
    tokens: int | None
    has_text: bool
    is_last: bool


@dataclass(frozen=True)
class Answer:
    """A server's output for one prompt; times are readings of `time.perf_counter_ns`.

    `finish_reason` is the reason in the server's own words, or None if the server gives none. `output_tokens` is None
    if the server reports no count, and `token_ids` is None if it sends no ids. `parts` is empty unless the tokens were
    streamed. `retries` is how often the request was sent again because the server was busy.
    """

    sent_ns: int
    ended_ns: int
    finish_reason: str | None
    output_tokens: int | None
    token_ids: tuple[int, ...] | None
    input_tokens: int | None
    text: str = ""
    parts: tuple[Part, ...] = ()
    retries: int = 0

    @property
    def is_streamed(self) -> bool:
        """Whether the answer was sent as a stream of events."""
        return bool(self.parts)

    def chunks(self, output_tokens: int) -> tuple[tuple[Chunk, ...], bool]:
        """Return the tokens in chunks, in order of arrival, and whether the chunks' times are exact.

        If the number of tokens in each event is unknown, there are at most two chunks, the first token and the rest,
        and their times are not exact. There are no chunks if the answer was not streamed.

        Args:
            output_tokens: the number of output tokens.
        """
        known = _tokens_of_events(self.parts, output_tokens)
        if known is None:
            return _first_and_rest(self.parts, output_tokens), False
        together: dict[int, Chunk] = {}
        for part, tokens in known:
            before = together.get(part.read)
            together[part.read] = Chunk(part.at_ns, tokens + (before.tokens if before else 0))
        return tuple(together.values()), True


def _tokens_of_events(parts: Sequence[Part], output_tokens: int) -> list[tuple[Part, int]] | None:
    """Return the events that carry tokens and the number of tokens in each; None if these numbers are unknown.

    Each event with text has at least one token, so if there are as many events as tokens, each has exactly one. An
    event without text may also carry a token: the end token, which comes with the finish reason, or a token that holds
    only a part of a character.
    """
    counted = [(part, part.tokens) for part in parts if part.tokens]
    if all(part.tokens is not None for part in parts if part.has_text) and sum(n for _, n in counted) == output_tokens:
        return counted
    with_text = [part for part in parts if part.has_text]
    to_the_end = [part for part in parts if part.has_text or part.is_last]
    for alike in (with_text, to_the_end, parts):
        if len(alike) == output_tokens:
            return [(part, 1) for part in alike]
    return None


def _first_and_rest(parts: Sequence[Part], output_tokens: int) -> tuple[Chunk, ...]:
    """Return up to two chunks: the first token, and the rest.

    The rest gets the time of the last event with text or a finish reason.
    """
    marks = [part for part in parts if part.has_text or part.is_last] or list(parts)
    if not marks:
        return ()
    ends = (Chunk(marks[0].at_ns, min(output_tokens, 1)), Chunk(marks[-1].at_ns, output_tokens - 1))
    return tuple(chunk for chunk in ends if chunk.tokens > 0)


# ------------------------------------------------------------------ bytes
class Reply:
    """The response to one request, as its bytes arrive."""

    def __init__(
        self,
        sent_ns: int,
        status: int,
        headers: Iterable[tuple[bytes, bytes]],
        *,
        largest: int,
        most_events: int = sys.maxsize,
        by_text: bool = False,
    ) -> None:
        """Store the response's status and headers, before any bytes of its body have arrived.

        Args:
            sent_ns: the time when the request was sent.
            status: the HTTP status.
            headers: the headers; the case of their names does not matter.
            largest: the maximum size of a plausible answer in bytes.
            most_events: the maximum number of events with output in a plausible answer.
            by_text: whether tokens will be counted from the text, so that the server need not count them.
        """
        headers = list(headers)
        known = {name.lower(): value for name, value in headers}
        self._status, self._sent_ns, self._largest, self._by_text = status, sent_ns, largest, by_text
        self._most_events = most_events
        self._location = known.get(b"location", b"").decode(errors="replace")
        self._retry_after = known.get(b"retry-after", b"").decode(errors="replace")
        self._unpacking = Unpacking.of(headers, largest)
        self._says_events = b"event-stream" in known.get(b"content-type", b"").lower()
        self._is_delimited = b"content-length" in known or b"chunked" in known.get(b"transfer-encoding", b"").lower()
        self._head = b""
        self._transcript: Transcript | None = None
        self._content: bytearray | None = None
        self._at_ns = sent_ns

    @property
    def is_enough(self) -> bool:
        """Whether so much of an error's text has arrived that the rest need not be read."""
        return self._status != OK and self._content is not None and len(self._content) >= LARGEST_ERROR

    @property
    def is_done(self) -> bool:
        """Whether the server has sent its end marker, after which only the end of the response can follow."""
        return self._transcript is not None and self._transcript.is_done

    @property
    def events(self) -> int:
        """The number of events with output so far; events that only keep the connection alive do not count."""
        return 0 if self._transcript is None else self._transcript.events

    def take(self, received: bytes, read: int, at_ns: int) -> None:
        """Add bytes of the network read with the number `read`; the bytes of one read may come in several calls.

        Raises:
            Refused: the server sent an error, or more data than a completion can have.
        """
        self._at_ns = at_ns
        data = self._unpacking.take(received)
        if self._content is not None:
            self._content += data
        elif self._transcript is not None:
            self._transcript.take(data, read, at_ns)
            if self.events > self._most_events:
                raise Refused(f"the server sent more than {self._most_events} events with output and did not stop.")
        else:
            self._head += data
            self._tell_apart(read, at_ns)

    def _tell_apart(self, read: int, at_ns: int, *, at_end: bool = False) -> None:
        """Decide from the first bytes whether the response is a stream of events or a single JSON object."""
        if len(self._head) < len(BOM) and BOM.startswith(self._head) and not at_end:
            return
        head = self._head = self._head.removeprefix(BOM).lstrip()
        is_open = len(head) < LONGEST_FIELD and not any(end in head for end in LINE_ENDS)
        if self._status != OK or head[:1] in (b"{", b"[", b"<"):
            self._content = bytearray(head)
        elif self._says_events or head.startswith(EVENT_FIELDS):
            self._transcript = Transcript(self._sent_ns, by_text=self._by_text)
            self._transcript.take(head, read, at_ns)
        elif at_end or (head and not is_open):
            self._content = bytearray(head)

    def answer(self, *, is_whole: bool = True) -> Answer:
        """Return the answer; called after the response has ended.

        Args:
            is_whole: whether the response ended normally, rather than because the connection was lost.

        Raises:
            ServerGone: the response ended too early.
            Refused: the server sent an error or an invalid answer, for example one without the number of tokens.
        """
        if self._content is None and self._transcript is None:
            self._tell_apart(0, self._at_ns, at_end=True)
        if self._transcript is not None:
            # The normal end of a response without a length looks the same as a lost connection.
            return self._transcript.answer(is_whole=is_whole and self._is_delimited and not self._unpacking.is_cut)
        content = bytes(self._content or b"")
        if self._status != OK:
            raise self._refusal(content)
        if not is_whole or self._unpacking.is_cut:
            raise ServerGone("The server ended its response early: the last token or the token count is missing.")
        return _whole_answer(content, self._sent_ns, self._at_ns, by_text=self._by_text)

    def _refusal(self, content: bytes) -> Refused:
        if 300 <= self._status < 400:
            return Refused(f"HTTP {self._status}: {redirection(self._location)}", self._status)
        wait_s = waiting_s(self._retry_after) if self._status in BUSY else None
        return Refused(f"HTTP {self._status}: {reason_in(content)}", self._status, wait_s)


def redirection(location: str) -> str:
    """Return a message that names the address to which a response redirects, and the remedy."""
    target = printable(location)[:200] or "an unknown address"
    return f"the server redirects to {target}; set backend.url to the final address."


def waiting_s(retry_after: str) -> float | None:
    """Return the waiting time in seconds that a Retry-After header gives as seconds or as a date; None if invalid."""
    with suppress(ValueError, OverflowError):
        return max(0.0, float(int(retry_after.strip())))
    with suppress(ValueError, TypeError, OverflowError):
        at = parsedate_to_datetime(retry_after)
        return max(0.0, (at - datetime.now(UTC)).total_seconds())
    return None


class Unpacking:
    """Decompresses a response if its header or first bytes show that the server compressed it."""

    def __init__(self, encoding: str, largest: int) -> None:
        """Store the encoding named in the header, and the maximum size of the decompressed response in bytes."""
        names = [name.strip().lower() for name in encoding.split(",")]
        self._names = [name for name in names if name not in ("", "identity")]
        self._largest, self._taken = largest, 0
        self._head: bytes | None = b""
        self._inflating: Any = None

    @classmethod
    def of(cls, headers: Iterable[tuple[bytes, bytes]], largest: int) -> Unpacking:
        """Return the object that decompresses a response with these headers."""
        known = {name.lower(): value for name, value in headers}
        return cls(known.get(b"content-encoding", b"").decode(errors="replace"), largest)

    @property
    def is_cut(self) -> bool:
        """Whether the compressed data has begun but not ended."""
        return self._inflating is not None and not self._inflating.eof

    def take(self, received: bytes) -> bytes:
        """Return these bytes, decompressed if the response is compressed.

        Raises:
            Refused: the data is damaged, too large, or compressed by a method other than gzip and deflate.
        """
        data = received
        if self._head is not None:
            data = self._head + received
            if len(data) < len(GZIP) and (self._names or GZIP.startswith(data)):
                self._head = data
                return b""
            self._head = None
            self._begin(data)
        if self._inflating is not None:
            data = self._inflated(data)
        self._taken += len(data)
        if self._taken > self._largest:
            raise Refused(f"the server sent more than {self._largest // 2**20} MiB, more than any plausible answer.")
        return data

    def _begin(self, head: bytes) -> None:
        if head.startswith(GZIP):
            self._inflating = zlib.decompressobj(zlib.MAX_WBITS | 16)
        elif self._names == ["deflate"]:
            has_header = head[0] & 0x0F == zlib.DEFLATED and int.from_bytes(head[:2], "big") % 31 == 0
            self._inflating = zlib.decompressobj(zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS)
        elif self._names and not head.lstrip().startswith(PLAIN):
            names = printable(", ".join(self._names))[:40]
            raise Refused(
                f"the response is compressed ({names}), although lem did not ask for that; turn off the server's "
                "compression."
            )

    def _inflated(self, data: bytes) -> bytes:
        found = b""
        try:
            while data and len(found) <= self._largest:
                found += self._inflating.decompress(data, self._largest + 1 - len(found))
                data = self._inflating.unconsumed_tail
                if self._inflating.eof:
                    data = self._inflating.unused_data
                    if not data.startswith(GZIP):
                        break
                    self._inflating = zlib.decompressobj(zlib.MAX_WBITS | 16)
        except zlib.error as error:
            raise Refused(f"the compressed response is damaged ({error}).") from None
        return found


# ------------------------------------------------------------------ events
class Event(NamedTuple):
    """A server-sent event.

    `read` is the number of the network read that completed the event's last line of data, and `at_ns` is its time.
    """

    name: bytes
    data: bytes
    read: int
    at_ns: int


class Events:
    """Parses server-sent events from bytes that may be split anywhere.

    Events that are not separated by a blank line are accepted too.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._size = 0
        self._name = b""
        self._read, self._at_ns = 0, 0

    def feed(self, received: bytes, read: int = 0, at_ns: int = 0) -> list[Event]:
        """Return the events that these bytes complete.

        Raises:
            Refused: an event is too large, for example because the server never ends a line.
        """
        if not any(end in received for end in LINE_ENDS) and not self._rest.endswith(b"\r"):
            self._rest += received
            self._check_size()
            return []
        *lines, rest = LINE_END.split(bytes(self._rest) + received)
        self._rest = bytearray(rest)
        found = [event for line in lines for event in self._line(line, read, at_ns)]
        self._check_size()
        return found

    def close(self, read: int, at_ns: int) -> list[Event]:
        """Return the remaining complete events, even if the last line end or the final blank line is missing."""
        line, self._rest = bytes(self._rest).removesuffix(b"\r"), bytearray()
        found = list(self._line(line, read, at_ns)) if line else []
        is_whole = self._data and (self._name == b"error" or _is_whole(self._data))
        return [*found, *(self._whole() if is_whole else ())]

    def _line(self, line: bytes, read: int, at_ns: int) -> Iterator[Event]:
        if not line:
            if self._data:
                yield from self._whole()
            self._name = b""
            return
        name, _, value = (b"data", b"", line) if line.startswith(b"{") else line.partition(b":")
        if name in (b"data", b"event") and self._data and _is_whole(self._data):
            yield from self._whole()
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value)
            self._read, self._at_ns = read, at_ns
        elif name == b"event":
            self._name = value

    def _whole(self) -> Iterator[Event]:
        yield Event(self._name, b"\n".join(self._data), self._read, self._at_ns)
        self._data, self._name, self._size = [], b"", 0

    def _check_size(self) -> None:
        if len(self._rest) + self._size > LARGEST_EVENT:
            raise Refused(f"the server sent an event of more than {LARGEST_EVENT // 2**20} MiB.")


def _is_whole(data: Sequence[bytes]) -> bool:
    """Return whether these data lines form a complete event by themselves."""
    joined = b"\n".join(data).strip()
    return joined == END_OF_STREAM or _parsed(joined) is not None


class Usage(NamedTuple):
    """The token counts that a server reports; a count that it does not report is None."""

    output: int | None
    input: int | None


class Transcript:
    """One streamed answer, as it arrives."""

    def __init__(self, sent_ns: int, *, by_text: bool = False) -> None:
        self._sent_ns, self._by_text = sent_ns, by_text
        self._events = Events()
        self._parts: list[Part] = []
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._has_ids = self._lacks_ids = self._has_output = False
        self._usage = Usage(None, None)
        # _usage_is_last: the usage arrived with or after the last event of a choice, so it is complete.
        # _usage_is_alone: the usage arrived in an event without choices, as at the end of a stream.
        # _text_is_later: text has arrived after the usage.
        self._usage_is_last = self._usage_is_alone = self._text_is_later = False
        self._finish_reason: str | None = None
        self._read, self._at_ns = 0, sent_ns
        self.events = 0
        self.is_done = False

    def take(self, received: bytes, read: int, at_ns: int) -> None:
        """Add bytes of the network read with the number `read`; the bytes of one read may come in several calls.

        Raises:
            Refused: the server sent an error.
        """
        self._read, self._at_ns = read, at_ns
        self._take_events(self._events.feed(received, read, at_ns))

    def _take_events(self, events: Sequence[Event]) -> None:
        for event in events:
            data = event.data.strip()
            if self.is_done or not data:
                continue
            if data == END_OF_STREAM:
                self.is_done = True
            elif event.name == b"error":
                raise Refused(reason_in(data))
            else:
                self._take_event(checked(data), event)

    def _take_event(self, content: dict[str, Any], event: Event) -> None:
        usage, choices = usage_in(content), choices_in(content)
        has_news = (usage.output or 0) > (self._usage.output or 0)
        for choice in choices:
            text, ids, reason = text_in(choice), ids_in(choice), finish_reason_in(choice)
            has_news = has_news or bool(text or ids or (reason and not self._finish_reason))
            self._texts.append(text)
            self._has_output = self._has_output or bool(text or ids)
            self._finish_reason = reason or self._finish_reason
            tokens = self._tokens(ids, text, usage)
            self._parts.append(Part(event.read, event.at_ns, tokens, bool(text), reason is not None))
            self._usage_is_last = self._usage_is_alone = False
            self._text_is_later = self._text_is_later or bool(text or ids)
        if usage.output or (usage.output is not None and not self._has_output):
            self._add(usage)
            self._usage_is_alone = not choices
        elif usage.input:
            self._usage = Usage(self._usage.output, usage.input)
        self.events += has_news

    def _tokens(self, ids: Sequence[int] | None, text: str, usage: Usage) -> int | None:
        """Return how many tokens an event has: the number of its ids or, without ids, the rise in the reported usage.

        The result is None if the event has neither ids nor usage. A usage of 0 after some output is ignored.
        """
        if ids is not None:
            self._has_ids = True
            self._token_ids += ids
            return len(ids)
        self._lacks_ids = self._lacks_ids or bool(text)
        if usage.output is None or (usage.output == 0 and self._has_output):
            return None
        return max(0, usage.output - (self._usage.output or 0))

    def _add(self, usage: Usage) -> None:
        before = self._usage.output or 0
        if usage.output is not None and usage.output < before:
            raise Refused(f"the server's token counts contradict each other: first {before}, then {usage.output}.")
        self._usage = Usage(usage.output, usage.input or self._usage.input)
        self._usage_is_last, self._text_is_later = True, False

    def answer(self, *, is_whole: bool = True) -> Answer:
        """Return the answer; called after the stream has ended.

        Args:
            is_whole: whether the response is known to be complete.

        Raises:
            ServerGone: the stream ended too early.
            Refused: the server did not report the number of tokens, or reported a number that cannot be right.
        """
        self._take_events(self._events.close(self._read, self._at_ns))
        ids = self._token_ids if self._has_ids and not self._lacks_ids else None
        self._check_end(ids is not None, is_whole=is_whole or self.is_done)
        is_current = self._usage_is_last or (ids is None and not self._text_is_later)
        output_tokens, token_ids = counted(ids, self._usage if is_current else Usage(None, None))
        if not self._parts:
            raise Refused(NO_COMPLETION)
        if output_tokens is None and not self._by_text:
            raise Refused(NOT_COUNTED)
        self._check_count(output_tokens)
        answer = Answer(
            self._sent_ns,
            self._parts[-1].at_ns if self._parts else self._at_ns,
            self._finish_reason,
            output_tokens,
            token_ids,
            self._usage.input,
            "".join(self._texts),
            tuple(self._parts),
        )
        if output_tokens is None:
            return answer
        chunks, _ = answer.chunks(output_tokens)
        return replace(answer, ended_ns=chunks[-1].at_ns if chunks else answer.ended_ns)

    def _check_count(self, output_tokens: int | None) -> None:
        """Raise `Refused` if the count is too low for the number of events with text.

        Some servers report the count of each event instead of the total. Each event with text has at least one token.
        The last event is an exception: it may contain only text that the server had held back.
        """
        with_text = sum(part.has_text for part in self._parts)
        if output_tokens is not None and not self._has_ids and not self._by_text and with_text > output_tokens + 1:
            raise Refused(
                f"the server sent text in {with_text} events but counted {output_tokens} output tokens; "
                f"{COUNT_BY_TOKENIZER}"
            )

    def _check_end(self, has_ids: bool, *, is_whole: bool) -> None:
        """Raise `ServerGone` if the stream may have ended before the last token or before the final token count.

        A finish reason is not required if the server marks the end of the stream and counts all tokens.
        """
        # A server may report 0 until it knows the count.
        has_count = has_ids or self._by_text or (self._usage_is_last and bool(self._usage.output))
        if self._finish_reason is None:
            is_told = (self.is_done and (has_count or self._usage_is_last)) or (is_whole and self._usage_is_alone)
        else:
            is_told = is_whole or has_count
        if not is_told:
            raise ServerGone("The server ended its response early: the last token or the token count is missing.")


def _whole_answer(content: bytes, sent_ns: int, ended_ns: int, *, by_text: bool) -> Answer:
    """Return the answer in a response that was sent in one piece."""
    completion = checked(content)
    choice, usage = next(iter(choices_in(completion)), {}), usage_in(completion)
    if not choice:
        raise Refused(NO_COMPLETION)
    text = text_in(choice)
    if usage.output == 0 and text:
        usage = Usage(None, usage.input)
    output_tokens, token_ids = counted(ids_in(choice), usage)
    if output_tokens is None and not by_text:
        raise Refused(NOT_COUNTED)
    reason = finish_reason_in(choice)
    return Answer(sent_ns, ended_ns, reason, output_tokens, token_ids, usage.input or None, text)


NO_COMPLETION = "the server sent no completion (no choices)."
COUNT_BY_TOKENIZER = "set backend.count=tokenizer to count tokens with the model's tokenizer."
NOT_COUNTED = (
    "the server sends neither the ids nor the number of the output tokens (usage.completion_tokens); "
    f"{COUNT_BY_TOKENIZER}"
)


def counted(token_ids: Sequence[int] | None, usage: Usage) -> tuple[int | None, tuple[int, ...] | None]:
    """Return the number of output tokens and their ids, each None if unknown.

    Raises:
        Refused: the ids and the count contradict each other.
    """
    if token_ids is None:
        return usage.output, None
    if usage.output is not None and usage.output != len(token_ids):
        raise Refused(f"the server sent {len(token_ids)} token ids but counted {usage.output} output tokens.")
    return len(token_ids), tuple(token_ids)


# ------------------------------------------------------------------ contents
def checked(data: bytes) -> dict[str, Any]:
    """Return a response's JSON object, provided that it is not an error.

    Raises:
        Refused: the response is not a JSON object, or it is an error.
    """
    if not data.strip():
        raise Refused("the server sent an empty response.")
    content = _parsed(data)
    if content is None:
        page = data[:LARGEST_ERROR].decode(errors="replace")
        what = reason_in(data) if HTML.match(page) else f"something other than a JSON object: {_shown(data)}."
        raise Refused(f"the server sent {what}")
    is_error = content.get("error") or content.get("object") == "error"
    if is_error or ("choices" not in content and (content.get("detail") or content.get("message"))):
        raise Refused(reason_in(data))
    return content


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(data.removeprefix(BOM))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _shown(data: bytes) -> str:
    return printable(data[:80].decode(errors="replace")).strip() or "no printable text"


def choices_in(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a completion's choices with index 0 or no index; lem always asks for a single choice."""
    found = content.get("choices") or []
    if not isinstance(found, list) or not all(isinstance(choice, dict) for choice in found):
        raise Refused("the response's choices are not those of a completion.")
    return [choice for choice in found if not choice.get("index")]


def text_in(choice: dict[str, Any]) -> str:
    """Return the text of a choice, in the format of the completions endpoint or of the chat endpoint."""
    for found in (choice, choice.get("delta"), choice.get("message")):
        if isinstance(found, dict) and isinstance(text := found.get("text") or found.get("content"), str):
            return text
    return ""


def ids_in(choice: dict[str, Any]) -> list[int] | None:
    """Return the ids of a choice's tokens; None if the server does not send them."""
    ids = choice.get("token_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise Refused("the response's token_ids are not a list of numbers.")
    return ids


def finish_reason_in(choice: dict[str, Any]) -> str | None:
    """Return why a choice's output ended; None if it has not ended, or if the server does not say why."""
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) and reason else None


def usage_in(content: dict[str, Any]) -> Usage:
    """Return the token counts in a response."""
    usage = content.get("usage")
    if not isinstance(usage, dict):
        return Usage(None, None)
    return Usage(_count(usage.get("completion_tokens")), _count(usage.get("prompt_tokens")) or None)


def _count(value: Any) -> int | None:
    """Return a count, which may be written as 8, 8.0 or "8"; None if the value is not a count."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return int(number) if 0 <= number < 2**53 and number == int(number) else None


def reason_in(content: bytes) -> str:
    """Return the error text in a response body, whichever format the server uses; for HTML, only the page's title."""
    text = content[:LARGEST_ERROR].decode(errors="replace")
    if HTML.match(text):
        title = TITLE.search(text)
        return sentence(f"an HTML page{f', titled {printable(title[1]).strip()}' if title else ''}")
    with suppress(ValueError, RecursionError):
        found = _inner(json.loads(text))
        text = found if isinstance(found, str) else json.dumps(found)
    return sentence(printable(text))


def _inner(found: Any) -> Any:
    """Return the human-readable part of an error."""
    for name in ("error", "message", "detail", "msg"):
        if isinstance(found, list) and found and isinstance(found[0], dict):
            found = found[0]
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found


def printable(text: str) -> str:
    """Return the text with a space in place of each non-printable character, such as a terminal control character."""
    return "".join(each if each.isprintable() else " " for each in text)
