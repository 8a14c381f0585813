"""Switching to the Hugging Face hub's cache when the hub is unreachable. Knows nothing about models or datasets.

Without a network, the hub's client retries for half a minute before it falls back on its cache. Looking up the host
name shows immediately that the hub is unreachable; the client is then put into offline mode, so that it uses the
cache.
"""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

OFFLINE = "HF_HUB_OFFLINE"
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
CONNECTION_WORDS = (
    "connect", "offline", "timeout", "timed out", "resolve", "network", "unreachable", "max retries",
    "couldn't reach", "name or service",
)  # fmt: skip


def use_cache_if_unreachable() -> None:
    """Put the hub's client, here and in child processes, into offline mode if the hub's host name does not resolve.

    Call this before importing `huggingface_hub`, which reads the variable only once. Behind a proxy, nothing is
    changed, because the name may resolve only at the proxy.
    """
    if os.environ.get(OFFLINE) or any(os.environ.get(name) for name in PROXIES):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        os.environ[OFFLINE] = "1"


def is_unreachable(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is a connection error."""
    while error is not None:
        text = f"{type(error).__name__} {error}".lower()
        if isinstance(error, (ConnectionError, TimeoutError)) or any(word in text for word in CONNECTION_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
