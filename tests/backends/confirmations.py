"""How each feature of tests/backends/features.py is confirmed: by running it, or by its arrival in the engine.

The support matrix (docs/reference/support.md) takes its terms from here, and test_features.py runs the checks. To add a
backend, add a line to ENGINES if its engine runs on a CPU, or else lines to ARRIVES.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import eq
from pathlib import Path
from typing import Literal

from lem.spec.engines import PytorchBackend, SimulatedBackend, VllmBackend
from lem.spec.experiment import Batching, Experiment
from tests.backends.features import ADAPTER, DRAFT, TRACE, Feature, support
from tests.hosts import PROCESSOR

# Backends whose engine runs in these tests, with the options that it needs to do so.
ENGINES = {
    "pytorch": PytorchBackend(device="cpu"),
    "simulated": SimulatedBackend(prefill_s_per_token=0, decode_s_per_token=1e-4),
    "vllm": VllmBackend(kv_cache_memory_bytes=2**26, enforce_eager=True),
}

# Features that a separate test shows to work on a CPU, because it takes processes, minutes or another model. Paths are
# relative to this folder.
ELSEWHERE = {
    ("openai", "greedy"): "test_openai.py::test_greedy_decoding_leaves_nothing_to_the_servers_defaults",
    ("openai", "continuous batching"): "test_openai.py::test_continuous_batching_keeps_as_many_in_flight",
    ("openai", "streaming"): "test_openai.py::test_tokens_are_timed_as_they_travel",
    ("openai", "Poisson arrivals"): "test_openai.py::test_run_of_poisson_arrivals_at_a_server",
    ("openai", "fixed concurrency"): (
        "test_openai.py::test_a_fixed_concurrency_sends_the_next_one_before_the_last_is_dealt_with"
    ),
    ("openai", "static batches"): "test_openai.py::test_a_batch_is_in_flight_together_and_the_next_one_waits",
    ("openai", "minimum output"): "test_backends.py::test_no_output_is_shorter_than_min_output_tokens",
    ("openai", "maximum output"): "test_backends.py::test_no_output_is_longer_than_max_output_tokens",
    ("openai", "maximum input"): "test_backends.py::test_long_inputs_are_cut_to_their_beginning_and_marked",
    ("openai", "seed"): "test_backends.py::test_same_seed_gives_same_tokens_and_another_seed_gives_others",
    ("openai", "the engine's counters"): "test_openai.py::test_counters_are_those_of_the_window",
    ("pytorch", "several processes"): "../runner/test_parallel.py::test_two_processes_run_each_prompt_exactly_once",
    ("pytorch", "data parallel"): "../runner/test_parallel.py::test_two_processes_run_each_prompt_exactly_once",
    (
        "pytorch",
        "tensor parallel",
    ): "../runner/test_parallel.py::test_a_model_split_over_processes_writes_and_weighs_the_same",
    ("pytorch", "torch.compile"): "test_pytorch.py::test_compiled_model_writes_the_same",
    ("pytorch", "bitsandbytes, 8 bits"): "test_quantization.py::test_quantized_weights_are_smaller_named_and_run",
    ("pytorch", "bitsandbytes, 4 bits"): "test_quantization.py::test_quantized_weights_are_smaller_named_and_run",
    ("simulated", "several processes"): "test_features.py::test_simulated_processes_share_the_prompts",
    ("simulated", "data parallel"): "test_features.py::test_simulated_processes_share_the_prompts",
    ("vllm", "several processes"): "test_vllm.py::test_run_on_two_replicas",
    ("vllm", "data parallel"): "test_vllm.py::test_run_on_two_replicas",
    ("vllm", "tensor parallel"): "test_vllm.py::test_run_on_two_workers",
    ("vllm", "n-gram speculation"): "test_vllm.py::test_run_in_which_tokens_come_together",
    ("vllm", "draft model"): "test_vllm.py::test_a_draft_model_drafts_what_it_would_have_written",
    ("vllm", "EAGLE"): "test_vllm.py::test_eagle_drafts_what_the_model_then_writes",
}

# Features that a test shows only to reach the engine's own configuration.
ARRIVES = {
    ("vllm", name): "test_vllm.py::test_an_engine_option_arrives"
    for name in ("weights in main memory", "the engine's own quantization", "choice of attention kernels",
                 "share of a GPU's memory", "cache in fp8")
} | {("vllm", "pipeline parallel"): "test_vllm.py::test_a_shared_option_arrives"}  # fmt: skip

# Features that a test shows on a stand-in, because the engine itself cannot be installed where the tests run.
ON_A_STAND_IN = {
    ("tensorrt", name): f"test_tensorrt.py::{test}"
    for test, names in {
        "test_an_engine_option_arrives": (
            "choice of attention kernels", "prefix caching", "chunked prefill", "cache in fp8", "block size",
            "share of a GPU's memory", "length of a sequence", "tokens per step", "n-gram speculation",
        ),
        "test_it_gives_the_tokens_that_pytorch_gives": ("greedy", "minimum output", "maximum output"),
        "test_an_adapter_changes_tokens_and_flops_as_on_pytorch": ("LoRA adapter", "model FLOPs"),
        "test_continuous_batching_fills_places_as_they_become_free": ("continuous batching",),
        "test_requests_that_arrive_while_others_run_are_taken_in": ("arrivals with continuous batching",),
        "test_a_fixed_concurrency_is_never_exceeded": ("fixed concurrency",),
        "test_each_token_is_timed_and_is_the_same_token": ("streaming", "streaming, continuous batching"),
        "test_run_with_poisson_arrivals_and_tokens_that_come_together": ("Poisson arrivals",),
        "test_the_engines_counts": ("the engine's counters",),
    }.items()
    for name in names
}  # fmt: skip

Confirmation = Literal["tested", "configured", "stand-in", "not run"]


def confirmation(feature: Feature, backend: str) -> Confirmation:
    """Return how a feature that a backend declares is confirmed."""
    if (backend, feature.name) in ELSEWHERE or is_checked(feature, backend):
        return "tested"
    if (backend, feature.name) in ARRIVES:
        return "configured"
    return "stand-in" if (backend, feature.name) in ON_A_STAND_IN else "not run"


def is_checked(feature: Feature, backend: str) -> bool:
    """Return whether test_features.py runs the feature on the backend's engine."""
    runs = backend in ENGINES and support(feature, backend, PROCESSOR).answer == "yes"
    return runs and feature.name in CHECKS | REPORTS and (backend, feature.name) not in ELSEWHERE


# ------------------------------------------------------------------ a backend to try features on
class Engines:
    """The last loaded backend of each kind, which runs the next experiment too if that needs the same engine.

    Some engines take seconds to start. Two of a kind cannot be loaded at once, because vLLM's counters are global.
    """

    def __init__(self) -> None:
        self._kept: dict = {}

    def loaded(self, experiment: Experiment):
        """Return a backend that has loaded what the experiment needs, without any state from earlier experiments."""
        from lem.backends import make_backend

        kind, made_of = experiment.backend.name, _engine(experiment)
        before, backend = self._kept.pop(kind, (None, None))
        if before != made_of:
            if backend is not None:
                backend.close()
            backend = make_backend(experiment)
            try:
                backend.start()
                backend.load()
            except BaseException:
                backend.close()
                raise
        self._kept[kind] = made_of, backend
        # The options of a request are read when the engine receives it.
        backend._experiment = experiment
        backend.forget()
        return backend

    def close(self) -> None:
        """Close all loaded backends."""
        for _, backend in self._kept.values():
            backend.close()
        self._kept.clear()


def _engine(experiment: Experiment) -> str:
    """Return the options that determine an engine: experiments for which they are equal can share one."""
    if experiment.backend.name != "vllm":
        return repr(experiment)
    from lem.backends.vllm_options import engine_arguments
    from lem.workload.models import find

    rank = None if experiment.adapter is None else 4
    arguments = engine_arguments(experiment, find(experiment.model), on_gpu=False, lora_rank=rank)
    return repr([arguments, experiment.adapter])


@dataclass
class Bench:
    """A backend with a small model and some prompts, on which features are tried."""

    name: str
    model: str
    texts: list[str]
    folder: Path
    engines: Engines
    outputs: dict = field(default_factory=dict)

    @property
    def plain(self) -> Experiment:
        """Return the experiment that uses only defaults."""
        return Experiment(
            model=self.model, fp_precision="float32", max_output_tokens=12, batching=Batching(batch_size=4),
            backend=ENGINES[self.name],
        )  # fmt: skip

    def asks(self, feature: Feature) -> Experiment:
        """Return the experiment that requests a feature, with a real adapter, draft model and trace."""
        changes = feature.asked_of(self.name) or {}
        made = {ADAPTER: self.adapter, TRACE: self.trace, DRAFT: lambda: self.model}
        stand_ins = {
            path.rpartition(".")[2]: made[v]() for path, v in changes.items() if isinstance(v, str) if v in made
        }
        return feature.asked(self.plain, **stand_ins)

    def loaded(self, experiment: Experiment):
        """Return a backend that has loaded what the experiment needs."""
        return self.engines.loaded(experiment)

    def run(self, experiment: Experiment, again: bool = False) -> dict:
        """Return the generations by prompt; those of equal experiments are cached."""
        if again or repr(experiment) not in self.outputs:
            backend = self.loaded(experiment)
            done = [g for batch in backend.generate(backend.encode(self.texts)) for g in batch]
            assert sorted(g.index for g in done) == list(range(len(self.texts)))
            self.outputs[repr(experiment)] = {g.index: g for g in sorted(done, key=lambda g: g.index)}
        return self.outputs[repr(experiment)]

    def tokens(self, experiment: Experiment, again: bool = False) -> list[tuple[int, ...]]:
        """Return the output tokens of each prompt."""
        return [g.token_ids for g in self.run(experiment, again).values()]

    def lengths(self, experiment: Experiment) -> list[int]:
        """Return the number of output tokens of each prompt."""
        return [len(tokens) for tokens in self.tokens(experiment)]

    def inputs(self, experiment: Experiment) -> list[tuple[int, ...]]:
        """Return the input tokens of each prompt."""
        return [p.token_ids for p in self.loaded(experiment).encode(self.texts)]

    def batches(self, experiment: Experiment) -> list[list[int]]:
        """Return the input lengths of each batch, in the order of the batches."""
        lengths, done = list(map(len, self.inputs(experiment))), self.run(experiment).values()
        numbers = sorted({g.batch for g in done})
        return [[lengths[g.index] for g in done if g.batch == number] for number in numbers]

    def settings(self, experiment: Experiment) -> dict[str, str]:
        """Return the engine's resolved settings."""
        return self.loaded(experiment).engine_info().settings

    def served(self, experiment: Experiment, count: int = 5) -> list:
        """Run prompts as they arrive, and return the generations in that order; check that each came on time."""
        from lem.workload.traffic import Arrivals, arrival_times_s

        backend, traffic = self.loaded(experiment), experiment.traffic
        prompts = backend.encode(self.texts)[:count]
        times_s = None if traffic.pattern == "concurrency" else arrival_times_s(traffic, count, experiment.seed)
        opened_ns = time.perf_counter_ns()
        arrivals = Arrivals(prompts, times_s, traffic.concurrency or 1, opened_ns)
        done = [g for some in backend.serve(arrivals, experiment.batching.batch_size) for g in some]
        assert sorted(g.index for g in done) == [p.index for p in prompts]
        assert all(g.arrived_ns <= g.start_ns <= g.end_ns for g in done)
        done.sort(key=lambda g: g.index)
        if times_s is not None:
            assert [g.arrived_ns for g in done] == [opened_ns + round(t * 1e9) for t in times_s]
        return done

    def adapter(self) -> str:
        """Return a LoRA adapter for the model."""
        target = self.folder / "adapter"
        if not target.exists():
            from tests.models_for_tests import adapter

            adapter(target, self.model)
        return str(target)

    def trace(self) -> str:
        """Return a trace of arrivals."""
        file = self.folder / "arrivals.csv"
        file.write_text("t_s\n" + "".join(f"{t}\n" for t in (3.0, 3.0, 3.1, 3.4, 3.5)))
        return str(file)


# ------------------------------------------------------------------ choosing tokens
def greedy(bench: Bench, asked: Experiment) -> None:
    assert bench.tokens(asked)[:3] == by_hand(bench, 3)


def by_hand(bench: Bench, count: int) -> list[tuple[int, ...]]:
    """Take the most likely token of transformers' own model, step by step, until an end token or the limit."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    ends = GenerationConfig.from_pretrained(bench.model).eos_token_id
    outputs = []
    for ids in bench.inputs(bench.plain)[:count]:
        new: list[int] = []
        while len(new) < bench.plain.max_output_tokens and not (new and new[-1] in ends):
            with torch.inference_mode():
                new.append(int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
        outputs.append(tuple(new))
    return outputs


def sampling(bench: Bench, asked: Experiment) -> None:
    assert bench.tokens(asked) != bench.tokens(bench.plain)


def temperature(bench: Bench, asked: Experiment) -> None:
    """The lower the temperature, the more often the most likely token is drawn."""
    at = {t: bench.tokens(decoding(asked, temperature=t)) for t in (0.01, asked.decoder.temperature, 1.0)}
    greedily = [sum(map(eq, tokens, bench.tokens(bench.plain))) for tokens in at.values()]
    assert greedily[0] > greedily[-1]
    assert at[asked.decoder.temperature] != at[1.0]


def _narrowed(name: str, to_one_token: float, off: float):
    """Check an option that restricts the tokens to draw from: at its most restrictive, drawing is greedy."""

    def check(bench: Bench, asked: Experiment) -> None:
        assert bench.tokens(decoding(asked, **{name: to_one_token})) == bench.tokens(bench.plain)
        assert bench.tokens(asked) != bench.tokens(bench.plain)
        assert bench.tokens(asked) != bench.tokens(decoding(asked, **{name: off}))

    return check


def seed(bench: Bench, asked: Experiment) -> None:
    first = bench.tokens(asked)
    assert first == bench.tokens(asked, again=True)
    assert first != bench.tokens(replace(asked, seed=bench.plain.seed))


def repetition_penalty(bench: Bench, asked: Experiment) -> None:
    def repeated(experiment: Experiment) -> int:
        long = replace(experiment, min_output_tokens=48, max_output_tokens=48)
        return sum(len(tokens) - len(set(tokens)) for tokens in bench.tokens(long))

    assert repeated(asked) < repeated(bench.plain)


def no_repeated_ngrams(bench: Bench, asked: Experiment) -> None:
    size = asked.decoder.no_repeat_ngram_size
    for before, new in zip(bench.inputs(asked), bench.tokens(asked), strict=True):
        assert not any(follows(n, (*before, *new)[: len(before) + at]) for at, n in enumerate(ngrams(new, size)))
    # A ban on repeating single tokens, of which greedy decoding repeats some.
    single = decoding(asked, no_repeat_ngram_size=1)
    assert bench.tokens(single) != bench.tokens(bench.plain)
    assert all(len(set(tokens)) == len(tokens) for tokens in bench.tokens(single))


def ngrams(tokens, size):
    return [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]


def follows(ngram, text):
    return ngram in ngrams(text, len(ngram))


def decoding(experiment: Experiment, **options) -> Experiment:
    return replace(experiment, decoder=replace(experiment.decoder, **options))


# ------------------------------------------------------------------ lengths and prompts
def maximum_output(bench: Bench, asked: Experiment) -> None:
    assert max(bench.lengths(asked)) == asked.max_output_tokens < max(bench.lengths(bench.plain))


def minimum_output(bench: Bench, asked: Experiment) -> None:
    assert min(bench.lengths(bench.plain)) < asked.min_output_tokens <= min(bench.lengths(asked))


def maximum_input(bench: Bench, asked: Experiment) -> None:
    limit = asked.max_input_tokens
    assert bench.inputs(asked) == [ids[:limit] for ids in bench.inputs(bench.plain)]
    assert max(map(len, bench.inputs(bench.plain))) > limit


def chat_template(bench: Bench, asked: Experiment) -> None:
    bare, wrapped = bench.inputs(bench.plain), bench.inputs(asked)
    assert all(len(long) > len(short) for long, short in zip(wrapped, bare, strict=True))
    assert bench.tokens(asked) != bench.tokens(bench.plain)


# ------------------------------------------------------------------ batching
def static(bench: Bench, asked: Experiment) -> None:
    lengths = list(map(len, bench.inputs(asked)))
    assert bench.batches(asked) == [lengths[:4], lengths[4:8], lengths[8:]]


def sorted_static(bench: Bench, asked: Experiment) -> None:
    longest_first = sorted(map(len, bench.inputs(asked)), reverse=True)
    assert [sorted(b, reverse=True) for b in bench.batches(asked)] == [
        longest_first[:4], longest_first[4:8], longest_first[8:],
    ]  # fmt: skip


def dynamic(bench: Bench, asked: Experiment) -> None:
    batches, budget = bench.batches(asked), asked.batching.max_tokens_per_batch
    assert all(len(batch) * max(batch) <= budget or len(batch) == 1 for batch in batches)
    assert min(len(batch) for batch in batches[:-1]) < asked.batching.batch_size
    assert max(len(batch) for batch in batches) <= asked.batching.batch_size


def sorted_dynamic(bench: Bench, asked: Experiment) -> None:
    dynamic(bench, asked)
    assert all(min(batch) >= max(later) for batch, later in pairwise(bench.batches(asked)))


def continuous(bench: Bench, asked: Experiment) -> None:
    """A place is refilled while others continue, places are never exceeded, and the tokens do not change."""
    done = list(bench.run(asked).values())
    assert bench.tokens(asked) == bench.tokens(bench.plain)
    assert max(running(done, at.start_ns) for at in done) == asked.batching.batch_size
    assert any(
        before.end_ns <= late.start_ns and beside.start_ns < before.end_ns and late.start_ns < beside.end_ns
        for before in done for late in done for beside in done
    )  # fmt: skip


def running(done, at_ns: int) -> int:
    return sum(g.start_ns <= at_ns < g.end_ns for g in done)


# ------------------------------------------------------------------ timed tokens, traffic
def streaming(bench: Bench, asked: Experiment) -> None:
    assert not any(g.chunks for g in bench.run(bench.plain).values())
    for g in bench.run(asked).values():
        assert sum(chunk.tokens for chunk in g.chunks) == len(g.token_ids)
        moments = [chunk.at_ns for chunk in g.chunks]
        assert moments == sorted(moments)
        assert g.start_ns < moments[0]
        assert moments[-1] <= g.end_ns
        assert len(set(moments)) > 1 or len(g.token_ids) == 1
    assert bench.tokens(asked) == bench.tokens(bench.plain)


def streaming_continuously(bench: Bench, asked: Experiment) -> None:
    streaming(bench, asked)
    continuous(bench, asked)


def arrivals(bench: Bench, asked: Experiment) -> None:
    """Compare the arrivals with the times at which they were due; the last request must not be taken early."""
    last = bench.served(asked)[-1]
    assert last.start_ns >= last.arrived_ns


def concurrency(bench: Bench, asked: Experiment) -> None:
    done = bench.served(asked)
    assert max(sum(g.arrived_ns <= at.arrived_ns < g.end_ns for g in done) for at in done) == 2


def taken_in(bench: Bench, asked: Experiment) -> None:
    """A request that arrives while another runs begins before the other ends."""
    longer = replace(
        asked, min_output_tokens=64, max_output_tokens=64, traffic=replace(asked.traffic, target_qps=100.0)
    )
    done = bench.served(longer)
    assert any(a.start_ns < b.arrived_ns and b.start_ns < a.end_ns for a in done for b in done)


# ------------------------------------------------------------------ weights
def precision(bench: Bench, asked: Experiment) -> None:
    info = bench.loaded(asked).model_info()
    assert info.dtype == asked.fp_precision
    assert info.weights_bytes == info.parameters * {"float32": 4}.get(asked.fp_precision, 2)
    assert sum(bench.lengths(asked)) > 0


def adapter(bench: Bench, asked: Experiment) -> None:
    assert bench.tokens(asked) != bench.tokens(bench.plain)
    assert bench.loaded(asked).model_info().adapter == asked.adapter


def random_weights(bench: Bench, asked: Experiment) -> None:
    assert bench.loaded(asked).model_info().random_weights
    assert bench.tokens(asked) != bench.tokens(bench.plain)


# ------------------------------------------------------------------ the engine's own options
def _setting(name: str, shown: str | None = None):
    """Check an option that changes only how tokens are computed: the engine applies it; the output is the same."""

    def check(bench: Bench, asked: Experiment) -> None:
        wanted = shown or str(getattr(asked.backend, name))
        assert bench.settings(asked)[name] == wanted
        assert bench.tokens(asked) == bench.tokens(bench.plain)

    return check


def prefix_caching(bench: Bench, asked: Experiment) -> None:
    def hits(experiment: Experiment) -> float:
        backend = bench.loaded(experiment)
        prompts = backend.encode([bench.texts[0] * 20 + text for text in bench.texts[:5]])
        list(backend.generate(prompts))
        return backend.counters()["prefix_cache_hit_tokens"]

    assert hits(asked) > 0
    assert hits(replace(asked, backend=replace(asked.backend, enable_prefix_caching=False))) == 0


def chunked_prefill(bench: Bench, asked: Experiment) -> None:
    """A prompt is longer than a step's token limit, which is refused without chunked prefill."""
    small = replace(asked, backend=replace(asked.backend, max_num_batched_tokens=16))
    assert max(map(len, bench.inputs(small))) > 16
    assert bench.settings(small)["enable_chunked_prefill"] == "on"
    assert bench.tokens(small) == bench.tokens(bench.plain)


def cache_dtype(bench: Bench, asked: Experiment) -> None:
    there, before = bench.settings(asked), bench.settings(bench.plain)
    assert there["kv_cache_dtype"] == asked.backend.kv_cache_dtype
    # Half the bytes per token: twice the tokens, minus what remains of the last block.
    assert int(there["kv_cache_tokens"]) == 2 * int(before["kv_cache_tokens"])
    assert sum(bench.lengths(asked)) > 0


def cache_size(bench: Bench, asked: Experiment) -> None:
    assert int(bench.settings(asked)["kv_cache_tokens"]) < int(bench.settings(bench.plain)["kv_cache_tokens"])
    assert bench.tokens(asked) == bench.tokens(bench.plain)


# ------------------------------------------------------------------ what the backend reports
def model(bench: Bench, asked: Experiment) -> bool:
    return bench.loaded(asked).model_info() is not None


def prefill(bench: Bench, asked: Experiment) -> bool:
    times = [g.prefill_end_ns for g in bench.run(asked).values()]
    assert all((at is None) == (times[0] is None) for at in times)
    assert times[0] is None or all(g.start_ns <= g.prefill_end_ns <= g.end_ns for g in bench.run(asked).values())
    return times[0] is not None


def flops(bench: Bench, asked: Experiment) -> bool:
    return bench.loaded(asked).architecture() is not None


def kv_cache(bench: Bench, asked: Experiment) -> bool:
    backend = bench.loaded(asked)
    bench.run(asked, again=True)
    return backend.peak_memory().kv_cache_bytes is not None


def counters(bench: Bench, asked: Experiment) -> bool:
    backend = bench.loaded(asked)
    list(backend.generate(backend.encode(bench.texts[:2])))
    return backend.counters() is not None


CHECKS = {
    "greedy": greedy,
    "sampling": sampling,
    "temperature": temperature,
    "top-k": _narrowed("top_k", 1, 0),
    "top-p": _narrowed("top_p", 1e-6, 1.0),
    "min-p": _narrowed("min_p", 1.0, 0.0),
    "seed": seed,
    "repetition penalty": repetition_penalty,
    "no repeated n-grams": no_repeated_ngrams,
    "maximum output": maximum_output,
    "minimum output": minimum_output,
    "maximum input": maximum_input,
    "chat template": chat_template,
    "static batches": static,
    "sorted static batches": sorted_static,
    "dynamic batches": dynamic,
    "sorted dynamic batches": sorted_dynamic,
    "continuous batching": continuous,
    "streaming": streaming,
    "streaming, continuous batching": streaming_continuously,
    "constant arrivals": arrivals,
    "Poisson arrivals": arrivals,
    "fixed concurrency": concurrency,
    "arrivals from a trace": arrivals,
    "arrivals with continuous batching": taken_in,
    "float32": precision,
    "bfloat16": precision,
    "float16": precision,
    "LoRA adapter": adapter,
    "random weights": random_weights,
    "eager attention": _setting("attn_implementation"),
    "SDPA": _setting("attn_implementation"),
    "static cache": _setting("cache_implementation"),
    "no cache": _setting("cache_implementation"),
    "prefix caching": prefix_caching,
    "chunked prefill": chunked_prefill,
    "cache in bfloat16": cache_dtype,
    "block size": _setting("block_size"),
    "size of the cache": cache_size,
    "length of a sequence": _setting("max_model_len"),
    "tokens per step": _setting("max_num_batched_tokens"),
    "no compilation": _setting("enforce_eager", "on"),
    "any other engine argument": _setting("engine_args", '{"max_logprobs": 5}'),
}
# Each function returns whether the engine reports the feature, to be compared with the backend's declaration.
REPORTS = {
    "the model": model,
    "prefill": prefill,
    "model FLOPs": flops,
    "cache as allocated": kv_cache,
    "the engine's counters": counters,
}
