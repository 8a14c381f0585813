"""Whole runs of the pytorch backend with continuous batching, timed tokens and requests that arrive."""

from __future__ import annotations

import signal

import pyarrow.parquet as pq
import pytest

from lem.spec.experiment import Traffic
from lem.workload.traffic import arrival_times_s
from tests.backends.conftest import rows
from tests.conftest import begin, command, kill_group, raw_record, wait_for, workers_of

pytestmark = pytest.mark.processes

COMMON = (
    "experiment", "--backend", "pytorch", "-m", "tiny", "-d", "sample", "-n", "14", "-y", "energy=none",
    "backend.device=cpu", "batching.strategy=continuous", "batching.batch_size=4", "max_output_tokens=24",
)  # fmt: skip


def completed(*options, cwd):
    finished = command(*COMMON, *options, cwd=cwd)
    assert finished.code == 0, finished.out + finished.err
    return cwd / "results"


def test_poisson_arrivals_are_taken_in_while_others_run_and_each_token_is_timed(tmp_path):
    results = completed(
        "--streaming", "traffic.pattern=poisson", "traffic.target_qps=8", "traffic.ttft_limit_s=60", cwd=tmp_path
    )
    (row,) = pq.read_table(results / "experiments").to_pylist()
    own = rows(results)
    assert (row["status"], len(own)) == ("completed", 14)
    assert sum(r["output_tokens"] for r in own) == row["output_tokens"] > 0
    assert sum(r["input_tokens"] for r in own) == row["input_tokens"] > 0
    due = arrival_times_s(Traffic(pattern="poisson", target_qps=8), 14, 42)
    assert [r["arrived_s"] for r in own] == pytest.approx(due, abs=1e-6)
    for r in own:
        assert r["latency_s"] == pytest.approx(r["end_s"] - r["arrived_s"])
        assert r["queue_s"] == pytest.approx(r["start_s"] - r["arrived_s"])
        assert r["ttft_s"] > r["queue_s"] >= 0
        assert len(r["itl_s"]) == r["output_tokens"] - 1
        assert min(r["itl_s"], default=1) > 0
        assert r["ttft_s"] + sum(r["itl_s"]) == pytest.approx(r["latency_s"], abs=1e-6)
        assert r["ttft_s"] == pytest.approx(r["queue_s"] + r["prefill_s"], abs=1e-6)
        assert not r["itl_spread"]
    assert any(a["start_s"] < b["start_s"] < a["end_s"] for a in own for b in own)
    assert max(sum(a["start_s"] <= b["start_s"] < a["end_s"] for a in own) for b in own) <= 4
    assert row["goodput_requests_per_s"] == pytest.approx(14 / row["duration_s"])
    assert 0 <= row["idle_share"] < 1
    assert row["kv_cache_bytes"] < 2**24


def test_steady_state_is_measured_beside_the_whole(tmp_path):
    (tmp_path / "trace.csv").write_text("t_s,power_w\n0,100\n3600,100\n")
    varied = ("max_output_tokens=120", "min_output_tokens=24", "decoder.do_sample=true")
    results = completed("energy=replay", "energy.trace=trace.csv", "energy.idle_s=0", *varied, cwd=tmp_path)
    (row,) = pq.read_table(results / "experiments").to_pylist()
    own = rows(results)
    assert 0 < row["steady_duration_s"] < row["duration_s"]
    assert 0 < row["steady_output_tokens"] < row["output_tokens"]
    assert row["steady_average_power_w"] == pytest.approx(100, rel=0.01)
    assert row["steady_energy_j"] < row["energy_j"]
    last_taken_s, begins_s = max(r["start_s"] for r in own), sorted(r["start_s"] for r in own)[3]
    first_free_s = min(r["end_s"] for r in own if r["end_s"] > last_taken_s)
    assert row["steady_duration_s"] <= first_free_s - begins_s
    shown = command("results", "show", row["experiment_id"], cwd=tmp_path)
    (line,) = [line for line in shown.out.splitlines() if line.startswith("Steady state")]
    assert "all slots taken" in line
    shown_w = float(line.rpartition(" · ")[2].removesuffix(" W"))
    assert shown_w == pytest.approx(row["steady_average_power_w"], rel=1e-3)


def test_cycles_are_alike_and_as_batch_after_batch_counts_them(tmp_path):
    (tmp_path / "static").mkdir()
    static = rows(completed("batching.strategy=static", cwd=tmp_path / "static"))
    results = completed("cycles=2", cwd=tmp_path)
    own = rows(results)
    for cycle in (1, 2):
        of_cycle = [row for row in own if row["cycle"] == cycle]
        assert [row["output_tokens"] for row in of_cycle] == [row["output_tokens"] for row in static]
        assert [row["finish_reason"] for row in of_cycle] == [row["finish_reason"] for row in static]
        phases = {phase["name"]: phase["duration_s"] for phase in raw_record(results, cycle=cycle)["phases"]}
        assert max(row["end_s"] for row in of_cycle) <= phases["measured"]
    settings = raw_record(results)["engine"]["settings"]
    assert settings["cache_implementation"] == "paged"
    assert settings["max_running_requests"] == "4"


def test_ctrl_c_ends_it_and_resuming_runs_what_is_left(tmp_path):
    long = ("max_output_tokens=120", "min_output_tokens=120")
    process = begin(*COMMON, *long, cwd=tmp_path)
    try:
        wait_for(process, "Prompts ")
        (worker,) = workers_of(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert not worker.is_running()
    finally:
        kill_group(process)
    (folder,) = (tmp_path / "results" / "raw").iterdir()
    resumed = command("experiment", "-y", "--resume", folder.name, cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    own = rows(tmp_path / "results")
    assert [(row["request"], row["output_tokens"]) for row in own] == [(i, 120) for i in range(14)]


def test_options_that_do_not_go_with_it_are_refused_before_the_run(tmp_path):
    refused = command(*COMMON, "backend.cache_implementation=static", cwd=tmp_path)
    assert refused.code == 2
    assert "continuous batching uses a paged cache" in refused.err
    assert not (tmp_path / "results").exists()
