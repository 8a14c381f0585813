"""Switches to the Hugging Face hub's cache if the hub is unreachable, for models and datasets alike.

Without a network, the hub's client retries for half a minute before it falls back on its cache. A lookup of the hub's
host name, in contrast, fails immediately. The name is therefore looked up first; if the lookup fails, the client is put
into offline mode, in which it uses only the cache.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

OFFLINE, OFFLINE_TOO = "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
CONNECTION_WORDS = (
    "connect", "offline", "timeout", "timed out", "resolve", "network", "unreachable", "max retries",
    "couldn't reach", "name or service",
)  # fmt: skip


def is_offline() -> bool:
    """Return whether the hub's client is in its offline mode, so that nothing will be downloaded."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in (OFFLINE, OFFLINE_TOO))


def use_cache_if_unreachable() -> None:
    """Put the hub's client, here and in child processes, into offline mode if the hub's host name does not resolve.

    Call this before importing `huggingface_hub`, which reads HF_HUB_OFFLINE only once. If that variable is set, it is
    kept. Behind a proxy, nothing is changed, because perhaps only the proxy can resolve the name.
    """
    if os.environ.get(OFFLINE) or any(os.environ.get(name) for name in PROXIES):
        return
    try:
        socket.getaddrinfo(urlsplit(_endpoint()).hostname, None)
    except OSError:
        os.environ[OFFLINE] = "1"


@dataclass(frozen=True)
class Reach:
    """Whether the hub responds and, if not, why (`problem`).

    `host` is the hub's host name, without any password. `is_switched_off` says whether the client is in offline mode.
    """

    host: str
    is_reachable: bool
    is_switched_off: bool = False
    problem: str | None = None


def reach(timeout_s: float = 3.0) -> Reach:
    """Send the hub a HEAD request for its front page, through a proxy if the environment names one.

    The function returns after at most `timeout_s` seconds, even if the lookup of the host name, which has no time limit
    of its own, takes longer. In the client's offline mode, no request is sent.
    """
    try:
        parts = urlsplit(_endpoint())
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError as error:
        return Reach("HF_ENDPOINT", is_reachable=False, problem=f"it is not an address: {error}")
    if (os.environ.get(OFFLINE) or "").upper() in ("1", "ON", "YES", "TRUE"):
        return Reach(host, is_reachable=False, is_switched_off=True)
    # The user name and password are left out, because checking whether the hub responds does not require them.
    address = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{parts.path}"
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_problem(address, timeout_s)), name="hub", daemon=True).start()
    try:
        problem = answers.get(timeout=timeout_s)
    except queue.Empty:
        problem = f"no answer within {timeout_s:g} s"
    return Reach(host or "HF_ENDPOINT", is_reachable=problem is None, problem=problem)


def _problem(address: str, timeout_s: float) -> str | None:
    """Return why an address cannot be reached; None if anything answers there, even with an error."""
    import http.client
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=timeout_s).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", None) or error
        return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return None


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def is_unreachable(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is a connection error."""
    while error is not None:
        text = f"{type(error).__name__} {error}".lower()
        if isinstance(error, (ConnectionError, TimeoutError)) or any(word in text for word in CONNECTION_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
