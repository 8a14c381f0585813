"""The vllm backend: its translation of options anywhere, and vLLM itself where it is installed (nox -s vllm).

The contract of all backends is in test_backends.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise

import pyarrow.parquet as pq
import pytest

from lem.backends import make_backend, vllm_source
from lem.backends.base import Encoded, Generation
from lem.backends.engine import clock_offset_ns, reason_of
from lem.backends.vllm_options import (
    CODE,
    CODE_METHOD,
    DROPPED,
    OF_LEM,
    RESOLVED,
    engine_arguments,
    sampling_parameters,
    wrong_type,
)
from lem.errors import RunError
from lem.runner.records import prefill_of
from lem.runner.window import Measurement
from lem.spec.engines import VllmBackend, VllmSpeculation
from lem.spec.experiment import Batching, Decoder, Experiment, Parallelism, Streaming, Traffic
from lem.spec.processes import gpus_needed, process_counts
from lem.workload.batching import plan_batches
from lem.workload.models import Model, find
from lem.workload.traffic import arrival_times_s
from tests import models_for_tests
from tests.backends.conftest import (
    check_arrivals_are_taken_in,
    check_cancelled,
    check_concurrency,
    check_places_are_filled,
    check_same_output,
    check_seeds_differ,
    on_pytorch,
    rows,
    run,
    tokens,
)
from tests.conftest import begin, command, kill_group, raw_record, wait_for

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
SMALL = VllmBackend(kv_cache_memory_bytes=2**26, enforce_eager=True)
TINY = Experiment(
    model="tiny", fp_precision="float32", max_output_tokens=16, batching=Batching(batch_size=4), backend=SMALL
)
SAMPLING = Decoder(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.05)
NGRAM = VllmSpeculation(method="ngram", num_speculative_tokens=3, prompt_lookup_max=4, prompt_lookup_min=2)
MODEL = Model("owner/name", "owner/name", "v1", {"dtype": "bfloat16"})
END = frozenset([7, 2])


def experiment(*, engine=None, **options):
    return replace(TINY, backend=replace(SMALL, **(engine or {})), **options)


def spread(strategy, degree=2):
    return Parallelism(strategy=f"{strategy}_parallel", degree=degree)


# ------------------------------------------------------------------ translation, without the engine
def arguments(*, on_gpu=True, lora_rank=None, **options):
    return engine_arguments(experiment(**options), MODEL, on_gpu=on_gpu, lora_rank=lora_rank)


def test_what_is_null_is_left_to_vllm():
    neutral = engine_arguments(Experiment(backend=VllmBackend()), MODEL, on_gpu=True, lora_rank=None)
    assert not set(neutral) & {*RESOLVED, "speculative_config", "enable_lora", "tensor_parallel_size"}
    assert neutral["generation_config"] == "vllm"


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"seed": 9}, "seed", 9),
        ({"trust_remote_code": True}, "trust_remote_code", True),
        ({"batching": Batching(batch_size=33)}, "max_num_seqs", 33),
        ({"parallelism": spread("tensor", 4)}, "tensor_parallel_size", 4),
        ({"parallelism": spread("pipeline", 4)}, "pipeline_parallel_size", 4),
        ({}, "revision", "v1"),
        ({"lora_rank": 9}, "max_lora_rank", 16),
        ({"lora_rank": 8}, "max_lora_rank", 8),
        ({"engine": {"speculative": NGRAM}}, "speculative_config", {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2,
        }),
        ({"engine": {"engine_args": {"max_logprobs": 3}}}, "max_logprobs", 3),
    ],
)  # fmt: skip
def test_options_become_engine_arguments(options, name, value):
    assert arguments(**options)[name] == value


def test_replicas_are_lems_own_and_run_one_gpu_each():
    assert "tensor_parallel_size" not in arguments(parallelism=spread("data"))
    assert process_counts(experiment(parallelism=spread("data", 3))) == (3, 3)


@pytest.mark.parametrize("strategy", ["tensor", "pipeline"])
def test_one_process_spreads_a_model_over_its_gpus(strategy):
    wanted = experiment(parallelism=spread(strategy, 4))
    assert process_counts(wanted) == (1, 1)
    assert gpus_needed(wanted) == 4


@pytest.mark.parametrize(
    ("precision", "on_gpu", "of_checkpoint", "dtype"),
    [
        ("auto", False, "bfloat16", "float32"),
        ("auto", True, "float32", "float32"),  # which vLLM would halve
        ("auto", True, "bfloat16", "bfloat16"),
        ("auto", True, None, "auto"),
        ("float16", True, "bfloat16", "float16"),
        ("bfloat16", False, "float32", "bfloat16"),
    ],
)
def test_dtype(precision, on_gpu, of_checkpoint, dtype):
    model = replace(MODEL, config={"dtype": of_checkpoint} if of_checkpoint else {})
    wanted = experiment(fp_precision=precision)
    assert engine_arguments(wanted, model, on_gpu=on_gpu, lora_rank=None)["dtype"] == dtype


def test_greedy_decoding_asks_for_nothing_random():
    asked = sampling_parameters(replace(TINY, min_output_tokens=3), 5, END)
    assert asked == {
        "max_tokens": 16,
        "min_tokens": 3,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "stop_token_ids": [2, 7],
        "detokenize": False,
        "temperature": 0.0,
    }


def test_sampling_is_passed_on_and_zero_top_k_stays_all():
    asked = sampling_parameters(replace(TINY, decoder=SAMPLING), 5, END)
    assert {name: asked[name] for name in ("temperature", "top_k", "top_p", "min_p")} == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
    }
    assert sampling_parameters(replace(TINY, decoder=replace(SAMPLING, top_k=0)), 5, END)["top_k"] == 0


def test_each_prompt_of_each_experiment_has_a_seed_of_its_own():
    check_seeds_differ(
        lambda seed, index: sampling_parameters(replace(TINY, decoder=SAMPLING, seed=seed), index, END), below=2**63
    )


def test_continuous_batching_gives_the_engine_all_at_once():
    assert plan_batches([5, 9, 1], Batching(strategy="continuous", batch_size=2)) == [[0, 1, 2]]
    assert plan_batches([], Batching(strategy="continuous")) == []


def test_prompts_that_are_taken_in_side_by_side_count_once_if_nothing_decodes_meanwhile():
    measurement = Measurement()
    for index, (start, first) in enumerate([(0, 4), (2, 4), (5, 6), (8, 9), (1, 4)]):
        made = Generation(index, 0, (1,), "length", start * 10**9, (first + 1) * 10**9, first * 10**9)
        measurement.add(made, Encoded(index, (1,)))
    assert prefill_of(measurement.requests, (), ()).duration_s == 4 + 1 + 1
    measurement.add(Generation(5, 0, (1,), "length", 0, 9 * 10**9, 3 * 10**9), Encoded(5, (1,)))
    assert prefill_of(measurement.requests, (), ()).duration_s is None


def test_the_engines_clock_is_ours_on_linux():
    assert clock_offset_ns() == 0
    assert abs(time.monotonic_ns() - time.perf_counter_ns()) < 10**7


def test_reasons_are_one_sentence():
    assert reason_of(ValueError("it\n  does not\nfit")) == "it does not fit."
    assert reason_of(KeyError()) == "KeyError."
    long = reason_of(ValueError("word " * 200))
    assert long.endswith("word …")
    assert len(long) < 410


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_without_the_package_it_says_what_to_install(lem):
    finished = lem("experiment", "--backend", "vllm", "-m", "tiny", "-d", "sample", "-n", "2", "-y")
    assert finished.code == 2
    assert "pip install 'lem[vllm]'" in finished.out + finished.err


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_a_build_for_gpus_without_one_is_refused(tmp_path):
    for name, text in {
        "vllm/__init__.py": "raise AssertionError('it is not to be imported')\n",
        "vllm-9.9.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.0\n",
    }.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True)
        (tmp_path / "site" / name).write_text(text)
    hidden = {"PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": ""}
    finished = command("experiment", "--backend", "vllm", "-m", "tiny", "-d", "sample", "-y", cwd=tmp_path, **hidden)
    assert finished.code == 2
    assert "the installed vLLM is built for CUDA, but no NVIDIA GPU is visible" in finished.err
    assert not (tmp_path / "results").exists()


# ------------------------------------------------------------------ the installed version
@needs_vllm
def test_the_source_says_what_the_package_itself_does():
    code = (
        "import dataclasses, json, typing\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm.config.cache import CacheDType\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "fields = [f.name for f in dataclasses.fields(EngineArgs) if not f.name.startswith('_')]\n"
        "print('RESULT', json.dumps([fields, typing.get_args(CacheDType), list(AttentionBackendEnum.__members__)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    fields, dtypes, kernels = json.loads(done.stdout.partition("RESULT ")[2])
    assert vllm_source.arguments() == frozenset(fields)
    assert vllm_source.choices("kv_cache_dtype") == tuple(dtypes)
    assert set(vllm_source.choices("attention_backend")) == set(kernels)
    assert {"ngram", "draft_model", "eagle"} <= set(vllm_source.choices("speculative.method"))


@needs_vllm
def test_no_default_of_the_installed_version_is_refused_for_its_type():
    code = (
        "import dataclasses, json\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "fields = {f.name: f.default for f in dataclasses.fields(EngineArgs)}\n"
        "print('RESULT', json.dumps({n: v for n, v in fields.items() if isinstance(v, (int, float, str, bool))}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    defaults = json.loads(done.stdout.partition("RESULT ")[2])
    found = [o for name, value in defaults.items() for o in wrong_type(f"backend.engine_args.{name}", name, value)]
    assert not found
    assert {"max_logprobs", "enforce_eager", "watermark", "worker_cls"} <= defaults.keys()
    assert [vllm_source.type_of(name)[1] for name in ("max_logprobs", "watermark")] == [int, float]
    assert vllm_source.type_of("compilation_config") is None


def resolved(lora_rank=None, **options):
    """Return the configuration that vLLM derives from an experiment; nothing is loaded."""
    make_backend(TINY).start()
    from vllm.engine.arg_utils import EngineArgs

    wanted = experiment(**options)
    given = engine_arguments(wanted, find(wanted.model), on_gpu=False, lora_rank=lora_rank)
    return EngineArgs(**given).create_engine_config()


ARRIVALS = [
    ({"max_model_len": 640}, RESOLVED["max_model_len"], 640),
    ({"max_num_batched_tokens": 5000}, RESOLVED["max_num_batched_tokens"], 5000),
    ({"gpu_memory_utilization": 0.37}, RESOLVED["gpu_memory_utilization"], 0.37),
    ({"kv_cache_memory_bytes": 123_456_789}, RESOLVED["kv_cache_memory_bytes"], 123_456_789),
    ({"kv_cache_dtype": "bfloat16"}, RESOLVED["kv_cache_dtype"], "bfloat16"),
    ({"kv_cache_dtype": "fp8"}, RESOLVED["kv_cache_dtype"], "fp8"),
    ({"block_size": 64}, RESOLVED["block_size"], 64),
    ({"enable_prefix_caching": False}, RESOLVED["enable_prefix_caching"], False),
    ({"enable_prefix_caching": True}, RESOLVED["enable_prefix_caching"], True),
    ({"enable_chunked_prefill": False}, RESOLVED["enable_chunked_prefill"], False),
    ({"enable_chunked_prefill": True}, RESOLVED["enable_chunked_prefill"], True),
    ({"enforce_eager": False}, RESOLVED["enforce_eager"], False),
    ({"enforce_eager": True}, RESOLVED["enforce_eager"], True),
    ({"attention_backend": "FLASH_ATTN"}, f"{RESOLVED['attention_backend']}.name", "FLASH_ATTN"),
    ({"quantization": "fp8"}, RESOLVED["quantization"], "fp8"),
    ({"load_format": "dummy"}, RESOLVED["load_format"], "dummy"),
    ({"cpu_offload_gb": 1.5}, RESOLVED["cpu_offload_gb"], 1.5),
    ({"speculative": NGRAM}, "speculative_config.method", "ngram"),
    ({"speculative": NGRAM}, "speculative_config.num_speculative_tokens", 3),
    ({"speculative": NGRAM}, "speculative_config.prompt_lookup_max", 4),
    ({"speculative": NGRAM}, "speculative_config.prompt_lookup_min", 2),
    ({"engine_args": {"max_logprobs": 7}}, "model_config.max_logprobs", 7),
    ({"engine_args": {"scheduling_policy": "priority"}}, "scheduler_config.policy", "priority"),
]


@needs_vllm
@pytest.mark.parametrize(("engine", "path", "value"), ARRIVALS, ids=lambda v: v if isinstance(v, str) else "")
def test_an_engine_option_arrives(engine, path, value):
    room = {} if "max_num_batched_tokens" in engine else {"max_num_batched_tokens": 8192}
    config = resolved(engine=room | engine, fp_precision="bfloat16" if "quantization" in engine else "float32")
    assert attribute(config, path) == value


def test_every_option_has_its_arrival():
    assert {name for engine, *_ in ARRIVALS for name in engine} == {*RESOLVED, "speculative", "engine_args"}


@needs_vllm
@pytest.mark.parametrize(
    ("options", "path", "value"),
    [
        ({"seed": 77}, "model_config.seed", 77),
        ({"fp_precision": "bfloat16"}, "model_config.dtype", "torch.bfloat16"),
        ({"fp_precision": "auto"}, "model_config.dtype", "torch.float32"),
        ({"trust_remote_code": True}, "model_config.trust_remote_code", True),
        ({"batching": Batching(batch_size=33)}, "scheduler_config.max_num_seqs", 33),
        ({"parallelism": spread("tensor")}, "parallel_config.tensor_parallel_size", 2),
        ({"parallelism": spread("pipeline")}, "parallel_config.pipeline_parallel_size", 2),
        ({"lora_rank": 9}, "lora_config.max_lora_rank", 16),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_shared_option_arrives(options, path, value):
    found = attribute(resolved(**options), path)
    assert (str(found) if isinstance(value, str) else found) == value


@needs_vllm
def test_a_draft_model_arrives():
    draft = VllmSpeculation(
        method="draft_model", model=find("tiny").path, num_speculative_tokens=2, draft_tensor_parallel_size=1
    )
    config = resolved(engine={"speculative": draft}).speculative_config
    assert (config.method, config.model, config.num_speculative_tokens) == ("draft_model", find("tiny").path, 2)
    assert config.draft_tensor_parallel_size == 1


@needs_vllm
def test_sampling_parameters_are_vllms_own():
    make_backend(TINY).start()
    from vllm import SamplingParams

    asked = sampling_parameters(replace(TINY, decoder=SAMPLING, min_output_tokens=3), 5, END)
    made = SamplingParams(**asked)
    assert {name: getattr(made, name) for name in asked} == asked


def attribute(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


# ------------------------------------------------------------------ the loaded engine
@pytest.fixture
def loaded(engines):
    """Load backends, reusing a running engine if it fits the experiment."""
    return engines.loaded


@needs_vllm
@pytest.mark.parametrize(
    "options",
    [{}, {"decoder": Decoder(repetition_penalty=1.3)}, {"min_output_tokens": 16, "chat_template": True}],
    ids=["greedy", "penalty", "chat"],
)
def test_it_gives_the_tokens_that_pytorch_gives(loaded, texts, options):
    wanted = replace(TINY, **options)
    here, there = loaded(wanted), loaded(on_pytorch(wanted))
    assert here.encode(texts) == there.encode(texts)
    check_same_output(here, there, texts, len(texts))


@needs_vllm
def test_an_adapter_changes_tokens_and_flops_as_on_pytorch(loaded, texts, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    wanted = replace(TINY, adapter=str(models_for_tests.adapter(tmp_path / "adapter", find("tiny").path)))
    here, there = loaded(wanted), loaded(on_pytorch(wanted))
    mine = tokens(check_same_output(here, there, texts, 8))
    assert mine != tokens(run(loaded(TINY), texts[:8]))


@needs_vllm
def test_sampled_tokens_do_not_depend_on_the_company(loaded, texts):
    alone, together, continuous = (
        tokens(run(loaded(replace(TINY, decoder=SAMPLING, batching=batching)), texts[:9]))
        for batching in (Batching(), Batching(batch_size=4), Batching(strategy="continuous", batch_size=4))
    )
    assert alone == together == continuous
    assert alone != tokens(run(loaded(TINY), texts[:9]))


@needs_vllm
def test_continuous_batching_fills_places_as_they_become_free(loaded, texts):
    backend = loaded(replace(TINY, batching=Batching(strategy="continuous", batch_size=3)))
    done = check_places_are_filled(backend, texts, began_ns=lambda g: g.index)
    assert max(sum(g.start_ns <= at.start_ns < g.end_ns for g in done) for at in done) == 3


@needs_vllm
def test_the_engine_counts_what_we_count(loaded, texts):
    backend = loaded(TINY)
    assert backend.counters() is None  # nothing has run, which must not read as 0
    prompts, done = backend.encode(texts), run(backend, texts)
    counts = backend.counters()
    assert counts["prompt_tokens"] == sum(len(p.token_ids) for p in prompts)
    assert counts["generation_tokens"] == sum(len(g.token_ids) for g in done.values())
    assert (counts["preemptions"], counts["prefix_cache_hit_tokens"]) == (0, 0)
    backend.forget()
    assert backend.counters() is None


@needs_vllm
def test_a_warm_up_leaves_no_prefix_behind_and_hits_are_reported(loaded, texts):
    backend = loaded(TINY)
    alike = [texts[0] * 6 + text for text in texts[:4]]
    for _ in range(2):
        run(backend, alike[:1])
    assert backend.counters()["prefix_cache_hit_tokens"] > 0
    backend.forget()
    run(backend, alike[:1])
    assert backend.counters()["prefix_cache_hit_tokens"] == 0
    assert "prefix_cached" not in [each.code for each in backend.warnings()]
    run(backend, alike)
    assert "prefix_cached" in [each.code for each in backend.warnings()]


@needs_vllm
def test_preemptions_are_reported(loaded, texts):
    # There are blocks for three to four of the eight requests that run side by side.
    options = {"kv_cache_memory_bytes": 11 * 786_432, "max_model_len": 512}
    backend = loaded(experiment(engine=options, max_output_tokens=300, batching=Batching(batch_size=8)))
    done = run(backend, texts[:8])
    assert backend.counters()["preemptions"] > 0
    assert "preempted" in [each.code for each in backend.warnings()]
    assert tokens(done) == tokens(run(loaded(experiment(max_output_tokens=300)), texts[:8]))


@needs_vllm
def test_settings_are_those_that_the_engine_has_settled_on(loaded):
    options = {"max_model_len": 512, "max_num_batched_tokens": 1024, "block_size": 64, "enable_prefix_caching": False}
    settings = loaded(experiment(engine=options)).engine_info().settings
    expected = {
        "dtype": "float32",
        "block_size": "64",
        "kv_cache_tokens": "10880",  # 2**26 bytes, at 6144 per token, in whole blocks, one of which stays empty
        "max_num_seqs": "4",
        "max_num_batched_tokens": "1024",
        "max_model_len": "512",
        "attention_backend": "CPU_ATTN",
        "enable_chunked_prefill": "on",
        "enable_prefix_caching": "off",
        "tensor_parallel_size": "1",
        "pipeline_parallel_size": "1",
        "end_token_ids": "2",
    }
    assert {name: settings[name] for name in expected} == expected


@needs_vllm
def test_sizes_are_those_of_the_model_as_it_is_changed(loaded):
    def sizes(**engine_args):
        backend = loaded(experiment(engine={"load_format": "dummy", "engine_args": engine_args or None}))
        return backend.architecture().body_weights, backend.model_info().parameters

    (whole, all_of_it), (part, less) = sizes(), sizes(hf_overrides={"num_hidden_layers": 3})
    assert part == whole / 2
    assert all_of_it - less > part


@needs_vllm
def test_the_installed_version_has_what_is_given_to_it_and_nothing_that_is_called_dropped():
    known = vllm_source.arguments()
    assert {*RESOLVED, *OF_LEM, *CODE} <= known
    assert not known & set(DROPPED)
    assert CODE_METHOD in vllm_source.choices("speculative.method")


@needs_vllm
@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"attention_backend": "FLASH_ATTN"}, "backend.attention_backend is FLASH_ATTN, but vLLM uses CPU_ATTN"),
        ({"kv_cache_memory_bytes": 2**50}, "Available memory .* Set backend.gpu_memory_utilization"),
        ({"kv_cache_memory_bytes": 2**16}, "No available memory for the cache blocks"),
        ({"quantization": "awq"}, "could not load tiny: Cannot find the config file for awq"),
        ({"block_size": 48}, "could not load tiny: No common block size for 48"),
        ({"load_format": "pt"}, "could not load tiny: Cannot find any model weights"),
    ],
)
def test_what_the_engine_refuses_is_reported_in_a_sentence(loaded, engine, words):
    with pytest.raises(RunError, match=words) as caught:
        loaded(experiment(engine=engine))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def check_drafts(record, method, tokens_each):
    """Check that the counters of a record, or of a backend, are consistent."""
    counts, engine = record["counters"], record["engine"]
    assert engine["settings"]["speculation"] == f"{method}, {tokens_each} tokens"
    assert 0 < counts["accepted_draft_tokens"] <= counts["draft_tokens"] <= tokens_each * counts["drafts"]
    return counts


def drafting(loaded, target, texts, **speculation):
    """Run a model with speculation and check that its output is the same as on PyTorch; return its counters."""
    plain = replace(TINY, model=str(target), max_output_tokens=32)
    wanted = replace(plain, backend=replace(SMALL, speculative=VllmSpeculation(**speculation)))
    backend = loaded(wanted)
    done = run(backend, texts)
    assert tokens(done) == tokens(run(loaded(on_pytorch(plain)), texts))
    record = {"counters": backend.counters(), "engine": {"settings": backend.engine_info().settings}}
    counts = check_drafts(record, speculation["method"], speculation["num_speculative_tokens"])
    assert counts["generation_tokens"] == sum(len(g.token_ids) for g in done.values())
    return counts


@needs_vllm
def test_a_draft_model_drafts_what_it_would_have_written(loaded, texts):
    itself = {"method": "draft_model", "model": find("tiny").path, "num_speculative_tokens": 3}
    counts = drafting(loaded, find("tiny").path, texts[:8], **itself)
    assert counts["accepted_draft_tokens"] == counts["draft_tokens"]


@needs_vllm
def test_eagle_drafts_what_the_model_then_writes(loaded, texts, tmp_path):
    model = models_for_tests.bigram(tmp_path / "model", find("tiny").path)
    head = models_for_tests.eagle_head(tmp_path / "head", model)
    counts = drafting(loaded, model, texts[:8], method="eagle", model=str(head), num_speculative_tokens=2)
    assert counts["accepted_draft_tokens"] == counts["draft_tokens"]


STREAMING = Streaming(enabled=True)


@needs_vllm
@pytest.mark.parametrize("strategy", ["static", "continuous"])
def test_each_token_is_timed_and_is_the_same_token(loaded, texts, strategy):
    wanted = replace(TINY, batching=Batching(strategy=strategy, batch_size=4))
    plain, timed = run(loaded(wanted), texts), run(loaded(replace(wanted, streaming=STREAMING)), texts)
    assert tokens(timed) == tokens(plain)
    assert not any(g.chunks for g in plain.values())
    for g in timed.values():
        assert [chunk.tokens for chunk in g.chunks] == [1] * len(g.token_ids)
        moments = [chunk.at_ns for chunk in g.chunks]
        assert moments == sorted(moments)
        assert g.start_ns < moments[0] < moments[-1] == g.end_ns
        # The engine's own time of the first token lies within the step that returned it.
        assert 0 <= moments[0] - g.prefill_end_ns < 50_000_000


@needs_vllm
def test_requests_that_arrive_while_others_run_are_taken_in(loaded, texts):
    batching = Batching(strategy="continuous", batch_size=64)
    backend = loaded(replace(TINY, batching=batching, min_output_tokens=64, max_output_tokens=64))
    check_arrivals_are_taken_in(backend, backend.encode(texts)[:10], [0.001 * i for i in range(9)] + [3.0])


@needs_vllm
def test_a_fixed_concurrency_is_never_exceeded(loaded, texts):
    check_concurrency(loaded(replace(TINY, batching=Batching(strategy="continuous", batch_size=64))), texts)


@needs_vllm
def test_requests_that_are_no_longer_waited_for_are_cancelled(loaded, texts):
    check_cancelled(loaded(replace(TINY, batching=Batching(strategy="continuous", batch_size=2))), texts)


@needs_vllm
def test_an_engine_that_stops_leaves_what_can_still_be_reported(fresh, texts, monkeypatch):
    backend = fresh(TINY)

    def stops():
        raise RuntimeError("CUDA error: an illegal\nmemory access was encountered")

    monkeypatch.setattr(backend._loaded.engine, "step", stops)
    with pytest.raises(RunError, match=r"failed during the run: CUDA error: an illegal memory access"):
        run(backend, texts)
    backend.synchronize()
    assert backend.model_info().parameters > 0
    assert backend.engine_info().settings["attention_backend"] == "CPU_ATTN"
    assert backend.peak_memory().scope


# ------------------------------------------------------------------ whole runs
COMMON = (
    "experiment", "--backend", "vllm", "-m", "tiny", "-d", "sample", "-n", "12", "-y", "energy=none",
    "fp_precision=float32", "backend.kv_cache_memory_bytes=67108864", "backend.enforce_eager=true",
)  # fmt: skip
# Each worker of the engine gets a core of its own.
TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
# Six batches, each long enough to be interrupted in the middle.
LONG = ("max_output_tokens=240", "min_output_tokens=240", "batching.batch_size=2")


def completed(*options, cwd, **env):
    finished = command(*COMMON, *options, cwd=cwd, **env)
    assert finished.code == 0, finished.out + finished.err
    return cwd / "results"


@needs_vllm
def test_run_in_cycles_with_continuous_batching(tmp_path):
    results = completed("batching.strategy=continuous", "batching.batch_size=4", "cycles=2", cwd=tmp_path)
    for cycle in (1, 2):
        record = raw_record(results, cycle=cycle)
        own = [row for row in rows(results) if row["cycle"] == cycle]
        assert record["status"] == "completed"
        assert len(own) == 12
        assert record["counters"]["generation_tokens"] == sum(row["output_tokens"] for row in own)
        assert record["counters"]["prefix_cache_hit_tokens"] == 0
        assert {(row["queue_s"], row["arrived_s"]) for row in own} == {(None, None)}  # nothing arrives
        assert all(row["latency_s"] == pytest.approx(row["end_s"] - row["start_s"]) for row in own)
        phases = {phase["name"]: phase["duration_s"] for phase in record["phases"]}
        assert max(row["end_s"] for row in own) <= phases["measured"]
        # Prefill and decode can be separated only if no prompt was taken in while others were decoding.
        prefill = record["prefill"]
        assert (prefill["duration_s"] is None) == ("decoding" in (prefill["reason"] or ""))
        assert record["flops"]["total"] > 0
    assert "Initializing a V1 LLM engine" in next(results.glob("raw/*/worker_0.log")).read_text()


@needs_vllm
def test_run_with_poisson_arrivals_and_timed_tokens(tmp_path):
    results = completed(
        "batching.strategy=continuous", "batching.batch_size=4", "--streaming", "traffic.pattern=poisson",
        "traffic.target_qps=4", "traffic.ttft_limit_s=5", cwd=tmp_path,
    )  # fmt: skip
    (row,) = pq.read_table(results / "experiments").to_pylist()
    own = rows(results)
    assert (row["status"], len(own)) == ("completed", 12)
    due = arrival_times_s(Traffic(pattern="poisson", target_qps=4), 12, 42)
    assert [r["arrived_s"] for r in own] == pytest.approx(due, abs=1e-6)
    for r in own:
        assert r["queue_s"] == pytest.approx(r["start_s"] - r["arrived_s"])
        assert r["ttft_s"] > r["queue_s"] >= 0
        assert r["ttft_s"] + sum(r["itl_s"]) == pytest.approx(r["latency_s"], abs=0.01)
        assert len(r["itl_s"]) == r["output_tokens"] - 1
    busy_s = reached_s = 0.0
    for r in sorted(own, key=lambda r: r["arrived_s"]):
        busy_s += max(0.0, r["end_s"] - max(r["arrived_s"], reached_s))
        reached_s = max(reached_s, r["end_s"])
    assert row["idle_share"] == pytest.approx(1 - busy_s / row["duration_s"])
    assert row["duration_s"] >= due[-1]
    good = sum(r["ttft_s"] <= 5 for r in own)
    assert row["goodput_requests_per_s"] == pytest.approx(good / row["duration_s"])


@needs_vllm
def test_run_in_which_tokens_come_together(tmp_path):
    # This needs a separate process, because vLLM 0.32 cannot load a second engine where numba has been imported.
    speculation = ("method=ngram", "num_speculative_tokens=3", "prompt_lookup_max=4", "prompt_lookup_min=2")
    options = [f"backend.speculative.{option}" for option in speculation]
    results = completed(*options, "--streaming", "--max-tokens", "48", cwd=tmp_path)
    own = rows(results)
    assert any(r["itl_spread"] for r in own)
    for r in own:
        gaps = r["itl_s"]
        assert len(gaps) == r["output_tokens"] - 1, "of tokens, not of chunks"
        assert sum(gaps) == pytest.approx(r["latency_s"] - r["ttft_s"], abs=1e-3)
        assert r["tpot_s"] == pytest.approx(sum(gaps) / len(gaps))
        # The tokens of a chunk share the time since the previous chunk, so that neighbours have similar times.
        assert any(a == b for a, b in pairwise(gaps)) == r["itl_spread"]
    counts = check_drafts(raw_record(results), "ngram", 3)
    assert counts["generation_tokens"] == sum(r["output_tokens"] for r in own)
    (row,) = pq.read_table(results / "experiments").to_pylist()
    every = sorted(gap for r in own for gap in r["itl_s"])
    assert row["itl_mean_s"] == pytest.approx(sum(every) / len(every))
    assert row["itl_p99_s"] <= every[-1]


@needs_vllm
def test_run_on_two_workers(tmp_path):
    options = ("parallelism.strategy=tensor_parallel", "parallelism.degree=2", "batching.batch_size=4")
    results = completed(*options, "--max-tokens", "24", cwd=tmp_path, **TWO_WORKERS)
    record = raw_record(results)
    assert record["world_size"] == 1
    assert record["engine"]["settings"]["tensor_parallel_size"] == "2"
    assert record["memory"]["scope"] == "process and its 2 workers, since their start"
    assert len(rows(results)) == 12


@needs_vllm
def test_run_on_two_replicas(tmp_path):
    options = ("num_processes=2", "parallelism.strategy=data_parallel", "parallelism.degree=2", "batching.batch_size=2")
    results = completed(*options, cwd=tmp_path)
    assert [raw_record(results, rank)["requests_completed"] for rank in (0, 1)] == [6, 6]
    assert {row["rank"] for row in rows(results)} == {0, 1}


def fails(*options, cwd, **env):
    """Run a case that fails while loading: exit code 1, a record, one sentence, no process left; return its error."""
    import psutil

    process = begin(*COMMON, *options, cwd=cwd, **env)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        kill_group(process)
    record = raw_record(cwd / "results")
    assert (process.returncode, record["status"], record["requests_completed"]) == (1, "failed", 0), out + err
    assert "Traceback" not in out + err
    assert record["error"]["message"] in " ".join((out + err).split())
    assert not [p for p in psutil.process_iter() if os.getsid(p.pid) == process.pid]
    return record["error"]


@needs_vllm
def test_too_large_a_cache_is_a_failed_run(tmp_path):
    error = fails("backend.kv_cache_memory_bytes=1125899906842624", cwd=tmp_path)
    assert error["type"] == "RunError"
    assert re.search(r"could not load tiny: .* Set backend.gpu_memory_utilization", error["message"])


@needs_vllm
def test_a_model_that_vllm_does_not_know_is_a_failed_run(tmp_path):
    model = shutil.copytree(find("tiny").path, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    error = fails("-m", str(model), cwd=tmp_path)
    assert "NobodysForCausalLM" in error["message"]


@needs_vllm
def test_heads_that_are_too_narrow_are_refused(lem, tmp_path):
    model = shutil.copytree(find("tiny").path, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"head_dim": 16, "num_attention_heads": 16}))
    finished = lem(*COMMON, "-m", str(model))
    assert (finished.code, "[head_size_on_cpu]" in finished.err) == (2, True)


@needs_vllm
def test_an_interrupted_run_is_continued(tmp_path):
    process = begin(*COMMON, *LONG, cwd=tmp_path)
    wait_for(process, "Prompts 4/")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    record = raw_record(tmp_path / "results")
    assert (record["status"], record["error"]["type"]) == ("interrupted", "Interrupted")
    assert command("experiment", "--resume", record["experiment_id"], "-y", cwd=tmp_path).code == 0
    assert {row["attempt"] for row in rows(tmp_path / "results")} == {1, 2}
    assert [row["request"] for row in rows(tmp_path / "results")] == list(range(12))


@needs_vllm
def test_a_worker_that_dies_ends_the_run_and_leaves_no_process(tmp_path):
    import psutil

    spread_out = ("parallelism.strategy=tensor_parallel", "parallelism.degree=2")
    process = begin(*COMMON, *LONG, *spread_out, cwd=tmp_path, **TWO_WORKERS)
    try:
        wait_for(process, "Prompts 2/")
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [each for each in family if "Worker" in " ".join(each.cmdline())]
        assert len(workers) == 2
        os.kill(workers[-1].pid, signal.SIGKILL)
        out, err = process.communicate(timeout=90)
    finally:
        kill_group(process)
    assert process.returncode == 1
    assert re.search("one of its worker processes has died", out + err)
    assert "Traceback" not in out + err
    assert raw_record(tmp_path / "results")["requests_completed"] >= 2
    assert psutil.wait_procs(family, timeout=20)[1] == []
