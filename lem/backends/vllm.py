"""vLLM's engine, driven step by step in this process; with several GPUs it starts workers of its own.

Prompts go in as token ids and come out as token ids: tokenizer, end tokens and seeds are those of every backend. Times,
queueing, cache hits, preemptions and accepted drafts are the engine's own figures. vLLM is imported when the engine
starts, not before: it takes ten seconds and more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lem.backends import checkpoint, vllm_source
from lem.backends.base import Backend, Encoded, Generation
from lem.backends.engine import as_text, clock_offset_ns, compiled_graphs, reason_of
from lem.backends.placement import show_own_gpus
from lem.backends.prompts import encode, end_tokens
from lem.backends.vllm_options import RESOLVED, about_key, engine_arguments, given, objections, sampling_parameters
from lem.backends.vllm_source import COUNTERS, warnings_of
from lem.errors import Interrupted, RunError
from lem.machine.gpu import Gpu
from lem.machine.host import Host, cpu_model, peak_memory_bytes
from lem.record import CodedWarning, EngineInfo, Memory, ModelInfo
from lem.spec.engines import VllmBackend
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed, runs_in_one_process
from lem.spec.rules import Objection
from lem.warning_codes import warning
from lem.workload.batching import plan_batches
from lem.workload.flops import Architecture
from lem.workload.models import Model, find
from lem.workload.tokens import Chunk
from lem.workload.traffic import Arrivals, as_places_become_free

ENVIRONMENT = {
    # The engine's loop runs in this process: its clock, its memory and its errors are ours.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # A process with threads, such as this one, must not be forked.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# Takes precedence over the option in vLLM, so it must not be there when the option is set.
CPU_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
# An interruption reaches the engine's own processes before it reaches this one.
INTERRUPTION_S = 1.0
MEMORY_WORDS = ("out of memory", "free memory", "available memory", "kv cache", "gpu_memory_utilization")


@dataclass
class _Request:
    """A prompt that the engine works on, and the tokens that it has handed out so far."""

    prompt: Encoded
    batch: int
    arrived_ns: int
    token_ids: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


class Vllm(Backend):
    """See the module."""

    tells = frozenset(["tokens", "model", "prefill", "flops", "counters"])

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, VllmBackend)
        self._experiment = experiment
        self._options = experiment.backend
        self._found: Model | None = None
        self._engine: Any = None
        self._lora: Any = None
        self._tokenizer: Any = None
        self._hollow: Any = None
        self._end_tokens: frozenset[int] = frozenset()
        self._adapter_weights: tuple[int, int] = (0, 0)
        self._expected: Sequence[Gpu] = ()
        self._clock_offset_ns = 0
        self._counted: Mapping[str, float] = {}
        self._attention: Sequence[str] = ()
        self._loaded_weights: Sequence[int] = (0, 0)
        self._graphs_before = 0
        self._is_broken = False
        self._has_run = False
        self._running: dict[str, _Request] = {}

    # -------------------------------------------------------------- before the run
    @classmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Object to options that this host, this model or the installed vLLM cannot honour."""
        return objections(experiment, model, host)

    @classmethod
    def about_key(cls, name: str) -> str | None:
        """Say where an argument of vLLM goes, or what there is instead of one that it has dropped."""
        return about_key(name)

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return True where there is a GPU and vLLM was not built for the CPU."""
        return bool(host.gpus) and not host.is_built_for_cpu("vllm")

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return the first visible GPUs, as many as all processes use, or none for a build for the CPU."""
        if not self._on_gpu:
            return ()
        needed = gpus_needed(self._experiment)
        self._expected = host.gpus[:needed]
        return self._expected

    @property
    def _on_gpu(self) -> bool:
        return not vllm_source.is_built_for_cpu()

    @property
    def _degree(self) -> int:
        """Number of GPUs, or on a CPU of workers, that this process runs the model on."""
        return self._experiment.parallelism.degree if runs_in_one_process(self._experiment) else 1

    # -------------------------------------------------------------- loading
    def start(self) -> None:
        """Import vLLM, which reads its environment variables at that moment, and compare its clock with ours."""
        os.environ.update(ENVIRONMENT)
        if self._options.kv_cache_memory_bytes is not None:
            os.environ.pop(CPU_CACHE_VARIABLE, None)
        if self._on_gpu:
            show_own_gpus(self.local_rank, self._degree)
        try:
            import vllm.v1.engine.llm_engine  # noqa: F401
        except ImportError as error:
            raise RunError(f"vLLM cannot be imported: {reason_of(error)}") from error
        self._clock_offset_ns = clock_offset_ns()

    def load(self) -> None:
        """Load tokenizer, weights and adapter, and let the engine allocate its cache."""
        self._found = find(self._experiment.model or "", self._experiment.revision)
        trusted = self._experiment.trust_remote_code
        self._tokenizer = checkpoint.load_tokenizer(self._found, trusted=trusted)
        self._hollow = self._load_hollow()
        self._end_tokens = end_tokens(checkpoint.generation_config(self._found, trusted=trusted), self._tokenizer)
        adapter = None if self._experiment.adapter is None else checkpoint.folder_of(self._experiment.adapter)
        self._engine = self._load_engine(adapter)
        if adapter is not None:
            self._load_adapter(adapter)
        # Asked for now: workers that have died cannot be asked for the record.
        self._attention = sorted({name for names in self._on_workers(vllm_source.attention_backends) for name in names})
        self._loaded_weights = [sum(each) for each in zip(*self._on_workers(vllm_source.weights), strict=True)]
        self._check_arrived()
        self._check_devices()

    def _load_hollow(self) -> Any:
        """Return the model without weights, its config changed as the engine is told to; None where it is unknown."""
        assert self._found is not None
        arguments = self._options.engine_args or {}
        if "hf_config_path" in arguments:
            return None
        overrides = arguments.get("hf_overrides")
        changes = overrides if isinstance(overrides, dict) else None
        return checkpoint.load_hollow(self._found, trusted=self._experiment.trust_remote_code, changes=changes)

    def _load_engine(self, adapter: Path | None) -> Any:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        assert self._found is not None
        rank = None if adapter is None else checkpoint.rank_of(adapter)
        arguments = engine_arguments(self._experiment, self._found, on_gpu=self._on_gpu, lora_rank=rank)
        try:
            return LLMEngine.from_engine_args(EngineArgs(**arguments))
        except Interrupted:
            raise
        except Exception as error:
            raise RunError(f"vLLM could not load {self._found.name}: {reason_of(error)}{_hint(error)}") from error

    def _load_adapter(self, adapter: Path) -> None:
        from vllm.lora.request import LoRARequest

        self._lora = LoRARequest("adapter", 1, str(adapter))
        try:
            self._engine.engine_core.add_lora(self._lora)
        except Interrupted:
            raise
        except Exception as error:
            raise RunError(f"vLLM could not load the adapter {adapter}: {reason_of(error)}") from error
        self._adapter_weights = checkpoint.weights_of(adapter)

    def _check_arrived(self) -> None:
        """Refuse to run where vLLM has put something else in the place of what was asked for.

        Of quantization that it is there: vLLM chooses faster kernels for the same weights, by other names.
        """
        for name, asked in given(self._options).items():
            used = ",".join(self._attention) if name == "attention_backend" else self._resolved(name)
            is_there = used is not None if name == "quantization" else as_text(used) == as_text(asked)
            if not is_there:
                raise RunError(
                    f"backend.{name} is {asked}, and vLLM uses {as_text(used)} for this model on this device. "
                    "Set that, or leave it out."
                )

    def _resolved(self, name: str) -> Any:
        """Return an option's value in the engine's own configuration."""
        value = self._engine.vllm_config
        for part in RESOLVED[name].split("."):
            value = getattr(value, part)
        return value

    def _check_devices(self) -> None:
        """Make sure that the GPUs that are metered are those that compute."""
        if not self._on_gpu or not self._expected:
            return
        first = self.local_rank * self._degree
        expected = self._expected[first : first + self._degree]
        used = self._on_workers(vllm_source.device_uuid)
        strangers = [uuid for uuid in used if not any(gpu.mig_uuid or uuid in gpu.uuid for gpu in expected)]
        if strangers:
            raise RunError(
                f"vLLM computes on {', '.join(strangers)}, and {', '.join(gpu.uuid for gpu in expected)} is metered. "
                "Set CUDA_VISIBLE_DEVICES to the GPUs to use."
            )

    def _on_workers(self, function: Callable[[Any], Any]) -> list[Any]:
        """Return what a function returns in each of the engine's workers."""
        results: list[Any] = self._engine.collective_rpc(function)
        return results

    # -------------------------------------------------------------- running
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize each text by itself, with the model's own special tokens."""
        return encode(self._tokenizer, texts, self._experiment, self._engine.vllm_config.model_config.max_model_len)

    def forget(self) -> None:
        """Empty the prefix cache, so that no measured prompt profits from the warm-up, and count anew."""
        self._engine.reset_prefix_cache()
        self._counted = self._totals()
        self._graphs_before = compiled_graphs()
        self._has_run = False

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Run batch after batch, each yielded as a whole; or all at once, each request yielded when it is finished."""
        self._has_run = True
        together = self._experiment.batching.strategy != "continuous"
        batches = plan_batches([len(p.token_ids) for p in prompts], self._experiment.batching)
        for number, positions in enumerate(batches):
            finished = self._run({str(position): prompts[position] for position in positions}, number)
            if together:
                done = {name: generation for some in finished for name, generation in some.items()}
                yield [done[str(position)] for position in positions]
            else:
                yield from (list(some.values()) for some in finished)

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Give each prompt to the engine as it arrives, in the midst of the others; else batch after batch."""
        if self._experiment.batching.strategy != "continuous":
            yield from super().serve(arrivals, at_most)
            return
        self._has_run = True
        with self._taking_back():
            for number, done in enumerate(self._served(arrivals)):
                yield [replace(generation, batch=number) for generation in done]

    def _served(self, arrivals: Arrivals[Encoded]) -> Iterator[Sequence[Generation]]:
        """Yield those that finish in the same step; the engine has a queue of its own, and is given all that comes."""
        return as_places_become_free(
            arrivals,
            sys.maxsize,
            running=lambda: len(self._running),
            begin=lambda each: self._add(str(each.request.index), _Request(each.request, 0, each.at_ns)),
            advance=lambda: list(self._advance().values()),
        )

    def _run(self, requests: Mapping[str, Encoded], batch: int) -> Iterator[dict[str, Generation]]:
        """Give requests to the engine, and yield those that finish in the same step, by their ids."""
        with self._taking_back():
            for name, prompt in requests.items():
                self._add(name, _Request(prompt, batch, time.perf_counter_ns()))
            while self._running:
                if done := self._advance():
                    yield done

    @contextmanager
    def _taking_back(self) -> Iterator[None]:
        """Take back from the engine what nobody waits for any more; remember when it has broken down."""
        try:
            yield
        except GeneratorExit:
            self._engine.abort_request(list(self._running))
            raise
        except BaseException:
            self._is_broken = True
            raise
        finally:
            self._running.clear()

    def _add(self, name: str, request: _Request) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        prompt = request.prompt
        parameters = SamplingParams(
            **sampling_parameters(self._experiment, prompt.index, self._end_tokens),
            output_kind=RequestOutputKind.DELTA if self._streams else RequestOutputKind.FINAL_ONLY,
        )
        try:
            self._engine.add_request(name, tokens_input(list(prompt.token_ids)), parameters, lora_request=self._lora)
        except ValueError as error:
            raise RunError(f"vLLM refuses prompt {prompt.index}: {reason_of(error)}") from error
        self._running[name] = request

    @property
    def _streams(self) -> bool:
        return self._experiment.streaming.enabled

    def _advance(self) -> dict[str, Generation]:
        """Let the engine take a step, and return what it has finished."""
        outputs, now_ns = self._step(), time.perf_counter_ns()
        done = {}
        for output in outputs:
            request = self._running[output.request_id]
            (completion,) = output.outputs
            request.token_ids += completion.token_ids
            if self._streams and completion.token_ids:
                request.chunks.append(Chunk(now_ns, len(completion.token_ids)))
            if output.finished:
                done[output.request_id] = self._generation(output, self._running.pop(output.request_id))
        return done

    def _step(self) -> list[Any]:
        try:
            outputs: list[Any] = self._engine.step()
        except Interrupted:
            raise
        except Exception as error:
            if self._degree > 1:
                time.sleep(INTERRUPTION_S)
            has_lost_a_worker = getattr(self._engine.model_executor, "is_failed", False)
            reason = "one of its worker processes has died." if has_lost_a_worker else reason_of(error)
            raise RunError(f"vLLM stopped in the middle of its work: {reason}{_hint(error)}") from error
        return outputs

    def _generation(self, output: Any, request: _Request) -> Generation:
        (completion,), times, index = output.outputs, output.metrics, request.prompt.index
        if completion.finish_reason not in ("stop", "length"):
            raise RunError(f"vLLM gave up prompt {index}: {completion.finish_reason}.")
        return Generation(
            index,
            request.batch,
            tuple(request.token_ids),
            completion.finish_reason,
            start_ns=self._ns(times.scheduled_ts),
            # A token is there for its user when the step has returned.
            end_ns=request.chunks[-1].at_ns if request.chunks else self._ns(times.last_token_ts),
            prefill_end_ns=self._ns(times.first_token_ts),
            chunks=tuple(request.chunks),
            arrived_ns=request.arrived_ns,
        )

    def _ns(self, engine_s: float) -> int:
        """Return a moment of the engine's clock on ours."""
        return round(engine_s * 1e9) + self._clock_offset_ns

    def synchronize(self) -> None:
        """Wait for the GPUs of all workers; on a CPU a step is done when it returns."""
        if self._engine is not None and self._on_gpu and not self._is_broken:
            self._on_workers(vllm_source.synchronize)

    # -------------------------------------------------------------- telling
    def counters(self) -> dict[str, float] | None:
        """Return the engine's counts since `forget`; those of speculation only where it is on."""
        if not self._has_run:
            return None
        return {name: total - self._counted.get(name, 0.0) for name, total in self._totals().items()}

    def _totals(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for metric in self._engine.get_metrics():
            if metric.name in COUNTERS:
                name = COUNTERS[metric.name]
                totals[name] = totals.get(name, 0.0) + metric.value
        return totals

    def reset_peak_memory(self) -> None:
        """Reset the CUDA allocators' peaks; a process's own peak cannot be reset."""
        if self._on_gpu:
            self._on_workers(vllm_source.reset_peak)

    def peak_memory(self) -> Memory:
        """Return the allocators' peaks since the reset, summed over the workers; on a CPU the processes' own."""
        if self._on_gpu:
            several = f", sum of {self._degree} GPUs" if self._degree > 1 else ""
            scope = f"GPU allocator, measured window, the whole key/value cache included{several}"
            return Memory(None if self._is_broken else sum(self._on_workers(vllm_source.peak_on_gpu)), scope)
        if self._degree == 1:
            return Memory(peak_memory_bytes(), "process, since its start")
        # An engine that stopped, or was stopped, in the middle of a step does not answer any more.
        peaks = [None] if self._is_broken else [peak_memory_bytes(), *self._on_workers(vllm_source.peak_of_process)]
        known = [peak for peak in peaks if peak is not None]
        together = sum(known) if len(known) == len(peaks) else None
        return Memory(together, f"process and its {self._degree} workers, since their start")

    def model_info(self) -> ModelInfo | None:
        """Describe the model as it was loaded."""
        assert self._found is not None
        config, of_adapter = self._engine.vllm_config.model_config, sum(self._adapter_weights)
        parameters, size = self._weights(config.dtype.itemsize)
        return ModelInfo(
            name=self._found.name,
            revision=self._found.revision,
            architecture=", ".join(self._found.config.get("architectures") or config.architectures),
            parameters=parameters + of_adapter,
            random_weights=self._has_random_weights,
            weights_bytes=None if size is None else size + of_adapter * config.dtype.itemsize,
            dtype=str(config.dtype).removeprefix("torch."),
            adapter=self._experiment.adapter,
            quantization=config.quantization,
        )

    def _weights(self, bytes_of_dtype: int) -> tuple[int, int | None]:
        """Return the number of the model's weights, and their size as loaded.

        On a CPU vLLM repacks them and empties the modules, so their size is that of so many values of the dtype, and
        None where they are quantized.
        """
        count, size = self._loaded_weights
        is_quantized = self._engine.vllm_config.model_config.quantization is not None
        if not self._on_gpu and is_quantized:
            return count if self._hollow is None else self._hollow.num_parameters(), None
        if self._hollow is None:
            return count, size
        known = self._hollow.num_parameters()
        return known, size if self._on_gpu else known * bytes_of_dtype

    @property
    def _has_random_weights(self) -> bool:
        assert self._found is not None
        return self._found.random_weights or self._options.load_format == "dummy"

    def engine_info(self) -> EngineInfo:
        """Describe vLLM and the configuration that it has settled on."""
        import torch

        expected = self._expected[self.local_rank * self._degree :]
        return EngineInfo(
            backend="vllm",
            version=f"vllm {vllm_source.version()}, torch {torch.__version__}",
            device=", ".join(f"cuda:{i}" for i in range(self._degree)) if self._on_gpu else "cpu",
            device_name=expected[0].name if expected else cpu_model(),
            settings={
                **self._settings(),
                "end_token_ids": ",".join(map(str, sorted(self._end_tokens))) or "none",
                "chat_template": "on" if self._experiment.chat_template else "off",
            },
        )

    def _settings(self) -> dict[str, str]:
        """Return the engine's resolved configuration, as far as it changes numbers."""
        config = self._engine.vllm_config
        options = {name: self._resolved(name) for name in RESOLVED}
        speculation = config.speculative_config
        values = {
            **options,
            "attention_backend": ",".join(self._attention),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "kv_cache_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "compilation_mode": getattr(config.compilation_config.mode, "name", None),
            "cudagraph_mode": getattr(config.compilation_config.cudagraph_mode, "name", None),
            "lora": None if config.lora_config is None else f"rank {config.lora_config.max_lora_rank}",
            "speculation": None
            if speculation is None
            else f"{speculation.method}, {speculation.num_speculative_tokens} tokens",
            "engine_args": json.dumps(self._options.engine_args) if self._options.engine_args else None,
        }
        return {name: as_text(value) for name, value in values.items()}

    def architecture(self) -> Architecture | None:
        """Read the sizes off the model without weights, by the same code as for PyTorch, and add the adapter's."""
        return checkpoint.sizes(self._hollow, self._adapter_weights)

    def warnings(self) -> list[CodedWarning]:
        """Say so when the weights are random, and when the engine did less or more work than the tokens say."""
        assert self._found is not None
        notes = []
        if self._has_random_weights:
            notes.append(warning("random_weights", f"{self._found.name} has random weights: its text has no meaning."))
        notes += warnings_of(self.counters() or {})
        if self._has_run and (graphs := compiled_graphs() - self._graphs_before):
            notes.append(warning("compiled_in_window", f"{graphs} graphs were compiled in the window."))
        return notes

    def close(self) -> None:
        """End the engine and its workers, which gives the memory back."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()


def _hint(error: BaseException) -> str:
    text = str(error).lower()
    if not any(words in text for words in MEMORY_WORDS):
        return ""
    return " Set backend.gpu_memory_utilization, backend.kv_cache_memory_bytes or backend.max_model_len."
