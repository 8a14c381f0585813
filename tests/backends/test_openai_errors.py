"""Whole runs against a server that refuses requests: each refusal is a row, and the run continues up to the limit."""

from __future__ import annotations

import json
import statistics

import pyarrow.parquet as pq
import pytest

from tests.backends.raw_server import Scripted, response
from tests.backends.test_openai_odd import events, stream
from tests.conftest import command, raw_record

pytestmark = pytest.mark.processes

COMMON = (
    "experiment", "--backend", "openai", "-m", "tiny", "-d", "sample", "-n", "8", "-y", "energy=none",
    "backend.device=cpu", "max_output_tokens=6", "--streaming", "streaming.warmup_requests=0",
)  # fmt: skip
CONTINUOUS = ("batching.strategy=continuous", "batching.batch_size=2")
BUSY = response(b'{"error": {"message": "rate limited"}}', status=429)


class Refusing:
    """Return a script that refuses requests by number; request 0 is sent before the run."""

    def __init__(self, *refused):
        self.refused, self.asked = set(refused), 0

    def __call__(self, body):
        number, self.asked = self.asked, self.asked + 1
        return [BUSY] if number in self.refused else stream(events(body))


def tables(results):
    (row,) = pq.read_table(results / "experiments").to_pylist()
    rows = sorted(pq.read_table(results / "requests").to_pylist(), key=lambda each: each["request"])
    return row, rows


@pytest.mark.parametrize("allowed", ["2", "0.25"], ids=["a number", "a share"])
def test_failed_requests_are_rows_that_enter_no_number(tmp_path, allowed):
    with Scripted(Refusing(3, 6)) as server:
        url = (f"backend.url={server.url}", f"backend.max_errors={allowed}", "traffic.ttft_limit_s=60")
        done = command(*COMMON, *CONTINUOUS, *url, cwd=tmp_path)
    assert done.code == 0, done.out + done.err
    row, rows = tables(tmp_path / "results")
    failed, finished = [r for r in rows if r["error"]], [r for r in rows if not r["error"]]
    assert (len(failed), len(finished)) == (2, 6)
    for each in failed:
        assert (each["error"], each["finish_reason"]) == ("HTTP 429: rate limited.", "error")
        assert {each[name] for name in ("output_tokens", "latency_s", "ttft_s", "tpot_s", "itl_s")} == {None}
        assert 0 < each["start_s"] < each["end_s"] < row["duration_s"]
    assert (row["status"], row["requests_planned"]) == ("completed", 8)
    assert (row["requests_completed"], row["requests_failed"], row["error_rate"]) == (6, 2, 0.25)
    assert row["output_tokens"] == sum(each["output_tokens"] for each in finished) == 36
    assert row["input_tokens"] == sum(each["input_tokens"] for each in finished)
    assert row["latency_mean_s"] == pytest.approx(statistics.fmean(each["latency_s"] for each in finished))
    assert row["ttft_mean_s"] == pytest.approx(statistics.fmean(each["ttft_s"] for each in finished))
    assert row["requests_per_s"] == pytest.approx(6 / row["duration_s"])
    assert row["goodput_requests_per_s"] == pytest.approx(6 / row["duration_s"])
    (warned,) = [text for text in row["warnings"] if text.startswith("requests_failed")]
    assert "2 of 8 requests failed: HTTP 429: rate limited. (2 times)" in warned
    assert not any(text.startswith("identity_violated") for text in row["warnings"])
    assert "2 requests (25.00%), excluded from tokens, latencies and throughput" in " ".join(done.out.split())
    record = raw_record(tmp_path / "results")
    assert (record["requests_completed"], record["requests_failed"], record["output_tokens"]) == (6, 2, 36)
    shown = json.loads(command("results", "show", row["experiment_id"], "--json", cwd=tmp_path).out)
    assert (shown["requests_failed"], shown["error_rate"]) == (2, 0.25)


def test_more_failures_than_allowed_end_the_run_and_it_can_be_resumed(tmp_path):
    with Scripted(Refusing(2, 3)) as server:
        limits = (f"backend.url={server.url}", "backend.max_errors=1", "batching.batch_size=1")
        done = command(*COMMON, *limits, cwd=tmp_path)
        assert done.code == 1, done.out + done.err
        row, rows = tables(tmp_path / "results")
        assert row["status"] == "failed"
        assert "2 of 8 requests failed, more than allowed; the last was prompt 2: HTTP 429" in row["error"]
        assert row["output_tokens_per_s"] is None
        assert [each["request"] for each in rows] == [0, 1]
        done = command("experiment", "-y", "--resume", row["experiment_id"], cwd=tmp_path)
    assert done.code == 0, done.out + done.err
    row, rows = tables(tmp_path / "results")
    assert (row["status"], row["requests_completed"], row["requests_failed"]) == ("completed", 7, 1)
    assert [each["request"] for each in rows] == list(range(8))


def test_an_experiment_in_which_all_failed_is_failed(tmp_path):
    with Scripted(Refusing(*range(1, 9))) as server:
        limits = (f"backend.url={server.url}", "backend.max_errors=100", *CONTINUOUS)
        done = command(*COMMON, *limits, cwd=tmp_path)
        assert done.code == 1, done.out + done.err
        row, rows = tables(tmp_path / "results")
        assert (row["status"], row["requests_completed"], row["requests_failed"]) == ("failed", 0, 8)
        assert (row["error_rate"], row["latency_mean_s"], row["output_tokens_per_s"]) == (1.0, None, None)
        assert row["error"] == "No request succeeded (8 failed); the last error was: HTTP 429: rate limited."
        assert len(rows) == 8
        again = command("experiment", "-y", "--resume", row["experiment_id"], cwd=tmp_path)
        assert again.code == 2
        assert "every request failed" in again.err
        assert "Traceback" not in again.err
        # The same command starts another experiment, in which the server answers.
        done = command(*COMMON, *limits, cwd=tmp_path)
    assert done.code == 0, done.out + done.err
    statuses = sorted(each["status"] for each in pq.read_table(tmp_path / "results" / "experiments").to_pylist())
    assert statuses == ["completed", "failed"]


def test_by_default_a_refused_request_ends_the_run(tmp_path):
    with Scripted(Refusing(4)) as server:
        done = command(*COMMON, f"backend.url={server.url}", cwd=tmp_path)
    assert done.code == 1, done.out + done.err
    row, rows = tables(tmp_path / "results")
    assert row["error"] == "The engine did not finish prompt 3: HTTP 429: rate limited."
    assert [each["request"] for each in rows] == [0, 1, 2]
    assert row["requests_failed"] == 0


def test_under_open_loop_traffic_refusals_are_a_result(tmp_path):
    with Scripted(Refusing(*range(2, 9, 2))) as server:
        traffic = ("traffic.pattern=constant", "traffic.target_qps=20", "traffic.ttft_limit_s=60")
        limits = (f"backend.url={server.url}", "backend.max_errors=0.5", *traffic)
        done = command(*COMMON, *limits, cwd=tmp_path)
    assert done.code == 0, done.out + done.err
    row, rows = tables(tmp_path / "results")
    assert (row["requests_completed"], row["requests_failed"]) == (4, 4)
    assert row["goodput_requests_per_s"] == pytest.approx(4 / row["duration_s"])
    assert row["arrival_rate_per_s"] == pytest.approx(20, rel=0.01), "those that failed have arrived too"
    assert all(each["arrived_s"] is not None for each in rows)
