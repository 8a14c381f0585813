"""transformers' `generate` on PyTorch, in this process.

Prompts are padded on the left within a batch; the padding is masked and never counted. Process number i of a node
computes on its i-th visible GPU; with pipeline parallelism one process has the first `degree` of them. torch and
transformers are imported when the model is loaded, not before: they take seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from lem.backends.base import Backend, Encoded, Generation
from lem.backends.checkpoint import architecture_of, kv_bytes_per_token
from lem.backends.engine import compiled_graphs
from lem.backends.placement import split_over_ranks, spread
from lem.backends.prompts import encode, end_tokens
from lem.backends.pytorch_continuous import Continuous
from lem.backends.pytorch_objections import objections
from lem.errors import RunError
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


class Pytorch(Backend):
    """See the module."""

    tells = frozenset(["tokens", "model", "prefill", "flops", "kv_cache"])

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, PytorchBackend)
        self._experiment = experiment
        self._options = experiment.backend
        self._devices: Sequence[Any] = ()
        self._found: Model | None = None
        self._model: Any = None
        self._tokenizer: Any = None
        self._generation_config: Any = None
        self._end_tokens: frozenset[int] = frozenset()
        self._prefill_end_ns: int | None = None
        self._graphs_compiled = 0
        self._continuous: Continuous | None = None
        self._expected: Sequence[Gpu] = ()

    # -------------------------------------------------------------- before the run
    @classmethod
    def objections(cls, experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
        """Object to options that this host or this model cannot honour."""
        assert isinstance(experiment.backend, PytorchBackend)
        return objections(experiment, model, host)

    @classmethod
    def wants_gpu(cls, experiment: Experiment, host: Host) -> bool:
        """Return True unless the CPU is asked for or there is no GPU."""
        assert isinstance(experiment.backend, PytorchBackend)
        return bool(host.gpus) and experiment.backend.device != "cpu"

    def gpus_in_use(self, host: Host) -> Sequence[Gpu]:
        """Return the first visible GPUs, as many as all processes use, or none when PyTorch runs on the CPU."""
        import torch

        if not self._on_cuda(torch):
            return ()
        # By the order of CUDA_VISIBLE_DEVICES: asking CUDA would open its context before idle power is measured.
        # `load` checks that CUDA agrees.
        self._expected = host.gpus[: gpus_needed(self._experiment)]
        return self._expected

    # -------------------------------------------------------------- loading
    def start(self) -> None:
        """Import torch and transformers with the parts that loading and generating use."""
        import torch  # noqa: F401
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: F401 - lazy

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def load(self) -> None:
        """Load tokenizer and weights, the adapter if there is one, and compile if asked to."""
        import torch
        import transformers

        self._found = find(self._experiment.model or "", self._experiment.revision)
        self._devices = self._own_devices(torch)
        self._check_devices(torch)
        self._tokenizer = self._load_tokenizer(transformers)
        self._model = self._load_model(torch, transformers)
        self._end_tokens = end_tokens(self._model.generation_config, self._tokenizer)
        self._generation_config = self._make_generation_config(transformers)
        if self._experiment.batching.strategy == "continuous":
            self._continuous = Continuous(self._experiment, self._inner_model(), self._end_tokens)
        else:
            self._watch_prefill()
        if self._options.torch_compile:
            inner = self._inner_model()
            inner.forward = torch.compile(inner.forward, mode=self._options.torch_compile_mode)

    @property
    def _device(self) -> Any:
        """The device that takes the inputs."""
        return self._devices[0]

    @property
    def _strategy(self) -> str:
        return self._experiment.parallelism.strategy if self._experiment.parallelism.degree > 1 else "none"

    def _on_cuda(self, torch: Any) -> bool:
        return self._options.device == "cuda" or (self._options.device == "auto" and torch.cuda.is_available())

    def _own_devices(self, torch: Any) -> list[Any]:
        """Return the devices of this process, of those that CUDA shows."""
        if not self._on_cuda(torch):
            return [torch.device("cpu")]
        if self._strategy == "pipeline_parallel":
            return [torch.device("cuda", index) for index in range(self._experiment.parallelism.degree)]
        return [torch.device("cuda", self.local_rank)]

    def _check_devices(self, torch: Any) -> None:
        """Make sure that the GPUs that are metered are those that compute; CUDA may number GPUs in its own order."""
        if self._device.type != "cuda":
            return
        needed, shown = self._devices[-1].index + 1, torch.cuda.device_count()
        if needed > shown:
            raise RunError(
                f"GPUs that CUDA shows this process: {shown}, needed: {needed}. "
                "Of several MIG instances CUDA shows a process only the first."
            )
        torch.cuda.set_device(self._device)
        for device in self._devices if self._expected else ():
            expected, uuid = self._expected[device.index], str(torch.cuda.get_device_properties(device).uuid)
            if not expected.mig_uuid and uuid not in expected.uuid:
                raise RunError(
                    f"CUDA's GPU {device.index} is {uuid}, the driver's is {expected.uuid}. "
                    "Set CUDA_DEVICE_ORDER=PCI_BUS_ID, so that the GPU that computes is the one that is metered."
                )

    def _watch_prefill(self) -> None:
        """Note when a batch's first forward pass, its prefill, is done; costs one synchronisation a batch."""

        def after_forward(*_: Any) -> None:
            if self._prefill_end_ns is None:
                self.synchronize()
                self._prefill_end_ns = time.perf_counter_ns()

        self._inner_model().register_forward_hook(after_forward)

    def _inner_model(self) -> Any:
        """Return the model whose forward pass `generate` calls: with an adapter, the one inside of peft's wrapper."""
        return self._model.get_base_model() if self._experiment.adapter is not None else self._model

    def _load_tokenizer(self, transformers: Any) -> Any:
        assert self._found is not None
        tokenizer = transformers.AutoTokenizer.from_pretrained(self._found.path, padding_side="left", **self._source())
        if tokenizer.pad_token_id is None:
            # Any token will do: padding is masked out, and what follows the end token is cut off.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    def _load_model(self, torch: Any, transformers: Any) -> Any:
        assert self._found is not None
        options: dict[str, Any] = {"dtype": self._dtype(torch), **self._placement(torch, transformers)}
        if self._options.attn_implementation != "auto":
            options["attn_implementation"] = self._options.attn_implementation
        if self._experiment.quantization.quantization:
            options["quantization_config"] = self._quantization_config(torch, transformers)
        model = transformers.AutoModelForCausalLM.from_pretrained(self._found.path, **self._source(), **options)
        if self._experiment.adapter is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, self._experiment.adapter)
        return model.eval()

    def _source(self) -> dict[str, Any]:
        """Return the options by which transformers finds a model's parts."""
        assert self._found is not None
        return {"revision": self._found.revision, "trust_remote_code": self._experiment.trust_remote_code}

    def _placement(self, torch: Any, transformers: Any) -> dict[str, Any]:
        """Return the options that say which weights go where."""
        assert self._found is not None
        if self._strategy in ("none", "data_parallel"):
            return {"device_map": {"": self._device}}
        config = transformers.AutoConfig.from_pretrained(self._found.path, **self._source())
        if self._strategy == "tensor_parallel":
            if self._device.type == "cpu" and torch.cuda.is_available():
                raise RunError("tensor_parallel runs on GPUs where there are any; hide them: CUDA_VISIBLE_DEVICES=''")
            return {"distributed_config": split_over_ranks(config, self._experiment.parallelism.degree)}
        with torch.device("meta"):
            trusted = self._experiment.trust_remote_code
            hollow = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        places = spread(hollow, len(self._devices))
        return {"device_map": {name: self._devices[place] for name, place in places.items()}}

    def _dtype(self, torch: Any) -> Any:
        precision = self._experiment.fp_precision
        if precision != "auto":
            return getattr(torch, precision)
        # On a GPU the checkpoint's own dtype; CPUs without half-precision units are slower in anything else.
        return "auto" if self._device.type == "cuda" else torch.float32

    def _quantization_config(self, torch: Any, transformers: Any) -> Any:
        wanted = self._experiment.quantization
        if wanted.load_in_8bit:
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=wanted.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=wanted.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=getattr(torch, wanted.bnb_4bit_compute_dtype),
        )

    def _make_generation_config(self, transformers: Any) -> Any:
        """Say how to generate, leaving nothing to defaults that ship with the model."""
        wanted, decoder = self._experiment, self._experiment.decoder
        special = {
            "pad_token_id": self._tokenizer.pad_token_id,
            "eos_token_id": sorted(self._end_tokens) or None,
        }
        # What is not set below is taken from the model's own config, which may sample or penalise.
        self._model.generation_config = transformers.GenerationConfig(**special)
        sampling = {}
        if decoder.do_sample:
            sampling = {
                "temperature": decoder.temperature,
                "top_k": decoder.top_k,
                "top_p": decoder.top_p,
                "min_p": decoder.min_p or None,
            }
        cache = self._options.cache_implementation
        return transformers.GenerationConfig(
            max_new_tokens=wanted.max_output_tokens,
            min_new_tokens=wanted.min_output_tokens or None,
            do_sample=decoder.do_sample,
            repetition_penalty=decoder.repetition_penalty,
            num_beams=1,
            use_cache=cache != "none",
            cache_implementation="static" if cache == "static" else None,
            # With a static cache transformers would compile by itself; here only torch_compile decides.
            disable_compile=True,
            **sampling,
            **special,
        )

    # -------------------------------------------------------------- running
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokenize each text by itself; with continuous batching, allocate the cache that these prompts need."""
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        encoded = encode(self._tokenizer, texts, self._experiment, positions)
        if self._continuous is not None:
            self._continuous.make_room(encoded)
        return encoded

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Sequence[Generation]]:
        """Run the prompts in batches that are finished together; or continuously."""
        if self._continuous is not None:
            yield from self._continuous.generate(prompts)
            return
        import torch

        graphs_before = compiled_graphs()
        batches = plan_batches([len(p.token_ids) for p in prompts], self._experiment.batching)
        for number, positions in enumerate(batches):
            members = [prompts[i] for i in positions]
            self._prefill_end_ns = None
            # Each batch has a seed of its own, so that a resumed run goes on with the same tokens.
            torch.manual_seed(self._experiment.seed + members[0].index)
            clock = _TokenClock() if self._experiment.streaming.enabled else None
            start_ns = time.perf_counter_ns()
            outputs = self._generate_batch(torch, members, clock)
            end_ns = time.perf_counter_ns()
            cut = [cut_after_end(output, self._end_tokens) for output in outputs]
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
            self._graphs_compiled = compiled_graphs() - graphs_before

    def serve(self, arrivals: Arrivals[Encoded], at_most: int) -> Iterator[Sequence[Generation]]:
        """Run batch after batch of those that wait; or take each prompt in as it arrives, amid the others."""
        yield from (
            super().serve(arrivals, at_most) if self._continuous is None else self._continuous.serve(arrivals, at_most)
        )

    def _generate_batch(self, torch: Any, members: Sequence[Encoded], clock: _TokenClock | None) -> list[list[int]]:
        """Return the new tokens of each prompt, the rest of the batch's length included."""
        longest = max(len(p.token_ids) for p in members)
        pad = self._tokenizer.pad_token_id
        ids = [[pad] * (longest - len(p.token_ids)) + list(p.token_ids) for p in members]
        mask = [[0] * (longest - len(p.token_ids)) + [1] * len(p.token_ids) for p in members]
        output = self._model.generate(
            input_ids=torch.tensor(ids, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            generation_config=self._generation_config,
            logits_processor=self._logits_processors([longest - len(p.token_ids) for p in members]),
            streamer=clock,
        )
        # Reading the tokens back waits for the device, so the batch's end is its real end.
        new: list[list[int]] = output[:, longest:].tolist()
        return new

    def _logits_processors(self, padding: list[int]) -> Any:
        """Ban repeated n-grams in each row's own text: transformers' option would take padding for text."""
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

    def synchronize(self) -> None:
        """Wait for all GPUs of this process."""
        for device in self._gpus():
            import torch

            torch.cuda.synchronize(device)

    def _gpus(self) -> list[Any]:
        return [device for device in self._devices if device.type == "cuda"]

    # -------------------------------------------------------------- telling
    def reset_peak_memory(self) -> None:
        """Reset the CUDA allocator's peak; a process's own peak cannot be reset."""
        for device in self._gpus():
            import torch

            torch.cuda.reset_peak_memory_stats(device)

    def peak_memory(self) -> Memory:
        """Return the CUDA allocator's peaks since the reset, summed over the GPUs, or on the CPU the process's."""
        gpus, cache_bytes = self._gpus(), None if self._continuous is None else self._continuous.kv_cache_bytes()
        if not gpus:
            return Memory(peak_memory_bytes(), "process, since its start", cache_bytes)
        import torch

        several = f", sum of {len(gpus)} GPUs" if len(gpus) > 1 else ""
        peak = sum(torch.cuda.max_memory_allocated(device) for device in gpus)
        return Memory(peak, f"GPU allocator, measured window{several}", cache_bytes)

    def model_info(self) -> ModelInfo | None:
        """Describe the model as it was loaded."""
        assert self._found is not None
        return ModelInfo(
            name=self._found.name,
            revision=self._found.revision,
            architecture=", ".join(self._found.config.get("architectures") or [type(self._model).__name__]),
            parameters=self._model.num_parameters(),
            random_weights=self._found.random_weights,
            weights_bytes=sum(p.numel() * p.element_size() for p in self._model.parameters()),
            dtype=str(self._model.dtype).removeprefix("torch."),
            adapter=self._experiment.adapter,
            quantization=_quantization_name(self._experiment),
        )

    def engine_info(self) -> EngineInfo:
        """Describe PyTorch, transformers and the settings in use."""
        import torch

        on_gpu, degree = self._device.type == "cuda", self._experiment.parallelism.degree
        return EngineInfo(
            backend="pytorch",
            version=f"transformers {versions()['transformers']}, torch {torch.__version__}",
            device=", ".join(map(str, self._devices)),
            device_name=torch.cuda.get_device_name(self._device) if on_gpu else cpu_model(),
            settings={
                "attn_implementation": str(self._model.config._attn_implementation),
                "cache_implementation": self._options.cache_implementation if self._continuous is None else "paged",
                "torch_compile": self._options.torch_compile_mode if self._options.torch_compile else "off",
                "torch_threads": str(torch.get_num_threads()),
                "parallelism": f"{self._strategy} {degree}" if self._strategy != "none" else "none",
                "end_token_ids": ",".join(map(str, sorted(self._end_tokens))) or "none",
                "chat_template": "on" if self._experiment.chat_template else "off",
                **({} if self._continuous is None else self._continuous.settings()),
            },
        )

    def architecture(self) -> Architecture | None:
        """Read the sizes off the loaded modules."""
        return architecture_of(self._model)

    def kv_cache_bytes_per_token(self) -> int | None:
        """Return 2 (keys, values) · layers · key/value heads · head dimension · bytes of the dtype."""
        if self._options.cache_implementation == "none" or self._continuous is not None:
            return None  # nothing is cached, or the cache is allocated beforehand: see peak_memory
        return kv_bytes_per_token(self._model.config.get_text_config(), self._model.dtype.itemsize)

    def warnings(self) -> list[CodedWarning]:
        """Say so when the weights are random, and when the last call of `generate` still compiled."""
        notes = []
        if self._found is not None and self._found.random_weights:
            notes.append(warning("random_weights", f"{self._found.name} has random weights: its text has no meaning."))
        if self._graphs_compiled:
            notes.append(warning("compiled_in_window", f"{self._graphs_compiled} graphs were compiled in the window."))
        return notes

    def close(self) -> None:
        """Drop the model and give the GPUs' memory back."""
        if self._continuous is not None:
            self._continuous.close()
        self._model = self._continuous = None
        if self._gpus():
            import torch

            torch.cuda.empty_cache()


class _TokenClock:
    """What `generate` hands its tokens to: notes when they come, one for each prompt of the batch.

    Handing them over reads them back from the device, so each step waits for its token.
    """

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self._prompt_is_next = True

    def put(self, value: Any) -> None:
        """Take the prompt, which comes first, or the next token of each prompt."""
        if self._prompt_is_next:
            self._prompt_is_next = False
        else:
            self.chunks.append(Chunk(time.perf_counter_ns(), 1))

    def end(self) -> None:
        """Take note that there is no more."""


def cut_after_end(tokens: Sequence[int], end_tokens: frozenset[int]) -> tuple[tuple[int, ...], FinishReason]:
    """Cut a sequence after its first end token: what a batch still generates then is not output."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tuple(tokens[: position + 1]), "stop"
    return tuple(tokens), "length"


def _quantization_name(experiment: Experiment) -> str | None:
    wanted = experiment.quantization
    if not wanted.quantization:
        return None
    return "bitsandbytes 8-bit" if wanted.load_in_8bit else f"bitsandbytes 4-bit {wanted.bnb_4bit_quant_type}"
