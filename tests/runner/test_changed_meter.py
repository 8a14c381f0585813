"""A run that is killed and resumed with a different meter, compared with the same run without a break.

The tests use the real commands. The counters imitate the kernel's, at constant power, and the traces are replayed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lem.results.directory import ExperimentDir
from tests.energy.test_rapl import COUNTED, USUAL_RANGE_UJ, ZONES, counting
from tests.runner.test_resume import forget_end

pytestmark = pytest.mark.processes

PROMPTS = 6
# All zones that are counted: the total power of the imitation.
TREE_W = sum(
    power_w for path, (_, power_w) in ZONES.items() if path.rsplit("/", 1)[1] in {z.split()[0] for z in COUNTED}
)
RUN = (
    "experiment", "--backend", "simulated", "--model", "any", "-d", "sample", "-n", str(PROMPTS), "-y",
    "energy.idle_s=0", "warmup.prompts=0", "batching.batch_size=1", "max_output_tokens=20", "min_output_tokens=20",
    "backend.decode_s_per_token=0.01",
)  # fmt: skip
ENERGIES = ("energy_j", "energy_wh", "average_power_w", "energy_per_output_token_j", "energy_per_request_j")

DOUBTS = {"identity_violated", "times_disagree", "window_unfilled", "power_implausible", "tokens_disagree"}


def constant(file: Path, component: str, power_w: float, until_s: float = 600.0) -> None:
    file.write_text(f"t_s,power_w,component\n0,{power_w},{component}\n{until_s},{power_w},{component}\n")


def run(lem, folder: str, *options: str) -> ExperimentDir:
    done = lem(*RUN, *options, "-o", folder)
    assert done.code == 0, done.err
    (path,) = Path(folder, "raw").iterdir()
    return ExperimentDir(path)


def resume(lem, directory: ExperimentDir) -> dict:
    folder = str(directory.path.parent.parent)
    done = lem("experiment", "-y", "--resume", directory.id, "-o", folder)
    assert done.code == 0, done.err
    return row_of(folder)


def row_of(folder: str) -> dict:
    (row,) = pq.read_table(Path(folder, "experiments")).to_pylist()
    return row


def codes(row: dict) -> list[str]:
    return [warning.partition(":")[0] for warning in row["warnings"]]


def check_against_the_whole(row: dict, whole: dict) -> None:
    """The same requests are counted, and no energy is shown that does not cover all of them."""
    for name in ("requests_completed", "input_tokens", "output_tokens", "status"):
        assert row[name] == whole[name], name
    assert row["duration_s"] == pytest.approx(whole["duration_s"], rel=0.3)
    assert whole["energy_j"] is not None
    assert DOUBTS.isdisjoint([*codes(whole), *codes(row)])
    for name in ENERGIES:
        assert row[name] is None or row[name] == pytest.approx(whole[name], rel=0.3), name


@pytest.fixture
def tree(tmp_path):
    """A running imitation of the kernel's counters."""
    with counting(tmp_path / "powercap", USUAL_RANGE_UJ) as (flat, _):
        yield flat


def test_with_the_same_meter_the_energy_is_that_of_both_windows(lem, tree, tmp_path):
    options = ("energy=rapl", f"energy.powercap_dir={tree}")
    run(lem, "whole", *options)
    directory = run(lem, "results", *options)
    forget_end(directory)
    row = resume(lem, directory)
    check_against_the_whole(row, row_of("whole"))
    assert row["energy_source"] == "counter"
    assert row["energy_j"] == pytest.approx(TREE_W * row["duration_s"], rel=0.1)
    assert {"energy_partial", "energy_mixed"}.isdisjoint(codes(row))


def test_counters_that_are_gone_after_a_reboot_leave_no_number_of_the_whole(lem, tree, tmp_path):
    options = ("energy=auto", f"energy.powercap_dir={tree}")
    run(lem, "whole", *options)
    directory = run(lem, "results", *options)
    forget_end(directory)
    tree.rename(tree.with_name("gone"))
    row = resume(lem, directory)
    check_against_the_whole(row, row_of("whole"))
    assert {row[name] for name in (*ENERGIES, "cpu_energy_j", "dram_energy_j")} == {None}
    assert codes(row).count("energy_partial") == 4  # counters and estimates, for processor and memory
    (read,) = [w for w in row["warnings"] if w.startswith("energy_partial: the cpu energy (counter)")]
    first, second = (record.phase("measured") for record in directory.records())
    assert f"covers {first.duration_s:.3g} of {first.duration_s + second.duration_s:.3g} s" in read
    # The readings of each attempt stay in its record.
    assert {r.source for r in first.energy} == {"counter"}
    assert {r.source for r in second.energy if r.component == "dram"} == {"estimate"}
    assert all(r.energy_j and r.covered_s for r in (*first.energy, *second.energy))
    shown = lem("results", "show", directory.id, "-o", "results").out
    assert "not measured" in shown
    assert json.loads(lem("results", "show", directory.id, "--json", "-o", "results").out)["energy_j"] is None


@pytest.mark.parametrize(
    ("component", "until_s", "codes_expected"),
    [("cpu", 600.0, {"energy_partial"}), ("gpu", 0.1, {"energy_partial", "energy_missing"})],
    ids=["another_component", "a_trace_that_ends"],
)
def test_a_replay_that_changes_leaves_no_number_of_the_whole(lem, tmp_path, component, until_s, codes_expected):
    constant(tmp_path / "trace.csv", "gpu", 100.0)
    options = ("energy=replay", "energy.trace=trace.csv")
    run(lem, "whole", *options)
    directory = run(lem, "results", *options)
    forget_end(directory)
    constant(tmp_path / "trace.csv", component, 100.0, until_s)
    row = resume(lem, directory)
    check_against_the_whole(row, row_of("whole"))
    assert {row[name] for name in ENERGIES} == {None}
    assert codes_expected <= set(codes(row))


def test_cycles_of_different_meters_keep_their_energies_and_have_no_mean(lem, tree, tmp_path):
    options = ("energy=auto", f"energy.powercap_dir={tree}", "--cycles", "2", "-n", "3")
    run(lem, "whole", *options)
    directory = run(lem, "results", *options)
    forget_end(directory, lines=1 + 3)  # the first cycle is finished
    shutil.rmtree(tree)
    row = resume(lem, directory)
    whole = row_of("whole")
    check_against_the_whole(row, whole)
    assert whole["energy_j"] == pytest.approx(TREE_W * whole["duration_s"], rel=0.1)
    assert {row[name] for name in (*ENERGIES, "energy_sd_j", "energy_per_output_token_mean_j")} == {None}
    assert "energy_mixed" in codes(row)
    first, second = pq.read_table("results/cycles").to_pylist()
    assert (first["energy_source"], second["energy_source"]) == ("counter", "estimate")
    assert first["energy_j"] == pytest.approx(TREE_W * first["duration_s"], rel=0.1)
    assert second["energy_j"] > 0
    shown = lem("results", "show", directory.id, "-o", "results").out
    assert "≈" in next(line for line in shown.splitlines() if line.startswith("2 "))
