"""TensorRT-LLM's LLM API with its PyTorch backend. The engine runs in other processes, and this process sends requests.

Prompts and outputs are passed as token ids, so that the tokenizer and the end tokens are the same for every backend.
The engine itself reports when it began a request and when it had the first token, and the numbers of cache hits and
accepted drafts. A figure that the engine does not report is None, except the beginning of a request, which is then
estimated. This process creates no CUDA context. TensorRT-LLM is imported only when the engine starts.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lem.backends import checkpoint, engine, tensorrt_source
from lem.backends.base import Encoded, Generation, needed
from lem.backends.checkpoint import Checkpoint
from lem.backends.placement import show_own_gpus
from lem.backends.session import Loaded, Session, SessionBackend
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
from lem.backends.tensorrt_requests import Followed, Follower
from lem.errors import RunError
from lem.machine import gpu, processes
from lem.machine.host import Host, peak_memory_bytes
from lem.quantities import NS_PER_S
from lem.record import FinishReason, Memory, ModelInfo
from lem.spec.engines import TensorrtBackend
from lem.spec.experiment import Experiment
from lem.workload.models import Model
from lem.workload.tokens import Chunk, first_tokens

ENVIRONMENT = {"TRTLLM_NO_USAGE_STATS": "1"}
# How often a session that waits for requests checks whether the engine's processes are alive.
CHECK_S = 1.0
# An engine that sends nothing for this long is assumed to be dead. If tokens are not streamed, one second is added for
# each output token, because no engine is slower than that.
SILENCE_S = 600.0
# How long the engine may take to release canceled requests, to shut down, and to shut down after a failure.
CANCEL_S, ENDING_S, ENDING_BROKEN_S = 30.0, 30.0, 3.0
MEMORY_HINT = engine.MemoryHint(
    ("out of memory", "memory allocation", "kv cache", "kvcache", "free_gpu_memory_fraction"),
    "Set backend.kv_cache.free_gpu_memory_fraction, backend.kv_cache.max_tokens or backend.max_seq_len.",
)
FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length"}
# The resolved arguments to record and, for arguments that are nested configs, the fields to record.
SETTINGS = (
    "attn_backend", "dtype", "max_batch_size", "max_num_tokens", "max_seq_len", "tensor_parallel_size",
    "pipeline_parallel_size", "moe_expert_parallel_size", "enable_chunked_prefill", "disable_overlap_scheduler",
    "force_dynamic_quantization", "stream_interval", "allreduce_strategy", "load_format",
)  # fmt: skip
SETTINGS_OF_PARTS = {
    "kv_cache_config": (
        "dtype", "enable_block_reuse", "free_gpu_memory_fraction", "host_cache_size", "max_tokens", "tokens_per_block",
    ),
    "scheduler_config": ("capacity_scheduler_policy", "context_chunking_policy"),
}  # fmt: skip
BYTES_OF_DTYPE = {"float32": 4, "float16": 2, "bfloat16": 2}


class Tensorrt(SessionBackend["TensorrtSession"]):
    """The TensorRT-LLM backend; the module docstring describes it."""

    reports = frozenset(["tokens", "model", "prefill", "flops", "counters"])

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self._llm = Llm()
        self._follower: Follower | None = None
        self._windows = 0

    # -------------------------------------------------------------- before the run
    objections = staticmethod(objections)
    about_key = staticmethod(about_key)

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return whether a GPU is visible; without one, TensorRT-LLM cannot run."""
        return bool(host.gpus)

    @property
    def _versions(self) -> str:
        return f"tensorrt-llm {tensorrt_source.version()}"

    # -------------------------------------------------------------- loading
    def start(self) -> None:
        """Import TensorRT-LLM with only this process's GPUs visible."""
        os.environ.update(ENVIRONMENT)
        if gpu.visible():
            show_own_gpus(self.local_rank, self._degree)
        try:
            import tensorrt_llm.llmapi  # noqa: F401
        except Exception as error:  # a missing CUDA or MPI library raises OSError, and a missing driver RuntimeError
            raise RunError(f"TensorRT-LLM cannot be imported: {engine.reason_of(error)}") from error

    def load(self) -> None:
        """Load the tokenizer, weights and adapter, and let the engine start its processes and allocate its cache."""
        self._loaded = load(self._experiment, self._llm)
        self._follower = Follower()

    def close(self) -> None:
        """Shut down the engine and its processes, which frees the memory."""
        self._llm.close(ENDING_BROKEN_S if self._is_broken else ENDING_S)
        if self._follower is not None:
            self._follower.close()

    # -------------------------------------------------------------- running
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize each text separately. If the engine cannot split prompts, reject prompts too long for one step."""
        encoded, args = super().encode(texts), needed(self._loaded).engine.args
        longest = max(encoded, key=lambda p: len(p.token_ids), default=None)
        step = getattr(args, "max_num_tokens", None)
        is_split = getattr(args, "enable_chunked_prefill", False)
        if longest is not None and step and not is_split and len(longest.token_ids) > step:
            raise RunError(
                f"Prompt {longest.index} has {len(longest.token_ids)} tokens, but a step processes at most {step}. "
                "Set backend.chunked_prefill=true, or raise backend.max_num_tokens."
            )
        return encoded

    def forget(self) -> None:
        """Reset the counters. If the engine supports cache salts, use a new one, so that no cached prefix is reused."""
        self._windows += 1
        self._session = None

    def _begin(self, loaded: Loaded) -> TensorrtSession:
        salt = f"window {self._windows}"
        return TensorrtSession(self._experiment, loaded, self._llm, needed(self._follower), salt)

    # -------------------------------------------------------------- reporting
    def counters(self) -> dict[str, float] | None:
        """Return the counts that the engine has reported since `forget`; None if it has reported nothing."""
        return None if self._session is None else self._session.counters or None

    def peak_memory(self) -> Memory:
        """Return the GPU memory in use, as reported by the driver; without GPUs, the peak memory of the processes.

        The peak of the GPU memory cannot be queried, because the engine's allocator is in other processes. The memory
        in use is close to the peak, because the cache is allocated when the model is loaded.
        """
        if self._own_gpus:
            scope = (
                "GPU memory in use at the end of the window, including the whole key/value cache and other processes"
            )
            return Memory(engine.sum_if_known([gpu.used_memory_bytes(each) for each in self._own_gpus]), scope)
        peaks = [peak_memory_bytes(), *(peak_memory_bytes(process.pid) for process in self._llm.processes)]
        return Memory(engine.sum_if_known(peaks), "process and the engine's processes, since their start")


# ------------------------------------------------------------------ the loaded engine
def load(experiment: Experiment, llm: Llm) -> Loaded:
    """Load the tokenizer, weights and adapter, and let the engine start its processes and allocate its cache.

    Raises:
        RunError: TensorRT-LLM cannot load the model, or does not use the requested options.
    """
    assert isinstance(experiment.backend, TensorrtBackend)
    options = experiment.backend
    read = checkpoint.read(experiment, {})
    if experiment.min_output_tokens and len(read.end_tokens) > 1:
        raise RunError(str(several_end_tokens(len(read.end_tokens))))
    adapter, lora, adapter_weights = None, None, (0, 0)
    if experiment.adapter is not None:
        from tensorrt_llm.executor.request import LoRARequest

        folder = checkpoint.adapter_folder(experiment.adapter)
        adapter_weights = checkpoint.adapter_weights(folder)
        adapter, lora = Adapter(folder, checkpoint.adapter_rank(folder)), LoRARequest("adapter", 1, str(folder))
    arguments = engine_arguments(experiment, read.model, adapter)
    with engine.failing_as(f"TensorRT-LLM could not load {read.model.name}", MEMORY_HINT):
        started = llm.start(arguments)
    _check_options(started.args, options)
    is_dummy = str((options.extra_args or {}).get("load_format", "")).lower() == "dummy"
    random_weights = read.model.random_weights or is_dummy
    return Loaded(
        engine=started,
        checkpoint=read,
        lora=lora,
        adapter_weights=adapter_weights,
        positions=_positions(read.model, started.args),
        clock_offset_ns=engine.clock_offset_ns(),
        random_weights=random_weights,
        model=_model_info(started.args, read, experiment.adapter, sum(adapter_weights), random_weights),
        settings=_settings(started.args, options, arguments),
    )


class Llm:
    """TensorRT-LLM's `LLM` object and the processes that it starts."""

    def __init__(self) -> None:
        self._llm: Any = None
        self.processes: Sequence[Any] = ()

    def start(self, arguments: Mapping[str, Any]) -> Any:
        """Create TensorRT-LLM's `LLM` with these arguments and return it."""
        from tensorrt_llm import LLM

        before = set(processes.children())
        try:
            self._llm = LLM(**_constructed(arguments))
        finally:
            self.processes = [process for process in processes.children() if process not in before]
        return self._llm

    def close(self, within_s: float) -> None:
        """Shut down the engine; processes still alive after `within_s` seconds are killed."""
        llm, self._llm = self._llm, None

        def shut_down() -> None:
            with contextlib.suppress(Exception):  # errors no longer matter here
                llm.shutdown()

        if llm is not None:
            # The thread is a daemon, because an engine that has failed may never return from the shutdown.
            ending = threading.Thread(target=shut_down, name="closing", daemon=True)
            ending.start()
            ending.join(within_s)
        processes.kill([process for process in self.processes if processes.is_alive(process)])


def _constructed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for `LLM`, with the speculative configuration as an object of the right class.

    Other nested configs remain mappings, because `LLM` knows their classes from the arguments' names.
    """
    config = arguments.get("speculative_config")
    found = None if not isinstance(config, Mapping) else speculative_class(config)
    if found is None:
        return dict(arguments)
    from tensorrt_llm.llmapi import llm_args

    name, fields = found
    return {**arguments, "speculative_config": getattr(llm_args, name)(**fields)}


def _check_options(args: Any, options: TensorrtBackend) -> None:
    """Refuse to run if TensorRT-LLM does not use the requested options."""
    for name, asked in given(options).items():
        for path, *values in _pairs(name, asked, getattr(args, name, None)):
            wanted, used = map(engine.as_text, values)
            if wanted.casefold() != used.casefold():
                raise RunError(
                    f"{path} is {wanted}, but TensorRT-LLM uses {used} for this model on this device. "
                    "Set the option to the value in use, or leave it out."
                )


def _pairs(name: str, asked: Any, used: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path of each requested value, the requested value, and the value in use."""
    if name == "cuda_graph_config":
        yield "backend.cuda_graphs", asked is not None, used is not None
    elif not isinstance(asked, Mapping):
        yield name, asked, used
    elif name != "speculative_config":  # the engine renames this config's fields, and accepts or rejects it as a whole
        for field, value in asked.items():
            yield f"{name}.{field}", value, getattr(used, field, None)


def _positions(model: Model, args: Any) -> int | None:
    of_model = model.config.get("max_position_embeddings", model.config.get("n_positions"))
    limits = (of_model, getattr(args, "max_seq_len", None))
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _model_info(
    args: Any, read: Checkpoint, adapter: str | None, adapter_weights: int, random_weights: bool
) -> ModelInfo | None:
    """Describe the model from its files, since the engine reports nothing; None if transformers cannot build it."""
    if read.hollow is None:
        return None
    parameters = int(read.hollow.num_parameters()) + adapter_weights
    quantization = checkpoint.quantization_of(read.model)
    dtype = str(read.hollow.dtype).removeprefix("torch.") if str(args.dtype) == "auto" else str(args.dtype)
    size = None if quantization is None else checkpoint.weights_bytes(read.model)
    if size is None and dtype in BYTES_OF_DTYPE:
        size = parameters * BYTES_OF_DTYPE[dtype]
    return ModelInfo(
        name=read.model.name,
        revision=read.model.revision,
        architecture=", ".join(read.model.config.get("architectures") or [type(read.hollow).__name__]),
        parameters=parameters,
        random_weights=random_weights,
        weights_bytes=size,
        dtype=dtype,
        adapter=adapter,
        quantization=quantization,
    )


def _settings(args: Any, options: TensorrtBackend, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the engine's resolved arguments that affect the measurements."""
    settings = {name: engine.as_text(getattr(args, name, None)) for name in SETTINGS}
    for part, names in SETTINGS_OF_PARTS.items():
        settings |= {f"{part}.{name}": engine.as_text(getattr(getattr(args, part, None), name, None)) for name in names}
    speculation, lora = arguments.get("speculative_config"), arguments.get("lora_config")
    return settings | {
        "cuda_graphs": "off" if getattr(args, "cuda_graph_config", None) is None else "on",
        "speculation": json.dumps(speculation) if speculation else "none",
        "lora": "none" if lora is None else f"rank {lora['max_lora_rank']}",
        "extra_args": json.dumps(options.extra_args) if options.extra_args else "none",
    }


# ------------------------------------------------------------------ requests
class TensorrtSession(Session[Followed]):
    """The unfinished requests in TensorRT-LLM, and the engine's counts for finished requests.

    `counters` holds these counts under the names that records use; it lacks counts that the engine does not report.
    """

    def __init__(self, experiment: Experiment, loaded: Loaded, llm: Llm, follower: Follower, salt: str) -> None:
        super().__init__(experiment)
        self._loaded, self._llm, self._follower = loaded, llm, follower
        # Requests share cache blocks only if they have the same salt.
        takes_salt = "cache_salt" in inspect.signature(loaded.engine.generate_async).parameters
        self._salt = {"cache_salt": salt} if takes_salt else {}
        self.counters: dict[str, float] = {}

    def begin(self, key: int, prompt: Encoded, batch: int, arrived_ns: int) -> None:
        """Have the follower thread hand a prompt to the engine."""
        if not self.running:
            self._follower.heard_ns = time.perf_counter_ns()
        request = self.running[key] = Followed(prompt, batch, arrived_ns, key=key)
        self._follower.follow(request, self._submit, streams=self.streams)

    def _submit(self, request: Followed) -> Any:
        from tensorrt_llm import SamplingParams

        prompt, loaded = request.prompt, self._loaded
        parameters = sampling_parameters(self.experiment, prompt.index, loaded.checkpoint.end_tokens)
        return loaded.engine.generate_async(
            list(prompt.token_ids),
            sampling_params=SamplingParams(**parameters),
            lora_request=loaded.lora,
            streaming=self.streams,
            **self._salt,
        )

    def advance(self, next_ns: int | None = None) -> Mapping[int, Generation]:
        """Wait for requests to finish, and return their outputs by key; check regularly that the engine is alive."""
        within_s = CHECK_S if next_ns is None else min(CHECK_S, (next_ns - time.perf_counter_ns()) / NS_PER_S)
        done = self._finished(within_s)
        if not done:
            self._check_engine()
        return {request.key: self._generation(request) for request in done}

    def _finished(self, within_s: float) -> list[Followed]:
        """Wait up to `within_s` seconds for requests to finish, remove them from `running`, and return them."""
        # A request that was canceled may have finished at the same time.
        done = [each for each in self._follower.finished(within_s) if self.running.get(each.key) is each]
        for request in done:
            del self.running[request.key]
        return done

    def _check_engine(self) -> None:
        """Raise an error if one of the engine's processes has died, or if the engine has been silent for too long."""
        if any(not processes.is_alive(process) for process in self._llm.processes):
            raise RunError("TensorRT-LLM failed during the run: one of its processes has died.")
        silent_s = (time.perf_counter_ns() - self._follower.heard_ns) / NS_PER_S
        if silent_s > SILENCE_S + (0 if self.streams else self.experiment.max_output_tokens):
            raise RunError(f"TensorRT-LLM is not responding: it has sent nothing for {silent_s:.0f} s.")

    def cancel(self) -> None:
        """Cancel all unfinished requests in the engine, and wait up to `CANCEL_S` seconds for it to release them."""
        self._follower.abort(list(self.running.values()))
        until_s = time.monotonic() + CANCEL_S
        while self.running and time.monotonic() < until_s:
            self._finished(until_s - time.monotonic())

    # -------------------------------------------------------------- finished requests
    def _generation(self, request: Followed) -> Generation:
        index = request.prompt.index
        if request.error is not None:
            is_refused = request.result is None and isinstance(request.error, (ValueError, TypeError))
            what = f"rejects prompt {index}" if is_refused else "failed during the run"
            hint = "" if is_refused else MEMORY_HINT(request.error)
            raise RunError(f"TensorRT-LLM {what}: {engine.reason_of(request.error)}{hint}") from request.error
        output = request.result.outputs[0]
        reason = FINISH_REASONS.get(output.finish_reason or "")
        if reason is None:
            raise RunError(f"TensorRT-LLM stopped generating for prompt {index}: {output.finish_reason}.")
        self._count(request)
        ids, end_tokens = tuple(output.token_ids), self._loaded.checkpoint.end_tokens
        if reason == "stop" and not (ids and ids[-1] in end_tokens):
            # The engine computes the end token but does not deliver it.
            ids = (*ids, min(end_tokens))
        scheduled_ns, first_ns = self._times(request)
        return Generation(
            index,
            request.batch,
            ids,
            reason,
            start_ns=self.taken_ns(request) if scheduled_ns is None else scheduled_ns,
            start_is_known=scheduled_ns is not None,
            end_ns=request.last_ns,
            prefill_end_ns=first_ns,
            chunks=self._chunks(request, len(ids)),
            arrived_ns=request.arrived_ns,
        )

    def _chunks(self, request: Followed, count: int) -> tuple[Chunk, ...]:
        """Return the tokens with their times; an end token that the engine withholds gets the request's end time."""
        if not self.streams:
            return ()
        kept_back = count - len(request.token_ids)
        return (*first_tokens(request.chunks, count), *([Chunk(request.last_ns, kept_back)] if kept_back > 0 else ()))

    def _times(self, request: Followed) -> tuple[int | None, int | None]:
        """Return when the engine began a request and when it had the first token (`time.perf_counter_ns`).

        A time is None if the engine does not report it, or reports a time before the request arrived or after it ended.
        If the first time is None, the second is None as well.
        """
        timing = getattr(_metrics(request), "timing_metrics", None)
        moments = []
        for name in ("first_scheduled_time", "first_token_time"):
            engine_s = _seconds(getattr(timing, name, None))
            at_ns = None if engine_s is None else round(engine_s * NS_PER_S) + self._loaded.clock_offset_ns
            moments.append(at_ns if at_ns is not None and request.arrived_ns <= at_ns <= request.last_ns else None)
        scheduled_ns, first_ns = moments
        return scheduled_ns, first_ns if scheduled_ns is not None and first_ns is not None else None

    def _count(self, request: Followed) -> None:
        """Add to the counters what the engine reports for a request."""
        metrics, result = _metrics(request), request.result
        of_cache = getattr(metrics, "kv_cache_metrics", None)
        of_drafts = getattr(metrics, "speculative_decoding", None)
        hits = getattr(result, "cached_tokens", None)
        reported = {
            "prefix_cache_hit_tokens": hits,
            "reused_blocks": getattr(of_cache, "num_reused_blocks", None),
            "missed_blocks": getattr(of_cache, "num_missed_blocks", None),
        }
        if self._loaded.settings["speculation"] != "none":
            reported["decoding_steps"] = getattr(result, "decoding_iter", None)
            if drafted := getattr(of_drafts, "total_draft_tokens", None):
                reported["draft_tokens"] = drafted
                reported["accepted_draft_tokens"] = getattr(of_drafts, "total_accepted_draft_tokens", None)
        reported["prefix_cache_queried_tokens"] = None if hits is None else len(request.prompt.token_ids)
        for name, value in reported.items():
            if value is not None:
                self.counters[name] = self.counters.get(name, 0.0) + value


def _metrics(request: Followed) -> Any:
    return getattr(request.result.outputs[0], "request_perf_metrics", None)


def _seconds(moment: Any) -> float | None:
    """Return a time on the engine's steady clock in seconds; None if it is missing or 0."""
    seconds = getattr(moment, "total_seconds", lambda: moment)()
    return float(seconds) if isinstance(seconds, (int, float)) and seconds > 0 else None
