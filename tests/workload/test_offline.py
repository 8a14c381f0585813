"""Whether the model hub answers: on real sockets, and when nothing does."""

from __future__ import annotations

import socket
import time

import pytest

from lem.workload.offline import reach
from tests.http_server import Running


@pytest.fixture(autouse=True)
def online(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_a_server_that_answers_is_reachable_whatever_it_answers(monkeypatch):
    with Running() as server:  # it does not know HEAD
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        found = reach()
    assert (found.is_reachable, found.host, found.problem) == (True, "127.0.0.1", None)


def test_one_that_accepts_and_stays_silent_is_given_up_in_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        begun_s = time.monotonic()
        found = reach(timeout_s=0.3)
        assert time.monotonic() - begun_s < 2
    assert not found.is_reachable
    assert found.problem


def test_a_name_that_is_never_found_out_is_given_up_in_time(monkeypatch):
    def look_up_for_long(*_, **__):
        time.sleep(30)
        raise socket.gaierror("no name server has answered")

    monkeypatch.setenv("HF_ENDPOINT", "http://example.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", look_up_for_long)
    begun_s = time.monotonic()
    found = reach(timeout_s=0.3)
    assert time.monotonic() - begun_s < 2
    assert found.problem == "no answer within 0.3 s"


@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "http://127.0.0.1:0", "ftp://[::1"])
def test_an_endpoint_that_is_none_is_a_reason_and_no_crash(monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    found = reach(timeout_s=1)
    assert not found.is_reachable
    assert found.problem


@pytest.mark.parametrize(("value", "is_off"), [("1", True), ("true", True), ("0", False)])
def test_offline_mode_asks_nothing(monkeypatch, value, is_off):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert reach(timeout_s=1).is_switched_off == is_off
