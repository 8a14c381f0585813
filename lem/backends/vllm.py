"""vLLM's engine, run step by step in this process. With several GPUs, the engine starts its own workers.

Prompts and outputs are passed as token ids, so that the tokenizer, end tokens and seeds are the same for every backend.
The engine itself reports when a request's prefill began and ended and when its last token was generated, and how many
cache hits, preemptions and accepted drafts there were. With streaming, tokens are timed in this module instead, when
the step that generated them returns. vLLM is imported only when the engine starts, because that takes ten seconds or
more.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import Any

from lem.backends import checkpoint, engine, vllm_source
from lem.backends.base import Encoded, Generation, needed
from lem.backends.checkpoint import Checkpoint
from lem.backends.placement import show_own_gpus
from lem.backends.session import Loaded, Request, Session, SessionBackend
from lem.backends.vllm_options import RESOLVED, about_key, engine_arguments, given, objections, sampling_parameters
from lem.errors import Interrupted, RunError
from lem.machine.host import Host, peak_memory_bytes
from lem.quantities import NS_PER_S
from lem.record import CodedWarning, Memory, ModelInfo
from lem.spec.engines import VllmBackend
from lem.spec.experiment import Experiment
from lem.workload.models import Model

ENVIRONMENT = {
    # This makes the engine's loop run in this process, so that it shares this process's clock, memory and errors.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # This process has threads, so it must not be forked.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# vLLM gives this variable precedence over the option, so the two must not be set together.
CPU_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
# How long to wait for a signal after a failure: Ctrl-C may have reached the engine's processes before this process.
INTERRUPTION_S = 1.0
MEMORY_HINT = engine.MemoryHint(
    ("out of memory", "free memory", "available memory", "kv cache", "gpu_memory_utilization"),
    "Set backend.gpu_memory_utilization, backend.kv_cache_memory_bytes or backend.max_model_len.",
)


class Vllm(SessionBackend["VllmSession"]):
    """The vLLM backend; the module docstring describes it."""

    reports = frozenset(["tokens", "model", "prefill", "flops", "counters"])

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        assert isinstance(experiment.backend, VllmBackend)
        self._options = experiment.backend
        self._ending = ExitStack()
        # The engine's counters, and the number of graphs compiled by this process, at the last `forget`.
        self._totals_before: Mapping[str, float] = {}
        self._graphs_before = 0

    # -------------------------------------------------------------- before the run
    objections = staticmethod(objections)
    about_key = staticmethod(about_key)

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return whether a GPU is visible and vLLM was not built for the CPU."""
        return bool(host.gpus) and not host.is_built_for_cpu("vllm")

    @property
    def _on_gpu(self) -> bool:
        return not vllm_source.is_built_for_cpu()

    @property
    def _versions(self) -> str:
        return f"vllm {vllm_source.version()}"

    # -------------------------------------------------------------- loading
    def start(self) -> None:
        """Set the environment variables that vLLM reads on import, and import vLLM."""
        os.environ.update(ENVIRONMENT)
        if self._options.kv_cache_memory_bytes is not None:
            os.environ.pop(CPU_CACHE_VARIABLE, None)
        if self._on_gpu:
            show_own_gpus(self.local_rank, self._degree)
        try:
            import vllm.v1.engine.llm_engine  # noqa: F401
        except ImportError as error:
            raise RunError(f"vLLM cannot be imported: {engine.reason_of(error)}") from error

    def load(self) -> None:
        """Load the tokenizer, weights and adapter, and let the engine allocate its cache."""
        self._loaded = load(self._experiment, self._ending)
        if not self._own_gpus:
            return
        used = on_workers(self._loaded.engine, vllm_source.worker_gpu_uuid)
        strangers = [uuid for uuid in used if not any(gpu.is_divided or uuid in gpu.uuid for gpu in self._own_gpus)]
        if strangers:
            metered = ", ".join(gpu.uuid for gpu in self._own_gpus)
            raise RunError(
                f"vLLM computes on {', '.join(strangers)}, but lem meters {metered}. "
                "Set CUDA_VISIBLE_DEVICES to the GPUs to use."
            )

    def close(self) -> None:
        """Shut down the engine and its workers, which frees the memory."""
        self._loaded = None
        self._ending.close()

    # -------------------------------------------------------------- running
    def forget(self) -> None:
        """Empty the prefix cache, so that no measured prompt benefits from the warm-up, and reset the counters."""
        loaded = needed(self._loaded)
        loaded.engine.reset_prefix_cache()
        self._totals_before = totals(loaded.engine)
        self._graphs_before = engine.compiled_graphs()
        self._session = None

    def _begin(self, loaded: Loaded) -> VllmSession:
        return VllmSession(self._experiment, loaded, self._degree)

    def synchronize(self) -> None:
        """Wait for the GPUs of all workers.

        On a CPU there is nothing to wait for, because a step has finished by the time its call returns.
        """
        if self._loaded is not None and self._on_gpu and not self._is_broken:
            on_workers(self._loaded.engine, vllm_source.worker_synchronize)

    # -------------------------------------------------------------- reporting
    def counters(self) -> dict[str, float] | None:
        """Return the engine's counters since `forget`; None if nothing has run since.

        Counters of speculative decoding are included only if it is on.
        """
        if self._session is None:
            return None
        now = totals(needed(self._loaded).engine)
        return {name: total - self._totals_before.get(name, 0.0) for name, total in now.items()}

    def reset_peak_memory(self) -> None:
        """Reset the peaks of the CUDA allocators; the peak of a process cannot be reset."""
        if self._on_gpu:
            on_workers(needed(self._loaded).engine, vllm_source.worker_reset_gpu_peak)

    def peak_memory(self) -> Memory:
        """Return the CUDA allocators' peaks since the reset, summed over workers; on a CPU, the processes' peaks."""
        loaded = needed(self._loaded)
        if self._on_gpu:
            several = f", sum of {self._degree} GPUs" if self._degree > 1 else ""
            scope = f"GPU allocator, measured window, including the whole key/value cache{several}"
            return Memory(
                None if self._is_broken else sum(on_workers(loaded.engine, vllm_source.worker_gpu_peak)), scope
            )
        if self._degree == 1:
            return Memory(peak_memory_bytes(), "process, since its start")
        workers = [None] if self._is_broken else on_workers(loaded.engine, vllm_source.worker_process_peak)
        scope = f"process and its {self._degree} workers, since their start"
        return Memory(engine.sum_if_known([peak_memory_bytes(), *workers]), scope)

    def warnings(self) -> list[CodedWarning]:
        """Warn about random weights, cache hits, preemptions, and compilation in the window."""
        graphs = 0 if self._session is None else engine.compiled_graphs() - self._graphs_before
        return [*super().warnings(), *engine.compilation_warnings(graphs)]


# ------------------------------------------------------------------ the loaded engine
def load(experiment: Experiment, ending: ExitStack) -> Loaded:
    """Load the tokenizer, weights and adapter, and let the engine allocate its cache.

    Args:
        experiment: an experiment that has passed preflight.
        ending: an exit stack that will shut down the engine and its workers, even if this function fails after
            starting them.

    Raises:
        RunError: vLLM cannot load the model or the adapter, or does not use the requested options.
    """
    assert isinstance(experiment.backend, VllmBackend)
    options = experiment.backend
    read = checkpoint.read(experiment, _config_changes(options))
    adapter = None if experiment.adapter is None else checkpoint.adapter_folder(experiment.adapter)
    llm = _load_engine(experiment, read.model, adapter)
    ending.callback(llm.engine_core.shutdown)
    lora, adapter_weights = (None, (0, 0)) if adapter is None else _load_adapter(llm, adapter)
    attention = ",".join(sorted({name for names in on_workers(llm, vllm_source.worker_kernels) for name in names}))
    _check_options(llm, options, attention)
    random_weights = read.model.random_weights or options.load_format == "dummy"
    return Loaded(
        engine=llm,
        checkpoint=read,
        lora=lora,
        adapter_weights=adapter_weights,
        positions=int(llm.vllm_config.model_config.max_model_len),
        clock_offset_ns=engine.clock_offset_ns(),
        random_weights=random_weights,
        model=_model_info(llm, read, experiment.adapter, sum(adapter_weights), random_weights),
        settings=_settings(llm, options, attention),
    )


def _config_changes(options: VllmBackend) -> dict[str, Any] | None:
    """Return the changes to the model's config that the user set; None if the engine reads a different config."""
    arguments = options.engine_args or {}
    overrides = arguments.get("hf_overrides")
    if "hf_config_path" in arguments:
        return None
    return overrides if isinstance(overrides, dict) else {}


def _load_engine(experiment: Experiment, model: Model, adapter: Path | None) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    rank = None if adapter is None else checkpoint.adapter_rank(adapter)
    arguments = engine_arguments(experiment, model, on_gpu=not vllm_source.is_built_for_cpu(), lora_rank=rank)
    with engine.failing_as(f"vLLM could not load {model.name}", MEMORY_HINT):
        return LLMEngine.from_engine_args(EngineArgs(**arguments))


def _load_adapter(llm: Any, folder: Path) -> tuple[Any, tuple[int, int]]:
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("adapter", 1, str(folder))
    with engine.failing_as(f"vLLM could not load the adapter {folder}"):
        llm.engine_core.add_lora(lora)
    return lora, checkpoint.adapter_weights(folder)


def _check_options(llm: Any, options: VllmBackend, attention: str) -> None:
    """Refuse to run if vLLM does not use the requested options.

    For quantization, the method's name is not compared: vLLM may choose faster kernels with a different name for the
    same weights.
    """
    for name, asked in given(options).items():
        used = attention if name == "attention_backend" else _resolved(llm, name)
        is_in_use = used is not None if name == "quantization" else engine.as_text(used) == engine.as_text(asked)
        if not is_in_use:
            raise RunError(
                f"backend.{name} is {asked}, but vLLM uses {engine.as_text(used)} for this model on this device. "
                "Set the option to the value in use, or leave it out."
            )


def _resolved(llm: Any, name: str) -> Any:
    """Return an option's value in the engine's own configuration."""
    return attrgetter(RESOLVED[name])(llm.vllm_config)


def _model_info(
    llm: Any, read: Checkpoint, adapter: str | None, adapter_weights: int, random_weights: bool
) -> ModelInfo:
    """Describe the model as loaded.

    On a CPU, vLLM repacks the weights and empties the modules. The size is then computed as the number of weights times
    the size of the dtype, and is None for quantized weights.
    """
    config, on_gpu = llm.vllm_config.model_config, not vllm_source.is_built_for_cpu()
    # Only the workers, which hold the weights, know the number and size of the weights.
    count, size = (sum(each) for each in zip(*on_workers(llm, vllm_source.worker_weights), strict=True))
    known = None if read.hollow is None else read.hollow.num_parameters()
    if not on_gpu and (known is not None or config.quantization is not None):
        size = None if config.quantization is not None else known * config.dtype.itemsize
    return ModelInfo(
        name=read.model.name,
        revision=read.model.revision,
        architecture=", ".join(read.model.config.get("architectures") or config.architectures),
        parameters=(count if known is None else known) + adapter_weights,
        random_weights=random_weights,
        weights_bytes=None if size is None else size + adapter_weights * config.dtype.itemsize,
        dtype=engine.as_text(str(config.dtype)),
        adapter=adapter,
        quantization=config.quantization,
    )


def _settings(llm: Any, options: VllmBackend, attention: str) -> dict[str, str]:
    """Return the part of the engine's resolved configuration that affects the measurements."""
    config = llm.vllm_config
    speculation, lora = config.speculative_config, config.lora_config
    values = {
        **{name: _resolved(llm, name) for name in RESOLVED},
        "attention_backend": attention,
        "dtype": str(config.model_config.dtype),
        "kv_cache_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "compilation_mode": getattr(config.compilation_config.mode, "name", None),
        "cudagraph_mode": getattr(config.compilation_config.cudagraph_mode, "name", None),
        "lora": None if lora is None else f"rank {lora.max_lora_rank}",
        "speculation": None
        if speculation is None
        else f"{speculation.method}, {speculation.num_speculative_tokens} tokens",
        "engine_args": json.dumps(options.engine_args) if options.engine_args else None,
    }
    return {name: engine.as_text(value) for name, value in values.items()}


def on_workers(llm: Any, function: Callable[[Any], Any]) -> list[Any]:
    """Run a function in each of the engine's workers, and return the results."""
    results: list[Any] = llm.collective_rpc(function)
    return results


def totals(llm: Any) -> dict[str, float]:
    """Return the engine's counters since its start, under the names that records use."""
    found: dict[str, float] = {}
    for metric in llm.get_metrics():
        if name := vllm_source.COUNTERS.get(metric.name):
            found[name] = found.get(name, 0.0) + metric.value
    return found


# ------------------------------------------------------------------ requests
class VllmSession(Session[Request]):
    """The unfinished requests in vLLM, which delivers tokens step by step."""

    def __init__(self, experiment: Experiment, loaded: Loaded, degree: int) -> None:
        super().__init__(experiment)
        self._loaded, self._degree = loaded, degree

    def begin(self, key: int, prompt: Encoded, batch: int, arrived_ns: int) -> None:
        """Add a request to the engine's queue."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        loaded = self._loaded
        parameters = SamplingParams(
            **sampling_parameters(self.experiment, prompt.index, loaded.checkpoint.end_tokens),
            output_kind=RequestOutputKind.DELTA if self.streams else RequestOutputKind.FINAL_ONLY,
        )
        tokens = tokens_input(list(prompt.token_ids))
        try:
            loaded.engine.add_request(str(key), tokens, parameters, lora_request=loaded.lora)
        except ValueError as error:
            raise RunError(f"vLLM rejects prompt {prompt.index}: {engine.reason_of(error)}") from error
        self.running[key] = Request(prompt, batch, arrived_ns)

    def advance(self, next_ns: int | None = None) -> Mapping[int, Generation]:
        """Let the engine take one step, however long it takes, and return the outputs that it has finished, by key."""
        outputs, now_ns = self._step(), time.perf_counter_ns()
        done = {}
        for output in outputs:
            key = int(output.request_id)
            self.running[key].take(output.outputs[0].token_ids, now_ns, timed=self.streams)
            if output.finished:
                done[key] = self._generation(output, self.running.pop(key))
        return done

    def _step(self) -> list[Any]:
        llm = self._loaded.engine
        try:
            outputs: list[Any] = llm.step()
        except Interrupted:
            raise
        except Exception as error:
            if self._degree > 1:
                time.sleep(INTERRUPTION_S)
            has_lost_a_worker = getattr(llm.model_executor, "is_failed", False)
            reason = "one of its worker processes has died." if has_lost_a_worker else engine.reason_of(error)
            raise RunError(f"vLLM failed during the run: {reason}{MEMORY_HINT(error)}") from error
        return outputs

    def _generation(self, output: Any, request: Request) -> Generation:
        (completion,), times, index = output.outputs, output.metrics, request.prompt.index
        if completion.finish_reason not in ("stop", "length"):
            raise RunError(f"vLLM stopped generating for prompt {index}: {completion.finish_reason}.")
        return Generation(
            index,
            request.batch,
            tuple(request.token_ids),
            completion.finish_reason,
            start_ns=self._ns(times.scheduled_ts),
            # A user would receive the token when the step returns.
            end_ns=request.chunks[-1].at_ns if request.chunks else self._ns(times.last_token_ts),
            prefill_end_ns=self._ns(times.first_token_ts),
            chunks=tuple(request.chunks),
            arrived_ns=request.arrived_ns,
        )

    def _ns(self, engine_s: float) -> int:
        """Convert a time on the engine's clock to a reading of `time.perf_counter_ns`."""
        return round(engine_s * NS_PER_S) + self._loaded.clock_offset_ns

    def cancel(self) -> None:
        """Cancel all unfinished requests in the engine."""
        self._loaded.engine.abort_request([str(key) for key in self.running])
