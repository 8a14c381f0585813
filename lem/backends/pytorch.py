"""The pytorch backend: transformers' `generate` on PyTorch, in this process.

Prompts are padded on the left within a batch; the padding is masked if the model supports this, and is never counted.
Process number i of a node computes on the i-th visible GPU; with pipeline parallelism, a single process uses the first
`degree` GPUs. torch and transformers are imported only when the backend starts, because that takes seconds.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lem.backends.base import Backend, Begun, Encoded, Generation, needed
from lem.backends.checkpoint import encode, end_tokens, quantization_of, source_of
from lem.backends.engine import (
    compilation_warnings,
    compiled_graphs,
    failing_as,
    fit_warnings,
    prompt_settings,
    weights_warnings,
)
from lem.backends.fit import reported
from lem.backends.placement import split_over_ranks, spread
from lem.backends.pytorch_continuous import Continuous
from lem.backends.pytorch_forward import ForwardWatch, Noticed, cache_in, not_finite
from lem.backends.pytorch_objections import PADDING_UNMASKED, objections
from lem.backends.sizing import architecture_of, cache_bytes
from lem.errors import RunError
from lem.machine.collector import paused_collector
from lem.machine.gpu import Gpu
from lem.machine.host import Host, cpu_model, peak_memory_bytes, versions
from lem.record import CodedWarning, EngineInfo, FinishReason, Memory, ModelInfo
from lem.spec.engines import PytorchBackend
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed
from lem.spec.rules import Objection
from lem.warning_codes import warning
from lem.workload.batching import plan_batches
from lem.workload.flops import Architecture
from lem.workload.models import Model, find
from lem.workload.tokens import Chunk, first_tokens
from lem.workload.traffic import Arrivals
from lem.workload.weights import Fit, summary

# The beginning of peft's warning that an adapter lacks matrices, which peft then initializes.
ADAPTER_LACKS = "Found missing adapter keys while loading the checkpoint"


class Pytorch(Backend):
    """The PyTorch backend; the module docstring describes it."""

    reports = frozenset(["tokens", "model", "prefill", "flops", "kv_cache"])
    imports_early = True

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, PytorchBackend)
        self._experiment = experiment
        self._options = experiment.backend
        self._metered: Sequence[Gpu] = ()
        self._loaded: Loaded | None = None
        self._runner: Static | Continuous | None = None
        self._watch: ForwardWatch | None = None

    # -------------------------------------------------------------- before the run
    @classmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Return objections to options that this host or this model does not support."""
        assert isinstance(experiment.backend, PytorchBackend)
        return objections(experiment, model, host)

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return whether a GPU is visible and the CPU is not requested."""
        assert isinstance(experiment.backend, PytorchBackend)
        return bool(host.gpus) and experiment.backend.device != "cpu"

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return all GPUs that the run's processes use on this node, in CUDA's order; none on a CPU."""
        import torch

        if self._is_on_cuda(torch):
            # CUDA is not asked, because that would open its context before idle power is measured. Instead, the GPUs
            # are taken in the order of CUDA_VISIBLE_DEVICES, and `load` checks that CUDA uses the same order.
            self._metered = host.gpus[: gpus_needed(self._experiment)]
        return self._metered

    # -------------------------------------------------------------- loading
    @classmethod
    def import_engine(cls) -> None:
        """Import torch and transformers, including the parts needed for loading and generating."""
        with paused_collector():  # otherwise, it would take up a tenth of the import time
            import torch  # noqa: F401
            import transformers
            from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401 - lazy

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def start(self) -> None:
        """Import torch and transformers."""
        self.import_engine()

    def load(self) -> None:
        """Load the tokenizer, the weights and any adapter, and compile the model if requested."""
        import torch

        devices = self._own_devices(torch)
        check_devices(torch, devices, self._metered)
        loaded = self._loaded = load(self._experiment, devices, forced=self.forced)
        if self._options.torch_compile:
            loaded.inner.forward = torch.compile(loaded.inner.forward, mode=self._options.torch_compile_mode)
        watch = self._watch = ForwardWatch(loaded.inner)  # not compiled, because it keeps what passes through it
        if self._experiment.batching.strategy == "continuous":
            self._runner = Continuous(self._experiment, loaded.inner, watch, loaded.end_tokens)
        else:
            self._runner = Static(self._experiment, loaded, watch)

    def _is_on_cuda(self, torch: Any) -> bool:
        return self._options.device == "cuda" or (self._options.device == "auto" and torch.cuda.is_available())

    def _own_devices(self, torch: Any) -> list[Any]:
        """Return the devices that this process uses: some of the GPUs that CUDA shows, or the CPU."""
        if not self._is_on_cuda(torch):
            return [torch.device("cpu")]
        if strategy_of(self._experiment) == "pipeline_parallel":
            return [torch.device("cuda", index) for index in range(self._experiment.parallelism.degree)]
        return [torch.device("cuda", self.local_rank)]

    def close(self) -> None:
        """Drop the model and free the GPUs' memory."""
        if isinstance(self._runner, Continuous):
            self._runner.close()
        has_gpus = self._loaded is not None and bool(self._loaded.gpus)
        self._loaded = self._runner = None
        if has_gpus:
            import torch

            torch.cuda.empty_cache()

    # -------------------------------------------------------------- running
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize each text separately; with continuous batching, allocate the cache that these prompts need."""
        loaded = needed(self._loaded)
        positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        rows = loaded.model.get_input_embeddings().num_embeddings
        encoded = encode(loaded.tokenizer, texts, self._experiment, positions, vocabulary=rows)
        if isinstance(self._runner, Continuous):
            self._runner.make_room(encoded)
        return encoded

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Run the prompts in static batches or, if batching is continuous, as slots become free."""
        yield from self._running.generate(prompts)

    @property
    def _running(self) -> Static | Continuous:
        assert self._runner is not None
        return self._runner

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Run the waiting prompts batch by batch or, with continuous batching, accept each prompt as it arrives."""
        if isinstance(self._runner, Continuous):
            yield from self._runner.serve(arrivals, at_most)
        else:
            yield from super().serve(arrivals, at_most)

    def call_while_busy(self, work: Callable[[], None] | None) -> bool:
        """On GPUs, call `work` after each forward pass has been launched, before anything waits for its result."""
        watch = needed(self._watch)
        watch.when_launched = work if self._computes_apart else None
        return watch.when_launched is not None

    @property
    def _computes_apart(self) -> bool:
        """Whether a forward pass returns before it has been computed."""
        return bool(needed(self._loaded).gpus)

    def forget(self) -> None:
        """Reset the counts that `warnings` reports for a window.

        There is no cache to empty, because nothing is kept between prompts.
        """
        self._running.noticed = Noticed()

    def under_way(self) -> Sequence[Begun]:
        """Return the running requests of continuous batching; none for static batches, which finish as a whole."""
        return self._runner.under_way() if isinstance(self._runner, Continuous) else ()

    def synchronize(self) -> None:
        """Wait for all GPUs of this process."""
        if self._loaded is not None:
            self._loaded.synchronize()

    # -------------------------------------------------------------- reporting
    def reset_peak_memory(self) -> None:
        """Reset the CUDA allocators' peaks and the largest cache's size; a process's peak memory cannot be reset."""
        self._running.forget_cache()
        for device in needed(self._loaded).gpus:
            import torch

            torch.cuda.reset_peak_memory_stats(device)

    def peak_memory(self) -> Memory:
        """Return the CUDA allocators' peaks since the reset, summed over the GPUs; on the CPU, the process's peak."""
        gpus, of_cache = needed(self._loaded).gpus, self._running.kv_cache_bytes()
        if not gpus:
            return Memory(peak_memory_bytes(), "process, since its start", of_cache)
        import torch

        several = f", sum of {len(gpus)} GPUs" if len(gpus) > 1 else ""
        peak = sum(torch.cuda.max_memory_allocated(device) for device in gpus)
        return Memory(peak, f"GPU allocator, measured window{several}", of_cache)

    def model_info(self) -> ModelInfo | None:
        """Describe the model as loaded."""
        loaded, wanted = needed(self._loaded), self._experiment.quantization
        found, model = loaded.found, loaded.model
        bits = "8-bit" if wanted.load_in_8bit else f"4-bit {wanted.bnb_4bit_quant_type}"
        arithmetic = "int8" if wanted.load_in_8bit else wanted.bnb_4bit_compute_dtype
        return ModelInfo(
            name=found.name,
            revision=found.revision,
            architecture=", ".join(found.config.get("architectures") or [type(model).__name__]),
            parameters=model.num_parameters(),
            random_weights=found.random_weights or bool(loaded.fit.missing),
            weights_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            dtype=str(model.dtype).removeprefix("torch."),
            adapter=self._experiment.adapter,
            **loaded.fit.recorded,
            quantization=f"bitsandbytes {bits}" if wanted.quantization else quantization_of(found),
            arithmetic=arithmetic if wanted.quantization else None,
        )

    def engine_info(self) -> EngineInfo:
        """Describe PyTorch, transformers and the effective settings."""
        import torch

        loaded, runner = needed(self._loaded), self._running
        strategy = strategy_of(self._experiment)
        return EngineInfo(
            backend="pytorch",
            version=f"transformers {versions()['transformers']}, torch {torch.__version__}",
            device=", ".join(map(str, loaded.devices)),
            device_name=torch.cuda.get_device_name(loaded.devices[0]) if loaded.gpus else cpu_model(),
            settings={
                "attn_implementation": str(loaded.model.config._attn_implementation),
                "cache_implementation": runner.cache,
                "torch_compile": self._options.torch_compile_mode if self._options.torch_compile else "off",
                "torch_threads": str(torch.get_num_threads()),
                "parallelism": "none" if strategy == "none" else f"{strategy} {self._experiment.parallelism.degree}",
                **prompt_settings(self._experiment, loaded.end_tokens),
                **runner.settings(),
            },
        )

    def architecture(self) -> Architecture:
        """Return the sizes of the loaded model, including its adapter."""
        return architecture_of(needed(self._loaded).model)

    def warnings(self) -> list[CodedWarning]:
        """Warn about random or unused weights, and about suspect tokens and compilation in the window."""
        loaded = needed(self._loaded)
        return [
            *weights_warnings(loaded.found.name, loaded.found.random_weights),
            *fit_warnings(loaded.found.name, loaded.fit),
            *_noticed_warnings(self._running.noticed),
            *compilation_warnings(self._running.graphs_compiled),
        ]


def _noticed_warnings(noticed: Noticed) -> Iterator[CodedWarning]:
    if noticed.not_finite:
        yield warning("not_finite", f"requests whose logits contain infinite values or NaN: {noticed.not_finite}.")
    if noticed.padded:
        text = f"the model does not mask padding; requests that were padded in their batches: {noticed.padded}."
        yield warning("padding_changed_tokens", text)


# ------------------------------------------------------------------ loading
@dataclass(frozen=True)
class Loaded:
    """A loaded model, and everything needed to generate text with it.

    `devices` are the devices of this process; the first takes the inputs. `inner` is the transformers model inside
    `model` if an adapter wraps it, otherwise `model` itself. `generation_config` sets every option, so that the
    defaults that ship with the model are never used. `pad_token` is the token that pads shorter prompts. `fit` is the
    loader's report on the weights.
    """

    found: Model
    devices: Sequence[Any]
    tokenizer: Any
    model: Any
    inner: Any
    end_tokens: frozenset[int]
    generation_config: Any
    pad_token: int
    fit: Fit

    @property
    def gpus(self) -> list[Any]:
        """The GPUs among the devices."""
        return [device for device in self.devices if device.type == "cuda"]

    def synchronize(self) -> None:
        """Wait for all GPUs of this process."""
        for device in self.gpus:
            import torch

            torch.cuda.synchronize(device)


def strategy_of(experiment: Experiment) -> str:
    """Return the strategy of parallelism; if the degree is 1, the result is always `none`."""
    return experiment.parallelism.strategy if experiment.parallelism.degree > 1 else "none"


def check_devices(torch: Any, devices: Sequence[Any], metered: Sequence[Gpu]) -> None:
    """Check that the GPUs in use are the metered GPUs, and make the first of them CUDA's current device.

    Raises:
        RunError: CUDA shows too few GPUs, or different ones because CUDA numbers GPUs in its own order.
    """
    if devices[0].type != "cuda":
        return
    required, shown = devices[-1].index + 1, torch.cuda.device_count()
    if required > shown:
        raise RunError(
            f"This process needs {required} GPUs, but CUDA shows it only {shown}. "
            "Note that CUDA shows a process only the first of several MIG instances."
        )
    torch.cuda.set_device(devices[0])
    for device in devices if metered else ():
        expected, uuid = metered[device.index], str(torch.cuda.get_device_properties(device).uuid)
        if not expected.is_divided and uuid not in expected.uuid:
            raise RunError(
                f"CUDA's GPU {device.index} is {uuid}, but the driver's is {expected.uuid}. "
                "Set CUDA_DEVICE_ORDER=PCI_BUS_ID, so that lem meters the GPU that runs the model."
            )


def load(experiment: Experiment, devices: Sequence[Any], *, forced: bool) -> Loaded:
    """Load the tokenizer, the weights (onto the devices) and any adapter.

    Args:
        experiment: the experiment, which names the model.
        devices: the devices of this process.
        forced: whether to accept missing weights, which are then random.

    Raises:
        RunError: the model cannot be loaded, or lacks weights and `forced` is False.
    """
    import torch
    import transformers

    found = find(experiment.model or "", experiment.revision)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        found.path, padding_side="left", **source_of(found, experiment)
    )
    model, fit = _load_weights(torch, transformers, experiment, found, devices)
    if fit.missing and not forced:
        raise RunError(
            f"{found.name} lacks weights, which transformers has initialized at random: {summary(fit.missing)}. "
            "Choose a complete checkpoint of a causal language model, or use --force to run this one anyway."
        )
    ends = end_tokens(model.generation_config, tokenizer)
    pad = _padding_token(tokenizer, model.get_input_embeddings().num_embeddings)
    special = {"pad_token_id": pad, "eos_token_id": sorted(ends) or None}
    # `generate` takes missing options from the model's own config, which may turn on sampling or penalties.
    model.generation_config = transformers.GenerationConfig(**special)
    config = _generation_config(transformers, experiment, special)
    inner = model if experiment.adapter is None else model.get_base_model()
    return Loaded(found, devices, tokenizer, model, inner, ends, config, pad, fit)


def _padding_token(tokenizer: Any, embeddings: int) -> int:
    """Return a token for padding; any token with an embedding will do, because padding is masked out and cut off."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(each) for each in candidates if each is not None and each < embeddings), 0)


def _load_weights(
    torch: Any, transformers: Any, experiment: Experiment, found: Model, devices: Sequence[Any]
) -> tuple[Any, Fit]:
    """Return the model, and the loader's report on its weights."""
    assert isinstance(experiment.backend, PytorchBackend)
    options = _placement(torch, transformers, experiment, found, devices)
    if experiment.fp_precision != "auto":
        options["dtype"] = getattr(torch, experiment.fp_precision)
    else:
        # On a GPU, the checkpoint's own dtype is used. CPUs without half-precision units are fastest in float32.
        options["dtype"] = "auto" if devices[0].type == "cuda" else torch.float32
    if experiment.backend.attn_implementation != "auto":
        options["attn_implementation"] = experiment.backend.attn_implementation
    wanted = experiment.quantization
    in_4_bits = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": wanted.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": wanted.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": getattr(torch, wanted.bnb_4bit_compute_dtype),
    }
    if wanted.quantization:
        chosen = {"load_in_8bit": True} if wanted.load_in_8bit else in_4_bits
        options["quantization_config"] = transformers.BitsAndBytesConfig(**chosen)
    source = source_of(found, experiment)
    with failing_as(f"transformers cannot load {found.name}"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            found.path, **source, **options, output_loading_info=True
        )
    fit = reported(info)
    if experiment.adapter is not None:
        model, lacking = _with_adapter(model, experiment.adapter)
        fit = replace(fit, missing=(*fit.missing, *lacking))
    return model.eval(), fit


def _with_adapter(model: Any, adapter: str) -> tuple[Any, tuple[str, ...]]:
    """Return the model with the adapter, and a note for each set of matrices that peft reports as missing."""
    import peft

    with warnings.catch_warnings(record=True) as caught, failing_as(f"peft cannot load the adapter {adapter}"):
        warnings.filterwarnings("always", message=ADAPTER_LACKS)
        model = peft.PeftModel.from_pretrained(model, adapter)
    said = [str(each.message) for each in caught if str(each.message).startswith(ADAPTER_LACKS)]
    return model, tuple(f"matrices of the adapter {adapter}" for _ in said)


def _placement(
    torch: Any, transformers: Any, experiment: Experiment, found: Model, devices: Sequence[Any]
) -> dict[str, Any]:
    """Return the options with which transformers places the weights on the devices."""
    strategy = strategy_of(experiment)
    if strategy in ("none", "data_parallel"):
        return {"device_map": {"": devices[0]}}
    config = transformers.AutoConfig.from_pretrained(found.path, **source_of(found, experiment))
    if strategy == "tensor_parallel":
        if devices[0].type == "cpu" and torch.cuda.is_available():
            raise RunError(
                "the device is the CPU, but tensor_parallel uses GPUs if any are visible; hide them with "
                "CUDA_VISIBLE_DEVICES=''."
            )
        return {"distributed_config": split_over_ranks(config, experiment.parallelism.degree)}
    with torch.device("meta"):
        trusted = experiment.trust_remote_code
        hollow = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    return {"device_map": {name: devices[place] for name, place in spread(hollow, len(devices)).items()}}


def _generation_config(transformers: Any, experiment: Experiment, special: dict[str, Any]) -> Any:
    assert isinstance(experiment.backend, PytorchBackend)
    decoder, cache = experiment.decoder, experiment.backend.cache_implementation
    sampling = {
        "temperature": decoder.temperature,
        "top_k": decoder.top_k,
        "top_p": decoder.top_p,
        "min_p": decoder.min_p or None,
    }
    return transformers.GenerationConfig(
        max_new_tokens=experiment.max_output_tokens,
        min_new_tokens=experiment.min_output_tokens or None,
        do_sample=decoder.do_sample,
        repetition_penalty=decoder.repetition_penalty,
        num_beams=1,
        use_cache=cache != "none",
        cache_implementation="static" if cache == "static" else None,
        # With a static cache, transformers would compile by default. In lem, only torch_compile decides this.
        disable_compile=True,
        **(sampling if decoder.do_sample else {}),
        **special,
    )


# ------------------------------------------------------------------ batches
class Static:
    """Runs transformers' `generate` on one padded batch after another."""

    def __init__(self, experiment: Experiment, loaded: Loaded, watch: ForwardWatch) -> None:
        assert isinstance(experiment.backend, PytorchBackend)
        self._experiment, self._loaded, self._watch = experiment, loaded, watch
        self.cache: str = experiment.backend.cache_implementation
        self.graphs_compiled = 0
        self._prefill_end_ns: int | None = None
        self.forget_cache()
        self.noticed = Noticed()
        self._masks_padding = loaded.found.text_config.get("model_type") not in PADDING_UNMASKED

    def _after_prefill(self) -> None:
        """Record when a batch's first forward pass is done, waiting for the device once per batch."""
        self._loaded.synchronize()
        self._prefill_end_ns = time.perf_counter_ns()

    def forget_cache(self) -> None:
        """Forget the size of the largest cache so far."""
        self._largest = 0
        self._cache_bytes: int | None = None

    def kv_cache_bytes(self) -> int | None:
        """Return the final size in bytes of the largest batch's cache, summed over processes that share the model.

        The result is None if no batch has been run, or if the model kept no cache.
        """
        return self._cache_bytes

    def _measure_cache(self, output: Any, tokens: int) -> None:
        """Measure the last batch's cache, unless an earlier batch had at least as many tokens, padding included.

        `output` is that of the batch's last forward pass. The cache is taken from there, because transformers generates
        differently if it is asked to return the cache.
        """
        if tokens <= self._largest:
            return
        self._largest, held = tokens, cache_in(output)
        own = None if held is None else cache_bytes(held)
        split = strategy_of(self._experiment) == "tensor_parallel"
        self._cache_bytes = None if own is None else own * (self._experiment.parallelism.degree if split else 1)

    def settings(self) -> dict[str, str]:
        """Return an empty mapping: static batching has no settings in addition to the backend's own."""
        return {}

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Run the prompts in static batches: the prompts of a batch all finish together."""
        import torch

        graphs_before = compiled_graphs()
        batches = plan_batches([len(p.token_ids) for p in prompts], self._experiment.batching)
        for number, positions in enumerate(batches):
            members = [prompts[i] for i in positions]
            self._prefill_end_ns, self._watch.once = None, self._after_prefill
            # Each batch has its own seed, so that a resumed run continues with the same tokens.
            self._seed(torch, self._experiment.seed + members[0].index)
            clock = _TokenClock() if self._experiment.streaming.enabled else None
            start_ns = time.perf_counter_ns()
            outputs = self._generate_batch(torch, members, clock)
            end_ns = time.perf_counter_ns()
            longest = max(len(p.token_ids) for p in members) + max(map(len, outputs))
            self._look_at_last_pass(members, longest)
            cut = [cut_after_end(output, self._loaded.end_tokens) for output in outputs]
            yield [
                Generation(
                    prompt.index,
                    number,
                    tokens,
                    reason,
                    start_ns=start_ns,
                    end_ns=end_ns,
                    prefill_end_ns=self._prefill_end_ns,
                    chunks=first_tokens(clock.chunks, len(tokens)) if clock else (),
                )
                for prompt, (tokens, reason) in zip(members, cut, strict=True)
            ]
            self.graphs_compiled = compiled_graphs() - graphs_before

    def _seed(self, torch: Any, seed: int) -> None:
        # Until CUDA is initialized, torch.manual_seed formats the call stack, which takes 0.4 ms.
        if self._loaded.gpus:
            torch.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _look_at_last_pass(self, members: Sequence[Encoded], longest: int) -> None:
        """Measure the cache and count meaningless requests in a finished batch, whose output is then released."""
        output = self._watch.take()
        self._measure_cache(output, len(members) * longest)
        self._notice(output, members)

    def _notice(self, output: Any, members: Sequence[Encoded]) -> None:
        """In a finished batch, count the requests whose tokens are meaningless (see `Noticed`)."""
        self.noticed.not_finite += min(not_finite(output), len(members))
        if not self._masks_padding:
            longest = max(len(p.token_ids) for p in members)
            self.noticed.padded += sum(len(p.token_ids) < longest for p in members)

    def _generate_batch(self, torch: Any, members: Sequence[Encoded], clock: _TokenClock | None) -> list[list[int]]:
        """Generate, and return the new tokens of each prompt, including any after an end token."""
        longest = max(len(p.token_ids) for p in members)
        padding = [longest - len(p.token_ids) for p in members]
        pad, device = self._loaded.pad_token, self._loaded.devices[0]
        ids = [[pad] * skipped + list(p.token_ids) for p, skipped in zip(members, padding, strict=True)]
        mask = [[0] * skipped + [1] * (longest - skipped) for skipped in padding]
        output = self._loaded.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=self._loaded.generation_config,
            logits_processor=self._logits_processors(padding),
            streamer=clock,
        )
        # Reading the tokens back waits for the device, so the batch's end time is accurate.
        new: list[list[int]] = output[:, longest:].tolist()
        return new

    def _logits_processors(self, padding: list[int]) -> Any:
        """Return processors that ban repeated n-grams in each row; transformers' own option would count padding too."""
        import transformers

        size = self._experiment.decoder.no_repeat_ngram_size
        if not size:
            return None
        ban = transformers.NoRepeatNGramLogitsProcessor(size)

        def each_row(ids: Any, scores: Any) -> Any:
            for row, skipped in enumerate(padding):
                scores[row : row + 1] = ban(ids[row : row + 1, skipped:], scores[row : row + 1])
            return scores

        return transformers.LogitsProcessorList([each_row])


class _TokenClock:
    """Records when `generate` delivers tokens: in each step, one token for each prompt of the batch.

    `generate` reads the tokens back from the device to pass them on, so each step waits for its tokens.
    """

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self._prompt_is_next = True

    def put(self, value: Any) -> None:
        """Record when the next token of each prompt arrived; the first call passes the prompts, and is ignored."""
        if self._prompt_is_next:
            self._prompt_is_next = False
        else:
            self.chunks.append(Chunk(time.perf_counter_ns(), 1))

    def end(self) -> None:
        """Do nothing when generation ends."""


def cut_after_end(tokens: Sequence[int], end_tokens: frozenset[int]) -> tuple[tuple[int, ...], FinishReason]:
    """Return the tokens up to and including the first end token, and the finish reason; later tokens are dropped."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tuple(tokens[: position + 1]), "stop"
    return tuple(tokens), "length"
