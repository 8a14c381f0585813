"""Compares lem's load generator with guidellm and aiperf, on a server whose true times are known.

`python -m bench.peers load` runs this comparison. Each tool sends the same number of requests to `bench.paced_server`,
which notes when each request arrived and when it sent each token. A tool's error is the time that the tool reports
minus the time that the server noted. The tools take turns. Each runs as a separate command, with the options that it
documents for streaming completions:

- A short and a long run with a fixed number of requests in flight. The errors are those of the long run; the CPU time
  per token is the difference between the two runs, divided by the difference in tokens, so that start-up drops out.
- A run with arrivals at a constant rate. The n-th request is due n / rate after the first. The tool's lateness is the
  delay with which a request reaches the server, compared with the request that was earliest relative to that plan.
- A ladder of runs with the tool on one core, each with more events per second than the last.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.paced_server import MODEL
from bench.usage import Cost, begin, cost, variables
from lem.workload import tiny

OUTPUT_TOKENS = 64
MS, US = 1e3, 1e6
SERVER_CORE, CLIENT_CORE = 0, 1
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Load:
    """What a tool must send: `requests` in total, `in_flight` at a time or, if `rate_hz` is set, at this rate."""

    requests: int
    in_flight: int = 0
    rate_hz: float | None = None
    pattern: str = "constant"
    first_s: float = 0.05
    gap_s: float = 0.01
    on_one_core: bool = False


@dataclass(frozen=True)
class Told:
    """What a tool reports about one request, in seconds; `itl_s` is None if it reports only the mean of the ITLs."""

    ttft_s: float
    mean_itl_s: float
    latency_s: float
    itl_s: list[float] | None = None


@dataclass(frozen=True)
class Tool:
    """How to run a tool and read its results.

    `read` returns what the tool reports about each request, by a key. `key` returns the same key for the server's note
    about the request.
    """

    name: str
    command: Callable[[Path, Load, str, Path], list[str]]
    read: Callable[[Path], dict[str, Told]]
    key: Callable[[dict[str, Any]], str]
    is_offline: bool = True


# ------------------------------------------------------------------ the server
class Paced:
    """The paced server, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.port = int(process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send the server a command, and return its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps(body))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer


@contextmanager
def paced(*, is_ahead: bool = False) -> Iterator[Paced]:
    """Run the server on the first core."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.paced_server"], stdout=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=partial(begin, SERVER_CORE, is_ahead=is_ahead),
    )  # fmt: skip
    try:
        yield Paced(process)
    finally:
        process.terminate()
        process.wait()


# ------------------------------------------------------------------ lem
def lem_command(_: Path, load: Load, url: str, folder: Path) -> list[str]:
    """Return lem's command, with the protocol of the other tools: text prompts, and tokens counted by the server."""
    prompts = _write_prompts(folder, load.requests, "prompt")
    if load.rate_hz is None:
        how = ["batching.strategy=continuous", f"batching.batch_size={load.in_flight}"]
    else:
        how = [f"traffic.pattern={load.pattern}", f"traffic.target_qps={load.rate_hz:g}"]
    return [
        sys.executable, "-m", "lem", "experiment", "-m", "tiny", "-p", str(prompts), "-n", str(load.requests),
        "--streaming", "backend=openai", f"backend.url={url}", "backend.dialect=openai", "backend.prompts=text",
        f"max_output_tokens={OUTPUT_TOKENS}", "energy=none", *how, "-o", str(folder / "results"), "-y",
    ]  # fmt: skip


def lem_read(folder: Path) -> dict[str, Told]:
    """Return what lem reports about each prompt."""
    import lem

    (experiment,) = (folder / "results" / "raw").iterdir()
    texts = [json.loads(line)["text"] for line in (experiment / "prompts.jsonl").read_text().splitlines()]
    rows = lem.load(folder / "results").requests.to_dict("records")
    return {
        texts[row["request"]]: Told(row["ttft_s"], row["tpot_s"], row["latency_s"], list(row["itl_s"])) for row in rows
    }


def by_prompt(note: dict[str, Any]) -> str:
    """Return the prompt of a request."""
    return str(note["prompt"])


# ------------------------------------------------------------------ guidellm
def guidellm_command(programs: Path, load: Load, url: str, folder: Path) -> list[str]:
    """Return guidellm's command."""
    data = _write_prompts(folder, load.requests, "prompt")
    profile = f"kind=concurrent,streams={load.in_flight}"
    if load.rate_hz is not None:
        profile = f"kind={load.pattern},rate={load.rate_hz:g}"
    return [
        str(programs / "guidellm"), "run", "--disable-console",
        "--backend", f"kind=openai_http,target={url},request_format=/v1/completions,max_tokens={OUTPUT_TOKENS}",
        "--profile", profile, "--constraint", f"kind=max_requests,count={load.requests}",
        "--data", f"kind=json_file,path={data}", "--tokenizer", f"kind=huggingface_auto,model={tiny.path()}",
        "--output", f"kind=json,path={folder / 'guidellm.json'}",
    ]  # fmt: skip


def guidellm_read(folder: Path) -> dict[str, Told]:
    """Return what guidellm reports about each answer, by the id that the server gave it."""
    (benchmark,) = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    found = {}
    for row in benchmark["requests"]["successful"]:
        began_s, times = row["request_start_time"], row["info"]["timings"]
        ttft_s = times["first_token_iteration"] - began_s
        latency_s = times["last_token_iteration"] - began_s
        found[row["response_id"]] = Told(ttft_s, (latency_s - ttft_s) / (OUTPUT_TOKENS - 1), latency_s)
    return found


def by_answer(note: dict[str, Any]) -> str:
    """Return the id of a request's answer."""
    return str(note["id"])


# ------------------------------------------------------------------ aiperf
def aiperf_command(programs: Path, load: Load, url: str, folder: Path) -> list[str]:
    """Return aiperf's command; GPU and server metrics are off, because the server has none."""
    data = _write_prompts(folder, load.requests, "text")
    how = ["--concurrency", str(load.in_flight)]
    if load.rate_hz is not None:
        how = ["--request-rate", f"{load.rate_hz:g}", "--arrival-pattern", load.pattern]
    return [
        str(programs / "aiperf"), "profile", "--model", MODEL, "--url", url, "--endpoint-type", "completions",
        "--streaming", "--tokenizer", str(tiny.path()), "--use-server-token-count", "--ui", "none",
        "--no-gpu-telemetry", "--no-server-metrics", "--input-file", str(data), "--custom-dataset-type", "single_turn",
        "--extra-inputs", f"max_tokens:{OUTPUT_TOKENS}", "--request-count", str(load.requests), *how,
        "--artifact-dir", str(folder / "aiperf"),
    ]  # fmt: skip


def aiperf_read(folder: Path) -> dict[str, Told]:
    """Return what aiperf reports about each request, by the id in the request's header."""
    found = {}
    for line in (folder / "aiperf" / "profile_export.jsonl").read_text().splitlines():
        row = json.loads(line)
        metrics = {name: each["value"] for name, each in row["metrics"].items()}
        found[row["metadata"]["x_request_id"]] = Told(
            metrics["time_to_first_token"] / MS,
            metrics["inter_token_latency"] / MS,
            metrics["request_latency"] / MS,
            [gap / MS for gap in metrics["inter_chunk_latency"]],
        )
    return found


def by_header(note: dict[str, Any]) -> str:
    """Return the id in a request's header."""
    return str(note["request_id"])


def _write_prompts(folder: Path, count: int, column: str) -> Path:
    rows = [{column: f"Question {i}: tell me about the number {i}."} for i in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "prompts.jsonl"


# aiperf accepts a tokenizer in a local directory only if it may use the hub, although it then requests nothing from it.
TOOLS = {
    "lem": Tool("lem", lem_command, lem_read, by_prompt),
    "guidellm": Tool("guidellm", guidellm_command, guidellm_read, by_answer),
    "aiperf": Tool("aiperf", aiperf_command, aiperf_read, by_header, is_offline=False),
}


# ------------------------------------------------------------------ one run
@dataclass(frozen=True)
class Run:
    """One run of a tool.

    `tokens` is the number of tokens that the server sent. `told` pairs the tool's report about each request with the
    server's note about it.
    """

    cost: Cost
    tokens: int
    told: list[tuple[Told, dict[str, Any]]]


def run_tool(tool: Tool, programs: Path, load: Load, server: Paced, *, is_ahead: bool = False) -> Run:
    """Let a tool send its requests, and pair what it reports with what the server noted.

    Raises:
        SystemExit: the tool failed, or its results lack a request.
    """
    server.post("/pace", {"first_s": load.first_s, "gap_s": load.gap_s})
    server.post("/take", {})
    with tempfile.TemporaryDirectory(prefix="lem-peers-") as name:
        folder = Path(name)
        command = tool.command(programs, load, server.url, folder)
        env = {name: value for name, value in variables().items() if name not in OFFLINE}
        env |= dict.fromkeys(OFFLINE, "1") if tool.is_offline else {}
        before = partial(begin, CLIENT_CORE if load.on_one_core else None, is_ahead=is_ahead)
        spent = cost(command, folder / "log.txt", env=env, before=before)
        told = tool.read(folder)
    notes = [note for note in server.post("/take", {}) if len(note["sent_ns"]) == OUTPUT_TOKENS]
    # If a warm-up request and a window request have the same key, the later one counts.
    by_key = {tool.key(note): note for note in notes}
    pairs = [(each, by_key[key]) for key, each in told.items() if key in by_key]
    if len(pairs) < load.requests:
        raise SystemExit(f"{tool.name} reports {len(pairs)} of {load.requests} requests that the server answered.")
    return Run(spent, sum(len(note["sent_ns"]) for note in notes), pairs)


def errors_s(run: Run) -> dict[str, np.ndarray]:
    """Return a tool's errors in seconds: of TTFT, of latency, of each request's mean ITL, and of each ITL if known."""
    ttft, latency, mean, each = [], [], [], []
    for told, note in run.told:
        sent = np.array(note["sent_ns"], dtype=np.int64)
        gaps = np.diff(sent) / 1e9
        ttft.append(told.ttft_s - (sent[0] - note["arrived_ns"]) / 1e9)
        latency.append(told.latency_s - (sent[-1] - note["arrived_ns"]) / 1e9)
        mean.append(told.mean_itl_s - float(gaps.mean()))
        if told.itl_s is not None and len(told.itl_s) == len(gaps):
            each.append(np.array(told.itl_s) - gaps)
    itl = np.concatenate(each) if len(each) == len(run.told) else np.array([])
    return {"ttft": np.array(ttft), "latency": np.array(latency), "mean_itl": np.array(mean), "itl": itl}


def lateness_s(run: Run, rate_hz: float) -> np.ndarray:
    """Return how late each request of an open loop reached the server, in seconds.

    Lateness is counted from the request that was earliest relative to the planned times.
    """
    arrived = np.sort([note["arrived_ns"] for _, note in run.told]) / 1e9
    late = arrived - np.arange(len(arrived)) / rate_hz
    return np.asarray(late - late.min())


# ------------------------------------------------------------------ the comparison
SHORT, LONG = Load(32, in_flight=16), Load(240, in_flight=16)
OPEN = Load(100, rate_hz=20.0)
# Rungs of the ladder as requests in flight; each request streams about 100 events per second.
RUNGS = (2, 8, 32, 64, 128, 256)
ROUNDS = 4
EVENTS_PER_S = 100.0
LIMIT_S = 1e-3


def figures(tool: Tool, programs: Path, server: Paced, *, is_ahead: bool) -> dict[str, float | None]:
    """Measure one tool once; return its figures by name and unit, with None for those that the tool does not report."""
    short, long, opened = (run_tool(tool, programs, load, server, is_ahead=is_ahead) for load in (SHORT, LONG, OPEN))
    assert OPEN.rate_hz is not None
    errors, late = errors_s(long), lateness_s(opened, OPEN.rate_hz)
    found: dict[str, float | None] = {}
    for name, values in errors.items():
        some = np.abs(values) * US
        found[f"{name}_error_mean_us"] = float(some.mean()) if len(some) else None
        found[f"{name}_error_p99_us"] = float(np.quantile(some, 0.99)) if len(some) else None
    found["lateness_p50_us"], found["lateness_p99_us"] = (float(np.quantile(late, q)) * US for q in (0.5, 0.99))
    extra_tokens = long.tokens - short.tokens
    found["cpu_ms_per_1000_tokens"] = (long.cost.cpu_s - short.cost.cpu_s) / extra_tokens * 1000 * MS
    found["cpu_of_command_s"], found["wall_of_command_s"] = long.cost.cpu_s, long.cost.wall_s
    return found


def ladder(tool: Tool, programs: Path, server: Paced, *, is_ahead: bool) -> list[dict[str, Any]]:
    """Run a tool on one core at rising rates, up to the first rate at which its error is too large.

    The error is that of the time from a request's first to its last token, which every tool reports for every request.
    The requests of the first and the last round are left out, because they begin or end together.
    """
    found: list[dict[str, Any]] = []
    for in_flight in RUNGS:
        load = Load(ROUNDS * in_flight + 20, in_flight, first_s=0.02, gap_s=1 / EVENTS_PER_S, on_one_core=True)
        run = run_tool(tool, programs, load, server, is_ahead=is_ahead)
        steady = sorted(run.told, key=lambda pair: pair[1]["arrived_ns"])[in_flight:-in_flight]
        wrong = [told.latency_s - told.ttft_s - (note["sent_ns"][-1] - note["sent_ns"][0]) / 1e9
                 for told, note in steady]  # fmt: skip
        sent = np.sort(np.concatenate([note["sent_ns"] for _, note in steady]))
        p99_s = float(np.quantile(np.abs(wrong), 0.99))
        found.append({
            "events_per_s": float(_steady_rate_hz(sent)),
            "nominal_events_per_s": in_flight * EVENTS_PER_S,
            "error_p99_us": p99_s * US,
            "is_sustained": p99_s < LIMIT_S,
        })  # fmt: skip
        if p99_s >= LIMIT_S:
            break
    return found


def _steady_rate_hz(sent_ns: np.ndarray) -> float:
    """Return the number of events per second from the first to the third quartile of their times."""
    begin, end = np.quantile(sent_ns, [0.25, 0.75])
    return float(((sent_ns >= begin) & (sent_ns <= end)).sum() / ((end - begin) / 1e9))
