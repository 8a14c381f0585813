"""Compares the cost of `lem aggregate --all` with that of the fastest plain conversion of the same records.

Run with `python -m bench.aggregation`; it takes minutes. The benchmark writes experiments just as lem does, using lem's
own types: spec.json, state.json, a journal, and a record for each cycle. The plain conversion reads the same process
records and the request rows in the journals, concatenates them, and lets pyarrow turn them into Parquet. It reads no
plan or state, and computes no columns. Each step runs in its own process; the kernel reports its CPU time, including
start-up, and its peak memory. The benchmark prints a table, and fails if a limit is exceeded.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from bench.usage import is_within, parser, variables, write_json
from lem import __version__
from lem.record import (
    FORMAT_VERSION,
    Carbon,
    CpuLoad,
    DeviceState,
    EnergyReading,
    EngineInfo,
    Environment,
    ErrorInfo,
    Flops,
    Memory,
    ModelInfo,
    Phase,
    Prefill,
    ProcessRecord,
    RequestRecord,
    WarmupInfo,
)
from lem.results.codec import config_sha256, to_json
from lem.results.directory import ExperimentDir
from lem.results.journal import DIED, Checkpoint, Journal
from lem.results.plan import Plan, PromptsInfo, State
from lem.spec.experiment import Dataset, Energy, Experiment
from lem.warning_codes import of_record
from lem.workload.flops import METHOD

FEW, MANY = 5_000, 20_000
REPEATS = 5
CYCLES = 10
# Few requests, because the files that are read once per experiment then take a larger share of the time.
REQUESTS = 5
# The steps of lem. The limits apply with MANY records.
AGGREGATE, AGAIN, LIST = "lem aggregate --all", "the same, nothing new", "lem results list"
FACTOR_LIMIT = 2.0
LIMITS: dict[str, dict[str, float]] = {
    AGGREGATE: {"limit_memory_mb": 400},
    AGAIN: {"limit_cpu_s": 2.0},
    LIST: {"limit_cpu_s": 2.0},
}
# With MANY records, the CPU time per record, without start-up, may be at most this many times that with FEW records.
LINEAR_LIMIT = 1.25
GPU = "GPU-5a8e1c6e-8f37-4a55-9d0b-0c3d4e5f6a7b"
# With larger blocks and without threads, the conversion takes a third less CPU time than with pyarrow's defaults.
PLAIN = """
import os, sys
import pyarrow as pa, pyarrow.json as pj, pyarrow.parquet as pq
def content(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)
def convert(lines, target):
    how = {
        "read_options": pj.ReadOptions(block_size=1 << 24, use_threads=False),
        "parse_options": pj.ParseOptions(newlines_in_values=True),
    }
    pq.write_table(pj.read_json(pa.BufferReader(b"\\n".join(lines)), **how), target, compression="zstd")
raw = sys.argv[1] + "/raw"
names = [f"{directory}/{name}" for directory in os.listdir(raw) for name in os.listdir(f"{raw}/{directory}")]
convert([content(f"{raw}/{name}") for name in names if "/process_" in name], sys.argv[2])
if sys.argv[3:] == ["requests"]:
    journals = (content(f"{raw}/{name}") for name in names if "/journal_" in name)
    lines = [line for journal in journals for line in journal.split(b"\\n")]
    convert([line for line in lines if line.startswith(b'{"done"')], sys.argv[2])
"""
LEM = [sys.executable, "-m", "lem"]


# ------------------------------------------------------------------ experiments
def write_experiments(root: Path, count: int, cycles: int) -> None:
    """Write completed single-process experiments that have no rows yet into a results directory."""
    chance = random.Random(count)
    began = datetime(2026, 1, 2, 3, 4, 5).astimezone()
    for i in range(count):
        at = began + timedelta(seconds=7 * i)
        directory = ExperimentDir(root / "raw" / f"exp_{at:%Y%m%d_%H%M%S}")
        directory.path.mkdir(parents=True)
        plan = _plan(directory.id, at, i, cycles)
        (directory.path / "spec.json").write_text(to_json(plan))
        (directory.path / "state.json").write_text(to_json(State("completed", 1, at.isoformat(timespec="seconds"))))
        for cycle in range(1, cycles + 1):
            record, rows = _measured(plan, chance, cycle)
            directory.record_file(0, cycle, 1).write_text(to_json(record))
            _write_journal(directory, record, rows)


def _plan(experiment_id: str, at: datetime, i: int, cycles: int) -> Plan:
    experiment = Experiment(
        model=f"org/model-{i % 50}",
        dataset=Dataset(
            name="alpaca", path="tatsu-lab/alpaca", split="train", column="instruction", sample_size=REQUESTS
        ),
        seed=i,
        cycles=cycles,
        energy=Energy(name="nvml", country_iso_code="DEU"),
    )
    prompts = PromptsInfo(REQUESTS, f"{i:064x}", "tatsu-lab/alpaca", "train", "instruction", 52002, 0)
    return Plan(
        experiment_id,
        at.isoformat(timespec="seconds"),
        experiment,
        prompts,
        config_sha256(experiment),
        overrides=(f"seed={i}", "energy=nvml", "dataset=alpaca", f"dataset.sample_size={REQUESTS}"),
    )


def _measured(plan: Plan, chance: random.Random, cycle: int) -> tuple[ProcessRecord, list[RequestRecord]]:
    rows: list[RequestRecord] = []
    now_s = 0.0
    for i in range(REQUESTS):
        latency_s = chance.uniform(1.0, 3.0)
        rows.append(
            RequestRecord(
                experiment_id=plan.experiment_id, rank=0, cycle=cycle, attempt=1, request=i, batch=i,
                input_tokens=chance.randint(10, 300), output_tokens=chance.randint(20, 128), input_truncated=False,
                finish_reason="stop", start_s=now_s, end_s=now_s + latency_s, latency_s=latency_s,
                prefill_s=latency_s / 20,
            )
        )  # fmt: skip
        now_s += latency_s + 0.001
    power_w = chance.uniform(200, 400)
    record = ProcessRecord(
        format_version=FORMAT_VERSION,
        lem_version=__version__,
        experiment_id=plan.experiment_id,
        rank=0,
        world_size=1,
        status="completed",
        started_at=plan.created_at,
        hostname="node-17",
        cycle=cycle,
        config_sha256=plan.config_sha256,
        backend="pytorch",
        window_opened_unix_s=datetime.fromisoformat(plan.created_at).timestamp(),
        model=ModelInfo(
            plan.experiment.model or "", "main", "LlamaForCausalLM", 1_235_814_400, False, 2_471_645_608, "bfloat16"
        ),
        engine=EngineInfo(
            "pytorch", "5.23.0", "cuda:0", "NVIDIA H100 80GB HBM3",
            {"attn_implementation": "sdpa", "torch_dtype": "bfloat16", "device_map": "cuda:0", "compile": "False"},
        ),
        phases=(
            _phase("idle_before", 3.0, 70.0),
            _phase("load", chance.uniform(5, 20), 100.0),
            _phase("idle_loaded", 3.0, 90.0),
            _phase("warmup", chance.uniform(1, 5), power_w),
            _phase("measured", now_s, power_w),
        ),
        requests_planned=REQUESTS,
        requests_completed=REQUESTS,
        input_tokens=sum(row.input_tokens for row in rows),
        output_tokens=sum(row.output_tokens for row in rows),
        memory=Memory(2**33, "GPU, by the engine", 2**24),
        flops=Flops(chance.uniform(1e12, 2e12), METHOD),
        carbon=Carbon(363.0, "DEU, average of 2024"),
        prefill=Prefill(now_s / 20, now_s / 20 * power_w, 3.0),
        warmup=WarmupInfo(10, "converged", 0.04),
        cpu_load=CpuLoad(1.1, 1.0),
        environment=_environment(chance),
    )  # fmt: skip
    return replace(record, warnings=tuple(of_record(record, rows))), rows


def _phase(name: str, duration_s: float, power_w: float) -> Phase:
    energy_j = duration_s * power_w
    gpu = EnergyReading(
        "gpu", "counter", "device", GPU, energy_j, "NVML total energy counter", 0.001, 0.1, energy_j * 1.004
    )
    return Phase(name, duration_s, (gpu,))  # type: ignore[arg-type]


def _environment(chance: random.Random) -> Environment:
    before, after = (
        DeviceState(GPU, 1980, 2619, 1980, chance.randint(40, 55), 700.0, 700.0, True, True, False, (), ())
        for _ in range(2)
    )
    versions = ("python", "torch", "transformers", "tokenizers", "accelerate", "peft", "codecarbon", "numpy", "vllm")
    return Environment(
        hostname="node-17",
        os="Linux-5.15.0-1044-x86_64-with-glibc2.35",
        cpu_model="AMD EPYC 9354 32-Core Processor",
        cpu_threads=64,
        memory_bytes=2**38,
        gpus=(f"NVIDIA H100 80GB HBM3 ({GPU})",),
        versions=dict.fromkeys(versions, "1.23.4"),
        cpu_governor="performance",
        driver_version="570.124.06",
        cuda_version="12.8",
        git_commit="0123456789abcdef0123456789abcdef01234567",
        git_dirty=False,
        slurm={"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-17"},
        devices_before=(before,),
        devices_after=(after,),
    )


def _write_journal(directory: ExperimentDir, record: ProcessRecord, rows: list[RequestRecord]) -> None:
    killed = ErrorInfo(DIED, "The worker was killed before it could write its record.", "measured")
    opening = replace(
        record, status="interrupted", error=killed, phases=record.phases[:-1], requests_completed=0, input_tokens=0,
        output_tokens=0, flops=None, prefill=None, cpu_load=None, warnings=(),
    )  # fmt: skip
    journal = Journal(directory.journal_file(0, 1))
    journal.open_window(opening)
    for i, row in enumerate(rows, start=1):
        flops = Flops(i * 1e12, METHOD)
        journal.add([row], Checkpoint(row.end_s, flops, record.phases[-1].energy, row.end_s))
    journal.close()


# ------------------------------------------------------------------ measuring
@dataclass(frozen=True)
class Cost:
    """The CPU time and peak memory of a process."""

    cpu_s: float
    memory_mb: float


def cost(arguments: Sequence[str]) -> Cost:
    """Run a command to its end; return its cost according to the kernel."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env=variables())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


@dataclass(frozen=True)
class Costs:
    """The costs of converting, aggregating and listing a number of records."""

    records: int
    plain: Cost
    plain_with_requests: Cost
    first: Cost
    again: Cost
    listed: Cost

    @property
    def factor(self) -> float:
        """CPU time of aggregating, divided by that of the plain conversion of process records and requests."""
        return self.first.cpu_s / self.plain_with_requests.cpu_s

    @property
    def factor_of_process_records(self) -> float:
        """CPU time of aggregating, divided by that of the plain conversion of process records alone."""
        return self.first.cpu_s / self.plain.cpu_s


def measure(records: int, cycles: int) -> Costs:
    """Write experiments and measure the cost of each step."""
    with tempfile.TemporaryDirectory(prefix="lem-bench-") as folder:
        results = f"{folder}/results"
        write_experiments(Path(results), records // cycles, cycles)
        plain = [sys.executable, "-c", PLAIN, results, f"{folder}/plain.parquet"]
        for file in Path(results).rglob("*.json*"):
            file.read_bytes()  # fills the disk cache for all steps
        cost(plain)
        everything = [*LEM, "aggregate", "--all", "-o", results]
        listing = [*LEM, "results", "list", "-o", results]
        steps = (plain, [*plain, "requests"], everything, everything, listing)
        return Costs(records, *map(cost, steps))


def _start_up() -> Cost:
    """Return the cost of aggregating a single record, which is almost entirely the cost of start-up."""
    with tempfile.TemporaryDirectory(prefix="lem-bench-") as folder:
        write_experiments(Path(folder), 1, 1)
        return cost([*LEM, "aggregate", "--all", "-o", folder])


# ------------------------------------------------------------------ reporting
def compare(cycles: int) -> dict[str, Any]:
    """Measure FEW and MANY records, with a number of cycles in each experiment; return the figures of both."""
    # FEW records take little longer than start-up, so a single measurement of each would be too noisy.
    fews, many = [measure(FEW, cycles) for _ in range(REPEATS)], measure(MANY, cycles)
    start_up_s = statistics.median(_start_up().cpu_s for _ in range(REPEATS))
    few_s = statistics.median(few.first.cpu_s for few in fews)
    return {
        "cycles": cycles,
        "few": figures(fews[0], cycles),
        "many": figures(many, cycles),
        "growth": (many.first.cpu_s - start_up_s) / (few_s - start_up_s) / (MANY / FEW),
        "limit_growth": LINEAR_LIMIT,
    }


def figures(costs: Costs, cycles: int) -> dict[str, Any]:
    """Return the costs of all steps, and the factors, with the limits that apply."""
    parts = {"plain, process records": costs.plain, "plain, requests too": costs.plain_with_requests}
    parts |= {AGGREGATE: costs.first, AGAIN: costs.again, LIST: costs.listed}
    has_limits = costs.records == MANY
    return {
        "records": costs.records,
        "steps": {
            what: asdict(part)
            | {"cpu_us_per_record": part.cpu_s / costs.records * 1e6}
            | (LIMITS.get(what, {}) if has_limits else {})
            for what, part in parts.items()
        },
        "factor": costs.factor,
        "limit_factor": FACTOR_LIMIT if has_limits else None,
        "factor_of_process_records": costs.factor_of_process_records,
        # With one record per experiment, the plan, state and directory take as long as the record, so no limit applies.
        "limit_factor_of_process_records": FACTOR_LIMIT if has_limits and cycles > 1 else None,
    }


def report(found: Mapping[str, Any]) -> None:
    """Print the figures of FEW and MANY records."""
    cycles = found["cycles"]
    for each in (found["few"], found["many"]):
        print(f"{each['records']} records, {'one' if cycles == 1 else f'{cycles} cycles'} in each experiment")
        for what, part in each["steps"].items():
            times = f"{part['cpu_s']:7.2f} s CPU {part['cpu_us_per_record']:8.1f} µs a record"
            print(f"  {what:<22} {times} {part['memory_mb']:6.0f} MB")
        without = each["factor_of_process_records"]
        print(f"  factor {each['factor']:.2f} (limit: {FACTOR_LIMIT:g}); to the process records alone {without:.2f}")
    print(f"  from {FEW} to {MANY} records: {found['growth']:.2f} times the cost of a record")


def is_good(found: Mapping[str, Any]) -> bool:
    """Return whether MANY records are within all limits."""
    return all(map(is_within, (found, found["many"], *found["many"]["steps"].values())))


def main() -> int:
    """Measure and print all costs; return 1 if a limit is exceeded."""
    options = parser(__doc__).parse_args()
    found = []
    for cycles in (1, CYCLES):
        found.append(compare(cycles))
        report(found[-1])
    write_json(options.json, found)
    return int(not all(map(is_good, found)))


if __name__ == "__main__":
    sys.exit(main())
