"""The command line as a user meets it: help, bad input, dry runs, results."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer

from lem.cli.base import exit_code_of
from lem.errors import Interrupted
from lem.quantities import one_line, plain, quantity
from tests.conftest import SIMULATED, command, raw_record

HEAVY = (
    "torch",
    "transformers",
    "hydra",
    "omegaconf",
    "pyarrow",
    "pandas",
    "codecarbon",
    "datasets",
    "pynvml",
    "vllm",
    "tensorrt_llm",
)


def modules_after(*arguments: str, cwd) -> set[str]:
    """Run a command and return the modules that it has imported by its end."""
    code = (
        "import sys, json\n"
        "from lem import cli\n"
        f"sys.argv = ['lem', *{arguments!r}]\n"
        "try:\n    cli.main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments", [("--help",), ("experiment", "--help"), ("presets",), ("datasets",), ("--version",)]
)
def test_light_commands_import_nothing_heavy(arguments, tmp_path):
    assert not modules_after(*arguments, cwd=tmp_path) & set(HEAVY)


def test_importing_lem_imports_nothing_heavy(tmp_path):
    code = "import sys, lem; lem.Experiment; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not {name for name in HEAVY if f"'{name}'" in done.stdout}


def test_version(lem):
    from lem import __version__

    for flag in ("--version", "-v"):
        assert lem(flag).out.strip() == f"lem {__version__}"


def test_without_a_command_the_help_is_shown(lem):
    shown = lem()
    assert "experiment" in shown.out + shown.err


def test_the_help_lists_each_command_with_the_first_sentence_of_its_own_help(lem, monkeypatch):
    from lem.cli.commands import COMMANDS, all_commands

    monkeypatch.setenv("COLUMNS", "300")
    found = typer.main.get_command(all_commands())
    with found.make_context("lem", [], resilient_parsing=True) as context:
        assert list(found.list_commands(context)) == list(COMMANDS)
    for name, (_, sentence) in COMMANDS.items():
        assert found.get_command(context, name).get_short_help_str(1000) == sentence
        assert sentence in lem("--help").out


def test_flags_help_comes_from_the_schema(lem, monkeypatch):
    from lem.spec.schema import leaf

    monkeypatch.setenv("COLUMNS", "300")
    shown = " ".join(lem("experiment", "--help").out.split())
    for path in ("dataset.sample_size", "max_output_tokens", "seed"):
        assert leaf(path).description in shown


# ------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment", "nowhere.yaml"], "no such config file"),
        (["experiment", "a.yaml", "b.yaml"], "one config file, not 2"),
        (["experiment", "broken.yaml"], "broken.yaml:3:1: broken YAML"),
        (["experiment", "typo.yaml"], "modle: unknown key. Did you mean 'model'"),
        (["experiment", "-m", "tiny", "-d", "sample", "-n", "0"], "dataset.sample_size (--sample-size)"),
        (["experiment", "-m", "tiny", "-d", "sample", "-n", "-3"], "greater than or equal to 1, not -3"),
        (["experiment", "-m", "tiny", "-d", "sample", "--max-tokens", "0"], "(--max-tokens)"),
        (["experiment", "-m", "tiny", "-d", "sample", "--seed", "-1"], "(--seed)"),
        (["experiment", "-m", "tiny", "-d", "smaple"], "Did you mean 'sample'"),
        (["experiment", "-m", "tiny", "-d", "sample", "--column", "txt"], "Its columns: text, kind"),
        (["experiment", "-m", "tiny", "-d", "sample", "--split", "train"], "has no splits"),
        (["experiment", "-m", "tiny", "-d", "some/dataset"], "-d sample"),
        (["experiment", "-m", "tiny"], "-d sample"),  # the default dataset is on the hub
        (["experiment", "-m", "tiny", "--prompts", "empty.txt"], "is empty"),
        (["experiment", "-m", "tiny", "--prompts", "blank.txt"], "are empty"),
        (["experiment", "-m", "tiny", "--prompts", "nowhere.txt"], "--prompts: there is no file nowhere.txt"),
        (["experiment", "-m", "tiny", "-d", "sample", "-p", "empty.txt"], "are mutually exclusive"),
        (["experiment", "-m", "./nowhere", "-d", "sample"], "no model directory"),
        (["experiment", "-m", "tinny", "-d", "sample"], "Did you mean 'tiny'"),
        (["experiment", "-m", "some/model", "-d", "sample"], "--model tiny"),
        (["experiment", "-m", ".", "-d", "sample"], "no config.json"),
        (["experiment", "--preset", "quick-test", "-d", "sample"], "--model"),
        (["experiment", "--preset", "quick", "-m", "tiny"], "quick-test"),
        (["experiment", "-m", "tiny", "-d", "sample", "--backend", "torch"], "pytorch"),
        (["experiment", "-m", "tiny", "-d", "sample", "batching.batch_size=1,2"], "--multirun"),
        (["experiment", "-m", "tiny", "-d", "sample", "min_output_tokens=500"], "min_output_tokens"),
        (["experiment", "-m", "tiny", "-d", "sample", "batching.strategy=dynamic"], "token budget"),
        (["experiment", "-m", "tiny", "-d", "sample", "quantization.quantization=true"], "load_in_8bit"),
        (["experiment", "-m", "tiny", "-d", "sample", "energy=replay"], "energy.trace"),
        (["experiment", "-m", "tiny", "-d", "sample", "energy.country_iso_code=XYZ"], "XYZ"),
        (["experiment", "-m", "tiny", "-d", "sample", "backend=simulated", "backend.device=cpu"], "backend.device"),
        (["experiment", "-m", "tiny", "-d", "sample", "-o", "blank.txt"], "blank.txt is a file, not a directory."),
        (["results", "show", "exp_1"], "no experiment 'exp_1'"),
        (["aggregate", "exp_1"], "no experiment 'exp_1'"),
        (["aggregate"], "--all"),
        (["aggregate", "exp_1", "--all"], "--all"),
        (["experiment", "--bacth-size", "3"], "No such option"),
        (["experimnt"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_sentence_and_exit_code_2(lem, tmp_path, arguments, message):
    (tmp_path / "broken.yaml").write_text("model: x\nbatching: {batch_size: 4\n")
    (tmp_path / "typo.yaml").write_text("modle: x\n")
    (tmp_path / "a.yaml").write_text("model: x\n")
    (tmp_path / "b.yaml").write_text("model: x\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n  \n\n")
    more = ["-y"] if arguments[0] == "experiment" else []
    finished = lem(*arguments, *more)
    assert finished.code == 2
    assert message in " ".join(finished.err.split())
    assert not (tmp_path / "results").exists()


def test_all_objections_are_told_at_once(lem):
    finished = lem("experiment", "-d", "nowhere", "min_output_tokens=500", "batching.strategy=dynamic", "-y")
    assert finished.code == 2
    lem_sees_the_dataset_first = finished.err.count("Error:")
    assert lem_sees_the_dataset_first == 1
    finished = lem("experiment", "-d", "some/set", "min_output_tokens=500", "batching.strategy=dynamic", "-y")
    for part in ("No model", "min_output_tokens", "token budget", "some/set"):
        assert part in finished.err


def test_force_overrides_what_is_inadvisable_but_not_what_is_impossible(lem):
    inadvisable = (*SIMULATED, "decoder.temperature=0.5", "-n", "2", "--dry-run")
    refused = lem("experiment", *inadvisable)
    assert refused.code == 2
    assert "--force" in refused.err
    assert lem("experiment", *inadvisable, "--force").code == 0
    impossible = lem("experiment", *inadvisable, "min_output_tokens=500", "--force")
    assert impossible.code == 2
    assert "temperature" not in impossible.err


# ------------------------------------------------------------------ dry run
def test_a_dry_run_shows_the_configuration_and_writes_nothing(lem, tmp_path):
    import yaml

    finished = lem("experiment", "--preset", "quick-test", "-m", "tiny", "-d", "sample", "-n", "7", "--dry-run")
    assert finished.code == 0
    shown = yaml.safe_load(finished.out)
    assert (shown["model"], shown["max_output_tokens"], shown["dataset"]["sample_size"]) == ("tiny", 32, 7)
    assert "7 of 300" in finished.out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_finds_what_a_run_would_find(lem):
    assert lem("experiment", "-m", "some/model", "-d", "sample", "--dry-run").code == 2
    assert lem("experiment", "-m", "tiny", "-d", "some/set", "--dry-run").code == 2


# ------------------------------------------------------------------ running
def test_a_run_leaves_its_files_and_shows_its_table(lem, tmp_path):
    finished = lem("experiment", *SIMULATED, "-n", "6", "-o", "out")
    assert finished.code == 0
    assert "completed" in finished.out
    assert "6 of 6 from sample" in finished.out
    record = raw_record(tmp_path / "out")
    assert record["status"] == "completed"
    assert record["requests_completed"] == 6
    assert "Prompts 6/6" in finished.err
    assert "simulated" in finished.out


def test_a_config_file_with_flags_and_overrides(lem, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "model: any\nbackend: simulated\ndataset: sample\nenergy: none\nmax_output_tokens: 9\nseed: 5\n"
    )
    assert lem("experiment", "my.yaml", "batching.batch_size=3", "-n", "4", "--seed", "0", "-y").code == 0
    (spec,) = tmp_path.glob("results/raw/*/spec.json")
    written = json.loads(spec.read_text())
    assert written["experiment"]["max_output_tokens"] == 9
    assert written["experiment"]["batching"]["batch_size"] == 3
    assert written["experiment"]["seed"] == 0
    assert written["prompts"]["count"] == 4
    assert written["config_file"] == "my.yaml"
    assert "batching.batch_size=3" in written["overrides"]


def test_a_prompts_file_is_used_whole(lem, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo words\nthree small words\n")
    assert lem("experiment", "-m", "any", "--backend", "simulated", "-p", "p.txt", "energy=none", "-y").code == 0
    assert raw_record(tmp_path / "results")["input_tokens"] == 6


def test_the_results_directory_comes_from_flag_file_environment_or_default_in_that_order(lem, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("io: {results_dir: from-file}\n")
    (tmp_path / ".env").write_text("LLM_ENERGY_RESULTS_DIR=from-env\n")
    monkeypatch.delenv("LLM_ENERGY_RESULTS_DIR", raising=False)
    run = ("experiment", *SIMULATED, "-n", "1")
    lem(*run, "c.yaml", "-o", "from-flag")
    lem(*run, "c.yaml")
    lem(*run)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"from-flag", "from-file", "from-env"}
    assert "exp_" in lem("results", "list").out


def test_fewer_prompts_than_asked_for_are_all_run_and_noted(lem, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    shown = lem("experiment", "-m", "any", "--backend", "simulated", "-p", "p.txt", "-n", "5", "energy=none", "-y")
    assert "fewer_prompts: 5 prompts were requested" in shown.out


def test_a_failing_run_is_a_record_a_row_and_exit_code_1(lem, tmp_path):
    failed = lem("experiment", *SIMULATED, "-n", "6", "backend.fail_at_request=3")
    assert failed.code == 1
    assert "simulated failure at request 3" in failed.out
    record = raw_record(tmp_path / "results")
    assert (record["status"], record["requests_completed"]) == ("failed", 3)
    listed = json.loads(lem("results", "list", "--json").out)
    assert [(row["status"], row["requests_completed"]) for row in listed] == [("failed", 3)]


def test_no_aggregate_leaves_the_row_to_the_aggregate_command(lem, tmp_path):
    shown = lem("experiment", *SIMULATED, "-n", "2", "--no-aggregate")
    assert shown.code == 0
    assert "lem aggregate exp_" in shown.out
    assert not (tmp_path / "results" / "experiments").exists()
    assert "has a row; use --all to list experiments without rows" in lem("results", "list").out
    assert "to write its row" in lem("results", "list", "--all").out
    assert "completed" in lem("aggregate", "--all").out
    assert "completed" in lem("results", "list").out
    assert "their rows are up to date: 1" in lem("aggregate", "--all").out


def test_results_show_as_table_json_and_raw(lem):
    lem("experiment", *SIMULATED, "-n", "3")
    (row,) = json.loads(lem("results", "list", "--json").out)
    shown = json.loads(lem("results", "show", row["experiment_id"][:10], "--json").out)
    assert {name: shown[name] for name in row} == row
    assert shown["config"]["backend"]["name"] == "simulated"
    assert "any" in lem("results", "show", row["experiment_id"]).out
    (raw,) = json.loads(lem("results", "show", row["experiment_id"], "--raw", "--json").out)
    assert [phase["name"] for phase in raw["phases"]] == ["load", "warmup", "measured"]
    assert "measured" in lem("results", "show", row["experiment_id"], "--raw").out


STREAMED = ("--streaming", "traffic.pattern=constant", "traffic.target_qps=20")
LIMITS = ("traffic.ttft_limit_s=0.5", "traffic.itl_limit_s=0.02")
MEASURED = ("Time to first token", "Inter-token latency", "Time per output token", "Arrivals", "Queueing", "Goodput")


def test_what_streaming_and_traffic_measure_is_shown(lem):
    """The numbers of the row are shown both after the run and later."""
    ran = lem("experiment", *SIMULATED, "-n", "3", *STREAMED, *LIMITS)
    (row,) = json.loads(lem("results", "list", "--json").out)
    shown = lem("results", "show", row["experiment_id"]).out
    lines = dict(line.split("  ", 1) for line in shown.splitlines() if "  " in line)
    lines = {name: text.strip() for name, text in lines.items()}
    row = json.loads(lem("results", "show", row["experiment_id"], "--json").out)
    of = ("mean", "p50", "p95", "p99")
    for name, stem in zip(("Latency", *MEASURED[:3]), ("latency", "ttft", "itl", "tpot"), strict=True):
        assert lines[name] == " · ".join(f"{part} {quantity(row[f'{stem}_{part}_s'], 's', 3)}" for part in of)
    gaps = row["output_tokens"] - 3  # one for each token of the three requests after the first
    assert lines["Sample sizes"] == f"latency 3 · TTFT 3 · ITL {gaps} · TPOT 3 · queue 3"
    assert (row["latency_samples"], row["itl_samples"]) == (3, gaps)
    assert lines["Arrivals"] == (
        f"{plain(row['arrival_rate_per_s'])} requests/s · idle {100 * row['idle_share']:.1f}% of the window"
    )
    of = ("mean", "p95", "p99")
    assert lines["Queueing"] == " · ".join(f"{part} {quantity(row[f'queue_{part}_s'], 's', 3)}" for part in of)
    goodput = plain(row["goodput_requests_per_s"])
    assert lines["Goodput"] == f"{goodput} requests/s with TTFT up to 500 ms and mean ITL up to 20 ms"
    assert all(name in ran.out for name in MEASURED)


def test_without_streaming_and_traffic_nothing_of_them_is_shown(lem):
    shown = lem("experiment", *SIMULATED, "-n", "1").out
    assert "Latency" in shown
    assert not any(name in shown for name in MEASURED)


def test_a_damaged_row_is_named_and_hides_nothing_else(lem, tmp_path):
    for _ in range(2):
        lem("experiment", *SIMULATED, "-n", "1")
    damaged = sorted((tmp_path / "results" / "experiments").iterdir())[0]
    damaged.write_bytes(b"no parquet")
    listed = lem("results", "list")
    assert listed.code == 1
    assert damaged.name in listed.err
    assert "completed" in listed.out
    assert lem("aggregate", damaged.stem, "--force").code == 0
    assert lem("results", "list").code == 0


# ------------------------------------------------------------------ as a plain Hydra app
def hydra_app(*arguments: str, cwd):
    return subprocess.run(
        [sys.executable, "-m", "lem.cli.hydra_app", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    )


PLAIN = ("backend=simulated", "model=any", "dataset=sample", "dataset.sample_size=3", "energy=none")


@pytest.mark.processes
def test_the_plain_hydra_app_does_the_same_job(tmp_path):
    done = hydra_app(*PLAIN, "preset=quick-test", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 from sample" in done.stdout
    assert raw_record(tmp_path / "results")["requests_completed"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"results"}


@pytest.mark.processes
def test_the_plain_hydra_app_refuses_in_one_sentence(tmp_path):
    done = hydra_app(*PLAIN, "batching.batchsize=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "batching.batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    failed = hydra_app(*PLAIN, "backend.fail_at_request=0", cwd=tmp_path)
    assert failed.returncode == 1


# ------------------------------------------------------------------ pipes and wording
def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m lem presets | head -1",
        shell=True, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""


def test_piped_tables_are_not_cut(tmp_path):
    listed = command("datasets", cwd=tmp_path)
    assert "anon8231489123/ShareGPT_Vicuna_unfiltered" in listed.out
    assert "…" not in listed.out
    assert all(line == line.rstrip() for line in listed.out.splitlines())


def test_datasets_and_presets_show_the_references_entries(lem):
    shown = lem("datasets").out
    for entry in ("ai-energy-score", "alpaca", "sharegpt", "gsm8k (main)", "cais/mmlu (all)", "sample"):
        assert entry in shown
    shown = lem("presets").out
    assert "quick-test" in shown
    assert "batching.batch_size=8" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 J"),
        (0.0456, "45.6 mJ"),
        (1234.5, "1.234 kJ"),
        (-2.5, "-2.5 J"),
        (3e-12, "0.003 nJ"),
        (0.99996, "1 J"),
    ],
)
def test_quantities_are_written_with_their_prefix(value, text):
    assert quantity(value, "J") == text


def test_plain_values_keep_their_unit():
    assert plain(1234.5678, "tokens/s") == "1235 tokens/s"
    assert plain(None, "W") == "–"


# ------------------------------------------------------------------ regressions
def test_peak_memory_is_the_workers_and_not_what_its_parent_had(lem, tmp_path):
    ballast = bytearray(400 * 2**20)
    lem("experiment", *SIMULATED, "-n", "1")
    assert len(ballast) == 400 * 2**20
    assert raw_record(tmp_path / "results")["memory"]["peak_bytes"] < 300 * 2**20


def test_a_results_directory_may_begin_with_a_tilde_or_look_like_a_uri(lem, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert lem("experiment", *SIMULATED, "-n", "1", "io.results_dir='~/out'").code == 0
    assert (tmp_path / "home" / "out" / "experiments").is_dir()
    assert lem("experiment", *SIMULATED, "-n", "1", "-o", "gs:/x").code == 0
    assert "completed" in lem("results", "list", "-o", "gs:/x").out


def test_preset_null_removes_the_files_preset(lem, tmp_path):
    (tmp_path / "a.yaml").write_text("preset: quick-test\n")
    shown = lem("experiment", "a.yaml", *SIMULATED, "preset=null", "--dry-run")
    assert shown.code == 0
    assert "max_output_tokens: 128" in shown.out


def test_foreign_folders_in_a_results_directory_are_left_alone(lem, tmp_path):
    lem("experiment", *SIMULATED, "-n", "1")
    (tmp_path / "results" / "raw" / "exp_of_mine").mkdir()
    assert lem("results", "list", "--all").code == 0
    assert lem("aggregate", "--all").code == 0


@pytest.mark.parametrize("content", [None, b"no journal\n"])
def test_lost_request_rows_never_overwrite_a_good_row(lem, tmp_path, content):
    lem("experiment", *SIMULATED, "-n", "2")
    (rows,) = tmp_path.glob("results/raw/*/journal_0_a1.jsonl")
    rows.unlink() if content is None else rows.write_bytes(content)
    forced = lem("aggregate", rows.parent.name, "--force")
    assert forced.code == 1
    assert "journal_0_a1.jsonl" in forced.err
    (row,) = json.loads(lem("results", "list", "--json").out)
    assert row["requests_completed"] == 2


def in_the_middle_of_cleaning_up(error):
    """Raise an error in a library while it handles another one, as omegaconf does when it is interrupted."""
    try:
        raise error
    finally:
        json.loads("{")


@pytest.mark.parametrize(
    ("stop", "said"), [(Interrupted("stopped by SIGTERM"), "stopped by"), (KeyboardInterrupt(), "")]
)
def test_an_interruption_that_surfaces_as_an_error_of_a_library_is_an_interruption(stop, said, capsys, monkeypatch):
    monkeypatch.setattr("lem.cli.base.ignore_ctrl_c", lambda: None)
    assert exit_code_of(lambda: in_the_middle_of_cleaning_up(stop)) == 130
    assert capsys.readouterr().err.strip().startswith(said)


def test_other_errors_and_errors_of_lem_itself_are_not_hidden():
    def own_bug():
        try:
            raise KeyboardInterrupt
        finally:
            one_line(None)

    with pytest.raises(json.JSONDecodeError):
        exit_code_of(lambda: in_the_middle_of_cleaning_up(ValueError()))
    with pytest.raises((TypeError, AttributeError)):
        exit_code_of(own_bug)
