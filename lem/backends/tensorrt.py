"""TensorRT-LLM's LLM API, its PyTorch flow: the engine runs in processes of its own, this one hands it requests.

Prompts go in as token ids and come out as token ids: tokenizer and end tokens are those of every backend. The times of
requests, cache hits and accepted drafts are the engine's own figures, where it tells them; where it does not, they are
None. This process makes no CUDA context. TensorRT-LLM is imported when the engine starts, not before.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lem.backends import checkpoint, tensorrt_source
from lem.backends.base import Backend, Encoded, Generation
from lem.backends.engine import as_text, clock_offset_ns, reason_of
from lem.backends.placement import show_own_gpus
from lem.backends.prompts import encode, end_tokens
from lem.backends.tensorrt_options import (
    Adapter,
    about_key,
    engine_arguments,
    given,
    objections,
    sampling_parameters,
    several_end_tokens,
    speculative_class,
)
from lem.backends.tensorrt_requests import Request, Requests
from lem.errors import Interrupted, RunError
from lem.machine import gpu, processes
from lem.machine.gpu import Gpu
from lem.machine.host import Host, cpu_model, peak_memory_bytes
from lem.record import CodedWarning, EngineInfo, FinishReason, Memory, ModelInfo
from lem.spec.engines import TensorrtBackend
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed, runs_in_one_process
from lem.spec.rules import Objection
from lem.units import NS_PER_S
from lem.warning_codes import warning
from lem.workload.batching import plan_batches
from lem.workload.flops import Architecture
from lem.workload.models import Model, find
from lem.workload.tokens import Chunk, first_tokens
from lem.workload.traffic import Arrivals, as_places_become_free

ENVIRONMENT = {"TRTLLM_NO_USAGE_STATS": "1"}
# How often a waiting process looks whether those of the engine are alive.
LOOKING_S = 1.0
# An engine from which nothing comes for so long is taken for dead, and if its tokens are not streamed for a second
# more for each token of an output: none is that slow.
SILENCE_S = 600.0
CLOSING_S = 30.0
MEMORY_WORDS = ("out of memory", "memory allocation", "kv cache", "kvcache", "free_gpu_memory_fraction")
FINISHED: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}


class Tensorrt(Backend):
    """See the module."""

    tells = frozenset(["tokens", "model", "prefill", "flops", "counters"])

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, TensorrtBackend)
        self._experiment = experiment
        self._options = experiment.backend
        self._found: Model | None = None
        self._llm: Any = None
        self._requests: Requests | None = None
        self._lora: Any = None
        self._tokenizer: Any = None
        self._hollow: Any = None
        self._end_tokens: frozenset[int] = frozenset()
        self._adapter_weights: tuple[int, int] = (0, 0)
        self._arguments: Mapping[str, Any] = {}
        self._expected: Sequence[Gpu] = ()
        self._processes: Sequence[Any] = ()
        self._clock_offset_ns = 0
        self._counts: dict[str, float] | None = None
        self._is_broken = False
        self._takes_salt = False
        self._windows = 0

    # -------------------------------------------------------------- before the run
    @classmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Object to options that this host, this model or the installed TensorRT-LLM cannot honour."""
        return objections(experiment, model, host)

    @classmethod
    def about_key(cls, name: str) -> str | None:
        """Say where an argument of TensorRT-LLM goes, or what there is instead of one that it has dropped."""
        return about_key(name)

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return True where there is a GPU; without one nothing runs."""
        return bool(host.gpus)

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return the first visible GPUs, as many as all processes use."""
        self._expected = host.gpus[: gpus_needed(self._experiment)]
        return self._expected

    @property
    def _degree(self) -> int:
        """Number of GPUs that this process runs the model on."""
        return self._experiment.parallelism.degree if runs_in_one_process(self._experiment) else 1

    @property
    def _own_gpus(self) -> Sequence[Gpu]:
        return self._expected[self.local_rank * self._degree : (self.local_rank + 1) * self._degree]

    # -------------------------------------------------------------- loading
    def start(self) -> None:
        """Import TensorRT-LLM, with this process's GPUs alone to be seen."""
        os.environ.update(ENVIRONMENT)
        if gpu.visible():
            show_own_gpus(self.local_rank, self._degree)
        try:
            import tensorrt_llm.llmapi  # noqa: F401
        except Exception as error:  # a missing library of CUDA or MPI is an OSError, a missing driver a RuntimeError
            raise RunError(f"TensorRT-LLM cannot be imported: {reason_of(error)}") from error
        self._clock_offset_ns = clock_offset_ns()

    def load(self) -> None:
        """Load tokenizer, weights and adapter, and let the engine start its processes and allocate its cache."""
        self._found = find(self._experiment.model or "", self._experiment.revision)
        trusted = self._experiment.trust_remote_code
        self._tokenizer = checkpoint.load_tokenizer(self._found, trusted=trusted)
        self._hollow = checkpoint.load_hollow(self._found, trusted=trusted)
        self._end_tokens = end_tokens(checkpoint.generation_config(self._found, trusted=trusted), self._tokenizer)
        if self._experiment.min_output_tokens and len(self._end_tokens) > 1:
            raise RunError(str(several_end_tokens(len(self._end_tokens))))
        adapter = self._load_adapter()
        self._arguments = engine_arguments(self._experiment, self._found, adapter)
        self._llm = self._load_engine()
        self._takes_salt = "cache_salt" in inspect.signature(self._llm.generate_async).parameters
        self._requests = Requests(self._submit, streams=self._experiment.streaming.enabled)
        self._check_arrived()

    def _load_adapter(self) -> Adapter | None:
        if self._experiment.adapter is None:
            return None
        from tensorrt_llm.executor.request import LoRARequest

        folder = checkpoint.folder_of(self._experiment.adapter)
        self._adapter_weights = checkpoint.weights_of(folder)
        self._lora = LoRARequest("adapter", 1, str(folder))
        return Adapter(folder, checkpoint.rank_of(folder))

    def _load_engine(self) -> Any:
        from tensorrt_llm import LLM

        assert self._found is not None
        before = set(processes.children())
        try:
            return LLM(**_constructed(self._arguments))
        except Interrupted:
            raise
        except Exception as error:
            text = f"TensorRT-LLM could not load {self._found.name}: {reason_of(error)}{_hint(error)}"
            raise RunError(text) from error
        finally:
            self._processes = [process for process in processes.children() if process not in before]

    def _check_arrived(self) -> None:
        """Refuse to run where TensorRT-LLM has put something else in the place of what was asked for."""
        for name, asked in given(self._options).items():
            used = getattr(self._llm.args, name, None)
            for path, wanted, found in _pairs(name, asked, used):
                if as_text(wanted).casefold() != as_text(found).casefold():
                    raise RunError(
                        f"{path} is {as_text(wanted)}, and TensorRT-LLM uses {as_text(found)} for this model on this "
                        "device. Set that, or leave it out."
                    )

    # -------------------------------------------------------------- running
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize each text by itself, with the model's own special tokens.

        Raises:
            RunError: a prompt without tokens, or one that does not fit, also into a step if it cannot be taken in in
                pieces.
        """
        encoded = encode(self._tokenizer, texts, self._experiment, self._positions())
        a_step = getattr(self._llm.args, "max_num_tokens", None)
        longest = max(encoded, key=lambda p: len(p.token_ids), default=None)
        in_pieces = getattr(self._llm.args, "enable_chunked_prefill", False)
        if longest is not None and a_step and not in_pieces and len(longest.token_ids) > a_step:
            raise RunError(
                f"Prompt {longest.index} has {len(longest.token_ids)} tokens, and a step computes {a_step} at most. "
                "Set backend.chunked_prefill=true, or raise backend.max_num_tokens."
            )
        return encoded

    def _positions(self) -> int | None:
        """Return the tokens that a prompt and its output may have together; None where there is no limit."""
        assert self._found is not None
        limits = (
            self._found.config.get("max_position_embeddings", self._found.config.get("n_positions")),
            getattr(self._llm.args, "max_seq_len", None),
        )
        return min((limit for limit in limits if isinstance(limit, int)), default=None)

    def forget(self) -> None:
        """Count anew; with the next window prefixes that earlier ones have left in the cache are not met any more."""
        self._windows += 1
        self._counts = None

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Run batch after batch, each yielded as a whole; or all at once, each request yielded when it is finished."""
        together = self._experiment.batching.strategy != "continuous"
        batches = plan_batches([len(p.token_ids) for p in prompts], self._experiment.batching)
        for number, positions in enumerate(batches):
            requests = [Request(prompts[position], number, 0) for position in positions]
            finished = self._run(requests)
            if together:
                done = {id(request): generation for some in finished for request, generation in some}
                yield [done[id(request)] for request in requests]
            else:
                yield from ([generation for _, generation in some] for some in finished)

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Give each prompt to the engine as it arrives, in the midst of the others; else batch after batch."""
        if self._experiment.batching.strategy != "continuous":
            yield from super().serve(arrivals, at_most)
            return
        with self._taking_back() as requests:
            # The engine has a queue of its own, so that it is given whatever has arrived.
            served = as_places_become_free(
                arrivals,
                sys.maxsize,
                running=lambda: len(requests),
                begin=lambda each: requests.add(Request(each.request, 0, each.at_ns)),
                advance=lambda: self._finished(_until_the_next(arrivals)),
            )
            for number, done in enumerate(served):
                yield [replace(generation, batch=number) for _, generation in done]

    def _run(self, batch: Sequence[Request]) -> Iterator[list[tuple[Request, Generation]]]:
        """Give requests to the engine, and yield those that are finished together."""
        with self._taking_back() as requests:
            for request in batch:
                request.arrived_ns = time.perf_counter_ns()
                requests.add(request)
            while len(requests):
                if done := self._finished(LOOKING_S):
                    yield done

    @contextlib.contextmanager
    def _taking_back(self) -> Iterator[Requests]:
        """Take back from the engine what nobody waits for any more; remember when it has broken down."""
        assert self._requests is not None
        self._counts = self._counts if self._counts is not None else {}
        try:
            yield self._requests
        except GeneratorExit:
            self._requests.take_back()
            raise
        except BaseException:
            self._is_broken = True
            self._requests.forget()
            raise

    def _submit(self, request: Request) -> Any:
        """Hand a request to the engine, in the thread that waits for it."""
        from tensorrt_llm import SamplingParams

        parameters = sampling_parameters(self._experiment, request.prompt.index, self._end_tokens)
        return self._llm.generate_async(
            list(request.prompt.token_ids),
            sampling_params=SamplingParams(**parameters),
            lora_request=self._lora,
            streaming=self._experiment.streaming.enabled,
            # Blocks of the cache are shared by requests of the same salt alone.
            **({"cache_salt": f"window {self._windows}"} if self._takes_salt else {}),
        )

    def _finished(self, within_s: float) -> list[tuple[Request, Generation]]:
        """Return what is finished; look after the engine where nothing is."""
        assert self._requests is not None
        done = self._requests.finished(within_s)
        if not done:
            self._look_after()
        return [(request, self._generation(request)) for request in done]

    def _look_after(self) -> None:
        """Raise when the engine will not answer any more: a process of its is gone, or nothing comes from it."""
        assert self._requests is not None
        if not len(self._requests):
            return
        if any(not processes.is_alive(process) for process in self._processes):
            raise RunError("TensorRT-LLM stopped in the middle of its work: one of its processes has died.")
        silent_s = (time.perf_counter_ns() - self._requests.heard_ns) / NS_PER_S
        patience_s = SILENCE_S + (0 if self._experiment.streaming.enabled else self._experiment.max_output_tokens)
        if silent_s > patience_s:
            raise RunError(f"TensorRT-LLM does not answer: nothing has come from it for {silent_s:.0f} s.")

    # -------------------------------------------------------------- what came out
    def _generation(self, request: Request) -> Generation:
        index = request.prompt.index
        if request.error is not None:
            raise self._failure(request) from request.error
        output = request.result.outputs[0]
        reason = FINISHED.get(output.finish_reason or "")
        if reason is None:
            raise RunError(f"TensorRT-LLM gave up prompt {index}: {output.finish_reason}.")
        self._count(request)
        ids = self._with_end_token(tuple(output.token_ids), reason)
        scheduled_ns, first_ns = self._times(request)
        return Generation(
            index,
            request.batch,
            ids,
            reason,
            start_ns=request.arrived_ns if scheduled_ns is None else scheduled_ns,
            start_is_told=scheduled_ns is not None,
            end_ns=request.last_ns,
            prefill_end_ns=first_ns,
            chunks=self._chunks(request, len(ids)),
            arrived_ns=request.arrived_ns,
        )

    def _failure(self, request: Request) -> RunError:
        error = request.error
        assert error is not None
        if not request.was_taken and isinstance(error, (ValueError, TypeError)):
            return RunError(f"TensorRT-LLM refuses prompt {request.prompt.index}: {reason_of(error)}")
        return RunError(f"TensorRT-LLM stopped in the middle of its work: {reason_of(error)}{_hint(error)}")

    def _with_end_token(self, ids: tuple[int, ...], reason: FinishReason) -> tuple[int, ...]:
        """Return the tokens with the end token that was computed, where the engine keeps its own to itself."""
        if reason == "stop" and not (ids and ids[-1] in self._end_tokens):
            return (*ids, min(self._end_tokens))
        return ids

    def _chunks(self, request: Request, count: int) -> tuple[Chunk, ...]:
        """Return when the tokens came; an end token that is kept back is there with the news of the end."""
        if not request.chunks and not self._experiment.streaming.enabled:
            return ()
        kept_back = count - len(request.token_ids)
        return (*first_tokens(request.chunks, count), *([Chunk(request.last_ns, kept_back)] if kept_back > 0 else ()))

    def _times(self, request: Request) -> tuple[int | None, int | None]:
        """Return when the engine began on a request and when its first token was there, on our clock.

        Each is None where the engine does not tell it, or tells a moment at which the request was not with it.
        """
        timing = getattr(_metrics(request), "timing_metrics", None)
        moments = []
        for name in ("first_scheduled_time", "first_token_time"):
            engine_s = _seconds(getattr(timing, name, None))
            at_ns = None if engine_s is None else round(engine_s * NS_PER_S) + self._clock_offset_ns
            moments.append(at_ns if at_ns is not None and request.arrived_ns <= at_ns <= request.last_ns else None)
        scheduled_ns, first_ns = moments
        return scheduled_ns, first_ns if scheduled_ns is not None and first_ns is not None else None

    def _count(self, request: Request) -> None:
        """Add up what the engine tells of a request, each figure only where it tells it."""
        metrics = _metrics(request)
        of_cache = getattr(metrics, "kv_cache_metrics", None)
        of_drafts = getattr(metrics, "speculative_decoding", None)
        told = {
            "prefix_cache_hit_tokens": getattr(request.result, "cached_tokens", None),
            "reused_blocks": getattr(of_cache, "num_reused_blocks", None),
            "missed_blocks": getattr(of_cache, "num_missed_blocks", None),
        }
        if self._arguments.get("speculative_config"):
            told["decoding_steps"] = getattr(request.result, "decoding_iter", None)
            if drafted := getattr(of_drafts, "total_draft_tokens", None):
                told["draft_tokens"] = drafted
                told["accepted_draft_tokens"] = getattr(of_drafts, "total_accepted_draft_tokens", None)
        assert self._counts is not None
        told["prefix_cache_queried_tokens"] = (
            len(request.prompt.token_ids) if told["prefix_cache_hit_tokens"] is not None else None
        )
        for name, value in told.items():
            if value is not None:
                self._counts[name] = self._counts.get(name, 0.0) + value

    # -------------------------------------------------------------- telling
    def counters(self) -> dict[str, float] | None:
        """Return what the engine has told of the requests since `forget`; None when it has told nothing."""
        return self._counts or None

    def peak_memory(self) -> Memory:
        """Return the GPUs' memory in use, as the driver tells it; without GPUs the processes' own peak.

        The engine's allocator, in other processes, cannot be asked. The cache has been taken at load.
        """
        if self._own_gpus:
            used = [gpu.used_memory_bytes(each) for each in self._own_gpus]
            known = [size for size in used if size is not None]
            scope = "GPU memory in use at the end of the window, the whole key/value cache and other processes included"
            return Memory(sum(known) if len(known) == len(used) else None, scope)
        peaks = [peak_memory_bytes(), *(peak_memory_bytes(process.pid) for process in self._processes)]
        together = None if None in peaks else sum(peak for peak in peaks if peak is not None)
        return Memory(together, "process and those of the engine, since their start")

    def model_info(self) -> ModelInfo | None:
        """Describe the model by its checkpoint; None where transformers does not know it, for the engine is silent."""
        if self._found is None or self._hollow is None:
            return None
        parameters = int(self._hollow.num_parameters()) + sum(self._adapter_weights)
        quantized = checkpoint.quantization_of(self._found)
        dtype = str(self._llm.args.dtype) if self._llm is not None else "auto"
        dtype = str(self._hollow.dtype).removeprefix("torch.") if dtype == "auto" else dtype
        size = None if quantized is None else checkpoint.bytes_of(self._found)
        return ModelInfo(
            name=self._found.name,
            revision=self._found.revision,
            architecture=", ".join(self._found.config.get("architectures") or [type(self._hollow).__name__]),
            parameters=parameters,
            random_weights=self._has_random_weights,
            weights_bytes=_times(parameters, BYTES_OF.get(dtype)) if size is None else size,
            dtype=dtype,
            adapter=self._experiment.adapter,
            quantization=quantized,
        )

    @property
    def _has_random_weights(self) -> bool:
        assert self._found is not None
        dummy = str((self._options.extra_args or {}).get("load_format", "")).lower() == "dummy"
        return self._found.random_weights or dummy

    def engine_info(self) -> EngineInfo:
        """Describe TensorRT-LLM and the arguments that it has settled on."""
        import torch

        own = self._own_gpus
        return EngineInfo(
            backend="tensorrt",
            version=f"tensorrt-llm {tensorrt_source.version()}, torch {torch.__version__}",
            device=", ".join(f"cuda:{i}" for i in range(self._degree)),
            device_name=own[0].name if own else cpu_model(),
            settings={
                **self._settings(),
                "end_token_ids": ",".join(map(str, sorted(self._end_tokens))) or "none",
                "chat_template": "on" if self._experiment.chat_template else "off",
            },
        )

    def _settings(self) -> dict[str, str]:
        """Return the engine's resolved arguments, as far as they change numbers."""
        args = self._llm.args
        settings = {name: as_text(getattr(args, name, None)) for name in SETTINGS}
        for part in ("kv_cache_config", "scheduler_config"):
            for name in IN_PARTS[part]:
                settings[f"{part}.{name}"] = as_text(getattr(getattr(args, part, None), name, None))
        speculation, lora = self._arguments.get("speculative_config"), self._arguments.get("lora_config")
        extra = self._options.extra_args
        return settings | {
            "cuda_graphs": "off" if getattr(args, "cuda_graph_config", None) is None else "on",
            "speculation": json.dumps(speculation) if speculation else "none",
            "lora": "none" if lora is None else f"rank {lora['max_lora_rank']}",
            "extra_args": json.dumps(extra) if extra else "none",
        }

    def architecture(self) -> Architecture | None:
        """Read the sizes off the model without weights, by the same code as for PyTorch, and add the adapter's."""
        return checkpoint.sizes(self._hollow, self._adapter_weights)

    def warnings(self) -> list[CodedWarning]:
        """Say so when the weights are random, and when the engine did less work than the tokens say."""
        assert self._found is not None
        notes, counts = [], self._counts or {}
        if self._has_random_weights:
            notes.append(warning("random_weights", f"{self._found.name} has random weights: its text has no meaning."))
        if hits := counts.get("prefix_cache_hit_tokens"):
            share = hits / counts["prefix_cache_queried_tokens"]
            notes.append(warning("prefix_cached", f"{hits:.0f} input tokens ({share:.0%}) came from the prefix cache."))
        return notes

    def close(self) -> None:
        """End the engine and its processes, which gives the memory back; one that does not end is ended."""
        llm, self._llm = self._llm, None
        if llm is not None:
            # Daemonic: an engine that has broken down may never return from it.
            ending = threading.Thread(target=_shut_down, args=(llm,), name="closing", daemon=True)
            ending.start()
            ending.join(CLOSING_S / 10 if self._is_broken else CLOSING_S)
        if self._requests is not None:
            self._requests.close()
        processes.kill([process for process in self._processes if processes.is_alive(process)])


# What of the resolved arguments goes into records.
SETTINGS = (
    "attn_backend", "dtype", "max_batch_size", "max_num_tokens", "max_seq_len", "tensor_parallel_size",
    "pipeline_parallel_size", "moe_expert_parallel_size", "enable_chunked_prefill", "disable_overlap_scheduler",
    "force_dynamic_quantization", "stream_interval", "allreduce_strategy", "load_format",
)  # fmt: skip
IN_PARTS = {
    "kv_cache_config": (
        "dtype", "enable_block_reuse", "free_gpu_memory_fraction", "host_cache_size", "max_tokens", "tokens_per_block",
    ),
    "scheduler_config": ("capacity_scheduler_policy", "context_chunking_policy"),
}  # fmt: skip
BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2}


# ------------------------------------------------------------------ arguments
def _constructed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of LLM with the speculative configuration as the class that it is for.

    Other parts are told apart by their names, so that mappings do.
    """
    config = arguments.get("speculative_config")
    found = None if not isinstance(config, Mapping) else speculative_class(config)
    if found is None:
        return dict(arguments)
    from tensorrt_llm.llmapi import llm_args

    name, fields = found
    return {**arguments, "speculative_config": getattr(llm_args, name)(**fields)}


def _pairs(name: str, asked: Any, used: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each value that was asked for with the one that is used."""
    if name == "cuda_graph_config":
        yield "backend.cuda_graphs", asked is not None, used is not None
    elif not isinstance(asked, Mapping):
        yield name, asked, used
    elif name != "speculative_config":  # which has names of its own, and is refused or taken as it is
        for field, value in asked.items():
            yield f"{name}.{field}", value, getattr(used, field, None)


def _times(count: int, each: int | None) -> int | None:
    return None if each is None else count * each


# ------------------------------------------------------------------ what the engine tells
def _metrics(request: Request) -> Any:
    return getattr(request.result.outputs[0], "request_perf_metrics", None)


def _seconds(moment: Any) -> float | None:
    """Return a moment of the engine's steady clock; None for none, which it has as 0 as well."""
    seconds = getattr(moment, "total_seconds", lambda: moment)()
    return float(seconds) if isinstance(seconds, (int, float)) and seconds > 0 else None


def _hint(error: BaseException) -> str:
    text = " ".join(str(error).lower().split())
    if not any(words in text for words in MEMORY_WORDS):
        return ""
    return " Set backend.kv_cache.free_gpu_memory_fraction, backend.kv_cache.max_tokens or backend.max_seq_len."


# ------------------------------------------------------------------ waiting and ending
def _until_the_next(arrivals: Arrivals[Encoded]) -> float:
    """Return how long to wait for what is finished: until the next prompt arrives, or to look after the engine."""
    next_ns = arrivals.next_ns()
    return LOOKING_S if next_ns is None else min(LOOKING_S, (next_ns - time.perf_counter_ns()) / NS_PER_S)


def _shut_down(llm: Any) -> None:
    with contextlib.suppress(Exception):  # whatever it has to say, it is over
        llm.shutdown()
