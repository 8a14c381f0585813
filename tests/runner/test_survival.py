"""Runs that are killed again and again: no finished prompt is lost, and none is counted twice. Takes minutes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lem.record import RequestRecord
from lem.results.directory import ExperimentDir
from lem.results.store import Store
from tests.conftest import SUMMARY, begin, kill_group

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("LEM_SURVIVAL_SEED") or time.time())
# Columns that an interruption must not change; times and the attempt naturally differ.
SAME = set(RequestRecord.__struct_fields__) - {
    "experiment_id", "attempt", "batch", "start_s", "end_s", "latency_s", "prefill_s"
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kind of experiment, how often its runs are killed, and how late after the first prompt at most."""

    name: str
    kills: int
    within_s: float
    overrides: tuple[str, ...]
    engine: tuple[str, ...] = ("--backend", "simulated", "--model", "any", "warmup.prompts=1")


TRACE = "t_s,power_w\n0,100\n100000,100\n"
REPLAY = ("energy=replay", "energy.trace=trace.csv", "energy.idle_s=0")
TINY = ("--model", "tiny", "backend.device=cpu", "--max-tokens", "24", "warmup.prompts=1")
CASES = [
    Case("one by one", 28, 0.6, ("-n", "60", "energy=none", "backend.decode_s_per_token=0.001")),
    Case("sorted batches, two cycles", 26, 0.6, (
        "-n", "60", "-c", "2", "batching.strategy=sorted_static", "batching.batch_size=4", *REPLAY,
        "backend.decode_s_per_token=0.002",
    )),
    Case("sampling, three cycles", 24, 0.6, (
        "-n", "40", "-c", "3", "batching.batch_size=4", "decoder=standard", "--force", "--seed", "7", "energy=none",
        "backend.decode_s_per_token=0.002",
    )),
    Case("budgeted batches", 10, 0.6, (
        "-n", "61", "batching.strategy=sorted_dynamic", "batching.batch_size=4", "batching.max_tokens_per_batch=200",
        "backend.decode_s_per_token=0.003", *REPLAY,
    )),
    Case("two processes", 7, 1.5, ("-n", "61", "num_processes=2", "backend.decode_s_per_token=0.003", *REPLAY)),
    Case("two processes, two cycles, batches", 5, 1.5, (
        "-n", "61", "-c", "2", "num_processes=2", "batching.batch_size=4", "batching.strategy=sorted_static",
        "energy=none", "backend.decode_s_per_token=0.005",
    )),
    Case("a model, greedy", 4, 2.0, ("-n", "60", "batching.batch_size=2", "energy=none"), TINY),
    Case("a model, sampling", 4, 2.0, (
        "-n", "60", "batching.batch_size=4", "batching.strategy=sorted_static", "decoder=creative", "--seed", "3",
        "energy=none",
    ), TINY),
]  # fmt: skip
# How many of the kills come before the first prompt has begun, at any time from the start.
EARLY = 0.3


@dataclass
class Tally:
    """The tally of the kills."""

    kills: int = 0
    experiments: int = 0
    lost: int = 0
    doubled: int = 0
    rows_at_kills: list[int] = field(default_factory=list)


def key(row: RequestRecord) -> tuple[int, int]:
    return row.cycle, row.request


def lasting(row: RequestRecord) -> dict[str, object]:
    return {name: getattr(row, name) for name in SAME}


def rows_of(directory: ExperimentDir) -> list[RequestRecord]:
    return [row for part in directory.parts() for row in part.requests]


def check_readable(lem, directory: ExperimentDir) -> list[RequestRecord]:
    """Read every file of the results directory, and list it; return the rows."""
    for file in [*directory.path.glob("*.json"), *directory.path.parent.parent.glob("unfinished/exp*")]:
        assert file.stat().st_size, file
    for file in directory.path.glob("*.json"):
        json.loads(file.read_text())
    for file in directory.path.parent.parent.rglob("[!.]*.parquet"):
        pq.read_table(file)
    listed = lem("results", "list", "--all", "--json", "-o", str(directory.path.parent.parent))
    assert listed.code == 0, listed.err
    (entry,) = json.loads(listed.out)
    assert entry["experiment_id"] == directory.id
    return rows_of(directory)


def until_killed_or_done(arguments: tuple[str, ...], cwd: Path, kill_s: tuple[str, float] | None = None) -> int | None:
    """Run a command; return its exit code, or None if it was killed before its end.

    Args:
        arguments: the arguments of `lem`.
        cwd: the working directory.
        kill_s: kill it this many seconds after the first line of stderr with this beginning or, without one, after
            its start.
    """
    process = begin(*arguments, cwd=cwd)
    beginning, delay_s = kill_s or ("", None)
    if beginning:
        assert process.stderr is not None
        next((line for line in process.stderr if line.startswith(beginning)), None)
    try:
        out, err = process.communicate(timeout=delay_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        return None
    if process.returncode:
        raise AssertionError(f"exit code {process.returncode}: {out}{err}")
    return process.returncode


def a_moment(case: Case, chance: random.Random) -> tuple[str, float]:
    """Draw the time of a kill: during start-up, or after the prompts have begun."""
    return ("", chance.uniform(0.1, 1.5)) if chance.random() < EARLY else ("Prompts ", chance.uniform(0, case.within_s))


def kill_until_complete(
    lem, case: Case, results: Path, chance: random.Random, tally: Tally, left: int
) -> Iterator[ExperimentDir]:
    """Run one experiment, killing and resuming it up to `left` times; yield it after each kill and when complete."""
    arguments = ("experiment", "-y", "-d", "sample", *case.engine, *case.overrides, "-o", str(results), "--fresh")
    directory = None
    while True:
        ended = until_killed_or_done(arguments, results.parent, a_moment(case, chance) if left > 0 else None)
        found = Store(results).ids()
        if found and (results / "raw" / found[0] / "spec.json").is_file():
            directory = ExperimentDir(results / "raw" / found[0])
            arguments = ("experiment", "-y", "--resume", directory.id, "-o", str(results))
        elif found:
            (only,) = (results / "raw").iterdir()  # killed before there was a plan: nothing can be resumed
            only.rename(results.parent / f"no-plan-{len(list(results.parent.iterdir()))}")
        if ended is None:
            tally.kills += 1
            left -= 1
        if directory is not None:
            yield directory
        if ended is not None:
            return


def expected_rows(case: Case, folder: Path) -> dict[tuple[int, int], dict[str, object]]:
    """Return the result of an uninterrupted run of the same experiment."""
    results = folder / "uninterrupted"
    arguments = ("experiment", "-y", "-d", "sample", *case.engine, *case.overrides, "-o", str(results))
    assert until_killed_or_done(arguments, folder) == 0
    (path,) = (results / "raw").iterdir()
    return {key(row): lasting(row) for row in rows_of(ExperimentDir(path))}


def check_totals(results: Path, rows: list[RequestRecord], cycles: int) -> None:
    """Compare the summary row with the sums over its requests; with several cycles, counts are means."""
    (row,) = pq.read_table(results / "experiments").to_pylist()
    assert row["status"] == "completed"
    assert row["cycles_completed"] == cycles
    for name in ("input_tokens", "output_tokens"):
        assert row[name] == round(sum(getattr(r, name) for r in rows) / cycles)
    assert row["requests_completed"] == len(rows) / cycles
    table = pq.read_table(results / "requests").to_pylist()
    assert sorted((r["cycle"], r["request"]) for r in table) == sorted(map(key, rows))
    of_cycles = pq.read_table(results / "cycles").to_pylist()
    assert sum(r["output_tokens"] for r in of_cycles) == sum(r.output_tokens for r in rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_killed_at_random_moments_nothing_is_lost_and_nothing_counted_twice(lem, tmp_path, case, record_property):
    chance = random.Random(f"{SEED}:{case.name}")
    (tmp_path / "trace.csv").write_text(TRACE)
    expected, tally = expected_rows(case, tmp_path), Tally()
    while tally.kills < case.kills:
        results = tmp_path / f"results-{tally.experiments}"
        seen: dict[tuple[int, int], RequestRecord] = {}
        for directory in kill_until_complete(lem, case, results, chance, tally, case.kills - tally.kills):
            rows = check_readable(lem, directory)
            tally.doubled += len(rows) - len(set(map(key, rows)))
            now = {key(row): row for row in rows}
            tally.lost += sum(now.get(name) != row for name, row in seen.items())
            seen = now
            tally.rows_at_kills.append(len(rows))
        tally.experiments += 1
        assert {name: lasting(row) for name, row in seen.items()} == expected
        check_totals(results, list(seen.values()), max(cycle for cycle, _ in expected))
        assert not list(results.rglob(".*-*")), "scratch files are left"
    record_property(
        SUMMARY,
        f"{case.name}: {tally.kills} kills (seed {SEED}), {tally.experiments} experiments, "
        f"{tally.lost} requests lost, {tally.doubled} counted twice; rows after each: {tally.rows_at_kills}",
    )
    assert (tally.lost, tally.doubled) == (0, 0)


def test_twenty_started_at_once_have_twenty_ids_and_twenty_rows(tmp_path):
    one = ("experiment", "-y", "--fresh", "--backend", "simulated", "--model", "any", "-d", "sample", "-n", "2")
    started = [begin(*one, "energy=none", "warmup.prompts=0", cwd=tmp_path) for _ in range(20)]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0] * 20, ended
    ids = Store(tmp_path / "results").ids()
    rows = pq.read_table(tmp_path / "results" / "experiments").to_pylist()
    assert len(ids) == len(rows) == 20
    assert {row["experiment_id"] for row in rows} == set(ids)
    assert {(row["status"], row["requests_completed"]) for row in rows} == {("completed", 2)}


def test_the_same_started_at_once_resumes_no_other_that_runs(tmp_path):
    """Without --fresh, each run finds others with its configuration that have just begun, and must leave them alone."""
    one = ("experiment", "-y", "--backend", "simulated", "--model", "any", "-d", "sample", "-n", "2")
    started = [begin(*one, "energy=none", "warmup.prompts=0", cwd=tmp_path) for _ in range(12)]
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    assert [code for _, code in ended] == [0] * 12, ended
    assert len(pq.read_table(tmp_path / "results" / "experiments")) == 12
