"""The command lines of the reference, run as written, except that tiny, sample and local files replace gated models
and hub data, and that they run few prompts."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime, timedelta

import pytest

from tests.conftest import command

TINY = "model: tiny\nenergy: {name: none}\nmax_output_tokens: 4\nwarmup: {prompts: 1}\n"
QUICK = "model: any\nbackend: simulated\nenergy: {name: none}\nmax_output_tokens: 4\n"


@pytest.fixture
def shell(lem, tmp_path):
    """Run a line of the reference, after replacing models and data that are not available here."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/llama2.yaml").write_text(QUICK)
    (tmp_path / "base.yaml").write_text(QUICK)
    (tmp_path / "config.yaml").write_text(QUICK + "batching: {batch_size: 4}\n")

    def run(line: str):
        words = shlex.split(line.replace("\\\n", " "))
        assert words[0] == "lem"
        places = {"alpaca": "sample", "meta-llama/Llama-2-7b-hf": "tiny", "100": "3", "10": "3"}
        return lem(*(places.get(word, word) for word in words[1:]))

    return run


def rows(lem):
    return json.loads(lem("results", "list", "--json").out)


@pytest.mark.processes
def test_a_config_with_a_real_model(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/llama2.yaml").write_text(TINY)
    done = command("experiment", "configs/llama2.yaml", "--dataset", "sample", "-n", "3", cwd=tmp_path)
    assert done.code == 0
    assert "completed" in done.out


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        ("lem experiment configs/llama2.yaml --dataset alpaca -n 100", 1),
        ("lem experiment --preset quick-test --model meta-llama/Llama-2-7b-hf -d alpaca -n 10 --dry-run", 0),
        ("lem experiment configs/llama2.yaml --dataset alpaca -n 100 --cycles 5", 1),
        ("lem experiment configs/llama2.yaml --dataset alpaca -n 100 --dry-run", 0),
        ("lem batch 'configs/*.yaml' --dataset alpaca -n 100", 1),
        ("lem batch 'configs/*.yaml' --parallel 4 --dataset alpaca -n 100", 1),
        ("lem batch 'configs/*.yaml' -d alpaca --dry-run", 0),
        ("lem schedule config.yaml --interval 6h --dataset alpaca -n 100 --dry-run", 0),
        ("lem schedule config.yaml --at 09:00 --days weekdays --duration 7d --dataset alpaca -n 100 --dry-run", 0),
        ("lem config validate config.yaml", 0),
        ("lem config show config.yaml", 0),
        ("lem config new -o new.yaml --preset quick-test", 0),
        ("lem results list --all", 0),
        ("lem gpus", 0),
        ("lem datasets", 0),
        ("lem presets", 0),
        ("lem --version", 0),
        ("lem -v", 0),
        ("lem --verbose presets", 0),
    ],
)
def test_as_written(shell, lem, line, runs):
    done = shell(line)
    assert done.code == 0, done.err
    assert len(rows(lem)) == runs


def test_five_cycles_have_an_interval(shell, lem):
    shell("lem experiment configs/llama2.yaml --dataset alpaca -n 100 --cycles 5")
    (row,) = rows(lem)
    assert row["cycles_completed"] == 5
    assert row["output_tokens_per_s_ci95_low"] < row["output_tokens_per_s"] < row["output_tokens_per_s_ci95_high"]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("line", "shortened"),
    [
        ("lem schedule config.yaml --interval 6h --dataset alpaca -n 100", {"6h": "1s"}),
        (
            "lem schedule config.yaml --at 09:00 --days weekdays --duration 7d --dataset alpaca -n 100",
            {"weekdays": "mon-sun", "7d": "40s"},
        ),
        (
            "lem schedule --preset benchmark --model meta-llama/Llama-2-7b-hf --interval 12h",
            {"benchmark": "quick-test", "12h": "1s"},
        ),
    ],
)
def test_schedules_with_shortened_times(line, shortened, lem, tmp_path):
    """Times are shortened, and the last line, which has no dataset, gets one that is available here."""
    (tmp_path / "config.yaml").write_text(TINY)
    soon = datetime.now(UTC) + timedelta(seconds=20)
    places = {
        "alpaca": "sample", "meta-llama/Llama-2-7b-hf": "tiny", "100": "2", "09:00": f"{soon:%H:%M:%S}", **shortened
    }  # fmt: skip
    words = [places.get(word, word) for word in shlex.split(line)[1:]]
    words += [] if "--dataset" in words else ["--dataset", "sample", "-n", "2", "energy=none"]
    words += [] if "--duration" in words else ["--duration", "1s"]
    done = command(*words, "--time-zone", "UTC", cwd=tmp_path)
    assert done.code == 0, done.err + done.out
    assert "1 done" in done.out
    (row,) = rows(lem)
    assert (row["status"], row["schedule_run"]) == ("completed", 1)


@pytest.mark.processes
def test_a_grid_and_a_batch_over_it(shell, lem, tmp_path):
    made = shell(
        "lem config generate-grid base.yaml --vary batch_size=1,2,4,8 --vary fp_precision=float16,float32 "
        "--output-dir ./grid/"
    )
    assert made.code == 0, made.err
    assert len([f for f in (tmp_path / "grid").glob("*.yaml") if f.name != "grid.yaml"]) == 8
    assert shell("lem batch './grid/*.yaml' --dataset alpaca -n 10 --yes").code == 0
    assert {(row["batch_size"]) for row in rows(lem)} == {1, 2, 4, 8}
    assert len(rows(lem)) == 8


def test_a_grid_of_valid_points_lies_in_configs_grid(shell, tmp_path):
    assert shell("lem config generate-grid base.yaml --vary batch_size=1,2,4,8,16,32 --validate").code == 0
    assert len([f for f in (tmp_path / "configs/grid").glob("*.yaml") if f.name != "grid.yaml"]) == 6


def test_aggregating_again(shell, lem):
    shell("lem experiment configs/llama2.yaml --dataset alpaca -n 100 --no-aggregate")
    assert rows(lem) == []
    assert shell("lem aggregate --all").code == 0
    (row,) = rows(lem)
    assert shell(f"lem aggregate {row['experiment_id']}").code == 0
    assert shell(f"lem aggregate {row['experiment_id']} --force").code == 0
    assert shell(f"lem results show {row['experiment_id']} --raw").code == 0
    assert json.loads(shell(f"lem results show {row['experiment_id']} --json").out)["status"] == "completed"


def test_resuming_what_has_failed(shell, lem, tmp_path):
    (tmp_path / "configs/llama2.yaml").write_text(QUICK + "dataset: {name: sample, sample_size: 3}\n")
    failed = shell("lem experiment configs/llama2.yaml backend.fail_at_request=2 -y")
    assert failed.code == 1
    (row,) = rows(lem)
    again = shell(f"lem experiment --resume {row['experiment_id']}")
    assert again.code == 1  # the same configuration fails at the same request
    (row,) = rows(lem)
    assert (row["resumed"], row["requests_completed"]) == (1, 2)


def test_the_command_line_wins_over_the_file(shell, lem):
    done = shell("lem experiment config.yaml --batch-size 8 -d alpaca -n 10")
    assert done.code == 0
    assert rows(lem)[0]["batch_size"] == 8


def test_dot_env_names_the_results_directory(shell, tmp_path):
    (tmp_path / ".env").write_text(f"LLM_ENERGY_RESULTS_DIR={tmp_path}/data\nCODECARBON_LOG_LEVEL=warning\n")
    assert shell("lem experiment configs/llama2.yaml --dataset alpaca -n 100").code == 0
    assert len(list((tmp_path / "data/experiments").glob("*.parquet"))) == 1


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("--batch-size 4", "batching.batch_size", 4),
        ("-b 4", "batching.batch_size", 4),
        ("--precision bfloat16", "fp_precision", "bfloat16"),
        ("--num-processes 1", "num_processes", 1),
        ("--temperature 0.7", "decoder.temperature", 0.7),
    ],
)
def test_a_deprecated_flag_works_and_names_its_replacement_once(shell, flag, path, value):
    import yaml

    done = shell(f"lem experiment configs/llama2.yaml -d alpaca -n 10 --dry-run {flag}")
    assert done.code == 0, done.err
    shown = yaml.safe_load(done.out)
    for part in path.split("."):
        shown = shown[part]
    assert shown == value
    assert done.err.count("is deprecated") == 1
    assert f"{path.split('.')[-1]}: {value}" in done.err


def test_deprecated_flags_are_checked_like_any_value(shell):
    assert "batching.batch_size" in shell("lem experiment configs/llama2.yaml -d alpaca --batch-size 0 --dry-run").err
    assert shell("lem experiment configs/llama2.yaml -d alpaca --gpu-list 7 --dry-run").code == 2
    assert shell("lem experiment configs/llama2.yaml -d alpaca --gpu-list 0,,1 --dry-run").code == 2
    unsaid = shell("lem experiment configs/llama2.yaml -d alpaca --quantization --dry-run")
    assert unsaid.code == 2
    assert "load_in_8bit" in unsaid.err
