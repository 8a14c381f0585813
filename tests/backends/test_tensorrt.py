"""The tensorrt backend, tested on the stand-in: its calls of TensorRT-LLM, and its handling of the responses.

The stand-in's arguments are those of the published source, so that an option that does not exist there fails here too.
The contract of all backends is in test_backends.py.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import fields, replace
from itertools import pairwise

import psutil
import pyarrow.parquet as pq
import pytest

from lem.backends import make_backend, tensorrt, tensorrt_source
from lem.backends.tensorrt_options import DIRECT, PARTS, Adapter, engine_arguments, sampling_parameters
from lem.errors import RunError
from lem.machine import processes
from lem.spec.engines import TensorrtBackend, TensorrtKvCache, TensorrtScheduler, TensorrtSpeculation
from lem.spec.experiment import Batching, Decoder, Experiment, Streaming
from lem.spec.processes import gpus_needed, process_counts
from lem.workload.models import Model, find
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
from tests.backends.test_vllm import spread
from tests.conftest import begin, command, kill_group, raw_record, wait_for
from tests.nvml_standin import environment, scenario
from tests.tensorrt_standin.build import build
from tests.tensorrt_standin.extract import SIGNATURES, extract

pytestmark = pytest.mark.engines

TINY = Experiment(
    model="tiny",
    fp_precision="float32",
    max_output_tokens=16,
    batching=Batching(batch_size=4),
    backend=TensorrtBackend(),
)
SAMPLING = Decoder(do_sample=True, temperature=0.7, top_k=5, top_p=0.9, min_p=0.05)
NGRAM = TensorrtSpeculation(decoding_type="NGram", max_draft_len=3, max_matching_ngram_size=4)
MODEL = Model("owner/name", "owner/name", "v1", {"dtype": "bfloat16"})
END = frozenset([7, 2])
STREAMING = Streaming(enabled=True)
FP8_CACHE = TensorrtKvCache(dtype="fp8")


def experiment(*, engine=None, **options):
    return replace(TINY, backend=replace(TensorrtBackend(), **(engine or {})), **options)


@pytest.fixture(autouse=True)
def installed(tensorrt_standin):
    """Replace TensorRT-LLM with its stand-in in all of these tests."""


# ------------------------------------------------------------------ translation, without the engine
def arguments(*, adapter=None, **options):
    return engine_arguments(experiment(**options), MODEL, adapter)


def test_what_is_null_is_left_to_tensorrt():
    own = {
        "model", "revision", "tokenizer_revision", "skip_tokenizer_init", "trust_remote_code", "dtype",
        "max_batch_size", "return_perf_metrics",
    }  # fmt: skip
    assert set(engine_arguments(Experiment(backend=TensorrtBackend()), MODEL, None)) == own


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"trust_remote_code": True}, "trust_remote_code", True),
        ({"batching": Batching(batch_size=33)}, "max_batch_size", 33),
        ({"parallelism": spread("tensor", 4)}, "tensor_parallel_size", 4),
        ({"parallelism": spread("pipeline", 4)}, "pipeline_parallel_size", 4),
        ({}, "revision", "v1"),
        ({"fp_precision": "auto"}, "dtype", "bfloat16"),
        ({"fp_precision": "float16"}, "dtype", "float16"),
        (
            {"adapter": Adapter("folder", 9)},
            "lora_config",
            {"lora_dir": ["folder"], "max_lora_rank": 9, "max_loras": 1, "max_cpu_loras": 1},
        ),
        ({"engine": {"cuda_graphs": False}}, "cuda_graph_config", None),
        ({"engine": {"cuda_graphs": True}}, "cuda_graph_config", {}),
        (
            {"engine": {"kv_cache": FP8_CACHE, "extra_args": {"kv_cache_config": {"use_uvm": True}}}},
            "kv_cache_config",
            {"dtype": "fp8", "use_uvm": True},
        ),
    ],
)  # fmt: skip
def test_options_become_arguments(options, name, value):
    assert arguments(**options)[name] == value


def test_replicas_are_lems_own_and_one_process_spreads_a_model():
    assert "tensor_parallel_size" not in arguments(parallelism=spread("data"))
    assert process_counts(experiment(parallelism=spread("data", 3))) == (3, 3)
    for strategy in ("tensor", "pipeline"):
        wanted = experiment(parallelism=spread(strategy, 4))
        assert (process_counts(wanted), gpus_needed(wanted)) == ((1, 1), 4)


def test_greedy_decoding_asks_for_nothing_that_could_be_random():
    asked = sampling_parameters(replace(TINY, min_output_tokens=3), 5, frozenset([2]))
    assert asked == {
        "max_tokens": 16, "min_tokens": 3, "end_id": 2, "pad_id": 2, "detokenize": False, "return_perf_metrics": True,
    }  # fmt: skip


def test_of_several_end_tokens_the_others_stop_as_words_that_are_kept():
    asked = sampling_parameters(TINY, 5, END)
    assert (asked["end_id"], asked["stop_token_ids"], asked["include_stop_str_in_output"]) == (2, [7], True)
    assert sampling_parameters(TINY, 5, frozenset())["end_id"] == -1


def test_sampling_is_passed_on_and_zero_top_k_stays_all():
    asked = sampling_parameters(replace(TINY, decoder=SAMPLING), 5, END)
    names = ("temperature", "top_k", "top_p", "min_p")
    assert [asked[name] for name in names] == [0.7, 5, 0.9, 0.05]
    plain = sampling_parameters(replace(TINY, decoder=Decoder(do_sample=True)), 5, END)
    assert [plain.get(name) for name in names] == [1.0, 0, 1.0, None]


def test_each_prompt_of_each_experiment_has_a_seed_of_its_own():
    check_seeds_differ(
        lambda seed, index: sampling_parameters(replace(TINY, decoder=SAMPLING, seed=seed), index, END), below=2**64
    )


# ------------------------------------------------------------------ the installed version
def test_the_source_says_what_the_package_itself_does():
    from tensorrt_llm.llmapi import llm_args

    assert set(tensorrt_source.arguments()) == set(llm_args.TorchLlmArgs.model_fields)
    assert set(tensorrt_source.arguments("KvCacheConfig")) == set(llm_args.KvCacheConfig.model_fields)
    inherited = set(llm_args.Eagle3DecodingConfig.model_fields)
    assert set(tensorrt_source.arguments("Eagle3DecodingConfig")) == inherited > {"sa_config", "eagle_choices"}
    assert {"NGram", "Draft_Target", "Eagle3", "MTP"} <= set(tensorrt_source.decoding_types())
    policies = tuple(policy.value for policy in llm_args.CapacitySchedulerPolicy)
    assert tensorrt_source.choices("capacity_scheduler_policy", "SchedulerConfig") == policies
    assert tensorrt_source.version() == "1.0+standin"


def test_the_stand_in_has_the_declarations_that_were_read(tensorrt_folder):
    read = json.loads(SIGNATURES.read_text())
    again = extract(tensorrt_folder / "tensorrt_llm", read["version"])
    for file, definitions in read.pop("classes").items():
        assert names_in(again["classes"][file]) == names_in(definitions)
    assert {name: again[name] for name in read} == read


def names_in(definitions):
    """Return the names of the fields, members and nested classes of classes."""
    return {
        d["class"]: [*d.get("fields", ()), *d.get("members", ()), names_in(d.get("classes", ()))]
        for d in definitions
        if "class" in d
    }


def test_an_argument_that_is_not_there_fails_on_the_stand_in_as_well():
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi.llm_args import NGramDecodingConfig

    with pytest.raises(ValueError, match="max_modell_len"):
        LLM(model="tiny", max_modell_len=3)
    with pytest.raises(ValueError, match="block_size"):
        LLM(model="tiny", kv_cache_config={"block_size": 3})
    with pytest.raises(ValueError, match="speculative_model_directory"):
        NGramDecodingConfig(max_draft_len=3, speculative_model_directory="x")
    with pytest.raises(TypeError, match="top_n"):
        SamplingParams(top_n=3)


def test_a_former_name_of_an_argument_is_used_where_it_is_the_only_one(tmp_path, monkeypatch):
    from lem.backends.tensorrt_options import speculative_class

    config = {"decoding_type": "Draft_Target", "max_draft_len": 2, "speculative_model": "draft"}
    assert speculative_class(config) == (
        "DraftTargetDecodingConfig",
        {"max_draft_len": 2, "speculative_model": "draft"},
    )
    folder = build(tmp_path)
    file = folder / "tensorrt_llm/llmapi/llm_args.py"
    file.write_text(file.read_text().replace("speculative_model:", "speculative_model_dir:"))
    monkeypatch.syspath_prepend(folder)
    assert speculative_class(config)[1] == {"max_draft_len": 2, "speculative_model_dir": "draft"}


# ------------------------------------------------------------------ the loaded engine
@pytest.fixture
def loaded(fresh, monkeypatch, tmp_path):
    """Load backends, and close them at the end; keywords become options of the stand-in."""

    def load(wanted, **standin):
        monkeypatch.setenv("TENSORRT_STANDIN", json.dumps(standin))
        monkeypatch.setenv("TENSORRT_STANDIN_LOG", str(tmp_path / "calls.jsonl"))
        return fresh(wanted)

    return load


def calls(tmp_path, name):
    lines = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    return [arguments for call, arguments in lines if call == name]


ARRIVALS = [
    ({"max_seq_len": 640}, "max_seq_len", 640),
    ({"max_num_tokens": 5000}, "max_num_tokens", 5000),
    ({"attn_backend": "FLASHINFER"}, "attn_backend", "FLASHINFER"),
    ({"chunked_prefill": True}, "enable_chunked_prefill", True),
    ({"overlap_scheduler": False}, "disable_overlap_scheduler", True),
    ({"cuda_graphs": False}, "cuda_graph_config", None),
    ({"force_dynamic_quantization": True}, "force_dynamic_quantization", True),
    ({"moe_expert_parallel_size": 2}, "moe_expert_parallel_size", 2),
    ({"kv_cache": TensorrtKvCache(free_gpu_memory_fraction=0.37)}, "kv_cache_config.free_gpu_memory_fraction", 0.37),
    ({"kv_cache": TensorrtKvCache(max_tokens=999)}, "kv_cache_config.max_tokens", 999),
    ({"kv_cache": TensorrtKvCache(dtype="fp8")}, "kv_cache_config.dtype", "fp8"),
    ({"kv_cache": TensorrtKvCache(tokens_per_block=64)}, "kv_cache_config.tokens_per_block", 64),
    ({"kv_cache": TensorrtKvCache(enable_block_reuse=False)}, "kv_cache_config.enable_block_reuse", False),
    ({"kv_cache": TensorrtKvCache(host_cache_size=2**30)}, "kv_cache_config.host_cache_size", 2**30),
    (
        {"scheduler": TensorrtScheduler(capacity_scheduler_policy="MAX_UTILIZATION")},
        "scheduler_config.capacity_scheduler_policy.value",
        "MAX_UTILIZATION",
    ),
    (
        {"scheduler": TensorrtScheduler(context_chunking_policy="EQUAL_PROGRESS")},
        "scheduler_config.context_chunking_policy.value",
        "EQUAL_PROGRESS",
    ),
    ({"speculative": NGRAM}, "speculative_config.decoding_type", "NGram"),
    ({"speculative": NGRAM}, "speculative_config.max_draft_len", 3),
    ({"speculative": NGRAM}, "speculative_config.max_matching_ngram_size", 4),
    (
        {"speculative": TensorrtSpeculation(decoding_type="Draft_Target", max_draft_len=1, speculative_model="draft")},
        "speculative_config.speculative_model",
        "draft",
    ),
    ({"extra_args": {"stream_interval": 4}}, "stream_interval", 4),
    ({"extra_args": {"moe_config": {"backend": "TRITON"}}}, "moe_config.backend", "TRITON"),
    (
        {"extra_args": {"speculative_config": {"decoding_type": "MTP", "max_draft_len": 1, "relaxed_topk": 2}}},
        "speculative_config.relaxed_topk",
        2,
    ),
]


@pytest.mark.parametrize(("engine", "path", "value"), ARRIVALS, ids=lambda v: v if isinstance(v, str) else "")
def test_an_engine_option_arrives(loaded, engine, path, value):
    found = loaded(experiment(engine=engine))._loaded.engine.args
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_every_option_has_its_arrival():
    asked = [engine for engine, *_ in ARRIVALS]
    assert {name for engine in asked for name in engine} == {*DIRECT, *PARTS, "extra_args"}
    for part, kind in {
        "kv_cache": TensorrtKvCache,
        "scheduler": TensorrtScheduler,
        "speculative": TensorrtSpeculation,
    }.items():
        set_somewhere = {
            f.name
            for engine in asked
            if part in engine
            for f in fields(kind)
            if getattr(engine[part], f.name) is not None
        }
        assert set_somewhere == {f.name for f in fields(kind)}


def test_what_is_recorded_of_a_call(loaded, texts, tmp_path):
    wanted = replace(TINY, decoder=SAMPLING, parallelism=spread("tensor"), streaming=STREAMING, seed=3)
    backend = loaded(wanted)
    run(backend, texts[:1])
    (llm,), (call,) = calls(tmp_path, "LLM"), calls(tmp_path, "generate_async")
    assert (llm["tensor_parallel_size"], llm["max_batch_size"], llm["skip_tokenizer_init"]) == (2, 4, True)
    assert call["inputs"] == list(backend.encode(texts[:1])[0].token_ids)
    assert (call["streaming"], call["cache_salt"], call["sampling_params"]["seed"]) == (True, "window 1", 3 * 2**31)
    assert call["sampling_params"]["detokenize"] is False


@pytest.fixture(scope="module")
def ending(tmp_path_factory, texts):
    """Return a copy of tiny with one end token, which greedy decoding meets in about half of the outputs."""
    folder = tmp_path_factory.mktemp("model") / "ending"
    shutil.copytree(find("tiny").path, folder)
    backend = make_backend(on_pytorch(TINY))
    backend.start()
    backend.load()
    seen = [g.token_ids for g in run(backend, texts[:8]).values()]
    met = max({t for ids in seen for t in ids}, key=lambda token: sum(token in ids[:-2] for ids in seen))
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": met}))
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decoder": Decoder(repetition_penalty=1.3)},
        {"decoder": Decoder(no_repeat_ngram_size=1)},
        {"chat_template": True},
        {"min_output_tokens": 9},
    ],
    ids=["greedy", "penalty", "bans", "chat", "least"],
)
@pytest.mark.parametrize("keep", [True, False], ids=["", "end token kept back"])
def test_it_gives_the_tokens_that_pytorch_gives(loaded, texts, ending, options, keep):
    wanted = replace(TINY, model=ending, **options)
    here, there = loaded(wanted, keep_end_token=keep), loaded(on_pytorch(wanted))
    assert here.encode(texts) == there.encode(texts)
    mine = check_same_output(here, there, texts, 8)
    if not options:
        assert {g.finish_reason for g in mine.values()} == {"stop", "length"}


def test_an_adapter_changes_tokens_and_flops_as_on_pytorch(loaded, texts, tmp_path):
    wanted = replace(TINY, adapter=str(models_for_tests.adapter(tmp_path / "adapter", find("tiny").path)))
    here, there = loaded(wanted), loaded(on_pytorch(wanted))
    mine = tokens(check_same_output(here, there, texts, 4))
    assert mine != tokens(run(loaded(TINY), texts[:4]))
    assert {call["lora_request"] for call in calls(tmp_path, "generate_async")} == {wanted.adapter, None}


def test_continuous_batching_fills_places_as_they_become_free(loaded, texts):
    backend = loaded(replace(TINY, batching=Batching(strategy="continuous", batch_size=3)))
    check_places_are_filled(backend, texts, began_ns=lambda g: g.start_ns)


def test_where_the_engine_does_not_report_it_a_request_begins_when_there_is_a_place_for_it(loaded, texts):
    wanted = replace(TINY, batching=Batching(strategy="continuous", batch_size=3))
    backend = loaded(wanted, no_metrics=True)
    done = sorted((g for batch in backend.generate(backend.encode(texts[:9])) for g in batch), key=lambda g: g.index)
    ends_ns = sorted(g.end_ns for g in done)
    assert max(g.start_ns for g in done[:3]) < ends_ns[0]
    assert all(g.start_ns >= ends_ns[g.index - 3] for g in done[3:])


def test_requests_that_arrive_while_others_run_are_taken_in(loaded, texts):
    backend = loaded(replace(TINY, batching=Batching(strategy="continuous", batch_size=64)), step_s=0.05)
    check_arrivals_are_taken_in(backend, backend.encode(texts)[:6], [0.01 * i for i in range(5)] + [3.0])


def test_a_fixed_concurrency_is_never_exceeded(loaded, texts):
    check_concurrency(loaded(replace(TINY, batching=Batching(strategy="continuous", batch_size=64))), texts)


def test_requests_that_are_no_longer_waited_for_are_cancelled(loaded, texts):
    two_at_a_time = replace(TINY, batching=Batching(strategy="continuous", batch_size=2))
    check_cancelled(loaded(two_at_a_time, step_s=0.01), texts)


# ------------------------------------------------------------------ times and counts
@pytest.mark.parametrize("strategy", ["static", "continuous"])
def test_each_token_is_timed_and_is_the_same_token(loaded, texts, strategy):
    wanted = replace(TINY, batching=Batching(strategy=strategy, batch_size=4))
    plain, timed = run(loaded(wanted), texts[:8]), run(loaded(replace(wanted, streaming=STREAMING)), texts[:8])
    assert tokens(timed) == tokens(plain)
    assert not any(g.chunks for g in plain.values())
    for g in timed.values():
        assert [chunk.tokens for chunk in g.chunks] == [1] * len(g.token_ids)
        moments = [chunk.at_ns for chunk in g.chunks]
        assert moments == sorted(moments)
        assert g.start_ns < g.prefill_end_ns <= moments[0] < moments[-1] == g.end_ns


@pytest.mark.parametrize("engine", [{"speculative": NGRAM}, {"extra_args": {"stream_interval": 4}}])
def test_tokens_that_come_together_are_counted_one_by_one(loaded, texts, engine):
    done = run(loaded(experiment(engine=engine, streaming=STREAMING)), texts[:4])
    assert tokens(done) == tokens(run(loaded(TINY), texts[:4]))
    for g in done.values():
        assert sum(chunk.tokens for chunk in g.chunks) == len(g.token_ids) == 16
        assert max(chunk.tokens for chunk in g.chunks) == 4


def test_an_end_token_that_is_kept_back_has_its_time(loaded, texts, ending):
    wanted = replace(TINY, model=ending, streaming=STREAMING)
    done = run(loaded(wanted, keep_end_token=False), texts[:8])
    for g in done.values():
        assert sum(chunk.tokens for chunk in g.chunks) == len(g.token_ids)
    assert any(g.finish_reason == "stop" for g in done.values())


def test_what_the_engine_does_not_report_is_unknown(loaded, texts):
    backend = loaded(TINY, no_metrics=True)
    before_ns = time.perf_counter_ns()
    done = run(backend, texts[:4])
    assert all(not g.start_is_known and g.prefill_end_ns is None for g in done.values())
    assert all(before_ns <= g.start_ns < g.end_ns for g in done.values())
    assert set(backend.counters()) == {"prefix_cache_hit_tokens", "prefix_cache_queried_tokens"}


def test_times_of_another_clock_are_not_believed(loaded, texts, monkeypatch):
    monkeypatch.setattr(tensorrt.engine, "clock_offset_ns", lambda: 10**12)
    backend = loaded(TINY)
    assert not any(g.start_is_known for g in run(backend, texts[:4]).values())


def test_the_engines_counts(loaded, texts):
    backend = loaded(experiment(engine={"speculative": NGRAM}))
    assert backend.counters() is None  # nothing has run, which must not read as 0
    prompts, done = backend.encode(texts[:4]), run(backend, texts[:4])
    counts = backend.counters()
    assert counts["prefix_cache_queried_tokens"] == sum(len(p.token_ids) for p in prompts)
    assert counts["decoding_steps"] == 4 * len(done)
    assert (counts["draft_tokens"], counts["accepted_draft_tokens"]) == (48, 48)
    backend.forget()
    assert backend.counters() is None


def test_a_warm_up_leaves_no_prefix_behind_and_hits_are_reported(loaded, texts):
    backend = loaded(TINY)
    alike = [texts[0] * 3 + text for text in texts[:3]]
    run(backend, alike[:1])
    backend.forget()
    run(backend, alike[:1])
    assert backend.counters()["prefix_cache_hit_tokens"] == 0
    assert "prefix_cached" not in [each.code for each in backend.warnings()]
    run(backend, alike)
    assert backend.counters()["prefix_cache_hit_tokens"] > 0
    assert "prefix_cached" in [each.code for each in backend.warnings()]


def test_settings_are_those_that_the_engine_has_settled_on(loaded):
    options = {"max_seq_len": 512, "kv_cache": TensorrtKvCache(tokens_per_block=64), "overlap_scheduler": False}
    settings = loaded(experiment(engine=options)).engine_info().settings
    expected = {
        "dtype": "float32",
        "kv_cache_config.tokens_per_block": "64",
        "max_batch_size": "4",
        "max_seq_len": "512",
        "attn_backend": "TRTLLM",
        "disable_overlap_scheduler": "on",
        "scheduler_config.capacity_scheduler_policy": "GUARANTEED_NO_EVICT",
        "end_token_ids": "2",
    }
    assert {name: settings[name] for name in expected} == expected


# ------------------------------------------------------------------ failures
@pytest.mark.parametrize(
    ("engine", "standin", "words"),
    [
        (
            {},
            {"load_error": "CUDA out of\nmemory"},
            "could not load tiny: CUDA out of memory. Set backend.kv_cache.free",
        ),
        ({}, {"load_error": "Unknown architecture X"}, "could not load tiny: Unknown architecture X.$"),
        ({"extra_args": {"stream_interval": -1}}, {}, "could not load tiny: Input should be greater than 0"),
        ({"extra_args": {"attention": 1}}, {}, "could not load tiny: Extra inputs are not permitted"),
    ],
)
def test_what_the_engine_refuses_is_reported_in_a_sentence(loaded, engine, standin, words):
    with pytest.raises(RunError, match=words) as caught:
        loaded(experiment(engine=engine), **standin)
    assert "\n" not in str(caught.value)


def test_an_option_that_the_engine_changes_is_refused(loaded):
    with pytest.raises(RunError, match="attn_backend is FLASHINFER, but TensorRT-LLM uses VANILLA"):
        loaded(experiment(engine={"attn_backend": "FLASHINFER"}), changes={"attn_backend": "VANILLA"})


def test_a_prompt_that_no_step_can_take_in_is_refused(loaded, texts):
    backend = loaded(experiment(engine={"max_num_tokens": 20}))
    with pytest.raises(RunError, match=r"a step processes at most 20\. Set backend.chunked_prefill=true"):
        backend.encode(texts)
    loaded(experiment(engine={"max_num_tokens": 20, "chunked_prefill": True})).encode(texts)


def test_an_engine_that_stops_leaves_what_can_still_be_reported(loaded, texts):
    backend = loaded(TINY, error_after=20)
    with pytest.raises(RunError, match=r"failed during the run: CUDA error: an illegal memory access"):
        run(backend, texts)
    backend.synchronize()
    assert backend.model_info().parameters > 0
    assert backend.peak_memory().scope
    assert backend.engine_info().settings["attn_backend"] == "TRTLLM"


def test_a_request_that_the_engine_does_not_take_is_reported(loaded, texts, monkeypatch):
    backend = loaded(TINY)
    monkeypatch.setattr(backend._loaded.engine.args, "max_num_tokens", 1)
    prompts = [replace(p, index=p.index + 3) for p in loaded(TINY).encode(texts[:1])]
    with pytest.raises(RunError, match="rejects prompt 3: The sum of prompt length"):
        list(backend.generate(prompts))


@pytest.mark.processes
def test_a_process_that_dies_is_noticed_and_none_is_left(loaded, texts):
    backend = loaded(TINY, process=True, die_after=20)
    (process,) = backend._llm.processes
    with pytest.raises(RunError, match="one of its processes has died"):
        run(backend, texts)
    backend.close()
    assert not processes.is_alive(process)


@pytest.mark.processes
def test_an_engine_that_does_not_answer_is_given_up_and_ended(loaded, texts, monkeypatch):
    monkeypatch.setattr(tensorrt, "SILENCE_S", -14.0)  # seconds; one is added for each output token
    backend = loaded(TINY, process=True, hang_after=20)
    (process,) = backend._llm.processes
    began = time.monotonic()
    with pytest.raises(RunError, match="is not responding: it has sent nothing"):
        run(backend, texts)
    backend.close()
    assert not processes.is_alive(process)
    assert time.monotonic() - began < 60


# ------------------------------------------------------------------ whole runs
ON_GPUS = "devices 2\n" + "".join(f"device {i} power constant 200\ndevice {i} memory_mib 81920 1024\n" for i in (0, 1))
COMMON = (
    "experiment", "--backend", "tensorrt", "-m", "tiny", "-d", "sample", "-n", "12", "-y", "energy.idle_s=0.2",
    "fp_precision=bfloat16", "--max-tokens", "16",
)  # fmt: skip


@pytest.fixture
def machine(standin, tmp_path, tensorrt_standin):
    """Return the environment of a machine with two GPUs, on which the stand-in replaces TensorRT-LLM."""

    def variables(**options):
        with_gpus = environment(standin, scenario(tmp_path / "scenario.txt", ON_GPUS))
        log = str(tmp_path / "calls.jsonl")
        return with_gpus | {"TENSORRT_STANDIN": json.dumps(options), "TENSORRT_STANDIN_LOG": log}

    return variables


@pytest.mark.processes
def test_run_in_cycles_with_continuous_batching(machine, tmp_path):
    options = ("batching.strategy=continuous", "batching.batch_size=4", "cycles=2", "backend.kv_cache.dtype=fp8")
    done = command(*COMMON, *options, cwd=tmp_path, **machine(process=True))
    assert done.code == 0, done.out + done.err
    (row,) = pq.read_table(tmp_path / "results" / "experiments").to_pylist()
    assert row["energy_j"] == pytest.approx(200 * row["duration_s"], rel=0.03)
    assert (row["backend"], row["energy_source"], row["peak_memory_bytes"]) == ("tensorrt", "counter", 2**30)
    for cycle in (1, 2):
        record = raw_record(tmp_path / "results", cycle=cycle)
        own = [r for r in rows(tmp_path / "results") if r["cycle"] == cycle]
        assert (record["status"], len(own)) == ("completed", 12)
        assert record["counters"]["prefix_cache_hit_tokens"] == 0
        assert record["engine"]["settings"]["kv_cache_config.dtype"] == "fp8"
        assert {(r["queue_s"], r["arrived_s"]) for r in own} == {(None, None)}  # nothing arrives
        assert record["flops"]["total"] > 0
    assert record["environment"]["versions"]["tensorrt-llm"] == "1.0+standin"
    assert {call["cache_salt"] for call in calls(tmp_path, "generate_async")} == {f"window {i}" for i in range(3)}


@pytest.mark.processes
def test_run_with_poisson_arrivals_and_tokens_that_come_together(machine, tmp_path):
    options = (
        "batching.strategy=continuous", "batching.batch_size=4", "--streaming", "traffic.pattern=poisson",
        "traffic.target_qps=8", "backend.speculative.decoding_type=NGram", "backend.speculative.max_draft_len=3",
    )  # fmt: skip
    done = command(*COMMON, *options, cwd=tmp_path, **machine(process=True))
    assert done.code == 0, done.out + done.err
    for r in rows(tmp_path / "results"):
        assert r["itl_spread"]
        assert len(r["itl_s"]) == r["output_tokens"] - 1 == 15, "of tokens, not of chunks"
        assert r["ttft_s"] + sum(r["itl_s"]) == pytest.approx(r["latency_s"], abs=1e-3)
        assert r["ttft_s"] > r["queue_s"] >= 0
        assert any(a == b for a, b in pairwise(r["itl_s"]))


@pytest.mark.processes
def test_a_run_without_the_engines_times_has_no_queue(machine, tmp_path):
    options = ("batching.strategy=continuous", "batching.batch_size=4")
    done = command(*COMMON, *options, cwd=tmp_path, **machine(no_metrics=True))
    assert done.code == 0, done.out + done.err
    assert [(r["queue_s"], r["prefill_s"]) for r in rows(tmp_path / "results")] == [(None, None)] * 12


@pytest.mark.processes
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("fp_precision=float32", "most of TensorRT-LLM's kernels do not support float32"),
        ("fp_precision=auto", "the checkpoint is in float32"),
        ("backend.extra_args={stream_intervall: 2}", "no argument stream_intervall. Did you mean 'stream_interval'"),
        ("backend.extra_args={use_cuda_graph: true}", "no longer has use_cuda_graph; use backend.cuda_graphs"),
        ("num_processes=3", "GPUs needed: 3, visible: 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(machine, tmp_path, option, words):
    done = command(*COMMON, option, cwd=tmp_path, **machine())
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "results").exists()


@pytest.mark.processes
def test_without_a_gpu_or_the_package_it_says_so(tmp_path):
    done = command(*COMMON, cwd=tmp_path, PYTHONPATH="")
    assert done.code == 2
    assert "pip install 'lem[tensorrt]'" in done.err
    assert "runs only on NVIDIA GPUs" in done.err


@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_error": "CUDA out of memory"}, "TensorRT-LLM could not load tiny: CUDA out of memory"),
        ({"error_after": 60, "process": True}, "failed during the run: CUDA error"),
        ({"die_after": 60, "process": True}, "one of its processes has died"),
    ],
)
def test_a_failed_run_leaves_a_record_and_no_process(machine, tmp_path, options, words):
    process = begin(*COMMON, "batching.batch_size=2", cwd=tmp_path, **machine(**options))
    try:
        out, err = process.communicate(timeout=200)
    finally:
        kill_group(process)
    assert process.returncode == 1
    assert "Traceback" not in out + err
    record = raw_record(tmp_path / "results")
    assert (record["status"], record["error"]["type"]) == ("failed", "RunError")
    assert words in record["error"]["message"]
    assert not left_over(tmp_path)


@pytest.mark.processes
def test_an_interrupted_run_leaves_no_process(machine, tmp_path):
    options = ("--max-tokens", "3000", "batching.batch_size=1")
    process = begin(*COMMON, *options, cwd=tmp_path, **machine(process=True, step_s=0.02))
    try:
        wait_for(process, "Warm-up")
        process.terminate()
        process.communicate(timeout=60)
    finally:
        kill_group(process)
    assert process.returncode == 130
    assert raw_record(tmp_path / "results")["status"] == "interrupted"
    assert not left_over(tmp_path)


def left_over(folder):
    """Return the processes that are still running in a folder."""
    until = time.monotonic() + 10
    while True:
        found = []
        for process in psutil.process_iter(["cwd", "status"]):
            if process.info["cwd"] == str(folder) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        if not found or time.monotonic() > until or os.getpid() in [p.pid for p in found]:
            return found
        time.sleep(0.2)
