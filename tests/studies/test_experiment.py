"""The main use, end to end, on the real engine: what a user runs and what the user then relies on."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from lem.workload import tiny
from tests.conftest import SIMULATED, command, raw_record


@pytest.fixture(scope="module")
def quick_test(tmp_path_factory):
    """Run the README's first example."""
    folder = tmp_path_factory.mktemp("quick-test")
    done = command(
        "experiment", "--preset", "quick-test", "--model", "tiny", "-d", "sample", "-n", "10", "-y", "-o", "out",
        "energy.country_iso_code=DEU",
        cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder, done


@pytest.fixture(scope="module")
def row(quick_test):
    folder, _ = quick_test
    (found,) = pd.read_parquet(folder / "out" / "experiments").to_dict("records")
    return found


def test_it_prints_what_it_measured(quick_test):
    _, done = quick_test
    for word in ("completed", "tokens/s", "J/token", "random weights", "FLOP/s", "estimate", "CO2e", "mean"):
        assert word in done.out, word


def test_its_tokens_are_the_sum_over_its_request_rows(quick_test, row):
    folder, _ = quick_test
    requests = pd.read_parquet(folder / "out" / "requests")
    assert len(requests) == row["requests_completed"] == 10
    assert requests["output_tokens"].sum() == row["output_tokens"] == 10 * 32
    assert requests["input_tokens"].sum() == row["input_tokens"]
    assert sorted(requests["request"]) == list(range(10))


def test_the_identities_hold(row):
    assert row["energy_j"] == pytest.approx(row["average_power_w"] * row["duration_s"], rel=0.01)
    per_token = row["average_power_w"] / row["output_tokens_per_s"]
    assert row["energy_per_output_token_j"] == pytest.approx(per_token, rel=0.01)
    assert row["energy_wh"] == pytest.approx(row["energy_j"] / 3600)
    assert row["co2e_g"] == pytest.approx(row["energy_j"] / 3.6e6 * row["carbon_intensity_g_per_kwh"])
    assert row["flops_per_s"] == pytest.approx(row["flops"] / row["duration_s"])


def test_requests_fill_the_window_one_after_another(quick_test, row):
    folder, _ = quick_test
    requests = pd.read_parquet(folder / "out" / "requests")
    assert requests["latency_s"].sum() == pytest.approx(row["duration_s"], rel=0.05)
    assert row["latency_p50_s"] <= row["latency_p95_s"] <= row["latency_p99_s"] <= requests["latency_s"].max()


def test_the_energy_says_what_it_is(row, quick_test):
    record = raw_record(quick_test[0] / "out")
    assert [phase["name"] for phase in record["phases"]] == ["idle_before", "load", "idle_loaded", "warmup", "measured"]
    if row["energy_components"] == "gpu":
        assert row["energy_source"] == "counter"
    else:
        assert set(row["energy_components"].split("+")) <= {"cpu", "dram"}
        assert pd.isna(row["gpu_energy_j"])


def test_the_record_says_what_ran_and_where(quick_test):
    record = raw_record(quick_test[0] / "out")
    assert record["model"]["random_weights"] is True
    assert record["model"]["architecture"] == "LlamaForCausalLM"
    assert record["environment"]["versions"]["torch"]
    assert record["environment"]["cpu_threads"] > 0
    assert record["engine"]["settings"]["attn_implementation"] == "sdpa"


@pytest.mark.processes
def test_the_same_experiment_twice_generates_the_same_number_of_tokens(quick_test, tmp_path, row):
    done = command(
        "experiment",
        "--preset",
        "quick-test",
        "-m",
        "tiny",
        "-d",
        "sample",
        "-n",
        "10",
        "-y",
        "energy=none",
        cwd=tmp_path,
    )
    assert done.code == 0
    again = pd.read_parquet(tmp_path / "results" / "experiments").to_dict("records")[0]
    for name in ("prompts_sha256", "input_tokens", "output_tokens", "flops"):
        assert again[name] == row[name]
    assert pd.isna(again["energy_j"])
    assert pd.isna(again["average_power_w"])


def test_a_token_in_the_environment_is_written_nowhere(tmp_path):
    secret = "hf_" + "Secret0123456789" * 2
    done = command(
        "experiment", "-m", "any", "--backend", "simulated", "-d", "sample", "-n", "2", "-y", "energy=none",
        cwd=tmp_path,
        HF_TOKEN=secret,
    )  # fmt: skip
    assert done.code == 0
    assert secret not in done.out + done.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.processes
def test_a_model_that_fails_to_load_leaves_a_record_and_a_row(tmp_path):
    broken = tmp_path / "broken-model"
    shutil.copytree(tiny.path(), broken)
    config = json.loads((broken / "config.json").read_text())
    # Neither the files' headers nor the names of the weights reveal it.
    (broken / "config.json").write_text(json.dumps(config | {"hidden_act": "of tomorrow"}))
    done = command("experiment", "-m", "./broken-model", "-d", "sample", "-n", "2", "-y", "energy=none", cwd=tmp_path)
    assert done.code == 1
    assert "failed" in done.out
    assert "Traceback" not in done.out + done.err
    record = raw_record(tmp_path / "results")
    assert (record["status"], record["error"]["phase"]) == ("failed", "load")
    assert record["error"]["message"]
    (listed,) = json.loads(command("results", "list", "--json", cwd=tmp_path).out)
    assert listed["status"] == "failed"
    assert listed["energy_j"] is listed["output_tokens_per_s"] is None


@pytest.mark.processes
def test_a_prompt_that_does_not_fit_fails_with_the_remedy(tmp_path):
    (tmp_path / "long.txt").write_text("word " * 5000)
    done = command("experiment", "-m", "tiny", "-p", "long.txt", "-y", "energy=none", cwd=tmp_path)
    assert done.code == 1
    assert "Set max_input_tokens to" in " ".join(done.out.split())


# ------------------------------------------------------------------ the tables cannot be written
def test_row_that_cannot_be_written_is_shown_all_the_same(lem, tmp_path):
    for name, content in {
        "of-the-user.parquet": b"",
        "exp_20260102_030405-exp_20260102_030406-01234567.parquet": b"damaged",
    }.items():
        file = tmp_path / "results" / "experiments" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        finished = lem("experiment", *SIMULATED, "-n", "2")
        assert "completed" in finished.out
        assert "2 of 2 from sample" in finished.out
        is_ours = name.startswith("exp_")
        assert finished.code == is_ours
        assert ("The row is not in the tables" in finished.err) == is_ours
    file.unlink()
    assert lem("aggregate", "--all").code == 0
    assert lem("results", "list", "--json").out.count('"experiment_id"') == 2


def test_sweep_says_when_rows_could_not_be_written(lem, tmp_path):
    file = tmp_path / "results" / "experiments" / "exp_20260102_030405-exp_20260102_030406-01234567.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"damaged")
    finished = lem("experiment", *SIMULATED, "-n", "2", "--multirun", "seed=1,2")
    assert finished.err.count("The row is not in the tables") == 2
    assert "completed" in finished.out
