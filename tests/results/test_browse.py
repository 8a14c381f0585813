"""`lem aggregate` and `lem results`: their output and their exit codes."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime

import pandas as pd
import pyarrow.parquet as pq
import pytest
from msgspec import structs

from lem.record import EngineInfo, Flops, ModelInfo, Prefill
from lem.results.plan import running
from lem.results.show import NOT_MEASURED, marked
from lem.results.store import Store
from lem.results.tables import Tables
from tests.conftest import SIMULATED
from tests.records import experiment, finished, phases, put, reading, record, requests


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def cycles(store, number=3):
    """Write an experiment with several cycles."""
    directory = experiment(store, cycles=number)
    for cycle in range(1, number + 1):
        energy = (reading(energy_j=100.0 + cycle),)
        known = {"cycle": cycle, "config_sha256": directory.plan().config_sha256}
        put(directory, record(energy=energy, duration_s=4.0 + cycle / 10, **known), requests())
    return directory


def interrupted(store):
    directory = experiment(store)
    plan = directory.plan()
    put(directory, record(requests([0]), status="interrupted", config_sha256=plan.config_sha256), requests([0]))
    directory.write_state(directory.state().now("interrupted", "stopped by SIGTERM"))
    return directory


def planned(store):
    directory = experiment(store)
    (directory.path / "state.json").unlink()
    return directory


# ------------------------------------------------------------------ aggregate
def test_one_experiment_and_then_all(lem, store):
    first, second = finished(store), finished(store)
    done = lem("aggregate", first.id)
    assert (done.code, done.out) == (0, f"{first.id}: completed\n")
    assert lem("aggregate", first.id).out == f"{first.id} already has an up-to-date row.\n"
    done = lem("aggregate", "--all")
    assert done.code == 0
    assert done.out == f"{second.id}: completed\nSkipped because their rows are up to date: 1.\n"
    assert lem("aggregate", "--all").out == "Skipped because their rows are up to date: 2.\n"
    assert lem("aggregate", "--all", "--force").out == f"{first.id}: completed\n{second.id}: completed\n"


@pytest.mark.parametrize("arguments", [(), ("exp_20260102_030405", "--all"), ("exp_2099",)])
def test_bad_input_ends_with_2(lem, store, arguments):
    finished(store)
    done = lem("aggregate", *arguments)
    assert done.code == 2
    assert done.err


def test_what_is_missing_is_named_and_ends_with_1(lem, store):
    directory = interrupted(store)
    done = lem("aggregate", directory.id)
    assert done.code == 1
    assert f"{directory.id} is incomplete: 2 of 3 prompts in cycle 1 have no result" in done.err
    assert not store.experiments_table.exists() or not list(store.experiments_table.iterdir())
    assert lem("aggregate", directory.id, "--no-strict").code == 0


def test_a_corrupt_file_is_named_and_stops_nothing_else(lem, store):
    bad, good = finished(store), finished(store)
    bad.record_file(0, 1, 1).write_text("{")
    done = lem("aggregate", "--all")
    assert done.code == 1
    assert str(bad.record_file(0, 1, 1).relative_to(store.root.parent)) in done.err
    assert f"{good.id}: completed" in done.out


def test_what_runs_is_left_alone(lem, store):
    directory = finished(store)
    directory.write_state(running(1))
    before = sorted((file.name, file.stat().st_mtime_ns) for file in directory.path.iterdir())
    assert lem("aggregate", directory.id).code == 1
    done = lem("aggregate", "--all")
    assert (done.code, "is running" in done.out) == (0, True)
    assert sorted((file.name, file.stat().st_mtime_ns) for file in directory.path.iterdir()) == before


def test_mixed_backends_need_a_word(lem, store):
    directory = experiment(store, count=4, processes=2)
    plan = directory.plan()
    for rank, backend in enumerate(("simulated", "vllm")):
        rows = requests([rank, rank + 2])
        values = {"rank": rank, "world_size": 2, "backend": backend, "config_sha256": plan.config_sha256}
        put(directory, record(rows, **values), rows)
    done = lem("aggregate", directory.id)
    assert (done.code, "simulated and vllm" in done.err) == (1, True)
    assert lem("aggregate", directory.id, "--allow-mixed-backends").code == 0
    assert list(pd.read_parquet(store.experiments_table)["backend"]) == ["simulated+vllm"]


def test_in_an_empty_directory_there_is_nothing(lem):
    assert lem("aggregate", "--all").out == "No experiments in results.\n"
    assert lem("results", "list").out == "No experiments in results.\n"


# ------------------------------------------------------------------ list
@pytest.fixture
def listed(lem, store):
    """Experiments that differ in everything that can be filtered, with their rows."""
    for i, (model, energy_j) in enumerate((("org/a", 300.0), ("org/b", None), ("other/a", 100.0))):
        directory = experiment(store, datetime(2026, 1, 2 + i, 3, 4, 5))
        plan = directory.plan()
        plan = replace(plan, experiment=replace(plan.experiment, model=model))
        directory.write_plan(plan, ["a"] * 3)
        it = record(energy=(reading(energy_j=energy_j, reason="lost"),), config_sha256=plan.config_sha256)
        put(directory, it, requests())
    assert lem("aggregate", "--all").code == 0
    return lambda *arguments: [row["model"] for row in json.loads(lem("results", "list", "--json", *arguments).out)]


@pytest.mark.parametrize(
    ("arguments", "models"),
    [
        ((), ["org/a", "org/b", "other/a"]),
        (("--reverse",), ["other/a", "org/b", "org/a"]),
        (("--model", "ORG/"), ["org/a", "org/b"]),
        (("--model", "org/", "--last", "1"), ["org/b"]),
        (("--last", "9"), ["org/a", "org/b", "other/a"]),
        (("--backend", "vllm"), []),
        (("--dataset", "d", "--status", "completed"), ["org/a", "org/b", "other/a"]),
        (("--status", "failed"), []),
        (("--since", "2026-01-03"), ["org/b", "other/a"]),
        (("--since", "2026-01-03T03:04:06"), ["other/a"]),
        (("--sort", "energy_j"), ["other/a", "org/a", "org/b"]),
        (("--sort", "energy_j", "--reverse"), ["org/a", "other/a", "org/b"]),
        (("--sort", "model", "--last", "2"), ["org/b", "other/a"]),
    ],
)
def test_filters_and_order(listed, arguments, models):
    assert listed(*arguments) == models


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--status", "complete"), "Did you mean 'completed'?"),
        (("--sort", "energyj"), "Did you mean 'energy_j'"),
        (("--since", "yesterday"), "use a form such as 2026-01-31"),
        (("--last", "0"), "--last"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(lem, store, arguments, hint):
    done = lem("results", "list", *arguments)
    assert done.code == 2
    assert hint in done.err


def test_the_list_has_numbers_with_intervals(lem, store):
    directory = cycles(store)
    lem("aggregate", "--all")
    out = lem("results", "list").out
    (line,) = [line for line in out.splitlines() if line.startswith(directory.id)]
    assert "102 J ±2.4%" in line  # 101, 102, 103: t(0.975, 2) / sqrt(3) = 2.48
    assert "3/3" in line
    assert "± is half the width of the 95% interval" in out


def test_without_a_row_only_with_all(lem, store):
    has_row = finished(store)
    lem("aggregate", "--all")
    waiting, broken, working = planned(store), interrupted(store), finished(store)
    working.write_state(running(1))
    assert [row["experiment_id"] for row in json.loads(lem("results", "list", "--json").out)] == [has_row.id]
    rows = {row["experiment_id"]: row for row in json.loads(lem("results", "list", "--all", "--json").out)}
    assert [row["status"] for row in rows.values()] == ["completed", "planned", "interrupted", "running"]
    assert rows[broken.id]["error"] == "stopped by SIGTERM"
    out = lem("results", "list", "--all").out
    assert f"{working.id}: is running as process {os.getpid()} on" in out
    assert [waiting.id] == [
        row["experiment_id"] for row in json.loads(lem("results", "list", "--status", "planned", "--json").out)
    ]


def test_what_was_resumed_since_its_row_was_written_is_running(lem, store):
    directory = interrupted(store)
    lem("aggregate", "--all", "--no-strict")
    directory.write_state(running(2))
    (row,) = json.loads(lem("results", "list", "--json").out)
    assert row["status"] == "running"


def test_a_damaged_table_is_named_and_hides_nothing_else(lem, store):
    first, second = finished(store), finished(store)
    for directory in (first, second):
        lem("aggregate", directory.id)
    (store.experiments_table / f"{first.id}.parquet").write_bytes(b"PAR1")
    done = lem("results", "list")
    assert done.code == 1
    assert second.id in done.out
    assert f"lem aggregate {first.id} --force" in done.err
    assert lem("results", "show", first.id).code == 2
    assert lem("aggregate", first.id, "--force").code == 0
    assert lem("results", "list").code == 0


def at_80_columns(store, *arguments):
    """Return a command's output on a terminal of a given width."""
    main, end = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "lem", "results", *arguments, "-o", str(store.root)]
    process = subprocess.Popen(command, stdout=end, env=env)
    os.close(end)
    text = b""
    with os.fdopen(main, "rb", buffering=0) as terminal:
        try:
            while chunk := terminal.read(4096):
                text += chunk
        except OSError:  # the other end of the terminal is closed
            pass
    process.wait()
    return text.decode().replace("\r\n", "\n")


def test_eighty_columns_are_enough_and_no_id_is_cut(lem, store):
    directories = [cycles(store) for _ in range(11)]
    lem("aggregate", "--all")
    for arguments in (("list",), ("show", directories[-1].id)):
        text = at_80_columns(store, *arguments)
        assert max(map(len, text.splitlines())) <= 80
    lines = at_80_columns(store, "list").splitlines()
    for directory in directories:
        assert any(line.split()[0] == directory.id and "102 J" in line for line in lines if line)


# ------------------------------------------------------------------ show
def test_cycles_are_shown_with_their_spread(lem, store):
    directory = cycles(store)
    lem("aggregate", "--all")
    lines = [line.split() for line in lem("results", "show", directory.id[:-1]).out.splitlines() if line]
    shown = {line[0]: line for line in lines}
    assert shown["cycle"][:4] == ["cycle", "status", "duration", "tokens/s"]
    assert [shown[str(n)][1] for n in (1, 2, 3)] == ["completed"] * 3
    assert shown["mean"][1:3] == ["4.2", "s"]
    assert shown["CV"][-2:] == ["0.98%", "0.98%"]
    assert {"sd", "95%"} <= shown.keys()


def test_one_cycle_has_no_table(lem, store):
    directory = finished(store)
    lem("aggregate", "--all")
    out = lem("results", "show", directory.id).out
    assert "cycle  status" not in out
    assert "100 J" in out


@pytest.mark.parametrize(
    ("flops_per_s", "shown"), [(3.46e11, "0.035%"), (9.894e12, "1%"), (4.1e14, "41%"), (9.894e14, "100%")]
)
def test_a_small_utilisation_is_not_shown_as_none(lem, store, flops_per_s, shown):
    model = ModelInfo("m", None, "A", 1, False, 1, "bfloat16")
    engine = EngineInfo("pytorch", "1", "cuda:0", "NVIDIA H100 80GB HBM3", {})
    directory = finished(store, model=model, engine=engine, flops=Flops(4.0 * flops_per_s, "m"))
    lem("aggregate", "--all")
    assert f" {shown} of the datasheet's peak" in lem("results", "show", directory.id).out


def test_prefill_that_is_not_told_apart_is_null_wherever_it_is_looked_at(lem, store):
    reason = "other requests were decoding"
    directory = finished(store, prefill=Prefill(None, reason=reason))
    lem("aggregate", "--all")
    assert f"not separable: {reason}" in lem("results", "show", directory.id).out
    row = json.loads(lem("results", "show", directory.id, "--json").out)
    (stored,) = pd.read_parquet(directory.path.parents[1] / "experiments").to_dict("records")
    for name in ("prefill_duration_s", "prefill_energy_j", "decode_duration_s", "decode_energy_j"):
        assert row[name] is None
        assert pd.isna(stored[name])
    assert row["prefill_reason"] == stored["prefill_reason"] == reason


def test_an_interrupted_experiment_says_how_to_go_on(lem, store):
    directory = interrupted(store)
    for made_row in (False, True):
        out = lem("results", "show", directory.id).out
        assert f"{directory.id}: interrupted after 1 attempt." in out
        assert f"To continue: lem experiment --resume {directory.id}" in out
        if not made_row:
            lem("aggregate", directory.id, "--no-strict")


def test_what_has_not_run_shows_where_it_stands(lem, store):
    done = lem("results", "show", planned(store).id)
    assert (done.code, ": planned, not yet run" in done.out) == (0, True)


def test_what_runs_is_shown_as_far_as_it_is(lem, store):
    directory = experiment(store)
    put(directory, record(config_sha256=directory.plan().config_sha256), requests([0, 1]))
    directory.record_file(0, 1, 1).unlink()
    directory.write_state(running(1))
    out = lem("results", "show", directory.id).out
    assert f"{directory.id}  running" in out
    assert "2 of 3 from d" in out
    assert "killed" not in out


def test_an_old_row_is_not_shown(lem, store):
    directory = interrupted(store)
    lem("aggregate", directory.id, "--no-strict")
    rows = requests([1, 2], attempt=2)
    put(directory, record(rows, attempt=2, config_sha256=directory.plan().config_sha256), rows)
    directory.write_state(structs.replace(directory.state(), status="completed", attempt=2))
    out = lem("results", "show", directory.id).out
    assert f"{directory.id}  completed" in out
    assert "resumed: the run was interrupted and resumed 1 time" in out


def test_raw_records_of_each_process_cycle_and_attempt(lem, store):
    directory = cycles(store, 2)
    out = lem("results", "show", directory.id, "--raw").out
    for cycle in (1, 2):
        assert f"process 0 of 1, cycle {cycle}, attempt 1, on h: completed, 3 requests" in out
    records = json.loads(lem("results", "show", directory.id, "--raw", "--json").out)
    assert [(each["rank"], each["cycle"], each["attempt"]) for each in records] == [(0, 1, 1), (0, 2, 1)]


def test_json_has_the_row_the_cycles_the_state_and_the_environment(lem, store):
    directory = cycles(store)
    lem("aggregate", "--all")
    shown = json.loads(lem("results", "show", directory.id, "--json").out)
    assert shown["energy_j"] == 102.0
    assert [cycle["energy_j"] for cycle in shown["cycles"]] == [101.0, 102.0, 103.0]
    assert shown["state"]["status"] == "aggregated"
    assert shown["environment"] is None
    assert shown["config"]["model"] == "m"


def test_rows_outlive_their_raw_files(lem, store):
    directory = cycles(store)
    lem("aggregate", "--all")
    shutil.rmtree(directory.path)
    assert lem("results", "show", directory.id[:-2]).code == 0
    assert directory.id in lem("results", "list").out
    assert lem("results", "show", "exp_2031").code == 2


def test_the_environment_of_a_real_run(lem):
    assert lem("experiment", *SIMULATED, "-n", "2").code == 0
    (row,) = json.loads(lem("results", "list", "--json").out)
    out = lem("results", "show", row["experiment_id"], "--environment").out
    assert "Processor" in out
    assert "python 3." in out


def test_an_experiment_without_an_environment_says_so(lem, store):
    directory = experiment(store)
    rows = requests([0])
    broken = record(rows, phases=phases()[:1], requests_completed=0, input_tokens=0, output_tokens=0)
    directory.write_record(structs.replace(broken, experiment_id=directory.id))
    assert lem("results", "show", directory.id, "--environment").code == 2


# ------------------------------------------------------------------ energy that is incomplete or not measured
CPU = reading("cpu", "counter", 20.0, "package-0", "package")
ESTIMATES = (
    reading("cpu", "estimate", 300.0, "cpu", "machine"),
    reading("dram", "estimate", 5.0, "dram", "machine"),
)
ON_GPU = EngineInfo("pytorch", "1", "cuda:0", "NVIDIA H100 80GB HBM3", {})


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def metered(store, *energies, engine=None):
    """Write an experiment with one cycle for each of these readings."""
    directory = experiment(store, cycles=len(energies))
    for cycle, energy in enumerate(energies, start=1):
        known = {"cycle": cycle, "config_sha256": directory.plan().config_sha256, "engine": engine}
        put(directory, record(energy=energy, duration_s=4.0 + cycle / 10, **known), requests())
    return directory


def test_the_headline_says_that_the_gpu_is_not_in_it(lem, store):
    directory = metered(store, ESTIMATES, engine=ON_GPU)
    assert lem("aggregate", directory.id).code == 0
    shown = lem("results", "show", directory.id).out
    assert "≈305 J" in line_of(shown, "Energy ")
    assert "(cpu+dram, estimate, machine, without the GPU)" in line_of(shown, "Energy ")
    listed = lem("results", "list")
    assert f"the GPU that ran the model is missing from the energy of {directory.id}" in listed.out
    assert json.loads(lem("results", "show", directory.id, "--json").out)["energy_without_gpu"] is True


def test_a_headline_with_the_gpu_says_nothing_of_it(lem, store):
    directory = metered(store, (reading(), CPU), engine=ON_GPU)
    assert lem("aggregate", directory.id).code == 0
    for command in (("results", "show", directory.id), ("results", "list")):
        assert "without the GPU" not in lem(*command).out
    assert json.loads(lem("results", "show", directory.id, "--json").out)["energy_without_gpu"] is False


def test_cycles_that_were_measured_and_estimated_have_no_mean_anywhere(lem, store):
    directory = metered(store, (CPU,), ESTIMATES)
    assert lem("aggregate", directory.id).code == 0
    shown = lem("results", "show", directory.id).out
    assert line_of(shown, "Energy ").split() == ["Energy", "not", "measured"]
    assert "energy_mixed" in shown
    of_cycles = [line.split() for line in shown.splitlines() if line.startswith(("1 ", "2 ", "mean", "sd"))]
    assert [any("≈" in cell for cell in cells) for cells in of_cycles] == [False, True, False, False]
    row = json.loads(lem("results", "show", directory.id, "--json").out)
    names = (
        "energy_j",
        "energy_per_output_token_j",
        "average_power_w",
        "energy_sd_j",
        "energy_per_output_token_mean_j",
    )
    (in_table,) = pd.read_parquet(store.experiments_table).to_dict("records")
    assert [row[name] for name in names] == [None] * len(names)
    assert all(pd.isna(in_table[name]) for name in names)
    assert NOT_MEASURED in lem("results", "list").out


def test_an_old_mean_that_mixes_both_is_marked_as_an_estimate(lem, store):
    """Version 0.1.0 averaged measured and estimated cycles, and labelled the mean counter+estimate."""
    directory = metered(store, (CPU,))
    assert lem("aggregate", directory.id).code == 0
    tables = Tables(store)
    row = tables.row(directory.id, tables.location(directory.id))
    assert marked(structs.replace(row, energy_source="counter+estimate"), "20 J") == "≈20 J"
    assert marked(structs.replace(row, energy_source="counter+integral"), "20 J") == "20 J"


def test_a_window_that_is_metered_in_part_has_its_seconds_in_the_record_and_no_number_in_the_row(lem, store):
    directory = metered(store, (structs.replace(CPU, covered_s=2.5),))
    assert lem("aggregate", directory.id).code == 0
    shown = lem("results", "show", directory.id).out
    assert line_of(shown, "Energy ").split() == ["Energy", "not", "measured"]
    assert "energy_partial: the cpu energy (counter) covers 2.5 of 4.1 s, so it is null." in shown
    raw = lem("results", "show", directory.id, "--raw").out
    assert "20 J" in raw
    assert "covers 2.5 s" in raw
    row = json.loads(lem("results", "show", directory.id, "--json").out)
    assert row["energy_j"] is row["cpu_energy_j"] is row["energy_per_output_token_j"] is None


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no table"])
@pytest.mark.parametrize("folder", ["experiments", "cycles", "requests"])
def test_strange_file_in_a_table_is_named_and_in_nobodys_way(lem, store, folder, content):
    directory = finished(store)
    strange = store.root / folder / "of-the-user.parquet"
    strange.parent.mkdir(parents=True)
    strange.write_bytes(content)
    assert lem("aggregate", directory.id).code == 0
    assert lem("aggregate", "--all").code == 0
    listed = lem("results", "list")
    assert listed.code == 0
    assert directory.id in listed.out
    assert f"{strange.name} is not part of this table" in listed.err.replace("\n", " ")
    assert lem("results", "show", directory.id).code == 0
    assert strange.read_bytes() == content


def test_table_without_rows_is_rebuilt(lem, store):
    directory = finished(store)
    lem("aggregate", directory.id)
    file = store.experiments_table / f"{directory.id}.parquet"
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    listed = lem("results", "list")
    assert listed.code == 1
    assert "is empty; run lem aggregate" in listed.err
    assert lem("aggregate", directory.id, "--force").code == 0
    assert directory.id in lem("results", "list").out
