"""transformers' `generate` on PyTorch, in this process.

Prompts are padded on the left within a batch; the padding is masked and never counted. torch and transformers
are imported when the model is loaded, not before: they take seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lem.backends.architecture import architecture_of, kv_bytes_per_token
from lem.backends.base import Backend, Encoded, Generation
from lem.backends.pytorch_objections import objections
from lem.batching import plan_batches
from lem.doubts import note
from lem.errors import RunError
from lem.flops import Architecture
from lem.gpu import Gpu
from lem.host import Host, cpu_model, peak_memory_bytes, versions
from lem.models import Model, find
from lem.objection import Objection
from lem.record import EngineInfo, FinishReason, Memory, ModelInfo, Note
from lem.spec import Experiment, PytorchBackend


class Pytorch(Backend):
    """See the module."""

    def __init__(self, experiment: Experiment) -> None:
        assert isinstance(experiment.backend, PytorchBackend)
        self._experiment = experiment
        self._options = experiment.backend
        self._device: Any = None
        self._found: Model | None = None
        self._model: Any = None
        self._tokenizer: Any = None
        self._generation_config: Any = None
        self._end_tokens: frozenset[int] = frozenset()
        self._prefill_end_ns: int | None = None
        self._graphs_compiled = 0
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
        """Return the first visible GPU, or none when PyTorch runs on the CPU."""
        import torch

        if self._device_type(torch.cuda.is_available()) == "cpu":
            return ()
        # By the order of CUDA_VISIBLE_DEVICES: asking CUDA would open its context before idle power is measured.
        # `load` checks that CUDA agrees.
        self._expected = host.gpus[:1]
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
        self._device = torch.device(self._device_type(torch.cuda.is_available()))
        self._check_device(torch)
        self._tokenizer = self._load_tokenizer(transformers)
        self._model = self._load_model(torch, transformers)
        self._end_tokens = _end_tokens(self._model, self._tokenizer)
        self._generation_config = self._make_generation_config(transformers)
        self._watch_prefill()
        if self._options.torch_compile:
            inner = self._inner_model()
            inner.forward = torch.compile(inner.forward, mode=self._options.torch_compile_mode)

    def _check_device(self, torch: Any) -> None:
        """Make sure that the GPU that is metered is the one that computes; CUDA may number GPUs in its own order."""
        if self._device.type != "cuda" or not self._expected or self._expected[0].mig_uuid:
            return
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        if uuid not in self._expected[0].uuid:
            raise RunError(
                f"CUDA's first GPU is {uuid}, the driver's is {self._expected[0].uuid}. "
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

    def _device_type(self, cuda: bool) -> str:
        wanted = self._options.device
        return ("cuda:0" if cuda else "cpu") if wanted == "auto" else wanted.replace("cuda", "cuda:0")

    def _load_tokenizer(self, transformers: Any) -> Any:
        assert self._found is not None
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            self._found.path,
            revision=self._found.revision,
            padding_side="left",
            trust_remote_code=self._experiment.trust_remote_code,
        )
        if tokenizer.pad_token_id is None:
            # Any token will do: padding is masked out, and what follows the end token is cut off.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    def _load_model(self, torch: Any, transformers: Any) -> Any:
        assert self._found is not None
        options: dict[str, Any] = {"dtype": self._dtype(torch), "device_map": {"": self._device}}
        if self._options.attn_implementation != "auto":
            options["attn_implementation"] = self._options.attn_implementation
        if self._experiment.quantization.quantization:
            options["quantization_config"] = self._quantization_config(torch, transformers)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self._found.path,
            revision=self._found.revision,
            trust_remote_code=self._experiment.trust_remote_code,
            **options,
        )
        if self._experiment.adapter is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, self._experiment.adapter)
        return model.eval()

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
        """Tokenize each text by itself, with the model's own special tokens."""
        limit = self._experiment.max_input_tokens
        encoded = []
        for index, text in enumerate(texts):
            ids = self._token_ids(text)
            encoded.append(Encoded(index, tuple(ids[:limit]), limit is not None and len(ids) > limit))
        self._check_lengths(encoded)
        return encoded

    def _check_lengths(self, encoded: Sequence[Encoded]) -> None:
        """Refuse prompts that do not fit into the model's positions, before anything is measured."""
        empty = next((p for p in encoded if not p.token_ids), None)
        if empty is not None:
            raise RunError(f"Prompt {empty.index} has no tokens in this model's tokenizer; leave it out.")
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(encoded, key=lambda p: len(p.token_ids))
        needed = len(longest.token_ids) + self._experiment.max_output_tokens
        if positions is not None and needed > positions:
            raise RunError(
                f"Prompt {longest.index} has {len(longest.token_ids)} tokens; with max_output_tokens "
                f"{self._experiment.max_output_tokens} that is more than the model's {positions} positions. "
                f"Set max_input_tokens={max(1, positions - self._experiment.max_output_tokens)} or less."
            )

    def _token_ids(self, text: str) -> list[int]:
        if not self._experiment.chat_template:
            return list(self._tokenizer(text)["input_ids"])
        turns = [{"role": "user", "content": text}]
        rendered = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def generate(self, prompts: Sequence[Encoded]) -> Iterator[Generation]:
        """Run the prompts in batches; those of a batch are finished together."""
        import torch

        torch.manual_seed(self._experiment.seed)
        graphs_before = compiled_graphs()
        batches = plan_batches([len(p.token_ids) for p in prompts], self._experiment.batching)
        for number, positions in enumerate(batches):
            members = [prompts[i] for i in positions]
            self._prefill_end_ns = None
            start_ns = time.perf_counter_ns()
            outputs = self._generate_batch(torch, members)
            end_ns = time.perf_counter_ns()
            for prompt, output in zip(members, outputs, strict=True):
                tokens, reason = cut_after_end(output, self._end_tokens)
                yield Generation(prompt.index, number, tokens, reason, start_ns, end_ns, self._prefill_end_ns)
            self._graphs_compiled = compiled_graphs() - graphs_before

    def _generate_batch(self, torch: Any, members: Sequence[Encoded]) -> list[list[int]]:
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
        """Wait for the GPU."""
        if self._device is not None and self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)

    # -------------------------------------------------------------- telling
    def reset_peak_memory(self) -> None:
        """Reset the CUDA allocator's peak; a process's own peak cannot be reset."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_memory(self) -> Memory:
        """Return the CUDA allocator's peak since the reset, or on the CPU the process's."""
        if self._device.type == "cuda":
            import torch

            return Memory(torch.cuda.max_memory_allocated(self._device), "GPU allocator, measured window")
        return Memory(peak_memory_bytes(), "process, since its start")

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

        on_gpu = self._device.type == "cuda"
        return EngineInfo(
            backend="pytorch",
            version=f"transformers {versions()['transformers']}, torch {torch.__version__}",
            device=str(self._device),
            device_name=torch.cuda.get_device_name(self._device) if on_gpu else cpu_model(),
            settings={
                "attn_implementation": str(self._model.config._attn_implementation),
                "cache_implementation": self._options.cache_implementation,
                "torch_compile": self._options.torch_compile_mode if self._options.torch_compile else "off",
                "torch_threads": str(torch.get_num_threads()),
                "end_token_ids": ",".join(map(str, sorted(self._end_tokens))) or "none",
                "chat_template": "on" if self._experiment.chat_template else "off",
            },
        )

    def architecture(self) -> Architecture | None:
        """Read the sizes off the loaded modules."""
        return architecture_of(self._model)

    def kv_cache_bytes_per_token(self) -> int | None:
        """Return 2 (keys, values) · layers · key/value heads · head dimension · bytes of the dtype."""
        if self._options.cache_implementation == "none":
            return None
        return kv_bytes_per_token(self._model.config.get_text_config(), self._model.dtype.itemsize)

    def notes(self) -> list[Note]:
        """Say so when the weights are random, and when the last call of `generate` still compiled."""
        notes = []
        if self._found is not None and self._found.random_weights:
            notes.append(note("random_weights", f"{self._found.name} has random weights: its text has no meaning."))
        if self._graphs_compiled:
            notes.append(note("compiled_in_window", f"{self._graphs_compiled} graphs were compiled in the window."))
        return notes

    def close(self) -> None:
        """Drop the model and give the GPU's memory back."""
        self._model = None
        if self._device is not None and self._device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


def compiled_graphs() -> int:
    """Return how many graphs this process has compiled so far with torch.compile, by whoever asked for it."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


def cut_after_end(tokens: Sequence[int], end_tokens: frozenset[int]) -> tuple[tuple[int, ...], FinishReason]:
    """Cut a sequence after its first end token: what a batch still generates then is not output."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tuple(tokens[: position + 1]), "stop"
    return tuple(tokens), "length"


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a sequence, as the model's generation config has them, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _quantization_name(experiment: Experiment) -> str | None:
    wanted = experiment.quantization
    if not wanted.quantization:
        return None
    return "bitsandbytes 8-bit" if wanted.load_in_8bit else f"bitsandbytes 4-bit {wanted.bnb_4bit_quant_type}"
