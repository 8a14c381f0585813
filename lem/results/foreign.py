"""Exports in the formats of other projects, with a row for each experiment.

- `aienergyscore`: `master_results.csv` of AI Energy Score; see `results_aggregator.py` in
  github.com/huggingface/AIEnergyScore.
- `mlenergy`: `runs/llm.parquet` of ML.ENERGY's benchmark; see `mlenergy_data/records/runs.py` in
  github.com/ml-energy/data.

Numbers can be compared with another project's only if that project's protocol was followed. No run of `lem` follows
either protocol entirely: AI Energy Score counts the preprocessing of the prompts, which `lem` does outside its window,
and ML.ENERGY's benchmark draws its requests with its own code. Each row therefore has additional columns, with names
that begin with `lem_`; two of them state that the row is not comparable, and why. A value that `lem` does not have is
null.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import IO, Any

from lem.quantities import J_PER_WH
from lem.results.codec import from_json
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed, process_counts

SHAPES = ("aienergyscore", "mlenergy")
LABEL = (
    "not comparable with the other project's results, because that project's protocol was not followed entirely. The "
    "column lem_not_comparable_because lists the deviations."
)
# The sources of energy that was measured in this run.
MEASURED = ("counter", "integral")

Row = Mapping[str, Any]


class CsvWriter:
    """Writes rows in the format of AI Energy Score's CSV file."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self._write(lambda writer: writer.writeheader())

    def write(self, rows: Any) -> None:
        """Convert some rows of the experiments table, and write them to the file."""
        made = [ai_energy_score(row) for row in rows.to_pylist()]
        self._write(lambda writer: writer.writerows(made))

    def _write(self, some: Callable[[csv.DictWriter[str]], object]) -> None:
        text = io.StringIO()
        some(csv.DictWriter(text, AI_ENERGY_SCORE_COLUMNS))
        self._sink.write(text.getvalue().encode())

    def close(self) -> None:
        """Do nothing: a CSV file needs no ending."""


class ParquetWriter:
    """Writes rows in the format of ML.ENERGY's Parquet file."""

    def __init__(self, sink: IO[bytes]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
        self._schema = pa.schema([pa.field(name, kinds[kind]) for name, kind in ML_ENERGY_COLUMNS.items()])
        self._writer = pq.ParquetWriter(sink, self._schema, compression="zstd")

    def write(self, rows: Any) -> None:
        """Convert some rows of the experiments table, and write them to the file."""
        import pyarrow as pa

        made = [_with_fractions(ml_energy(row)) for row in rows.to_pylist()]
        self._writer.write_table(pa.Table.from_pylist(made, self._schema))

    def close(self) -> None:
        """Write the end of the file."""
        self._writer.close()


def _with_fractions(row: Row) -> dict[str, Any]:
    """Return a row with floats in all float columns, because Arrow refuses to convert integers above 2**53."""
    return {
        name: float(value) if value is not None and ML_ENERGY_COLUMNS[name] == "float" else value
        for name, value in row.items()
    }


def writer(shape: str, sink: IO[bytes]) -> CsvWriter | ParquetWriter:
    """Return the writer for a format, given its name."""
    makers: dict[str, Callable[[IO[bytes]], CsvWriter | ParquetWriter]] = {
        "aienergyscore": CsvWriter,
        "mlenergy": ParquetWriter,
    }
    return makers[shape](sink)


def _labels(row: Row, reasons: list[str]) -> dict[str, Any]:
    return {
        "lem_experiment_id": row["experiment_id"],
        "lem_status": row["status"],
        "lem_energy_source": row["energy_source"],
        "lem_comparable": False,
        "lem_not_comparable_because": "; ".join(reasons),
    }


def _ratio(value: float | None, by: float | None, factor: float = 1.0) -> float | None:
    """Return a quotient times `factor`; None if either value is unknown or the divisor is 0."""
    return None if value is None or not by else value / by * factor


# ------------------------------------------------------------------ AI Energy Score
PROMPTS = "AIEnergyScore/text_generation"
# The organization's earlier name on the hub, which the project's own configuration still uses.
PROMPTS_BEFORE = "EnergyStarAI/text_generation"


def ai_energy_score(row: Row) -> dict[str, Any]:
    """Return an experiment as a row of `master_results.csv`; the energy covers only the GPUs."""
    gpu_wh = None if row["gpu_energy_j"] is None else row["gpu_energy_j"] / J_PER_WH
    tokens = row["input_tokens"] + row["output_tokens"]
    # As in the tables, a run that did not complete has counts and energy, but no ratios of them.
    completed = row["requests_completed"] if row["status"] == "completed" else None
    values = {
        "model_name": row["model"],
        "model_class": None,
        "task": "text_gen",
        "reasoning_state": None,
        "total_prompts": row["requests_planned"],
        "successful_prompts": row["requests_completed"],
        "failed_prompts": row["requests_failed"],
        "total_duration_seconds": row["duration_s"],
        "avg_total_time": row["latency_mean_s"],
        "avg_time_to_first_token": row["ttft_mean_s"],
        "total_tokens": tokens,
        "total_prompt_tokens": row["input_tokens"],
        "total_completion_tokens": row["output_tokens"],
        "throughput_tokens_per_second": _ratio(completed and tokens, row["duration_s"]),
        "gpu_energy_wh": gpu_wh,
        "wh_per_1000_queries": _ratio(gpu_wh, completed, 1000),
        "co2_emissions_g": row["co2e_g"],
        "tokens_per_joule": _ratio(completed and tokens, row["gpu_energy_j"]),
        "avg_energy_per_prompt_wh": _ratio(gpu_wh, completed),
        "timestamp": row["started_at"],
        "error_message": row["error"],
    }
    return values | _labels(row, not_ai_energy_score(row))


def not_ai_energy_score(row: Row) -> list[str]:
    """Return the respects in which an experiment did not follow AI Energy Score's protocol."""
    device, path = row["device"] or "", _configured(row, "dataset", "path")
    checks = {
        f"the status of the run is {row['status']}": row["status"] != "completed",
        f"it ran on {device or 'an unknown device'}, not on an NVIDIA H100 with 80 GB": not _is_h100(device),
        f"the prompts are not the 1,000 of {PROMPTS}": path not in (PROMPTS, PROMPTS_BEFORE)
        or row["requests_planned"] != 1000,
        f"the batch size is {row['batch_size']}, not 1": row["batch_size"] != 1,
        f"the dtype is {row['dtype'] or 'unknown'}, not float16 or bfloat16": row["dtype"]
        not in ("float16", "bfloat16"),
        f"the number of completed cycles is {row['cycles_completed']}, not 10": row["cycles_completed"] != 10,
        f"the energy of the GPUs is {_of_source(row['gpu_energy_source'])}": row["gpu_energy_source"] not in MEASURED,
    }
    found = [reason for reason, is_true in checks.items() if is_true]
    return [*found, "the window does not include the preprocessing of the prompts"]


def _is_h100(device: str) -> bool:
    """Return whether a device is a whole H100 with 80 GB; an H100 NVL has more, and a MIG instance is only a part."""
    return bool(re.search(r"\bH100\b", device)) and not re.search(r"\b(NVL|MIG)\b", device)


def _of_source(source: str | None) -> str:
    return {None: "not measured", "estimate": "an estimate", "replay": "replayed"}.get(source, source or "")


def _configured(row: Row, *path: str) -> Any:
    """Return a value of an experiment's configuration, or None if it is not there."""
    try:
        value = json.loads(row["config_json"] or "{}")
    except ValueError:
        return None
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


# ------------------------------------------------------------------ ML.ENERGY
TASKS = ("gpqa", "lm-arena-chat", "sourcegraph-fim", "image-chat", "video-chat")
# If the steady state of a run is shorter than this, the project calls the run unstable.
SHORTEST_STEADY_S = 20.0
# The project's names for the boards on which it measures.
BOARDS = ("H100", "B200")


def ml_energy(row: Row) -> dict[str, Any]:
    """Return an experiment as a row of `llm.parquet`; duration, energy and rates describe the steady state."""
    length = _ratio(row["output_tokens"], row["requests_completed"]) if row["status"] == "completed" else None
    energy_j = row["steady_energy_j"] if row["energy_components"] == "gpu" else None
    per_token_j = _ratio(energy_j, row["steady_output_tokens"])
    rate = row["steady_output_tokens_per_s"]
    unstable = _unstable(row["steady_duration_s"], per_token_j)
    values = {
        "domain": "llm",
        "task": row["dataset"],
        "model_id": row["model"],
        "nickname": row["model"].rpartition("/")[2],
        "total_params_billions": _ratio(row["parameters"], 1e9),
        "weight_precision": row["quantization"] or row["dtype"],
        "gpu_model": _board(row["device"]),
        "max_num_seqs": row["batch_size"],
        "seed": row["seed"],
        "steady_state_energy_joules": energy_j,
        "steady_state_duration_seconds": row["steady_duration_s"],
        "energy_per_token_joules": per_token_j,
        "energy_per_request_joules": None if per_token_j is None or length is None else per_token_j * length,
        "output_throughput_tokens_per_sec": rate,
        "request_throughput_req_per_sec": _ratio(rate, length),
        "avg_power_watts": _ratio(energy_j, row["steady_duration_s"]),
        "total_output_tokens": row["output_tokens"],
        "completed_requests": row["requests_completed"],
        "avg_output_len": length,
        **{f"{name}_itl_ms": _ratio(row[f"itl_{name}_s"], 1, 1000) for name in ("mean", "p50", "p95", "p99")},
        "median_itl_ms": _ratio(row["itl_p50_s"], 1, 1000),
        "is_stable": not unstable,
        "unstable_reason": unstable,
    }
    return values | _parallelism(row) | _labels(row, not_ml_energy(row, unstable))


def _parallelism(row: Row) -> dict[str, int | None]:
    """Return the number of GPUs, and how the model was spread over them; empty if that is not known."""
    if row["gpu_energy_j"] is None or row["backend"] == "openai":
        return {}
    try:
        experiment = from_json(Experiment, row["config_json"])
    except ValueError:  # the configuration was written by another version
        return {}
    strategy, degree = experiment.parallelism.strategy, experiment.parallelism.degree
    return {
        "num_gpus": gpus_needed(experiment),
        "tensor_parallel": degree if strategy == "tensor_parallel" else 1,
        "data_parallel": process_counts(experiment)[1],
    }


def _unstable(duration_s: float | None, per_token_j: float | None) -> str:
    """Return why ML.ENERGY would call a run unstable, in ML.ENERGY's words; empty if it would not."""
    if duration_s is None or duration_s < SHORTEST_STEADY_S:
        return f"short_steady_state:{duration_s}"
    if per_token_j is None or not math.isfinite(per_token_j) or per_token_j <= 0:
        return f"invalid_energy_per_token:{per_token_j}"
    return ""


def _board(device: str | None) -> str | None:
    return next((board for board in BOARDS if re.search(rf"\b{board}\b", device or "")), device)


def not_ml_energy(row: Row, unstable: str) -> list[str]:
    """Return the respects in which an experiment did not follow the protocol of ML.ENERGY's benchmark."""
    checks = {
        f"the status of the run is {row['status']}": row["status"] != "completed",
        f"it ran on {row['device'] or 'an unknown device'}, not on an NVIDIA H100 or B200": _board(row["device"])
        not in BOARDS,
        f"the dataset {row['dataset']} is not one of the benchmark's tasks": row["dataset"] not in TASKS,
        f"the backend is {row['backend']}, not vllm": row["backend"] != "vllm",
        f"the steady state is unstable ({unstable})": bool(unstable),
        f"the energy is {_of_source(row['energy_source'])}": row["energy_source"] not in MEASURED,
    }
    return [*[reason for reason, is_true in checks.items() if is_true], "the requests were not drawn by the benchmark"]


# ------------------------------------------------------------------ columns
_LABELS = {
    "lem_experiment_id": "str",
    "lem_status": "str",
    "lem_energy_source": "str",
    "lem_comparable": "bool",
    "lem_not_comparable_because": "str",
}
AI_ENERGY_SCORE_COLUMNS = (
    "model_name", "model_class", "task", "reasoning_state", "total_prompts", "successful_prompts", "failed_prompts",
    "total_duration_seconds", "avg_total_time", "avg_time_to_first_token", "total_tokens", "total_prompt_tokens",
    "total_completion_tokens", "throughput_tokens_per_second", "gpu_energy_wh", "wh_per_1000_queries",
    "co2_emissions_g", "tokens_per_joule", "avg_energy_per_prompt_wh", "timestamp", "error_message", *_LABELS,
)  # fmt: skip
ML_ENERGY_COLUMNS = {
    **dict.fromkeys(("domain", "task", "model_id", "nickname", "architecture"), "str"),
    **dict.fromkeys(("total_params_billions", "activated_params_billions"), "float"),
    **dict.fromkeys(("weight_precision", "gpu_model"), "str"),
    **dict.fromkeys(
        ("num_gpus", "max_num_seqs", "seed", "num_request_repeats", "tensor_parallel", "expert_parallel",
         "data_parallel"), "int"),
    **dict.fromkeys(
        ("steady_state_energy_joules", "steady_state_duration_seconds", "energy_per_token_joules",
         "energy_per_request_joules", "output_throughput_tokens_per_sec", "request_throughput_req_per_sec",
         "avg_power_watts", "total_output_tokens", "completed_requests", "avg_output_len", "mean_itl_ms",
         "median_itl_ms", "p50_itl_ms", "p90_itl_ms", "p95_itl_ms", "p99_itl_ms", "avg_batch_size"), "float"),
    "is_stable": "bool",
    **dict.fromkeys(("unstable_reason", "results_path", "prometheus_path"), "str"),
    **_LABELS,
}  # fmt: skip
